"""Raw files to documents: work units that split large files and group small ones, and tolerant readers for them.

A bad line costs only itself: it comes out as a BadLine in its place, so that documents plus bad lines count the lines
of a unit, and the line numbers of a byte range follow from the ranges before it.
"""

from collections.abc import Iterator, Sequence

from data_prep.reading import head, storage, streams
from data_prep.reading.corpus import InputFile
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import KNOWN_SUFFIXES, PROSE_SUFFIXES, compression, content_suffix, file_kind
from data_prep.reading.parquet_files import UnreadableError, read_rows, row_groups
from data_prep.reading.records import BadLine, Document, Unit, UnitKind, bad_line, json_extractor
from data_prep.reading.storage import InputError
from data_prep.reading.streams import StreamError
from data_prep.reading.templates import Layout
from data_prep.reading.text_files import read_paragraphs, read_text_lines, read_texts

RANGE_BYTES = 32 * 1024 * 1024
GROUP_BYTES = 8 * 1024 * 1024


def plan_units(
    files: Sequence[InputFile],
    layout: Layout,
    *,
    range_bytes: int = RANGE_BYTES,
    group_bytes: int = GROUP_BYTES,
) -> list[Unit]:
    """Divide files into units, in the order of the files; how they are divided does not change the documents.

    The units of a file carry the layout that fits it, where the given one is "auto".

    Raises:
        InputError: a file of unknown kind, or none of whose records any layout fits; a parquet file without the
            columns of the layout.
    """
    units: list[Unit] = []
    group: list[InputFile] = []
    for file in files:
        if file_kind(file.path) == "text" and not _is_split(file.path, layout):
            group.append(file)
            continue
        units += _text_units(group, layout, group_bytes)
        group = []
        units += _units_of_file(file, layout, range_bytes)
    return [*units, *_text_units(group, layout, group_bytes)]


def read_unit(unit: Unit) -> Iterator[Document | BadLine]:
    """Read a unit: one Document or BadLine for each of its lines, rows, elements or files, in order.

    Raises:
        InputError, OSError: a file cannot be reached or read any more.
    """
    readers = {
        "texts": read_texts,
        "text-lines": read_text_lines,
        "paragraphs": read_paragraphs,
        "rows": read_rows,
    }
    return readers.get(unit.kind, _read_json)(unit)


def _is_split(path: str, layout: Layout) -> bool:
    return layout.split != "file" and content_suffix(path) in PROSE_SUFFIXES


def _text_units(files: Sequence[InputFile], layout: Layout, group_bytes: int) -> Iterator[Unit]:
    group: list[str] = []
    size_bytes = 0
    for file in files:
        if group and size_bytes + file.size_bytes > group_bytes:
            yield Unit("texts", tuple(group), layout, size_bytes)
            group, size_bytes = [], 0
        group.append(file.path)
        size_bytes += file.size_bytes
    if group:
        yield Unit("texts", tuple(group), layout, size_bytes)


def _units_of_file(file: InputFile, layout: Layout, range_bytes: int) -> list[Unit]:
    kind = file_kind(file.path)
    if kind is None:
        raise InputError(f"{file.path}: unknown kind of file; known are {' '.join(KNOWN_SUFFIXES)}")
    if kind == "parquet":
        return _row_units(file, layout)
    if kind == "text":
        unit_kind: UnitKind = "text-lines" if layout.split == "lines" else "paragraphs"
    else:
        unit_kind = head.json_kind(file.path, layout.encoding) if kind == "json" else "lines"
        layout = head.fitting(file.path, layout, head.json_records(file.path, unit_kind, layout.encoding))
    if compression(file.path) or unit_kind not in ("lines", "text-lines"):
        return [Unit(unit_kind, (file.path,), layout, file.size_bytes, 0, file.size_bytes)]
    starts = range(0, file.size_bytes, range_bytes)
    stops = [min(start + range_bytes, file.size_bytes) for start in starts]
    return [Unit(unit_kind, (file.path,), layout, b - a, a, b) for a, b in zip(starts, stops, strict=True)]


def _row_units(file: InputFile, layout: Layout) -> list[Unit]:
    try:
        rows_of_groups, columns = row_groups(file.path)
    except UnreadableError:  # its reader will say so
        return [Unit("rows", (file.path,), head.fitting(file.path, layout, []), file.size_bytes)]
    num_groups = len(rows_of_groups)
    if layout.is_auto:
        known = [name for name in columns if name in layout.fields()]
        layout = head.fitting(file.path, layout, head.parquet_records(file.path, num_groups, known), columns)
    else:
        _check_columns(file.path, layout, columns)
    size_bytes = file.size_bytes // max(num_groups, 1)
    return [Unit("rows", (file.path,), layout, size_bytes, index) for index in range(num_groups)]


def _check_columns(path: str, layout: Layout, columns: Sequence[str]) -> None:
    try:
        layout.columns(columns)
    except BadRecordError as error:
        raise InputError(
            f"{path}: {error}; its columns are {', '.join(columns)}. Name one of them with input.text_field, or choose "
            "another input.layout or template for it"
        ) from error


def _read_json(unit: Unit) -> Iterator[Document | BadLine]:
    read = json_extractor(unit.layout)
    number = next_place = 0
    try:
        for place, content, is_cut in _json_texts(unit):
            number += 1
            next_place = place + (1 if unit.kind == "array" else len(content) + 1)
            try:
                if is_cut:
                    raise BadRecordError(streams.LINE_TOO_LONG)
                text, turns = read(content)
            except BadRecordError as error:
                yield bad_line(error, 0, number, place, content)
            else:
                yield Document(text, 0, place, number, turns)
    except StreamError as error:
        yield BadLine(0, number + 1, next_place, str(error))


def _json_texts(unit: Unit) -> Iterator[streams.Line]:
    """The JSON objects of a unit, each with its place."""
    path = unit.paths[0]
    if unit.kind == "array":
        for index, element in enumerate(head.array_elements(path, unit.layout.encoding)):
            yield index, element, False
    elif unit.kind == "object":
        yield 0, b"".join(head.blocks(path)), False
    elif compression(path):
        yield from streams.compressed_lines(path)
    else:
        with storage.open_range(path) as file:
            yield from streams.range_lines(file, unit.start, unit.stop)

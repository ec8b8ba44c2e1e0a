"""Raw files to documents: work units that split large files and group small ones, and tolerant readers for them.

A bad line costs only itself: it comes out as a BadLine in its place, so that documents plus bad lines count the lines
of a unit, and the line numbers of a byte range follow from the ranges before it.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep import streams

TEXT_SUFFIXES = (".txt", ".md", ".py")
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
RANGE_BYTES = 8 * 1024 * 1024
GROUP_BYTES = 4 * 1024 * 1024


class InputError(ValueError):
    """The input as a whole cannot be used: nothing found, unknown kind, too much of it bad."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    id: str
    """Path and place of the document, unique within an input: `path`, `path#<byte offset>` or `path#<row>`."""
    text: str
    source: str
    path: str = ""
    line: int = 1
    """Line or row, from 1, counted from the start of its unit."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, row or file that gave no document."""

    path: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker reads at a time: whole text files, the lines that start in a byte range, a compressed file, or
    a row group.
    """

    kind: Literal["texts", "lines", "stream", "rows"]
    paths: tuple[str, ...]
    source: str
    text_field: str
    size_bytes: int
    """Share of the input, for progress; of row groups an estimate."""
    start: int = 0
    """First byte of a range; index of a row group."""
    stop: int = 0


def plan_units(
    paths: Iterable[Path],
    *,
    source: str,
    text_field: str = "text",
    range_bytes: int = RANGE_BYTES,
    group_bytes: int = GROUP_BYTES,
) -> list[Unit]:
    """Divide files into units, in the order of the files; how they are divided does not change the documents.

    Raises:
        InputError: a file of unknown kind, an unreadable parquet file, or one without a text column.
    """
    units: list[Unit] = []
    group: list[Path] = []
    for path in paths:
        if path.suffix in TEXT_SUFFIXES:
            group.append(path)
            continue
        units += _text_units(group, source, group_bytes)
        group = []
        units += _units_of_file(path, source, text_field, range_bytes)
    return [*units, *_text_units(group, source, group_bytes)]


def read_unit(unit: Unit) -> Iterator[Document | BadLine]:
    """Read a unit: one Document or BadLine for each of its lines, rows or files, in order."""
    reader = {"texts": _read_texts, "lines": _read_lines, "stream": _read_stream, "rows": _read_rows}[unit.kind]
    return reader(unit)


def _text_units(paths: Sequence[Path], source: str, group_bytes: int) -> Iterator[Unit]:
    group: list[str] = []
    size_bytes = 0
    for path in paths:
        file_bytes = path.stat().st_size
        if group and size_bytes + file_bytes > group_bytes:
            yield Unit("texts", tuple(group), source, "", size_bytes)
            group, size_bytes = [], 0
        group.append(str(path))
        size_bytes += file_bytes
    if group:
        yield Unit("texts", tuple(group), source, "", size_bytes)


def _units_of_file(path: Path, source: str, text_field: str, range_bytes: int) -> list[Unit]:
    name, size_bytes = str(path), path.stat().st_size
    if name.endswith((".jsonl.gz", ".jsonl.zst")):
        return [Unit("stream", (name,), source, text_field, size_bytes)]
    if path.suffix == ".jsonl":
        starts = range(0, size_bytes, range_bytes)
        stops = [min(start + range_bytes, size_bytes) for start in starts]
        return [Unit("lines", (name,), source, text_field, b - a, a, b) for a, b in zip(starts, stops, strict=True)]
    if path.suffix == ".parquet":
        num_groups = _num_row_groups(path, text_field)
        group_bytes = size_bytes // max(num_groups, 1)
        return [Unit("rows", (name,), source, text_field, group_bytes, i) for i in range(num_groups)]
    raise InputError(f"{path}: unknown kind of file; known are {', '.join(KNOWN_SUFFIXES)}")


def _read_texts(unit: Unit) -> Iterator[Document | BadLine]:
    for path in unit.paths:
        raw = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadLine(path, raw.count(b"\n", 0, error.start) + 1, "invalid UTF-8")
        else:
            yield _checked(text, Document(path, text, unit.source, path))


def _read_lines(unit: Unit) -> Iterator[Document | BadLine]:
    with Path(unit.paths[0]).open("rb") as file:
        for line, (offset, content) in enumerate(streams.range_lines(file, unit.start, unit.stop), start=1):
            yield _parse_line(unit, line, offset, content)


def _read_stream(unit: Unit) -> Iterator[Document | BadLine]:
    path, line = unit.paths[0], 0
    try:
        for offset, content in streams.compressed_lines(Path(path)):
            line += 1
            yield _parse_line(unit, line, offset, content)
    except streams.StreamError as error:
        yield BadLine(path, line + 1, str(error))


def _parse_line(unit: Unit, line: int, offset: int, content: bytes | None) -> Document | BadLine:
    path = unit.paths[0]
    if content is None:
        return BadLine(path, line, streams.LINE_TOO_LONG)
    if offset == 0:
        content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        return BadLine(path, line, "blank line")
    try:
        record = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return BadLine(path, line, "invalid UTF-8")
    except (ValueError, RecursionError):  # also numbers of thousands of digits, and thousands of brackets
        return BadLine(path, line, "invalid JSON")
    if not isinstance(record, dict):
        return BadLine(path, line, "not a JSON object")
    if unit.text_field not in record:
        return BadLine(path, line, f"no field {unit.text_field!r}")
    value = record[unit.text_field]
    return _checked(value, Document(f"{path}#{offset}", value, unit.source, path, line))


def _checked(value: Any, document: Document) -> Document | BadLine:
    """The document, if its value is a text that can be encoded."""
    reason = None
    if value is None:
        reason = "text is null"
    elif not isinstance(value, str):
        reason = "text is not a string"
    elif not value.strip():
        reason = "empty text"
    elif not _is_encodable(value):
        reason = "lone surrogate"
    return document if reason is None else BadLine(document.path, document.line, reason)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a UTF-16 pair, UTF-8 cannot
        return False
    return True


def _num_row_groups(path: Path, text_field: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq  # here, not above: 0.25 s for every worker, needed only for parquet

    try:
        with pq.ParquetFile(path) as file:
            schema, num_groups = file.schema_arrow, file.num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error}); repair it or leave it out") from error
    columns = [field.name for field in schema if _is_text(field.type)]
    if text_field not in columns:
        raise InputError(
            f"{path}: no text column {text_field!r}; its text columns are {columns}. Name one with --input.text-field"
        )
    return num_groups


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _read_rows(unit: Unit) -> Iterator[Document | BadLine]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, line = unit.paths[0], 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, row_groups=[unit.start], columns=[unit.text_field]):
                for value in batch.column(0):
                    line += 1
                    yield _parse_row(unit, line, value)
    except (pa.ArrowException, OSError) as error:
        yield BadLine(path, line + 1, f"unreadable row group ({type(error).__name__})")


def _parse_row(unit: Unit, line: int, value: Any) -> Document | BadLine:
    path = unit.paths[0]
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return BadLine(path, line, "invalid UTF-8")
    return _checked(text, Document(f"{path}#{unit.start}.{line}", text, unit.source, path, line))

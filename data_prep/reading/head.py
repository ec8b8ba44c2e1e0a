"""What the beginning of a file tells of the rest: how its JSON is laid out, and what fields its records have."""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from data_prep.reading import parquet_files, storage, streams
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import compression
from data_prep.reading.json_array import elements
from data_prep.reading.records import decode, parse_object
from data_prep.reading.storage import InputError
from data_prep.reading.streams import StreamError
from data_prep.reading.templates import DETECTABLE, Layout

MAX_RECORDS = 100
"""So many records at the head of a file are looked at for one that a layout fits."""
MAX_HEAD_BYTES = 8 * 1024 * 1024
"""They are looked for no further than this."""
_BLOCK_BYTES = 1024 * 1024


def blocks(path: str) -> Iterator[bytes]:
    """The content of a file, plain or compressed, in blocks.

    Raises:
        StreamError: see streams.decompressed.
    """
    if compression(path):
        yield from streams.decompressed(path)
        return
    with storage.open_range(path) as file:
        yield from iter(partial(file.read, _BLOCK_BYTES), b"")


def array_elements(path: str, encoding: str) -> Iterator[bytes]:
    """The elements of a file that is one array, in its encoding.

    In gb18030 and big5 the second byte of a character can look like a bracket or a backslash, so that the array is cut
    as UTF-8. Bytes that are no character come through, for the reader of their element to find.

    Raises:
        StreamError: see json_array.elements and streams.decompressed.
    """
    content = blocks(path)
    first = next(content, b"")
    content = itertools.chain([first], content)
    if first.startswith(codecs.BOM_UTF8):
        yield from (codecs.BOM_UTF8 + element for element in elements(content))
    elif encoding == "utf-8":
        yield from elements(content)
    else:
        for element in elements(_as_utf8(content, encoding)):
            yield element.decode("utf-8", "surrogateescape").encode(encoding, "surrogateescape")


def json_kind(path: str, encoding: str) -> Literal["array", "object", "lines"]:
    """How a .json file is laid out: as one array, as one object over several lines, or as an object on each line.

    A file whose first line is no JSON is one object only if it is that as a whole: a bad first line must cost no more.
    """
    try:
        texts = (content for _, content, _ in streams.lines(blocks(path)) if content and not content.isspace())
        first = next(texts, b"")
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return "array"
        is_object = first and not _is_object(first, encoding) and _is_object_file(path, encoding)
        return "object" if is_object else "lines"
    except StreamError:  # its reader will say so
        return "lines"


def json_records(path: str, kind: str, encoding: str) -> Iterator[dict[str, Any]]:
    """The objects among the first lines or elements of a file, or the one that it is."""
    num_records = 0
    try:
        for end, content in _json_texts(path, kind, encoding):
            try:
                yield parse_object(content, encoding)
                num_records += 1
            except BadRecordError:
                pass
            if num_records == MAX_RECORDS or end > MAX_HEAD_BYTES:
                return
    except StreamError:
        return


def parquet_records(path: str, num_groups: int, columns: list[str]) -> Iterable[dict[str, Any]]:
    """These columns of some rows of the first row group that can be read."""
    for group in range(num_groups):
        rows = itertools.islice(parquet_files.rows(path, group, columns), MAX_RECORDS)
        if found := [row for row in rows if isinstance(row, dict)]:
            return found
    return []


def fitting(path: str, layout: Layout, records: Iterable[dict[str, Any]], columns: Sequence[str] = ()) -> Layout:
    """The layout, or, if it is "auto", the one that fits the first record that any fits.

    columns: what fields there are, where the records hold some of them only.

    Raises:
        InputError: there are records, but no layout fits one of them.
    """
    if not layout.is_auto:
        return layout
    names, longest = list[str](), ""
    for record in records:
        if (found := layout.detected(record)) is not None:
            return found
        if not names:
            names = list(columns or record)
            texts = {name: value for name, value in record.items() if isinstance(value, str)}
            longest = max(texts, key=lambda name: len(texts[name]), default=next(iter(names), "text"))
    if not names:  # nothing to be read there, so that any will do
        return Layout.named("text", encoding=layout.encoding, split=layout.split)
    raise InputError(
        f"{path}: no layout fits its records, whose fields are {', '.join(names[:20])}. Name the text with "
        f"input.text_field = {longest!r} or a template such as input.layout = {f'{{{longest}}}'!r}, or choose an "
        f"input.layout of {', '.join(DETECTABLE)}"
    )


def _json_texts(path: str, kind: str, encoding: str) -> Iterator[tuple[int, bytes]]:
    """The texts of a file's objects, each with about the place where it ends."""
    if kind == "array":
        end = 0
        for element in array_elements(path, encoding):
            end += len(element) + 1
            yield end, element
    elif kind == "object":
        yield 0, b"".join(blocks(path))
    else:
        yield from ((offset + len(content), content) for offset, content, _ in streams.lines(blocks(path)))


def _as_utf8(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def _is_object(content: bytes, encoding: str) -> bool:
    try:
        json.loads(decode(content, encoding))
    except (ValueError, RecursionError):
        return False
    return True


def _is_object_file(path: str, encoding: str) -> bool:
    parts, size_bytes = list[bytes](), 0
    for block in blocks(path):
        parts.append(block)
        size_bytes += len(block)
        if size_bytes > streams.MAX_LINE_BYTES:
            return False
    return _is_object(b"".join(parts), encoding)

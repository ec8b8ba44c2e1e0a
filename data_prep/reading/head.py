"""What the beginning of a file tells of the rest: how its JSON is laid out, and what fields its records have."""

import itertools
import json
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from data_prep.reading import parquet_files, storage, streams
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import compression
from data_prep.reading.json_array import elements
from data_prep.reading.records import parse_object
from data_prep.reading.storage import InputError
from data_prep.reading.streams import StreamError
from data_prep.reading.templates import DETECTABLE, Layout

MAX_LINES = 100
"""So many lines at the head of a file are looked at for a record that a layout fits."""
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


def json_kind(path: str) -> Literal["array", "object", "lines"]:
    """How a .json file is laid out: as one array, as one object over several lines, or as an object on each line.

    A file whose first line is no JSON is one object only if it is that as a whole: a bad first line must cost no more.
    """
    try:
        texts = (content for _, content, _ in streams.lines(blocks(path)) if content and not content.isspace())
        first = next(texts, b"")
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return "array"
        return "lines" if not first or _is_object(first) or not _is_object_file(path) else "object"
    except StreamError:  # its reader will say so
        return "lines"


def json_records(path: str, kind: str, encoding: str) -> Iterator[dict[str, Any]]:
    """The objects among the first lines or elements of a file, or the one that it is."""
    if kind == "array":
        texts = elements(blocks(path))
    elif kind == "object":
        texts = iter([b"".join(blocks(path))])
    else:
        texts = (content for _, content, _ in streams.lines(blocks(path)))
    try:
        for content in itertools.islice(texts, MAX_LINES):
            try:
                yield parse_object(content, encoding)
            except BadRecordError:
                continue
    except StreamError:
        return


def parquet_records(path: str, num_groups: int) -> Iterable[dict[str, Any]]:
    """Some rows of the first row group that can be read."""
    for group in range(num_groups):
        rows = [row for row in itertools.islice(parquet_files.rows(path, group), MAX_LINES) if isinstance(row, dict)]
        if rows:
            return rows
    return []


def fitting(path: str, layout: Layout, records: Iterable[dict[str, Any]]) -> Layout:
    """The layout, or, if it is "auto", the one that fits the first record that any fits.

    Raises:
        InputError: there are records, but no layout fits one of them.
    """
    if not layout.is_auto:
        return layout
    names: list[str] = []
    for record in records:
        if (found := layout.detected(record)) is not None:
            return found
        names = names or list(record)
    if not names:  # nothing to be read there, so that any will do
        return Layout.named("text", encoding=layout.encoding, split=layout.split)
    raise InputError(
        f"{path}: no layout fits its records, whose fields are {', '.join(names[:20])}. Name the fields with "
        f"input.template, such as {{{names[0]}}}, or choose an input.layout of {', '.join(DETECTABLE)}"
    )


def _is_object(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object_file(path: str) -> bool:
    content = b""
    for block in blocks(path):
        content += block
        if len(content) > streams.MAX_LINE_BYTES:
            return False
    return _is_object(content)

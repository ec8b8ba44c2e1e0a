"""Documents and bad lines, and how the bytes of a JSON object or of a text become one or the other."""

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.reading.chat import Turn
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.streams import HEAD_BYTES
from data_prep.reading.templates import Extracted, Layout

try:
    from orjson import loads as _fast_loads
except ImportError:
    _fast_loads = None

ZERO_BYTES = "zero bytes: UTF-16, or no text"
UTF_16 = "UTF-16, not UTF-8"

UnitKind = Literal["texts", "text", "text-lines", "paragraphs", "lines", "array", "object", "rows"]


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    text: str
    """What filters and sketches see; of a conversation what was said, line by line."""
    file: int
    """Index into the paths of its unit."""
    place: int
    """Offset of the line or paragraph in bytes (of a compressed file: as decompressed); of parquet row group * 2**32 +
    row; of a JSON array the index; 0 of a whole file. Unique within a file."""
    line: int
    """Line, row or element, from 1, counted from the start of its unit; 1 of a whole file."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation: what is encoded instead of the text."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, row, element or file that gave no document."""

    file: int
    line: int
    """As a document's; of a text file the line at fault."""
    place: int
    reason: str
    head: bytes = b""
    """First bytes of what was read; nothing if they are not known."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker reads at a time: whole text files, the lines that start in a byte range, a compressed file, a
    JSON array, or a row group.
    """

    kind: UnitKind
    paths: tuple[str, ...]
    layout: Layout
    size_bytes: int
    """Share of the input, for progress; of row groups an estimate."""
    start: int = 0
    """First byte of a range; index of a row group."""
    stop: int = 0


def decode(content: bytes, encoding: str) -> str:
    """A text, without the byte order mark before it; one with the mark of UTF-8 is UTF-8.

    Raises:
        BadRecordError: it is not of this encoding.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadRecordError(UTF_16)
    if b"\0" in content:
        raise BadRecordError(ZERO_BYTES)
    encoding = "utf-8" if content.startswith(codecs.BOM_UTF8) else encoding
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRecordError(f"invalid {encoding.upper()}") from error


def json_extractor(layout: Layout) -> Callable[[bytes], Extracted]:
    """What takes a document out of the bytes of a JSON object; it raises BadRecordError if there is none."""
    extract, encoding = layout.extractor(), layout.encoding

    def read(content: bytes) -> Extracted:
        extracted = extract(parse_object(content, encoding))
        # Escapes can spell half of a UTF-16 pair, UTF-8 cannot.
        if b"\\u" in content and not _is_encodable(extracted[0]):
            raise BadRecordError("lone surrogate")
        return extracted

    return read


def parse_object(content: bytes, encoding: str) -> dict[str, Any]:
    """The JSON object that the bytes spell.

    What the json module accepts counts, NaN and numbers of any size too; orjson, where it is installed, is only a
    faster way to the same values. (They differ in objects nested a thousand levels deep: json refuses some more.)

    Raises:
        BadRecordError: they spell none.
    """
    if _fast_loads is not None and encoding == "utf-8":
        try:
            record = _fast_loads(content)
        except ValueError:
            record = _parse_slowly(content, encoding)
    else:
        record = _parse_slowly(content, encoding)
    if not isinstance(record, dict):
        raise BadRecordError("not a JSON object")
    return record


def _parse_slowly(content: bytes, encoding: str) -> Any:
    if not content or content.isspace():
        raise BadRecordError("blank line")
    text = decode(content, encoding)
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:  # also thousands of brackets
        raise BadRecordError("invalid JSON") from error


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bad_line(error: BadRecordError, file: int, line: int, place: int, content: bytes = b"") -> BadLine:
    """The bad line that an error stands for."""
    return BadLine(file, line, place, str(error), content[:HEAD_BYTES])


# A number that no document uses may be longer than Python converts.
_DECODER = json.JSONDecoder(parse_int=float)

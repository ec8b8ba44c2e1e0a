"""The elements of a JSON array, one after the other, however long the array is."""

import re
from collections.abc import Iterable, Iterator

from data_prep.reading.streams import MAX_LINE_BYTES, StreamError

TRUNCATED_ARRAY = "truncated JSON array"
TEXT_BEHIND_ARRAY = "text behind the JSON array"
ELEMENT_TOO_LONG = f"array element longer than {MAX_LINE_BYTES // 1024**2} MiB"
# A JSON string holds no line end: one that meets a line end was cut off there. One that meets neither goes on in the
# next block.
_TOKEN = re.compile(rb'"[^"\\\n]*(?:\\[^\n][^"\\\n]*)*(?:(?P<end>")|(?P<cut>\\?\n))?|[\[\]{},]')
_MAX_WAITING_BYTES = 16 * 1024 * 1024
_LINE_START = re.compile(rb"\n[ \t]*\{\Z")


def elements(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The elements of an array that comes in blocks, as they are written; a second array behind it is part of it.

    A broken element costs itself: the next one begins behind the line end that a string ran into, or at the next line
    that begins as that of the first element does.

    Raises:
        StreamError: the array does not end, or something else follows it; all that came before has been given.
    """
    array = _Array()
    for block in blocks:
        yield from array.feed(block)
    yield from array.rest()


class _Array:
    def __init__(self) -> None:
        self._buffer = bytearray()
        self._start = 0  # of the element
        self._at = 0  # all tokens before this place have been seen
        self._enough_bytes = 0  # behind that place, before it is looked at again
        self._depth = 0
        self._line_start: bytes | None = None  # what begins a line that begins an element, if that tells it

    def feed(self, block: bytes) -> Iterator[bytes]:
        del self._buffer[: self._start]
        self._buffer += block
        self._at, self._start = self._at - self._start, 0
        if len(self._buffer) >= min(self._at + self._enough_bytes, MAX_LINE_BYTES):
            yield from self._scan()
        if len(self._buffer) - self._start > MAX_LINE_BYTES:
            raise StreamError(ELEMENT_TOO_LONG)

    def _scan(self) -> Iterator[bytes]:
        self._enough_bytes = 0
        for token in _TOKEN.finditer(self._buffer, self._at):
            if self._goes_on(token):
                self._at = token.start()
                # Twice as much each time, lest a long string that comes in small blocks be looked through for each.
                self._enough_bytes = min(2 * (len(self._buffer) - self._at), _MAX_WAITING_BYTES)
                return
            self._at = token.end()
            if (element := self._take(token)) is not None:
                yield element
        self._at = len(self._buffer)

    def rest(self) -> Iterator[bytes]:
        yield from self._scan()
        rest = bytes(self._buffer[self._start :]).strip()
        if self._depth == 0 and not rest:
            return
        if self._depth == 1 and rest.endswith(b"}"):
            yield rest
        raise StreamError(TRUNCATED_ARRAY if self._depth else TEXT_BEHIND_ARRAY)

    def _goes_on(self, token: re.Match[bytes]) -> bool:
        """Whether more has to be read before the token can be judged."""
        if token[0] == b"{":
            return token.end() == len(self._buffer)
        return token[0].startswith(b'"') and token.lastgroup is None

    def _take(self, token: re.Match[bytes]) -> bytes | None:
        """Go on by a token; the element that it ends, if it ends one."""
        kind = token[0][:1]
        if kind == b'"':
            self._depth = max(self._depth, 1)
            return None if token["end"] else self._end_element(token.end(), token.end(), depth=1)
        if kind == b"[" and self._depth == 0:
            self._start, self._depth = token.end(), 1
        elif kind in b"[{":
            if kind == b"{" and self._begins_element(token.start()):
                return self._end_element(token.start(), token.start(), depth=2)
            self._depth += 1
        elif kind == b"," and self._depth <= 1:
            return self._end_element(token.start(), token.end(), depth=1)
        elif kind == b"]" and self._depth == 1:
            # Should more follow, it was a bracket of a broken element, and the array goes on.
            return self._end_element(token.start(), token.end(), depth=0) or None
        elif kind in b"}]":
            self._depth = max(self._depth - 1, 1)
        return None

    def _end_element(self, end: int, next_start: int, depth: int) -> bytes:
        element = bytes(self._buffer[self._start : end]).strip()
        self._start, self._depth = next_start, depth
        return element

    def _begins_element(self, at: int) -> bool:
        """Whether the brace at this place begins an element although the one before it has not ended."""
        if self._depth > 1:
            return bool(self._line_start) and self._buffer.endswith(self._line_start or b"", 0, at + 1)
        if self._line_start is None:
            found = _LINE_START.search(self._buffer, max(at - 100, 0), at + 1)
            # Without indentation nested objects may begin like elements, unless these are written on one line each.
            is_telling = found and (len(found[0]) > 2 or self._buffer[at + 1 : at + 2] == b'"')
            self._line_start = found[0] if found and is_telling else b""
        return False

"""Lines of large files: those that start in a byte range, and those of gzip and zstandard streams."""

import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, BinaryIO

import zstandard

from data_prep.reading import storage
from data_prep.reading.file_kinds import compression

MAX_LINE_BYTES = 64 * 1024 * 1024
LINE_TOO_LONG = f"line longer than {MAX_LINE_BYTES // 1024**2} MiB"
_READ_BYTES = 1024 * 1024
# Small, because 64 KiB of gzip can hold 64 MiB of text.
_COMPRESSED_READ_BYTES = 64 * 1024
# Four bytes of zstandard can hold 128 KiB.
_ZST_STEP_BYTES = 512
HEAD_BYTES = 200
"""Of what is left out, so many bytes are kept to be looked at."""

Line = tuple[int, bytes, bool]
"""Byte offset of a line's start; its content without the line end; whether it was too long to hold, in which case only
its first HEAD_BYTES are given.
"""


class StreamError(ValueError):
    """A stream ends early or is damaged; what came before is good."""


def range_lines(file: BinaryIO, start: int, stop: int) -> Iterator[Line]:
    """The lines that start in bytes start to stop; ranges that meet give each line of a file to exactly one of them."""
    if start > 0:
        # From the byte before: if that is a line end, the range owns the line at its very first byte.
        start = _after_line_end(file, start - 1, stop)
    file.seek(start)
    return lines(iter(partial(file.read, _READ_BYTES), b""), start, stop)


def compressed_lines(path: str) -> Iterator[Line]:
    """The lines of a .gz or .zst file, of all its members or frames.

    Raises:
        StreamError: the stream is cut short or damaged. The whole lines before that have been given, save those in the
            damaged 64 KiB.
    """
    return lines(decompressed(path))


def lines(blocks: Iterable[bytes], offset: int = 0, stop: int = sys.maxsize) -> Iterator[Line]:
    """The lines that start before stop, of a text that comes in blocks, the first of them at offset."""
    parts, held_bytes = list[bytes](), 0  # of the line that has begun
    if offset >= stop:
        return
    for block in blocks:
        first, *others = block.split(b"\n")
        parts.append(first)
        held_bytes += len(first)
        if held_bytes > MAX_LINE_BYTES:  # of an endless line nothing but the head is kept
            parts = [b"".join(parts)[:HEAD_BYTES]]
        if not others:
            continue
        rest = others.pop()
        yield offset, b"".join(parts), held_bytes > MAX_LINE_BYTES
        offset += held_bytes + 1
        for content in others:
            if offset >= stop:
                return
            yield (offset, content, False) if len(content) <= MAX_LINE_BYTES else (offset, content[:HEAD_BYTES], True)
            offset += len(content) + 1
        if offset >= stop:
            return
        parts, held_bytes = [rest], len(rest)
    if held_bytes:
        yield offset, b"".join(parts), held_bytes > MAX_LINE_BYTES


def decompressed(path: str) -> Iterator[bytes]:
    """The content of a .gz or .zst file, in blocks of at most 64 MiB; zero bytes behind a member of gzip are padding.

    Raises:
        StreamError: see `compressed_lines`.
    """
    with storage.open_range(path) as file:
        yield from _joined(_decoded(iter(partial(file.read, _COMPRESSED_READ_BYTES), b""), compression(path)))


def _decoded(compressed: Iterable[bytes], suffix: str) -> Iterator[bytes]:
    step_bytes = _ZST_STEP_BYTES if suffix == ".zst" else _COMPRESSED_READ_BYTES
    decoder = _new_decoder(suffix)  # at once, so that an empty file counts as a truncated one
    for raw in compressed:
        for start in range(0, len(raw), step_bytes):
            rest = raw[start : start + step_bytes]
            # A file may hold several members or frames, one behind the other.
            while rest := rest.lstrip(b"\0") if decoder is None and suffix == ".gz" else rest:
                decoder = decoder or _new_decoder(suffix)
                try:
                    yield decoder.decompress(rest)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise StreamError(f"damaged {suffix} stream") from error
                rest, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise StreamError(f"truncated {suffix} stream")


def _joined(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of some size, because each costs its readers time; before an error all that came."""
    parts, held_bytes = list[bytes](), 0
    try:
        for block in blocks:
            parts.append(block)
            held_bytes += len(block)
            if held_bytes >= _READ_BYTES:
                yield b"".join(parts)
                parts, held_bytes = [], 0
    except StreamError:
        yield b"".join(parts)
        raise
    yield b"".join(parts)


def _after_line_end(file: BinaryIO, start: int, stop: int) -> int:
    """The byte behind the first line end from start on, or stop if there is none before it."""
    file.seek(start)
    while start < stop and (block := file.read(min(_READ_BYTES, stop - start))):
        if (end := block.find(b"\n")) >= 0:
            return start + end + 1
        start += len(block)
    return stop


def _new_decoder(suffix: str) -> Any:
    if suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    # Files made with `zstd --long` need more than the library's default window of 128 MiB.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

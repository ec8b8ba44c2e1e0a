"""Lines of large files: those that start in a byte range, and those of gzip and zstandard streams."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

MAX_LINE_BYTES = 64 * 1024 * 1024
LINE_TOO_LONG = f"line longer than {MAX_LINE_BYTES // 1024**2} MiB"
# Small reads, because 64 KiB of gzip can hold 64 MiB of text.
_READ_BYTES = 64 * 1024

Line = tuple[int, bytes | None]
"""Byte offset of a line's start, and its content; None stands for a line too long to hold."""


class StreamError(ValueError):
    """A compressed stream ends early or is damaged; what came before it is good."""


def range_lines(file: BinaryIO, start: int, stop: int) -> Iterator[Line]:
    """The lines that start in bytes start to stop; ranges that meet give each line of a file to exactly one of them."""
    file.seek(max(start - 1, 0))
    if start > 0:
        # From the byte before: if that is a line end, the range owns the line at its very first byte.
        _skip_line(file, stop)
    while (offset := file.tell()) < stop and (content := file.readline(MAX_LINE_BYTES + 1)):
        if len(content) > MAX_LINE_BYTES and not content.endswith(b"\n"):
            _skip_line(file, None)
            yield offset, None
        else:
            yield offset, content


def compressed_lines(path: Path) -> Iterator[Line]:
    """The lines of a .gz or .zst file, of all its members or frames.

    Raises:
        StreamError: the stream is cut short or damaged. The whole lines before that have been given, save those in the
            damaged 64 KiB.
    """
    offset, rest, is_too_long = 0, b"", False
    for block in _decompressed(path):
        *whole, rest = (rest + block).split(b"\n")
        for content in whole:
            yield offset, None if is_too_long or len(content) > MAX_LINE_BYTES else content
            offset, is_too_long = offset + len(content) + 1, False
        if len(rest) > MAX_LINE_BYTES:
            offset, rest, is_too_long = offset + len(rest), b"", True
    if rest or is_too_long:
        yield offset, None if is_too_long else rest


def _skip_line(file: BinaryIO, stop: int | None) -> None:
    """Read on to the next line end, but no further than stop."""
    while stop is None or file.tell() < stop:
        content = file.readline(_READ_BYTES)
        if not content or content.endswith(b"\n"):
            return


def _decompressed(path: Path) -> Iterator[bytes]:
    decoder = _new_decoder(path)  # at once, so that an empty file counts as a truncated one
    with path.open("rb") as file:
        while raw := file.read(_READ_BYTES):
            while raw:
                decoder = decoder or _new_decoder(path)
                try:
                    block = decoder.decompress(raw)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise StreamError(f"damaged {path.suffix} stream") from error
                yield block
                # A file may hold several members or frames, one behind the other.
                raw, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        raise StreamError(f"truncated {path.suffix} stream")


def _new_decoder(path: Path) -> Any:
    if path.suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    # Files made with `zstd --long` need more than the library's default window of 128 MiB.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

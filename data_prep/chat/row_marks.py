"""Two bits for each token of a fine-tuning shard, in a file beside it: does it count, and does a document begin there.

`chat-00000.marks` belongs to `chat-00000.bin`. Bit j of `trained` is about target j, the shard's token j + 1; bit j of
`starts` about input j, its token j. `docs/chat-data.md` describes the bytes.
"""

import struct
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import publish
from data_prep.shards import ShardError, read_header

MAGIC = b"BESSMARK"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ16s8x")  # magic, version, 0, targets, payload_xxh3; then 16 bytes: own_xxh3
_TABLE_OFFSET = 64


def marks_path(shard: Path) -> Path:
    """The file of a shard's marks: its name with another ending."""
    return shard.with_suffix(".marks")


def write_marks(shard: Path, trained: NDArray[np.bool_], starts: NDArray[np.bool_]) -> Path:
    """Writes the marks of a shard, atomically; returns the path.

    Shapes: trained, starts (targets of the shard,).
    """
    header = read_header(shard)
    assert trained.shape == starts.shape == (header.token_count - 1,)
    table = b"".join(np.packbits(bits, bitorder="little").tobytes() for bits in (trained, starts))
    head = _HEAD.pack(MAGIC, VERSION, 0, len(trained), bytes.fromhex(header.payload_xxh3))
    path = marks_path(shard)
    publish.write_bytes(path, head + xxhash.xxh3_128_digest(head + table) + table)
    return path


class RowMarks:
    """The marks of a shard, mapped and found to be whole."""

    def __init__(self, shard: Path):
        """Raises:
        ShardError: there is no such file, it is damaged, or it belongs to another shard.
        """
        self.path = marks_path(shard)
        remedy = "prepare the conversations again"
        try:
            content = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ShardError(f"{self.path}: cannot read the marks ({error}); {remedy}") from error
        digest = xxhash.xxh3_128(content[: _HEAD.size].data)
        digest.update(content[_TABLE_OFFSET:].data)
        if content.size < _TABLE_OFFSET or digest.digest() != content[_HEAD.size : _TABLE_OFFSET].tobytes():
            raise ShardError(f"{self.path}: damaged; {remedy}")
        magic, version, _, num_targets, payload = _HEAD.unpack(content[: _HEAD.size].tobytes())
        if (magic, version) != (MAGIC, VERSION):
            raise ShardError(f"{self.path}: not marks of version {VERSION}; {remedy}")
        if payload.hex() != read_header(shard).payload_xxh3:
            raise ShardError(f"{self.path}: made for another shard than {shard.name}; {remedy}")
        num_bytes = -(-num_targets // 8)
        if num_targets != read_header(shard).token_count - 1 or content.size != _TABLE_OFFSET + 2 * num_bytes:
            raise ShardError(f"{self.path}: {num_targets:,} targets, {shard.name} has others; {remedy}")
        self._trained = content[_TABLE_OFFSET : _TABLE_OFFSET + num_bytes]
        self._starts = content[_TABLE_OFFSET + num_bytes :]

    def rows(self, samples: NDArray[np.int64], sequence_length: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(trained, starts) of whole rows.

        Shapes: samples (R,) -> (R, sequence_length) each; sequence_length is a multiple of 8.
        """
        if sequence_length % 8:
            raise ShardError(f"{self.path}: rows of {sequence_length} tokens; the marks are kept by 8: use row_tokens")
        row_bytes = sequence_length // 8
        places = samples[:, None] * row_bytes + np.arange(row_bytes)

        def unpacked(table: NDArray[np.uint8]) -> NDArray[np.bool_]:
            return np.unpackbits(table[places], axis=1, bitorder="little").view(np.bool_)

        return unpacked(self._trained), unpacked(self._starts)

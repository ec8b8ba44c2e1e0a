"""Where documents begin in a shard, in a file beside it, for readers that want whole documents without a search.

`web-00000.idx` belongs to `web-00000.bin`, is optional, and lists the places of first tokens: those behind an EOS, the
first of them behind the context token if that is one. `docs/shard-format.md` describes the bytes.
"""

import struct
from pathlib import Path

import numpy as np
import xxhash

from data_prep import publish
from data_prep.shards import ShardError, open_tokens, read_header

MAGIC = b"BESSDOCS"
VERSION = 1
TABLE_OFFSET = 64
_HEAD = struct.Struct("<8sIIQ16s8x")  # magic, version, bytes per start, starts, payload_xxh3; then 16 bytes: own_xxh3
_BLOCK_TOKENS = 16 * 1024 * 1024


def starts_path(shard: Path) -> Path:
    """The file of document starts of a shard: its name with another ending."""
    return shard.with_suffix(".idx")


def write_document_starts(shard: Path) -> Path:
    """Find the documents of a shard and write their starts, atomically; return the path.

    Raises:
        ShardError: no readable shard.
    """
    header = read_header(shard)
    tokens = open_tokens(shard)
    dtype = np.dtype("<u4" if header.token_count <= 2**32 else "<u8")
    found = [
        np.flatnonzero(tokens[first : min(first + _BLOCK_TOKENS, tokens.size - 1)] == header.eos_id) + first + 1
        for first in range(0, tokens.size - 1, _BLOCK_TOKENS)
    ]
    table = np.concatenate(found).astype(dtype).tobytes()
    count = len(table) // dtype.itemsize
    head = _HEAD.pack(MAGIC, VERSION, dtype.itemsize, count, bytes.fromhex(header.payload_xxh3))
    path = starts_path(shard)
    publish.write_bytes(path, head + xxhash.xxh3_128_digest(head + table) + table)
    return path


def read_document_starts(shard: Path) -> np.ndarray:
    """The places in `open_tokens(shard)` at which documents begin, without one that began in an earlier shard.

    Shapes: (num_starts,). Dtypes: uint32 or uint64.
    Raises:
        ShardError: there is no such file, it is damaged, or it belongs to another shard.
    """
    path = starts_path(shard)
    remedy = f"make it anew with: python -m data_prep checksums {shard.parent.parent}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: cannot read the document starts ({error.strerror}); {remedy}") from error
    own = xxhash.xxh3_128_digest(content[: _HEAD.size] + content[TABLE_OFFSET:])
    if len(content) < TABLE_OFFSET or own != content[_HEAD.size : TABLE_OFFSET]:
        raise ShardError(f"{path}: damaged; {remedy}")
    magic, version, start_bytes, count, payload = _HEAD.unpack_from(content)
    if (magic, version) != (MAGIC, VERSION):
        raise ShardError(f"{path}: not document starts of version {VERSION}; {remedy}")
    if payload.hex() != read_header(shard).payload_xxh3:
        raise ShardError(f"{path}: made for another shard than {shard.name}; {remedy}")
    return np.frombuffer(content, dtype=f"<u{start_bytes}", count=count, offset=TABLE_OFFSET)

"""One checksum per training sample, in a file beside the shard: `python -m data_prep checksums FOLDER`.

A shard's payload hash finds rot only when all of it is read; these find it in the one sample that is about to be
trained on. `web-00000.xxh3` belongs to `web-00000.bin` and is optional. Checksum j is the low half of xxh3_64 over the
tokens [j*C, j*C + C]: C targets and, before them, their context, so that no byte that a sample holds is left out.
`docs/shard-format.md` describes the bytes.
"""

import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep import command_line, publish
from data_prep.document_starts import write_document_starts
from data_prep.manifest import num_samples, read_manifest
from data_prep.shards import HEADER_BYTES, check_payload, read_header

TABLE_OFFSET = 64
CHECKSUM_BYTES = 4
MAGIC = b"BESSXXH3"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ16s8x")  # magic, version, sample_tokens, checksums, payload_xxh3; then 16 bytes: own_xxh3
_READ_BYTES = 16 * 1024 * 1024


class ChecksumError(ValueError):
    """A checksum file is not that of its shard, or is damaged; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class ChecksumHeader:
    """What a checksum file says about itself."""

    sample_tokens: int
    num_checksums: int
    payload_xxh3: str
    """Of the shard that it belongs to."""
    own_xxh3: str
    """Of the rest of the checksum file: tells a damaged checksum from a damaged sample."""


def checksum_path(shard: Path) -> Path:
    """The checksum file of a shard: its name with another ending."""
    return shard.with_suffix(".xxh3")


def sample_checksums(content: memoryview, sample_tokens: int, token_bytes: int) -> list[int]:
    """The checksums of consecutive samples; content starts with the context of the first, the last may be shorter."""
    stride = sample_tokens * token_bytes
    return [
        xxhash.xxh3_64_intdigest(content[first : first + stride + token_bytes]) & 0xFFFFFFFF
        for first in range(0, len(content) - token_bytes, stride)
    ]


def write_checksums(shard: Path, sample_tokens: int) -> Path:
    """Write the checksum file of a shard whose payload is as its header says, atomically; return its path.

    Raises:
        ShardError: no readable shard, or a payload that is not the one that was written; nothing is written then.
        ChecksumError: sample_tokens is not positive.
    """
    if sample_tokens < 1:
        raise ChecksumError(f"sample_tokens = {sample_tokens}: a checksum covers at least one target")
    header = read_header(shard)
    token_bytes = np.dtype(header.dtype).itemsize
    sample_bytes = sample_tokens * token_bytes
    checksums: list[int] = []
    with shard.open("rb") as file:
        file.seek(HEADER_BYTES)
        context = file.read(token_bytes)
        # Hashed in the same pass, so that the checksums are of the very bytes that were found to be good.
        payload = xxhash.xxh3_128(context)
        while block := file.read(max(1, _READ_BYTES // sample_bytes) * sample_bytes):
            payload.update(block)
            checksums += sample_checksums(memoryview(context + block), sample_tokens, token_bytes)
            context = block[-token_bytes:]
    check_payload(shard, header, payload.hexdigest())
    table = np.array(checksums, dtype="<u4").tobytes()
    head = _HEAD.pack(MAGIC, VERSION, sample_tokens, len(checksums), payload.digest())
    path = checksum_path(shard)
    publish.write_bytes(path, head + xxhash.xxh3_128_digest(head + table) + table)
    return path


def read_checksum_header(shard: Path) -> ChecksumHeader | None:
    """Read the head of a shard's checksum file and check it against the shard; None if there is no such file.

    Raises:
        ChecksumError: it is not a checksum file, of an unknown version, cut short, or made for another payload.
        ShardError: see `data_prep.shards.read_header`.
    """
    path = checksum_path(shard)
    try:
        with path.open("rb") as file:
            content = file.read(TABLE_OFFSET)
            size_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    if len(content) < TABLE_OFFSET or content[: len(MAGIC)] != MAGIC:
        raise ChecksumError(f"{path}: not a checksum file, it starts with {content[: len(MAGIC)]!r}; {_remedy(shard)}")
    _, version, sample_tokens, num_checksums, payload = _HEAD.unpack_from(content)
    if version != VERSION:
        raise ChecksumError(f"{path}: version {version}, this program reads {VERSION}; {_remedy(shard)}")
    header = ChecksumHeader(sample_tokens, num_checksums, payload.hex(), content[_HEAD.size :].hex())
    of_shard = read_header(shard)
    if header.payload_xxh3 != of_shard.payload_xxh3:
        raise ChecksumError(
            f"{path}: made for a shard with payload xxh3 {header.payload_xxh3}, {shard.name} has "
            f"{of_shard.payload_xxh3}; {_remedy(shard)}"
        )
    expected = num_samples(of_shard.token_count, sample_tokens) if sample_tokens else 0
    if num_checksums != expected or size_bytes != TABLE_OFFSET + expected * CHECKSUM_BYTES:
        raise ChecksumError(
            f"{path}: {size_bytes:,} bytes and {num_checksums:,} checksums, one per {sample_tokens:,} of the shard's "
            f"targets are {expected:,}: damaged; {_remedy(shard)}"
        )
    return header


def verify_checksums(shard: Path, header: ChecksumHeader) -> None:
    """Read the whole checksum file and compare it with its own hash, and its head with the one read before.

    Raises:
        ChecksumError: it is damaged, or another than it was.
    """
    path = checksum_path(shard)
    content = path.read_bytes()
    own = xxhash.xxh3_128_hexdigest(content[: _HEAD.size] + content[TABLE_OFFSET:])
    if read_checksum_header(shard) != header or own != header.own_xxh3:
        raise ChecksumError(f"{path}: damaged, or replaced while in use; {_remedy(shard)}")


def make_checksums(folder: Path, sample_tokens: int | None = None) -> None:
    """(Re)make the checksums and document starts of a prepared folder, after checking each payload against its header.

    Args:
        folder: Data folder with a manifest.json.
        sample_tokens: Targets per checksum: sequence lengths that are multiples of it are checked while training. By
            default the manifest's sample_tokens.
    """
    manifest = read_manifest(folder)
    covered = manifest.sample_tokens if sample_tokens is None else sample_tokens
    for record in tqdm(manifest.shards, desc="checksums", unit="shard", leave=False, disable=None):
        write_checksums(folder / record.file, covered)
        write_document_starts(folder / record.file)
    print(f"{folder}: {len(manifest.shards):,} shards verified, one checksum for each {covered:,} targets written")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `make_checksums` from the command line; errors are one line on stderr and an exit code of sysexits.h."""
    import tyro  # here, so that reading samples works without it

    try:
        options = (tyro.conf.PositionalRequiredArgs,)
        command_line.read(make_checksums, argv, prog="python -m data_prep checksums", config=options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    return 0


def _remedy(shard: Path) -> str:
    return f"make it anew with: python -m data_prep checksums {shard.parent.parent}"

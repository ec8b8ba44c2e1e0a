"""The shard: one file of tokens, cut from a stream of documents. Writer and reader of the format.

A split of a source is one stream, EOS doc1 EOS doc2 EOS ..., and shard k holds stream[k*S : k*S + S + 1]: its first
token is only context, a copy of the token before it, and every other token is a target of exactly one shard. Nothing is
padded or dropped. `docs/shard-format.md` describes the bytes.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash

from data_prep import publish

HEADER_BYTES = 4096
MAGIC = b"BESSEMER"
VERSION = 1
UINT16_VOCAB = 65_536
"""The largest vocabulary whose ids all fit uint16."""
_PREFIX = struct.Struct("<8sII")  # magic, version, length of the JSON that follows
_READ_BYTES = 16 * 1024 * 1024


class ShardError(ValueError):
    """A shard, or what should become one, breaks the format; the message names file and finding."""


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says about itself."""

    dtype: str
    vocab_size: int
    tokenizer_digest: str
    eos_id: int
    token_count: int
    """Tokens in the file, the leading context token included: one more than its targets."""
    document_count: int
    """EOS among the targets, so that the counts of all shards add up to the number of documents."""
    payload_xxh3: str


def token_dtype(vocab_size: int) -> str:
    """The narrowest of "uint16" and "uint32" that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= UINT16_VOCAB else "uint32"


def read_header(path: Path) -> ShardHeader:
    """Read and check the first 4 KiB of a shard, and the file's size against them.

    Raises:
        ShardError: no file, not a shard, cut short, of an unknown version, or with an unreadable header.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER_BYTES)
            size_bytes = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ShardError(f"{path}: cannot read the shard ({error.strerror})") from error
    header = _parse_header(path, head)
    expected_bytes = HEADER_BYTES + header.token_count * np.dtype(header.dtype).itemsize
    if size_bytes != expected_bytes:
        raise ShardError(
            f"{path}: the file has {size_bytes:,} bytes, its header promises {expected_bytes:,} "
            f"({header.token_count:,} tokens of {header.dtype}). It was cut short or overwritten; copy it again"
        )
    return header


def open_tokens(path: Path) -> np.memmap:
    """Map a shard's tokens, read only, without reading them.

    Dtypes: little-endian uint16 or uint32, as the header says.
    Raises:
        ShardError: see `read_header`.
    """
    return np.memmap(path, dtype=_file_dtype(read_header(path).dtype), mode="r", offset=HEADER_BYTES)


def verify_payload(path: Path) -> None:
    """Read the whole shard and compare its hash with the header.

    Raises:
        ShardError: the payload is not the one that was written; also see `read_header`.
    """
    header = read_header(path)
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while block := file.read(_READ_BYTES):
            digest.update(block)
    check_payload(path, header, digest.hexdigest())


def check_payload(path: Path, header: ShardHeader, found_xxh3: str) -> None:
    """Compare the hash that a payload was found to have with the header's.

    Raises:
        ShardError: they differ.
    """
    if found_xxh3 != header.payload_xxh3:
        raise ShardError(
            f"{path}: the payload's xxh3 is {found_xxh3}, the header says {header.payload_xxh3}. "
            "The tokens changed after they were written; copy the file again or prepare the data anew"
        )


def write_shard(
    path: Path, blocks: Iterable[np.ndarray], *, vocab_size: int, tokenizer_digest: str, eos_id: int
) -> ShardHeader:
    """Write one shard, published whole, from blocks of its tokens: the context token is the first of the first block.

    Dtypes: `token_dtype(vocab_size)`; the ids have been checked.
    """
    shard = _OpenShard(path)
    try:
        for index, tokens in enumerate(blocks):
            targets = tokens if index else tokens[1:]
            shard.append(tokens, int(np.count_nonzero(targets == eos_id)))
        return shard.finish(vocab_size, tokenizer_digest, eos_id)
    except BaseException:
        shard.discard()
        raise


class ShardWriter:
    """Cut a growing stream of documents into `<prefix>-00000.bin`, `<prefix>-00001.bin`, ... of shard_tokens targets.

    Cost: memory for one document; the file of a shard appears when the shard is full, or on `close`.
    """

    def __init__(
        self, folder: Path, prefix: str, *, vocab_size: int, tokenizer_digest: str, eos_id: int, shard_tokens: int
    ) -> None:
        if shard_tokens < 1:
            raise ShardError(f"shard_tokens = {shard_tokens}: a shard needs at least one target")
        if not 0 <= eos_id < vocab_size:
            raise ShardError(f"eos_id = {eos_id}: not an id of a vocabulary of {vocab_size}")
        self._folder, self._prefix, self._shard_tokens = folder, prefix, shard_tokens
        self._vocab_size, self._tokenizer_digest, self._eos_id = vocab_size, tokenizer_digest, eos_id
        self._last_token = eos_id
        self._open: _OpenShard | None = None
        self._written: list[tuple[Path, ShardHeader]] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, given without its EOS, and the EOS that closes it.

        Shapes: (num_tokens,). Dtypes: any integer.
        Raises:
            ShardError: an id outside the vocabulary, or the EOS id inside the document. Nothing is written then.
        """
        rest = self._checked(np.asarray(tokens))
        while rest.size:
            shard = self._open or self._start_shard()
            taken = rest[: self._shard_tokens - shard.num_targets]
            shard.append(taken, int(np.count_nonzero(taken == self._eos_id)))
            rest = rest[taken.size :]
            self._last_token = int(taken[-1])
            if shard.num_targets == self._shard_tokens:
                self._finish_shard(shard)

    def close(self) -> list[tuple[Path, ShardHeader]]:
        """Publish the last, shorter shard; return path and header of every shard, in the order of the stream."""
        if self._open is not None:
            self._finish_shard(self._open)
        return list(self._written)

    def discard(self) -> None:
        """Drop the unfinished shard; those already full stay."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise ShardError(f"a document is a 1-d integer array; got {tokens.dtype} of shape {tokens.shape}")
        # Before the cast, because a cast to uint16 wraps without a word: 65537 becomes 1.
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            raise ShardError(
                f"token ids span {tokens.min()} to {tokens.max()}, the vocabulary has {self._vocab_size}: "
                "the text was encoded with another tokenizer"
            )
        if np.any(tokens == self._eos_id):
            raise ShardError(f"the end-of-document id {self._eos_id} occurs inside a document; it would cut it in two")
        stream = np.empty(tokens.size + 1, dtype=_file_dtype(token_dtype(self._vocab_size)))
        stream[:-1], stream[-1] = tokens, self._eos_id
        return stream

    def _start_shard(self) -> "_OpenShard":
        path = self._folder / f"{self._prefix}-{len(self._written):05d}.bin"
        self._open = _OpenShard(path)
        context = np.array([self._last_token], dtype=_file_dtype(token_dtype(self._vocab_size)))
        self._open.append(context, num_documents=0)
        return self._open

    def _finish_shard(self, shard: "_OpenShard") -> None:
        header = shard.finish(self._vocab_size, self._tokenizer_digest, self._eos_id)
        self._written.append((shard.path, header))
        self._open = None


class _OpenShard:
    """A shard under its temporary name: room for the header, then the payload so far."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._temporary = path, publish.temporary_beside(path)
        self.digest = xxhash.xxh3_128()
        self.token_count = self.document_count = 0
        self._file = self._temporary.open("wb", buffering=1024 * 1024)
        self._file.write(bytes(HEADER_BYTES))

    @property
    def num_targets(self) -> int:
        return self.token_count - 1

    def append(self, tokens: np.ndarray, num_documents: int) -> None:
        content = tokens.tobytes()
        self._file.write(content)
        self.digest.update(content)
        self.token_count += tokens.size
        self.document_count += num_documents

    def finish(self, vocab_size: int, tokenizer_digest: str, eos_id: int) -> ShardHeader:
        header = ShardHeader(
            dtype=token_dtype(vocab_size),
            vocab_size=vocab_size,
            tokenizer_digest=tokenizer_digest,
            eos_id=eos_id,
            token_count=self.token_count,
            document_count=self.document_count,
            payload_xxh3=self.digest.hexdigest(),
        )
        with self._file as file:
            file.seek(0)
            file.write(_format_header(header))
            file.flush()
            os.fsync(file.fileno())
        publish.publish(self._temporary, self.path)
        return header

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _file_dtype(name: str) -> np.dtype:
    return np.dtype(name).newbyteorder("<")


def _format_header(header: ShardHeader) -> bytes:
    content = json.dumps(dataclasses.asdict(header)).encode("utf-8")
    return (_PREFIX.pack(MAGIC, VERSION, len(content)) + content).ljust(HEADER_BYTES, b"\0")


def _parse_header(path: Path, head: bytes) -> ShardHeader:
    if head[: len(MAGIC)] != MAGIC:
        raise ShardError(f"{path}: not a shard, it starts with {head[: len(MAGIC)]!r} instead of {MAGIC!r}")
    if len(head) < HEADER_BYTES:
        raise ShardError(f"{path}: the file has {len(head):,} bytes, the header alone has {HEADER_BYTES:,}: cut short")
    _, version, num_json_bytes = _PREFIX.unpack_from(head)
    if version != VERSION:
        raise ShardError(f"{path}: shard version {version}, this program reads {VERSION}: prepare the data anew")
    try:
        table = json.loads(head[_PREFIX.size : _PREFIX.size + num_json_bytes])
        return _header_from_table(table)
    except (ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path}: unreadable header ({type(error).__name__}: {error}): copy the file again") from error


def _header_from_table(table: dict[str, Any]) -> ShardHeader:
    """Fields this version does not know are ignored, so that a later one may add some."""
    fields = dataclasses.fields(ShardHeader)
    header = ShardHeader(**{field.name: table[field.name] for field in fields})
    for field in fields:
        if type(getattr(header, field.name)) is not field.type:
            raise TypeError(f"{field.name} = {getattr(header, field.name)!r}")
    if header.dtype != token_dtype(header.vocab_size) or header.token_count < 2:
        raise ValueError(f"dtype {header.dtype}, vocab_size {header.vocab_size}, token_count {header.token_count}")
    return header

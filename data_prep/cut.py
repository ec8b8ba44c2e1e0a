"""Cuts shards from the units' tokens; as it is known which documents make a stream, every shard is a task of its own.

A stream is EOS doc1 EOS doc2 EOS ...; a unit's file holds each document with its EOS behind it, so that a run of kept
documents is one piece of the file. See `shards` for the format.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.checksums import write_checksums
from data_prep.document_starts import write_document_starts
from data_prep.manifest import ShardRecord, record_shard
from data_prep.shards import read_header, token_dtype, write_shard

_BLOCK_TOKENS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tokens of a stream, as pieces of files.

    Shapes: arrays (num_pieces,). Dtypes: int64.
    """

    files: tuple[str, ...]
    file: np.ndarray
    """Index into files."""
    start: np.ndarray
    """First token in the file."""
    length: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return int(self.length.sum())


@dataclass(frozen=True, slots=True)
class CutTask:
    """One shard to write."""

    folder: str
    """The data folder that is being made."""
    file: str
    """Name of the shard in it."""
    source: str
    pieces: Pieces
    """All tokens of the shard but the context token."""
    context: Pieces | None
    """The token before; None at the start of a stream, where it is an EOS."""
    vocab_size: int
    tokenizer_digest: str
    eos_id: int
    sample_tokens: int


def merge_neighbours(files: Sequence[str], file: np.ndarray, start: np.ndarray, length: np.ndarray) -> Pieces:
    """Joins pieces that follow one another in a file."""
    if not file.size:
        return Pieces((), file, start, length)
    breaks = np.flatnonzero((file[1:] != file[:-1]) | (start[1:] != start[:-1] + length[:-1])) + 1
    firsts = np.concatenate([[0], breaks])
    return Pieces(tuple(files), file[firsts], start[firsts], np.add.reduceat(length, firsts))


def between(pieces: Pieces, ends: np.ndarray, first: int, stop: int) -> Pieces:
    """The tokens first to stop of a stream, with only the files they need; ends are the places where its pieces end."""
    a, b = np.searchsorted(ends, [first, stop - 1], side="right")
    file, start, length = (x[a : b + 1].copy() for x in (pieces.file, pieces.start, pieces.length))
    length[-1] -= ends[b] - stop  # before the first piece is cut: it may be the last one, too
    skipped = first - (ends[a] - pieces.length[a])
    start[0] += skipped
    length[0] -= skipped
    used, file = np.unique(file, return_inverse=True)
    return Pieces(tuple(pieces.files[i] for i in used), file.astype(np.int64), start, length)


def shard_pieces(pieces: Pieces, shard_tokens: int) -> Iterator[tuple[Pieces, Pieces | None]]:
    """For each shard of a stream its tokens, and the token before them."""
    ends = np.cumsum(pieces.length)
    num_tokens = pieces.num_tokens
    for first in range(0, num_tokens, shard_tokens):
        stop = min(first + shard_tokens, num_tokens)
        yield between(pieces, ends, first, stop), between(pieces, ends, first - 1, first) if first else None


def cut_shard(task: CutTask) -> ShardRecord:
    """Writes a shard, unless it is there, and what belongs beside it; returns its record."""
    folder = Path(task.folder)
    path = folder / task.file
    if not path.exists():
        dtype = np.dtype(token_dtype(task.vocab_size)).newbyteorder("<")
        write_shard(
            path,
            _blocks(task, dtype),
            vocab_size=task.vocab_size,
            tokenizer_digest=task.tokenizer_digest,
            eos_id=task.eos_id,
        )
    write_checksums(path, task.sample_tokens)
    write_document_starts(path)
    return record_shard(folder, path, read_header(path), source=task.source, sample_tokens=task.sample_tokens)


def _blocks(task: CutTask, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The context token, then all others in large blocks."""
    if task.context is None:
        yield np.array([task.eos_id], dtype=dtype)
    else:
        yield np.concatenate(list(_read(task.context, dtype)))
    block: list[np.ndarray] = []
    num_tokens = 0
    for tokens in _read(task.pieces, dtype):
        block.append(tokens)
        num_tokens += tokens.size
        if num_tokens >= _BLOCK_TOKENS:
            yield np.concatenate(block)
            block, num_tokens = [], 0
    if block:
        yield np.concatenate(block)


def _read(pieces: Pieces, dtype: np.dtype) -> Iterator[np.ndarray]:
    opened, tokens = -1, np.zeros(0, dtype)
    for file, start, length in zip(pieces.file.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True):
        if file != opened:
            opened, tokens = file, np.memmap(pieces.files[file], dtype=dtype, mode="r")
        for at in range(start, start + length, _BLOCK_TOKENS):
            yield tokens[at : min(at + _BLOCK_TOKENS, start + length)]

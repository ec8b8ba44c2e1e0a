"""Micro-batches in the run's global order, read ahead by one thread: the order is known, so nothing is guessed."""

import collections
import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.score import Annotate, rows_of
from model.batch import Batch, TokenRows, as_unsigned, empty_rows
from resume.order import Order
from resume.samples import NO_SAMPLE, SampleReader

# Positions resolved at a time: a single one costs about 44 us, one of 4,096 about 28 ns.
_BLOCK_POSITIONS = 4_096
# Samples whose pages the kernel is asked for ahead of their use.
_READ_AHEAD_SAMPLES = 256
# Micro-batches go from thread to thread in pieces of about this size: with 128 KiB the hand-over costs more than the
# reading, from 4 MiB on fresh memory begins to count.
_PIECE_BYTES = 2 * 1024 * 1024


def rank_positions(
    start: int, *, batch_sequences: int, micro_batch: int, rank: int, world_size: int, end: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Positions of this rank's micro-batches, for ever or up to, not including, `end`.

    The step at t has the positions t..t+G-1 below `end`; micro-batch a of rank r holds those of them that lie in
    t + (a W + r) m + 0..m-1. Together the ranks read each position exactly once, whatever their number. Every rank has
    as many micro-batches as the others, if need be empty ones, because their forward and backward are collectives.
    """
    while end is None or start < end:
        stop = start + batch_sequences if end is None else min(start + batch_sequences, end)
        for first in range(start + rank * micro_batch, stop + rank * micro_batch, world_size * micro_batch):
            yield np.arange(first, min(first + micro_batch, stop), dtype=np.int64)
        start = stop


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows to train on, and which samples they are: what the run writes down when the step commits.

    `rows` has as many rows in every micro-batch; those behind the P positions are EOS without a target.

    Shapes: positions, files, samples (P,).
    """

    rows: TokenRows
    positions: NDArray[np.int64]
    files: NDArray[np.int64]
    """Indices into the order's files."""
    samples: NDArray[np.int64]
    """Indices of the samples inside their files."""
    bad: list[tuple[int, int]]
    """(file, sample) of those whose rows are empty because their bytes are not the ones that were written."""

    @property
    def num_targets(self) -> int:
        """Targets of all rows together."""
        return self.rows.num_targets

    @property
    def num_units(self) -> int:
        """See `TokenRows.num_units`."""
        return self.rows.num_units

    @property
    def num_tokens(self) -> int:
        """See `TokenRows.num_tokens`."""
        return self.rows.num_tokens

    def to(self, device: torch.device) -> Batch:
        """What the model reads, on a device."""
        return self.rows.to(device)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive micro-batches that are read at once.

    Shapes: files, samples (micro-batches * rows,), NO_SAMPLE in rows that stay empty.
    """

    positions: list[NDArray[np.int64]]
    files: NDArray[np.int64]
    samples: NDArray[np.int64]


class Loader:
    """An iterator over this rank's micro-batches; use it as a context manager, so that its thread ends."""

    def __init__(
        self,
        order: Order,
        reader: SampleReader,
        positions: Iterator[NDArray[np.int64]],
        *,
        micro_batch: int,
        isolate_documents: bool = False,
        pin_memory: bool = False,
        annotate: Annotate | None = None,
    ):
        """Positions come in arrays of at most `micro_batch`, which is the number of rows of every micro-batch."""
        self._annotate = annotate
        self._order, self._reader, self._positions = order, reader, positions
        self._micro_batch = micro_batch
        self._isolate_documents = isolate_documents
        self._pin_memory = pin_memory
        row_bytes = (reader.sequence_length + 1) * reader.dtype.itemsize
        # What is added to tokens may be a hundred times as large as they are.
        self._micro_batches_per_piece = 1 if annotate else max(1, _PIECE_BYTES // (row_bytes * micro_batch))
        # One piece is waiting while the next is read.
        self._ready: queue.Queue[list[MicroBatch] | Exception] = queue.Queue(maxsize=1)
        self._current: collections.deque[MicroBatch] = collections.deque()
        self._ended_with: Exception | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        while self._thread.is_alive():  # perhaps waiting for room
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.01)
        self._reader.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch.

        Raises:
            DataError: what the reader found, on the thread that trains.
            StopIteration: the positions have come to their end.
        """
        if not self._current:
            self._current.extend(self._next_piece())
        return self._current.popleft()

    def _next_piece(self) -> list[MicroBatch]:
        if self._ended_with is None:
            item = self._ready.get()
            if not isinstance(item, Exception):
                return item
            self._ended_with = item
        raise self._ended_with

    def _read_ahead(self) -> None:
        try:
            for piece in self._announced_pieces():
                if self._stopping.is_set():
                    return
                self._ready.put(self._read(piece))
            self._ready.put(StopIteration())
        except Exception as error:  # handed over: it must reach the training thread, whatever it is
            self._ready.put(error)

    def _read(self, piece: _Piece) -> list[MicroBatch]:
        rows = empty_rows(len(piece.files), self._reader.sequence_length, self._reader.dtype.itemsize, self._pin_memory)
        read = self._reader.read_into(piece.files, piece.samples, as_unsigned(rows))
        micro_batches: list[MicroBatch] = []
        for i, (positions, tokens) in enumerate(zip(piece.positions, rows.split(self._micro_batch))):
            first = i * self._micro_batch
            end, full_end = first + len(positions), first + self._micro_batch
            bad = [(int(piece.files[r]), int(piece.samples[r])) for r in read.bad_rows if first <= r < end]
            batch = rows_of(self._reader, tokens, read, slice(first, full_end), self._isolate_documents)
            if self._annotate is not None:
                batch = self._annotate(batch, piece.files[first:full_end], piece.samples[first:full_end])
            micro_batches.append(MicroBatch(batch, positions, piece.files[first:end], piece.samples[first:end], bad))
        return micro_batches

    def _announced_pieces(self) -> Iterator[_Piece]:
        """Pieces in order, each after enough of those behind it have been announced to the kernel."""
        ahead: collections.deque[_Piece] = collections.deque()
        num_ahead = 0
        for piece in self._pieces():
            self._reader.will_need(piece.files, piece.samples)
            ahead.append(piece)
            num_ahead += len(piece.files)
            while num_ahead - len(ahead[0].files) >= _READ_AHEAD_SAMPLES:
                num_ahead -= len(ahead[0].files)
                yield ahead.popleft()
        yield from ahead

    def _pieces(self) -> Iterator[_Piece]:
        """Resolves positions in large blocks and cuts them into pieces."""
        micro_batches_per_block = -(-_BLOCK_POSITIONS // self._micro_batch)
        while block := list(itertools.islice(self._positions, micro_batches_per_block)):
            num_rows = len(block) * self._micro_batch
            slots = np.arange(num_rows).reshape(len(block), self._micro_batch)
            is_real = (slots - slots[:, :1] < np.array([[len(positions)] for positions in block])).ravel()
            files, samples = np.zeros(num_rows, dtype=np.int64), np.full(num_rows, NO_SAMPLE)
            files[is_real], samples[is_real] = self._order.resolve(np.concatenate(block))
            for first in range(0, len(block), self._micro_batches_per_piece):
                rows = slice(first * self._micro_batch, (first + self._micro_batches_per_piece) * self._micro_batch)
                yield _Piece(block[first : first + self._micro_batches_per_piece], files[rows], samples[rows])

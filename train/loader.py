"""Micro-batches in the run's global order, read ahead by one thread: the order is known, so nothing is guessed."""

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from model.batch import Batch, collate
from resume.order import Order
from resume.samples import SampleReader

# Positions resolved at a time: a single one costs 138 us, one of 4,096 costs 48 ns.
_BLOCK_POSITIONS = 4_096
# Samples whose pages the kernel is asked for ahead of their use.
_READ_AHEAD_SAMPLES = 256


def rank_positions(
    start: int, *, batch_sequences: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[NDArray[np.int64]]:
    """Positions of this rank's micro-batches, for ever: micro-batch a of a step holds start + (a W + rank) m + 0..m-1.

    Together the ranks read each position of a step exactly once, whatever their number.
    """
    while True:
        for first in range(start + rank * micro_batch, start + batch_sequences, world_size * micro_batch):
            yield np.arange(first, first + micro_batch, dtype=np.int64)
        start += batch_sequences


class Loader:
    """An endless iterator over this rank's micro-batches; use it as a context manager, so that its thread ends."""

    def __init__(
        self,
        order: Order,
        reader: SampleReader,
        positions: Iterator[NDArray[np.int64]],
        *,
        eos_id: int,
        isolate_documents: bool = False,
        pin_memory: bool = False,
        micro_batches_ahead: int = 8,
    ):
        self._order, self._reader, self._positions = order, reader, positions
        self._make: Callable[[list[NDArray]], Batch] = lambda samples: collate(
            samples, order.sequence_length, eos_id, isolate_documents
        )
        self._pin_memory = pin_memory
        self._ready: queue.Queue[Batch | Exception] = queue.Queue(maxsize=micro_batches_ahead)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)

    def __enter__(self) -> "Loader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._reader.close()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: what the reader found, on the thread that trains.
        """
        item = self._ready.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _read_ahead(self) -> None:
        try:
            for locations in self._locations():
                batch = self._make([self._reader.read(file, sample) for file, sample in locations])
                if not self._put(batch.pinned() if self._pin_memory else batch):
                    return
        except Exception as error:  # handed over: it must reach the training thread, whatever it is
            self._put(error)

    def _locations(self) -> Iterator[list[tuple[int, int]]]:
        """(file, sample) lists of successive micro-batches, resolved in large blocks and announced to the kernel."""
        pending: list[NDArray[np.int64]] = []
        for positions in self._positions:
            pending.append(positions)
            if sum(map(len, pending)) < _BLOCK_POSITIONS:
                continue
            files, samples = self._order.resolve(np.concatenate(pending))
            locations = list(zip(files.tolist(), samples.tolist(), strict=True))
            announced = end = 0
            for group in pending:
                start, end = end, end + len(group)
                while announced < min(len(locations), end + _READ_AHEAD_SAMPLES):
                    self._reader.will_need(*locations[announced])
                    announced += 1
                yield locations[start:end]
            pending = []

    def _put(self, item: Batch | Exception) -> bool:
        """Hands an item over; False when the loader is closing."""
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

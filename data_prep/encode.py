"""Units to token ids, in worker processes; results come in the order of the units, whatever the number of workers.

Workers write ids to scratch files and return only counts, so that memory does not grow with the size of a unit.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_prep.documents import BadLine, Document, Unit, read_unit
from data_prep.tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 1024 * 1024
SCRATCH_DTYPE = np.dtype("<u4")
IN_FLIGHT_PER_WORKER = 3
"""Units given out ahead of the awaited one: a slow unit does not idle the others, and scratch stays bounded."""


class WorkerDiedError(RuntimeError):
    """A worker process ended without an answer, most often because the machine ran out of memory."""


@dataclass(frozen=True, slots=True)
class EncodedUnit:
    """The documents of a unit as ids, without their EOS.

    Shapes: three arrays (num_documents,).
    """

    unit: Unit
    tokens_file: Path
    """Raw SCRATCH_DTYPE ids of all documents, one behind the other."""
    num_tokens: np.ndarray
    text_bytes: np.ndarray
    text_hashes: np.ndarray
    """xxh3_64 of each text: equal texts have equal hashes, which decide their split."""
    bad_lines: tuple[BadLine, ...]


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_units(
    units: Sequence[Unit], tokenizer_file: Path, eos_id: int, scratch: Path, num_workers: int
) -> Generator[EncodedUnit, None, None]:
    """Encode units, in their order; with 0 or 1 workers in this process.

    The caller deletes each tokens_file after use. Close the iterator to stop the workers early.

    Raises:
        WorkerDiedError: a worker process was killed.
    """
    files = [scratch / f"unit-{index:06d}.tokens" for index in range(len(units))]
    if num_workers <= 1:
        tokenizer = load_tokenizer(tokenizer_file, eos_id=eos_id)
        for unit, file in zip(units, files, strict=True):
            yield encode_unit(unit, tokenizer, file)
        return
    executor = ProcessPoolExecutor(
        min(num_workers, max(len(units), 1)),
        # Not fork: training a tokenizer has started threads in this process, and a fork copies their locks.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_file, eos_id),
    )
    try:
        yield from _in_order(executor, zip(units, files, strict=True), num_workers * IN_FLIGHT_PER_WORKER)
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process died, most often because memory ran out: try fewer workers (--engine.num-workers). "
            'A script that calls this needs the usual `if __name__ == "__main__":`'
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def encode_unit(unit: Unit, tokenizer: Tokenizer, tokens_file: Path) -> EncodedUnit:
    """Read, encode and write one unit."""
    bad_lines: list[BadLine] = []
    num_tokens: list[int] = []
    text_bytes: list[int] = []
    text_hashes: list[int] = []
    with tokens_file.open("wb") as file:
        for batch in _batches(read_unit(unit), bad_lines):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                # Some published vocabularies spell their own EOS out of ordinary text; written so, it would end a
                # document in its middle.
                if tokenizer.eos_id in ids:
                    bad_lines.append(BadLine(document.path, document.line, "text encodes to the end-of-document token"))
                    continue
                content = document.text.encode("utf-8")
                file.write(np.array(ids, dtype=SCRATCH_DTYPE).tobytes())
                num_tokens.append(len(ids))
                text_bytes.append(len(content))
                text_hashes.append(xxhash.xxh3_64_intdigest(content))
    return EncodedUnit(
        unit,
        tokens_file,
        np.array(num_tokens, dtype=np.int64),
        np.array(text_bytes, dtype=np.int64),
        np.array(text_hashes, dtype=np.uint64),
        tuple(bad_lines),
    )


def _batches(items: Iterable[Document | BadLine], bad_lines: list[BadLine]) -> Iterator[list[Document]]:
    """Documents in batches of about BATCH_BYTES; bad lines are set aside."""
    batch: list[Document] = []
    num_characters = 0
    for item in items:
        if isinstance(item, BadLine):
            bad_lines.append(item)
            continue
        batch.append(item)
        num_characters += len(item.text)
        if num_characters >= BATCH_BYTES:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _in_order(
    executor: ProcessPoolExecutor, tasks: Iterable[tuple[Unit, Path]], max_in_flight: int
) -> Iterator[EncodedUnit]:
    in_flight: deque[Future[EncodedUnit]] = deque()
    for unit, file in tasks:
        in_flight.append(executor.submit(_encode_in_worker, unit, file))
        if len(in_flight) >= max_in_flight:
            yield in_flight.popleft().result()
    while in_flight:
        yield in_flight.popleft().result()


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_file: Path, eos_id: int) -> None:
    global _worker_tokenizer
    # One thread per worker: the workers are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # Ctrl-C reaches the whole group: a worker then ends at once, without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(tokenizer_file, eos_id=eos_id)


def _end_with_parent() -> None:
    """A killed parent closes no queue: without this its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(unit: Unit, tokens_file: Path) -> EncodedUnit:
    assert _worker_tokenizer is not None
    return encode_unit(unit, _worker_tokenizer, tokens_file)

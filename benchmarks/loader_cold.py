"""What reading random samples costs when nothing is in the page cache: bytes from the disk, and time.

Bytes are the kernel's count for this process (read_bytes of /proc/self/io). Where it counts nothing, as on overlays and
network file systems, the pages that are resident afterwards are counted instead. Where files cannot be evicted, as on
tmpfs, nothing is measured.
"""

import ctypes
import mmap
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.loader_data import Corpus
from benchmarks.loader_ours import MICRO_BATCH, open_loader
from benchmarks.table import Table
from data_prep.shards import open_tokens

_SAMPLES = 3_072
_ROUNDS = 3
# More of the pages than this still resident after an eviction: it does not work here.
_RESIDENT_LIMIT = 0.02

Read = Callable[[Corpus, int], None]
"""Reads _SAMPLES random samples; the number is a seed."""


def cold_reads(corpus: Corpus) -> Table:
    """Reads random samples in several ways, each time from evicted files, and counts."""
    ways: dict[str, Read] = {
        "memory map, as it is": lambda corpus, seed: _read_mapped(corpus, seed, advice=None),
        "memory map, MADV_RANDOM": lambda corpus, seed: _read_mapped(corpus, seed, advice=mmap.MADV_RANDOM),
        "our loader": lambda corpus, seed: _read_ours(corpus),
    }
    wanted_bytes = _SAMPLES * corpus.row_bytes
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    evictable = True
    for seed in range(_ROUNDS):
        for name, read in ways.items():
            if not _evict(corpus.shards):
                evictable = False
                continue
            before, started_s = _read_bytes(), time.perf_counter()
            read(corpus, seed)
            elapsed_s = time.perf_counter() - started_s
            counted = _read_bytes() - before
            resident = sum(map(_resident_bytes, corpus.shards))
            found[name].append((elapsed_s, counted / wanted_bytes, resident / wanted_bytes))
    rows: list[list[str | float | None]] = []
    for name, rounds in found.items():
        if not rounds:
            rows.append([name, None, None, None])
            continue
        elapsed_s, counted, resident = (statistics.median(values) for values in zip(*rounds, strict=True))
        rows.append([name, _SAMPLES / elapsed_s, counted or None, resident])
    for path in corpus.shards:  # warm again for what comes after
        path.read_bytes()
    return Table(
        f"Cold: {_SAMPLES:,} random samples of {corpus.row_bytes:,} bytes, median of {_ROUNDS}",
        ["way to read", "samples/s", "bytes read / wanted", "bytes resident / wanted"],
        rows,
        f"read-ahead of the device: {_read_ahead_kb(corpus.folder)} KiB"
        if evictable
        else "not measured: this file system keeps evicted files in memory",
    )


def _read_mapped(corpus: Corpus, seed: int, advice: int | None) -> None:
    rng = np.random.default_rng(seed)
    maps = [open_tokens(path) for path in corpus.shards]
    if advice is not None:
        for tokens in maps:
            tokens._mmap.madvise(advice)  # pyright: ignore[reportAttributeAccessIssue]
    length = corpus.sequence_length
    for shard in rng.integers(len(maps), size=_SAMPLES).tolist():
        first = int(rng.integers((len(maps[shard]) - 1) // length)) * length
        maps[shard][first : first + length + 1].astype(np.int64)


def _read_ours(corpus: Corpus) -> None:
    with open_loader(corpus, with_checksums=False, end=_SAMPLES) as loader:
        for _ in range(_SAMPLES // MICRO_BATCH):
            next(loader)


def _evict(paths: list[Path]) -> bool:
    """Has the kernel drop clean pages; whether it did."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    size_bytes = sum(path.stat().st_size for path in paths)
    return sum(map(_resident_bytes, paths)) < _RESIDENT_LIMIT * size_bytes


def _resident_bytes(path: Path) -> int:
    """Bytes of a file that are in the page cache, by mincore on a map that touches none of them."""
    content = np.memmap(path, dtype=np.uint8, mode="r")
    num_pages = -(-len(content) // mmap.PAGESIZE)
    flags = np.zeros(num_pages, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    pointers = (ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), ctypes.c_void_p(flags.ctypes.data))
    if libc.mincore(*pointers):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((flags & 1).sum()) * mmap.PAGESIZE


def _read_bytes() -> int:
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def _read_ahead_kb(folder: Path) -> str:
    device = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"

"""The loader beside others: CPU per sample, restart, state, lookups and cold reads.

    python -m benchmarks.loader [--sections cpu,cold,lookup,state,restart] [--gigabytes 1] [--folder FOLDER]

One process, on shards of random tokens in a temporary folder. What is timed is CPU time of all threads (user + sys),
because reading competes with the training process for its cores, and because wall times of a shared machine are noise.
Blocks of samples are interleaved, so that a slow minute of the machine hits all rows alike. Before it is timed, each
row's loader is checked: its rows must be rows of the data, no two the same. Libraries that are not installed are left
out; none of them is a dependency.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import loader_peers
from benchmarks.environment import describe, device_name, result_path, write_result
from benchmarks.loader_cold import cold_reads
from benchmarks.loader_data import Corpus, WrongRowsError, write_corpus
from benchmarks.loader_ours import open_loader, open_loader_on_cpu
from benchmarks.loader_state import lookups, restart, state_sizes
from benchmarks.table import Table
from model.batch import Batch, as_unsigned
from train.loader import MicroBatch

COMMAND = "python -m benchmarks.loader"
SECTIONS = ("cpu", "cold", "lookup", "state", "restart")
SEQUENCE_LENGTH = 2_048
_BATCH = loader_peers.BATCH
_BLOCKS = 10
_BLOCK_SAMPLES = 8_192
# Samples read before timing, of which the first are checked.
_WARM_UP_SAMPLES, _CHECKED_SAMPLES = 8_192, 1_024
_MEMORY_SAMPLES = 32_768
# Long enough for a reading thread to fill its queue.
_SETTLE_S = 0.05

Open = Callable[[Corpus], AbstractContextManager[Iterator[Any]]]
"""Opens a loader: an endless iterator over batches of 8 rows."""


@dataclass(slots=True)
class Row:
    """One loader, and what was measured of it."""

    name: str
    open: Open
    stride: int
    """Its rows start at multiples of this many tokens."""
    draws_with_replacement: bool = False
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    us_per_sample: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    remark: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen sections, prints their tables; a run of all sections writes JSON and PNG."""
    options = _options(argv)
    torch.set_num_threads(1)  # a second thread for a copy of 32 KB would only wait
    print(f"{device_name()}  torch {describe()['torch']}  numpy {np.__version__}")
    folder = Path(tempfile.mkdtemp(prefix="bessemer-loader-", dir=options.folder))
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"numpy": np.__version__, "libraries": loader_peers.library_versions()}
    try:
        if {"cpu", "cold"} & set(options.sections):
            corpus = write_corpus(folder, int(options.gigabytes * 1e9), SEQUENCE_LENGTH)
            print(
                f"{corpus.num_samples:,} samples of {SEQUENCE_LENGTH:,} tokens in {len(corpus.shards)} shards, {folder}"
            )
            if "cpu" in options.sections:
                rows = cpu_per_sample(corpus)
            if "cold" in options.sections:
                facts["cold"] = _shown(cold_reads(corpus))
        for section, measure in (("lookup", lookups), ("state", state_sizes), ("restart", restart)):
            if section in options.sections:
                facts[section] = _shown(measure(folder))
    finally:
        shutil.rmtree(folder)
    if set(options.sections) == set(SECTIONS):
        command = f"{COMMAND} --gigabytes {options.gigabytes:g}"
        print(f"\nwrote {write_result('loader', command, rows, **facts)} and {result_path('loader', 'png').name}")
        _draw(rows)
    return 0


def cpu_per_sample(corpus: Corpus) -> list[dict[str, Any]]:
    """CPU time and memory of every loader, warm: all shards are in the page cache."""
    # The libraries apart from the others: their threads poll, and would be counted with whatever runs beside them.
    groups = [_rows(), _library_rows()]
    for rows in groups:
        for row in rows:
            _measure_memory(row, corpus)
        with contextlib.ExitStack() as stack:
            for row in rows:
                _begin(row, corpus, stack)
            for _ in range(_BLOCKS):
                for row in rows:
                    if not row.remark:
                        row.us_per_sample.append(_time_block(row.batches))
    return _report([row for rows in groups for row in rows])


def _rows() -> list[Row]:
    """The first is what the others are compared with."""
    block, p = SEQUENCE_LENGTH + 1, functools.partial
    return [
        Row("TinyLlama + DataLoader", loader_peers.packed_blocks_and_data_loader, block),
        Row("TinyLlama, iterator alone", loader_peers.packed_blocks, block),
        Row("nanoGPT, random memory map", loader_peers.random_memmap, SEQUENCE_LENGTH, draws_with_replacement=True),
        Row("ours", p(open_loader, with_checksums=False), SEQUENCE_LENGTH),
        Row("ours, checksums", p(open_loader, with_checksums=True), SEQUENCE_LENGTH),
        Row("ours, checksums, int64 on the CPU", p(open_loader_on_cpu, with_checksums=True), SEQUENCE_LENGTH),
    ]


def _library_rows() -> list[Row]:
    block, p = SEQUENCE_LENGTH + 1, functools.partial
    return [
        Row("mosaicml-streaming", loader_peers.mosaic, block),
        Row("mosaicml-streaming + DataLoader", p(loader_peers.mosaic, with_data_loader=True), block),
        Row("litdata", loader_peers.litdata, block),
        Row("litdata + DataLoader", p(loader_peers.litdata, with_data_loader=True), block),
    ]


def _begin(row: Row, corpus: Corpus, stack: contextlib.ExitStack) -> None:
    """Opens a loader, checks its first rows and warms it up."""
    if row.remark:
        return
    try:
        row.batches = stack.enter_context(row.open(corpus))
        checked = [rows_of(next(row.batches)).copy() for _ in range(_CHECKED_SAMPLES // _BATCH)]
        corpus.check(np.concatenate(checked), row.stride, may_repeat=row.draws_with_replacement)
    except WrongRowsError as error:
        row.remark = f"VOID: {error}"
    else:
        for _ in range((_WARM_UP_SAMPLES - _CHECKED_SAMPLES) // _BATCH):
            next(row.batches)


def rows_of(batch: Any) -> NDArray[Any]:
    """The rows (B, L + 1) of a batch in any of the forms that the loaders give."""
    match batch:
        case MicroBatch():
            return as_unsigned(batch.rows.tokens)
        case Batch():
            return rows_of((batch.tokens, batch.targets))
        case (inputs, targets):
            if not torch.equal(inputs[:, 1:], targets[:, :-1]):
                raise WrongRowsError("targets that are not the inputs shifted by one")
            return torch.cat([inputs, targets[:, -1:]], dim=1).numpy()
        case list():
            return torch.stack(batch).numpy()
    return batch.numpy()


def _time_block(batches: Iterator[Any]) -> float:
    """CPU us per sample. The loader begins and ends with what it reads ahead complete, so that work is neither lent
    to other rows nor borrowed from them.
    """
    time.sleep(_SETTLE_S)
    started_s = _cpu_s()
    for _ in range(_BLOCK_SAMPLES // _BATCH):
        next(batches)
    time.sleep(_SETTLE_S)
    return (_cpu_s() - started_s) / _BLOCK_SAMPLES * 1e6


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure_memory(row: Row, corpus: Corpus) -> None:
    """The most memory that the process holds while a loader reads, above what it held before."""
    try:
        with row.open(corpus) as batches:  # libraries write their files, and everything is imported
            next(batches)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else a row would live on what the one before gave back
        before = _status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        with row.open(corpus) as batches:
            for _ in range(_MEMORY_SAMPLES // _BATCH):
                next(batches)
            row.peak_bytes = max(0, _status_bytes("VmHWM") - before)
    except ImportError as error:
        row.remark = f"not installed ({error.name})"
    except OSError:
        row.peak_bytes = None  # no /proc/self/clear_refs here


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


def _report(rows: list[Row]) -> list[dict[str, Any]]:
    base = rows[0].us_per_sample
    results: list[dict[str, Any]] = []
    lines: list[list[str | float | None]] = []
    for row in rows:
        result: dict[str, Any] = {"name": row.name, "remark": row.remark or None}
        if row.us_per_sample:
            median_us = statistics.median(row.us_per_sample)
            ratio = statistics.median(theirs / own for theirs, own in zip(base, row.us_per_sample, strict=True))
            result |= {
                "cpu_us_per_sample_best": min(row.us_per_sample),
                "cpu_us_per_sample_median": median_us,
                "samples_per_cpu_s": 1e6 / median_us,
                "ratio": ratio,
                "peak_bytes": row.peak_bytes,
            }
            memory = row.peak_bytes / 1e6 if row.peak_bytes is not None else None
            lines.append([row.name, min(row.us_per_sample), median_us, 1e6 / median_us, ratio, memory])
        else:
            lines.append([f"{row.name}: {row.remark}", "", "", "", "", ""])
        results.append(result)
    Table(
        f"CPU of all threads per sample of {SEQUENCE_LENGTH:,} tokens, warm, {_BLOCKS} blocks of {_BLOCK_SAMPLES:,}",
        ["loader", "us best", "median", "samples/CPU-s", "ratio", "peak MB"],
        lines,
        "ratio: to the first row, median over blocks; peak MB: above the process before, mapped pages included",
    ).print()
    return results


def _shown(table: Table) -> list[dict[str, Any]]:
    table.print()
    return table.records()


def _draw(results: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [result for result in results if "samples_per_cpu_s" in result]
    figure = Figure(figsize=(8, 1 + 0.5 * len(measured)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [result["name"] for result in measured]
    colours = ["#1f4e79" if name.startswith("ours") else "#9aa5b1" for name in names]
    bars = axes.barh(names, [result["samples_per_cpu_s"] for result in measured], color=colours)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.margins(x=0.15)  # room for the figures
    axes.invert_yaxis()
    axes.set_xlabel(f"samples of {SEQUENCE_LENGTH:,} tokens per CPU second, median")
    axes.set_title(device_name(), fontsize=10)
    figure.savefig(result_path("loader", "png"), dpi=120)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Measure the loader beside others.")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        default=list(SECTIONS),
        help=f"some of {','.join(SECTIONS)}; a run of all writes benchmarks/results",
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the random shards")
    parser.add_argument("--folder", type=Path, help="where to put them for the time of the run; by default in /tmp")
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: choose from {','.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""The sections of the data benchmarks: which ways are run on what, and what of a run is checked."""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import data_child, data_report
from benchmarks.data_child import AbsentError, ChildError, Job, Measured
from benchmarks.data_corpus import COPIES, EOS_ID, PAD_ID, Corpus
from benchmarks.data_report import Goal
from benchmarks.data_size import installed_sizes
from benchmarks.table import Table
from data_prep.manifest import read_manifest

OURS, PEERS = "benchmarks.data_ours", "benchmarks.data_peers"
LIMIT = "the encoder alone"
_STEP_BYTES = 8_000_000
_DUPLICATE = "exact duplicate"


@dataclass(slots=True)
class Row:
    """A way, what it is run on, and what was measured of it."""

    name: str
    module: str
    way: str
    files: tuple[str, ...]
    text_bytes: int
    options: dict[str, Any] = field(default_factory=dict)
    num_workers: int | None = None
    runs: list[Measured] = field(default_factory=list)
    peak_bytes: int | None = None
    remark: str = ""

    @property
    def mb_per_s(self) -> list[float]:
        """MB of text per second, of each round."""
        return [self.text_bytes / 1e6 / run.elapsed_s for run in self.runs]

    def record(self) -> dict[str, Any]:
        """For the file of results."""
        if not self.runs:
            return {"name": self.name, "remark": self.remark}
        last = self.runs[-1]
        return {
            "name": self.name,
            "remark": self.remark or None,
            "text_bytes": self.text_bytes,
            "workers": self.num_workers,
            "elapsed_s": [run.elapsed_s for run in self.runs],
            "cpu_s": [run.cpu_s for run in self.runs],
            "mb_per_s": statistics.median(self.mb_per_s),
            "mb_per_cpu_s": self.text_bytes / 1e6 / statistics.median(run.cpu_s for run in self.runs),
            "peak_bytes": self.peak_bytes,
            "tokens": last.num_tokens,
            "digest": last.digest,
            **{name: value for name, value in last.facts.items() if name != "copies"},
        }


class Bench:
    """A run of the benchmark: what its sections share."""

    def __init__(self, options: argparse.Namespace, corpus: Corpus, folder: Path) -> None:
        self._options, self._corpus, self._folder = options, corpus, folder
        self.goals: list[Goal] = []

    def encode(self) -> list[dict[str, Any]]:
        """JSON lines to token files."""
        corpus, workers = self._corpus, self._options.workers
        few = max(1, round(len(corpus.parts) * self._options.peer_megabytes * 1e6 / sum(corpus.text_bytes)))
        whole = (corpus.parts, sum(corpus.text_bytes))
        # A file for each process, or a way that deals files to processes would run in fewer.
        few = min(max(few, workers), len(corpus.parts))
        part = (corpus.parts[:few], sum(corpus.text_bytes[:few]))
        limit = Row(LIMIT, OURS, "raw_encode", *whole)
        ours = Row("ours", OURS, "plain", *whole, {"engine": "auto"})
        rows = [
            limit,
            ours,
            Row("ours, once more", OURS, "plain", *whole, {"engine": "auto"}),
            Row("ours, process pool", OURS, "plain", *whole, {"engine": "pool"}),
            Row("ours, Dask", OURS, "plain", *whole, {"engine": "dask"}),
            Row("ours, one process", OURS, "plain", *whole, {"engine": "inline"}, num_workers=1),
            *(Row(name, PEERS, way, *part) for name, way in _PEER_NAMES.items()),
        ]
        self._run(rows, lambda row, run: _wrong_tokens(corpus, row, run))
        data_report.ways_table(
            f"JSON lines to token files, {workers} processes, nothing cleaned; {corpus.describe()}",
            [row.record() for row in rows],
            f"MB of text; ours / row: median over rounds; other projects' ways run on {part[1] / 1e6:.1f} MB of it",
            _ratios(ours, rows),
        ).print()
        self.goals += data_report.encode_goals(ours.record(), limit.record(), _ratios(ours, rows), _PEER_NAMES)
        return [row.record() for row in rows]

    def pipeline(self) -> list[dict[str, Any]]:
        """Everything, by default settings."""
        corpus = self._corpus
        by_kind = corpus.kind_files()
        files = tuple(file for pair in by_kind.values() for file in pair)
        size = sum(corpus.kind_bytes.values()) + corpus.planted_bytes
        rows = [
            Row(name, OURS, "full", files, size, {"engine": engine, "by_kind": by_kind}, num_workers=num_workers)
            for name, engine, num_workers in (
                ("ours", "auto", None),
                ("ours, once more", "auto", None),
                ("ours, process pool", "pool", None),
                ("ours, Dask", "dask", None),
                ("ours, one process", "inline", 1),
            )
        ]
        digests: set[str] = set()
        self._run(rows, lambda _, run: _wrong_verdicts(run, digests))
        data_report.ways_table(
            f"Everything: cleaning, exact and near duplicates, shards, {self._options.workers} processes",
            [row.record() for row in rows],
            f"{size / 1e6:.1f} MB of text, copies included; equal tokens in all rows",
            _ratios(rows[0], rows),
        ).print()
        data_report.copies_table(_copies(rows[0]) if rows[0].runs else {}).print()
        self.goals += data_report.pipeline_goals(rows[0].record())
        return [row.record() | {"copies": _copies(row) if row.runs else None} for row in rows]

    def steps(self) -> list[dict[str, Any]]:
        """Each step alone."""
        by_kind = self._corpus.kind_files()
        row = Row("steps", OURS, "steps", (), 0, {"by_kind": by_kind, "most_bytes": _STEP_BYTES}, num_workers=1)
        measured = [self._once(row).facts["rows"] for _ in range(self._options.rounds)]
        rows = [
            {**first, "mb_per_cpu_s": statistics.median(round_[i]["mb_per_cpu_s"] for round_ in measured)}
            for i, first in enumerate(measured[0])
        ]
        data_report.steps_table(rows).print()
        return rows

    def dedup(self) -> dict[str, Any]:
        """The reduce of many documents."""
        from benchmarks import dedup

        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            dedup.write_documents(Path(folder), self._options.documents)
            found = dedup.measure(Path(folder), self._options.documents)
        Table(
            f"Reduce of {self._options.documents:,} documents", ["", "value"], [list(i) for i in found.items()]
        ).print()
        self.goals += data_report.dedup_goals(found)
        return found

    def default(self) -> dict[str, Any]:
        """The default corpus, by the command that a user types."""
        folder = self._folder / "default"
        command = [sys.executable, "-m", "data_prep", "prepare", "--output.folder", str(folder)]
        command += ["--engine.num-workers", str(self._options.workers), *self._options.default_arguments]
        started_s = time.perf_counter()
        _, cpu_s, _ = data_child.measure(command)
        elapsed_s = time.perf_counter() - started_s
        tokens = sum(shard.token_count - 1 for shard in read_manifest(folder).shards)
        found = {"tokens": tokens, "elapsed_s": elapsed_s, "cpu_s": cpu_s, "tokens_per_s": tokens / elapsed_s}
        Table("The default corpus, from nothing", list(found), [list(found.values())]).print()
        self.goals += data_report.default_goals(found)
        return found

    def size(self) -> dict[str, Any]:
        """What must be installed."""
        sizes = installed_sizes()
        rows: list[list[str | float | None]] = [[name, size / 1e6] for name, size in sizes.items() if size >= 1e6]
        rest = sum(size for size in sizes.values() if size < 1e6)
        Table("Installed beyond torch", ["distribution", "MB"], [*rows, ["others", rest / 1e6]]).print()
        self.goals += data_report.size_goals(sizes)
        return sizes

    def _run(self, rows: Sequence[Row], wrong: Any) -> None:
        for number in range(self._options.rounds + 1):
            for row in rows:
                if row.remark:
                    continue
                try:
                    run = self._once(row, with_memory=number == 0)
                except AbsentError as error:
                    row.remark = f"not installed ({error})"
                    continue
                except ChildError as error:
                    row.remark, row.runs = f"FAILED: {str(error).splitlines()[-1]}", []
                    print(error, file=sys.stderr)
                    continue
                if remark := wrong(row, run):
                    row.remark, row.runs = f"VOID: {remark}", []
                elif number == 0:
                    row.peak_bytes = run.peak_bytes
                else:
                    row.runs.append(run)

    def _once(self, row: Row, with_memory: bool = False) -> Measured:
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            job = Job(
                files=row.files,
                tokenizer=self._corpus.tokenizer,
                eos_id=EOS_ID,
                pad_id=PAD_ID,
                vocab_size=self._corpus.vocab_size,
                folder=folder,
                num_workers=row.num_workers or self._options.workers,
                options=row.options,
            )
            return data_child.run(row.module, row.way, job, with_memory)


_PEER_NAMES = {
    "Steel-LLM's way": "steel_llm",
    "Megatron-LM's way": "megatron",
    "nanoGPT's way": "nanogpt",
    "nanoGPT's way without datasets": "arrow",
    "TinyLlama's way": "tinyllama",
    "datatrove": "datatrove",
}


def _wrong_tokens(corpus: Corpus, row: Row, run: Measured) -> str:
    """What is wrong with the tokens of a run; nothing if they are right."""
    return "" if run.digest == corpus.digest(run.order) else f"other tokens than `tokenizers` gives ({run.digest})"


def _wrong_verdicts(run: Measured, digests: set[str]) -> str:
    """What is wrong with a run of the whole pipeline, beside the digests of the others."""
    digests.add(run.digest)
    if len(digests) > 1:
        return "other shards than the first run's"
    copies = run.facts["copies"]
    exact, spaced = copies[:: len(COPIES)], copies[1 :: len(COPIES)]
    # Only with other line ends a text may pass a filter that refused it before.
    kept = exact.count("kept") + sum(a == _DUPLICATE and b == "kept" for a, b in zip(exact, spaced, strict=True))
    return f"{kept} exact copies were kept" if kept else ""


def _copies(row: Row) -> dict[str, dict[str, int]]:
    """What became of the copies, by sort."""
    found: dict[str, dict[str, int]] = {sort: {} for sort in COPIES}
    for sort, verdict in zip(itertools.cycle(COPIES), row.runs[-1].facts["copies"]):
        outcome = verdict if verdict in ("kept", _DUPLICATE, "near duplicate") else "filtered"
        found[sort][outcome] = found[sort].get(outcome, 0) + 1
    return found


def _ratios(ours: Row, rows: Sequence[Row]) -> dict[str, float | None]:
    """How many times as fast ours is, median over rounds."""
    return {
        row.name: statistics.median(own / theirs for own, theirs in zip(ours.mb_per_s, row.mb_per_s, strict=True))
        if row.runs and ours.runs
        else None
        for row in rows
    }

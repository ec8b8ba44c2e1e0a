"""Data preparation beside others: JSON lines to shards, the whole pipeline, its steps, and what they need.

    python -m benchmarks.data [--sections encode,pipeline,...] [--megabytes 48] [--rounds 3]

One process drives; each run of each way is a program of its own (`data_child`), as processes and memory are part of
what is compared. Time counts from the end of its imports. Ways come in turn, round by round, so that a slow minute of
the machine hits all alike; the round before the first is not timed, in it memory is sampled. A way whose tokens are not
those of the `tokenizers` library, document by document, gets no speed. The same way under two names says what a
difference means. Libraries that are not installed are left out; none of them is a dependency.

    encode     JSON lines to token files, nothing cleaned, beside the encoder alone and other projects' ways
    pipeline   all of it: cleaning, exact and near duplicates, shards; among the input are 1,800 changed copies
    steps      each step alone, on one core
    dedup      ten million synthetic documents through the reduce (benchmarks.dedup)
    default    the default corpus from nothing, by the command that a user types
    size       what must be installed beyond torch
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import data_report
from benchmarks.data_corpus import make_corpus
from benchmarks.data_sections import Bench
from benchmarks.environment import describe, device_name, result_path, write_result
from data_prep.engine import default_workers

COMMAND = "python -m benchmarks.data"
SECTIONS = ("encode", "pipeline", "steps", "dedup", "default", "size")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the chosen sections, prints their tables; a run of all sections writes JSON and PNG."""
    options = _options(argv)
    print(f"{device_name()}  python {describe()['python']}", flush=True)
    corpus = make_corpus(options.corpus, options.megabytes, options.chinese, options.passes)
    print(corpus.describe(), flush=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bessemer-data-", dir=options.folder) as folder:
        bench = Bench(options, corpus, Path(folder))
        for section in options.sections:
            results[section] = getattr(bench, section)()
    data_report.goals_table(bench.goals).print()
    if set(options.sections) == set(SECTIONS):
        names = ("megabytes", "passes", "peer_megabytes", "rounds", "workers", "documents")
        command = " ".join([COMMAND, *(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)])
        rows = results.pop("encode")
        facts = {"corpus": corpus.describe(), "goals": data_report.goals_table(bench.goals).records(), **results}
        print(f"\nwrote {write_result('data', command, rows, **facts)} and {result_path('data', 'png').name}")
        data_report.draw(rows, results["pipeline"], result_path("data", "png"))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Measure data preparation beside others.")
    parser.add_argument(
        "--sections",
        type=lambda text: text.split(","),
        default=list(SECTIONS),
        help=f"some of {','.join(SECTIONS)}; a run of all writes benchmarks/results",
    )
    parser.add_argument("--megabytes", type=float, default=48, help="text of the corpus")
    parser.add_argument("--peer-megabytes", type=float, default=12, help="of it for other projects' ways, about")
    parser.add_argument("--passes", type=int, default=1, help="so many times over it, in other orders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--documents", type=int, default=10_000_000, help="for the section dedup")
    parser.add_argument("--chinese", default="debian", help='"debian", "none", or a file of JSON lines with a "text"')
    parser.add_argument("--corpus", type=Path, default=Path("data/bench-corpus"), help="where the corpus is kept")
    parser.add_argument("--folder", type=Path, help="for the output of the ways; by default in /tmp")
    parser.add_argument(
        "--default-arguments",
        type=lambda text: text.split(),
        default=[],
        help="more arguments for the command of the section default",
    )
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections {','.join(sorted(unknown))}: choose from {','.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())

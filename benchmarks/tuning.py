"""Fine-tuning beside pretraining: seconds a step and peak memory of whole runs of one shape.

python -m benchmarks.tuning [--out FOLDER]

Each kind of training runs for some steps in a process of its own, by its own command, on the tiny world's texts in rows
of one length; what metrics.jsonl says of the steps after the first few is compared. On a GPU memory is the peak that
torch has allocated, on a CPU what the process has resident.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import write_result
from train.tiny_world import write_world

COMMAND = "python -m benchmarks.tuning"
_ROW_TOKENS = 512
_STEPS, _WARMUP_STEPS = 14, 4
_ROUNDS = {"cpu": 3, "cuda": 1}
_SHAPES = {
    "cpu": {"hidden-size": 384, "num-layers": 6, "num-heads": 6, "num-kv-heads": 6, "head-size": 64, "ffn-size": 1024},
    "cuda": {
        "hidden-size": 2048, "num-layers": 22, "num-heads": 32, "num-kv-heads": 4, "head-size": 64, "ffn-size": 5632,
    },
}  # fmt: skip
_ROWS = {"cpu": 4, "cuda": 16}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark and writes its JSON."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    _print(found)
    rows = [{"kind": kind, **figures} for kind, figures in found.pop("medians").items()]
    print(f"wrote {write_result('tuning', COMMAND, rows, options.out, **found)}")
    return 0


def measure(folder: Path) -> dict[str, Any]:
    """Seconds a step and peak memory by kind of training; rounds take turns, so that a slow minute hits all alike."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _prepare(folder)
    shape = [part for key, value in _SHAPES[device].items() for part in (f"--model.{key}", str(value))]
    base = ["--model.vocab-size", "260", "--model.context-length", str(_ROW_TOKENS), *shape]
    kinds = {
        "pretraining": ["train/pretrain.py", *base, "--data.sequence-length", str(_ROW_TOKENS),
                        "--data.isolate-documents", "True", "--data.paths", str(folder / "prose")],
        "sft": ["train/sft.py", "--data.paths", str(folder / "chat")],
        "dpo": ["train/dpo.py", "--data.paths", str(folder / "pairs")],
    }  # fmt: skip
    samples: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(_ROUNDS[device]):
        for kind, command in kinds.items():
            run = folder / f"{kind}-{number}"
            start = [] if kind == "pretraining" else ["--run.init-from", str(folder / f"pretraining-{number}")]
            samples[kind].append(_one_run([*command, *start], run, _ROWS[device]))
    medians = {
        kind: {name: statistics.median(sample[name] for sample in found) for name in found[0]}
        for kind, found in samples.items()
    }
    return {
        "device": device,
        "batch_rows": _ROWS[device],
        "row_tokens": _ROW_TOKENS,
        "medians": medians,
        "runs": samples,
    }


def _prepare(folder: Path) -> None:
    """The world's texts as shards of one row length."""
    write_world(folder / "raw")
    config = folder / "prepare.toml"
    config.write_text(
        f'[input]\npaths = ["{folder}/raw/prose.jsonl"]\n[clean]\nfilters = []\n[dedup]\nnear = "off"\n'
        f'[tokenizer]\nvocab_size = 260\n[output]\nfolder = "{folder}/prose"\nsample_tokens = {_ROW_TOKENS}\n'
        f"shard_tokens = {1024 * _ROW_TOKENS}\nvalidation_fraction = 0.0\n"
    )
    _run(["-m", "data_prep", "prepare", str(config)])
    for kind in ("chat", "pairs"):
        data = ["--output", str(folder / kind), "--tokenizer", str(folder / "prose"), "--validation-share", "0"]
        rows = ["--row-tokens", str(_ROW_TOKENS), "--kind", kind]
        _run(["-m", "data_prep", "prepare-chat", str(folder / "raw" / f"{kind}.jsonl"), *data, *rows])


def _one_run(command: list[str], run: Path, rows: int) -> dict[str, float]:
    steps = ["--run.num-steps", str(_STEPS), "--run.save-every", "1000", "--run.validate-every", "1000"]
    batch = ["--data.batch-sequences", str(rows), "--data.micro-batch-sequences", str(rows)]
    epochs = [] if "train/pretrain.py" in command else ["--run.num-epochs", "None"]
    _run([*command, "--run.dir", str(run), *steps, *epochs, *batch, "--optim.warmup-steps", "1"])
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if "step_s" in record][_WARMUP_STEPS:]
    return {
        "step_s": statistics.median(record["step_s"] for record in records),
        "memory_gib": max(record["memory_gib"] for record in records),
    }


def _run(arguments: list[str]) -> None:
    # With more threads than idle cores they spin for each other, and time tells nothing.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def _print(found: dict[str, Any]) -> None:
    pretraining, sft = found["medians"]["pretraining"], found["medians"]["sft"]
    print(f"{found['batch_rows']} rows of {found['row_tokens']} tokens, medians of {len(found['runs']['sft'])} runs")
    for kind, figures in found["medians"].items():
        print(
            f"{kind:<12} {figures['step_s']:.3f} s a step ({figures['step_s'] / pretraining['step_s']:.2f} of "
            f"pretraining)  {figures['memory_gib']:.2f} GiB ({figures['memory_gib'] / sft['memory_gib']:.2f} of sft)"
        )


if __name__ == "__main__":
    sys.exit(main())

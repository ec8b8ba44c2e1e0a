"""The same small run in several configurations on a GPU: every one has to learn what the plainest one learns.

    python -m benchmarks.training_check [--out FOLDER] [--device cuda]

The plainest is fp32, torch's operators, nothing compiled. The others are bf16, so that losses agree only roughly: a
mean over the last steps within `_TOLERANCE` nats. Exit code 1 if one differs. It is no test of speed: the tokens/s are
those of a model far too small.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import write_result
from benchmarks.table import Table
from evaluation.report import read_metrics
from model.config import ModelConfig
from tests.prepared import write_data
from train import pretrain
from train.config import RunConfig, with_values

COMMAND = "python -m benchmarks.training_check"
# bf16 has 3 digits, and the loss falls from 5.7 to below 2.
_TOLERANCE = 0.1
_NUM_STEPS = 60
_TORCH = {
    "kernels": {
        **dict.fromkeys(("rms_norm", "rope", "swiglu", "cross_entropy"), "torch"), "linear_cross_entropy": "whole",
    }
}  # fmt: skip

CONFIGURATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32, torch's operators": {"parallel": {"precision": "fp32", "compile": "off"}, **_TORCH},
    "fp32, our kernels": {"parallel": {"precision": "fp32", "compile": "off"}},
    "all by default": {},
    "not compiled": {"parallel": {"compile": "off"}},
    "torch's operators, compiled": {"parallel": {}, **_TORCH},
    "recomputing what is cheap": {"parallel": {"recompute": "cheap"}},
    "recomputing blocks, resharding": {"parallel": {"recompute": "blocks", "reshard_after_forward": "on"}},
    "attention by torch's FlashAttention": {"kernels": {"attention": "flash"}},
    "float8": {"parallel": {"float8": True}},
}


def main(arguments: list[str] | None = None) -> int:
    """Trains every configuration and prints the table."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: not checked")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder, "data"))
        rows = []
        for name, sections in CONFIGURATIONS.items():
            rows.append(_check(name, _config(data, Path(folder, "run"), options.device, sections), rows))
            print(rows[-1][:3], flush=True)
    columns = ("configuration", "last losses", "verdict", "seconds", "peak GiB")
    table = Table(f"{_NUM_STEPS} steps of one small run", columns, rows)
    table.print()
    print(f"wrote {write_result('training', COMMAND, table.records(), folder=options.out)}")
    return int(any(str(row[2]).startswith("FAIL") for row in rows))


def _config(data: Path, run: Path, device: str, sections: dict[str, dict[str, Any]]) -> RunConfig:
    model = ModelConfig(
        vocab_size=512, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, head_size=64, ffn_size=768,
    )  # fmt: skip
    base = with_values(
        RunConfig(model=model),
        run={"dir": str(run), "num_steps": _NUM_STEPS, "save_every": 1_000, "validate_every": 1_000},
        data={
            "paths": (str(data),),
            "sequence_length": 128,
            "batch_sequences": 8,
            "micro_batch_sequences": 4,
            "validation_sequences": 4,
        },
        optim={"peak_lr": 1e-3, "warmup_steps": 10},
        parallel={"device": device},
    )
    return with_values(base, **sections)


def _check(
    name: str, config: RunConfig, earlier: list[Any]
) -> tuple[str, float | None, str, float | None, float | None]:
    """One row; the first of `earlier` is what the others are compared with."""
    if config.parallel.float8 and importlib.util.find_spec("torchao") is None:
        return name, None, "absent: torchao", None, None
    run = Path(config.run.dir)
    if config.parallel.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run / str(len(earlier)))))
    started_s = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pretrain.pretrain(config)
    except Exception as error:  # the next configuration may say why
        return name, None, f"FAIL: {type(error).__name__}: {str(error)[:200]}", None, None
    seconds = time.perf_counter() - started_s
    records = [record for record in read_metrics(Path(config.run.dir)) if "loss" in record]
    loss = statistics.mean(record["loss"] for record in records[-10:])
    expected = earlier[0][1] if earlier else loss
    agrees = expected is not None and abs(loss - expected) <= _TOLERANCE and loss < records[0]["loss"] - 1.5
    verdict = "agrees" if agrees else f"FAIL: expected {expected} within {_TOLERANCE}"
    return name, loss, verdict, seconds, records[-1]["memory_gib"]


if __name__ == "__main__":
    sys.exit(main())

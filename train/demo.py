"""The whole way on one machine: text -> shards -> training, stopped and resumed -> samples -> exported model.

    python -m train.demo

Every step is a command that you could type; each is printed before it runs. Results lie in data/demo and runs/demo,
which a new demo deletes first. Uses the GPUs it finds, else the CPU.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.manifest import read_manifest
from data_prep.shards import open_tokens
from evaluation.report import read_metrics
from evaluation.score import unigram_entropy
from resume import checkpoint
from train.exits import STOPPED

CONFIG = "configs/smoke.toml"
DATA_CONFIG = "configs/prepare-demo.toml"
PROMPTS = ("def __init__(self, ", "import ", "    for i in range(")


def main() -> int:
    """Runs the demo and prints where everything lies."""
    started_s = time.perf_counter()
    run, data = _folders()
    for folder in (run, data):
        shutil.rmtree(folder, ignore_errors=True)
    _do(["-m", "data_prep", "prepare", DATA_CONFIG])
    import torch

    pretrain = pretrain_command(torch.cuda.device_count())
    _train_and_stop(pretrain, run)
    _do(pretrain)
    _do(["-m", "resume", "audit", str(run)])
    samples = [
        _do(["-m", "evaluation.generate", str(run), "--prompt", prompt, "--max-new-tokens", "60"], quiet=True)
        for prompt in PROMPTS
    ]
    exported = run / "exported"
    _do(["-m", "evaluation.export", str(run), str(exported)])
    # On the sequences of the run's own validations, so that the exported model must score the last one's figures.
    held_out = ["--sequence-length", "256", "--max-sequences", "128"]
    _do(["-m", "evaluation.perplexity", str(exported), "--data", str(data), *held_out])
    _summarise(run, data, exported, samples, time.perf_counter() - started_s)
    return 0


def _folders() -> tuple[Path, Path]:
    run = tomllib.loads(Path(CONFIG).read_text(encoding="utf-8"))["run"]["dir"]
    data = tomllib.loads(Path(DATA_CONFIG).read_text(encoding="utf-8"))["output"]["folder"]
    return Path(run), Path(data)


def pretrain_command(num_gpus: int) -> list[str]:
    """How a machine with so many GPUs starts the run: torchrun on as many as the batch splits over, or plain Python."""
    batch = tomllib.loads(Path(CONFIG).read_text(encoding="utf-8"))["data"]["batch_sequences"]
    num_ranks = max((n for n in range(1, num_gpus + 1) if batch % n == 0), default=1)
    if num_ranks == 1:
        return ["train/pretrain.py", CONFIG]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    return [*torchrun, "train/pretrain.py", CONFIG, "--data.micro-batch-sequences", str(batch // num_ranks)]


def _do(arguments: Sequence[str], quiet: bool = False) -> str:
    """Runs a Python command, prints it and (unless quiet) its output, and returns the output.

    Raises:
        SystemExit: the command failed.
    """
    _announce(arguments)
    process = _start(arguments)
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if not quiet:
            print(line, end="", flush=True)
    if process.wait():
        raise SystemExit(f"error: the command above ended with code {process.returncode}")
    return "".join(output)


def _train_and_stop(arguments: Sequence[str], run: Path) -> None:
    """Trains to the middle and stops the run as a scheduler would, with SIGTERM."""
    _announce(arguments)
    middle = tomllib.loads(Path(CONFIG).read_text(encoding="utf-8"))["run"]["num_steps"] // 2
    process = _start(arguments)
    assert process.stdout is not None
    stopped = False
    for line in process.stdout:
        print(line, end="", flush=True)
        if not stopped and line.startswith("step") and int(line.split()[1].split("/")[0].replace(",", "")) >= middle:
            print(f">>> kill -TERM {process.pid}", flush=True)
            process.send_signal(signal.SIGTERM)
            stopped = True
    code = process.wait()
    # torchrun turns its workers' code into its own.
    if checkpoint.latest(run) is None or code not in (STOPPED, 1, 128 + signal.SIGTERM, -signal.SIGTERM):
        raise SystemExit(f"error: the run was told to stop and ended with code {code}")


def _start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def _announce(arguments: Sequence[str]) -> None:
    print("\n>>> python " + " ".join(f'"{a}"' if " " in a else a for a in arguments), flush=True)


def _summarise(run: Path, data: Path, exported: Path, samples: Sequence[str], elapsed_s: float) -> None:
    validations = [record for record in read_metrics(run) if "validation_loss" in record]
    first, last = validations[0], validations[-1]
    manifest = read_manifest(data)
    held_out = [open_tokens(data / shard.file) for shard in manifest.shards if shard.split == "validation"]
    print("\n" + "=" * 80)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        print(f"--- {prompt!r} goes on:\n{sample.rstrip()}")
    print("=" * 80)
    for name, value in (
        ("checkpoint", checkpoint.latest(run)),
        ("TensorBoard log", f"{run}/tensorboard   (tensorboard --logdir {run}/tensorboard)"),
        ("report", run / "report.md"),
        ("loss curve", run / "loss.png"),
        ("exported model", exported),
        ("perplexity", f"{first['validation_perplexity']:,.1f} before, {last['validation_perplexity']:,.2f} after"),
        ("loss", f"{last['validation_loss']:.3f} nats per token, held out"),
        ("unigram entropy", f"{unigram_entropy(np.concatenate(held_out)):.3f} nats per token of the same text"),
        ("bits per byte", f"{last['validation_bits_per_byte']:.3f}"),
        ("time", f"{elapsed_s:.0f} s"),
    ):
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    sys.exit(main())

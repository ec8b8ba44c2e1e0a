"""The whole way on one machine: text -> tokenizer, shards -> pretraining -> fine-tuning -> preferences -> use.

    python -m train.demo

Every step is a command that you could type; each is printed before it runs. Pretraining is stopped in the middle and
resumed. Results lie in data/world and runs/world*, which a new demo deletes first. Uses the GPUs it finds, else the
CPU.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics_file import read_metrics
from resume import checkpoint
from train.exits import STOPPED

CONFIG, SFT_CONFIG, DPO_CONFIG = "configs/world.toml", "configs/world-sft.toml", "configs/world-dpo.toml"
DATA_CONFIG = "configs/prepare-world.toml"
RAW = Path("data/world/raw")
_ROW_TOKENS = "192"


def main() -> int:
    """Runs the demo and prints where everything lies."""
    started_s = time.perf_counter()
    base, sft, dpo = map(_run_folder, (CONFIG, SFT_CONFIG, DPO_CONFIG))
    for folder in (RAW.parent, base, sft, dpo):
        shutil.rmtree(folder, ignore_errors=True)
    _do(["-m", "train.tiny_world", str(RAW)])
    _do(["-m", "data_prep", "prepare", DATA_CONFIG])
    import torch

    num_gpus = torch.cuda.device_count()
    pretrain = train_command("train/pretrain.py", CONFIG, num_gpus)
    _train_and_stop(pretrain, base)
    _do(pretrain)
    _do(["-m", "resume", "audit", str(base)])
    _fine_tune("chat", base, "train/sft.py", SFT_CONFIG, num_gpus)
    _fine_tune("pairs", sft, "train/dpo.py", DPO_CONFIG, num_gpus)
    answers = {run: _answers(run) for run in (base, sft, dpo)}
    choices = [str(dpo), str(RAW / "choices.jsonl"), "--shots", "0", "--scoring", "cloze", "--chat"]
    _do(["-m", "evaluation.multiple_choice", *choices])
    exported = dpo / "exported"
    _do(["-m", "evaluation.export", str(dpo), str(exported)])
    questions = _questions(3)
    # Each in a conversation of its own, as fine-tuning had them.
    said = _do(["-m", "evaluation.chat", str(exported), "--temperature", "0"], said="\n/reset\n".join(questions) + "\n")
    talk = [f"{question}\n    {answer}" for question, answer in zip(questions, said.splitlines(), strict=False)]
    _summarise(base, answers, exported, "\n".join(talk), time.perf_counter() - started_s)
    return 0


def _run_folder(config: str) -> Path:
    return Path(tomllib.loads(Path(config).read_text(encoding="utf-8"))["run"]["dir"])


def train_command(script: str, config: str, num_gpus: int) -> list[str]:
    """How a machine with so many GPUs starts a run: torchrun on as many as the batch splits over, or plain Python."""
    batch = tomllib.loads(Path(config).read_text(encoding="utf-8"))["data"]["batch_sequences"]
    num_ranks = max((n for n in range(1, num_gpus + 1) if batch % n == 0), default=1)
    if num_ranks == 1:
        return [script, config]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}"]
    return [*torchrun, script, config, "--data.micro-batch-sequences", str(batch // num_ranks)]


def _fine_tune(kind: str, start: Path, script: str, config: str, num_gpus: int) -> None:
    """Prepares conversations or pairs with the tokenizer of a run, and trains on them."""
    data = ["--output", str(RAW.parent / kind), "--tokenizer", str(start), "--row-tokens", _ROW_TOKENS]
    raw = str(RAW / f"{kind}.jsonl")
    _do(["-m", "data_prep", "prepare-chat", raw, "--kind", kind, *data, "--validation-share", "0.05"])
    _do(train_command(script, config, num_gpus))


def _answers(run: Path) -> dict[str, float]:
    """The figures of a model's answers to the questions that fine-tuning did not have."""
    out = run / "eval" / "questions"
    questions = ["evaluation.generated_answers", str(run), str(RAW / "questions.jsonl"), "--scoring", "exact"]
    _do(["-m", *questions, "--max-new-tokens", "40", "--out", str(out)])
    return json.loads((out / "results.json").read_text(encoding="utf-8"))["questions"]


def _questions(count: int) -> list[str]:
    """The first questions."""
    lines = (RAW / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def _do(arguments: Sequence[str], said: str = "") -> str:
    """Runs a Python command, which reads `said`; prints it and its output, and returns the output.

    Raises:
        SystemExit: the command failed.
    """
    _announce(arguments)
    process = _start(arguments)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(said)
    process.stdin.close()
    output = []
    for line in process.stdout:
        output.append(line)
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
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def _announce(arguments: Sequence[str]) -> None:
    print("\n>>> python " + " ".join(f'"{a}"' if " " in a else a for a in arguments), flush=True)


def _summarise(base: Path, answers: dict[Path, dict[str, float]], exported: Path, talk: str, elapsed_s: float) -> None:
    validations = [record for record in read_metrics(base) if "validation_loss" in record]
    first, last = validations[0], validations[-1]
    print("\n" + "=" * 80)
    print(talk)
    print("=" * 80)
    for name, value in (
        ("pretrained model", checkpoint.latest(base)),
        ("TensorBoard log", f"{base}/tensorboard   (tensorboard --logdir runs)"),
        ("report", base / "report.html"),
        ("exported model", exported),
        ("perplexity", f"{first['validation_perplexity']:,.1f} before, {last['validation_perplexity']:,.3f} after"),
        *((f"{run.name}", f"{_percent(found)} of 48 questions answered exactly") for run, found in answers.items()),
        ("talk to it", f"python -m evaluation.chat {exported}"),
        ("time", f"{elapsed_s:.0f} s"),
    ):
        print(f"{name:<16} {value}")


def _percent(figures: dict[str, float]) -> str:
    return f"{figures['accuracy']:.1%}"


if __name__ == "__main__":
    sys.exit(main())

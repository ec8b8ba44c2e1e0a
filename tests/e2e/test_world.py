"""The tiny world, whole: facts seen in pretraining alone are answered after fine-tuning, whenever runs are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resume import checkpoint

ROOT = Path(__file__).parents[2]
# As a person runs it: other tests want the kernels interpreted.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
# Script, config, data folder, and the stage before it.
STAGES = [
    ("train/pretrain.py", "world", "prose", None),
    ("train/sft.py", "world-sft", "chat", "world"),
    ("train/dpo.py", "world-dpo", "pairs", "world-sft"),
]


def command(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stage(script: str, config: str, data: Path, run: Path, start: Path | None) -> list[str]:
    begin = [] if start is None else ["--run.init-from", str(start)]
    return [script, f"configs/{config}.toml", "--run.dir", str(run), "--data.paths", str(data), *begin]


def kill_after_the_first_checkpoint(arguments: list[str], run: Path) -> None:
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 600
    while checkpoint.latest(run) is None:
        assert process.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def answers(run: Path, questions: Path) -> dict[str, float]:
    options = ["--scoring", "exact", "--max-new-tokens", 40, "--out", run / "eval"]
    command("-m", "evaluation.generated_answers", run, questions, *options)
    return json.loads((run / "eval" / "results.json").read_text())["questions"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_world_is_known_after_fine_tuning_and_after_kills_at_every_stage(tmp_path: Path):
    raw = tmp_path / "raw"
    command("-m", "train.tiny_world", raw)
    prepared = ["--input.paths", raw / "prose.jsonl", "--output.folder", tmp_path / "prose"]
    command("-m", "data_prep", "prepare", "configs/prepare-world.toml", *prepared)
    for kind in ("chat", "pairs"):
        options = ["--output", tmp_path / kind, "--tokenizer", tmp_path / "prose", "--row-tokens", 192]
        more = ["--kind", kind, "--validation-share", 0.05]
        command("-m", "data_prep", "prepare-chat", raw / f"{kind}.jsonl", *options, *more)
    figures = {}
    for is_killed in (False, True):
        for script, config, data, before in STAGES:
            folder = tmp_path / str(is_killed)
            run, start = folder / config, folder / before if before is not None else None
            arguments = stage(script, config, tmp_path / data, run, start)
            if is_killed:
                kill_after_the_first_checkpoint(arguments, run)
            command(*arguments)
            figures[config, is_killed] = answers(run, raw / "questions.jsonl")
    for _, config, _, _ in STAGES:
        assert figures[config, True] == figures[config, False]
    assert figures["world", False]["accuracy"] == 0
    for config in ("world-sft", "world-dpo"):
        assert figures[config, False]["accuracy"] >= 0.9
        assert figures[config, False]["stop_rate"] >= 0.99

"""Conversations, pairs and prompts in the real format, a base model to start from, and tiny runs of every recipe."""

import contextlib
import dataclasses
import io
import json
import random
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_prep.chat.prepare_chat import main as prepare_chat
from model.config import ModelConfig
from resume import checkpoint
from tests.prepared import tokenizer
from tests.processes import run_ranks
from train import pretrain
from train.config import ParallelSection, RunConfig, with_values
from train.recipes import TuneConfig
from train.resolve import resolved

ROW = 64
BASE = ModelConfig(vocab_size=304, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_size=6, ffn_size=40)
WORDS = ["def", "return", "x", "+", "1", "2", "3", "f", "y", "print", "value"]

Recipe = TypeVar("Recipe", bound=TuneConfig)


def records(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations, pairs or prompts of random words."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))

    if kind == "chat":
        turns = [[("user", text()), ("assistant", text())] * draw.randint(1, 2) for _ in range(count)]
        return [{"messages": [{"role": role, "content": said} for role, said in turn]} for turn in turns]
    if kind == "pairs":
        return [{"prompt": text(), "chosen": f"{text()} yes", "rejected": text()} for _ in range(count)]
    return [{"prompt": text(), "wanted": draw.choice(WORDS)} for _ in range(count)]


def write_chat_data(
    folder: Path, kind: str = "chat", *, count: int = 60, seed: int = 0, told: list[dict[str, Any]] | None = None
) -> Path:
    """A data folder of one kind, of rows of ROW tokens, encoded with the tokenizer of tests/prepared.py."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in told or records(kind, count, seed)))
    made = folder.parent / f"{folder.name}-tokenizer"
    made.mkdir()
    tokenizer().save(made)
    options = ["--row-tokens", str(ROW), "--validation-share", "0.1", "--kind", kind]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare_chat([str(source), "--output", str(folder), "--tokenizer", str(made), *options]) == 0
    return folder


def write_base(folder: Path, data: Path) -> Path:
    """A run folder of one step: a model to start from."""
    config = RunConfig(model=BASE, parallel=ParallelSection(device="cpu"))
    config = with_values(
        config,
        run={"dir": str(folder), "num_steps": 1, "save_every": 1, "validate_every": 9},
        data={"paths": (str(data),), "sequence_length": 32, "batch_sequences": 4, "micro_batch_sequences": 4},
    )
    assert run_ranks(lambda rank: pretrain.pretrain(config), 1, folder.parent) == [0]
    return folder


def tuning(recipe: type[Recipe], base: Path, folder: Path, to: Path, /, **sections: dict[str, Any]) -> Recipe:
    """A tiny run of a recipe, resolved, with sums of gradients that do not depend on who computes what."""
    config = with_values(
        recipe(parallel=ParallelSection(device="cpu", precision="exact")),
        run={
            "dir": str(to),
            "init_from": str(base),
            "num_epochs": None,
            "num_steps": 6,
            "save_every": 3,
            "validate_every": 3,
            "keep_checkpoints": 9,
        },
        data={"paths": (str(folder),), "batch_sequences": 4, "micro_batch_sequences": 2, "validation_sequences": 8},
        optim={"peak_lr": 1e-2, "warmup_steps": 1},
    )
    found = resolved(with_values(config, **sections))
    assert isinstance(found, recipe)
    return found


def trained(config: RunConfig, world_size: int = 1) -> dict[str, torch.Tensor]:
    """The trained tensors after a run on real processes."""
    run = Path(config.run.dir)
    folder = run.parent / f"{run.name}-ranks"
    folder.mkdir(parents=True, exist_ok=True)
    assert run_ranks(lambda rank: pretrain.pretrain(config), world_size, folder) == [0] * world_size
    newest = checkpoint.latest(run)
    assert newest is not None
    return checkpoint.open_checkpoint(newest).read_tensors("model.")


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    """The records of the run's steps, and of its validations."""
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def elsewhere(config: Recipe, to: Path, /, **sections: dict[str, Any]) -> Recipe:
    """The same run in another folder, with other values."""
    moved = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(to)))
    return with_values(moved, **sections)

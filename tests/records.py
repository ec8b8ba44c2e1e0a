"""Checkpoints made in a blink, and changes to their records by somebody who knows the format."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resume import checkpoint
from resume.saver import Saver


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A few small tensors, of several dtypes and ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(5, 3, generator=generator),
        "model.b": torch.randn(7, generator=generator).bfloat16(),
        "optim.a.step": torch.tensor(3.0),
    }


def save(
    run: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    config_toml: str = "",
    keep: int = 99,
) -> Path:
    """Publishes a checkpoint and returns its folder; every rank calls it."""
    saver = Saver(run, keep_last=keep)
    saver.start(step, tensors, record, config_toml)
    ended = saver.wait()
    assert ended is not None
    if ended.error is not None:
        raise ended.error
    return ended.folder


def rewrite(record: Path, change: Callable[[dict], object]) -> None:
    """Changes the table and makes its hash right again."""
    table = json.loads(record.read_text())
    del table["xxh3_128"]
    change(table)
    record.write_text(json.dumps({**table, "xxh3_128": checkpoint.hash_of(table)}))

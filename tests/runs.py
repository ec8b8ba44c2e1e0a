"""Tiny training runs on prepared test data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from train import ranks, setups
from train.assemble import open_data, open_run, starting_model
from train.config import RunConfig, with_values
from train.loop import Progress, Trainer
from train.signals import StopRequest
from train.watch import Watch

TINY = ModelConfig(vocab_size=300, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_size=6, ffn_size=40)


def tiny_run(data_folder: Path, run_folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Six steps of twelve samples of 32 tokens, with clipping always active."""
    base = with_values(
        RunConfig(model=TINY),
        run={"dir": str(run_folder), "num_steps": 6, "save_every": 3, "validate_every": 3, "keep_checkpoints": 9},
        data={
            "paths": (str(data_folder),),
            "sequence_length": 32,
            "batch_sequences": 12,
            "micro_batch_sequences": 2,
            "validation_sequences": 5,
        },
        optim={"peak_lr": 1e-2, "warmup_steps": 2, "max_grad_norm": 0.1},
        parallel={"device": "cpu"},
    )
    return with_values(base, **sections)


@contextlib.contextmanager
def opened(config: RunConfig) -> Iterator[tuple[Trainer, Progress]]:
    """A run as the loop gets it, in this process alone."""
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    this = ranks.start("cpu")
    watch = Watch(Path(config.run.dir), life="test", rank=0, world_size=1, timeout_s=config.run.hang_timeout_s)
    try:
        data = open_data(config)
        setups.prepare(config, data, this, lambda: starting_model(config, this), watch)
        with open_run(config, data, this, watch, StopRequest()) as (trainer, progress):
            yield trainer, progress
    finally:
        ranks.stop()

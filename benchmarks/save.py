"""How long training waits for a checkpoint, and how long the checkpoint takes: ours, in background and foreground.

    python -m benchmarks.save [--folder FOLDER]

One process. The state is that of a real optimizer step: weights and two moments, 12 bytes a parameter. Beside it, the
usual ways with the same tensors: torch.save and torch.distributed.checkpoint, with an fsync for a fair comparison, but
without hashes; and dcp.async_save. A save beside the training slows the steps meanwhile, so these are timed as well.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from benchmarks.environment import describe, device_name, write_result
from benchmarks.step import make_trainer, random_batch
from benchmarks.table import Table
from model.config import ModelConfig
from model.flops import num_params
from resume.saver import Saver
from train import ranks
from train.config import DataSection, RunConfig
from train.loop import Counts, train_step
from train.optim import state_tensors

COMMAND = "python -m benchmarks.save"
_REPEATS = 5
_STEPS = 12

Save = Callable[[Path], Callable[[], None]]
"""Begins to save into a folder; returns what waits for the end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints two tables, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    options = parser.parse_args(argv)
    this = ranks.start("auto")
    folder = Path(tempfile.mkdtemp(prefix="bessemer-save-", dir=options.folder))
    try:
        tables = _measure(_config(this.device), this, folder)
    finally:
        ranks.stop()
        shutil.rmtree(folder)
    print(f"{device_name()}  torch {describe()['torch']}")
    for table in tables:
        table.print()
    rows = [record for table in tables for record in table.records()]
    print(f"\nwrote {write_result('save', COMMAND, rows, note=tables[0].note)}")
    return 0


def _config(device: torch.device) -> RunConfig:
    if device.type == "cuda":
        data = DataSection(sequence_length=2048, batch_sequences=8, micro_batch_sequences=8)
        return RunConfig(model=ModelConfig.preset("tinyllama-1.1b"), data=data)
    model = ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, head_size=64, ffn_size=1536
    )
    return RunConfig(model=model, data=DataSection(sequence_length=128, batch_sequences=4, micro_batch_sequences=4))


def _measure(config: RunConfig, this: ranks.Ranks, folder: Path) -> list[Table]:
    trainer = make_trainer(config, this)
    batch = random_batch(config)

    def step() -> float:
        started_s = time.perf_counter()
        train_step(trainer, [batch], Counts.of([batch]), 1e-4, 1)
        return time.perf_counter() - started_s

    for _ in range(3):
        step()
    tensors = state_tensors(trainer.model, trainer.optimizer)
    size_gb = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9
    alone_s = [step() for _ in range(_STEPS)]
    step_s = statistics.median(alone_s)
    rows: list[list[str | float | None]] = []
    for name, save in _ways(tensors).items():
        stalls_s, saves_s = [], []
        for _ in range(_REPEATS):
            target = folder / "checkpoint"
            started_s = time.perf_counter()
            wait = save(target)
            stalls_s.append(time.perf_counter() - started_s)
            wait()
            saves_s.append(time.perf_counter() - started_s)
            shutil.rmtree(target)
        stall_s, save_s = statistics.median(stalls_s[1:]), statistics.median(saves_s[1:])
        rows.append([name, 1e3 * stall_s, stall_s / step_s, 1e3 * save_s, size_gb / save_s])
    beside_s = list(_steps_after_a_save(step, tensors, folder))
    params = num_params(config.model)
    note = (
        f"{params:,} parameters, {size_gb:.3f} GB; a step takes {1e3 * step_s:.0f} ms; median of {_REPEATS - 1} saves"
    )
    columns = ["save", "training waits, ms", "in steps", "until it is safe, ms", "GB/s"]
    steps = Table(
        "Steps while a checkpoint is written in the background",
        ["steps", "median ms"],
        [["alone", 1e3 * step_s], ["with a save that begins when the step does", 1e3 * statistics.median(beside_s)]],
    )
    return [Table("How long training waits for a checkpoint", columns, rows, note), steps]


def _ways(tensors: Mapping[str, Tensor]) -> dict[str, Save]:
    background = _Ours(tensors, in_background=True)
    foreground = _Ours(tensors, in_background=False)
    return {
        "ours, in the background": background,
        "ours, in the foreground": foreground,
        "torch.save, fsync, no hashes": lambda folder: _torch_save(folder, tensors),
        "dcp.save, fsync, no hashes": lambda folder: _dcp_save(folder, tensors),
        "dcp.async_save, fsync, no hashes": _DcpAsync(tensors),
    }


class _Ours:
    """The trainer's saver, with the same buffers from save to save."""

    def __init__(self, tensors: Mapping[str, Tensor], in_background: bool):
        self._tensors, self._in_background = tensors, in_background
        self._saver: Saver | None = None

    def __call__(self, folder: Path) -> Callable[[], None]:
        if self._saver is None:
            self._saver = Saver(folder, in_background=self._in_background)
        saver = self._saver
        saver.start(1, self._tensors, {}, "")

        def wait() -> None:
            ended = saver.wait()
            if ended is None or ended.error is not None:
                raise RuntimeError(f"the save failed: {ended}")

        return wait


class _DcpAsync:
    """torch's way beside the training, on a gloo group of its own, as it has to be."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        self._group: Any = dist.new_group(backend="gloo")

    def __call__(self, folder: Path) -> Callable[[], None]:
        writer = FileSystemWriter(folder, sync_files=True)
        future: Any = dcp.async_save(self._tensors, storage_writer=writer, process_group=self._group)

        def wait() -> None:
            future.result()

        return wait


def _torch_save(folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    folder.mkdir(parents=True)
    with (folder / "state.pt").open("wb") as file:
        torch.save(dict(tensors), file)
        file.flush()
        os.fsync(file.fileno())
    return lambda: None


def _dcp_save(folder: Path, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))
    return lambda: None


def _steps_after_a_save(step: Callable[[], float], tensors: Mapping[str, Tensor], folder: Path) -> Iterator[float]:
    """Times of steps that begin when a checkpoint begins to be written."""
    saver = Saver(folder / "beside", in_background=True)
    for number in range(_STEPS):
        saver.start(number, tensors, {}, "")
        yield step()
        ended = saver.wait()
        if ended is None or ended.error is not None:
            raise RuntimeError(f"the save failed: {ended}")


if __name__ == "__main__":
    sys.exit(main())

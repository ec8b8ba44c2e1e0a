"""Our rows of the step benchmark: the real loop on real shards, all but the writing of checkpoints."""

import contextlib
import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import restore_attention
from benchmarks.step_data import Corpus
from benchmarks.step_rounds import Block
from benchmarks.step_state import DeviceMemory, InitialValues
from data_prep.config_file import to_toml
from evaluation.report import read_metrics
from kernels import launch
from kernels.attention import attention_by
from resume.regions import copy_whole, local_part
from resume.saver import Saved, Saver
from train.config import RunConfig, with_values
from train.faults import Faults
from train.feed import Feed
from train.guard import Guard
from train.loader import MicroBatch
from train.loop import Progress, Trainer, train
from train.metrics import RunLog
from train.optim import state_tensors
from train.sharding import reshard

KERNELS_OFF = {
    "rms_norm": "torch",
    "rope": "torch",
    "swiglu": "torch",
    "cross_entropy": "torch",
    "linear_cross_entropy": "whole",
    "moe": "loop",
}
"""Values of the config's section `kernels` with which none of ours runs. Attention is torch's in any case."""


class Ours:
    """A trainer, shared by rows that differ in their micro-batches, their data or the chosen kernels alone."""

    def __init__(self, make: Callable[[], Trainer], values: InitialValues, device: torch.device):
        """`make` builds the trainer, without data, when it is first needed."""
        self._make, self._values, self.device = make, values, device
        self._trainer: Trainer | None = None
        self._memory = DeviceMemory()

    def restarted(self) -> Trainer:
        """The trainer as it was before its first step."""
        if self._trainer is None:
            self._trainer = self._make()
        self._memory.take()
        for name, tensor in _local_tensors(self._trainer).items():
            if name.startswith("optim."):
                tensor.zero_()
        for name, parameter in self._trainer.model.named_parameters():
            copy_whole(parameter, self._values[name])
        return self._trainer

    def rest(self) -> None:
        """Gives back the memory of weights and moments."""
        if self._trainer is not None:
            self._trainer.optimizer.zero_grad(set_to_none=True)
            reshard(self._trainer.model)
            self._memory.give_back(_local_tensors(self._trainer).values())

    def drop(self) -> None:
        """Forgets the trainer: an error may have left it in the middle of a step."""
        try:
            self.rest()
        finally:
            self._trainer, self._memory = None, DeviceMemory()


class OursRunner:
    """Runs `train.loop.train` for a few steps, from the opening of its data to the last line of its log."""

    def __init__(self, ours: Ours, config: RunConfig, corpus: Corpus, *, reads_once: bool = False):
        """With `reads_once`, one step's data is trained again and again."""
        self._ours, self._config, self._corpus = ours, config, corpus
        self._feed_type = _ReadOnce if reads_once else Feed

    def block(self, num_untimed: int, num_spans: int, span_steps: int) -> Block:
        """A run of its own, of so many steps."""
        run = Path(self._config.run.dir)
        run.mkdir(parents=True, exist_ok=True)
        config = with_values(self._config, run={"num_steps": num_untimed + num_spans * span_steps})
        with contextlib.ExitStack() as stack:
            stack.enter_context(_implementations(config, self._ours.device))
            trainer = self._ours.restarted()
            marks = _Marks(run, num_untimed + 1, span_steps, self._ours.device)
            trainer.config, trainer.guard = config, Guard(config.guard)
            trainer.faults, trainer.saver = marks, _NoSaver(run)
            reset_peak(self._ours.device)
            feed = self._feed_type(
                config, trainer.ranks, self._corpus.fresh_state(config), None, self._corpus.files, []
            )
            stack.callback(feed.close)
            feed.open()
            trainer.feed, trainer.log = feed, RunLog(run, 0, to_toml(config))
            stack.callback(trainer.log.close)
            # The lines are written, but nobody wants to read all of them.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
            train(trainer, Progress(0, feed.state))
            marks.mark()
        losses = {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}
        return Block(
            span_s=[(end - start) / span_steps for start, end in itertools.pairwise(marks.times_s)],
            losses={step: math.nan if loss is None else loss for step, loss in losses.items()},
            peak_bytes=peak_bytes(self._ours.device),
        )

    def rest(self) -> None:
        """Gives back the memory of weights and moments."""
        self._ours.rest()

    def drop(self) -> None:
        """Forgets the trainer; a row that shares it builds another."""
        self._ours.drop()


@contextlib.contextmanager
def _implementations(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Chooses kernels and attention as a run does, and leaves no trace for the rows that are not ours."""
    launch.choose(dataclasses.asdict(config.kernels))
    try:
        with attention_by(config.kernels.attention, device):
            yield
    finally:
        launch.choose({})
        restore_attention()


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begins to measure the peak of a device's memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that all tensors on a device took together since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class _Marks(Faults):
    """Takes the time before some of the steps, where a run may have faults injected."""

    def __init__(self, run: Path, first_step: int, every: int, device: torch.device):
        super().__init__(run, (), rank=0)
        self._first, self._every, self._device = first_step, every, device
        self.times_s: list[float] = []

    def before_step(self, step: int) -> None:
        """Takes the time if a span begins with this step."""
        if step >= self._first and (step - self._first) % self._every == 0:
            self.mark()

    def mark(self) -> None:
        """Takes the time when everything is done that has been asked for."""
        wait_for(self._device)
        self.times_s.append(time.perf_counter())


class _NoSaver(Saver):
    """The state is collected as at any checkpoint, and not written."""

    def start(
        self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], config_toml: str
    ) -> Saved | None:
        """Writes nothing."""
        return None


class _ReadOnce(Feed):
    """A feed that reads one step, and gives it again and again."""

    _first: list[MicroBatch] | None = None

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the first step."""
        if self._first is None:
            self._first = super().next_step()
        return self._first


def _local_tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {name: local_part(t) for name, t in state_tensors(trainer.model, trainer.optimizer).items()}

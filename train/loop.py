"""The one training loop: every kind of training is this loop with another objective and other data."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from data_prep.config_file import to_toml
from evaluation.score import Score
from model.batch import Batch
from model.flops import flops_per_token, mfu
from resume import checkpoint, rng
from resume.manifest import DataError
from resume.state import DataState
from train.config import RunConfig
from train.feed import Feed
from train.metrics import RunLog, StepRecord, memory_gib
from train.optim import clip_factor, scale_gradients, set_learning_rate, squared_grad_norm, state_tensors
from train.ranks import Ranks, device_name
from train.schedule import learning_rate
from train.sharding import reshard, sync_gradients
from train.signals import StopRequest


class HostBatch(Protocol):
    """A micro-batch before it is on the device."""

    @property
    def num_targets(self) -> int:
        """Targets of all its rows."""
        ...

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        ...


Objective = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> the sum of a loss over the batch's targets."""


class NotFiniteError(ValueError):
    """Too many consecutive steps had a NaN or infinite loss or gradient."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done: committed optimizer steps, and the cursor in its data. A step is counted when it commits."""

    step: int
    data: DataState


@dataclasses.dataclass(kw_only=True, slots=True)
class Trainer:
    """The parts of a run, as the loop uses them.

    `log` is None on all ranks but the first, `validate` where nothing is held out; a validation's sums are this rank's.
    """

    config: RunConfig
    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    objective: Objective
    validate: Callable[[], Score] | None
    log: RunLog | None
    stop: StopRequest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one step did, the same on every rank."""

    loss_mean: float
    grad_norm: float
    num_targets: int
    is_finite: bool
    stop_requested: bool


def train(trainer: Trainer, progress: Progress) -> Progress:
    """Trains from `progress` to the end of the run, or until told to stop; saves and validates on the way.

    Raises:
        NotFiniteError: run.max_nonfinite_steps steps in a row could not be applied.
    """
    run = trainer.config.run
    stop_requested, num_not_finite, saved_step = False, 0, progress.step
    if progress.step == 0:
        _validate(trainer, progress)
    while progress.step < run.num_steps and not stop_requested:
        started_s = time.perf_counter()
        rng.seed_step(run.seed, progress.step)
        rate = learning_rate(trainer.config.optim, progress.step, run.num_steps)
        micro_batches = trainer.feed.next_step()
        if not micro_batches:
            _end_of_data(trainer, progress, is_saved=saved_step == progress.step)
            break
        outcome = train_step(trainer, micro_batches, rate)
        # The cursor moves here and nowhere else: read-ahead that no step has committed is read again after a resume.
        trained = outcome.num_targets if outcome.is_finite else 0
        progress = Progress(progress.step + 1, trainer.feed.advanced(progress.data, trained))
        trainer.feed.book(micro_batches, progress.step)
        _log_step(trainer, progress, outcome, rate, time.perf_counter() - started_s)
        num_not_finite = 0 if outcome.is_finite else num_not_finite + 1
        if num_not_finite >= run.max_nonfinite_steps:
            raise _not_finite(trainer, progress, num_not_finite)
        stop_requested = outcome.stop_requested
        is_last = progress.step == run.num_steps
        if is_last or progress.step % run.validate_every == 0:
            _validate(trainer, progress)
        if is_last or stop_requested or progress.step % run.save_every == 0:
            progress = Progress(progress.step, trainer.feed.take_up(progress.data))
            save(trainer, progress)
            saved_step = progress.step
        log_notes(trainer)
    return progress


def train_step(trainer: Trainer, micro_batches: Sequence[HostBatch], rate: float) -> StepOutcome:
    """One optimizer step over this rank's micro-batches.

    Losses and gradients are sums over all ranks and micro-batches, divided once by the global number of targets. A step
    whose loss or gradient is not finite leaves parameters and moments as they were, on every rank.
    """
    model, ranks = trainer.model, trainer.ranks
    num_targets = ranks.sum_int(sum(batch.num_targets for batch in micro_batches))
    divisor = max(1, num_targets)  # a step may have no targets, if all its samples are quarantined
    loss_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for i, batch in enumerate(micro_batches):
        sync_gradients(model, is_last=i == len(micro_batches) - 1)
        micro_loss_sum = trainer.objective(model, batch.to(ranks.device))
        (micro_loss_sum / divisor).backward()
        loss_sum += micro_loss_sum.detach()
    # One collective and one wait for the device per step: loss, gradient norm, and whether anyone was told to stop.
    total_loss, squared_norm, num_stops = ranks.sum_all(
        [loss_sum, squared_grad_norm(model, ranks.rank), float(trainer.stop.is_set)]
    )
    grad_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
    is_finite = math.isfinite(total_loss) and math.isfinite(grad_norm)
    if is_finite and num_targets:
        factor = clip_factor(grad_norm, trainer.config.optim.max_grad_norm)
        if factor < 1.0:
            scale_gradients(model, factor)
        set_learning_rate(trainer.optimizer, rate)
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepOutcome(
        loss_mean=total_loss / divisor,
        grad_norm=grad_norm,
        num_targets=num_targets,
        is_finite=is_finite,
        stop_requested=num_stops > 0,
    )


def save(trainer: Trainer, progress: Progress) -> Path:
    """Publishes a checkpoint of everything the run needs to go on exactly; every rank calls it."""
    config = trainer.config
    folder = checkpoint.save(
        Path(config.run.dir),
        progress.step,
        state_tensors(trainer.model, trainer.optimizer),
        {"data": progress.data.to_json(), "trained": trainer.feed.books(), "rng": rng.record(config.run.seed)},
        to_toml(config),
        config.run.keep_checkpoints,
    )
    if trainer.log is not None:
        trainer.log.note(f"saved {folder}")
    return folder


def load(trainer: Trainer, folder: Path) -> None:
    """Fills model and optimizer from a checkpoint; every rank calls it."""
    checkpoint.load_into(folder, state_tensors(trainer.model, trainer.optimizer))


def log_notes(trainer: Trainer) -> None:
    """Logs what the feed noticed."""
    for note in trainer.feed.notes:
        if trainer.log is not None:
            trainer.log.note(note)


def _end_of_data(trainer: Trainer, progress: Progress, is_saved: bool) -> None:
    """Validates and saves what can be trained when every source has given all it may."""
    run = trainer.config.run
    if progress.step % run.validate_every:
        _validate(trainer, progress)
    if not is_saved:
        save(trainer, progress)
    message = (
        f"the data ends after step {progress.step} of {run.num_steps}: data.max_epochs is reached. Append data with "
        f"`python -m resume append {run.dir} FOLDER` and start the run again"
    )
    if trainer.config.data.when_exhausted == "error":
        raise DataError(message)
    if trainer.log is not None:
        trainer.log.note(message)


def _validate(trainer: Trainer, progress: Progress) -> None:
    if trainer.validate is None:
        return
    mine = trainer.validate()
    reshard(trainer.model)
    score = Score(*trainer.ranks.sum_all([mine.loss_sum, mine.num_targets, mine.num_bytes]))
    if trainer.log is not None:
        trainer.log.validation(progress.step, score.loss_mean, score.perplexity, score.bits_per_byte)


def _log_step(trainer: Trainer, progress: Progress, outcome: StepOutcome, rate: float, step_s: float) -> None:
    if trainer.log is None:
        return
    config, ranks = trainer.config, trainer.ranks
    speed = outcome.num_targets / step_s / ranks.world_size
    flops = flops_per_token(config.model, config.data.sequence_length)
    record = StepRecord(
        step=progress.step,
        loss=outcome.loss_mean,
        learning_rate=rate,
        grad_norm=outcome.grad_norm,
        tokens_per_s_per_device=speed,
        mfu=mfu(speed, flops, device_name(ranks.device)),
        memory_gib=memory_gib(ranks.device),
        step_s=step_s,
        tokens_seen=progress.data.tokens_seen,
        epoch=max(trainer.feed.order.progress(progress.data.position).values()),
        skipped=not outcome.is_finite,
    )
    trainer.log.step(record, config.run.num_steps)


def _not_finite(trainer: Trainer, progress: Progress, num_not_finite: int) -> NotFiniteError:
    newest = checkpoint.latest(Path(trainer.config.run.dir))
    return NotFiniteError(
        f"loss or gradient was not finite in {num_not_finite} steps in a row, up to step {progress.step}; none of them "
        f"changed the weights. The newest checkpoint is {newest.name if newest else 'none'}: lower --optim.peak-lr "
        f"or --optim.max-grad-norm (with --run.allow-changes) and resume"
    )

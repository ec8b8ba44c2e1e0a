"""The one training loop: every kind of training is this loop with another objective and other data."""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from data_prep.config_file import to_toml
from kernels.cross_entropy import IGNORE
from model.balance import RoutingLog, apply_counts, set_load
from model.batch import Batch
from model.flops import flops_per_token, mfu
from resume import requests, rng
from resume.checkpoint import SaveError
from resume.manifest import DataError
from resume.saver import Saved, Saver
from resume.state import DataState
from train.config import RunConfig
from train.experts import StepRouting, expert_record, keeps_books
from train.faults import Faults
from train.feed import Feed
from train.guard import Guard, Verdict
from train.loader import MicroBatch
from train.metrics import RunLog, StepRecord, memory_gib, named
from train.objectives import Objective, Outcome
from train.optim import clip_factor, scale_gradients, set_learning_rate, squared_grad_norm, state_tensors
from train.patience import Patience
from train.ranks import Ranks, device_name
from train.sharding import reshard, sync_gradients
from train.signals import StopRequest
from train.stages import Stage, describe, portions_at, rate_at, stage_at
from train.watch import Watch

# Steps between collections of reference cycles.
_COLLECT_EVERY = 100
# Steps between records of every expert's load, which are long.
_LOADS_EVERY = 10


class HostBatch(Protocol):
    """A micro-batch before it is on the device."""

    @property
    def num_tokens(self) -> int:
        """Inputs that are computed."""
        ...

    @property
    def num_targets(self) -> int:
        """Targets of all its rows."""
        ...

    @property
    def num_units(self) -> int:
        """What the loss sum is divided by: its targets, or its pairs of answers."""
        ...

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        ...


class Counts(NamedTuple):
    """What all ranks' micro-batches of a step hold; see HostBatch."""

    num_tokens: int
    num_targets: int
    num_units: int

    @classmethod
    def of(cls, micro_batches: Sequence[HostBatch]) -> "Counts":
        """Of one rank's micro-batches."""
        return cls(*(sum(getattr(batch, name) for batch in micro_batches) for name in cls._fields))


class Validation(Protocol):
    """Judges the model on what is held out."""

    def sums(self) -> list[float]:
        """Over this rank's share; they add up over ranks."""
        ...

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """What the sums over all ranks say, "loss" first, by the name under which it is logged."""
        ...


class NotFiniteError(ValueError):
    """The guard says that the run must not go on by itself."""


class RollBackError(Exception):
    """The run goes back to its newest checkpoint and leaves out the data from there to `step`."""

    def __init__(self, step: int, cause: str):
        super().__init__(cause)
        self.step = step


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a run has done: committed optimizer steps, and the cursor in its data. A step is counted when it commits."""

    step: int
    data: DataState


@dataclasses.dataclass(kw_only=True, slots=True)
class Trainer:
    """The parts of a run, as the loop uses them.

    `log` is None on all ranks but the first, `validation` where nothing is held out.
    """

    config: RunConfig
    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    objective_at: Callable[[int], Objective]
    """What a step, from 0, minimises."""
    validation: Validation | None
    log: RunLog | None
    stop: StopRequest
    saver: Saver
    guard: Guard
    patience: Patience
    watch: Watch
    faults: Faults
    num_failed_saves: int = 0
    """In a row, as far as this rank knows; after a wait for the saver all ranks know the same."""
    save_error: SaveError | None = None
    """Of the newest save that has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one step did, the same on every rank."""

    loss_mean: float
    means: dict[str, float]
    """Of what else the objective sums, over the units of the step."""
    grad_norm: float
    counts: Counts
    verdict: Verdict
    stop_requested: bool
    routing: StepRouting | None
    """Of a model with experts: what its routers did."""


@contextlib.contextmanager
def _garbage_collected_between_steps() -> Iterator[None]:
    """Python's own collections come at any allocation, on another rank at another time, and all wait for that rank."""
    gc.collect()
    gc.freeze()  # what a run has made by now lives as long as it: no collection need look at it again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@_garbage_collected_between_steps()
def train(trainer: Trainer, progress: Progress) -> Progress:
    """Trains from `progress` to the end of the run, or until told to stop; saves and validates on the way.

    Raises:
        RollBackError: the guard wants to go back, and there is a checkpoint to go back to.
        NotFiniteError: the guard says stop, or may not roll back once more.
        SaveError: run.max_failed_saves saves in a row failed, or the last one did.
        DataError, ShardError: a rank cannot read; what was trained until then is saved.
    """
    run = trainer.config.run
    stop_requested, wants_save, saved_step, stage = False, False, progress.step, None
    if progress.step == 0:
        _validate(trainer, progress)
    while progress.step < run.num_steps:
        if (stop_requested or trainer.patience.is_over) and trainer.feed.is_between_rollouts:
            break
        started_s = time.perf_counter()
        trainer.watch.at("data", progress.step + 1)
        progress, stage = _enter_stage(trainer, progress, stage, is_saved=saved_step == progress.step)
        trainer.faults.before_step(progress.step + 1)
        if trainer.faults.is_corrupt(progress.step + 1):
            trainer.feed.spoil_next()
        rng.seed_step(run.seed, progress.step)
        rate = rate_at(trainer.config, progress.step)
        micro_batches, counts = _read(trainer, progress, is_saved=saved_step == progress.step)
        if not micro_batches:
            progress = _take_up(trainer, progress, is_saved=saved_step == progress.step)
            if not trainer.feed.has_ended:
                continue  # what was appended meanwhile
            _end_of_data(trainer, progress, is_saved=saved_step == progress.step)
            break
        outcome = train_step(trainer, micro_batches, counts, rate, progress.step + 1)
        # The cursor moves here and nowhere else: read-ahead that no step has committed is read again after a resume.
        trained, first_sample = (
            counts.num_targets if outcome.verdict.action == "apply" else 0,
            progress.data.first_sample,
        )
        progress = Progress(progress.step + 1, trainer.feed.advanced(progress.data, trained))
        trainer.feed.book(micro_batches, progress.step, outcome.verdict.action == "apply")
        _log_step(trainer, progress, outcome, rate, time.perf_counter() - started_s, stage)
        _obey(trainer, progress, outcome.verdict, range(first_sample, progress.data.first_sample))
        stop_requested = outcome.stop_requested
        is_last = progress.step == run.num_steps
        is_best = False
        if is_last or progress.step % run.validate_every == 0:
            is_best = _validate(trainer, progress)
            is_last |= trainer.patience.is_over
        wants_save |= is_best or is_last or stop_requested or progress.step % run.save_every == 0
        if wants_save and trainer.feed.is_between_rollouts:
            wants_save = False
            progress = _take_up(trainer, progress, is_saved=False)
            save(trainer, progress, outcome.loss_mean)
            saved_step = progress.step
        _note_saved(trainer, trainer.saver.finished())
        if progress.step % _COLLECT_EVERY == 0:
            gc.collect()
    finish_save(trainer)
    return progress


def train_step(
    trainer: Trainer, micro_batches: Sequence[HostBatch], counts: Counts, rate: float, step: int
) -> StepOutcome:
    """One optimizer step over this rank's micro-batches, which all ranks count: the run's step-th, from 1.

    Losses and gradients are sums over all ranks and micro-batches, divided once by the global number of units. A step
    that the guard does not let pass leaves parameters and moments as they were, on every rank.
    """
    model, ranks = trainer.model, trainer.ranks
    num_units = max(1, counts.num_units)  # a step may have none, if all its samples are quarantined
    routing = StepRouting.none(trainer.config.model, ranks.device) if keeps_books(trainer.config.model) else None
    if routing is not None and trainer.config.model.moe.balance == "switch":
        _count_picks(trainer, micro_batches, step)
    outcome = accumulate_gradients(trainer, micro_batches, counts, step, routing)
    trainer.watch.at("reduce", step)
    # One collective and one wait for the device per step: loss, gradient norm, whether anyone was told to stop, and
    # what the routers did.
    total_loss, squared_norm, num_stops, *others = ranks.sum_all(
        [
            outcome.loss_sum,
            squared_grad_norm(model, ranks.rank),
            float(trainer.stop.is_set),
            *outcome.sums.values(),
            *(routing.tensors() if routing is not None else ()),
        ]
    )
    means = {name: others.pop(0) / num_units for name in outcome.sums}
    routing = routing.from_numbers(others) if routing is not None else None
    grad_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
    verdict = (
        trainer.guard.judge(total_loss / num_units, grad_norm) if counts.num_units else Verdict("skip", "no targets")
    )
    if verdict.action == "apply":
        factor = clip_factor(grad_norm, trainer.config.optim.max_grad_norm)
        if factor < 1.0:
            scale_gradients(model, factor)
        set_learning_rate(trainer.optimizer, rate)
        trainer.optimizer.step()
        if routing is not None:
            apply_counts(model, routing.counts)
    trainer.optimizer.zero_grad(set_to_none=True)
    return StepOutcome(
        loss_mean=total_loss / num_units,
        means=means,
        grad_norm=grad_norm,
        counts=counts,
        verdict=verdict,
        stop_requested=num_stops > 0,
        routing=routing,
    )


def accumulate_gradients(
    trainer: Trainer,
    micro_batches: Sequence[HostBatch],
    counts: Counts,
    step: int,
    routing: StepRouting | None = None,
) -> Outcome:
    """Adds the gradients of losses / units to the model's and returns this rank's sums, on the device.

    With `routing`, what the routers do is added to it, and their penalties, means over targets, to the loss of each
    micro-batch, though not to the sum that is returned. Nothing in here waits for the device, so that it always has the
    next kernels queued.
    """
    model, device = trainer.model, trainer.ranks.device
    num_units, num_targets = max(1, counts.num_units), max(1, counts.num_targets)
    totals: dict[str, Tensor] = {}
    objective = trainer.objective_at(step - 1)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for i, batch in enumerate(micro_batches):
        trainer.watch.at("forward", step)
        sync_gradients(model, is_last=i == len(micro_batches) - 1)
        on_device = batch.to(device)
        log = _routing_log(trainer, on_device, step) if routing is not None else None
        outcome = objective(model, on_device, log)
        micro_loss_sum = trainer.faults.on_loss(outcome.loss_sum, step)
        penalty = log.penalty_sum / num_targets if log is not None else 0.0
        (micro_loss_sum / num_units + penalty).backward()
        loss_sum += micro_loss_sum.detach()
        for name, value in outcome.sums.items():
            totals[name] = totals[name] + value.double() if name in totals else value.double()
        if routing is not None and log is not None:
            routing.add_(log)
    return Outcome(loss_sum, totals)


def _routing_log(trainer: Trainer, batch: Batch, step: int) -> RoutingLog:
    """A log that counts tokens with a target: others may be there on one number of ranks and not on another."""
    is_sampling = trainer.config.model.moe.sampling
    noise_seed = rng.step_seed(trainer.config.run.seed, step) if is_sampling else None
    return RoutingLog(batch.targets != IGNORE, noise_seed)


@torch.no_grad()
def _count_picks(trainer: Trainer, micro_batches: Sequence[HostBatch], step: int) -> None:
    """Tells the routers the load of the whole step, by a forward more over all its micro-batches."""
    model, ranks = trainer.model, trainer.ranks
    counted = StepRouting.none(trainer.config.model, ranks.device)
    for host_batch in micro_batches:
        trainer.watch.at("forward", step)
        batch = host_batch.to(ranks.device)
        log = _routing_log(trainer, batch, step)
        model(batch.tokens, batch.boundaries, routing=log, readout=lambda hidden_BTD, _: hidden_BTD.new_zeros(()))
        counted.add_(log)
    reshard(model)
    trainer.watch.at("reduce", step)
    set_load(model, counted.from_numbers(ranks.sum_all(counted.tensors())).counts)


def save(trainer: Trainer, progress: Progress, loss: float | None = None) -> None:
    """Begins to save everything that the run needs to go on exactly; every rank calls it.

    Raises:
        SaveError: run.max_failed_saves saves before it failed.
    """
    trainer.watch.at("save", progress.step)
    # Every rank waits here for the save before this one, so that all count the same failures.
    _note_saved(trainer, trainer.saver.wait())
    _refuse_failed_saves(trainer)
    config, data = trainer.config, progress.data.to_json()
    record = {
        "loss": loss if loss is not None and math.isfinite(loss) else None,
        "data": data,
        "trained": trainer.feed.books(),
        "guard": trainer.guard.to_json(),
        "patience": trainer.patience.to_json(),
        "rng": rng.record(config.run.seed),
    }
    tensors = state_tensors(trainer.model, trainer.optimizer)
    trainer.saver.start(progress.step, tensors, record, to_toml(config))


def finish_save(trainer: Trainer) -> None:
    """Waits until what was begun to be saved is; every rank calls it.

    Raises:
        SaveError: it could not be saved.
    """
    trainer.watch.at("save", trainer.watch.step)
    _note_saved(trainer, trainer.saver.wait())
    if trainer.save_error is not None:
        raise trainer.save_error


def log_notes(trainer: Trainer) -> None:
    """Logs what the feed noticed."""
    for note in trainer.feed.notes:
        if trainer.log is not None:
            trainer.log.note(note)


def _read(trainer: Trainer, progress: Progress, is_saved: bool) -> tuple[list[MicroBatch], Counts]:
    """This rank's micro-batches of the next step, and what all ranks' hold.

    If a rank cannot read, all save what they have and raise its error.
    """
    micro_batches: list[MicroBatch] = []
    error: Exception | None = None
    try:
        _refuse_failed_saves(trainer)  # here, because the ranks hear of a failure at different steps
        micro_batches = trainer.feed.next_step()
    except (ValueError, OSError) as caught:
        error = caught
    trainer.watch.at("agree", progress.step + 1)
    num_failed, *totals = trainer.ranks.sum_ints(int(error is not None), *Counts.of(micro_batches))
    if num_failed:
        _save_all(trainer, progress, is_saved)
        trainer.watch.at("agree", progress.step + 1)
        trainer.ranks.raise_first(error)
    return micro_batches, Counts(*totals)


def _take_up(trainer: Trainer, progress: Progress, is_saved: bool) -> Progress:
    """Progress after the requests that wait."""
    return _reading_on(trainer, progress, lambda: trainer.feed.take_up(progress.data), is_saved)


def _enter_stage(
    trainer: Trainer, progress: Progress, last: Stage | None, is_saved: bool
) -> tuple[Progress, Stage | None]:
    """Progress with samples as long as the stage of the next step wants them, and that stage.

    It asks nothing but the number of the step, so that a run that is resumed at a boundary does there what another did.
    """
    config = trainer.config
    stage = stage_at(config, progress.step)
    if stage is None or stage == last:
        return progress, stage
    if trainer.log is not None:
        trainer.log.note(f"stage {stage.number} of {len(config.stage)}: {describe(config, stage)}")
    if stage.first_step == progress.step:
        trainer.guard.forget()
    portions, batch = portions_at(config, progress.step), progress.data.batch
    if portions != (batch.sequence_length, batch.batch_sequences):
        progress = _reading_on(
            trainer, progress, lambda: trainer.feed.take_portions(progress.data, *portions), is_saved
        )
    return progress, stage


def _reading_on(trainer: Trainer, progress: Progress, change: Callable[[], DataState], is_saved: bool) -> Progress:
    """Progress after a change of the data; if a rank cannot read on then, as if it could not read a step."""
    try:
        return Progress(progress.step, trainer.ranks.together(change))
    except (ValueError, OSError):
        _save_all(trainer, progress, is_saved)
        raise


def _save_all(trainer: Trainer, progress: Progress, is_saved: bool) -> None:
    """Saves what there is before the run ends."""
    if not is_saved:
        save(trainer, progress)
    finish_save(trainer)


def _obey(trainer: Trainer, progress: Progress, verdict: Verdict, samples: range) -> None:
    """Says what the guard found in a step that read these positions; rolls back or stops if it says so."""
    if verdict.cause is None:
        return
    run, cause = trainer.config.run, f"step {progress.step}: {verdict.cause}; {named(samples)}"
    if trainer.log is not None:
        trainer.log.event(progress.step, verdict.action, verdict.cause, samples)
    if verdict.action in ("rollback", "stop"):
        # The newest checkpoint may still be on its way.
        trainer.watch.at("save", progress.step)
        _note_saved(trainer, trainer.saver.wait())
        _refuse_failed_saves(trainer)
    if verdict.action == "stop":
        raise NotFiniteError(f"{cause}. The guard is told to stop (guard.on_nonfinite, guard.on_spike)")
    if verdict.action == "rollback":
        num_rollbacks = trainer.ranks.from_first(lambda: requests.num_rollbacks(Path(run.dir)))
        if num_rollbacks >= trainer.config.guard.max_rollbacks:
            raise NotFiniteError(
                f"{cause}. The run has rolled back {num_rollbacks} times (guard.max_rollbacks): lower --optim.peak-lr "
                "or --optim.max-grad-norm (with --run.allow-changes), or look at the data, and start it again"
            )
        raise RollBackError(progress.step, cause)


def _note_saved(trainer: Trainer, saved: Saved | None) -> None:
    """Logs and counts how a save ended."""
    if saved is None:
        return
    trainer.save_error = saved.error
    trainer.num_failed_saves = trainer.num_failed_saves + 1 if saved.error is not None else 0
    if trainer.log is not None:
        trainer.log.saved(saved)
    # What was taken up counts once it is saved.
    log_notes(trainer)


def _refuse_failed_saves(trainer: Trainer) -> None:
    """Ends the run if too many saves in a row have failed."""
    if trainer.save_error is not None and trainer.num_failed_saves >= trainer.config.run.max_failed_saves:
        raise trainer.save_error


def _end_of_data(trainer: Trainer, progress: Progress, is_saved: bool) -> None:
    """Validates and saves what can be trained when every source has given all it may."""
    run = trainer.config.run
    if progress.step % run.validate_every:
        _validate(trainer, progress)
    _save_all(trainer, progress, is_saved)
    message = (
        f"the data ends after step {progress.step} of {run.num_steps}: data.max_epochs is reached. Append data with "
        f"`python -m resume append {run.dir} FOLDER` and start the run again"
    )
    if trainer.config.data.when_exhausted == "error":
        raise DataError(message)
    if trainer.log is not None:
        trainer.log.note(message)


def _validate(trainer: Trainer, progress: Progress) -> bool:
    """Judges and logs; whether the run waits for its best checkpoint, and this is the best so far."""
    if trainer.validation is None:
        return False
    trainer.watch.at("validate", progress.step)
    mine = trainer.validation.sums()
    reshard(trainer.model)
    figures = trainer.validation.figures(trainer.ranks.sum_all(mine))
    if trainer.log is not None:
        trainer.log.validation(progress.step, figures)
    is_best = trainer.patience.judge(progress.step, figures["loss"])
    trainer.saver.protected = trainer.patience.best_steps
    if trainer.patience.is_over and trainer.log is not None:
        trainer.log.note(
            f"no lower held-out loss for {trainer.patience.num_worse} validations: the run ends. The best was at step "
            f"{trainer.patience.best_step}, whose checkpoint is kept"
        )
    return is_best


def _expert_record(trainer: Trainer, step: int, routing: StepRouting | None) -> dict[str, Any] | None:
    if routing is None:
        return None
    with_loads = step % _LOADS_EVERY == 0 or step in (1, trainer.config.run.num_steps)
    return expert_record(trainer.model, trainer.config.model, routing, with_loads=with_loads)


def _log_step(
    trainer: Trainer, progress: Progress, outcome: StepOutcome, rate: float, step_s: float, stage: Stage | None
) -> None:
    if trainer.log is None:
        return
    config, ranks = trainer.config, trainer.ranks
    speed = outcome.counts.num_tokens / step_s / ranks.world_size
    flops = flops_per_token(config.model, trainer.feed.order.sequence_length)
    record = StepRecord(
        step=progress.step,
        loss=outcome.loss_mean,
        means={**outcome.means, **trainer.feed.figures(progress.step)},
        learning_rate=rate,
        grad_norm=outcome.grad_norm,
        tokens_per_s_per_device=speed,
        mfu=mfu(speed, flops, device_name(ranks.device)),
        memory_gib=memory_gib(ranks.device),
        step_s=step_s,
        tokens_seen=progress.data.tokens_seen,
        epoch=max(trainer.feed.order.progress(progress.data.position).values()),
        skipped=outcome.verdict.action != "apply",
        stage=stage.number if stage is not None else None,
        experts=_expert_record(trainer, progress.step, outcome.routing),
    )
    trainer.log.step(record, config.run.num_steps)

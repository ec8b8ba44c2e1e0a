"""Rows of the step benchmark, run in turn: what a row is, when it is void, what is left out when time runs short."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch

from benchmarks.timing import Budget, Ratio, ratio

# Beside its steps, a block restores weights, opens its data and takes memory again.
_BLOCK_OVERHEAD_S = 2.0
# About what it takes to prepare a row. How long it compiles cannot be foretold.
_PREPARATION_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How many steps are run. A span is what is timed at once, with the device waited for at both ends."""

    warm_up_steps: int
    settle_steps: int
    """Untimed steps at the beginning of a block: memory that was given back is allocated again."""
    span_steps: int
    spans_per_block: int
    max_rounds: int

    @property
    def block_steps(self) -> int:
        """Steps of a whole block."""
        return self.settle_steps + self.span_steps * self.spans_per_block


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """What one block of steps gave; every block begins with the initial weights and the first batch."""

    span_s: list[float]
    """Seconds per step of each span."""
    losses: dict[int, float]
    """By step, counted from 1; of all steps, or of those that were logged."""
    peak_bytes: int | None = None
    """The most device memory that tensors took."""


class AbsentError(RuntimeError):
    """A row cannot run because something is not installed."""


class Runner(Protocol):
    """A row that has been built."""

    def block(self, num_untimed: int, num_spans: int, span_steps: int) -> Block:
        """Begins anew and runs num_untimed steps, then spans of steps that are timed."""
        ...

    def rest(self) -> None:
        """Gives back the device memory until the next block."""
        ...

    def drop(self) -> None:
        """Lets go of everything, after an error."""
        ...


@dataclass(kw_only=True, slots=True)
class Row:
    """One way to run the step, and what was measured of it."""

    key: str
    name: str
    open: Callable[[], Runner]
    micro_batch: int
    """Sequences."""
    micro_batches: int = 1
    """Per step."""
    priority: int = 0
    """Rows are prepared and run in this order; if time runs short, the last are left out."""
    is_extra: bool = False
    """Whether it comes after the first round of the others, for one span only."""
    checks_losses: bool = True
    """Whether its losses can be compared; not where no other row has its batches."""
    reference: str | None = None
    """The row whose losses it must have; None: the first of those that are no extra."""
    runner: Runner | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """Of the warm-up steps."""
    rounds: dict[int, list[float]] = field(default_factory=dict)
    """Seconds per step of the spans of each round."""
    step_s: float = 0.0
    """The newest estimate."""
    peak_bytes: int | None = None
    remark: str = ""
    """Why there are no figures, or fewer."""
    is_void: bool = False

    @property
    def sequences(self) -> int:
        """Per step."""
        return self.micro_batch * self.micro_batches

    @property
    def spans_s(self) -> list[float]:
        """Seconds per step of all spans."""
        return [seconds for spans in self.rounds.values() for seconds in spans]

    @property
    def last_loss(self) -> float:
        """After the warm-up."""
        return self.losses[max(self.losses)]

    @property
    def median_s(self) -> float | None:
        """Seconds per step; None for a row that is void or was not timed."""
        return statistics.median(self.spans_s) if self.spans_s and not self.is_void else None


def measure(
    rows: Sequence[Row],
    schedule: Schedule,
    budget: Budget,
    tolerance: float,
    *,
    say: Callable[[str], None] = lambda text: None,
    after_round: Callable[[], object] = lambda: None,
) -> None:
    """Prepares the rows and times them in turn, until all rounds are done or the time is up.

    An error ends its row and no other. The first round is run in any case, shorter if it is late.
    """
    rows = sorted(rows, key=lambda row: row.priority)
    try:
        for is_extra in (False, True):
            stage = [row for row in rows if row.is_extra == is_extra]
            for row in stage:
                _prepare(row, rows, schedule, budget, say)
            judge(rows, tolerance)
            for row in stage:
                is_late = budget.left_s < _expected_s([row], schedule)
                _run(row, 0, schedule, 1 if is_extra or is_late else schedule.spans_per_block, say)
            after_round()
        for number in range(1, schedule.max_rounds):
            for row in [row for row in rows if not row.is_extra and _is_ready(row)]:
                if budget.left_s < _expected_s([row], schedule):
                    say(f"the time is up in round {number + 1}")
                    return
                _run(row, number, schedule, schedule.spans_per_block, say)
            after_round()
    finally:
        for row in rows:
            _drop(row)


def judge(rows: Sequence[Row], tolerance: float) -> None:
    """Makes void the rows whose losses are not those of the row that they are compared with."""
    for row in rows:
        if not row.losses or not row.checks_losses or row.is_void:
            continue
        reference = reference_of(row, rows)
        if reference is None:
            row.is_void, row.remark = True, f"VOID: {row.reference} did not run, its losses are not compared"
            continue
        apart = 0.0 if reference is row else furthest_apart(row.losses, reference.losses)
        if not apart <= tolerance:
            row.is_void = True
            row.remark = (
                f"VOID: loss {row.last_loss:.4f} after the warm-up, {reference.name} {reference.last_loss:.4f}; "
                f"up to {apart:.2g} apart, {tolerance:g} allowed"
            )


def reference_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row whose losses a row must have, if that one ran."""
    wanted = [other for other in rows if other.key == row.reference] if row.reference else rows
    return next((other for other in wanted if other.losses and (row.reference or not other.is_extra)), None)


def furthest_apart(losses: Mapping[int, float], others: Mapping[int, float]) -> float:
    """The largest difference of losses at the same step; NaN if one is, infinite if no step has both."""
    differences = [abs(losses[step] - others[step]) for step in losses.keys() & others.keys()]
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=math.inf)


def speed_ratio(row: Row, base: Row) -> Ratio | None:
    """How many times as fast a row is as another, per token, over the spans of the rounds that both have."""
    if row.median_s is None or base.median_s is None:
        return None
    pairs = [
        (mine / row.sequences, theirs / base.sequences)
        for number in sorted(row.rounds.keys() & base.rounds.keys())
        for mine, theirs in zip(row.rounds[number], base.rounds[number])
    ]
    return ratio([mine for mine, _ in pairs], [theirs for _, theirs in pairs]) if pairs else None


def release_memory() -> None:
    """Gives what nothing refers to back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # a device that is lost has told so already
            torch.cuda.empty_cache()


def _prepare(row: Row, rows: Sequence[Row], schedule: Schedule, budget: Budget, say: Callable[[str], None]) -> None:
    """Builds a row and warms it up, if that leaves the time to time those that are ready."""
    ready = [other for other in rows if _is_ready(other) and not other.rounds]
    needed_s = _expected_s(ready, schedule) + _PREPARATION_S
    if (ready or row.is_extra) and budget.left_s < needed_s:
        row.remark = "left out: no time"
        return
    started_s = time.perf_counter()

    def warm_up() -> None:
        row.runner = row.open()
        # The last steps are timed for an estimate only.
        last = min(2, schedule.warm_up_steps)
        block = row.runner.block(schedule.warm_up_steps - last, 1, last)
        row.losses, row.step_s = block.losses, block.span_s[0]

    _attempt(row, warm_up)
    loss = f", loss {row.losses[min(row.losses)]:.3f} to {row.last_loss:.3f}" if row.losses else f": {row.remark}"
    say(f"{row.name}: prepared in {time.perf_counter() - started_s:.0f} s{loss}")


def _run(row: Row, number: int, schedule: Schedule, num_spans: int, say: Callable[[str], None]) -> None:
    """One block of a row, as the round of that number."""
    if not _is_ready(row) or row.runner is None:
        return
    runner = row.runner

    def run() -> None:
        block = runner.block(schedule.settle_steps, num_spans, schedule.span_steps)
        row.rounds[number], row.step_s = block.span_s, statistics.median(block.span_s)
        if block.peak_bytes is not None:
            row.peak_bytes = max(row.peak_bytes or 0, block.peak_bytes)

    _attempt(row, run)
    if number in row.rounds:
        say(f"{row.name}: {1e3 * row.step_s:,.1f} ms/step")
    else:
        say(f"{row.name}: {row.remark}")


def _attempt(row: Row, action: Callable[[], None]) -> None:
    """Does something with a row that rests before and after it; an error becomes the row's remark."""
    try:
        action()
        if row.runner is not None:
            row.runner.rest()
    except Exception as error:  # whatever it is: the other rows must run, and the table be printed
        # The text only: the error's frames hold the tensors of the step.
        row.remark = f"absent: {error}" if isinstance(error, AbsentError) else _in_short(error)
    if row.remark:
        _drop(row)
    release_memory()


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    words = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {lines[0]}"
    return f"failed: {words[:200]}"


def _drop(row: Row) -> None:
    if row.runner is not None:
        with suppress(Exception):  # it has failed before, or all is over
            row.runner.drop()
        row.runner = None


def _is_ready(row: Row) -> bool:
    return row.runner is not None and not row.is_void


def _expected_s(rows: Sequence[Row], schedule: Schedule) -> float:
    return sum(row.step_s * schedule.block_steps + _BLOCK_OVERHEAD_S for row in rows if _is_ready(row))

"""One case: every implementation of an operator at a shape, checked first, then timed in interleaved rounds."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch._dynamo.utils
import torch._functorch.config
from torch import Tensor

from benchmarks.kernel_check import (
    FACTOR,
    Judge,
    Results,
    Verdict,
    as_tuple,
    equal_bits,
    fitting,
    gradient_directions,
    nan_in_fresh_memory,
    results,
    step_results,
)
from benchmarks.kernel_operator import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Draw,
    Inputs,
    Operator,
    Phase,
    Yardstick,
    ours,
    reference,
    step,
)
from benchmarks.kernel_peers import Function, Loader
from benchmarks.timing import Budget, Call, Clock, Timed, interleave, num_sets, warm_up

OURS = "ours"
OURS_AGAIN = "ours again"
OURS_COMPILED = "ours, compiled"
OURS_BY_AUTOGRAD = "ours, autograd"
EAGER = "torch eager"
COMPILED = "torch.compile"
AUTOTUNED = "torch.compile, autotuned"

ABSENT = "absent"
FAIL = "FAIL"
NO_TIME = "not measured: time budget"
OUT_OF_MEMORY = "error: out of memory"

_SETS = 2
# An implementation that overwrites its inputs runs once per set and round: small sets have to be more.
_SETS_IN_PLACE = 4
_SMALL_SET_BYTES = 1 << 29
_SLOW_ROUND_S = 0.5
_CALLS_BEFORE_COUNTING = 3
_SEEDS = (0, 1)
_DETERMINISM_RUNS = 3
DTYPE = torch.bfloat16
# Beyond so many elements one seed has to do.
_LARGE = 1 << 29


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a row is measured."""

    rounds: int = 21
    fewest_rounds: int = 15
    """Where a round takes more than half a second."""
    warm_up_s: float = 0.2


@dataclass(slots=True)
class Cell:
    """One implementation in one row: its times, or the note that says why there are none."""

    note: str = ""
    seconds: list[float] = field(default_factory=list)
    how: str | None = None
    seconds_with_launches: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None
    """What a forward keeps for its backward beside its inputs, numbers of rows and other integers not counted."""
    launches: int | None = None
    recompiles: int | None = None
    """Graphs that torch.compile made after the warm-up."""
    verdict: Verdict | None = None
    equal_bits: bool | None = None

    @property
    def is_broken(self) -> bool:
        """Whether an implementation gave wrong results or none, for another reason than too little memory."""
        return self.note == FAIL or (self.note.startswith("error") and self.note != OUT_OF_MEMORY)


@dataclass(slots=True)
class Row:
    """One operator at one shape in one phase."""

    case: Case
    phase: Phase
    cells: dict[str, Cell]

    @property
    def moved_bytes(self) -> int | None:
        """The least that this phase can move."""
        elements = self.case.operator.elements(self.case.sizes.shape).get(self.phase)
        return None if elements is None else elements * DTYPE.itemsize

    @property
    def flops(self) -> int | None:
        """Useful operations of its matrix products."""
        return self.case.operator.flops(self.case.sizes.shape).get(self.phase)

    def has_speed(self, name: str) -> bool:
        """Whether an implementation does all of this work, so that bytes or operations over its time are a speed."""
        yardstick = self.case.operator.yardsticks.get(name)
        return yardstick is None or yardstick.is_equal_work


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation."""

    name: str
    load: Loader
    step: Callable[[], Callable[..., Tensor] | None] = lambda: None
    is_compiled: bool = False
    yardstick: Yardstick | None = None


@dataclass(slots=True)
class Loaded:
    """A provider whose function could be had."""

    provider: Provider
    function: Function
    step: Callable[..., Tensor] | None
    verdict: Verdict | None = None
    equal_bits: bool | None = None

    @property
    def is_right(self) -> bool:
        """Whether it was checked, and no check failed; a yardstick need not be."""
        return self.provider.yardstick is not None or (self.verdict is not None and self.verdict.is_right)


def providers(case: Case) -> list[Provider]:
    """Ours first; those that take long to compile last."""
    operator, shape = case.operator, case.sizes.shape
    load_ours, load_reference = partial(ours, operator, shape), partial(reference, operator, shape)
    load_step = partial(step, operator)
    found = [
        Provider(OURS, load_ours, load_step),
        Provider(EAGER, load_reference),
        Provider(
            OURS_COMPILED,
            partial(_compiled, load_ours, fullgraph=True),
            partial(_compiled_step, load_step),
            is_compiled=True,
        ),
    ]
    if operator.step is not None:
        found.append(Provider(OURS_BY_AUTOGRAD, partial(_on_results, load_ours)))
    if case.sizes.with_peers:
        found += [Provider(name, one.load, yardstick=one) for name, one in operator.yardsticks.items()]
        if operator.compiles_reference:
            found.append(Provider(COMPILED, partial(_compiled, load_reference), is_compiled=True))
        found += [Provider(name, loader) for name, loader in operator.peers.items()]
    if case.sizes.autotuned:
        autotuned = partial(_compiled, load_reference, mode="max-autotune-no-cudagraphs")
        found.append(Provider(AUTOTUNED, autotuned, is_compiled=True))
    return found


def measure_case(case: Case, clock: Clock, budget: Budget, device: str, effort: Effort) -> Iterator[Row]:
    """Checks every implementation, then yields a row per phase.

    Raises:
        DeviceLostError: nothing more can be measured; rows that were yielded stand.
    """
    try:
        # A compiled backward may otherwise reuse what its forward saved, and then runs once.
        with torch._functorch.config.patch(donated_buffer=False):
            yield from _measure_case(case, clock, budget, device, effort)
    finally:
        torch._dynamo.reset()  # else the next shape counts as a recompilation, and after a few nothing is compiled


def _measure_case(case: Case, clock: Clock, budget: Budget, device: str, effort: Effort) -> Iterator[Row]:
    notes: dict[str, str] = {}
    loaded = list(_load_and_check(case, clock, budget, device, notes))
    clock.release()
    if not any(one.provider.name == OURS for one in loaded):
        # Without ours there is nothing to compare with.
        cells = {name: Cell(note) for name, note in notes.items()}
        yield from (Row(case, phase, cells) for phase in case.sizes.phases)
        return
    sets = InputSets(case, clock, device)
    for phase in case.sizes.phases:
        yield _measure_phase(case, phase, loaded, notes, sets, clock, effort)
        clock.release()


def checked(case: Case, device: str, dtype: torch.dtype) -> Cell:
    """Our implementation's verdict alone, without a clock."""
    provider = providers(case)[0]
    try:
        one = load(provider)
        check(one, Judge(case, Draw(device, dtype, _SEEDS[0])), case.operator)
    except Exception as error:  # one broken operator must not hide the others
        return Cell(explain(error))
    return _cell_of(one)


def explain(error: Exception) -> str:
    """An error in the room of a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines()
    return f"error: {type(error).__name__}{': ' + lines[0][:120] if lines else ''}"


# --- Loading and checking.


def _compiled(load: Callable[[], Function], fullgraph: bool = False, mode: str | None = None) -> Function:
    return torch.compile(load(), fullgraph=fullgraph, dynamic=False, mode=mode)


def _compiled_step(load: Callable[[], Callable[..., Tensor] | None]) -> Callable[..., Tensor] | None:
    function = load()
    return None if function is None else torch.compile(function, fullgraph=True, dynamic=False)


class _Result(torch.autograd.Function):
    """Passes a tensor on as if an operator had computed it, as a model's logits are: leaves are not written over."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _on_results(load: Callable[[], Function]) -> Function:
    function = load()
    return lambda leaf, *others: function(_Result.apply(leaf), *others)


def load(provider: Provider) -> Loaded:
    """Imports, or compiles what is compiled at its first call."""
    return Loaded(provider, provider.load(), provider.step())


def _load_and_check(case: Case, clock: Clock, budget: Budget, device: str, notes: dict[str, str]) -> Iterator[Loaded]:
    seeds = _SEEDS[:1] if _is_large(case) else _SEEDS
    judges: list[Judge] = []
    for provider in providers(case):
        if budget.is_spent and provider.name not in (OURS, EAGER):
            notes[provider.name] = NO_TIME
            continue
        try:
            one = load(provider)
            judges = judges or [Judge(case, Draw(device, DTYPE, seed), clock.free_bytes()) for seed in seeds]
            for judge in judges if provider.yardstick is None else ():
                check(one, judge, case.operator)
        except ModuleNotFoundError as error:
            notes[provider.name] = explain(error) if provider.name.startswith(OURS) else ABSENT
        except Exception as error:
            notes[provider.name] = explain(error)
            clock.check()
        else:
            yield one


def _is_large(case: Case) -> bool:
    elements = case.operator.elements(case.sizes.shape).values()
    return max(elements, default=_LARGE) >= _LARGE


def check(one: Loaded, judge: Judge, operator: Operator) -> None:
    """Adds a verdict per way to call it; ours also has to give the same bits each time."""
    for by_step in (False, True) if one.step is not None else (False,):
        with contextlib.nullcontext() if one.provider.is_compiled else nan_in_fresh_memory():
            found = _run(one, judge, operator, by_step)
        verdict = judge.judge(found, _factor(one, operator))
        if one.verdict is None or one.is_right:  # what is wrong once stays wrong
            one.verdict = verdict
        if one.provider.name == OURS:
            runs = (_run(one, judge, operator, by_step) for _ in range(_DETERMINISM_RUNS))
            one.equal_bits = one.equal_bits is not False and equal_bits(runs)


def _factor(one: Loaded, operator: Operator) -> float:
    is_ours = one.provider.name.startswith(OURS)
    return FACTOR if is_ours or operator.peer_factor is None else operator.peer_factor


def _run(one: Loaded, judge: Judge, operator: Operator, by_step: bool) -> Results:
    if by_step and one.step is not None:
        return step_results(one.step, operator, judge.inputs)
    return results(one.function, operator, judge.inputs, judge.directions)


# --- Timing.


class InputSets:
    """Inputs and gradients to rotate over, more than the cache holds, the same for every implementation."""

    def __init__(self, case: Case, clock: Clock, device: str):
        operator, shape = case.operator, case.sizes.shape
        function = reference(operator, shape)
        self.inputs: list[Inputs] = []
        self.directions: list[tuple[Tensor, ...]] = []
        count = 1
        while len(self.inputs) < count:
            draw = Draw(device, DTYPE, seed=len(self.inputs))
            inputs = operator.draw(draw, shape)
            self.directions.append(gradient_directions(operator, function, inputs, draw))
            self.inputs.append(Inputs(tuple(leaf.requires_grad_() for leaf in inputs.leaves), inputs.others))
            if len(self.inputs) == 1:
                is_short = operator.is_in_place and inputs.size_bytes < _SMALL_SET_BYTES
                count = num_sets(inputs.size_bytes, clock, _SETS_IN_PLACE if is_short else _SETS)
        self.restore = self._restorer() if operator.is_in_place else None

    def _restorer(self) -> Call:
        originals = [leaf.detach().clone() for leaf in self.inputs[0].leaves]

        def restore() -> None:
            with torch.no_grad():
                for inputs in self.inputs:
                    for leaf, original in zip(inputs.leaves, originals, strict=True):
                        leaf.copy_(original)

        return restore


def _measure_phase(
    case: Case,
    phase: Phase,
    loaded: Sequence[Loaded],
    notes: Mapping[str, str],
    sets: InputSets,
    clock: Clock,
    effort: Effort,
) -> Row:
    row = Row(case, phase, {name: Cell(note) for name, note in notes.items()})
    timed: dict[str, Timed] = {}
    for one in loaded:
        if one.provider.name == OURS_BY_AUTOGRAD and phase != BOTH:
            continue
        cell = _cell_of(one)
        row.cells[one.provider.name] = cell
        if cell.note:
            continue
        try:
            timed |= _prepare(one, phase, sets, clock, cell)
        except Exception as error:
            cell.note = explain(error)
            clock.check()
    if OURS_AGAIN in timed:
        row.cells[OURS_AGAIN] = Cell()
    try:
        is_slow = warm_up(timed, effort.warm_up_s) > _SLOW_ROUND_S
        for name, seconds in interleave(timed, effort.fewest_rounds if is_slow else effort.rounds).items():
            row.cells[name].seconds = seconds
    except Exception as error:
        for name in timed:
            row.cells[name].note = explain(error)
        clock.check()
    order = [provider.name for provider in providers(case)]
    row.cells = {name: row.cells[name] for name in (*order, OURS_AGAIN) if name in row.cells}
    return row


def _prepare(one: Loaded, phase: Phase, sets: InputSets, clock: Clock, cell: Cell) -> dict[str, Timed]:
    """Makes an implementation ready for the rounds, and measures what needs no rounds."""
    calls = make_calls(one, phase, sets)
    for _ in range(_CALLS_BEFORE_COUNTING):
        calls[0]()
    compiled = _graphs_compiled()
    cell.peak_bytes = clock.peak_bytes(calls[0])
    if phase == FORWARD and sets.restore is None and not one.provider.is_compiled:
        cell.kept_bytes = _kept_bytes(calls[0], inputs_of(one, sets)[0])
    timed = {one.provider.name: clock.prepare(calls, sets.restore)}
    cell.how = timed[one.provider.name].how
    cell.seconds_with_launches = clock.seconds_with_launches(calls, sets.restore)
    if one.provider.is_compiled:
        cell.recompiles = _graphs_compiled() - compiled
    if one.provider.name == OURS:
        cell.launches = clock.num_launches(calls[0])
        timed[OURS_AGAIN] = clock.prepare(calls, sets.restore)
    return timed


def _cell_of(one: Loaded) -> Cell:
    return Cell("" if one.is_right else FAIL, verdict=one.verdict, equal_bits=one.equal_bits)


def make_calls(one: Loaded, phase: Phase, sets: InputSets) -> list[Call]:
    """A call per input set."""
    return [_call(one, phase, *one_set) for one_set in zip(inputs_of(one, sets), sets.directions, strict=True)]


def inputs_of(one: Loaded, sets: InputSets) -> list[Inputs]:
    """An implementation's inputs: the sets themselves, or what a yardstick makes of them."""
    return sets.inputs if one.provider.yardstick is None else [*map(one.provider.yardstick.inputs, sets.inputs)]


def _kept_bytes(forward: Call, inputs: Inputs) -> int:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    given = {tensor.untyped_storage().data_ptr() for tensor in (*inputs.leaves, *inputs.others)}
    return sum(size for pointer, size in kept.items() if pointer not in given)


def _call(one: Loaded, phase: Phase, inputs: Inputs, directions: Sequence[Tensor]) -> Call:
    tensors = (*inputs.leaves, *inputs.others)
    if phase == FORWARD:
        return lambda: one.function(*tensors)
    if phase == BACKWARD:
        outputs = as_tuple(one.function(*tensors))
        gradients = fitting(directions, outputs)
        return lambda: torch.autograd.grad(outputs, inputs.leaves, gradients, retain_graph=True)
    if one.step is not None:
        return partial(_without_autograd, one.step, tuple(tensor.detach() for tensor in tensors))
    return partial(_forward_and_backward, one.function, inputs, directions)


def _without_autograd(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*tensors)


def _forward_and_backward(function: Function, inputs: Inputs, directions: Sequence[Tensor]) -> object:
    outputs = as_tuple(function(*inputs.leaves, *inputs.others))
    gradients = torch.autograd.grad(outputs, inputs.leaves, fitting(directions, outputs))
    return [output.detach() for output in outputs], gradients


def _graphs_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

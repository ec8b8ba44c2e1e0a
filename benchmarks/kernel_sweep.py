"""Launch parameters of our kernels: constants of their modules, one changed at a time, all in the same rounds."""

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.kernel_check import Judge
from benchmarks.kernel_goals import seconds
from benchmarks.kernel_operator import Case, Draw, Phase, label
from benchmarks.kernel_rows import DTYPE, Cell, Effort, InputSets, check, explain, load, make_calls, providers
from benchmarks.table import Table
from benchmarks.timing import Budget, Clock, DeviceLostError, Timed, interleave, warm_up


def sweep(cases: Sequence[Case], clock: Clock, device: str, budget: Budget, effort: Effort) -> Table:
    """Times every value of every knob at the shapes where peers are measured; wrong results get no time."""
    lines: list[list[str | float | None]] = []
    for case in cases:
        if not case.operator.knobs or not case.sizes.with_peers or budget.is_spent:
            continue
        judge = Judge(case, Draw(device, DTYPE, seed=0), clock.free_bytes())
        sets = InputSets(case, clock, device)
        for phase in case.sizes.phases:
            for name, cell in _measure(case, phase, judge, sets, clock, effort).items():
                duration_s = seconds(cell)
                shown = cell.note if duration_s is None else 1e6 * duration_s
                lines.append([case.operator.name, label(case.sizes.shape), phase, name, shown])
                print(*lines[-1], flush=True)
        del judge, sets
        clock.release()
    return Table("Launch parameters", ["operator", "shape", "phase", "setting", "us"], lines)


def _measure(case: Case, phase: Phase, judge: Judge, sets: InputSets, clock: Clock, effort: Effort) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    timed: dict[str, Timed] = {}
    for target, values in case.operator.knobs.items():
        for value in values:
            now = pkgutil.resolve_name(target)
            name = f"{target.partition(':')[2]} = {value}{' (now)' if with_value(now, value) == now else ''}"
            cells[name] = Cell()
            # A captured graph keeps what was launched: the value matters while it is prepared.
            with _set(target, value):
                try:
                    one = load(providers(case)[0])
                    check(one, judge, case.operator)
                    if one.is_right:
                        timed[name] = clock.prepare(make_calls(one, phase, sets), sets.restore)
                    else:
                        cells[name].note = "FAIL"
                except DeviceLostError:
                    raise
                except Exception as error:
                    cells[name].note = explain(error)
                    clock.check()
    warm_up(timed, effort.warm_up_s)
    for name, durations_s in interleave(timed, effort.rounds).items():
        cells[name].seconds = durations_s
    clock.release()
    return cells


def with_value(before: Any, value: Any) -> Any:
    """A constant with a value that is tried: of a dict, the entries that the value has."""
    return {**before, **value} if isinstance(before, dict) else value


@contextmanager
def _set(target: str, value: object) -> Iterator[None]:
    module_name, _, attribute = target.partition(":")
    module: Any = pkgutil.resolve_name(module_name)
    before = getattr(module, attribute)
    setattr(module, attribute, with_value(before, value))
    try:
        yield
    finally:
        setattr(module, attribute, before)

"""The goals for kernels, and what a run has to say about each.

A goal is judged by its worst row: at least 16384 rows of input, all else as the goal names it. Ratios are within one
run; "of copy" and "of ceiling" are of what the same process measured.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.kernel_operator import BACKWARD, BOTH, FORWARD, Phase, Shape, label
from benchmarks.kernel_rows import COMPILED, DTYPE, EAGER, OURS, OURS_COMPILED, Cell, Row
from benchmarks.moe_cases import DENSE, GROUPED_MM, MOVES
from benchmarks.table import Table
from benchmarks.timing import Ceiling, Ratio, ratio

_FEWEST_ROWS = 16_384
_PAST_INT32 = 1 << 31

NOT_MEASURED = "not measured"
PASS = "pass"
MISSED = "fail"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do at best, as measured before the kernels, by the same process."""

    copy: Ceiling
    matmul_flops: float
    """FLOP/s of a large bf16 matrix product, sustained."""


def seconds(cell: Cell | None) -> float | None:
    """Median duration of one call; None where none was measured."""
    return None if cell is None or cell.note or not cell.seconds else statistics.median(cell.seconds)


def against(row: Row, peer: str, base: str = OURS) -> Ratio | None:
    """How many times as long a peer takes as ours."""
    ours, theirs = row.cells.get(base), row.cells.get(peer)
    if ours is None or theirs is None or seconds(ours) is None or seconds(theirs) is None:
        return None
    return ratio(ours.seconds, theirs.seconds)


def of_copy(row: Row, ceilings: Ceilings, name: str = OURS) -> float | None:
    """Bandwidth over that of a copy which moves as many bytes."""
    duration_s = seconds(row.cells.get(name))
    if duration_s is None or row.moved_bytes is None or not row.has_speed(name):
        return None
    return row.moved_bytes / duration_s / ceilings.copy.at(row.moved_bytes)


def of_matmul(row: Row, ceilings: Ceilings, name: str = OURS) -> float | None:
    """Useful FLOP/s over those of a large matrix product."""
    flops = flops_per_s(row, name)
    return None if flops is None else flops / ceilings.matmul_flops


def flops_per_s(row: Row, name: str = OURS) -> float | None:
    """Useful FLOP/s."""
    duration_s = seconds(row.cells.get(name))
    return None if duration_s is None or row.flops is None or not row.has_speed(name) else row.flops / duration_s


Value = Callable[[Row, Ceilings], float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the list: what is measured in which rows, and how much is needed."""

    key: str
    text: str
    operators: tuple[str, ...]
    phases: tuple[Phase, ...]
    value: Value
    needed: float
    is_upper_bound: bool = False
    shape: Shape = field(default_factory=dict)
    """What a shape has to have to count."""

    def measured(self, rows: Iterable[Row], ceilings: Ceilings) -> tuple[float, Row] | None:
        """The worst value, and where."""
        found = [
            (value, row)
            for row in rows
            if row.case.operator.name in self.operators
            and row.phase in self.phases
            and row.case.sizes.shape["M"] >= _FEWEST_ROWS
            and self.shape.items() <= row.case.sizes.shape.items()
            and (value := self.value(row, ceilings)) is not None
        ]
        if not found:
            return None
        return (max if self.is_upper_bound else min)(found, key=lambda pair: pair[0])

    def is_met(self, value: float) -> bool:
        """Whether a value is enough."""
        return value <= self.needed if self.is_upper_bound else value >= self.needed


def _versus(peer: str) -> Value:
    """The time of a peer, or of a part of our work, over ours."""

    def value(row: Row, _ceilings: Ceilings) -> float | None:
        found = against(row, peer)
        return None if found is None else found.median

    return value


def _inside_compile(row: Row, _ceilings: Ceilings) -> float | None:
    found = against(row, OURS_COMPILED)
    return None if found is None else found.median


def _recompiles(row: Row, _ceilings: Ceilings) -> float | None:
    cell = row.cells.get(OURS_COMPILED)
    return None if cell is None or cell.recompiles is None else float(cell.recompiles)


def _memory_of_eager(row: Row, _ceilings: Ceilings) -> float | None:
    ours, eager = row.cells.get(OURS), row.cells.get(EAGER)
    if ours is None or eager is None or ours.peak_bytes is None or not eager.peak_bytes:
        return None
    return ours.peak_bytes / eager.peak_bytes


def _head_error_of_eager(row: Row, _ceilings: Ceilings) -> float | None:
    cell = row.cells.get(OURS)
    if cell is None or cell.verdict is None:
        return None
    return cell.verdict.errors["dhead"] / max(cell.verdict.eager["dhead"], 1e-30)


def _right_past_int32(row: Row, _ceilings: Ceilings) -> float | None:
    shape, cell = row.case.sizes.shape, row.cells.get(OURS)
    if shape["M"] * shape["V"] <= _PAST_INT32 or cell is None or cell.verdict is None:
        return None
    return float(cell.verdict.is_right)


def _microseconds(row: Row, _ceilings: Ceilings) -> float | None:
    duration_s = seconds(row.cells.get(OURS))
    return None if duration_s is None else 1e6 * duration_s


def _teraflops(row: Row, _ceilings: Ceilings) -> float | None:
    found = flops_per_s(row)
    return None if found is None else found / 1e12


def _is_captured(row: Row, _ceilings: Ceilings) -> float | None:
    """A graph holds no call for which the host waits."""
    cell = row.cells.get(OURS)
    return None if seconds(cell) is None or cell is None else float(cell.how == "graph")


def _kept(row: Row, name: str) -> float | None:
    """Elements a token that a layer of experts keeps for its backward, its input with them."""
    cell, shape = row.cells.get(name), row.case.sizes.shape
    if cell is None or cell.note or cell.kept_bytes is None:
        return None
    return cell.kept_bytes / DTYPE.itemsize / shape["M"] + shape["d"]


def _kept_of_needed(row: Row, _ceilings: Ceilings) -> float | None:
    kept, shape = _kept(row, OURS), row.case.sizes.shape
    return None if kept is None else kept / (shape["d"] + 2 * shape["J"] * shape["F"])


def _kept_of_scatter(row: Row, _ceilings: Ceilings) -> float | None:
    ours, theirs = _kept(row, OURS), _kept(row, "ScatterMoE")
    return None if ours is None or theirs is None else ours / theirs


_NORMS, _ADD, _ROPES = ("rms_norm",), ("add_rms_norm",), ("rope",)
_SWIGLU, _LOSS, _LINEAR = ("swiglu",), ("cross_entropy",), ("linear_cross_entropy",)
_ROUTE, _PERMUTE, _COMBINE, _EXPERTS = ("moe_route",), ("moe_permute",), ("moe_combine",), ("moe_experts",)
_MIXTURES = (*_ROUTE, *_COMBINE, *_EXPERTS)
_ALL = (*_NORMS, *_ADD, *_ROPES, "rope_packed", *_SWIGLU, *_LOSS, *_LINEAR, *_MIXTURES)
_EITHER: tuple[Phase, ...] = (FORWARD, BACKWARD)
_EVERY: tuple[Phase, ...] = (FORWARD, BACKWARD, BOTH)

_LARGE_INDEX = {"M": 32_768, "J": 8, "E": 256}
_FINE, _COARSE = {"E": 64, "J": 8, "F": 1_024}, {"E": 8, "J": 2}
_MANY = {"M": 32_768, "E": 128, "d": 2_048, "F": 768, "J": 8}

GOALS: Sequence[Goal] = (
    Goal("K1", "RMSNorm forward, of copy", _NORMS, (FORWARD,), of_copy, 0.92),
    Goal("K1", "add + RMSNorm forward, of copy", _ADD, (FORWARD,), of_copy, 0.90),
    Goal("K2", "add + RMSNorm backward, of copy", _ADD, (BACKWARD,), of_copy, 0.85),
    Goal("K2", "add + RMSNorm backward, x torch.compile", _ADD, (BACKWARD,), _versus(COMPILED), 1.9),
    Goal("K3", "RoPE forward and backward, of copy", _ROPES, _EITHER, of_copy, 0.88),
    Goal("K3", "RoPE forward and backward, x HF eager", _ROPES, _EITHER, _versus("HF eager"), 8.0),
    Goal("K4", "SwiGLU forward, of copy", _SWIGLU, (FORWARD,), of_copy, 0.92),
    Goal("K4", "SwiGLU backward, of copy", _SWIGLU, (BACKWARD,), of_copy, 0.88),
    Goal("K4", "SwiGLU forward + backward, x eager", _SWIGLU, (BOTH,), _versus(EAGER), 2.0),
    Goal("K5", "cross-entropy with gradient, of copy", _LOSS, (BOTH,), of_copy, 0.80),
    Goal("K5", "cross-entropy with gradient, x Liger", _LOSS, (BOTH,), _versus("Liger"), 2.5),
    Goal("K5", "cross-entropy with gradient, x torch.compile", _LOSS, (BOTH,), _versus(COMPILED), 1.4),
    Goal("K5", "cross-entropy right past 2^31 logits (1 = yes)", _LOSS, (BOTH,), _right_past_int32, 1.0),
    Goal("K6", "linear + cross-entropy, of matmul ceiling", _LINEAR, (BOTH,), of_matmul, 0.85),
    Goal("K6", "linear + cross-entropy, memory of eager", _LINEAR, (BOTH,), _memory_of_eager, 0.12, True),
    Goal("K6", "linear + cross-entropy, x Liger", _LINEAR, (BOTH,), _versus("Liger"), 1.3),
    Goal("K6", "linear + cross-entropy, x F.linear_cross_entropy", _LINEAR, (BOTH,), _versus("torch fused"), 1.0),
    Goal("K6", "linear + cross-entropy, dW error of eager's", _LINEAR, (BOTH,), _head_error_of_eager, 1.0, True),
    Goal("K7", "rows of experts: index build, us", _ROUTE, (FORWARD,), _microseconds, 25.0, True, _LARGE_INDEX),
    Goal("K7", "rows of experts: permutation by torch, of copy", _PERMUTE, (FORWARD,), of_copy, 0.75),
    Goal("K7", "rows of experts: combine, of copy", _COMBINE, (FORWARD,), of_copy, 0.80),
    Goal("K7", "experts: the host never waits (1 = yes)", _MIXTURES, _EVERY, _is_captured, 1.0),
    Goal("K8", "64 experts, TFLOP/s of a dense FFN's", _EXPERTS, (BOTH,), _versus(DENSE), 0.70, False, _FINE),
    Goal("K8", "64 experts, x torchtitan's grouped_mm", _EXPERTS, (BOTH,), _versus("torchtitan"), 1.3, False, _FINE),
    Goal("K8", "64 experts, x ScatterMoE", _EXPERTS, (BOTH,), _versus("ScatterMoE"), 1.4, False, _FINE),
    Goal(
        "K8", "64 experts, kept activations of ScatterMoE's", _EXPERTS, (FORWARD,), _kept_of_scatter, 0.6, True, _FINE
    ),
    Goal("G9", "128 experts, TFLOP/s; Liger says 337", _EXPERTS, (FORWARD,), _teraflops, 337.0, False, _MANY),
    Goal("G9", "128 experts, TFLOP/s; Liger says 263", _EXPERTS, (BOTH,), _teraflops, 263.0, False, _MANY),
    Goal("G9", "experts, x Liger", _EXPERTS, (FORWARD, BOTH), _versus("Liger"), 1.0),
    Goal("G9", "experts, x the back-end grouped_mm", _EXPERTS, (FORWARD, BOTH), _versus(GROUPED_MM), 1.1),
    Goal("G10", "experts, x HF's loop", _EXPERTS, (BOTH,), _versus("HF loop"), 10.0),
    Goal("G11", "experts, share of index and combine", _EXPERTS, (BOTH,), _versus(MOVES), 0.12, True),
    Goal("G12", "8 experts, TFLOP/s of a dense FFN's", _EXPERTS, (BOTH,), _versus(DENSE), 0.80, False, _COARSE),
    Goal("G13", "experts, kept activations of d + 2 J F", _EXPERTS, (FORWARD,), _kept_of_needed, 1.0, True),
    Goal("K9", "inside torch.compile(fullgraph), of alone", _ALL, _EVERY, _inside_compile, 1.03, True),
    Goal("K9", "recompilations after the warm-up", _ALL, _EVERY, _recompiles, 0.0, True),
)


def goals_table(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    """Every goal with what is needed, what was measured at its worst, and pass or fail."""
    lines: list[list[str | float | None]] = []
    for goal in GOALS:
        found = goal.measured(rows, ceilings)
        bound = f"{'<=' if goal.is_upper_bound else '>='} {goal.needed:g}"
        if found is None:
            lines.append([goal.key, goal.text, bound, None, NOT_MEASURED, ""])
            continue
        value, row = found
        verdict = PASS if goal.is_met(value) else MISSED
        where = f"{row.case.operator.name} {row.phase} {label(row.case.sizes.shape)}"
        lines.append([goal.key, goal.text, bound, value, verdict, where])
    columns = ["goal", "what", "needed", "measured", "verdict", "worst at"]
    return Table("Goals, bf16, 16384 rows and more, each at its worst shape", columns, lines)

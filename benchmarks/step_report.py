"""What was measured of the step benchmark's rows, as tables, goals, JSON and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings
from benchmarks.step_rounds import Row, speed_ratio
from benchmarks.table import Table
from model.config import ModelConfig
from model.flops import causal_flops_per_token, flops_per_token, mfu

BIG_STEP_TOKENS = 524_288
_NOT_APPLICABLE, _NO_SPEED = "n/a", "-"
_PRECISION_NOTE = "All hold weights and moments in fp32 and multiply in bf16: transformers by autocast, ours on copies."
_PEAK_NOTE = (
    "peak GiB: the most that all tensors took together in a block: weights, moments, gradients, activations, logits. "
    "The other rows have given back their memory."
)
_FLOOR_NOTE = "floor %: least possible time / measured time."


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What all rows have in common."""

    model: ModelConfig
    sequence_length: int
    device: str
    tolerance: float
    device_bytes: int | None = None
    ceilings: Ceilings | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A figure that is wanted; None where it was not measured."""

    name: str
    limit: float
    measured: float | None
    is_ceiling: bool = False
    """Whether the figure must not exceed the limit, instead of reaching it."""

    @property
    def passed(self) -> bool | None:
        """None where it was not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.is_ceiling else self.measured >= self.limit

    @property
    def verdict(self) -> str:
        """In a word."""
        return {None: "not measured", True: "pass", False: "fail"}[self.passed]


def results(rows: Sequence[Row], setting: Setting) -> list[dict[str, Any]]:
    """One record per row, in plain numbers; speeds are None where there is no right to one."""
    return [_result(row, rows[0], setting) for row in rows]


def _result(row: Row, base: Row, setting: Setting) -> dict[str, Any]:
    tokens = row.sequences * setting.sequence_length
    result: dict[str, Any] = {
        "key": row.key,
        "name": row.name,
        "remark": row.remark or None,
        "valid": not row.is_void and not (row.remark and not row.rounds),
        "tokens_per_step": tokens,
        "micro_batch_sequences": row.micro_batch,
        "losses_of_warm_up": row.losses,
        "last_loss": row.last_loss if row.losses else None,
        "peak_bytes": row.peak_bytes if row.median_s is not None else None,
    }
    if row.median_s is None:
        return result
    speed, flops = tokens / row.median_s, flops_per_token(setting.model, setting.sequence_length)
    causal_flops = causal_flops_per_token(setting.model, setting.sequence_length)
    ratio, ceilings = speed_ratio(row, base), setting.ceilings
    return result | {
        "ms_per_step": 1e3 * row.median_s,
        "ms_per_step_of_spans": [1e3 * seconds for seconds in row.spans_s],
        "tokens_per_s": speed,
        "model_tflops": speed * flops / 1e12,
        "mfu": mfu(speed, flops, setting.device),
        "mfu_causal": mfu(speed, causal_flops, setting.device),
        "share_of_matmul": speed * flops / ceilings.matmul_flops_per_s if ceilings else None,
        "floor_efficiency": sum(ceilings.floor_s(setting.model, tokens).values()) / row.median_s if ceilings else None,
        "speed_ratio_median": ratio.median if ratio else None,
        "speed_ratio_p20_p80": [ratio.p20, ratio.p80] if ratio else None,
    }


def fixed_step_s(rows: Mapping[str, Row], sequence_length: int) -> dict[str, float] | None:
    """What a step takes however many micro-batches it has, from one and several of them; None if not measured.

    That is the optimizer, clipping, the loop, its log, and waiting for the device once.
    """
    one, several = rows.get("ours"), rows.get("accumulated")
    if one is None or several is None or one.median_s is None or several.median_s is None:
        return None
    micro_batch_s = (several.median_s - one.median_s) / (several.micro_batches - one.micro_batches)
    fixed_s = one.median_s - one.micro_batches * micro_batch_s
    big_step_s = fixed_s + BIG_STEP_TOKENS / (one.micro_batch * sequence_length) * micro_batch_s
    return {"fixed_ms": 1e3 * fixed_s, "micro_batch_ms": 1e3 * micro_batch_s, "share": fixed_s / big_step_s}


def goals(rows: Sequence[Row], setting: Setting) -> list[Goal]:
    """The goals for a whole step, E1 to E4, on one device of the class of an H200."""
    row = {row.key: row for row in rows}
    result = {result["key"]: result for result in results(rows, setting)}
    fixed = fixed_step_s(row, setting.sequence_length)
    best = max(
        (result[key] for key in ("ours", "largest") if key in result and "tokens_per_s" in result[key]),
        key=lambda found: found["tokens_per_s"],
        default={},
    )
    fits = None
    if "largest" in row and row["largest"].micro_batch == 32 and row["largest"].peak_bytes is not None:
        fits = row["largest"].peak_bytes / 2**30

    def ratio(key: str, base: str) -> float | None:
        found = speed_ratio(row[key], row[base]) if {key, base} <= row.keys() else None
        return found.median if found is not None else None

    def peaks() -> float | None:
        mine, theirs = (result.get(key, {}).get("peak_bytes") for key in ("ours", "eager"))
        return mine / theirs if mine and theirs else None

    real = ratio("synthetic", "ours")
    return [
        Goal(name="E1 tokens/s: transformers, SDPA", limit=1.5, measured=ratio("ours", "eager")),
        Goal(name="E1 tokens/s: transformers + compile", limit=1.15, measured=ratio("ours", "compiled")),
        Goal(name="E1 tokens/s: transformers + Liger", limit=1.2, measured=ratio("ours", "liger")),
        Goal(name="E1 tokens/s: ours, kernels off + compile", limit=1.04, measured=ratio("ours", "off")),
        Goal(name=f"E2 MFU: {best.get('name', 'ours')}", limit=0.60, measured=best.get("mfu")),
        Goal(name="E2 share of the matmul ceiling, same row", limit=0.75, measured=best.get("share_of_matmul")),
        Goal(name="E2 floor efficiency, same row", limit=0.90, measured=best.get("floor_efficiency")),
        Goal(name="E3 peak memory: transformers, SDPA", limit=0.55, measured=peaks(), is_ceiling=True),
        Goal(name="E3 peak GiB of 32 sequences", limit=139.0, measured=fits, is_ceiling=True),
        Goal(
            name="E4 fixed share of a step of 0.5M tokens",
            limit=0.02,
            measured=fixed["share"] if fixed else None,
            is_ceiling=True,
        ),
        Goal(
            name="E4 real data over data read once, minus 1",
            limit=0.005,
            measured=real - 1 if real is not None else None,
            is_ceiling=True,
        ),
    ]


def tables(rows: Sequence[Row], setting: Setting) -> list[Table]:
    """Rows; where there is a GPU also the floor, the fixed part of a step, and goals."""
    found = [_rows_table(results(rows, setting), setting)]
    if setting.ceilings is not None:
        found.append(_floor_table(setting.ceilings, rows[0], setting))
    fixed = fixed_step_s({row.key: row for row in rows}, setting.sequence_length)
    if fixed is not None:
        columns = ["a step of ours", "fixed ms", "ms per micro-batch", "fixed share of a step of 0.5M tokens"]
        cells: list[str | float | None] = ["", *fixed.values()]
        note = "from steps of one and of several micro-batches"
        found.append(Table("What a step takes however large it is", columns, [cells], note))
    if setting.device_bytes is not None:
        lines = [_goal_line(goal) for goal in goals(rows, setting)]
        found.append(Table("Goals", ["goal", "needed", "measured", "verdict"], lines))
    return found


def _goal_line(goal: Goal) -> list[str | float | None]:
    return [goal.name, f"{'<=' if goal.is_ceiling else '>='} {goal.limit:g}", goal.measured, goal.verdict]


def _rows_table(found: Sequence[Mapping[str, Any]], setting: Setting) -> Table:
    columns = ["row", "ms/step", "tokens/s", "TFLOP/s", "MFU %", "causal %", "matmul %", "floor %", "peak GiB", "ratio"]
    lines = []
    for result in found:
        p20_p80 = result.get("speed_ratio_p20_p80")
        lines.append(
            [
                result["name"],
                *(_cell(result, key) for key in ("ms_per_step", "tokens_per_s", "model_tflops")),
                *(_cell(result, key, 100) for key in ("mfu", "mfu_causal", "share_of_matmul", "floor_efficiency")),
                _cell(result, "peak_bytes", 2**-30),
                _cell(result, "speed_ratio_median"),
                f"{p20_p80[0]:.2f}-{p20_p80[1]:.2f}" if p20_p80 else _NO_SPEED,
                f"{result['last_loss']:.4f}" if result["last_loss"] is not None else _NO_SPEED,
                result["remark"] or "",
            ]
        )
    notes = [
        "ratio: tokens/s over those of the first row, median over the timed spans of the same round.",
        f"loss: after the warm-up; up to {setting.tolerance:g} of difference is allowed in each of its steps.",
    ]
    if setting.device_bytes is not None:
        notes += [_PRECISION_NOTE, _PEAK_NOTE, _FLOOR_NOTE]
    title = f"A training step, {setting.sequence_length:,} tokens a sequence"
    return Table(title, [*columns, "p20-p80", "loss", "remark"], lines, "\n".join(notes))


def _cell(result: Mapping[str, Any], key: str, factor: float = 1) -> str | float:
    if "ms_per_step" not in result:
        return _NO_SPEED
    value = result.get(key)
    return _NOT_APPLICABLE if value is None else value * factor


def _floor_table(ceilings: Ceilings, row: Row, setting: Setting) -> Table:
    tokens = row.sequences * setting.sequence_length
    parts = ceilings.floor_s(setting.model, tokens)
    attention = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in ceilings.attention_s.items())
    note = (
        f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s; matmul {ceilings.matmul_flops_per_s / 1e12:.0f} TFLOP/s at "
        f"8192^3, {ceilings.gemm_flops_per_s(setting.model) / 1e12:.0f} on the model's shapes; attention of a "
        f"micro-batch, ms: {attention}"
    )
    cells: list[str | float | None] = ["ms", *(1e3 * seconds for seconds in parts.values()), 1e3 * sum(parts.values())]
    return Table(f"The least time of a step of {tokens:,} tokens", ["", *parts, "sum"], [cells], note)


def facts(rows: Sequence[Row], setting: Setting) -> dict[str, Any]:
    """What the JSON says beside the rows."""
    ceilings = None
    if setting.ceilings is not None:
        tokens = rows[0].sequences * setting.sequence_length
        ceilings = asdict(setting.ceilings) | {
            "floor_s": setting.ceilings.floor_s(setting.model, tokens),
            "gemm_flops_per_s": setting.ceilings.gemm_flops_per_s(setting.model),
        }
    return {
        "model": asdict(setting.model),
        "tokens_per_step": rows[0].sequences * setting.sequence_length,
        "loss_tolerance": setting.tolerance,
        "device_bytes": setting.device_bytes,
        "ceilings": ceilings,
        "fixed_part_of_a_step": fixed_step_s({row.key: row for row in rows}, setting.sequence_length),
        "goals": [
            asdict(goal) | {"verdict": goal.verdict}
            for goal in (goals(rows, setting) if setting.device_bytes is not None else [])
        ],
    }


def draw(found: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Bars of tokens/s."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [result for result in found if "tokens_per_s" in result]
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [result["name"] for result in shown]
    colours = ["#1f4e79" if name.startswith("ours") else "#9aa5b1" for name in names]
    bars = axes.barh(names, [result["tokens_per_s"] for result in shown], color=colours)
    axes.bar_label(bars, [_bar_label(result) for result in shown], padding=4)
    axes.margins(x=0.25)  # room for the figures
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of one device, median")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _bar_label(result: Mapping[str, Any]) -> str:
    speed = f"{result['tokens_per_s']:,.0f}"
    return speed if result["mfu"] is None else f"{speed}, MFU {result['mfu']:.1%}"

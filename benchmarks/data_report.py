"""Tables, goals and picture of the data benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import device_name
from benchmarks.table import Table

_SHARE_OF_LIMIT, _TIMES_PEERS = 0.75, 10
PASS, MISSED, NOT_MEASURED = "pass", "fail", "not measured"


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the list of goals."""

    text: str
    needed: float
    measured: float | None
    is_upper_bound: bool = False

    @property
    def verdict(self) -> str:
        """Whether it is reached."""
        if self.measured is None:
            return NOT_MEASURED
        reached = self.measured <= self.needed if self.is_upper_bound else self.measured >= self.needed
        return PASS if reached else MISSED


def goals_table(goals: Sequence[Goal]) -> Table:
    """The goals, and what was measured of each."""
    return Table(
        "Goals",
        ["goal", "needed", "measured", "verdict"],
        [[g.text, f"{'<=' if g.is_upper_bound else '>='} {g.needed:g}", g.measured, g.verdict] for g in goals],
    )


def encode_goals(
    ours: Mapping[str, Any],
    limit: Mapping[str, Any],
    ratios: Mapping[str, float | None],
    peers: Sequence[str] | Mapping[str, Any],
) -> list[Goal]:
    """Of the section encode."""
    of_ours = ratios[limit["name"]]
    return [
        Goal("JSON lines to shards, MB/s", 30, ours.get("mb_per_s")),
        Goal("share of the encoder alone", _SHARE_OF_LIMIT, of_ours),
        *(Goal(f"times {name}", _TIMES_PEERS, ratios[name]) for name in peers),
    ]


def pipeline_goals(ours: Mapping[str, Any]) -> list[Goal]:
    """Of the section pipeline."""
    peak_bytes = ours.get("peak_bytes")
    return [
        Goal("everything, MB/s", 12, ours.get("mb_per_s")),
        Goal("everything, peak MB", 1_000, None if peak_bytes is None else peak_bytes / 1e6, is_upper_bound=True),
    ]


def dedup_goals(found: Mapping[str, Any]) -> list[Goal]:
    """Of the section dedup."""
    return [
        Goal(f"reduce of {found['documents']:,} documents, s", 60, found["wall_s"], is_upper_bound=True),
        Goal("the same, peak MB", 1_500, found["peak_rss_bytes"] / 1e6, is_upper_bound=True),
    ]


def default_goals(found: Mapping[str, Any]) -> list[Goal]:
    """Of the section default."""
    return [
        Goal("default corpus, million tokens", 30, found["tokens"] / 1e6),
        Goal("default corpus, s for 30 million tokens", 20, 30e6 / found["tokens_per_s"], is_upper_bound=True),
    ]


def size_goals(sizes: Mapping[str, int]) -> list[Goal]:
    """Of the section size."""
    return [Goal("installed beyond torch, MB", 250, sum(sizes.values()) / 1e6, is_upper_bound=True)]


def ways_table(
    title: str, records: Sequence[Mapping[str, Any]], note: str, ratios: Mapping[str, float | None]
) -> Table:
    """Ways side by side."""
    columns = ["way", "MB", "s", "MB/s", "MB/CPU-s", "peak MB", "ours / row", "tokens"]
    rows: list[list[str | float | None]] = []
    for record in records:
        if "elapsed_s" not in record:
            rows.append([f"{record['name']}: {record['remark']}", *[""] * 7])
            continue
        size_mb, peak_bytes = record["text_bytes"] / 1e6, record["peak_bytes"]
        rows.append(
            [
                record["name"] + (f" ({record['encoder']})" if "encoder" in record else ""),
                size_mb,
                size_mb / record["mb_per_s"],
                record["mb_per_s"],
                record["mb_per_cpu_s"],
                None if peak_bytes is None else peak_bytes / 1e6,
                ratios[record["name"]],
                record["digest"],
            ]
        )
    return Table(title, columns, rows, f"{note}; s from the end of the imports, median; CPU with imports")


def copies_table(copies: Mapping[str, Mapping[str, int]]) -> Table:
    """What became of the planted copies."""
    outcomes = ("exact duplicate", "near duplicate", "filtered", "kept")
    return Table(
        "Planted copies, by the share of words that were changed",
        ["copies", *outcomes],
        [[sort, *(counts.get(outcome, 0) for outcome in outcomes)] for sort, counts in copies.items()],
    )


def steps_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each step alone, by kind of text."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    speed = {(row["step"], row["kind"]): row["mb_per_cpu_s"] for row in rows}
    steps = list(dict.fromkeys(row["step"] for row in rows))
    return Table(
        "Steps alone, on one core: MB of text per CPU second",
        ["step", *kinds],
        [[step, *(speed[step, kind] for kind in kinds)] for step in steps],
    )


def draw(encode: Sequence[Mapping[str, Any]], pipeline: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of MB/s."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [
        (record["name"], record["mb_per_s"])
        for record in (*encode, *({**record, "name": f"{record['name']}: everything"} for record in pipeline))
        if "mb_per_s" in record
    ]
    figure = Figure(figsize=(8, 1 + 0.4 * len(measured)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ["#1f4e79" if name.startswith("ours") else "#9aa5b1" for name, _ in measured]
    bars = axes.barh([name for name, _ in measured], [speed for _, speed in measured], color=colours)
    axes.bar_label(bars, fmt="{:,.1f}", padding=4)
    axes.margins(x=0.15)  # room for the figures
    axes.invert_yaxis()
    axes.set_xlabel("MB of text per second, median")
    axes.set_title(device_name(), fontsize=10)
    figure.savefig(path, dpi=120)

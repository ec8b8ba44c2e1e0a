"""A run's report: report.md, loss.png and, of a mixture, experts.png from what the run folder holds.

python -m evaluation.report runs/demo
"""

import json
import statistics
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.config_file import from_table
from model.config import ModelConfig
from model.flops import flops_per_token, num_active_params, num_params
from resume import checkpoint


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, in order; a line cut off by a kill is left out."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def write_report(run: Path) -> Path:
    """Writes report.md and its pictures into the run folder and returns the report's path.

    Raises:
        ValueError: the run has trained no step yet.
    """
    records = read_metrics(run)
    logged = [record for record in records if "loss" in record]
    steps = [record for record in logged if record["loss"] is not None]
    validations = [record for record in records if record.get("validation_loss") is not None]
    if not steps:
        raise ValueError(f"{run}/metrics.jsonl has no trained step; nothing to report")
    draw_loss(run / "loss.png", steps, validations)
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    if any(_has_loads(record) for record in steps):
        draw_loads(run / "experts.png", steps)
    lines = _lines(run, config, steps, validations, num_skipped=len(logged) - len(steps))
    report = run / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report


def draw_loss(path: Path, steps: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]) -> None:
    """Draws training loss by tokens, its running median, and the validation losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = {record["step"]: record["tokens_seen"] for record in steps} | {0: 0}
    x = [record["tokens_seen"] / 1e6 for record in steps]
    losses = [record["loss"] for record in steps]
    half = max(1, len(losses) // 100)
    smooth = [statistics.median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, losses, color="#b0c4de", linewidth=0.8, label="training, each step")
    axes.plot(x, smooth, color="#1f4e79", linewidth=1.5, label="training, running median")
    known = [record for record in validations if record["step"] in tokens]
    axes.plot(
        [tokens[record["step"]] / 1e6 for record in known],
        [record["validation_loss"] for record in known],
        "o-",
        color="#c0504d",
        markersize=4,
        label="held out",
    )
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _has_loads(record: dict[str, Any]) -> bool:
    return "load" in record.get("experts", {})


def draw_loads(path: Path, steps: Sequence[dict[str, Any]]) -> None:
    """Draws, of each layer with experts, every expert's load over the steps that have it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [record for record in steps if _has_loads(record)]
    layers, num_experts = known[0]["experts"]["layers"], len(known[0]["experts"]["load"][0])
    # Each is drawn up to the next one, the last as wide as a step.
    edges = [record["step"] for record in known] + [known[-1]["step"] + 1]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes in grid.flat[len(layers) :]:
        axes.set_axis_off()
    for index, (layer, axes) in enumerate(zip(layers, grid.flat, strict=False)):
        loads = [[num_experts * r["experts"]["load"][index][e] for r in known] for e in range(num_experts)]
        places = [e - 0.5 for e in range(num_experts + 1)]
        image = axes.pcolormesh(edges, places, loads, cmap="RdBu_r", vmin=0, vmax=2)
        axes.set_title(f"layer {layer}", fontsize=9)
    grid.flat[0].invert_yaxis()  # of all, as they share it
    figure.supxlabel("step")
    figure.supylabel("expert")
    assert image is not None  # there is at least one layer
    figure.colorbar(image, ax=grid, label="load / mean load", extend="max")
    figure.savefig(path, dpi=120)


def _expert_lines(steps: Sequence[dict[str, Any]]) -> list[str]:
    """The experts of a mixture at the last step, by layer with experts."""
    experts = steps[-1].get("experts")
    if experts is None:
        return []
    columns = [experts[name] for name in ("layers", "max_violation", "dead", "would_drop", "entropy")]
    rows = [
        f"| {layer} | {violation:.3f} | {dead} | {drop:.2%} | {entropy:.3f} |"
        for layer, violation, dead, drop, entropy in zip(*columns, strict=True)
    ]
    return [
        "## Experts",
        "",
        *(["![load of the experts](experts.png)", ""] if any(_has_loads(record) for record in steps) else []),
        "At the last step, of each layer with experts: the busiest expert's load over the mean, less one (MaxVio); "
        "experts without a token; picks that a capacity of 1.25 times the mean load would drop; entropy of the "
        "router's scores in nats.",
        "",
        "| layer | MaxVio | dead | would drop | entropy |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _lines(
    run: Path,
    config: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    validations: Sequence[dict[str, Any]],
    num_skipped: int,
) -> list[str]:
    model = from_table(config["model"], ModelConfig, "model")
    last = steps[-1]
    newest = checkpoint.latest(run)
    speed = statistics.median(record["tokens_per_s_per_device"] for record in steps)
    utilisation = [record["mfu"] for record in steps if record.get("mfu") is not None]
    facts = [
        (
            "parameters",
            f"{num_params(model):,}" + (f", {num_active_params(model):,} active" if model.expert_layers else ""),
        ),
        ("model FLOPs per token", f"{flops_per_token(model, config['data']['sequence_length']):.4g}"),
        ("steps", f"{last['step']:,} of {config['run']['num_steps']:,}, {num_skipped} skipped by the guard"),
        ("tokens seen", f"{last['tokens_seen']:,} ({last['epoch']:.3f} epochs)"),
        ("last training loss", f"{last['loss']:.4f}"),
        ("tokens/s per device, median", f"{speed:,.0f}"),
        ("MFU, median", f"{statistics.median(utilisation):.1%}" if utilisation else "n/a (peak of the device unknown)"),
        ("peak memory", f"{max(record['memory_gib'] for record in steps):.1f} GiB per process"),
        ("newest checkpoint", newest.name if newest else "none"),
    ]
    table = [f"| {name} | {value} |" for name, value in facts]
    held_out = [
        f"| {r['step']:,} | {r['validation_loss']:.4f} | {r['validation_perplexity']:,.2f} "
        f"| {r['validation_bits_per_byte']:.4f} |"
        for r in validations
    ]
    return [
        f"# Run {run.name}",
        "",
        "| | |",
        "| --- | --- |",
        *table,
        "",
        "![loss](loss.png)",
        "",
        "## Held-out text",
        "",
        "| step | loss | perplexity | bits/byte |",
        "| ---: | ---: | ---: | ---: |",
        *held_out,
        "",
        *_expert_lines(steps),
        "The config is in config.toml, every step in metrics.jsonl, curves in tensorboard/.",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report of the run folder given as the only argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m evaluation.report RUN\n\n" + (__doc__ or ""))
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_report(Path(arguments[0])))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

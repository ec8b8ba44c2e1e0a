"""A run's report: report.html, one page that loads nothing, from what the run folder holds.

python -m evaluation.report runs/demo
python -m evaluation.report runs/demo --golden golden/demo.json         exit code 1 if the run left the golden band
"""

import importlib.metadata
import json
import platform
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep import command_line, publish
from data_prep.config_file import from_table
from data_prep.looking.html_parts import Markup, element, facts, folded, joined, page, table
from evaluation.golden import Comparison, Golden, compare, config_differences, read_golden
from evaluation.metrics_file import read_metrics
from evaluation.report_curves import Line, curves, heat_map
from evaluation.sweep import MEASURES, read_results
from model.config import ModelConfig
from model.flops import flops_per_token, num_active_params, num_params

Records = Sequence[Mapping[str, Any]]

_CURVES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s_per_device": "tokens/s per device",
    "mfu": "MFU",
    "memory_gib": "peak memory, GiB",
    "step_s": "seconds a step",
}
_SLOW, _MOST_ROWS = 3.0, 40
_PACKAGES = ("torch", "triton", "numpy", "tokenizers", "safetensors")


def write_report(run: Path, golden: Golden | None = None) -> Path:
    """Writes report.html into the run folder and returns its path.

    Raises:
        ValueError: the run has trained no step yet, or has none in common with the golden run.
    """
    records = read_metrics(run)
    logged = [record for record in records if "loss" in record]
    steps = [record for record in logged if record["loss"] is not None]
    if not steps:
        raise ValueError(f"{run}/metrics.jsonl has no trained step; nothing to report")
    text = (run / "config.toml").read_text(encoding="utf-8")
    content = [
        element("h1", f"Run {run.name}"),
        _summary(run, tomllib.loads(text), steps, len(logged) - len(steps)),
        _comparison(run, golden) if golden is not None else "",
        element("h2", "Curves"),
        _curves(records, steps, golden),
        *_held_out(records),
        *_experts(steps),
        *_data(run),
        *_evaluations(run),
        *_anomalies(records, steps),
        element("h2", "Config and environment"),
        folded("config.toml", element("pre", text)),
        folded("packages, where this page was written", facts(_environment())),
        element("p", "Every step is in metrics.jsonl, curves to zoom into are in tensorboard/.", of="note"),
    ]
    report = run / "report.html"
    publish.write_text(report, page(f"Run {run.name}", *content))
    return report


def _summary(run: Path, config: Mapping[str, Any], steps: Records, num_skipped: int) -> Markup:
    from resume import checkpoint  # which imports torch, as --help should not

    model, last, newest = from_table(config["model"], ModelConfig, "model"), steps[-1], checkpoint.latest(run)
    speed = statistics.median(record["tokens_per_s_per_device"] for record in steps)
    utilisation = [record["mfu"] for record in steps if record.get("mfu") is not None]
    active = f", {num_active_params(model):,} active" if model.expert_layers else ""
    return facts(
        [
            ("parameters", f"{num_params(model):,}{active}"),
            ("model FLOPs per token", f"{flops_per_token(model, config['data']['sequence_length']):.4g}"),
            ("steps", f"{last['step']:,} of {config['run']['num_steps']:,}, {num_skipped} skipped by the guard"),
            ("tokens seen", f"{last['tokens_seen']:,} ({last['epoch']:.3f} epochs)"),
            ("last training loss", f"{last['loss']:.4f}"),
            ("tokens/s per device, median", f"{speed:,.0f}"),
            ("MFU, median", f"{statistics.median(utilisation):.1%}" if utilisation else "n/a (peak not known)"),
            ("peak memory", f"{max(record['memory_gib'] for record in steps):.1f} GiB per process"),
            ("newest checkpoint", newest.name if newest else "none"),
        ]
    )


def verdict(comparison: Comparison) -> str:
    """How one curve lies in its band, as a sentence."""
    name, num_compared, outside = comparison.name, comparison.num_compared, comparison.outside
    if not outside:
        return f"{name}: inside the golden band at all {num_compared:,} steps compared"
    first = f"first at step {outside[0]:,}"
    return f"{name}: OUTSIDE the golden band at {len(outside):,} of {num_compared:,} steps compared, {first}"


def _comparison(run: Path, golden: Golden) -> Markup:
    lines = [verdict(comparison) for comparison in compare(run, golden)]
    differing = [f"config differs in {text}" for text in config_differences(run, golden)]
    items = [element("li", line) for line in (*lines, *differing)]
    return joined([element("h2", f"Beside the golden run ({', '.join(golden.runs)})"), element("ul", *items)])


def _curves(records: Records, steps: Records, golden: Golden | None) -> Markup:
    band = golden.bands["loss"].places if golden is not None else ()
    losses = [record["loss"] for record in steps]
    half = max(1, len(losses) // 100)
    medians = [statistics.median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    of_loss = [
        Line("each step", _points(steps, "loss"), is_faint=True),
        Line("running median", [(record["step"], y) for record, y in zip(steps, medians, strict=True)]),
        Line("held out", _points(records, "validation_loss")),
    ]
    means = dict.fromkeys(name for record in steps for name in record.get("means", {}))
    of_means = [
        [(record["step"], record["means"].get(name)) for record in steps if "means" in record] for name in means
    ]
    held_out = dict.fromkeys(key for record in records for key in record if key.startswith("validation_"))
    return joined(
        [
            curves("loss by step", of_loss, band),
            *(
                curves(name, [Line(name, [(x, y) for x, y in points if y is not None])])
                for name, points in zip(means, of_means, strict=True)
            ),
            *(
                curves(name.replace("_", " "), [Line(name, _points(records, name))])
                for name in held_out
                if name not in ("validation_loss", "validation_perplexity")
            ),
            *(curves(title, [Line(title, _points(steps, name))]) for name, title in _CURVES.items()),
        ]
    )


def _points(records: Records, name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if isinstance(record.get(name), int | float)]


def _held_out(records: Records) -> Iterator[Markup]:
    validations = [record for record in records if record.get("validation_loss") is not None]
    if not validations:
        return
    names = [key for key in validations[-1] if key.startswith("validation_")]
    rows = [[f"{r['step']:,}", *(f"{r.get(name, float('nan')):,.4f}" for name in names)] for r in validations]
    yield element("h2", "Held out")
    yield table(["step", *(name.removeprefix("validation_").replace("_per_", "/") for name in names)], rows)


def _experts(steps: Records) -> Iterator[Markup]:
    known = [record for record in steps if "experts" in record]
    if not known:
        return
    layers = known[-1]["experts"]["layers"]
    yield element("h2", "Experts")
    yield element(
        "p",
        "Of each layer with experts: the busiest expert's load over the mean, less one (MaxVio); at the last step also "
        "experts without a token, picks that a capacity of 1.25 times the mean load would drop, and the entropy of the "
        "router's scores in nats.",
        of="note",
    )
    yield curves(
        "MaxVio by step",
        [
            Line(f"layer {layer}", [(r["step"], r["experts"]["max_violation"][i]) for r in known])
            for i, layer in enumerate(layers)
        ],
    )
    last = [known[-1]["experts"][name] for name in ("layers", "max_violation", "dead", "would_drop", "entropy")]
    yield table(["layer", "MaxVio", "dead", "would drop", "entropy"], zip(*last, strict=True))
    loads = [record["experts"]["load"] for record in known if "load" in record["experts"]]
    if loads:
        yield element("p", "Each expert's load over the mean, a row an expert, over the steps that have it.", of="note")
    for i, layer in enumerate(layers if loads else ()):
        yield heat_map(f"layer {layer}", [[len(of_step[i]) * share for share in of_step[i]] for of_step in loads])


def _data(run: Path) -> Iterator[Markup]:
    from resume.checkpoint import CheckpointError
    from resume.manifest import DataError
    from resume.report import status
    from resume.runs import open_run

    yield element("h2", "Data")
    try:
        values = status(open_run(run))
    except (DataError, CheckpointError) as error:
        yield element("p", f"Not known: {error}", of="note")
        return
    columns = ("source", "files", "removed_files", "tokens", "share", "epochs")
    yield table(columns, ([source[name] for name in columns] for source in values["sources"]))
    yield table(["event", "step", "what"], ([e["kind"], e["step"], e["what"]] for e in values["events"]))
    found = [*values["quarantined"], *values["pending"]]
    yield element("p", f"{len(values['quarantined'])} samples quarantined, {len(values['pending'])} requests wait.")
    if found:
        yield element("pre", "\n".join(json.dumps(entry) for entry in found[:_MOST_ROWS]))


def _evaluations(run: Path) -> Iterator[Markup]:
    results = list(read_results(run))
    files = sorted(run.glob("eval*/**/results.json"))
    if results or files:
        yield element("h2", "Evaluation")
    for measure in MEASURES:
        points: dict[str, list[tuple[float, float]]] = {}
        for result in sorted(results):
            for name, value in _figures(result.figures):
                if name.rpartition(".")[2] == measure:
                    points.setdefault(f"{result.task} {name.rpartition('.')[0]}", []).append((result.step, value))
        yield curves(f"{measure} by step", [Line(name, found) for name, found in points.items()])
    newest = max((result.step for result in results), default=None)
    for result in results:
        if result.step == newest:
            yield folded(f"{result.task}, step {result.step:,}", table(["figure", "value"], _figures(result.figures)))
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        yield folded(str(file.relative_to(run)), table(["figure", "value"], _figures(figures)))


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested tables, each with the keys that lead to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _figures(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, round(float(value), 4)


def _anomalies(records: Records, steps: Records) -> Iterator[Markup]:
    events = [record for record in records if "event" in record]
    usual_s = statistics.median(record["step_s"] for record in steps)
    slow = [record for record in steps[1:] if record["step_s"] > _SLOW * usual_s]
    yield element("h2", "Anomalies")
    yield element(
        "p",
        f"{len(events)} events of the guard and of saving; {len(slow)} steps took more than {_SLOW:g} times the "
        f"median of {usual_s:.3g} s, beside the first.",
    )
    if events:
        yield table(
            ["step", "event", "cause"],
            ([r["step"], "noted" if r["event"] == "apply" else r["event"], r["cause"]] for r in events[-_MOST_ROWS:]),
        )
    if slow:
        slowest = sorted(slow, key=lambda record: -record["step_s"])[:_MOST_ROWS]
        yield table(["step", "seconds"], ([r["step"], r["step_s"]] for r in sorted(slowest, key=lambda r: r["step"])))


def _environment() -> list[tuple[str, object]]:
    found = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    versions = [(name, importlib.metadata.version(name)) for name in _PACKAGES if name in found]
    return [("python", platform.python_version()), ("system", platform.platform()), *versions]


def report(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")], /, *, golden: Path | None = None
) -> int:
    """Writes the report of a run into its folder.

    Args:
        run: Run folder.
        golden: File of `python -m evaluation.golden`; the exit code is 1 if a curve of the run leaves its band.
    """
    band = read_golden(golden) if golden is not None else None
    print(write_report(run, band))
    comparisons = compare(run, band) if band is not None else []
    for comparison in comparisons:
        print(verdict(comparison))
    return int(any(comparison.outside for comparison in comparisons))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        return command_line.read(report, argv, prog="python -m evaluation.report")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""What the curves of a run should look like: a band around the median of one or several runs that were good.

python -m evaluation.golden runs/demo --out golden/demo.json
python -m evaluation.golden runs/seed-1 runs/seed-2 runs/seed-3 --out golden/demo.json
python -m evaluation.report runs/mine --golden golden/demo.json

At each step the middle of the band is the median m over a window of neighbouring steps of all runs, and the band is
m plus and minus the larger of two standard deviations of these values and a hundredth of m. A run is inside if its own
running median is, at every step that both have: batches are noisy, medians of them less so.
"""

import json
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep import command_line, publish
from evaluation.metrics_file import read_metrics

FORMAT = "bessemer-golden/1"
NUM_DEVIATIONS, LEAST_SHARE = 2.0, 0.01
# Of all steps, those on either side of one; fewer than the least number tell too little of the noise.
_WINDOW_SHARE, _LEAST_HALF_WINDOW = 0.02, 10
_MOST_PLACES = 500
# Curves that must be alike, and whether they are noisy.
_CURVES = {"loss": True, "validation_loss": False}
# Where a run lies and how it is computed, which its curves do not depend on.
_LOCAL = ("run.dir", "run.keep_", "run.async_save", "run.hang_", "data.paths", "data.search", "parallel.", "kernels.")


class GoldenError(ValueError):
    """A golden file, or a run for one, cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Band:
    """Where a curve should be: at each of some steps, low and high; medians are over steps up to half_window away."""

    half_window: int
    places: list[tuple[int, float, float]]


@dataclass(frozen=True, slots=True)
class Golden:
    """The bands of a golden run's curves, by name, and its config as `section.key` -> value."""

    runs: list[str]
    config: dict[str, Any]
    bands: dict[str, Band]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one curve of a run lies in its band."""

    name: str
    num_compared: int
    outside: list[int]
    """Steps, in order."""


def golden_of(runs: Sequence[Path]) -> Golden:
    """The bands of one run or several.

    Raises:
        GoldenError: a run has trained no step, or the runs' configs differ in what their curves depend on.
    """
    curves = [_curves(run) for run in runs]
    configs = [_flat_config(run) for run in runs]
    for run, config, curve in zip(runs, configs, curves, strict=True):
        if not curve["loss"]:
            raise GoldenError(f"{run}: no trained step in metrics.jsonl; train it first")
        if differing := [key for key in differences(configs[0], config) if key != "run.seed"]:
            raise GoldenError(f"{run} and {runs[0]} differ in {', '.join(differing)}; a band is of runs of one config")
    bands = {name: _band([curve[name] for curve in curves], is_noisy) for name, is_noisy in _CURVES.items()}
    return Golden([run.name for run in runs], configs[0], {name: band for name, band in bands.items() if band.places})


def compare(run: Path, golden: Golden) -> list[Comparison]:
    """How the run's curves lie in the bands, a comparison for each that both have.

    Raises:
        GoldenError: they have no step in common.
    """
    curves, compared = _curves(run), []
    for name, band in golden.bands.items():
        known = [
            (step, low <= median <= high)
            for step, low, high in band.places
            if (median := _median(curves[name], step, band.half_window)) is not None
        ]
        compared.append(Comparison(name, len(known), [step for step, is_inside in known if not is_inside]))
    if not any(comparison.num_compared for comparison in compared):
        raise GoldenError(f"{run}: no step of it is one of the golden run's; compare runs of one config")
    return compared


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys of two flat configs whose values differ, but for what curves do not depend on."""
    keys = sorted(one.keys() | other.keys())
    return [key for key in keys if one.get(key) != other.get(key) and not key.startswith(_LOCAL)]


def config_differences(run: Path, golden: Golden) -> list[str]:
    """What differs between the configs of a run and of the golden one, as text."""
    config = _flat_config(run)
    return [
        f"{key}: {config.get(key)!r}, golden {golden.config.get(key)!r}" for key in differences(config, golden.config)
    ]


def write_golden(path: Path, golden: Golden) -> None:
    """Writes a golden file; it appears whole."""
    bands = {name: {"half_window": band.half_window, "places": band.places} for name, band in golden.bands.items()}
    table = {"format": FORMAT, "runs": golden.runs, "config": golden.config, "bands": bands}
    publish.make_folder(path.absolute().parent)
    publish.write_text(path, json.dumps(table) + "\n")


def read_golden(path: Path) -> Golden:
    """Reads a golden file.

    Raises:
        GoldenError: it is none.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT:
            raise GoldenError(f"{path}: format {table['format']!r}, expected {FORMAT!r}")
        bands = {
            name: Band(band["half_window"], [(step, low, high) for step, low, high in band["places"]])
            for name, band in table["bands"].items()
        }
        return Golden(table["runs"], table["config"], bands)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise GoldenError(
            f"{path}: not a golden file ({error}); write one with `python -m evaluation.golden RUN --out {path}`"
        ) from error


def _curves(run: Path) -> dict[str, dict[int, float]]:
    """Of each curve its finite values by step."""
    records = read_metrics(run)
    return {name: {r["step"]: r[name] for r in records if r.get(name) is not None} for name in _CURVES}


def _flat_config(run: Path) -> dict[str, Any]:
    def flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in table.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    try:
        return flat(tomllib.loads((run / "config.toml").read_text(encoding="utf-8")), "")
    except OSError as error:
        raise GoldenError(f"{run}: not a run folder, it has no config.toml ({error.strerror})") from error


def _band(curves: Sequence[Mapping[int, float]], is_noisy: bool) -> Band:
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    half_window = max(_LEAST_HALF_WINDOW, int(len(steps) * _WINDOW_SHARE)) if is_noisy else 0
    places = []
    for step in steps[:: -(-len(steps) // _MOST_PLACES) or 1]:
        window = range(step - half_window, step + half_window + 1)
        values = [curve[near] for curve in curves for near in window if near in curve]
        middle = statistics.median(values)
        half = max(NUM_DEVIATIONS * statistics.pstdev(values), LEAST_SHARE * abs(middle))
        places.append((step, middle - half, middle + half))
    return Band(half_window, places)


def _median(curve: Mapping[int, float], step: int, half_window: int) -> float | None:
    if step not in curve:
        return None
    return statistics.median(curve[near] for near in range(step - half_window, step + half_window + 1) if near in curve)


def make_golden(
    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")], /, *, out: Path
) -> None:
    """Writes the band of one run or several of one config.

    Args:
        runs: Run folders; of several seeds the band is how they differ.
        out: File to write.
    """
    if not runs:
        raise GoldenError("name at least one run folder")
    write_golden(out, golden_of(runs))
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command_line.read(make_golden, argv, prog="python -m evaluation.golden")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page of a run: what it shows, of whatever kind of run, and that nothing in it is from elsewhere."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config_file import to_toml
from evaluation import report
from evaluation.report import write_report
from evaluation.report_curves import Line, curves, heat_map
from tests.prepared import write_data
from tests.runs import tiny_run
from train import pretrain
from train.config import RunConfig


class Page(HTMLParser):
    """Collects what a browser would show, and refuses what is not well-formed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        assert tag not in ("script", "link", "img", "iframe")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "circle")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.headings if self.open and self.open[-1] == "h2" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def step_of(step: int, loss: float | None, **others: Any) -> dict[str, Any]:
    """A step's record as a run logs it."""
    return {
        "step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s_per_device": 1000.0,
        "mfu": None, "memory_gib": 1.5, "step_s": 0.5, "tokens_seen": 2_048 * step, "epoch": 0.1 * step,
        "skipped": loss is None, **others,
    }  # fmt: skip


def run_of(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    """A run folder with these records and the default config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(RunConfig()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text())


def test_the_page_of_a_real_run_shows_its_curves_its_data_and_its_config(tmp_path: Path):
    config = tiny_run(write_data(tmp_path / "data"), tmp_path / "run", run={"num_steps": 2})
    assert pretrain.pretrain(config) == 0
    page = page_of(tmp_path / "run")
    assert page.headings == ["Curves", "Held out", "Data", "Anomalies", "Config and environment"]
    assert "steps 2 of 2, 0 skipped by the guard" in page.text
    assert "newest checkpoint step-2" in page.text
    for title in ("loss by step", "learning rate", "gradient norm", "tokens/s per device", "validation bits per byte"):
        assert title in page.text
    assert "0 samples quarantined" in page.text
    assert "num_steps = 2" in page.text


def test_what_an_objective_measures_beside_the_loss_has_curves(tmp_path: Path):
    means = [{"dpo/margin": 0.1 * step, "dpo/accuracy": 0.5} for step in range(1, 6)]
    run = run_of(tmp_path / "run", (step_of(i, 0.6, means=of_step) for i, of_step in enumerate(means, start=1)))
    text = page_of(run).text
    assert "dpo/margin" in text
    assert "dpo/accuracy" in text


def test_events_slow_steps_and_skipped_steps_are_told(tmp_path: Path):
    records = [step_of(step, 2.0, step_s=9.0 if step == 7 else 0.5) for step in range(1, 12)]
    records[3]["loss"] = None
    spike = {"step": 9, "event": "apply", "cause": "spike: loss <9>", "first_sample": 1, "last_sample": 2}
    lost = {"step": 10, "event": "save failed", "cause": "disk full"}
    text = page_of(run_of(tmp_path / "run", [*records, spike, lost])).text
    assert "steps 11 of 10,000, 1 skipped by the guard" in text
    assert "2 events of the guard and of saving; 1 steps took more than 3 times the median of 0.5 s" in text
    assert "9 noted spike: loss <9> 10 save failed disk full" in text
    assert "7 9.00" in text
    assert "Not known: " in text  # of data that no checkpoint tells of


def test_experts_have_loads_by_layer(tmp_path: Path):
    experts = {
        "layers": [1, 3], "penalty": 0.1, "max_violation": [0.5, 0.25], "dead": [0, 1], "would_drop": [0.0, 0.1],
        "entropy": [1.2, 1.3], "z": [0.1, 0.1], "load": [[0.25, 0.75], [0.5, 0.5]],
    }  # fmt: skip
    page = page_of(run_of(tmp_path / "run", [step_of(step, 2.0, experts=experts) for step in (1, 2)]))
    assert "Experts" in page.headings
    assert "3 0.25 1 0.10 1.30" in page.text
    assert page.text.count("layer 3") == 2  # a curve and a heat map


def test_evaluations_in_the_run_folder_are_shown(tmp_path: Path):
    run = run_of(tmp_path / "run", [step_of(1, 2.0)])
    lines = [
        {"step": step, "checkpoint": "x", "task": "domains=texts", "figures": {"wiki": {"bits_per_byte": 1 / step}}}
        for step in (100, 200)
    ]
    (run / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "eval" / "mmlu").mkdir(parents=True)
    (run / "eval" / "mmlu" / "results.json").write_text(json.dumps({"mmlu": {"accuracy": 0.31, "note": "x"}}))
    page = page_of(run)
    assert "Evaluation" in page.headings
    assert "bits_per_byte by step" in page.text
    assert "domains=texts, step 200 figure value wiki.bits_per_byte 0.01" in page.text
    assert "eval/mmlu/results.json figure value mmlu.accuracy 0.31" in page.text


def test_a_run_without_steps_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tmp_path / "run", [{"step": 0, "validation_loss": 1.0}])
    assert report.main([str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run}/metrics.jsonl has no trained step; nothing to report\n"


@pytest.mark.parametrize("module", ["report", "golden"])
def test_help_is_instant(module: str):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = subprocess.run([sys.executable, "-m", f"evaluation.{module}", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.returncode == 0
    assert "usage: python -m evaluation." in found.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=60), st.booleans())
def test_every_curve_lies_inside_its_picture(values: list[float], is_faint: bool):
    picture = curves("title <&>", [Line("line", list(enumerate(values)), is_faint), Line("none", [])])
    places = re.findall(r"[ML](-?[\d.e+]+) (-?[\d.e+]+)", picture)
    assert all(0 <= float(x) <= 560 and 0 <= float(y) <= 250 for x, y in places)
    assert "nan" not in picture
    Page(str(picture))


@given(st.integers(1_000, 5_000), st.data())
def test_a_spike_among_many_points_is_drawn(num_points: int, data: st.DataObject):
    spike = data.draw(st.integers(0, num_points - 1))
    picture = curves("loss", [Line("loss", [(i, 7.0 if i == spike else i % 3) for i in range(num_points)])])
    drawn = picture.split('stroke-width="1.5" d="')[1].split('"')[0].split("L")
    assert len(drawn) <= 802
    assert min(float(point.split()[1]) for point in drawn) == 22.0  # the top of the picture


def test_a_heat_map_shows_low_loads_blue_and_high_ones_red():
    picture = heat_map("layer 0", [[0.0, 1.0, 5.0]] * 200)
    assert len(re.findall(r"M\d+ 18h", picture)) <= 80
    shades = re.findall(r'fill="(#\w+)"', picture)
    assert shades == ["#2166ac", "#f7f7f7", "#b2182b"]
    Page(str(picture))

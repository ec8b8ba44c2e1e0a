"""The band of golden runs: who is inside, who is not, and from where on."""

import json
import math
import random
from pathlib import Path

import pytest

from evaluation import golden, report
from evaluation.golden import GoldenError, compare, config_differences, golden_of, read_golden, write_golden
from evaluation.report import write_report
from tests.evaluation.test_report import run_of, step_of

STEPS = 300


def run_with(folder: Path, seed: int, *, shift_from: int | None = None, shift: float = 0.3) -> Path:
    """A run whose loss falls with noise of 0.1, and, from a step on, lies higher than it should."""
    generator = random.Random(seed)
    records = []
    for step in range(1, STEPS + 1):
        loss = 3 + 5 * math.exp(-step / 40)
        loss += shift if shift_from is not None and step >= shift_from else 0.0
        records.append(step_of(step, loss + generator.gauss(0, 0.1)))
        if step % 100 == 0:
            records.append({"step": step, "validation_loss": loss + generator.gauss(0, 0.005)})
    return run_of(folder, records)


def change(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return run_with(tmp_path / "good", 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_differs_by_its_noise_is_inside(good: Path, tmp_path: Path, seed: int):
    other = run_with(tmp_path / "other", seed)
    assert [len(found.outside) for found in compare(other, golden_of([good]))] == [0, 0]


@pytest.mark.parametrize("shift", [0.35, -0.35])
def test_a_run_that_leaves_the_band_is_told_where(good: Path, tmp_path: Path, shift: float):
    other = run_with(tmp_path / "other", 1, shift_from=150, shift=shift)
    of_loss, of_validation = compare(other, golden_of([good]))
    assert of_loss.name == "loss"
    assert 140 <= of_loss.outside[0] <= 160
    assert len(of_loss.outside) > 0.8 * (STEPS - 150)
    assert of_validation.outside == [200, 300]


def test_several_runs_make_a_band_as_wide_as_they_differ(tmp_path: Path):
    low, high = run_with(tmp_path / "low", 0), run_with(tmp_path / "high", 1, shift_from=1, shift=1.0)
    between = run_with(tmp_path / "between", 2, shift_from=1, shift=0.5)
    assert any(found.outside for found in compare(between, golden_of([low])))
    assert not any(found.outside for found in compare(between, golden_of([low, high])))


def test_one_wild_step_is_not_a_departure(good: Path, tmp_path: Path):
    other = run_with(tmp_path / "other", 1)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[200])
    lines[200] = json.dumps({**record, "loss": 50.0})
    (other / "metrics.jsonl").write_text("\n".join(lines))
    assert not any(found.outside for found in compare(other, golden_of([good])))


def test_a_run_that_is_not_over_is_compared_as_far_as_it_is(good: Path, tmp_path: Path):
    other = run_with(tmp_path / "other", 1)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    (other / "metrics.jsonl").write_text("\n".join(lines[:50]))
    of_loss, of_validation = compare(other, golden_of([good]))
    assert (of_loss.num_compared, of_validation.num_compared) == (50, 0)


def test_a_golden_file_is_read_back_as_it_was_written(good: Path, tmp_path: Path):
    made = golden_of([good])
    write_golden(tmp_path / "folder" / "golden.json", made)
    assert read_golden(tmp_path / "folder" / "golden.json") == made


def test_the_command_says_inside_or_outside_and_its_code_says_so_too(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = str(tmp_path / "golden.json")
    assert golden.main([str(good), "--out", file]) == 0
    assert report.main([str(good), "--golden", file]) == 0
    assert "loss: inside the golden band at all 300 steps compared" in capsys.readouterr().out
    other = run_with(tmp_path / "other", 1, shift_from=150)
    change(other, "peak_lr = 0.0004", "peak_lr = 0.01")
    assert report.main([str(other), "--golden", file]) == 1
    assert "validation_loss: OUTSIDE the golden band at 2 of 3 steps compared, first at step 200" in (
        capsys.readouterr().out
    )
    text = (other / "report.html").read_text()
    assert "Beside the golden run (good)" in text
    assert "config differs in optim.peak_lr: 0.01, golden 0.0004" in text


def test_the_band_is_drawn_below_the_loss(good: Path):
    assert "#e3d9b8" not in write_report(good).read_text()
    assert "#e3d9b8" in write_report(good, golden_of([good])).read_text()


def test_where_a_run_lies_and_how_it_is_computed_is_no_difference(good: Path, tmp_path: Path):
    other = run_with(tmp_path / "other", 1)
    change(other, 'dir = "runs/tinyllama-1.1b"', 'dir = "elsewhere"')
    change(other, 'recompute = "nothing"', 'recompute = "blocks"')
    assert config_differences(other, golden_of([good])) == []
    change(other, "seed = 3407", "seed = 1")
    assert config_differences(other, golden_of([good])) == ["run.seed: 1, golden 3407"]
    golden_of([good, other])  # seeds are what bands are made of


def test_what_cannot_be_compared_is_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = run_with(tmp_path / "other", 1)
    change(other, "num_layers = 22", "num_layers = 21")
    with pytest.raises(GoldenError, match=r"differ in model\.num_layers"):
        golden_of([good, other])
    with pytest.raises(GoldenError, match="no trained step"):
        golden_of([run_of(tmp_path / "empty", [])])
    with pytest.raises(GoldenError, match=r"no config\.toml"):
        golden_of([tmp_path / "nowhere"])
    with pytest.raises(GoldenError, match="no step of it"):
        compare(run_of(tmp_path / "later", [step_of(1_000, 1.0)]), golden_of([good]))
    (tmp_path / "bad.json").write_text('{"format": "other"}')
    for file in ("bad.json", "missing.json"):
        assert report.main([str(good), "--golden", str(tmp_path / file)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / file}: ")

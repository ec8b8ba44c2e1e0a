import io
import json
from pathlib import Path

import pytest

from benchmarks import gpu, training_check


def test_all_parts_together_take_less_than_nine_minutes():
    assert sum(limit_s for _, limit_s in gpu.PARTS.values()) <= 540


def test_a_part_is_logged_and_its_code_kept():
    log = io.StringIO()
    end = gpu.run_part("greeting", ["-c", "print('hello'); raise SystemExit(3)"], 30, log)
    assert (end["ended"], end["code"]) == ("code 3", 3)
    assert log.getvalue() == "greeting: hello\n"


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started():
    endless = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    end = gpu.run_part("endless", ["-c", endless], 1.0, io.StringIO())
    assert end["ended"] == "out of time"
    assert end["seconds"] < 20


def test_a_failed_part_does_not_keep_the_others_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = {"bad": (("-c", "raise SystemExit(7)"), 30.0), "good": (("-c", "print('{out}')"), 30.0)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 7
    ends = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]
    assert [ends[name]["ended"] for name in ("bad", "good")] == ["code 7", "ok"]
    assert f"good: {tmp_path / 'out'}" in (tmp_path / "out" / "gpu.log").read_text()


def test_a_missing_package_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(gpu, "_PACKAGES", ("torch", "nobody_wrote_this"))
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert "not installed: nobody_wrote_this;" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_configurations_are_compared_with_the_plainest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plainest, *_ = training_check.CONFIGURATIONS.items()
    chosen = {
        plainest[0]: plainest[1],
        "the same": {},
        "a rate that learns nothing": {"optim": {"peak_lr": 1e-9}},
        "no such attention": {"kernels": {"attention": "cudnn"}},
    }
    monkeypatch.setattr(training_check, "CONFIGURATIONS", chosen)
    monkeypatch.setattr(training_check, "_NUM_STEPS", 24)
    assert training_check.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*-training.json")
    verdicts = [row["verdict"] for row in json.loads(path.read_text())["rows"]]
    assert verdicts[:2] == ["agrees", "agrees"]
    assert verdicts[2].startswith("FAIL: expected")
    assert verdicts[3].startswith("FAIL: KernelError")
    assert "24 steps of one small run" in capsys.readouterr().out

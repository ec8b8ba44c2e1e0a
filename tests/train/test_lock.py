"""One run at a time in a run folder."""

import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.lives import Life, finished, lived
from tests.prepared import write_data
from tests.runs import tiny_run
from train import exits
from train.lock import LockedError, RunLock


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def test_a_folder_that_is_held_says_by_whom_and_is_free_afterwards(tmp_path: Path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(LockedError, match=f"in use by pid {os.getpid()} on {socket.gethostname()} since 2") as e:
            RunLock(tmp_path / "run")
        assert "--run.dir" in str(e.value)
        with RunLock(tmp_path / "other"):
            pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_folder_whose_holder_was_killed_is_free_at_once(tmp_path: Path):
    ready, told = os.pipe()
    if (pid := os.fork()) == 0:
        lock = RunLock(tmp_path)
        os.write(told, b"x")
        time.sleep(60)
        os._exit(0 if lock else 1)
    os.read(ready, 1)
    with pytest.raises(LockedError, match=f"pid {pid} on"):
        RunLock(tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / "lock").read_text()
    os.close(ready)
    os.close(told)


def test_a_file_system_without_locks_is_named_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockedError, match=r"lock: cannot be locked \(Function not implemented\).*Lustre: -o flock"):
        RunLock(tmp_path)


def test_what_a_longer_line_left_in_the_file_is_not_read_as_part_of_the_holder(tmp_path: Path):
    (tmp_path / "lock").write_text(
        "pid 1 on a-host-with-a-very-long-name since the beginning of time, and longer\n" * 9
    )
    with RunLock(tmp_path):
        assert (tmp_path / "lock").read_text().count("\n") == 1


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_second_run_in_the_folder_is_refused_at_once_and_the_first_does_not_notice(
    data: Path, tmp_path: Path, num_ranks: int
):
    finished(tiny_run(data, tmp_path / "alone", run={"num_steps": 12}))
    config = tiny_run(
        data, tmp_path / "run", run={"num_steps": 12}, debug={"inject": ("slow:rank=0,step=4,seconds=2",)}
    )
    with Life(config, 1) as first:
        first.until_step(3)
        others = tiny_run(data, tmp_path / "run", run={"num_steps": 12})
        started_s = time.monotonic()
        # What torchrun does when a rank fails: it asks the others to end.
        with Life(others, num_ranks) as second:
            second.until(lambda: second.codes[0] is not None, timeout_s=10)
            second.signal(signal.SIGTERM)
            codes = second.end(timeout_s=10)
        assert time.monotonic() - started_s < 10
        assert codes[0] == exits.CANNOT_WRITE
        assert f"in use by pid {first.pids[0]} on {socket.gethostname()} since " in second.err()
        assert first.codes == [None]
        assert first.end() == [exits.DONE]
    assert exits.read_end(tmp_path / "run")["code"] == exits.DONE
    same = [(tmp_path / name / "step-12" / "rank-00000.safetensors").read_bytes() for name in ("alone", "run")]
    assert same[0] == same[1]


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_leaves_no_lock_behind(data: Path, tmp_path: Path, step: int):
    config = tiny_run(data, tmp_path / "run", debug={"inject": (f"kill:rank=0,step={step}",)})
    assert lived(config).codes == [-signal.SIGKILL]
    assert (tmp_path / "run" / "lock").exists()
    finished(config)

"""Ranks that die, raise, hang or are stopped: which one is named, by whom, and how soon all have ended."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import publish
from data_prep.config_file import ConfigError, to_toml
from resume import checkpoint
from tests.lives import Life, finished
from tests.prepared import write_data
from tests.runs import tiny_run
from train import exits, watch
from train.config import RunConfig
from train.watch import LostRankError, Watch

ROOT = Path(__file__).parents[2]
SLOW_THREE = pytest.param(3, 1, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def long(data_folder: Path, run: Path, *faults: str, hang_timeout_s: float = 3.0) -> RunConfig:
    run_section: dict[str, Any] = {"num_steps": 10_000, "save_every": 10, "hang_timeout_s": hang_timeout_s}
    return tiny_run(data_folder, run, run=run_section, debug={"inject": faults})


# Through runs


@pytest.mark.parametrize(("num_ranks", "rank"), [(2, 0), (2, 1), SLOW_THREE])
def test_a_rank_that_is_killed_is_named_by_those_that_are_left(data: Path, tmp_path: Path, num_ranks: int, rank: int):
    run = tmp_path / "run"
    with Life(long(data, run, f"kill:rank={rank},step=15"), num_ranks) as life:
        codes = life.end(timeout_s=15)
    assert codes[rank] == -signal.SIGKILL
    assert {code for r, code in enumerate(codes) if r != rank} == {exits.LOST_RANK}
    end = exits.read_end(run)
    assert (end["code"], end["rank"], end["pid"]) == (exits.LOST_RANK, rank, life.pids[rank])
    assert 10 <= end["step"] <= 15
    named = f"rank {rank} (pid {life.pids[rank]} on {socket.gethostname()}) died without a word, last heard in phase "
    assert end["cause"].startswith(named)
    assert any(named in life.err(r) for r in range(num_ranks) if r != rank)
    assert checkpoint.steps(run) == [10]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_named_with_its_own_words(data: Path, tmp_path: Path, rank: int):
    run = tmp_path / "run"
    with Life(long(data, run, f"raise:rank={rank},step=5"), 2) as life:
        codes = life.end(timeout_s=15)
    assert codes[rank] == exits.BUG
    assert codes[1 - rank] == exits.LOST_RANK
    assert f"InjectedError: injected by debug.inject raise:rank={rank},step=5" in life.err(rank)
    end = exits.read_end(run)
    assert (end["code"], end["rank"], end["step"]) == (exits.BUG, rank, 5)
    assert f"rank {rank} (pid {life.pids[rank]} on {socket.gethostname()}) failed at step 5: " in life.err(1 - rank)
    assert "injected by debug.inject" in life.err(1 - rank)


@pytest.mark.parametrize(("num_ranks", "rank"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.slow), SLOW_THREE])
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(
    data: Path, tmp_path: Path, num_ranks: int, rank: int
):
    run = tmp_path / "run"
    with Life(long(data, run, f"hang:rank={rank},step=5"), num_ranks) as life:
        assert life.end(timeout_s=20) == [exits.LOST_RANK] * num_ranks
    end = exits.read_end(run)
    assert (end["code"], end["rank"]) == (exits.LOST_RANK, rank)
    named = f"rank {rank} (pid {life.pids[rank]} on {socket.gethostname()}) hangs in phase data of step 5"
    assert end["cause"].endswith(named)
    assert end["cause"].startswith("no progress for 3 s: ")
    # The stacks say where: of whoever noticed, at least, and of the first to give up.
    stacks = [life.err(r) for r in range(num_ranks)]
    assert any("most recent call first" in stack and "train/loop.py" in stack for stack in stacks)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_stopped_is_named_and_ended(data: Path, tmp_path: Path, rank: int):
    """It hears no SIGTERM: whoever waits for it ends it, too."""
    run = tmp_path / "run"
    with Life(long(data, run, f"stop:rank={rank},step=5"), 2) as life:
        codes = life.end(timeout_s=20)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == exits.LOST_RANK
    end = exits.read_end(run)
    assert (end["code"], end["rank"]) == (exits.LOST_RANK, rank)
    assert f"rank {rank} (pid {life.pids[rank]} on " in end["cause"]
    # Where it was at its last beat.
    assert re.search(r" does not run any more, in phase [a-z]+ of step [1-5]$", end["cause"])


def test_a_pause_shorter_than_the_patience_is_no_hang(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(data, run, run={"hang_timeout_s": 5.0}, debug={"inject": ("slow:rank=1,step=3,seconds=1.5",)})
    finished(config, 2)
    assert exits.read_end(run)["code"] == exits.DONE


def test_a_run_goes_on_after_a_rank_was_lost(data: Path, tmp_path: Path):
    # Saved before the training goes on: steps this short would else be killed beside their save.
    patience = {"hang_timeout_s": 2.0, "async_save": False}
    config = tiny_run(data, tmp_path / "run", run=patience, debug={"inject": ("kill:rank=1,step=5",)})
    with Life(config, 2) as life:
        life.end(timeout_s=15)
    assert "resuming at step 3" in finished(config, 2).out()


def test_heartbeats_say_where_every_rank_is_and_that_it_ended_well(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    life = finished(tiny_run(data, run), 2)
    beats = [json.loads(path.read_text()) for path in sorted((run / "alive").glob("rank-*.json"))]
    assert [beat["rank"] for beat in beats] == [0, 1]
    assert [beat["pid"] for beat in beats] == life.pids
    assert {beat["phase"] for beat in beats} == {"ended"}
    assert len({beat["life"] for beat in beats}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "raise", "hang", "stop"])
def test_under_torchrun_the_rank_is_named_soon_and_nobody_is_left(data: Path, tmp_path: Path, kind: str):
    run, path = tmp_path / "run", tmp_path / "run.toml"
    path.write_text(to_toml(long(data, run, f"{kind}:rank=1,step=5")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train/pretrain.py", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TRITON_INTERPRET", None)
    started_s = time.monotonic()
    ended = subprocess.run(torchrun, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert time.monotonic() - started_s < 60
    end = exits.read_end(run)
    assert (end["code"], end["rank"]) == (exits.BUG if kind == "raise" else exits.LOST_RANK, 1)
    assert re.search(r"rank 1 \(pid \d+ on |injected by", end["cause"])
    for beat in (run / "alive").glob("rank-*.json"):
        assert watch._is_gone(json.loads(beat.read_text())["pid"])


# By unit


def beat(run: Path, rank: int, **changes: Any) -> None:
    """The heartbeat of another rank."""
    told = {"life": "now", "host": socket.gethostname(), "pid": os.getpid(), "step": 7, "phase": "data", "beat": 1}
    (run / "alive").mkdir(parents=True, exist_ok=True)
    publish.write_text(run / "alive" / f"rank-{rank:05d}.json", json.dumps({"rank": rank, **told, **changes}))


def gone() -> int:
    """The number of a process that is no more."""
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def watching(run: Path, rank: int = 0, timeout_s: float = 2.0) -> Watch:
    """The watch of one of three ranks, not begun."""
    (run / "alive").mkdir(parents=True, exist_ok=True)
    return Watch(run, life="now", rank=rank, world_size=3, timeout_s=timeout_s)


@contextlib.contextmanager
def telling(run: Path, rank: int, **changes: Any) -> Iterator[None]:
    """Has another rank's heartbeat go on."""
    ended = threading.Event()

    def tell() -> None:
        for number in itertools.count(1):
            beat(run, rank, beat=number, **changes)
            if ended.wait(0.05):
                return

    beat(run, rank, **changes)
    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[LostRankError]:
    """Why a watch ended its process, which goes on here."""
    found: list[LostRankError] = []

    def end(self: Watch, lost: LostRankError) -> None:
        found.append(lost)
        self._closing.set()

    monkeypatch.setattr(Watch, "_end", end)
    return found


def blamed(run: Path, monkeypatch: pytest.MonkeyPatch) -> LostRankError:
    """Whom rank 0 blames for a lost connection."""
    monkeypatch.setattr(watch, "_SEARCH_S", 0.2)
    return watching(run).blame(RuntimeError("Connection closed by peer\nand more"))


NOBODY = "rank 0 lost another rank, which left no trace: Connection closed by peer"


def test_nobody_is_blamed_while_all_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with telling(tmp_path, 1), telling(tmp_path, 2, host="another-machine"):
        assert str(blamed(tmp_path, monkeypatch)) == NOBODY


def test_whoever_is_gone_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beat(tmp_path, 1)
    beat(tmp_path, 2, pid=gone())
    found = blamed(tmp_path, monkeypatch)
    assert found.rank == 2
    assert "died without a word, last heard in phase data of step 7" in str(found)


@pytest.mark.parametrize(
    "innocent", [{"phase": "ended"}, {"life": "an earlier one"}, {"phase": "ended", "host": "another-machine"}], ids=str
)
def test_whoever_ended_well_or_long_ago_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, innocent: dict[str, str]
):
    beat(tmp_path, 2, pid=gone(), **innocent)
    assert str(blamed(tmp_path, monkeypatch)) == NOBODY


def test_whoever_fell_silent_on_another_machine_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody is left there to see that it is gone, or that its machine is."""
    beat(tmp_path, 2, host="another-machine", pid=12)
    with telling(tmp_path, 1, host="a-third-one"):
        found = blamed(tmp_path, monkeypatch)
    assert (found.rank, found.host, found.pid) == (2, "another-machine", 12)
    assert str(found) == "rank 2 (pid 12 on another-machine) is silent, last heard in phase data of step 7"


def test_what_a_survivor_wrote_is_repeated_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lost = LostRankError(2, "rank 2 (pid 12 on another-machine) died", "another-machine", 12)
    watching(tmp_path, rank=1).record(lost)
    end = exits.read_end(tmp_path)
    assert (end["rank"], end["host"], end["pid"]) == (2, "another-machine", 12)
    found = blamed(tmp_path, monkeypatch)
    assert (found.rank, found.host, found.pid, str(found)) == (2, "another-machine", 12, str(lost))


def test_a_word_from_an_earlier_life_is_not_believed_and_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rank of it may have been slow to end, on another machine."""
    exits.record_end(tmp_path, exits.LOST_RANK, rank=2, step=70, cause="rank 2 died", life="an earlier one")
    beat(tmp_path, 1)
    assert watching(tmp_path)._lost_peer() is None
    exits.record_end(tmp_path, exits.STOPPED, rank=0, step=80, cause="told to stop", life="now")
    assert exits.read_end(tmp_path)["code"] == exits.STOPPED


def test_whoever_left_a_word_is_blamed_with_it_on_any_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    exits.record_end(tmp_path, exits.BAD_DATA, rank=2, step=7, cause="a shard is gone", life="now")
    beat(tmp_path, 2, host="another-machine")
    found = blamed(tmp_path, monkeypatch)
    assert found.rank == 2
    assert str(found).endswith("failed at step 7: a shard is gone")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rank": 1}'])
def test_a_heartbeat_that_cannot_be_read_is_no_sign_of_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
):
    beat(tmp_path, 1)
    (tmp_path / "alive" / "rank-00001.json").write_text(content)
    assert str(blamed(tmp_path, monkeypatch)) == NOBODY


def waited(watch: Watch, seconds: float) -> float:
    """Seconds until a watch that has begun gives up, at most so many."""
    started_s = time.monotonic()
    watch._closing.wait(seconds)
    return time.monotonic() - started_s


def test_a_first_step_may_take_long_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: list[LostRankError]
):
    monkeypatch.setattr(watch, "_START_PATIENCE", 4)
    far = {"host": "another-machine"}  # if they are taken for silent, on a busy machine, they are not killed
    with telling(tmp_path, 1, **far), telling(tmp_path, 2, **far), watching(tmp_path, timeout_s=0.3) as first:
        first.at("forward", 8)
        assert waited(first, 20) > 4 * 0.3
    assert str(given_up[0]).startswith("no progress for 1.2 s: rank 1 (pid ")


@pytest.mark.parametrize(("phase", "patience"), [("save", 5), ("reduce", 1)])
def test_a_save_may_take_longer_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: list[LostRankError], phase: str, patience: int
):
    monkeypatch.setattr(watch, "_SAVE_PATIENCE", 5)
    far = {"host": "another-machine"}  # if they are taken for silent, on a busy machine, they are not killed
    with telling(tmp_path, 1, **far), telling(tmp_path, 2, **far), watching(tmp_path, timeout_s=0.3) as first:
        first.at("data", 1)
        first.at("data", 2)
        first.at(phase, 2)
        assert waited(first, 20) > patience * 0.3
    assert str(given_up[0]).startswith(f"no progress for {patience * 0.3:g} s: ")


def test_whoever_does_not_run_is_ended_but_not_whoever_ended_well(tmp_path: Path, given_up: list[LostRankError]):
    """Of two that judge at once, the second finds the process gone."""
    with subprocess.Popen(["sleep", "60"]) as innocent:
        beat(tmp_path, 1, phase="ended", pid=innocent.pid)
        beat(tmp_path, 2, pid=(pid := gone()))
        watching(tmp_path)._end_hang(1.0)
        assert innocent.poll() is None
        innocent.kill()
    assert (given_up[0].rank, given_up[0].pid) == (2, pid)


def test_a_run_folder_that_is_not_the_first_rank_s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "_SHARED_S", 0.2)
    with watching(tmp_path / "here") as first, watching(tmp_path / "there", rank=1) as second:
        first.refuse_unshared()
        with pytest.raises(ConfigError, match=f"{tmp_path}/there on .* is not the run folder that rank 0 writes into"):
            second.refuse_unshared()
        watching(tmp_path / "here", rank=1).refuse_unshared()


def test_only_ranks_of_this_machine_are_looked_at_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A thousand ranks that read a thousand files every few seconds would be a load for the file system they share."""
    beat(tmp_path, 1, host="another-machine")
    beat(tmp_path, 2)
    first, read, heartbeat_of = watching(tmp_path), [], Watch._heartbeat_of
    monkeypatch.setattr(Watch, "_heartbeat_of", lambda self, rank: (read.append(rank), heartbeat_of(self, rank))[1])
    for _ in range(3):
        assert first._lost_peer() is None
    assert read.count(1) == 1
    assert read.count(2) == 3


def test_a_process_of_somebody_else_and_a_zombie(tmp_path: Path):
    assert not watch._is_gone(1)
    assert not watch._is_gone(os.getpid())
    if (pid := os.fork()) == 0:
        os._exit(0)
    time.sleep(0.2)
    assert watch._is_gone(pid)  # not waited for yet
    os.waitpid(pid, 0)
    assert watch._is_gone(pid)

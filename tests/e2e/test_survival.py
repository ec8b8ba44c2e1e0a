"""Runs that are killed, stopped, starved and damaged, as real processes: what is left of them, and how they go on.

The faults that a run must survive, and where each is tested (files of tests/ beside this one's own tests):

 1  SIGKILL of all or one rank at any moment      test_a_run_killed_again_and_again...; resume/test_crash.py
 2  SIGKILL of torchrun alone                     test_ranks_whose_launcher_is_killed...
 3  SIGTERM, SIGUSR1 to a rank or to torchrun     test_a_signal_to_any_rank..., test_a_signal_to_torchrun...
 4  more signals during the save                  test_signals_that_do_not_stop_coming...
 5  grace shorter than the save                   test_a_run_killed_in_the_middle_of_its_last_save...
 6  disk full                                     test_a_full_disk...; resume/test_saver.py
 7  a failing write on one rank, beside training  test_a_rank_that_cannot_write...; resume/test_saver.py
 8  newest checkpoint damaged                     test_a_damaged_newest_checkpoint...; resume/test_damage.py
 9  all checkpoints damaged                       test_a_run_without_a_good_checkpoint...; resume/test_damage.py
10  leftovers of dead saves                       test_leftovers_of_dead_lives...; resume/test_crash.py
11  power loss: order of fsync and rename         resume/test_crash.py, resume/test_saver.py
12  shard truncated, changed, moved               test_a_shard_that_is_cut_off...; train/test_bad_input.py
13  token id beyond the vocabulary                train/test_bad_input.py
14  wrong tokenizer for the data                  train/test_bad_input.py
15  config or model differs                       train/test_bad_input.py, train/test_config.py
16  NaN on one rank                               train/test_guard.py
17  finite spike                                  train/test_guard.py
18  one rank raises                               train/test_exits.py, train/test_watch.py
19  one rank hangs                                train/test_watch.py
20  another number of ranks                       test_a_run_killed_again_and_again...; train/test_ranks.py
21  two runs in one folder                        train/test_lock.py
22  clock jumps                                   test_no_decision_looks_at_a_clock
23  malicious checkpoint                          resume/test_malicious.py
24  undetected corruption                         of data: train/test_faults.py; of weights: nothing detects it
25  the same failure again and again              train/test_exits.py
26  data changes, then a kill                     e2e/test_data_order.py
27  checkpoint of another format                  resume/test_checkpoint.py
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.config_file import to_toml
from data_prep.shards import HEADER_BYTES
from evaluation.report import read_metrics
from resume import checkpoint, tensor_file
from tests.lives import Life, finished, lived
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from tests.trained import Sample, samples_in, total, trained
from train import exits, loader
from train.config import RunConfig, with_values

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": str(ROOT),
}
NUMBERS_OF_RANKS = {1: 4, 2: 4, 3: 3, 4: 2, 6: 1}
"""How often each is drawn: many ranks take long on few cores."""
ONCE = {"max_epochs": ("1",)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data", texts=texts_about("survivor", 620))


def exact(data_folder: Path, run_folder: Path, **sections: Any) -> RunConfig:
    """A tiny run that trains the same bits on any number of ranks, and writes down what it trains."""
    return tiny_run(
        data_folder,
        run_folder,
        run={"hang_timeout_s": 20.0, **sections.pop("run", {})},
        data={"record_samples": True, **sections.pop("data", {})},
        parallel={"precision": "exact"},
        **sections,
    )


def endless(data_folder: Path, run_folder: Path, **sections: Any) -> RunConfig:
    """A run that ends only if something ends it, and saves only then."""
    run = {"num_steps": 10_000, "save_every": 10_000, "validate_every": 10_000, **sections.pop("run", {})}
    return exact(data_folder, run_folder, run=run, **sections)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return checkpoint.open_checkpoint(newest).read_tensors("")


def same_ends(a: Path, b: Path) -> None:
    """Newest checkpoints of one step, with the same bits in weights and moments, and the same samples until there."""
    assert checkpoint.steps(a)[-1] == checkpoint.steps(b)[-1]
    one, other = tensors_of(a), tensors_of(b)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert trained(a) == trained(b)


def last_logged(run: Path) -> int:
    return max(record["step"] for record in read_metrics(run) if "loss" in record)


def nothing_left_over(run: Path) -> None:
    assert [path.name for path in run.iterdir() if re.search(r"\.(tmp|del|bad)", path.name)] == []


Reference = Callable[[int], Path]


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run folder of so many steps on one rank, in one life."""

    @functools.cache
    def run_of(num_steps: int) -> Path:
        run = tmp_path_factory.mktemp("uninterrupted") / "run"
        finished(exact(data, run, run={"num_steps": num_steps}))
        return run

    return run_of


# Kills


@dataclasses.dataclass
class Tally:
    """What happened to a run."""

    kills: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    """By moment and by who was killed."""
    worlds: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    num_refusals: int = 0
    num_steps_twice: int = 0


def kill_again_and_again(data: Path, run: Path, num_steps: int, num_kills: int, seed: int) -> Tally:
    """Starts the run, kills it at a random moment, starts it again on other ranks, ...; then lets it end."""
    chance, tally = random.Random(seed), Tally()
    often = {"num_steps": num_steps, "save_every": 2, "keep_checkpoints": 2}
    config = exact(data, run, run=often, data=ONCE)

    def living(count: int) -> Life:
        tally.worlds[count] += 1
        return Life(with_values(config, run={"async_save": chance.random() < 0.7}), count)

    def num_ranks() -> int:
        return chance.choices(list(NUMBERS_OF_RANKS), list(NUMBERS_OF_RANKS.values()))[0]

    while tally.kills.total() < num_kills:
        newest = (checkpoint.steps(run) or [0])[-1]
        assert newest < num_steps, f"done before it could be killed often enough: {tally}"
        with living(num_ranks()) as life:
            moment, who = chance.choice(("start", "step", "save")), chance.choice(("all", "one"))
            if newest > num_steps - 12:
                moment = "start"  # so that it does not come to its end before
            if moment == "start":
                time.sleep(chance.uniform(0, 0.3 if newest > num_steps - 12 else 0.6))
            elif moment == "step":
                life.until_step(newest + chance.randint(1, 4))
                time.sleep(chance.uniform(0, 0.03))
            else:
                life.until(lambda: any(run.glob("step-*.tmp")))
                time.sleep(chance.uniform(0, 0.01))
            if life.kill(*([] if who == "all" else [chance.randrange(len(life.codes))])):
                tally.kills[moment, who] += 1
            life.signal(signal.SIGTERM)  # as the launcher does when it has lost a rank
            life.end(timeout_s=25)
            survivors = {code for code in life.codes if code != -signal.SIGKILL}
            assert survivors <= {exits.LOST_RANK, exits.STOPPED, exits.NOT_FINITE, -signal.SIGTERM}, life.err()
            assert "REJECTED" not in life.out()
            if life.last_step:
                assert f"resuming at step {newest}\n" in life.out() or newest == 0
                tally.num_steps_twice += max(0, life.last_step - (checkpoint.steps(run) or [0])[-1])
            if exits.NOT_FINITE in survivors:
                assert "times in a row at step" in life.err()
                tally.num_refusals += 1
                (run / "exit.json").unlink()
    with living(num_ranks()) as life:
        codes = life.end(timeout_s=120)
        if set(codes) == {exits.NOT_FINITE}:
            (run / "exit.json").unlink()
            codes = lived(config).codes
        assert set(codes) == {exits.DONE}, life.out() + life.err()
    nothing_left_over(run)
    return tally


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """A data folder, an uninterrupted run on one rank over each of its samples once, and its steps."""
    folder = tmp_path_factory.mktemp("once")
    made = write_data(folder / "data", texts=texts_about("once", 280))
    num_steps = -(-len(samples_in(made)) // 12)
    finished(exact(made, folder / "run", run={"num_steps": num_steps}, data=ONCE))
    return made, folder / "run", num_steps


def each_sample_once(run: Path, data_folder: Path) -> None:
    expected: collections.Counter[Sample] = collections.Counter(samples_in(data_folder))
    assert total(trained(run)) == expected


def test_a_run_killed_again_and_again_on_ever_other_ranks_ends_with_the_bits_of_one_nobody_touched(
    once: tuple[Path, Path, int], tmp_path: Path
):
    data_folder, reference, num_steps = once
    each_sample_once(reference, data_folder)
    tally = kill_again_and_again(data_folder, tmp_path / "run", num_steps, num_kills=20, seed=1)
    same_ends(tmp_path / "run", reference)
    each_sample_once(tmp_path / "run", data_folder)
    print(num_steps, tally)
    assert {moment for moment, _ in tally.kills} == {"start", "step", "save"}
    assert len(tally.worlds) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_five_hundred_kills_change_nothing(once: tuple[Path, Path, int], tmp_path: Path):
    data_folder, reference, num_steps = once
    kills: collections.Counter[tuple[str, str]] = collections.Counter()
    num_refusals = num_steps_twice = seed = 0
    while kills.total() < 500:
        seed += 1
        run = tmp_path / f"run-{seed}"
        tally = kill_again_and_again(data_folder, run, num_steps, num_kills=25, seed=100 + seed)
        same_ends(run, reference)
        each_sample_once(run, data_folder)
        kills += tally.kills
        num_refusals, num_steps_twice = num_refusals + tally.num_refusals, num_steps_twice + tally.num_steps_twice
        shutil.rmtree(run)
    print(f"{kills.total()} kills, {kills}, {num_refusals} refusals, {num_steps_twice} steps computed twice")


# Signals


@pytest.mark.parametrize(
    ("number", "num_ranks", "rank"),
    [
        (signal.SIGTERM, 1, 0),
        (signal.SIGTERM, 2, 0),
        (signal.SIGTERM, 3, 2),
        (signal.SIGUSR1, 2, 1),
        (signal.SIGINT, 2, 1),
        (signal.SIGHUP, 1, 0),
    ],
    ids=[
        "TERM, alone",
        "TERM, rank 0 of 2",
        "TERM, rank 2 of 3",
        "USR1, rank 1 of 2",
        "INT, rank 1 of 2",
        "HUP, alone",
    ],
)
def test_a_signal_to_any_rank_saves_at_the_next_step_boundary_and_loses_nothing(
    data: Path, tmp_path: Path, number: signal.Signals, num_ranks: int, rank: int
):
    run = tmp_path / "run"
    with Life(endless(data, run), num_ranks) as life:
        life.until_step(random.Random(str(tmp_path.name)).randint(2, 9))
        told_at = life.last_step
        life.signal(number, rank)
        assert life.end(timeout_s=20) == [exits.STOPPED] * num_ranks
    stopped_at = last_logged(run)
    assert checkpoint.steps(run) == [stopped_at]
    assert max(trained(run)) == stopped_at == life.last_step
    assert stopped_at >= told_at
    end = exits.read_end(run)
    assert (end["code"], end["step"], end["cause"], end["times"]) == (exits.STOPPED, stopped_at, "told to stop", 0)
    assert f"stopped at step {stopped_at}; the same command goes on from there" in life.out()
    nothing_left_over(run)


def test_a_run_preempted_again_and_again_computes_no_step_twice(data: Path, tmp_path: Path, uninterrupted: Reference):
    run, printed = tmp_path / "run", []
    config = exact(data, run, run={"num_steps": 12, "save_every": 100})
    faults = ("terminate:rank=1,step=2", "terminate:rank=2,step=5", "terminate:rank=0,step=11")
    for num_ranks in (2, 3, 1, 2):
        life = lived(with_values(config, debug={"inject": faults}), num_ranks)
        assert set(life.codes) == {exits.DONE if len(printed) == 11 else exits.STOPPED}
        printed += re.findall(r"^step +(\d+)/", life.out(), re.MULTILINE)
    assert list(map(int, printed)) == list(range(1, 13))
    same_ends(run, uninterrupted(12))


def slow_writes(seconds: float) -> Callable[[int], None]:
    """Has every rank write slowly, as to a busy disk."""

    def before(rank: int) -> None:
        write = tensor_file.write

        def slowly(*rest: Any) -> Any:
            time.sleep(seconds)
            return write(*rest)

        tensor_file.write = slowly

    return before


def test_signals_that_do_not_stop_coming_still_make_one_save(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    with Life(endless(data, run), 2, slow_writes(1.0)) as life:
        life.until_step(3)
        deadline_s = time.monotonic() + 20
        while not life.is_over:
            life.signal(signal.SIGTERM)
            life.signal(signal.SIGUSR1)
            time.sleep(0.03)
            assert time.monotonic() < deadline_s
    assert life.codes == [exits.STOPPED] * 2
    stopped_at = last_logged(run)
    assert checkpoint.steps(run) == [stopped_at]
    assert life.out().count("saved ") == 1
    assert len([record for record in read_metrics(run) if "save_s" in record]) == 1
    assert exits.read_end(run)["code"] == exits.STOPPED


def test_a_run_killed_in_the_middle_of_its_last_save_goes_on_from_the_one_before(
    data: Path, tmp_path: Path, uninterrupted: Reference
):
    run = tmp_path / "run"
    config = exact(data, run, run={"num_steps": 12, "save_every": 3}, debug={"inject": ("terminate:rank=1,step=5",)})

    def slow_from_the_second_on(rank: int) -> None:
        write, number = tensor_file.write, iter(range(99))
        tensor_file.write = lambda *rest: (time.sleep(60 * (next(number) > 0)), write(*rest))[1]

    with Life(config, 2, slow_from_the_second_on) as life:
        life.until(lambda: (run / "step-5.tmp").exists())
        time.sleep(0.3)
        assert life.kill() == 2
    assert checkpoint.steps(run) == [3]
    assert (run / "step-5.tmp").exists()
    life = finished(config, 3)
    assert "resuming at step 3\n" in life.out()
    nothing_left_over(run)
    same_ends(run, uninterrupted(12))


# Launchers


class Launched:
    """A run under torchrun, with its output in a file, which outlives the launcher."""

    def __init__(self, config: RunConfig, num_ranks: int, *flags: str):
        self.run = Path(config.run.dir)
        path, self._said = self.run.with_suffix(".toml"), self.run.with_suffix(".out")
        path.write_text(to_toml(config))
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", *flags]
        with self._said.open("w") as said:
            command = [*launcher, "train/pretrain.py", str(path)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=said, stderr=said)

    def until_step(self, step: int) -> list[int]:
        """Waits until a step is printed; returns the processes of the ranks."""
        deadline_s = time.monotonic() + 100
        while not any(int(n) >= step for n in re.findall(r"^step +(\d+)/", self.said, re.MULTILINE)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline_s, self.said
            time.sleep(0.02)
        return self.ranks()

    @property
    def said(self) -> str:
        return self._said.read_text()

    def ranks(self) -> list[int]:
        lists = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for listed in lists for pid in listed.read_text().split()]


@contextlib.contextmanager
def launched(config: RunConfig, num_ranks: int, *flags: str) -> Iterator[Launched]:
    life = Launched(config, num_ranks, *flags)
    try:
        yield life
    finally:
        for pid in [*(life.ranks() if life.process.poll() is None else []), life.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        life.process.wait()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1], ids=str)
def test_a_signal_to_torchrun_reaches_the_ranks(data: Path, tmp_path: Path, number: signal.Signals):
    run = tmp_path / "run"
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    with launched(endless(data, run), 2, handled) as life:
        life.until_step(2)
        life.process.send_signal(number)
        assert life.process.wait(timeout=40) == 1  # whatever the ranks say
    assert checkpoint.steps(run) == [last_logged(run)]
    end = exits.read_end(run)
    assert (end["code"], end["step"], end["cause"]) == (exits.STOPPED, last_logged(run), "told to stop")


def launcher_killed(config: RunConfig, moment: Callable[[Launched], list[int]]) -> float:
    """Kills the launcher at some moment; the seconds that its ranks live on."""
    with launched(config, 2) as life:
        ranks = moment(life)
        ranks = ranks or life.ranks()
        life.process.kill()
        started_s = time.monotonic()
        life.process.wait()
        while any(is_alive(pid) for pid in ranks):
            if time.monotonic() - started_s > 40:
                for pid in filter(is_alive, ranks):
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"orphans {ranks}:\n{life.said}")
            time.sleep(0.01)
    return time.monotonic() - started_s


def test_ranks_whose_launcher_is_killed_save_and_end_by_themselves(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    launcher_killed(endless(data, run), lambda life: life.until_step(3))
    assert checkpoint.steps(run) == [last_logged(run)]
    assert exits.read_end(run)["code"] == exits.STOPPED


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_killed_launchers_leave_no_orphan(data: Path, tmp_path: Path):
    """At random moments from the first instant on, also while the ranks import torch or wait for each other."""
    chance, longest_s = random.Random(5), 0.0

    def at_random(life: Launched) -> list[int]:
        time.sleep(chance.uniform(0, 10))
        return life.ranks()

    for number in range(100):
        longest_s = max(longest_s, launcher_killed(endless(data, tmp_path / f"run-{number}"), at_random))
        shutil.rmtree(tmp_path / f"run-{number}", ignore_errors=True)
    print(f"the last rank ended at most {longest_s:.1f} s after its launcher")


# Data and disks


def test_a_shard_that_is_cut_off_under_a_run_ends_it_well_with_what_it_had(tmp_path: Path):
    folder, run = write_data(tmp_path / "data", texts=texts_about("cut", 200)), tmp_path / "run"

    def read_late(rank: int) -> None:
        loader._PIECE_BYTES = 1  # else all of this little data is read ahead at the start

    shards = sorted((folder / "train").glob("*.bin"))
    with Life(endless(folder, run), 2, read_late) as life:
        life.until_step(4)
        for shard in shards:
            os.truncate(shard, HEADER_BYTES + 20)
        assert life.end(timeout_s=30) == [exits.BAD_DATA] * 2, life.out() + life.err()
    assert checkpoint.steps(run) == [last_logged(run)] == [max(trained(run))]
    end = exits.read_end(run)
    assert (end["code"], end["step"]) == (exits.BAD_DATA, last_logged(run) + 1)
    for text in (end["cause"], life.err(0), life.err(1)):
        assert any(str(shard) in text for shard in shards)
    checkpoint.verify(run / f"step-{last_logged(run)}")


def test_a_full_disk_is_said_and_the_training_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, uninterrupted: Reference
):
    run = tmp_path / "run"
    config = exact(data, run, run={"num_steps": 12, "save_every": 3}, debug={"inject": ("disk-full:rank=1,step=6",)})
    life = finished(config, 2)
    assert life.out().count("NOT SAVED: ") == 1
    assert "No space left on device" in life.out()
    assert checkpoint.steps(run) == [3, 9, 12]
    failed = [record for record in read_metrics(run) if record.get("event") == "save failed"]
    assert [record["step"] for record in failed] == [6]
    nothing_left_over(run)
    same_ends(run, uninterrupted(12))


@pytest.mark.parametrize("in_background", [True, False], ids=["beside the training", "while it waits"])
def test_a_full_disk_that_stays_full_ends_the_run_with_the_checkpoints_it_had(
    data: Path, tmp_path: Path, uninterrupted: Reference, in_background: bool
):
    run = tmp_path / "run"
    full = {"inject": tuple(f"disk-full:rank=1,step={step}" for step in (4, 5))}
    rest = {"num_steps": 12, "save_every": 1, "max_failed_saves": 2, "async_save": in_background}
    config = exact(data, run, run=rest, debug=full)
    life = lived(config, 2)
    assert life.codes == [exits.CANNOT_WRITE] * 2, life.err()
    assert checkpoint.steps(run) == [1, 2, 3]
    assert "No space left on device" in life.err()
    assert exits.read_end(run)["code"] == exits.CANNOT_WRITE
    assert "No space left on device" in exits.read_end(run)["cause"]
    nothing_left_over(run)
    finished(config, 1)
    same_ends(run, uninterrupted(12))


def test_a_rank_that_cannot_write_large_files_is_heard_by_all(data: Path, tmp_path: Path):
    """A real error of a real file system, on one rank of two, beside the training."""
    run = tmp_path / "run"

    def limited(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    with Life(exact(data, run, run={"num_steps": 30, "save_every": 2}), 2, limited) as life:
        assert life.end(timeout_s=30) == [exits.CANNOT_WRITE] * 2, life.out() + life.err(1)
    assert life.out().count("NOT SAVED") == 3
    assert "File too large" in life.err(0)
    assert checkpoint.steps(run) == []
    nothing_left_over(run)


@pytest.mark.parametrize("in_background", [True, False], ids=["beside the training", "while it waits"])
def test_a_last_save_that_fails_is_no_good_end(
    data: Path, tmp_path: Path, uninterrupted: Reference, in_background: bool
):
    run = tmp_path / "run"
    rest = {"num_steps": 12, "async_save": in_background}
    config = exact(data, run, run=rest, debug={"inject": ("disk-full:rank=0,step=12",)})
    life = lived(config, 2)
    assert life.codes == [exits.CANNOT_WRITE] * 2
    assert exits.read_end(run)["code"] == exits.CANNOT_WRITE
    assert checkpoint.steps(run) == [3, 6, 9]
    finished(config, 2)
    same_ends(run, uninterrupted(12))


# Damaged checkpoints, leftovers, clocks


def damage(folder: Path) -> None:
    """Flips a bit in the middle of a rank's file."""
    path = folder / "rank-00000.safetensors"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def stopped_at_eight(data: Path, run: Path) -> RunConfig:
    """A run with checkpoints at steps 2, 4, 6 and 8, of twelve."""
    terminated = {"inject": ("terminate:rank=0,step=8",)}
    config = exact(data, run, run={"num_steps": 12, "save_every": 2}, debug=terminated)
    assert lived(config, 2).codes == [exits.STOPPED] * 2
    assert checkpoint.steps(run) == [2, 4, 6, 8]
    return config


@pytest.mark.parametrize(
    "how",
    [
        "a flipped bit",
        *(pytest.param(h, marks=pytest.mark.slow) for h in ("truncated", "a file missing", "a cut record")),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_moved_and_the_one_before_it_taken(
    data: Path, tmp_path: Path, uninterrupted: Reference, how: str
):
    run = tmp_path / "run"
    config = stopped_at_eight(data, run)
    folder = run / "step-8"
    match how:
        case "a flipped bit":
            damage(folder)
        case "truncated":
            os.truncate(folder / "rank-00001.safetensors", 1000)
        case "a file missing":
            (folder / "rank-00001.safetensors").unlink()
        case _:
            os.truncate(folder / "record.json", 100)
    life = finished(config, 2)
    assert re.search(
        r"checkpoint step-8 REJECTED: .*/step-8/.*Moved to step-8.bad; trying the previous one", life.out()
    )
    assert "resuming at step 6\n" in life.out()
    assert (run / "step-8.bad").is_dir()
    assert (run / "step-8").is_dir()  # saved again, in its turn
    same_ends(run, uninterrupted(12))


def test_a_run_without_a_good_checkpoint_never_begins_again_at_step_0(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = stopped_at_eight(data, run)
    for step in checkpoint.steps(run):
        damage(run / f"step-{step}")
    for num_ranks in (2, 1):
        life = lived(config, num_ranks)
        assert life.codes == [exits.BAD_CONFIG] * num_ranks
        assert "no good checkpoint is left, only step-2.bad, step-4.bad, step-6.bad, step-8.bad" in life.err()
        assert life.last_step == 0
        assert exits.read_end(run)["code"] == exits.BAD_CONFIG
    damage(run / "step-4.bad")  # a bit flipped twice is as it was
    (run / "step-4.bad").rename(run / "step-4")
    assert "resuming at step 4\n" in finished(config).out()


def test_leftovers_of_dead_lives_are_in_nobody_s_way(data: Path, tmp_path: Path, uninterrupted: Reference):
    run = tmp_path / "run"
    config = with_values(stopped_at_eight(data, run), run={"keep_checkpoints": 2})
    shutil.copytree(run / "step-6", run / "step-10.tmp")
    (run / "step-2").rename(run / "step-2.del")
    shutil.copytree(run / "step-4", run / "step-4.bad")
    (run / "step-99.tmp").mkdir()
    (run / "step-11").mkdir()  # without a record
    life = finished(config, 2)
    assert "checkpoint step-11 REJECTED" in life.out()
    assert "resuming at step 8\n" in life.out()
    assert checkpoint.steps(run) == [10, 12]
    assert sorted(path.name for path in run.glob("step-*.*")) == ["step-11.bad", "step-4.bad"]
    same_ends(run, uninterrupted(12))


def test_no_decision_looks_at_a_clock(data: Path, tmp_path: Path, uninterrupted: Reference):
    """Neither at the times of files, which go backwards here, nor at the time of day, which jumps by ten years."""
    run = tmp_path / "run"
    config = with_values(stopped_at_eight(data, run), run={"keep_checkpoints": 3})
    for number, step in enumerate(checkpoint.steps(run)):
        moment = time.time() + 10 * 365 * 86_400 * (1, 0.5, -0.5, -3)[number]
        for path in [run / f"step-{step}", *(run / f"step-{step}").iterdir()]:
            os.utime(path, (moment, moment))

    def jumping(rank: int) -> None:
        now, chance = time.time, random.Random(rank)
        time.time = lambda: now() + chance.choice((-1, 0, 1)) * 10 * 365 * 86_400

    life = finished(config, 2, jumping)
    assert "resuming at step 8\n" in life.out()
    assert checkpoint.steps(run) == [8, 10, 12]
    assert json.loads((run / "exit.json").read_text())["code"] == exits.DONE
    assert all(record["step_s"] >= 0 for record in read_metrics(run) if "step_s" in record)
    same_ends(run, uninterrupted(12))

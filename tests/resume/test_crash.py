"""A process that saves or resumes is killed at every event of the file system: the old checkpoint is there or the new.

Events are those that Python audits (opening, making, renaming, deleting, listing) and the fsyncs, which stand for what
was written before them. A kill comes before its event, so that the folder is as all events before have left it.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from resume import checkpoint
from resume.saver import Saver
from tests.processes import run_ranks
from tests.records import save

EVENTS = {"open", "shutil.rmtree"} | {
    f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "listdir", "scandir", "truncate", "link", "symlink")
}


def tensors(seed: int, size: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"model.a": torch.randn(size, generator=generator), "optim.a.step": torch.tensor(float(seed))}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def die_at_event(number: int) -> None:
    """Kills this process at the number-th event from now on, counted from 1; there is no way back."""
    count, real_fsync, this = 0, os.fsync, os.getpid()

    def on_event(event: str) -> None:
        nonlocal count
        if event in EVENTS or event == "fsync":
            count += 1
            if count == number:
                os.kill(this, signal.SIGKILL)

    def fsync(descriptor: int) -> None:
        on_event("fsync")
        real_fsync(descriptor)
        on_event("fsync")

    os.fsync = fsync
    sys.addaudithook(lambda event, _: on_event(event))


def is_killed_at(number: int, action: Callable[[], object]) -> bool:
    """Runs an action in a process that dies at its number-th event; False if the action ended before."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            die_at_event(number)
            action()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def save_and_wait(run: Path, step: int, in_background: bool = False) -> None:
    saver = Saver(run, keep_last=2, keep_every=100, in_background=in_background)
    saver.start(step, tensors(step), {"data": step}, f"step = {step}\n")
    ended = saver.wait()
    assert ended is not None
    assert ended.error is None


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_killed_at_any_event_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path, in_background: bool):
    before = tmp_path / "before"
    for step in (1, 2):
        save_and_wait(before, step)
    (before / "step-3.tmp").mkdir()  # of an earlier kill
    (before / "step-3.tmp" / "rank-00000.json").write_text("{")
    shutil.copytree(before, tmp_path / "whole")
    save_and_wait(tmp_path / "whole", 3)
    expected = {step: contents(tmp_path / run / f"step-{step}") for run, step in (("before", 2), ("whole", 3))}
    resumed_from = []
    while True:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)
        killed = is_killed_at(len(resumed_from) + 1, lambda run=run: save_and_wait(run, 3, in_background))
        what = f"event {len(resumed_from) + 1}: {names(run)}"
        assert not list(run.glob("*.bad*")), what
        # Not only the newest: whatever bears a good name is good.
        assert all(checkpoint.open_checkpoint(run / f"step-{step}") for step in checkpoint.steps(run)), what
        newest = checkpoint.newest_valid(run, pytest.fail)
        assert newest is not None, what
        step = newest.record["step"]
        assert contents(newest.folder) == expected[step], what
        assert torch.equal(newest.read_tensors("model.")["a"], tensors(step)["model.a"]), what
        save_and_wait(run, step + 1)
        assert names(run) == [f"step-{step}", f"step-{step + 1}"], what
        if step == 2:
            assert contents(run / "step-3") == expected[3], what
        if not killed:
            break
        resumed_from.append(step)
    assert resumed_from == sorted(resumed_from)
    assert resumed_from.count(2) >= 25
    assert resumed_from.count(3) >= 5


def test_a_first_save_killed_at_any_event_leaves_nothing_or_a_checkpoint(tmp_path: Path):
    resumed_from = []
    while True:
        run = tmp_path / f"run-{len(resumed_from)}"
        killed = is_killed_at(len(resumed_from) + 1, lambda run=run: save_and_wait(run, 1))
        newest = checkpoint.newest_valid(run, pytest.fail)
        step = 0 if newest is None else newest.record["step"]
        save_and_wait(run, step + 1)
        assert names(run) == [f"step-{number}" for number in range(1, step + 2)]
        if not killed:
            break
        resumed_from.append(step)
    assert resumed_from == sorted(resumed_from)
    assert {0, 1} == set(resumed_from)


def test_resuming_killed_at_any_event_loses_no_checkpoint_good_or_bad(tmp_path: Path):
    """It sets two damaged ones aside, one under a name that is taken already."""
    before = tmp_path / "before"
    for step in (1, 2, 3):
        save(before, step, tensors(step), {"data": step})
    (before / "step-3.bad").mkdir()
    with (before / "step-3" / "rank-00000.safetensors").open("ab") as file:
        file.write(b"!")
    (before / "step-2" / "record.json").unlink()
    good, bad = contents(before / "step-1"), [contents(before / f"step-{step}") for step in (2, 3)]
    number, outcomes = 0, set()
    while True:
        number += 1
        run = tmp_path / f"run-{number}"
        shutil.copytree(before, run)
        killed = is_killed_at(number, lambda run=run: checkpoint.newest_valid(run, lambda text: None))
        outcomes.add(tuple(names(run)))
        newest = checkpoint.newest_valid(run, lambda text: None)
        assert newest is not None
        assert contents(newest.folder) == good
        assert names(run) == ["step-1", "step-2.bad", "step-3.bad", "step-3.bad-2"]
        assert [contents(run / "step-2.bad"), contents(run / "step-3.bad-2")] == bad
        save_and_wait(run, 2)
        if not killed:
            break
    assert len(outcomes) == 3  # none, one, both set aside
    assert number > 15


@pytest.mark.slow
def test_a_save_of_two_ranks_of_which_one_is_killed_at_any_event_leaves_the_old_checkpoint_or_the_new(tmp_path: Path):
    def save_on_all(run: Path, step: int, doomed: int | None = None, number: int = 0) -> Callable[[int], str]:
        def save_part(rank: int) -> str:
            dist.init_process_group("gloo")
            values = tensors(step)
            values["model.a"] = distribute_tensor(values["model.a"], init_device_mesh("cpu", (2,)), [Shard(0)])
            saver = Saver(run, keep_last=1, in_background=True)
            if rank == doomed:
                die_at_event(number)
            saver.start(step, values, {"data": step}, "")
            ended = saver.wait()
            assert ended is not None
            return f"{ended.error}"

        return save_part

    before = tmp_path / "before"
    assert run_ranks(save_on_all(before, 1), 2, tmp_path) == ["None", "None"]
    for doomed in (0, 1):
        resumed_from = []
        while True:
            run = tmp_path / f"run-{doomed}-{len(resumed_from)}"
            shutil.copytree(before, run)
            try:
                run_ranks(save_on_all(run, 2, doomed, len(resumed_from) + 1), 2, tmp_path)
                killed = False
            except AssertionError:
                killed = True
            newest = checkpoint.newest_valid(run, pytest.fail)
            assert newest is not None
            step = newest.record["step"]
            assert torch.equal(newest.read_tensors("model.")["a"], tensors(step)["model.a"])
            save(run, step + 1, tensors(step + 1), {}, keep=1)
            assert names(run) == [f"step-{step + 1}"]
            if not killed:
                break
            resumed_from.append(step)
        assert resumed_from == sorted(resumed_from)
        assert len(resumed_from) > (20 if doomed == 0 else 4)


@pytest.mark.slow
def test_saves_killed_at_random_times_never_lose_the_last_good_checkpoint(tmp_path: Path):
    """Also in the middle of a write, where no event is."""
    run, draw, newest_step, num_seen = tmp_path / "run", random.Random(7), 0, set()
    for _ in range(200):
        if (pid := os.fork()) == 0:
            try:
                torch.set_num_threads(1)
                saver = Saver(run, keep_last=1, in_background=True)
                for step in range(newest_step + 1, newest_step + 100):
                    saver.wait()
                    saver.start(step, tensors(step, 500_000), {"data": step}, "")
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        newest = checkpoint.newest_valid(run, pytest.fail)
        if newest is not None:
            assert newest.record["step"] >= newest_step
            newest_step = newest.record["step"]
            assert torch.equal(newest.read_tensors("model.")["a"], tensors(newest_step, 500_000)["model.a"])
            num_seen.add(newest_step)
        assert len(names(run) if run.is_dir() else []) <= 3
    assert len(num_seen) > 20

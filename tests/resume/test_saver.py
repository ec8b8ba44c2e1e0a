"""What the saver promises: the same bytes in the background, all ranks or none, no debris, never too many on a disk."""

import contextlib
import errno
import io
import os
import resource
import shutil
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from resume import checkpoint, tensor_file
from resume.saver import Saved, Saver
from tests.processes import run_ranks
from tests.records import save

RECORD = {"loss": 2.5, "data": {"position": 4, "quarantined": [["a", 1]]}}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(6, 4, generator=generator),
        "model.b": torch.randn(7, generator=generator).bfloat16(),
        "optim.a.step": torch.tensor(3.0),
    }


def sharded(seed: int = 0) -> dict[str, torch.Tensor]:
    """The matrix over both ranks, the rest whole on each."""
    mesh = init_device_mesh("cpu", (2,))
    return {**tensors(seed), "model.a": distribute_tensor(tensors(seed)["model.a"], mesh, [Shard(0)])}


def ended(saver: Saver) -> Saved:
    saved = saver.wait()
    assert saved is not None
    return saved


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def is_good(folder: Path, seed: int) -> bool:
    """Whether a checkpoint verifies and holds these tensors bit for bit."""
    found = checkpoint.open_checkpoint(folder).read_tensors("")
    return found.keys() == tensors().keys() and all(
        torch.equal(found[name], value) for name, value in tensors(seed).items()
    )


def test_a_save_in_the_background_writes_the_bytes_of_one_in_the_foreground(tmp_path: Path):
    for name, in_background in (("front", False), ("back", True)):
        saver = Saver(tmp_path / name, keep_last=9, in_background=in_background)
        for step in (1, 2):  # the second one reuses the memory of the first
            saver.start(step, tensors(step), RECORD, "[run]\n")
            assert ended(saver).error is None
    for step in ("step-1", "step-2"):
        front, back = contents(tmp_path / "front" / step), contents(tmp_path / "back" / step)
        assert front.keys() == back.keys() == {"rank-00000.safetensors", "config.toml", "record.json"}
        assert front == back


@pytest.mark.parametrize("in_background", [False, True])
def test_what_changes_after_the_start_of_a_save_is_not_in_it(tmp_path: Path, in_background: bool):
    def hold(step: int) -> None:  # until the caller has changed everything
        if in_background:
            changed.acquire()

    changed = threading.Semaphore(0)
    saver = Saver(tmp_path, in_background=in_background, before_write=hold)
    values, record = tensors(), {"data": {"position": 4, "list": [1]}}
    saver.start(1, values, record, "")
    for value in values.values():
        value.zero_()
    record["data"]["position"] = 5
    record["data"]["list"].append(2)
    changed.release()
    assert ended(saver).error is None
    assert is_good(tmp_path / "step-1", seed=0)
    assert checkpoint.read_record(tmp_path / "step-1")["data"] == {"position": 4, "list": [1]}


def test_the_end_of_a_save_is_told_once_and_before_the_next_one_begins(tmp_path: Path):
    saver = Saver(tmp_path, keep_last=9, in_background=True)
    assert (saver.wait(), saver.finished()) == (None, None)
    saver.start(1, tensors(), RECORD, "")
    with pytest.raises(AssertionError, match="wait for the save before this one"):
        saver.start(2, tensors(), RECORD, "")
    first = ended(saver)
    assert (first.step, first.error) == (1, None)
    assert (saver.wait(), saver.finished()) == (None, None)


def test_a_save_that_is_nearly_done_is_not_given_up_by_a_run_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Among several a peer may be lost, for which it would wait for ever."""
    monkeypatch.setattr("resume.saver._PATIENCE_S", 0.01)
    saver = Saver(tmp_path, in_background=True, before_write=lambda step: time.sleep(0.5))
    saver.start(1, tensors(), RECORD, "")
    saver.close()
    assert is_good(tmp_path / "step-1", seed=0)


def test_an_error_that_is_no_failure_to_write_is_the_cause_of_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that a rank that is lost during a save is known as that."""

    def lose(*_: object) -> None:
        raise RuntimeError("[gloo] Connection closed by peer")

    monkeypatch.setattr("resume.saver.together", lose)
    saver = Saver(tmp_path)
    saver.start(1, tensors(), RECORD, "")
    error = ended(saver).error
    assert error is not None
    assert str(error.__cause__) == "[gloo] Connection closed by peer"


def test_every_kind_of_tensor_that_can_be_written_can_be_read(tmp_path: Path):
    """Whatever a model keeps: a checkpoint that is saved but cannot be loaded would be found out too late."""
    values = {f"model.{str(dtype)[6:]}": torch.tensor([[0, 1], [1, 1]]).to(dtype) for dtype in tensor_file.DTYPES}
    opened = checkpoint.open_checkpoint(save(tmp_path, 1, values, {}))
    targets = {name: torch.zeros_like(value) for name, value in values.items()}
    opened.load_into(targets)
    assert all(torch.equal(targets[name], value) for name, value in values.items())


def test_a_record_whose_keys_are_numbers_can_be_read_again(tmp_path: Path):
    """They become text on the way, and text is sorted otherwise."""
    folder = save(tmp_path, 1, tensors(), {"data": {9: "nine", 10: "ten"}})
    assert checkpoint.open_checkpoint(folder).record["data"] == {"9": "nine", "10": "ten"}


def test_a_save_in_the_background_that_may_not_be_made_nicer_is_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernel refuses if the run is as nice already. An error of the thread would end the save without a word."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refuse)
    saver = Saver(tmp_path, in_background=True)
    saver.start(1, tensors(), RECORD, "")
    assert ended(saver).error is None
    assert is_good(tmp_path / "step-1", seed=0)


@contextlib.contextmanager
def failing_call(number: int) -> Iterator[list[str]]:
    """Lets the number-th call that changes the file system, or opens a file, fail as a broken disk does."""
    calls: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", wrapped("open", io.open))
        for name in ("fsync", "mkdir", "replace", "rename", "unlink", "rmdir", "scandir"):
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield calls


@pytest.mark.parametrize("in_background", [False, True])
def test_whichever_call_fails_the_error_is_told_nothing_is_left_and_the_next_save_works(
    tmp_path: Path, in_background: bool
):
    number, num_published = 0, 0
    while True:
        number += 1
        run = tmp_path / str(number)
        save(run, 1, tensors(1), RECORD)
        saver = Saver(run, keep_last=1, in_background=in_background)
        with failing_call(number) as calls:
            saver.start(2, tensors(2), RECORD, "")
            saved = ended(saver)
        if len(calls) < number:
            break
        what = f"call {number}, {calls[number - 1]}"
        assert not (run / "step-2.tmp").exists(), what
        if saved.error is None:  # the failure was in the deletion of the older one
            assert saved.remark is not None, what
            assert "is old and cannot be deleted: [Errno 5] Input/output error" in saved.remark, what
            assert is_good(run / "step-2", seed=2), what
            num_published += 1
        else:
            assert "Input/output error" in str(saved.error), what
            assert is_good(run / "step-1", seed=1), what
            saver.start(2, tensors(2), RECORD, "")
            assert ended(saver).error is None, what
            assert names(run) == ["step-2"], what
            assert is_good(run / "step-2", seed=2), what
        saver.start(3, tensors(3), RECORD, "")
        assert ended(saver).error is None, what
        assert names(run) == ["step-3"], what
    assert (saved.error, saved.remark) == (None, None)
    assert names(run) == ["step-2"]
    assert number > 15
    assert num_published > 3


def test_an_error_of_one_rank_is_every_ranks_and_the_next_save_works(tmp_path: Path):
    def fail_here_and_there(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        real, outcomes = tensor_file.write, []

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for in_background in (False, True):
            run = tmp_path / f"run-{in_background}"
            saver = Saver(run, keep_last=1, in_background=in_background)
            for step, failing in enumerate((None, 0, 1, None), start=1):
                tensor_file.write = full if failing == rank else real
                saver.start(step, sharded(step), RECORD, "")
                outcomes.append(f"{ended(saver).error}")
                dist.barrier()
                outcomes.append(" ".join(names(run)))
                dist.barrier()
                if failing is not None:
                    tensor_file.write = real
                    saver.start(step, sharded(step), RECORD, "")
                    outcomes.append(f"{ended(saver).error}")
        return outcomes

    first, second = run_ranks(fail_here_and_there, 2, tmp_path)
    for outcomes in (first, second):
        for start in (0, 10):
            good, after, error_0, after_0, again_0, error_1, after_1, again_1, last, final = outcomes[
                start : start + 10
            ]
            assert (good, after) == ("None", "step-1")
            assert "No space left on device" in error_0
            assert "No space left on device" in error_1
            assert (after_0, after_1) == ("step-1", "step-2")
            assert (again_0, again_1, last, final) == ("None", "None", "None", "step-4")
    assert "(rank 1)" in first[5]
    assert is_good(tmp_path / "run-True" / "step-4", seed=4)


def test_a_file_that_the_system_refuses_to_let_grow_fails_the_save_on_all_ranks(tmp_path: Path):
    """The real thing: the kernel stops the write of rank 1 in the middle of the file."""

    def limited(rank: int) -> tuple[str, int, str, str]:
        dist.init_process_group("gloo")
        run, mesh = tmp_path / "run", init_device_mesh("cpu", (2,))
        big = {"model.a": distribute_tensor(torch.arange(100_000.0), mesh, [Shard(0)])}
        saver, limits = Saver(run, keep_last=1, in_background=True), resource.getrlimit(resource.RLIMIT_FSIZE)
        saver.start(1, big, RECORD, "")
        assert ended(saver).error is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536 if rank == 1 else limits[0], limits[1]))
        saver.start(2, big, RECORD, "")
        error = str(ended(saver).error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        left = " ".join(names(run))
        dist.barrier()
        saver.start(2, big, RECORD, "")
        again = f"{ended(saver).error}"
        dist.barrier()
        return error, len(left), left, again

    for error, _, left, again in run_ranks(limited, 2, tmp_path):
        assert "File too large" in error
        assert (left, again) == ("step-1", "None")
    assert torch.equal(
        checkpoint.open_checkpoint(tmp_path / "run" / "step-2").read_tensors("model.")["a"], torch.arange(100_000.0)
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB, of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a file system here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_runs_full_while_writing_keeps_the_older_checkpoint_and_is_used_again(
    small_disk: Path, tmp_path: Path
):
    ballast = small_disk / "ballast"

    def fill(step: int) -> None:
        if step == 2:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(65536)):
                    pass

    def save_on_it(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        run, mesh, outcomes = small_disk / "run", init_device_mesh("cpu", (2,)), []
        big = {"model.a": distribute_tensor(torch.arange(500_000.0), mesh, [Shard(0)])}
        saver = Saver(run, keep_last=1, in_background=True, before_write=fill)
        for step in (1, 2):
            saver.start(step, big, RECORD, "")
            outcomes.append(f"{ended(saver).error}")
        dist.barrier()
        outcomes.append(" ".join(names(run)))
        dist.barrier()
        # The debris is gone, but the disk is as full as before: now it is noticed before anything is written.
        saver.start(3, big, RECORD, "")
        outcomes.append(f"{ended(saver).error}")
        if rank == 0:
            ballast.unlink()
        dist.barrier()
        saver.start(4, big, RECORD, "")
        outcomes.append(f"{ended(saver).error}")
        dist.barrier()
        outcomes.append(" ".join(names(run)))
        dist.barrier()
        return outcomes

    for first, full, left, refused, again, final in run_ranks(save_on_it, 2, tmp_path):
        assert first == "None"
        assert "No space left on device" in full
        assert left == "step-1"
        assert "a checkpoint needs 0.01 GB, 0.00 GB are free" in refused
        assert (again, final) == ("None", "step-4")


def test_a_save_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1, tensors(1), RECORD)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, (1 << 40) - 1000, 1000))
    written: list[int] = []
    saver = Saver(tmp_path, before_write=written.append)
    saver.start(2, tensors(2), RECORD, "")
    assert "GB are free on the disk; free some, older checkpoints perhaps, or move" in str(ended(saver).error)
    assert (written, names(tmp_path)) == ([], ["step-1"])
    monkeypatch.undo()
    saver.start(2, tensors(2), RECORD, "")
    assert ended(saver).error is None


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [80]), (2, None, [70, 80]), (2, 30, [30, 60, 70, 80]), (1, 10, [10, 20, 30, 40, 50, 60, 70, 80])],
)
def test_the_last_ones_and_every_so_manieth_are_kept(
    tmp_path: Path, keep_last: int, keep_every: int | None, left: list[int]
):
    for name in ("step-5.bad", "step-500.bad", "step-500.bad-2", "other"):
        (tmp_path / name).mkdir()
    saver = Saver(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in range(10, 90, 10):
        for name in ("step-900.tmp", "step-900.del", "step-3.tmp"):
            (tmp_path / name).mkdir()
        saver.start(step, tensors(step), RECORD, "")
        assert ended(saver).error is None
        assert len(checkpoint.steps(tmp_path)) >= min(step // 10, keep_last)
    assert checkpoint.steps(tmp_path) == left
    assert all(is_good(tmp_path / f"step-{step}", seed=step) for step in left)
    kept = {"step-5.bad", "step-500.bad", "step-500.bad-2", "other"}
    assert set(names(tmp_path)) == kept | {f"step-{step}" for step in left}


@pytest.mark.parametrize("in_background", [False, True])
def test_there_is_never_more_than_one_checkpoint_too_many_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
):
    most, run = 0, tmp_path / "run"

    def look(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            if run.is_dir():
                most = max(most, len(names(run)))
            result = real(*args, **kwargs)
            if run.is_dir():
                most = max(most, len(names(run)))
            return result

        return call

    for name in ("mkdir", "fsync", "replace", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, look(getattr(os, name)))
    saver = Saver(run, keep_last=2, in_background=in_background)
    for step in range(1, 8):
        saver.start(step, tensors(step), RECORD, "")
        assert ended(saver).error is None
    assert most == 3
    assert checkpoint.steps(run) == [6, 7]


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_whatever_bears_the_name_of_a_leftover_does_not_block_a_save(tmp_path: Path, kind: str):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("precious")
    save(run, 1, tensors(1), RECORD)
    for name in ("step-2.tmp", "step-1.del", "step-7.tmp"):
        if kind == "file":
            (run / name).write_text("?")
        elif kind == "link":
            (run / name).symlink_to(elsewhere)
        else:
            (run / name / "deep" / "deeper").mkdir(parents=True)
    save(run, 2, tensors(2), RECORD, keep=1)
    assert names(run) == ["step-2"]
    assert names(elsewhere) == ["kept"]


def test_what_cannot_be_deleted_is_in_nobodys_way_and_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a checkpoint that somebody evaluates from the same NFS client, a file stays while it is open."""
    saver, rmtree = Saver(tmp_path, keep_last=1), shutil.rmtree

    def held(folder: Path, **rest: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    saver.start(1, tensors(1), RECORD, "")
    assert ended(saver).remark is None
    monkeypatch.setattr(shutil, "rmtree", held)
    for step in (2, 3):
        saver.start(step, tensors(step), RECORD, "")
        saved = ended(saver)
        assert saved.error is None
        assert f"step-{step - 1} is old and cannot be deleted: " in str(saved.remark)
    assert names(tmp_path) == ["step-1.del", "step-2.del", "step-3"]
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    saver.start(4, tensors(4), RECORD, "")
    assert ended(saver).remark is None
    assert names(tmp_path) == ["step-4"]


def test_a_folder_of_a_higher_number_does_not_have_the_new_ones_deleted_as_old(tmp_path: Path):
    """Somebody copied it there while the run was training."""
    save(tmp_path, 10, tensors(10), RECORD)
    shutil.copytree(tmp_path / "step-10", tmp_path / "step-5000")
    for step in (11, 12):
        save(tmp_path, step, tensors(step), RECORD, keep=1)
    assert names(tmp_path) == ["step-12", "step-5000"]


def test_a_step_that_is_there_already_is_refused_before_anything_is_written(tmp_path: Path):
    save(tmp_path, 1, tensors(1), RECORD)
    written: list[int] = []
    saver = Saver(tmp_path, before_write=written.append)
    saver.start(1, tensors(2), RECORD, "")
    assert "step-1 is already there: another run writes into the same folder" in str(ended(saver).error)
    assert (written, names(tmp_path)) == ([], ["step-1"])
    assert is_good(tmp_path / "step-1", seed=1)


def test_a_new_run_folder_is_on_the_disk_with_its_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    log = Log(monkeypatch)
    save(tmp_path / "runs" / "new", 1, tensors(), RECORD)
    assert log.events[:2] == [("fsync", tmp_path), ("fsync", tmp_path / "runs")]


def test_a_checkpoint_that_is_a_link_is_dropped_without_what_it_leads_to(tmp_path: Path):
    """Somebody moved an old one to a larger disk."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.move(save(run, 1, tensors(1), RECORD), elsewhere)
    (run / "step-1").symlink_to(elsewhere)
    save(run, 2, tensors(2), RECORD, keep=1)
    save(run, 3, tensors(3), RECORD, keep=1)
    assert names(run) == ["step-3"]
    assert is_good(elsewhere, seed=1)


class Log:
    """What reaches the disk, and in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[tuple[str, Path]] = []
        self.synced: dict[Path, bytes] = {}
        """Of every file the content when it was fsynced last."""
        self.at_rename: dict[Path, tuple[dict[Path, bytes], dict[Path, bytes]]] = {}
        """Of every folder that was renamed: what was in its files, and what of that was surely on the disk."""
        fsync, replace, rename = os.fsync, os.replace, os.rename

        def log_fsync(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            self.events.append(("fsync", path))
            if path.is_file():
                self.synced[path] = path.read_bytes()

        def moving(real: Callable[..., Any]) -> Callable[..., Any]:
            def move(source: Path, target: Path) -> None:
                files = {path: path.read_bytes() for path in Path(source).iterdir()}
                self.at_rename[Path(target)] = (files, dict(self.synced))
                self.events.append(("rename", Path(target)))
                real(source, target)

            return move

        monkeypatch.setattr(os, "fsync", log_fsync)
        monkeypatch.setattr(os, "replace", moving(replace))
        monkeypatch.setattr(os, "rename", moving(rename))


def test_every_file_is_on_the_disk_before_the_rename_and_the_rename_before_anything_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1, tensors(1), RECORD)
    log = Log(monkeypatch)
    save(tmp_path, 2, tensors(2), RECORD, "[run]\n", keep=1)
    files, synced = log.at_rename[tmp_path / "step-2"]
    assert {path.name for path in files} == {"rank-00000.safetensors", "config.toml", "record.json"}
    assert all(synced.get(path) == content for path, content in files.items())
    commit = log.events.index(("rename", tmp_path / "step-2"))
    assert log.events[commit - 1] == ("fsync", tmp_path / "step-2.tmp")
    assert log.events[commit + 1 :] == [("fsync", tmp_path), ("rename", tmp_path / "step-1.del")]


def test_setting_a_damaged_checkpoint_aside_is_on_the_disk_before_the_next_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1, tensors(1), RECORD)
    (save(tmp_path, 2, tensors(2), RECORD) / "config.toml").unlink()
    log = Log(monkeypatch)
    newest = checkpoint.newest_valid(tmp_path, lambda text: None)
    assert newest is not None
    assert log.events == [("rename", tmp_path / "step-2.bad"), ("fsync", tmp_path)]


def saves_beside_collectives(run: Path, num_saves: int) -> Callable[[int], list[float]]:
    def train(rank: int) -> list[float]:
        dist.init_process_group("gloo")
        saver, weights = Saver(run, keep_last=2, in_background=True), sharded(0)
        errors = num_collectives = 0
        for step in range(1, num_saves + 1):
            saver.start(step, weights, {"data": step}, "")
            done = torch.zeros(1)
            while not done.item():  # the main thread talks as long as the other one does, on every rank as often
                total = torch.full((1000,), float(rank + step))
                dist.all_reduce(total)
                assert torch.equal(total, torch.full((1000,), 2.0 * step + 1))
                done = torch.tensor([float(saver._thread is None or not saver._thread.is_alive())])
                dist.all_reduce(done, op=dist.ReduceOp.MIN)
                num_collectives += 2
            errors += ended(saver).error is not None
        dist.barrier()
        return [errors, num_collectives]

    return train


def test_saves_in_the_background_do_not_mix_with_the_collectives_of_the_training(tmp_path: Path):
    outcomes = run_ranks(saves_beside_collectives(tmp_path / "run", 40), 2, tmp_path)
    assert [errors for errors, _ in outcomes] == [0, 0]
    assert outcomes[0][1] == outcomes[1][1] >= 80
    assert checkpoint.steps(tmp_path / "run") == [39, 40]
    assert is_good(tmp_path / "run" / "step-40", seed=0)


@pytest.mark.slow
def test_hundreds_of_saves_in_the_background_do_not_mix_with_the_collectives_of_the_training(tmp_path: Path):
    outcomes = run_ranks(saves_beside_collectives(tmp_path / "run", 500), 2, tmp_path, timeout_s=280)
    assert [errors for errors, _ in outcomes] == [0, 0]
    assert is_good(tmp_path / "run" / "step-500", seed=0)

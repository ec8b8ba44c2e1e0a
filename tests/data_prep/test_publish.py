import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import publish


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    publish.write_text(path, "old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        publish.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_published_folder_replaces_the_old_one_whole(tmp_path: Path):
    target = tmp_path / "data"
    for content in ("one", "two"):
        temporary = publish.temporary_beside(target)
        temporary.mkdir()
        (temporary / content).write_text(content)
        publish.publish_folder(temporary, target)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_leftovers_of_dead_runs_go_and_everything_else_stays(tmp_path: Path):
    host, pid = socket.gethostname(), dead_pid()
    dead = tmp_path / f"data.tmp-{host}-{pid}-0123abcd"
    others = [
        tmp_path / f"data.tmp-{host}-{os.getpid()}-0123abcd",  # a living run
        tmp_path / f"data.tmp-elsewhere-{pid}-0123abcd",  # another host's processes cannot be seen from here
        tmp_path / f"data2.tmp-{host}-{pid}-0123abcd",
        tmp_path / f"data.tmp-{host}-{pid}",
        tmp_path / "data",
    ]
    for folder in (dead, *others):
        (folder / "train").mkdir(parents=True)
    assert publish.remove_leftovers(tmp_path, "data") == [dead]
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_temporary_name_is_recognised_by_the_cleaner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "getpid", dead_pid)
    leftover = publish.temporary_beside(tmp_path / "data.v2")
    leftover.write_text("")
    assert publish.remove_leftovers(tmp_path, "data.v2") == [leftover]


def test_without_a_name_the_leftovers_of_every_name_go(tmp_path: Path):
    host, pid = socket.gethostname(), dead_pid()
    dead = [tmp_path / f"{name}.tmp-{host}-{pid}-0123abcd" for name in ("a.json", "b.json")]
    living = tmp_path / f"a.json.tmp-{host}-{os.getpid()}-0123abcd"
    for path in (*dead, living):
        path.write_text("")
    assert publish.remove_leftovers(tmp_path) == dead
    assert list(tmp_path.iterdir()) == [living]

"""A run folder says what it holds, and what is wrong with it by name and with a remedy."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.config_file import to_toml
from data_prep.manifest import read_manifest
from resume import checkpoint, requests
from resume.checkpoint import CheckpointError, DamagedError
from resume.manifest import DataError, listed_files
from resume.order import Order
from resume.runs import RequestError, open_run, read_paths
from resume.state import Remove
from tests.prepared import texts_about, write_data
from tests.records import rewrite, save
from tests.resume.walks import Walk, begun
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was saved at steps 1 and 3, and its data; it has no tensors, as nothing here asks for them."""
    root = tmp_path_factory.mktemp("prepared")
    folder = write_data(root / "data")
    files = listed_files({folder: read_manifest(folder)}, "train")
    config = tiny_run(Path("data"), Path("run"))
    walk = Walk(begun({"test": [file.file_id for file in files]}, 32))
    for steps in (1, 2):
        walk.steps(steps)
        record = {"data": walk.state.to_json(), "trained": walk.ledger().to_json()}
        save(root / "run", walk.state.step, {}, record, to_toml(config))
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it where the run's files lie below the working directory."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "data"
    paths = {file.file_id: str(file.path) for file in listed_files({folder: read_manifest(folder)}, "train")}
    (tmp_path / "run" / "files.json").write_text(json.dumps(paths))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_what_its_newest_checkpoint_says(root: Path):
    run = open_run(root / "run")
    record = checkpoint.read_record(root / "run" / "step-3")
    assert (run.folder, run.checkpoint) == (root / "run", root / "run" / "step-3")
    assert (run.state.step, run.state.position) == (3, 12)
    assert run.state.to_json() == record["data"]
    assert run.order.file_ids == run.ledger.file_ids == Order(run.state).file_ids
    assert run.ledger.counts.sum() == 12
    assert (run.config["run"]["num_steps"], run.pending) == (6, [])
    shutil.rmtree(root / "run" / "step-3")
    assert open_run(root / "run").state.step == 1


def test_what_waits_is_tried_in_turn_and_what_will_be_refused_changes_nothing(root: Path):
    run = open_run(root / "run")
    file_id = run.order.file_ids[0]
    wanted = [{"kind": "remove", "file_ids": [file_id]}] * 2 + [{"kind": "requeue"}]
    for request in wanted:
        requests.queue(root / "run", request)
    run = open_run(root / "run")
    assert run.pending == list(enumerate(wanted, 1))
    changed, refused = run.with_pending()
    assert refused == [f"request 2: file {file_id} is removed already"]
    assert [type(event).__name__ for event in changed.events[len(run.state.events) :]] == ["Remove", "Requeue"]
    assert not any(isinstance(event, Remove) for event in run.state.events)


def test_a_request_that_cannot_be_replayed_will_be_refused(root: Path):
    requests.queue(root / "run", {"kind": "skip", "num_steps": 10**6, "for_good": True})
    run = open_run(root / "run")
    changed, refused = run.with_pending()
    assert changed == run.state
    assert re.fullmatch(r"request 1: skip of 1000000 steps: the whole data is \d+ steps; skip no more.*", refused[0])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "nowhere: no such run folder"),
        ("data/manifest.json", "manifest.json: no such run folder"),
        ("data", "data: no checkpoint yet, so there is nothing to ask or change; wait for the first one"),
    ],
)
def test_what_is_no_run_with_a_checkpoint_is_refused(root: Path, place: str, message: str):
    with pytest.raises(DataError, match=message):
        open_run(root / place)


def cut_record(step: Path) -> None:
    content = (step / "record.json").read_bytes()
    (step / "record.json").write_bytes(content[: len(content) // 2])


def flip_cursor(step: Path) -> None:
    record = step / "record.json"
    record.write_text(record.read_text().replace('"position": 12', '"position": 13'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_record, "step-3/record.json: unreadable .*; restore the file, or move its folder away"),
        (flip_cursor, "step-3/record.json: damaged, its hash does not match; restore the file, or move its folder"),
        (lambda step: (step / "record.json").unlink(), "step-3: no record.json, so not a checkpoint"),
        (lambda step: (step / "record.json").write_text("[]"), "step-3/record.json: damaged"),
    ],
    ids=["cut", "cursor", "missing", "no table"],
)
def test_a_damaged_record_is_refused_by_name_though_an_older_checkpoint_is_good(
    root: Path, damage: Callable[[Path], Any], message: str
):
    damage(root / "run" / "step-3")
    with pytest.raises(CheckpointError, match=message):
        open_run(root / "run")
    shutil.move(root / "run" / "step-3", root / "damaged")  # the remedy
    assert open_run(root / "run").state.step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("data"), "its record has no 'data'; it was written by another version"),
        (lambda record: record.pop("trained"), "its record has no 'trained'"),
        (lambda record: record["data"].update(schema=1), "data state of schema 1, .*resume with the version that"),
        (lambda record: record["data"].pop("seed"), "missing or unknown field .*the record is damaged"),
        (lambda record: record["data"].update(position=10**6, max_epochs={"": 1}), "the data ends at group"),
        (lambda record: record["trained"]["counts"].pop(), "record of trained samples has 4 files, its state 5"),
        (lambda record: record.update(data=None), "data state that is no table"),
    ],
)
def test_a_record_that_makes_no_run_is_refused_by_name(root: Path, change: Callable[[dict], object], message: str):
    rewrite(root / "run" / "step-3" / "record.json", change)
    with pytest.raises(DataError, match=f"^{root}/run/step-3: .*{message}"):
        open_run(root / "run")


def test_a_record_that_vouches_for_no_config_is_refused(root: Path):
    rewrite(root / "run" / "step-3" / "record.json", lambda record: record["files"].pop("config.toml"))
    with pytest.raises(DamagedError, match=r"step-3/record\.json: damaged, it names no files, no config or no step"):
        open_run(root / "run")


@pytest.mark.parametrize("content", [b"", b"[run", b"\xff\xfe", None], ids=["empty", "no TOML", "no text", "missing"])
def test_a_damaged_config_is_refused_by_name(root: Path, content: bytes | None):
    path = root / "run" / "step-3" / "config.toml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"step-3/config\.toml: .*; restore the file"):
        open_run(root / "run")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_a_config_that_has_no_end_is_not_opened(root: Path, make: Callable[[Path], object]):
    path = root / "run" / "step-3" / "config.toml"
    path.unlink()
    make(path)
    with pytest.raises(DamagedError, match="record names 'config.toml', which is not a file of a checkpoint"):
        open_run(root / "run")


def test_a_run_of_which_nothing_good_is_left_is_told_from_one_that_has_not_saved(root: Path):
    for step in (1, 3):
        (root / "run" / f"step-{step}").rename(root / "run" / f"step-{step}.bad")
    with pytest.raises(DataError, match=r"no good checkpoint is left, only step-1\.bad, step-3\.bad; restore one"):
        open_run(root / "run")


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\xfe", b"null", b"[]", b'"x"', b'{"a": 5}', b'{"a": null}', b'{"a": ["/x"]}'],
)
def test_damaged_paths_are_none_and_files_are_found_by_the_manifest_or_by_content(root: Path, content: bytes | None):
    path = root / "run" / "files.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert read_paths(root / "run") == {}
    run = open_run(root / "run")
    assert run.paths == {}
    found = run.look_for(run.order.file_ids)
    listed = listed_files({Path("data"): read_manifest(root / "data")}, "train")
    assert {i: file.path for i, file in found.items()} == {file.file_id: file.path for file in listed}
    file = listed[0]
    assert run.identify(str(file.path), run.order.file_ids) == file.file_id


def test_files_of_a_run_are_found_where_they_were_moved_to_and_lost_ones_left_out(root: Path):
    run = open_run(root / "run")
    first, second, *others = run.order.file_ids
    run.paths[first].rename(root / "data" / "moved.bin")
    run.paths[second].unlink()
    found = run.look_for(run.order.file_ids)
    assert sorted(found) == sorted([first, *others])
    assert found[first].path == root / "data" / "moved.bin"
    shutil.rmtree(root / "data")
    assert run.data_folders == {}
    assert run.look_for(run.order.file_ids) == {}


def test_files_that_wait_to_be_appended_have_paths_too(root: Path):
    more = write_data(root / "more", texts=texts_about("more", 40))
    new = listed_files({more: read_manifest(more)}, "train")
    before = open_run(root / "run").paths
    request = {"kind": "append", "files": {"test": {f.file_id: str(f.path) for f in new}}, "weights": None}
    requests.queue(root / "run", request)
    assert open_run(root / "run").paths == {**before, **{file.file_id: file.path for file in new}}


def test_a_file_goes_by_identity_beginning_path_or_content(root: Path):
    run = open_run(root / "run")
    known = run.order.file_ids
    for file_id in known:
        path = run.paths[file_id]
        shortest = next(n for n in range(6, 33) if sum(other.startswith(file_id[:n]) for other in known) == 1)
        names = [
            file_id,
            file_id[:shortest],
            file_id[:40],
            path,
            path.relative_to(root),
            path.name,
            f"train/{path.name}",
        ]
        for name in [*names, root / "data" / ".." / path.relative_to(root)]:
            assert run.identify(str(name), known) == file_id
        assert run.identify(str(shutil.copy(path, root / "copy.bin")), known) == file_id


def refusal(root: Path, name: str | Path, known: list[str] | None = None) -> str:
    run = open_run(root / "run")
    with pytest.raises(RequestError) as refused:
        run.identify(str(name), run.order.file_ids if known is None else known)
    return str(refused.value)


def test_what_fits_no_file_of_the_run_is_refused_with_a_way_to_list_them(root: Path):
    run = open_run(root / "run")
    held_out = next((root / "data" / "validation").iterdir())
    file_id = run.order.file_ids[0]
    names = ["nothing.bin", file_id[:5], f"{file_id}0", file_id[1:], "00000.bin", "train", "", "/", root, held_out]
    for name in names:
        message = refusal(root, name)
        assert message.startswith(
            f"{name}: no file of the run; give a path, a file name, or an identity or its first 6"
        )
        assert f"`python -m resume audit {root}/run`" in message
    # Known to the run, but none of those that are asked about.
    assert "no file of the run" in refusal(root, run.paths[file_id], known=run.order.file_ids[1:])


def test_what_fits_several_files_is_refused_with_two_of_them(root: Path):
    run = open_run(root / "run")
    a, b, c, *_ = run.order.file_ids
    twins = {a: "/one/web.bin", b: "/two/web.bin", c: "/three/web.bin"}
    (root / "run" / "files.json").write_text(json.dumps(twins))
    assert refusal(root, "web.bin") == "web.bin: fits 3 files of the run, as /one/web.bin and /three/web.bin; give more"
    assert open_run(root / "run").identify("two/web.bin", run.order.file_ids) == b
    alike = [f"{'a' * 32}-{'b' * 32}-{size}" for size in (4_100, 4_200)]
    assert f"fits 2 files of the run, as {alike[0]} and {alike[1]}" in refusal(root, "aaaaaa", alike)
    # Of a file that was replaced by another, the run knows both: by their path they cannot be told apart.
    (root / "run" / "files.json").write_text(json.dumps({a: "/one/web.bin", b: "/one/web.bin"}))
    assert f"fits 2 files of the run, as {a} and {b}; give more" in refusal(root, "/one/web.bin")


def logged(root: Path, *lines: str) -> float | None:
    (root / "run" / "metrics.jsonl").write_text("".join(lines))
    return open_run(root / "run").step_s()


def step_line(step_s: float) -> str:
    return json.dumps({"step": 1, "loss": 2.0, "step_s": step_s}) + "\n"


def test_the_duration_of_a_step_is_the_median_of_late(root: Path):
    assert open_run(root / "run").step_s() is None
    assert logged(root) is None
    assert logged(root, '{"step": 1, "validation_loss": 3.0}\n') is None
    assert logged(root, *map(step_line, (9.0, 1.0, 2.0))) == 2.0
    assert (
        logged(root, step_line(2.0), '{"step": 1, "validation_loss": 3.0}\n', step_line(2.0), '{"step": 2, "st') == 2.0
    )
    # A log that is longer than what is read of it, from the middle of a line on.
    assert logged(root, *(step_line(100.0) for _ in range(5_000)), *(step_line(0.5) for _ in range(200))) == 0.5

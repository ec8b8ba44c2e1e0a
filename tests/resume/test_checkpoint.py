import errno
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import publish
from resume import checkpoint, tensor_file
from resume.checkpoint import CheckpointError, DamagedError, SaveError
from resume.regions import Region, tiles
from tests.records import rewrite, save, tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run", 12, tensors(), {"data": {"position": 4}}, "[run]\n", keep=3)


def test_what_is_saved_is_loaded_bit_for_bit(saved: Path):
    target = {name: torch.zeros_like(value) for name, value in tensors().items()}
    opened = checkpoint.open_checkpoint(saved)
    opened.load_into(target)
    assert (opened.record["step"], opened.record["data"]) == (12, {"position": 4})
    assert all(torch.equal(target[name], value) for name, value in tensors().items())
    whole = checkpoint.open_checkpoint(saved).read_tensors("model.")
    assert set(whole) == {"a", "b"}
    assert torch.equal(whole["b"], tensors()["model.b"])


def test_the_newest_checkpoint_is_the_highest_number(tmp_path: Path):
    for step in (960_000, 1_000_000, 99):
        (tmp_path / f"step-{step}").mkdir()
    for other in ("step-2000000.tmp", "step-3000000.del", "step-x", "step-"):
        (tmp_path / other).mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path: Path):
    run = tmp_path / "run"
    for name in ("step-5.tmp", "step-4.tmp", "step-0.del"):
        (run / name).mkdir(parents=True)
        (run / name / "garbage").write_text("half")
    save(run, 5, tensors(), {}, "", keep=1)
    assert sorted(path.name for path in run.iterdir()) == ["step-5"]
    assert not (run / "step-5" / "garbage").exists()


def test_saving_a_step_that_is_already_there_is_refused(saved: Path):
    with pytest.raises(SaveError, match="another run writes into the same folder"):
        save(saved.parent, 12, tensors(seed=1), {}, "", keep=3)
    assert torch.equal(checkpoint.open_checkpoint(saved).read_tensors("model.")["a"], tensors()["model.a"])


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_in_any_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = save(tmp_path_factory.mktemp("run"), 1, tensors(), {"data": 1}, "[run]\n", keep=1)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name}.*(damaged|unreadable)"):
        checkpoint.open_checkpoint(folder).load_into(tensors())


def test_a_missing_file_is_named(saved: Path):
    (saved / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors: missing"):
        checkpoint.open_checkpoint(saved).load_into(tensors())


def test_a_cut_record_and_another_format_are_refused(saved: Path):
    record = saved / "record.json"
    text = record.read_text()
    record.write_text(text[:-20])
    with pytest.raises(CheckpointError, match=r"record\.json: unreadable"):
        checkpoint.read_record(saved)
    record.write_text(text)
    rewrite(record, lambda table: table.update(format=99))
    with pytest.raises(CheckpointError, match="format 99, this version reads 2"):
        checkpoint.read_record(saved)
    record.unlink()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read_record(saved)


def test_a_checkpoint_of_an_older_format_is_named_and_left_alone(tmp_path: Path):
    """One that the first version of this format wrote, kept here as it was."""
    shutil.copytree(Path(__file__).parent / "format-1", tmp_path / "run")
    message = r"step-3/record\.json: format 1, this version reads 2; resume with the one that wrote it"
    for load in (checkpoint.open_checkpoint, checkpoint.verify, checkpoint.read_record):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "run" / "step-3")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.newest_valid(tmp_path / "run", lambda text: None)
    assert checkpoint.steps(tmp_path / "run") == [3]


def test_what_cannot_be_read_now_is_not_taken_for_damaged(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that is away for a minute must not cost a run all its checkpoints."""
    save(saved.parent, 13, tensors(), {}, "", keep=3)

    def fail(path: Path) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_described", fail)
    with pytest.raises(CheckpointError, match=r"step-13: cannot be read now; try again.*: .*Input/output error") as e:
        checkpoint.newest_valid(saved.parent, lambda text: None)
    assert not isinstance(e.value, DamagedError)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["step-12", "step-13"]


def test_a_copy_under_a_higher_number_is_not_taken_for_the_newest(saved: Path):
    shutil.copytree(saved, saved.with_name("step-5000"))
    with pytest.raises(CheckpointError, match="step-5000: holds step-12; give it that name, or move it away"):
        checkpoint.newest_valid(saved.parent, lambda text: None)
    shutil.rmtree(saved.with_name("step-5000"))  # the remedy
    newest = checkpoint.newest_valid(saved.parent, lambda text: None)
    assert newest is not None
    assert newest.folder == saved


def test_the_reason_of_the_damage_is_said_though_the_folder_cannot_be_moved(
    saved: Path, monkeypatch: pytest.MonkeyPatch
):
    (saved / "config.toml").unlink()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(publish, "publish", refuse)
    with pytest.raises(CheckpointError, match=r"config\.toml: missing.*; it cannot be moved aside: .*Read-only"):
        checkpoint.newest_valid(saved.parent, lambda text: None)


def test_a_record_that_points_outside_its_folder_is_refused(saved: Path, tmp_path: Path):
    shutil.move(saved / "config.toml", tmp_path / "config.toml")
    record = saved / "record.json"
    rewrite(record, lambda table: table["files"].update({"../../config.toml": table["files"]["config.toml"]}))
    with pytest.raises(CheckpointError, match="not a file of a checkpoint"):
        checkpoint.open_checkpoint(saved).load_into(tensors())


def test_names_shapes_and_dtypes_must_agree(saved: Path):
    renamed = {name.replace("model.b", "model.c"): value for name, value in tensors().items()}
    with pytest.raises(CheckpointError, match=r"lacks tensors \['model\.c'\], has unknown ones \['model\.b'\]"):
        checkpoint.open_checkpoint(saved).load_into(renamed)
    with pytest.raises(CheckpointError, match=r"model\.a is \(5, 3\) torch\.float32, this run has \(3, 5\)"):
        checkpoint.open_checkpoint(saved).load_into({**tensors(), "model.a": torch.zeros(3, 5)})
    with pytest.raises(CheckpointError, match="bfloat16"):
        checkpoint.open_checkpoint(saved).load_into({**tensors(), "model.b": torch.zeros(7)})


def test_pieces_that_do_not_cover_a_tensor_are_refused(saved: Path):
    rewrite(saved / "record.json", lambda table: table["tensors"]["model.a"].update(pieces=[]))
    with pytest.raises(CheckpointError, match="pieces of model.a do not cover it"):
        checkpoint.open_checkpoint(saved).load_into(tensors())
    with pytest.raises(CheckpointError, match="pieces of model.a do not cover it"):
        checkpoint.open_checkpoint(saved).read_tensors("model.")


def test_a_full_disk_leaves_the_older_checkpoint_and_publishes_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", full)
    with pytest.raises(SaveError, match="cannot write .* No space left on device"):
        save(saved.parent, 13, tensors(), {}, "", keep=1)
    assert checkpoint.latest(saved.parent) == saved
    assert checkpoint.open_checkpoint(saved).record["step"] == 12


boxes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3).map(
    lambda pairs: Region(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
)


@given(a=boxes, b=boxes)
def test_the_intersection_of_boxes_is_the_set_of_common_points(a: Region, b: Region):
    if len(a.shape) != len(b.shape):
        return
    whole = torch.zeros((13,) * len(a.shape), dtype=torch.int64)
    whole[a.slices()] += 1
    whole[b.slices()] += 2
    common = a.intersection(b)
    assert common.is_empty == (not bool((whole == 3).any()))
    if not common.is_empty:
        assert bool((whole[common.slices()] == 3).all())
        assert whole[common.slices()].numel() == int((whole == 3).sum())


@given(data=st.data())
def test_boxes_make_up_a_whole_if_each_point_of_it_is_in_one(data: st.DataObject):
    """Held against a count of points, for boxes cut along one dimension, and for those and others a little off."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    whole = Region(tuple(data.draw(st.integers(0, 2)) for _ in shape), shape)
    dim = data.draw(st.integers(0, max(0, len(shape) - 1)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 3)))) if shape else []
    ends = [*(cut for cut in cuts if cut < shape[dim]), shape[dim]] if shape else [1]
    boxes = [whole]
    if shape:
        spans = zip([0, *ends], ends, strict=False)
        boxes = [box_of(whole, dim, first, last) for first, last in spans]
    if data.draw(st.booleans()):
        boxes = data.draw(st.lists(st.sampled_from(boxes), max_size=4))
    elif shape and data.draw(st.booleans()):
        odd = data.draw(st.sampled_from(boxes))
        boxes[boxes.index(odd)] = box_of(odd, data.draw(st.integers(0, len(shape) - 1)), 0, 1)
    boxes = data.draw(st.permutations(boxes))
    points = torch.zeros((7,) * len(shape), dtype=torch.int64)
    for box in boxes:
        points[box.slices()] += 1
    expected = torch.zeros_like(points)
    expected[whole.slices()] = 1
    assert tiles(boxes, whole) == torch.equal(points, expected)


def box_of(whole: Region, dim: int, first: int, last: int) -> Region:
    """The part of a box from first to last in one dimension."""
    offset, shape = list(whole.offset), list(whole.shape)
    offset[dim], shape[dim] = offset[dim] + first, last - first
    return Region(tuple(offset), tuple(shape))

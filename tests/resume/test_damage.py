"""Nothing that time does to a checkpoint goes unnoticed, and the one before it is taken."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from resume import checkpoint
from resume.checkpoint import CheckpointError, DamagedError
from tests.processes import run_ranks
from tests.records import rewrite, save, tensors

RECORD = {"loss": 1e-05, "data": {"position": 4, "files": ["données"]}, "guard": [0.25, 1e300, None]}


def save_steps(run: Path, *steps: int) -> Path:
    for step in steps:
        save(run, step, tensors(step), RECORD, f"[run]\nnum_steps = {step}\n")
    return run


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load(folder: Path) -> None:
    checkpoint.open_checkpoint(folder).load_into(tensors())


def undetected(folder: Path, changes: list[tuple[Path, int]], change: Callable[[bytes, int], bytes]) -> list[str]:
    """The changes of a file, each described by a number, after which the checkpoint loads without a word."""
    loaded = []
    for path, number in changes:
        content = path.read_bytes()
        path.write_bytes(change(content, number))
        try:
            load(folder)
        except DamagedError as error:  # nothing else: after another error the run does not go back
            if folder.name not in str(error):
                loaded.append(f"{path.name} {number}, not named in: {error}")
        else:
            loaded.append(f"{path.name} {number}")
        path.write_bytes(content)
    load(folder)
    return loaded


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def random_bits(folder: Path, count: int) -> list[tuple[Path, int]]:
    draw, paths = random.Random(count), sorted(folder.iterdir())
    return [(path, draw.randrange(8 * path.stat().st_size)) for path in draw.choices(paths, k=count)]


def test_none_of_five_hundred_flipped_bits_goes_unnoticed(tmp_path: Path):
    folder = save_steps(tmp_path, 1) / "step-1"
    assert undetected(folder, random_bits(folder, 500), flipped) == []


@pytest.mark.slow
def test_none_of_ten_thousand_flipped_bits_goes_unnoticed(tmp_path: Path):
    folder = save_steps(tmp_path, 1) / "step-1"
    assert undetected(folder, random_bits(folder, 10_000), flipped) == []


@pytest.mark.slow
def test_no_single_flipped_bit_of_a_checkpoint_goes_unnoticed(tmp_path: Path):
    folder = save_steps(tmp_path, 1) / "step-1"
    every = [(path, bit) for path in sorted(folder.iterdir()) for bit in range(8 * path.stat().st_size)]
    assert undetected(folder, every, flipped) == []


@pytest.mark.parametrize(("old", "new"), [("1e-05", "1E-05"), ("\\u00e9", "\\u00E9"), (": 4", ":  4")])
def test_a_record_that_says_the_same_in_other_bytes_is_damaged_too(tmp_path: Path, old: str, new: str):
    """The first two are one bit apart."""
    record = save_steps(tmp_path, 1) / "step-1" / "record.json"
    text = record.read_text()
    assert old in text
    record.write_text(text.replace(old, new))
    with pytest.raises(DamagedError, match=r"record\.json: damaged"):
        load(record.parent)


def test_no_file_can_be_cut_anywhere_unnoticed(tmp_path: Path):
    folder = save_steps(tmp_path, 1) / "step-1"
    cuts = [(path, length) for path in sorted(folder.iterdir()) for length in range(path.stat().st_size)]
    assert len(cuts) > 1000
    assert undetected(folder, cuts, lambda content, length: content[:length]) == []


def test_no_file_can_grow_unnoticed(tmp_path: Path):
    folder = save_steps(tmp_path, 1) / "step-1"
    longer = [(path, count) for path in sorted(folder.iterdir()) for count in (1, 8, 4096)]
    for more in (b"\0", b" ", b"\n"):
        assert undetected(folder, longer, lambda content, count, more=more: content + more * count) == []


def cut_record(folder: Path) -> None:
    record = folder / "record.json"
    record.write_bytes(record.read_bytes()[:-30])


def become_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("?")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors flipped": (
        lambda folder: (path := folder / "rank-00000.safetensors").write_bytes(flipped(path.read_bytes(), 2001)),
        r"rank-00000\.safetensors: .*The file is damaged",
    ),
    "tensors cut": (
        lambda folder: (path := folder / "rank-00000.safetensors").write_bytes(path.read_bytes()[:-1]),
        r"rank-00000\.safetensors: .*'size_bytes'.*The file is damaged",
    ),
    "tensors missing": (
        lambda folder: (folder / "rank-00000.safetensors").unlink(),
        r"rank-00000\.safetensors: missing",
    ),
    "config missing": (lambda folder: (folder / "config.toml").unlink(), r"config\.toml: missing"),
    "config changed": (lambda folder: (folder / "config.toml").write_text("[run]\n"), r"config\.toml: .* damaged"),
    "record cut": (cut_record, r"record\.json: unreadable"),
    "record empty": (lambda folder: (folder / "record.json").write_bytes(b""), r"record\.json: unreadable"),
    "record missing": (lambda folder: (folder / "record.json").unlink(), r"no record\.json, so not a checkpoint"),
    "all missing": (lambda folder: [path.unlink() for path in folder.iterdir()], r"no record\.json"),
    "a file in its place": (become_a_file, r"no record\.json, so not a checkpoint"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_reason_is_told_and_the_one_before_is_taken(tmp_path: Path, damage: str):
    run = save_steps(tmp_path, 1, 2, 3)
    change, reason = DAMAGES[damage]
    change(run / "step-3")
    before = contents(run / "step-3") if (run / "step-3").is_dir() else None
    notes: list[str] = []
    newest = checkpoint.newest_valid(run, notes.append)
    assert newest is not None
    assert newest.record["step"] == 2
    values = newest.read_tensors("")
    assert all(torch.equal(values[name], value) for name, value in tensors(2).items())
    with pytest.raises(DamagedError, match=reason):
        raise DamagedError(*notes)
    assert len(notes) == 1
    assert notes[0].startswith("checkpoint step-3 REJECTED: ")
    assert notes[0].endswith("Moved to step-3.bad; trying the previous one")
    assert names(run) == ["step-1", "step-2", "step-3.bad"]
    if before is not None:
        assert contents(run / "step-3.bad") == before
    save_steps(run, 3)  # its number is free
    again = checkpoint.newest_valid(run, pytest.fail)
    assert again is not None
    assert again.record["step"] == 3


def test_a_step_that_is_damaged_again_and_again_gets_another_name_each_time(tmp_path: Path):
    run = save_steps(tmp_path, 1)
    (run / "step-2.bad-3").symlink_to("nowhere")  # taken, too
    for _ in range(4):
        save_steps(run, 2)
        cut_record(run / "step-2")
        newest = checkpoint.newest_valid(run, lambda text: None)
        assert newest is not None
        assert newest.record["step"] == 1
    assert names(run) == ["step-1", *(f"step-2.bad{number}" for number in ("", "-2", "-3", "-4", "-5"))]


def test_several_damaged_ones_are_all_passed_over(tmp_path: Path):
    run, notes = save_steps(tmp_path, 9, 10, 11, 100), []
    for step in (10, 11, 100):
        cut_record(run / f"step-{step}")
    newest = checkpoint.newest_valid(run, notes.append)
    assert newest is not None
    assert newest.record["step"] == 9
    assert [note.split()[1] for note in notes] == ["step-100", "step-11", "step-10"]


def test_leftovers_are_no_checkpoints_and_stay_where_they_are(tmp_path: Path):
    run = save_steps(tmp_path, 5)
    leftovers = ["step-9.tmp", "step-8.del", "step-7.bad", "step-7.bad-2", "step-", "step-x", "step-06", "step-٧"]
    for name in leftovers:
        shutil.copytree(run / "step-5", run / name)
    newest = checkpoint.newest_valid(run, pytest.fail)
    assert newest is not None
    assert newest.folder == run / "step-5"
    assert names(run) == sorted([*leftovers, "step-5"])


def test_a_run_with_nothing_but_leftovers_of_a_killed_first_save_has_no_checkpoint(tmp_path: Path):
    assert checkpoint.newest_valid(tmp_path / "nowhere", pytest.fail) is None
    (tmp_path / "step-1.tmp").mkdir()
    assert checkpoint.newest_valid(tmp_path, pytest.fail) is None


def test_if_all_are_damaged_nothing_begins_anew_and_all_are_named(tmp_path: Path):
    run, notes = save_steps(tmp_path, 1, 2), []
    cut_record(run / "step-2")
    (run / "step-1" / "config.toml").unlink()
    named = r"no good checkpoint is left, only step-1\.bad, step-2\.bad \(.*record\.json: unreadable.*restore one"
    with pytest.raises(CheckpointError, match=named):
        checkpoint.newest_valid(run, notes.append)
    assert len(notes) == 2
    # The next start says so as well: it does not take the folder for that of a new run.
    with pytest.raises(CheckpointError, match=r"no good checkpoint is left, only step-1\.bad, step-2\.bad; restore"):
        checkpoint.newest_valid(run, pytest.fail)
    assert names(run) == ["step-1.bad", "step-2.bad"]


def test_a_checkpoint_of_a_newer_version_is_neither_moved_nor_passed_over(tmp_path: Path):
    run = save_steps(tmp_path, 1, 2)
    rewrite(run / "step-2" / "record.json", lambda table: table.update(format=checkpoint.FORMAT + 1))
    before = contents(run / "step-2")
    with pytest.raises(CheckpointError, match=f"format {checkpoint.FORMAT + 1}, this version reads") as raised:
        checkpoint.newest_valid(run, pytest.fail)
    assert not isinstance(raised.value, DamagedError)
    assert names(run) == ["step-1", "step-2"]
    assert contents(run / "step-2") == before


def test_ranks_agree_on_the_newest_good_checkpoint_whichever_of_them_finds_the_damage(tmp_path: Path):
    """Each checks a part of the files; of step 4 the second rank's, of step 3 the first one's, of step 2 both."""
    run = save_steps(tmp_path / "run", 1, 2, 3, 4)
    for step, file in (
        (4, "rank-00000.safetensors"),
        (3, "config.toml"),
        (2, "config.toml"),
        (2, "rank-00000.safetensors"),
    ):
        (run / f"step-{step}" / file).write_bytes(b"?")

    def resume(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        notes: list[str] = []
        newest = checkpoint.newest_valid(run, notes.append)
        assert newest is not None
        newest.load_into(values := tensors())
        assert torch.equal(values["model.a"], tensors(1)["model.a"])
        return [newest.folder.name, *notes]

    both = run_ranks(resume, 2, tmp_path)
    for newest, *notes in both:
        assert newest == "step-1"
        assert [note.split()[1] for note in notes] == ["step-4", "step-3", "step-2"]
        assert "step-4/rank-00000.safetensors: " in notes[0]
        assert "step-3/config.toml: " in notes[1]
    assert names(run) == ["step-1", "step-2.bad", "step-3.bad", "step-4.bad"]


def test_ranks_agree_that_none_is_good_and_that_one_is_too_new(tmp_path: Path):
    bad, new = save_steps(tmp_path / "bad", 1), save_steps(tmp_path / "new", 1, 2)
    (bad / "step-1" / "rank-00000.safetensors").unlink()
    rewrite(new / "step-2" / "record.json", lambda table: table.update(format=99))

    def refused(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        messages = []
        for run in (bad, new):
            with pytest.raises(CheckpointError) as raised:
                checkpoint.newest_valid(run, lambda text: None)
            messages.append(f"{type(raised.value).__name__}: {raised.value}")
        return messages

    for none_left, too_new in run_ranks(refused, 2, tmp_path):
        assert none_left.startswith("CheckpointError: ")
        assert "no good checkpoint is left, only step-1.bad" in none_left
        assert "format 99, this version reads" in too_new
    assert names(new) == ["step-1", "step-2"]


def test_ranks_that_fail_in_different_ways_raise_the_same_kind_of_error(tmp_path: Path):
    """If one went back to an older checkpoint and the other gave up, the first would wait for it for ever."""
    errors = [DamagedError("hash"), CheckpointError("cannot be read"), OSError(5, "Input/output error"), None]

    def fail(rank: int) -> list[str]:
        dist.init_process_group("gloo")
        kinds = []
        for mine, other in ((a, b) for a in errors for b in errors if a or b):
            error = (mine, other)[rank]

            def stage(error: Exception | None = error) -> None:
                if error is not None:
                    raise error

            with pytest.raises(CheckpointError) as raised:
                checkpoint.together(stage, DamagedError, "step-1")
            kinds.append(type(raised.value).__name__)
        return kinds

    first, second = run_ranks(fail, 2, tmp_path)
    assert first == second
    assert first.count("CheckpointError") == 5

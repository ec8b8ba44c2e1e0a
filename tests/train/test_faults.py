"""Faults on purpose: each happens once, on its rank and at its step, and what they do is found."""

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.config_file import ConfigError
from resume import checkpoint
from resume.runs import open_run
from tests.lives import finished, lived
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from tests.trained import Sample, resume, trained
from train import exits, loader
from train.config import RunConfig
from train.faults import KINDS, Faults, InjectedError, parse_fault


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with checksums, more of it than is read ahead."""
    folder = tmp_path_factory.mktemp("checked") / "data"
    return write_data(folder, texts=texts_about("checked", 400), checksum_tokens=32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_with_rank_and_step(kind: str):
    fault = parse_fault(f"{kind}:rank=3,step=40")
    assert (fault.kind, fault.rank, fault.step, fault.seconds) == (kind, 3, 40, 1.0)


def test_a_pause_has_a_length():
    assert parse_fault("slow:rank=0,step=1,seconds=2.5").seconds == 2.5


@pytest.mark.parametrize(
    "text",
    [
        *("", "kill", "kill:", "kill:rank=1", "kill:step=1,rank=1", "kill:rank=-1,step=2", "kill:rank=1,step=2,"),
        *("kill: rank=1,step=2", "kill:rank=1,step=2\n", "kill:rank=1,step=2.5", "burn:rank=1,step=2"),
        *("KILL:rank=1,step=2", "slow:rank=1,step=2,seconds=", "slow:rank=1,step=2,seconds=-1"),
    ],
)
def test_what_is_no_fault_is_refused_with_what_would_be_one(text: str):
    with pytest.raises(
        ConfigError, match=re.escape(f"debug.inject: {text!r} is no fault; write KIND:rank=R,step=S")
    ) as e:
        parse_fault(text)
    assert all(kind in str(e.value) for kind in KINDS)


def test_a_run_with_a_mistyped_fault_is_refused_before_it_trains(data: Path, tmp_path: Path):
    life = lived(tiny_run(data, tmp_path / "run", debug={"inject": ("burn:rank=0,step=1",)}))
    assert life.codes == [exits.BAD_CONFIG]
    assert "'burn:rank=0,step=1' is no fault" in life.err()
    assert life.last_step == 0


def happen(faults: Faults, step: int) -> list[str]:
    """What happens at a step, of what a process survives."""
    seen = []
    try:
        faults.before_step(step)
    except InjectedError as error:
        seen.append(str(error))
    if faults.is_corrupt(step):
        seen.append("corrupt")
    loss = float(faults.on_loss(torch.tensor(2.0), step))
    if loss != 2.0:
        seen.append(f"loss {loss:g}")
    try:
        faults.before_write(step)
    except OSError as error:
        seen.append("disk-full" if error.errno == errno.ENOSPC else str(error))
    return seen


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("raise", "injected by debug.inject raise:rank=1,step=3"),
        ("nan", "loss nan"),
        ("spike", "loss 2000"),
        ("disk-full", "disk-full"),
        ("corrupt", "corrupt"),
    ],
)
def test_each_happens_once_on_its_rank_at_its_step_and_never_again(tmp_path: Path, kind: str, seen: str):
    text = f"{kind}:rank=1,step=3"
    ranks = [Faults(tmp_path, [text], rank) for rank in range(3)]
    told = [(rank, step, what) for step in range(1, 6) for rank in range(3) for what in happen(ranks[rank], step)]
    assert told == [(1, 3, seen)]
    later = Faults(tmp_path, [text], 1)  # of the next life
    assert [what for step in range(1, 6) for what in happen(later, step)] == []
    other = Faults(tmp_path / "another run", [text], 1)
    assert happen(other, 3) == [seen]


def test_a_disk_is_full_at_the_first_save_after_the_step(tmp_path: Path):
    faults = Faults(tmp_path, ["disk-full:rank=0,step=3", "disk-full:rank=0,step=4"], 0)
    assert [step for step in (2, 6, 8, 10) if happen(faults, step)] == [6, 8]


def test_a_pause_is_as_long_as_it_says_and_happens_once(tmp_path: Path):
    faults = Faults(tmp_path, ["slow:rank=0,step=3,seconds=0.3"], 0)
    lengths_s = []
    for step in (2, 3, 3):
        started_s = time.monotonic()
        faults.before_step(step)
        lengths_s.append(time.monotonic() - started_s)
    assert lengths_s[1] >= 0.3
    assert (tmp_path / "injected" / "slow-rank-0-step-3-seconds-0.3").exists()


@pytest.mark.parametrize(("kind", "code"), [("kill", -signal.SIGKILL), ("terminate", exits.STOPPED), ("raise", 1)])
def test_a_life_that_a_fault_ended_is_followed_by_one_that_passes_the_step(
    data: Path, tmp_path: Path, kind: str, code: int
):
    config = tiny_run(data, tmp_path / "run", run={"async_save": False}, debug={"inject": (f"{kind}:rank=0,step=5",)})
    life = lived(config)
    assert life.codes == [code]
    assert life.last_step == (5 if kind == "terminate" else 4)
    life = finished(config)
    assert f"resuming at step {5 if kind == 'terminate' else 3}\n" in life.out()


@pytest.mark.parametrize(("kind", "state"), [("hang", "S"), ("stop", "T")])
def test_a_rank_that_hangs_sleeps_and_one_that_is_stopped_does_not_run(tmp_path: Path, kind: str, state: str):
    if (pid := os.fork()) == 0:
        Faults(tmp_path, [f"{kind}:rank=0,step=1"], 0).before_step(1)
        os._exit(0)
    try:
        deadline_s, found = time.monotonic() + 10, ""
        while (found != state or not (tmp_path / "injected").exists()) and time.monotonic() < deadline_s:
            found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            time.sleep(0.01)
        assert found == state
    finally:
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


# A bit that flips in memory


def read_late(rank: int) -> None:
    """Else all of a little data set is read ahead before the first step."""
    loader._PIECE_BYTES = 1


def recording(data_folder: Path, run: Path, **sections: Any) -> RunConfig:
    data = {"record_samples": True, **sections.pop("data", {})}
    run_section = {"num_steps": 20, **sections.pop("run", {})}
    return tiny_run(data_folder, run, data=data, run=run_section, **sections)


@pytest.mark.parametrize(("num_ranks", "rank"), [(1, 0), (2, 1)])
def test_a_bit_that_flips_is_found_by_the_checksum_and_named(checked: Path, tmp_path: Path, num_ranks: int, rank: int):
    run = tmp_path / "run"
    config = recording(checked, run, debug={"inject": (f"corrupt:rank={rank},step=5",)})
    life = lived(config, num_ranks, before=read_late)
    assert life.codes == [exits.BAD_DATA] * num_ranks
    named = re.search(r"error: (\S+\.bin): sample \d+ \(tokens \d+ to \d+\) differs from its checksum", life.err())
    assert named is not None
    assert Path(named[1]).parent == checked / "train"
    stopped_at = checkpoint.steps(run)[-1]
    assert stopped_at >= 4
    end = exits.read_end(run)
    assert (end["code"], end["rank"], end["pid"]) == (exits.BAD_DATA, rank, life.pids[rank])
    # What was trained until then is kept, and the data itself is well: the next life passes it.
    finished(config, num_ranks, before=read_late)
    assert list(trained(run)) == list(range(1, 21))


def test_a_bit_that_flips_is_left_out_and_written_down_if_the_run_is_told_to(checked: Path, tmp_path: Path):
    finished(recording(checked, tmp_path / "well"), before=read_late)
    run = tmp_path / "run"
    quarantine = {"on_bad_sample": "quarantine"}
    config = recording(checked, run, data=quarantine, debug={"inject": ("corrupt:rank=0,step=5",)})
    life = finished(config, before=read_late)
    (entry,) = open_run(run).ledger.quarantined
    assert entry.step >= 5
    assert f"differs from its checksum, step {entry.step}" in life.out()
    expected = trained(tmp_path / "well")
    del expected[entry.step][Sample(entry.file_id, entry.first_token, entry.sequence_length)]
    assert trained(run) == expected
    assert resume("audit", run)[0] == 0

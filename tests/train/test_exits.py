"""How a run ended: what exit.json says, who writes it, and when a failure has happened too often."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest

from resume import checkpoint
from resume.manifest import DataError
from tests.lives import Life, finished, lived
from tests.prepared import write_data
from tests.processes import run_ranks
from tests.runs import tiny_run
from train import exits, ranks
from train.config import with_values
from train.exits import RepeatedFailureError, begin_life, read_end, record_end


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def fail(run: Path, step: int, code: int = exits.BUG) -> None:
    """One life that fails."""
    begin_life(run)
    record_end(run, code, rank=0, step=step, cause=f"it broke at {step}")


def test_a_file_says_code_rank_host_process_step_and_cause(tmp_path: Path):
    record_end(tmp_path, exits.BAD_DATA, rank=3, step=7, cause="a shard is gone", life="abc")
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "code": 65,
        "life": "abc",
        "rank": 3,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "step": 7,
        "cause": "a shard is gone",
        "times": 1,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_the_first_to_write_is_the_one_who_is_heard(tmp_path: Path):
    record_end(tmp_path, exits.BAD_DATA, rank=1, step=7, cause="the cause")
    record_end(tmp_path, exits.LOST_RANK, rank=0, step=7, cause="what followed from it")
    assert read_end(tmp_path)["cause"] == "the cause"


def test_of_many_ranks_that_write_at_once_one_is_heard_and_nothing_is_torn(tmp_path: Path):
    def end(rank: int) -> int:
        for number in range(30):
            run = tmp_path / f"run-{number}"
            run.mkdir(exist_ok=True)
            record_end(run, exits.BUG, rank=rank, step=number, cause="x" * 1000 * (rank + 1))
        return 0

    run_ranks(end, 4, tmp_path)
    for number in range(30):
        entry = read_end(tmp_path / f"run-{number}")
        assert entry["cause"] == "x" * 1000 * (entry["rank"] + 1)
        assert len(list((tmp_path / f"run-{number}").iterdir())) == 1


def test_where_nothing_can_be_written_the_end_is_not_made_worse(tmp_path: Path):
    record_end(tmp_path / "nowhere", exits.CANNOT_WRITE, rank=0, step=1, cause="no disk")
    assert read_end(tmp_path / "nowhere") == {}


def test_on_a_disk_that_only_reads_the_end_is_not_made_worse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There even deleting what is not there is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    fail(tmp_path, 4)
    for name in ("write_text", "unlink", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    record_end(tmp_path, exits.CANNOT_WRITE, rank=0, step=1, cause="no disk", life="another")
    assert read_end(tmp_path)["cause"] == "it broke at 4"


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_a_file_that_is_no_record_counts_as_none(tmp_path: Path, content: str):
    (tmp_path / "exit.json").write_text(content)
    assert read_end(tmp_path) == {}
    begin_life(tmp_path)


def test_a_new_life_tells_of_itself_alone(tmp_path: Path):
    fail(tmp_path, 4)
    begin_life(tmp_path)
    assert read_end(tmp_path) == {}
    record_end(tmp_path, exits.DONE, rank=0, step=9, cause="done")
    assert (read_end(tmp_path)["code"], read_end(tmp_path)["times"]) == (0, 0)


def test_a_life_clears_away_what_a_killed_one_was_writing(data: Path, tmp_path: Path):
    killed = os.fork()
    if killed == 0:
        os._exit(0)
    os.waitpid(killed, 0)
    run, tail = tmp_path / "run", f"tmp-{socket.gethostname()}-{killed}-0123abcd"
    (run / "requests").mkdir(parents=True)
    for name in ("tokenizer.json", "requests/request"):
        (run / f"{name}.{tail}").write_text("half")
    finished(tiny_run(data, run, run={"num_steps": 1}))
    assert not list(run.rglob(f"*.{tail}"))


def test_three_failures_in_a_row_at_one_step_are_enough_and_the_remedy_works(tmp_path: Path):
    for times in (1, 2, 3):
        fail(tmp_path, 4)
        assert read_end(tmp_path)["times"] == times
    for _ in range(2):  # it does not give in when asked again
        with pytest.raises(
            RepeatedFailureError, match="failed 3 times in a row at step 4, last with: it broke at 4"
        ) as e:
            begin_life(tmp_path)
    # Whoever reads why still can.
    assert read_end(tmp_path)["times"] == 3
    Path(str(e.value).split("delete ")[1].split(" to go on")[0]).unlink()
    fail(tmp_path, 4)
    assert read_end(tmp_path)["times"] == 1


@pytest.mark.parametrize("between", ["another step", "a stop", "an end", "a kill"])
def test_failures_are_in_a_row_only_if_nothing_else_came_between(tmp_path: Path, between: str):
    fail(tmp_path, 4)
    fail(tmp_path, 4)
    begin_life(tmp_path)
    if between == "another step":
        record_end(tmp_path, exits.BUG, rank=0, step=5, cause="later")
        assert read_end(tmp_path)["times"] == 1
    elif between != "a kill":
        code = exits.STOPPED if between == "a stop" else exits.DONE
        record_end(tmp_path, code, rank=0, step=4, cause="well")
        assert read_end(tmp_path)["times"] == 0
    fail(tmp_path, 4)
    assert read_end(tmp_path)["times"] == 1


def test_a_run_that_fails_thrice_at_one_step_is_not_started_a_fourth_time(data: Path, tmp_path: Path):
    """As a wrapper does that restarts whatever ends: the remedy lets it go on, once the cause is mended."""
    run = tmp_path / "run"
    config = tiny_run(data, run, run={"save_every": 1})
    for number in range(1, 4):
        # Each life meets the same error: the injected one happens once, so each has its own.
        life = lived(with_values(config, debug={"inject": (f"raise:rank=0,step=3,seconds={number}",)}))
        assert life.codes == [exits.BUG]
        assert "InjectedError: injected by debug.inject raise:rank=0,step=3" in life.err()
        end = read_end(run)
        assert (end["code"], end["rank"], end["step"], end["times"]) == (exits.BUG, 0, 3, number)
        assert end["cause"].startswith("InjectedError: ")
    life = lived(config)
    assert life.codes == [exits.NOT_FINITE]
    assert "failed 3 times in a row at step 3, last with: InjectedError: injected" in life.err()
    assert checkpoint.steps(run)[-1] == 2
    Path(life.err().split("delete ")[1].split(" to go on")[0]).unlink()
    finished(config)
    assert (read_end(run)["code"], read_end(run)["step"], read_end(run)["cause"]) == (0, 6, "done")


def test_a_rank_that_raises_is_named_and_the_others_end_soon(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(
        data, run, run={"num_steps": 99, "hang_timeout_s": 2.0}, debug={"inject": ("raise:rank=2,step=5",)}
    )
    with Life(config, 3) as life:
        codes = life.end(timeout_s=20)
        assert codes[2] == exits.BUG
        assert set(codes[:2]) == {exits.LOST_RANK}
    end = read_end(run)
    assert (end["code"], end["rank"], end["step"]) == (exits.BUG, 2, 5)
    assert (end["pid"], "InjectedError" in end["cause"]) == (life.pids[2], True)
    assert any("rank 2" in life.err(rank) and "failed at step 5" in life.err(rank) for rank in (0, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_all_ranks_raise_is_told_by_the_one_that_met_it(tmp_path: Path, rank: int):
    def meet(this_rank: int) -> str:
        this = ranks.start("cpu")
        try:
            this.raise_first(DataError("a shard is gone") if this_rank == rank else None)
        except DataError as error:
            return f"{error}, {error.__cause__}"
        return "nothing"

    told = run_ranks(meet, 2, tmp_path)
    assert told[rank] == "a shard is gone, None"
    assert told[1 - rank] == f"a shard is gone, met by rank {rank}, raised by all"


def test_a_rank_that_was_lost_during_a_save_is_known_as_that():
    error = checkpoint.SaveError("cannot save step-3: [gloo] Connection closed by peer")
    assert not ranks.is_lost_connection(error)
    error.__cause__ = RuntimeError("[gloo] Connection closed by peer")
    assert ranks.is_lost_connection(error)

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest

from data_prep import engine
from data_prep.config_file import ConfigError
from data_prep.engine import EngineConfig, WorkerDiedError

KINDS = ("inline", "pool", "dask")


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def refuse(number: int) -> int:
    raise ValueError(f"task {number} is refused")


def die_once(task: tuple[str, int]) -> int:
    """Kills its worker the first time that it sees a task."""
    folder, number = task
    mark = Path(folder) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def config(kind: str) -> EngineConfig:
    return EngineConfig(kind=kind, num_workers=2, dashboard="127.0.0.1:0")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_answered_once_by_as_many_processes_as_were_asked_for(kind: str):
    with engine.started(config(kind), 50) as running:
        assert dict(running.run(square, range(50))) == {i: i * i for i in range(50)}
        assert dict(running.run(square, [])) == {}
        workers = {pid for _, pid in running.run(process_id, range(30))}
        with pytest.raises(ValueError, match="task 0 is refused"):
            list(running.run(refuse, [0]))
        assert dict(running.run(square, [3])) == {0: 9}
    assert len(workers) == (1 if kind == "inline" else 2)
    assert (os.getpid() in workers) == (kind == "inline")


@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_killed_workers_cost_only_their_tasks_which_run_again(kind: str, tmp_path: Path):
    tasks = [(str(tmp_path), number) for number in (3, 4)] + [(str(tmp_path), 10 + i) for i in range(20)]
    for number in range(10, 30):
        (tmp_path / str(number)).touch()
    with engine.started(config(kind), len(tasks)) as running:
        answers = dict(running.run(die_once, tasks))
    assert answers == {index: number for index, (_, number) in enumerate(tasks)}


@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_a_task_that_kills_every_worker_ends_the_run_with_advice(kind: str):
    with (
        engine.started(config(kind), 1) as running,
        pytest.raises(WorkerDiedError, match=r"--engine\.num-workers"),
    ):
        list(running.run(die, [0]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_that_forks_workers_may_be_killed_as_well():
    with engine.started(config("pool"), 60) as running:
        answers, killed = {}, []
        for index, pid in running.run(process_id, range(60)):
            answers[index] = pid
            if len(answers) == 5:
                children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                for child in children:
                    if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                        os.kill(int(child), signal.SIGKILL)
                        killed.append(child)
    assert len(killed) == 1
    assert sorted(answers) == list(range(60))


def square_or_die(number: int) -> int:
    if number == 0:
        time.sleep(0.05)  # others end meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_task_that_kills_workers_is_given_up_however_many_others_succeed(monkeypatch: pytest.MonkeyPatch):
    restarts: list[int] = []
    restart = engine.Engine._restart
    monkeypatch.setattr(engine.Engine, "_restart", lambda self: restarts.append(1) or restart(self))
    with engine.started(config("pool"), 60) as running, pytest.raises(WorkerDiedError):
        list(running.run(square_or_die, range(60)))
    assert len(restarts) < engine.MAX_DEATHS


def test_an_automatic_engine_is_inline_for_one_task_a_pool_for_few_and_dask_for_many():
    with engine.started(EngineConfig(num_workers=2, dashboard="127.0.0.1:0"), 1) as running:
        assert running.name == "this process"
    with engine.started(EngineConfig(num_workers=1), 9) as running:
        assert running.name == "this process"
    with engine.started(EngineConfig(num_workers=2), 9) as running:
        assert running.name == "2 processes"
    with engine.started(EngineConfig(num_workers=2, dashboard="127.0.0.1:0"), 600) as running:
        assert running.name.startswith("Dask, 2 workers, http://127.0.0.1:")


def test_without_dask_a_pool_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "has_dask", lambda: False)
    with engine.started(EngineConfig(num_workers=2), 600) as running:
        assert running.name == "2 processes"


def test_a_scheduler_that_does_not_answer_is_named():
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "300ms"}),
        pytest.raises(ConfigError, match="no Dask scheduler answers there"),
        engine.started(EngineConfig(address="tcp://127.0.0.1:9"), 2),
    ):
        pass


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_workers": -1}, "engine.num_workers = -1"),
        ({"max_bad_fraction": 1.5}, "engine.max_bad_fraction = 1.5"),
        ({"kind": "pool", "address": "tcp://host:1"}, "engine.address is for Dask"),
        ({"unit_bytes": 0}, "engine.unit_bytes = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(keys: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**keys)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["pool", "dask"])
def test_workers_end_with_a_parent_that_is_killed(kind: str, tmp_path: Path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time\n"
        "from data_prep import engine\n"
        "def work(path):\n"
        "    open(f'{path}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        f"    config = engine.EngineConfig(kind={kind!r}, num_workers=2, dashboard='127.0.0.1:0')\n"
        "    with engine.started(config, 2) as running:\n"
        f"        list(running.run(work, [{str(tmp_path)!r}] * 2))\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + 60
        while not any(path.name.isdigit() for path in tmp_path.iterdir()):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        workers = _descendants(process.pid)
        process.kill()
    assert len(workers) >= 2
    deadline_s = time.monotonic() + 30
    while any(map(_is_running, workers)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(map(_is_running, workers))


def _descendants(pid: int) -> list[int]:
    # A child belongs to the thread that made it.
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in texts for child in text.split()]
    return children + [inner for child in children for inner in _descendants(child)]


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_running_cluster_is_used_and_left_running():
    import distributed

    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        for _ in range(2):
            with engine.started(EngineConfig(address=cluster.scheduler_address), 9) as running:
                assert dict(running.run(square, range(9))) == {i: i * i for i in range(9)}

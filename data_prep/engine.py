"""Runs a function over many tasks: in this process, in a pool of processes, or on a Dask cluster, local or remote.

The functions write their results to files and return something small, so that it does not matter where, in which order
or how often they run. A worker that is killed costs the tasks it held, which run again elsewhere.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from data_prep.config_file import ConfigError

IN_FLIGHT_PER_WORKER = 3
"""Tasks given out ahead: a slow one does not idle the others, and a scheduler never holds a million of them."""
MIN_IN_FLIGHT_OF_DASK = 512
MAX_DEATHS = 3
"""Of workers while one task was given out, after which a run gives up on it."""
_NO_TASK = -1
MANY_TASKS = 512
"""From here on, 32 GB by default, what Dask costs (2 s at the start, a scheduler beside the workers) is little beside
what its dashboard gives: on two cores 824 MB take 16 s with it, 12 s without."""
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDiedError(RuntimeError):
    """Worker processes end without an answer again and again, most often because the machine runs out of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How to run; nothing here changes the result."""

    kind: Literal["auto", "inline", "pool", "dask"] = "auto"
    """Where the work is done: this process, a pool of processes, or Dask. auto: this process for a single task, a pool
    for few, which starts in half a second, and Dask, if it is installed, for many."""
    address: str | None = None
    """A running Dask scheduler, tcp://host:8786. Its workers must see input, work folder and output under the same
    paths, and have this project installed. Default: a cluster of processes on this machine."""
    num_workers: int | None = None
    """Worker processes; 0 and 1 run in this process. Default: one per core."""
    dashboard: str = ":0"
    """Where the local cluster shows its dashboard (host:port, 0 for any free port); it needs the package bokeh."""
    max_bad_fraction: float = 0.01
    """Share of bad lines of a source above which the preparation stops; fewer are left out, counted and listed."""
    work_folder: str | None = None
    """Below it the results of units are kept until the end, so that a killed run goes on. Default: beside the
    output."""
    unit_bytes: int | None = None
    """Input that one worker takes at a time. Default: a 256th of the input, between 4 and 64 MiB."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"engine.num_workers = {self.num_workers}: must not be negative")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"engine.max_bad_fraction = {self.max_bad_fraction}: must be in [0, 1]")
        if self.address is not None and self.kind not in ("auto", "dask"):
            raise ConfigError(f'engine.address is for Dask, engine.kind = "{self.kind}"; leave one of them out')
        if self.unit_bytes is not None and self.unit_bytes < 1:
            raise ConfigError(f"engine.unit_bytes = {self.unit_bytes}: must be positive")

    def range_bytes(self, input_bytes: int) -> int:
        """unit_bytes, the default resolved; a function of the input alone, so that a killed run finds its units."""
        return self.unit_bytes or min(max(input_bytes // 256, 4 * 1024**2), 64 * 1024**2)

    @property
    def workers(self) -> int:
        """Worker processes, the default resolved."""
        return default_workers() if self.num_workers is None else max(self.num_workers, 1)


class Engine:
    """Where tasks run. Made by `started`."""

    def __init__(self, name: str, max_in_flight: int, executor: Callable[[], Executor] | None) -> None:
        self.name = name
        """For the log: what runs the tasks."""
        self._max_in_flight, self._new_executor = max_in_flight, executor
        self._executor = executor() if executor is not None else None

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        """Index and result of each task, in the order in which they finish.

        Raises:
            WorkerDiedError: workers die again and again. What a task itself raises is raised as it is.
        """
        if self._executor is None:
            yield from ((index, function(task)) for index, task in enumerate(tasks))
            return
        todo, num_deaths = deque(enumerate(tasks)), Counter[int]()
        running: dict[Future[Result], tuple[int, Task]] = {}
        while todo or running:
            try:
                while todo and len(running) < self._max_in_flight:
                    running[_submitted(self._executor, function, todo[0][1])] = todo[0]
                    todo.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    num_deaths[_NO_TASK] = 0
                    yield running.pop(future)[0], result
            except BrokenProcessPool as error:
                # Workers that die before they have a task are counted as well, until one finishes something.
                num_deaths.update([index for index, _ in running.values()] or [_NO_TASK])
                if max(num_deaths.values()) >= MAX_DEATHS:
                    raise _worker_died() from error
                todo.extendleft(running.values())
                running.clear()
                self._restart()
            except (_killed_worker_error(), CancelledError) as error:
                raise _worker_died() from error

    def close(self) -> None:
        """Stops the workers."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _restart(self) -> None:
        assert self._new_executor is not None
        self.close()
        self._executor = self._new_executor()


@contextlib.contextmanager
def started(config: EngineConfig, num_tasks: int) -> Iterator[Engine]:
    """An engine for about num_tasks tasks; its workers end with the block.

    Raises:
        ConfigError: Dask is asked for and not installed, or the scheduler cannot be reached.
    """
    kind = _resolved(config, num_tasks)
    if kind == "inline":
        yield Engine("this process", 1, None)
    elif kind == "pool":
        num_workers = min(config.workers, max(num_tasks, 1))
        engine = Engine(f"{num_workers} processes", IN_FLIGHT_PER_WORKER * num_workers, lambda: _pool(num_workers))
        try:
            yield engine
        finally:
            engine.close()
    else:
        with _dask_client(config, num_tasks) as client:
            num_workers = len(client.scheduler_info(n_workers=-1)["workers"])
            # A cluster may grow meanwhile.
            max_in_flight = max(IN_FLIGHT_PER_WORKER * num_workers, MIN_IN_FLIGHT_OF_DASK)
            yield Engine(f"Dask, {num_workers} workers, {client.dashboard_link}", max_in_flight, client.get_executor)


def default_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolved(config: EngineConfig, num_tasks: int) -> str:
    if config.kind != "auto":
        return config.kind
    if config.address is not None:
        return "dask"
    if min(config.workers, num_tasks) <= 1:
        return "inline"
    return "dask" if num_tasks >= MANY_TASKS and has_dask() else "pool"


def has_dask() -> bool:
    """Whether Dask is installed."""
    return importlib.util.find_spec("distributed") is not None


def _worker_died() -> WorkerDiedError:
    return WorkerDiedError(
        "worker processes died again and again, most often because memory ran out: try fewer workers "
        "(--engine.num-workers) or smaller pieces (--engine.unit-bytes). What is done is kept; the same command goes "
        'on. A script that calls this needs the usual `if __name__ == "__main__":`'
    )


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # Not fork: training a tokenizer has started threads in this process, and a fork copies their locks. Workers are
    # forked from a process that has only imported what they need, once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.unit_step"])
    for attempt in range(MAX_DEATHS):
        executor = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_pool_worker)
        try:
            for _ in range(num_workers):
                _submitted(executor, _ready)  # they start now, while this process still has other things to do
            return executor
        except BrokenProcessPool as error:
            executor.shutdown(wait=True, cancel_futures=True)
            time.sleep(0.3)  # until the system knows that the process is gone
            if attempt == MAX_DEATHS - 1:
                raise _worker_died() from error
    raise AssertionError


def _submitted(executor: Executor, function: Callable[..., Result], *arguments: object) -> Future[Result]:
    try:
        return executor.submit(function, *arguments)
    except (EOFError, ConnectionError) as error:  # the process that forks workers was killed; the next pool has another
        raise BrokenProcessPool("no worker could be started") from error


def _ready() -> None:
    pass


def _start_pool_worker() -> None:
    # Ctrl-C reaches the whole group: a worker then ends at once, without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: without this its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _killed_worker_error() -> type[BaseException]:
    """Dask's word for a task that took several workers with it; a class that nothing raises where Dask is absent."""
    module = sys.modules.get("distributed.scheduler")
    return module.KilledWorker if module is not None else _NeverRaisedError


class _NeverRaisedError(Exception):
    pass


@contextlib.contextmanager
def _dask_client(config: EngineConfig, num_tasks: int) -> Iterator[Any]:
    try:
        import distributed
    except ImportError as error:
        raise ConfigError('engine.kind = "dask" needs the package distributed: pip install distributed') from error
    with contextlib.ExitStack() as stack:
        if config.address is None:
            cluster = stack.enter_context(_local_cluster(config, num_tasks))
            client = distributed.Client(cluster)
        else:
            try:
                client = distributed.Client(config.address)
            except (OSError, TimeoutError) as error:
                raise ConfigError(f"engine.address = {config.address}: no Dask scheduler answers there") from error
        yield stack.enter_context(client)


def _local_cluster(config: EngineConfig, num_tasks: int) -> Any:
    import distributed

    for attempt in range(MAX_DEATHS):
        try:
            return distributed.LocalCluster(
                n_workers=min(config.workers, max(num_tasks, 1)),
                threads_per_worker=1,
                dashboard_address=config.dashboard,
                memory_limit=0,  # the system knows better than a share of it when memory is short
                silence_logs=logging.CRITICAL,  # the workers complain when the scheduler ends before them
            )
        except RuntimeError as error:  # a worker that is killed while it starts; later ones are started again by Dask
            if attempt == MAX_DEATHS - 1:
                raise _worker_died() from error
    raise AssertionError

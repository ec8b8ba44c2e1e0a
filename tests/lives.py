"""Lives of a run as forked ranks that a test can signal, kill and wait for: no start imports torch anew."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Self

import matplotlib.backends.backend_agg
import matplotlib.figure
import torch

from tests.processes import free_port, rank_environment
from train import pretrain
from train.config import RunConfig
from train.exits import BUG, DONE

# What a report needs at the end of a run: imported here once, instead of in every life.
assert matplotlib.figure
assert matplotlib.backends.backend_agg


class Life:
    """One life of a run, from its start to its end, on some number of ranks. As a context manager it ends all of them.

    What the ranks print is in files, not in pipes: a reader that is gone must not end them.
    """

    def __init__(self, config: RunConfig, num_ranks: int = 1, before: Callable[[int], object] = lambda rank: None):
        """`before` is called with the rank in each process before it trains: for faults that need one."""
        self.run = Path(config.run.dir)
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self._said = Path(tempfile.mkdtemp(prefix=f"{self.run.name}-said-", dir=self.run.parent))
        self._living: dict[int, int] = {}
        self.codes: list[int | None] = [None] * num_ranks
        """Exit codes by rank, negative for signals; None while it lives."""
        port = free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(num_ranks):
            for name in ("out", "err"):
                (self._said / f"{rank}.{name}").write_text("")
            if (pid := os.fork()) == 0:
                self._be(config, rank, num_ranks, port, before)
            self._living[rank] = pid
        self.pids = list(self._living.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def is_over(self) -> bool:
        """Whether every rank has ended."""
        self._reap()
        return not self._living

    def out(self, rank: int = 0) -> str:
        """What a rank printed."""
        return (self._said / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        """What a rank said on stderr."""
        return (self._said / f"{rank}.err").read_text()

    def until(self, has_come: Callable[[], bool], timeout_s: float = 60) -> None:
        """Waits until something is so, or the life is over."""
        deadline_s = time.monotonic() + timeout_s
        while not has_come() and not self.is_over:
            assert time.monotonic() < deadline_s, self._report()
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Waits until the first rank has printed a step, or a later one."""
        self.until(lambda: self.last_step >= step)

    @property
    def last_step(self) -> int:
        """The last step that the first rank has printed; 0 before the first."""
        lines = [line for line in self.out().splitlines() if line.startswith("step ") and "/" in line]
        return int(lines[-1].split()[1].split("/")[0].replace(",", "")) if lines else 0

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        """Sends a signal to ranks that live, to all if none is named."""
        for rank in ranks or range(len(self.codes)):
            if rank in self._living:
                os.kill(self._living[rank], number)

    def kill(self, *ranks: int) -> int:
        """Ends ranks, or all, as a power cut does; returns how many of them still lived."""
        before = self.codes.count(-signal.SIGKILL)
        self.signal(signal.SIGKILL, *ranks)
        if not ranks:
            self.end()
        else:
            self.until(lambda: all(self.codes[rank] is not None for rank in ranks))
        return self.codes.count(-signal.SIGKILL) - before

    def end(self, timeout_s: float = 60) -> list[int | None]:
        """Waits for the end of all ranks and returns their exit codes."""
        self.until(lambda: False, timeout_s)
        return self.codes

    def _reap(self) -> None:
        for rank, pid in list(self._living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._living[rank]
                self.codes[rank] = os.waitstatus_to_exitcode(status)

    def _report(self) -> str:
        self.signal(signal.SIGKILL)
        said = [f"rank {r}: {self.codes[r]}\n{self.out(r)}\n{self.err(r)}" for r in range(len(self.codes))]
        return "too late:\n" + "\n".join(said)

    def _be(self, config: RunConfig, rank: int, num_ranks: int, port: int, before: Callable[[int], object]) -> None:
        code = BUG
        try:
            # A process group that a test left as garbage must not be collected here: it would wait for its threads,
            # which a fork does not have.
            gc.freeze()
            torch.set_num_threads(1)  # before anything else, or it may hang
            for name, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(self._said / f"{rank}.{name}", os.O_WRONLY | os.O_APPEND), descriptor)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.update(rank_environment(rank, num_ranks, port))
            before(rank)
            code = pretrain.pretrain(config)
        except BaseException as error:
            code = pretrain.exit_code(error)
            print(traceback.format_exc() if code == BUG else f"error: {error}", file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def lived(config: RunConfig, num_ranks: int = 1, before: Callable[[int], object] = lambda rank: None) -> Life:
    """A whole life, after its end."""
    with Life(config, num_ranks, before) as life:
        life.end()
    return life


def finished(config: RunConfig, num_ranks: int = 1, before: Callable[[int], object] = lambda rank: None) -> Life:
    """A whole life that ended well."""
    life = lived(config, num_ranks, before)
    assert life.codes == [DONE] * num_ranks, life.out() + "\n".join(life.err(rank) for rank in range(num_ranks))
    return life

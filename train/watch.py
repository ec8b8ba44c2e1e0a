"""Whether the ranks of a run are alive and get on: each writes a heartbeat, and each looks at those of the others.

A rank that was killed lets its peers fail or wait in a collective; one that hangs lets them wait for ever, and what
torch then names is not the rank that hangs but the first that gave up. The heartbeats tell them apart: step and phase
that a rank is in, and a count that goes on for as long as the process runs at all.
"""

import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Self

from train import exits

# In the order in which a step goes through them.
_PHASES = ("start", "data", "agree", "forward", "reduce", "validate", "save", "ended")
_FOLDER = "alive"
# How long a survivor looks for the rank that failed before it blames itself.
_SEARCH_S = 5.0


class LostRankError(RuntimeError):
    """Another rank of the run is gone: which one, and what happened to it."""

    def __init__(self, rank: int, cause: str):
        super().__init__(cause)
        self.rank = rank


@dataclasses.dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    life: str
    """The same for all ranks of a life: files of earlier ones are no sign of anything."""
    host: str
    pid: int
    step: int
    """The step it works on, counted from 1."""
    phase: str
    beat: int

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class Watch:
    """The heartbeat of this rank, and the thread that looks at the others."""

    def __init__(self, run: Path, *, life: str, rank: int, world_size: int, timeout_s: float):
        self._run, self._folder = run, run / _FOLDER
        self._life, self._rank, self._world_size, self._timeout_s = life, rank, world_size, timeout_s
        self._beat_s = min(5.0, max(0.1, timeout_s / 20))
        self._step, self._phase, self._since_s = 0, _PHASES[0], time.monotonic()
        self._beat, self._has_stepped = 0, False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        if self._world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        if kind is None:
            self._phase = "ended"
            self._write()

    @property
    def step(self) -> int:
        """The step that this rank works on."""
        return self._step

    def at(self, phase: str, step: int) -> None:
        """Says where this rank is: a phase of `_PHASES`. Cheap, for it only changes memory."""
        # A first step may compile for minutes, and before it whole data sets may be hashed, also after a rollback.
        self._has_stepped = phase != "start" and (self._has_stepped or 0 < self._step < step)
        self._step, self._phase, self._since_s = step, phase, time.monotonic()

    def tick(self) -> None:
        """Says that this rank gets on, in the phase that it is in."""
        self._since_s = time.monotonic()

    def blame(self, error: BaseException) -> LostRankError:
        """Which other rank failed, now that this one's collective did; waits a little for it to show."""
        deadline_s = time.monotonic() + _SEARCH_S
        while time.monotonic() < deadline_s:
            if (found := self._lost_peer()) is not None:
                return found
            time.sleep(0.05)
        # It may have died before its first heartbeat.
        words = str(error).splitlines()[0]
        return LostRankError(self._rank, f"rank {self._rank} lost another rank, which left no trace: {words}")

    def _look(self) -> None:
        while not self._closing.wait(self._beat_s):
            self._beat += 1
            self._write()
            # The main thread may wait for a lost peer for ever; if it does not, it says the same.
            if (lost := self._lost_peer()) is not None and not self._closing.wait(2 * self._beat_s):
                self._end(lost.rank, str(lost))
            if self._has_stepped and time.monotonic() - self._since_s > self._timeout_s:
                self._end_hang()

    def _lost_peer(self) -> LostRankError | None:
        """What happened to a peer that is gone, in its own words if it left any."""
        for peer in self._peers():
            if peer.phase != "ended" and peer.host == socket.gethostname() and _is_gone(peer.pid):
                end = exits.read_end(self._run)
                if end.get("rank") == peer.rank and end.get("pid") == peer.pid:
                    return LostRankError(peer.rank, f"{peer} failed at step {end['step']}: {end['cause']}")
                cause = f"died without a word {_where(peer)}: killed, by the system (memory?) or by somebody"
                return LostRankError(peer.rank, f"{peer} {cause}")
        end = exits.read_end(self._run)
        if end.get("code") not in (None, exits.DONE, exits.STOPPED) and end.get("rank") != self._rank:
            who = f"rank {end['rank']} (pid {end['pid']} on {end['host']})"
            return LostRankError(end["rank"], f"{who} failed at step {end['step']}: {end['cause']}")
        return None

    def _end_hang(self) -> None:
        before = {peer.rank: peer.beat for peer in self._peers()}
        for _ in range(3):
            if self._closing.wait(self._beat_s):
                return
            # The others judge at the same moment: whoever falls silent for it is taken for one that does not run.
            self._beat += 1
            self._write()
        peers = self._peers()
        silent = [peer for peer in peers if peer.beat == before.get(peer.rank)]
        everyone = [*peers, self._heartbeat()]
        behind = min((peer.step, _PHASES.index(peer.phase)) for peer in everyone)
        slowest = [peer for peer in everyone if (peer.step, _PHASES.index(peer.phase)) == behind]
        if silent:
            told = ", ".join(f"{peer} does not run any more, {_where(peer)}" for peer in silent)
        elif len(slowest) < len(everyone):
            told = ", ".join(f"{peer} hangs {_where(peer)}" for peer in slowest)
        else:
            told = f"all ranks wait {_where(slowest[0])}: the network, or collectives that differ"
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        for peer in silent:
            if peer.host == socket.gethostname():
                os.kill(peer.pid, signal.SIGKILL)  # a stopped process does not hear the launcher's SIGTERM
        self._end((silent or slowest)[0].rank, f"no progress for {self._timeout_s:g} s: {told}")

    def _end(self, rank: int, cause: str) -> None:
        """Ends this process at once: its main thread waits for a peer that will not come."""
        print(f"error: rank {self._rank} gives up: {cause}", file=sys.stderr, flush=True)
        exits.record_end(self._run, exits.LOST_RANK, rank=rank, step=self._step, cause=cause)
        os._exit(exits.LOST_RANK)

    def _heartbeat(self) -> Heartbeat:
        host, pid = socket.gethostname(), os.getpid()
        return Heartbeat(self._rank, self._life, host, pid, self._step, self._phase, self._beat)

    def _write(self) -> None:
        path = self._folder / f"rank-{self._rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(dataclasses.asdict(self._heartbeat())), encoding="utf-8")
            temporary.replace(path)
        except OSError:
            return  # a full disk is the saver's to report

    def _peers(self) -> list[Heartbeat]:
        found: list[Heartbeat] = []
        for rank in range(self._world_size):
            if rank != self._rank:
                try:
                    peer = Heartbeat(**json.loads((self._folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):
                    continue
                if peer.life == self._life:
                    found.append(peer)
        return found


def _where(peer: Heartbeat) -> str:
    return f"in phase {peer.phase} of step {peer.step}"


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, reaped by its parent or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return state in "ZX"

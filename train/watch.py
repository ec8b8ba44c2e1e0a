"""Whether the ranks of a run are alive and get on: each writes a heartbeat, and each looks at those of the others.

A rank that was killed lets its peers fail or wait in a collective; one that hangs lets them wait for ever, and what
torch then names is not the rank that hangs but the first that gave up. The heartbeats tell them apart: step and phase
that a rank is in, and a count that goes on for as long as the process runs at all.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from data_prep.config_file import ConfigError
from train import exits

# In the order in which a step goes through them.
_PHASES = ("start", "data", "agree", "forward", "reduce", "validate", "save", "ended")
_FOLDER = "alive"
# How long a survivor looks for the rank that failed before it looks for one that is silent.
_SEARCH_S = 5.0
# How long a rank waits for the first one's heartbeat to show on its machine.
_SHARED_S = 60.0
# Beats of others that a rank listens for before it calls a peer silent.
_SILENT_BEATS = 3
# Multiples of the hang timeout. Hundreds of GB go to a shared file system; whole data sets may be hashed before a first
# step, which compiles.
_SAVE_PATIENCE, _START_PATIENCE = 6, 10


class LostRankError(RuntimeError):
    """Another rank of the run is gone: which one, and what happened to it."""

    def __init__(self, rank: int, cause: str, host: str = "", pid: int = 0):
        super().__init__(cause)
        self.rank, self.host, self.pid = rank, host, pid


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
        self._beating = threading.Lock()
        self._elsewhere: set[int] = set()
        """Ranks on other machines, as far as this one has heard of them."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tell()
        if self._world_size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        if kind is None:
            self._phase = "ended"
            self._tell()

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

    def refuse_unshared(self) -> None:
        """Refuses a run folder that is not the first rank's, where no save could come together.

        Raises:
            ConfigError: the first rank's heartbeat does not show in it.
        """
        deadline_s = time.monotonic() + _SHARED_S
        while self._rank > 0 and self._heartbeat_of(0) is None:
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"{self._run} on {socket.gethostname()} is not the run folder that rank 0 writes into; give every "
                    "machine a --run.dir that all of them share"
                )
            time.sleep(0.05)

    def blame(self, error: BaseException) -> LostRankError:
        """Which other rank failed, now that this one's collective did; waits a little for it to show."""
        deadline_s = time.monotonic() + _SEARCH_S
        while time.monotonic() < deadline_s:
            if (found := self._lost_peer()) is not None:
                return found
            time.sleep(0.05)
        # Perhaps with its whole machine, where nobody is left to see that it is gone.
        silent = self._silent_peers()
        if (found := self._lost_peer()) is not None:
            return found
        if silent:
            peer = silent[0]
            return LostRankError(peer.rank, f"{peer} is silent, last heard {_where(peer)}", peer.host, peer.pid)
        # It may have died before its first heartbeat.
        words = str(error).partition("\n")[0]
        return LostRankError(self._rank, f"rank {self._rank} lost another rank, which left no trace: {words}")

    def _look(self) -> None:
        while not self._closing.wait(self._beat_s):
            self._tell()
            # The main thread may wait for a lost peer for ever; if it does not, it says the same.
            if (lost := self._lost_peer()) is not None and not self._closing.wait(2 * self._beat_s):
                self._end(lost)
            patience = 1 if self._has_stepped else _START_PATIENCE
            if self._phase == "save":
                patience = max(patience, _SAVE_PATIENCE)
            if time.monotonic() - self._since_s > patience * self._timeout_s:
                self._end_hang(patience * self._timeout_s)

    def _lost_peer(self) -> LostRankError | None:
        """What happened to a peer that is gone, in its own words if it left any."""
        here = socket.gethostname()
        near = [rank for rank in range(self._world_size) if rank not in self._elsewhere]
        gone = [p for p in self._peers(near) if p.phase != "ended" and p.host == here and _is_gone(p.pid)]
        end = exits.read_end(self._run)  # after that look: whoever fails leaves its words before it goes
        if end.get("life") == self._life and end["code"] not in (exits.DONE, exits.STOPPED):
            who = f"rank {end['rank']} (pid {end['pid']} on {end['host']})"
            told = f"{who} failed at step {end['step']}: {end['cause']}"
            if end["code"] == exits.LOST_RANK:  # another survivor's words, which name the rank
                told = end["cause"]
            return LostRankError(end["rank"], told, end["host"], end["pid"])
        for peer in gone:
            died = f"{peer} died without a word, last heard {_where(peer)}"
            return LostRankError(peer.rank, f"{died}: killed, by the system (memory?) or by somebody", here, peer.pid)
        return None

    def _silent_peers(self) -> list[Heartbeat]:
        """Those that have not ended, and have said nothing new for a few beats; this rank says something meanwhile."""
        before = {peer.rank: peer.beat for peer in self._peers()}
        for _ in range(_SILENT_BEATS):
            time.sleep(self._beat_s)
            # The others judge at the same moment: whoever falls silent for it is taken for one that does not run.
            self._tell()
        return [peer for peer in self._peers() if peer.phase != "ended" and peer.beat == before.get(peer.rank)]

    def _end_hang(self, patience_s: float) -> None:
        silent = self._silent_peers()
        if self._closing.is_set():
            return
        everyone = [*self._peers(), self._heartbeat()]
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
                with contextlib.suppress(ProcessLookupError):  # another rank was quicker
                    os.kill(peer.pid, signal.SIGKILL)  # a stopped process does not hear the launcher's SIGTERM
        first = (silent or slowest)[0]
        self._end(LostRankError(first.rank, f"no progress for {patience_s:g} s: {told}", first.host, first.pid))

    def _end(self, lost: LostRankError) -> None:
        """Ends this process at once: its main thread waits for a peer that will not come."""
        print(f"error: rank {self._rank} gives up: {lost}", file=sys.stderr, flush=True)
        self.record(lost)
        os._exit(exits.LOST_RANK)

    def record(self, lost: LostRankError) -> None:
        """Writes exit.json about a lost rank."""
        told = {"rank": lost.rank, "host": lost.host, "pid": lost.pid, "cause": str(lost)}
        exits.record_end(self._run, exits.LOST_RANK, step=self._step, life=self._life, **told)

    def _heartbeat(self) -> Heartbeat:
        host, pid = socket.gethostname(), os.getpid()
        return Heartbeat(self._rank, self._life, host, pid, self._step, self._phase, self._beat)

    def _tell(self) -> None:
        """Writes the next heartbeat."""
        path = self._folder / f"rank-{self._rank:05d}.json"
        temporary = path.with_suffix(".tmp")
        # One at a time: a beat under way must not come after the last word. A full disk is the saver's to report.
        with self._beating, contextlib.suppress(OSError):
            self._beat += 1
            temporary.write_text(json.dumps(dataclasses.asdict(self._heartbeat())), encoding="utf-8")
            temporary.replace(path)

    def _peers(self, ranks: Iterable[int] | None = None) -> list[Heartbeat]:
        """What the other ranks, or those of them, said last."""
        heard = map(self._heartbeat_of, range(self._world_size) if ranks is None else ranks)
        found = [peer for peer in heard if peer is not None and peer.rank != self._rank]
        self._elsewhere |= {peer.rank for peer in found if peer.host != socket.gethostname()}
        return found

    def _heartbeat_of(self, rank: int) -> Heartbeat | None:
        """What a rank said last in this life."""
        try:
            told = Heartbeat(**json.loads((self._folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return told if told.life == self._life else None


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

"""Faults on purpose, for tests and for drills: `--debug.inject "kill:rank=1,step=20" "nan:rank=0,step=30"`.

Each happens once in the life of a run folder, which remembers it: a resumed run passes the same step.
"""

import dataclasses
import errno
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_prep.config_file import ConfigError

KINDS = {
    "kill": "SIGKILL before the step, as the kernel does when memory runs out",
    "terminate": "SIGTERM before the step, as a scheduler does",
    "stop": "SIGSTOP before the step: the process no longer runs, and is not dead",
    "raise": "an exception before the step",
    "hang": "an endless wait before the step",
    "slow": "a pause of `seconds` before the step",
    "nan": "the step's loss becomes NaN on this rank",
    "spike": "the step's loss is multiplied by 1,000 on this rank",
    "disk-full": "the next save at or after the step fails on this rank: no space left on device",
    "corrupt": "a bit of what this rank reads next flips in memory, before it is compared with its checksum",
}
_FOLDER = "injected"


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """One fault: on a rank, at a step, counted from 1."""

    text: str
    kind: str
    rank: int
    step: int
    seconds: float = 1.0


def parse_fault(text: str) -> Fault:
    """Reads "kind:rank=R,step=S[,seconds=T]".

    Raises:
        ConfigError: what is wrong, and what is known.
    """
    match = re.fullmatch(r"([a-z-]+):rank=(\d+),step=(\d+)(?:,seconds=(\d+(?:\.\d+)?))?", text)
    if match is None or match[1] not in KINDS:
        raise ConfigError(
            f"debug.inject: {text!r} is no fault; write KIND:rank=R,step=S[,seconds=T], KIND one of {', '.join(KINDS)}"
        )
    return Fault(text, match[1], int(match[2]), int(match[3]), float(match[4] or 1))


class InjectedError(RuntimeError):
    """What the fault `raise` raises."""


class Faults:
    """The faults of one rank."""

    def __init__(self, run: Path, texts: Sequence[str], rank: int):
        self._folder = run / _FOLDER
        self._waiting = [fault for text in texts if (fault := parse_fault(text)).rank == rank]

    def before_step(self, step: int) -> None:
        """Does what is due before a step."""
        for fault in self._due(step, "kill", "terminate", "stop", "raise", "hang", "slow"):
            match fault.kind:
                case "kill" | "terminate" | "stop":
                    name = {"kill": "SIGKILL", "terminate": "SIGTERM", "stop": "SIGSTOP"}[fault.kind]
                    os.kill(os.getpid(), signal.Signals[name])
                case "raise":
                    raise InjectedError(f"injected by debug.inject {fault.text}")
                case "hang":
                    while True:
                        time.sleep(1)
                case _:
                    time.sleep(fault.seconds)

    def is_corrupt(self, step: int) -> bool:
        """Whether the data of a step, or what is read ahead when it begins, is to be spoilt."""
        return bool(self._due(step, "corrupt"))

    def on_loss(self, loss: Tensor, step: int) -> Tensor:
        """The loss of a micro-batch, spoilt if that is due."""
        for fault in self._due(step, "nan", "spike"):
            loss = loss * (torch.nan if fault.kind == "nan" else 1e3)
        return loss

    def before_write(self, step: int) -> None:
        """Fails a save if that is due."""
        for fault in self._waiting:
            if fault.kind == "disk-full" and step >= fault.step and self._happens(fault):
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (debug.inject {fault.text})")

    def _due(self, step: int, *kinds: str) -> list[Fault]:
        return [f for f in self._waiting if f.kind in kinds and f.step == step and self._happens(f)]

    def _happens(self, fault: Fault) -> bool:
        """Whether it has not happened yet; remembers it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            (self._folder / re.sub(r"[^a-z0-9.-]+", "-", fault.text)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

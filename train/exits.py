"""How a run ended: exit codes, and RUN/exit.json for whoever decides whether to start it again.

torchrun turns every code but 0 into 1, so the file is what a wrapper reads: code, rank, host, cause, step, and how many
lives in a row ended by an error at this step. The first rank to fail writes it: the others fail because of it.
"""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from data_prep import publish

# The codes of sysexits.h, where it has one.
DONE = 0
BUG = 1
BAD_DATA = 65  # EX_DATAERR
NOT_FINITE = 70  # EX_SOFTWARE
LOST_RANK = 71  # EX_OSERR
CANNOT_WRITE = 73  # EX_CANTCREAT
STOPPED = 75  # EX_TEMPFAIL, "try again": what a scheduler's wrapper tests for to requeue the job
BAD_CONFIG = 78  # EX_CONFIG

_FILE, _EARLIER = "exit.json", "earlier-exit.json"
_MOST_FAILURES_AT_A_STEP = 3


class RepeatedFailureError(ValueError):
    """The last lives of a run all ended by an error at the same step."""


def begin_life(run: Path) -> None:
    """Keeps how the life before ended aside, so that exit.json tells of this one; rank 0 calls it.

    Raises:
        RepeatedFailureError: the run fails at the same step again and again; who restarts it must look first.
    """
    last = _read(run / _FILE)
    if last.get("times", 0) >= _MOST_FAILURES_AT_A_STEP:
        raise RepeatedFailureError(
            f"{run}: failed {last['times']} times in a row at step {last['step']}, last with: {last['cause']}; "
            f"mend that, then delete {run / _FILE} to go on"
        )
    if (run / _FILE).exists():
        (run / _FILE).replace(run / _EARLIER)
    else:  # the life before was killed without a word, or there was none: no failure is in a row with the next
        (run / _EARLIER).unlink(missing_ok=True)


def record_end(
    run: Path, code: int, *, rank: int, step: int, cause: str, life: str = "", host: str = "", pid: int = 0
) -> None:
    """Writes exit.json, unless another rank of this life has: it ended first.

    `host` and `pid` are those of `rank`, by default this process: it may tell of another's end.
    """
    # A rank of an earlier life that was slow to end may have left its word in this one.
    if _read(run / _FILE).get("life", life) != life:
        with contextlib.suppress(OSError):
            (run / _FILE).unlink()
    earlier = _read(run / _EARLIER)
    # What fails before the first step, a mistake in a config say, costs nothing and is no reason to refuse a start.
    is_failure = code not in (DONE, STOPPED) and step > 0
    again = is_failure and earlier.get("step") == step and earlier.get("code") not in (DONE, STOPPED)
    entry = {
        "code": code,
        "life": life,
        "rank": rank,
        "host": host or socket.gethostname(),
        "pid": pid or os.getpid(),
        "step": step,
        "cause": cause,
        "times": (earlier.get("times", 0) if again else 0) + is_failure,
    }
    temporary = publish.temporary_beside(run / _FILE)
    # Another rank was first, or nothing can be written, or removed: the message on stderr stays.
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(entry) + "\n", encoding="utf-8")
        os.link(temporary, run / _FILE)  # fails if it is there, which a rename does not
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def read_end(run: Path) -> dict[str, Any]:
    """What exit.json says of this life; empty while it lasts."""
    return _read(run / _FILE)


def _read(path: Path) -> dict[str, Any]:
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entry if isinstance(entry, dict) else {}

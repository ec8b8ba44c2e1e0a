"""Changes to a run's data, queued in its folder: `requests/0001.json`, `0002.json`, ...

A command writes a request; the run takes it up when it starts or at its next checkpoint, whichever comes first, and
notes the number in its data state. A request is never changed or deleted: a run that goes back to an older checkpoint
takes it up again. What is no request is refused like one that does not fit: it must not end a run.
"""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep import publish
from resume import state as states
from resume.manifest import DataError, is_file_id
from resume.order import Order, changeable
from resume.state import DataState

FOLDER = "requests"
_MOST_EPOCHS = 1_000

Request = Mapping[str, Any]
"""{"kind": "append", "files": {source: {file_id: path}}, "weights": {...} | None},
{"kind": "remove", "file_ids": [...]}, {"kind": "skip", "num_steps": n, "for_good": bool} (of a rollback also "because":
text), {"kind": "requeue"},
{"kind": "reweight", "weights": {...}, "from_tokens": n | None}; of a file that holds none of these,
{"kind": "unreadable", "why": ...}"""


def queue(run: Path, request: Request, taken: int = 0) -> int:
    """Writes a request under the next free number above `taken`, the newest that the run took, and returns that."""
    folder = run / FOLDER
    publish.make_folder(folder)
    temporary = publish.temporary_beside(folder / "request")
    try:
        publish.write_text(temporary, json.dumps(request, indent=1) + "\n")
        number = max([taken, *_numbers(folder)])
        while True:
            number += 1
            try:
                os.link(temporary, folder / f"{number:04d}.json")  # fails if the name is taken, unlike a rename
            except FileExistsError:
                continue
            publish.sync_folder(folder)
            return number
    finally:
        temporary.unlink(missing_ok=True)


def pending(run: Path, taken: int) -> list[tuple[int, Request]]:
    """The requests with numbers above `taken`, in order; what is no request is one that will be refused.

    Raises:
        DataError: one cannot be read.
    """
    found = []
    for number in sorted(number for number in _numbers(run / FOLDER) if number > taken):
        path = run / FOLDER / f"{number:04d}.json"
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep the run waiting for ever
                raise OSError(errno.EINVAL, "not a plain file")
            request = json.loads(path.read_text(encoding="utf-8"))
            why = None if _is_request(request) else "its fields are not those of a request"
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore it, or delete it") from error
        except (ValueError, RecursionError, OverflowError) as error:
            request, why = None, str(error)
        if why is not None:
            request = {"kind": "unreadable", "why": f"{path}: not a request ({why}); make it again by command"}
        found.append((number, request))
    return found


def applied(state: DataState, request: Request) -> DataState:
    """The state after a request; its order can be replayed.

    Raises:
        DataError: the request does not fit the state.
    """
    try:
        changed = _applied(changeable(state), request)
        Order(changed)
        return changed
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DataError(f"not a request ({type(error).__name__}: {error})") from error


def _applied(state: DataState, request: Request) -> DataState:
    match request["kind"]:
        case "append":
            files = {source: list(listed) for source, listed in request["files"].items()}
            return states.append(state, files, request["weights"])
        case "remove":
            return states.remove(state, request["file_ids"])
        case "skip":
            if "because" not in request:  # a rollback passes over what it trained, however much
                _refuse_endless(state, request["num_steps"])
            return states.skip(state, request["num_steps"], request["for_good"])
        case "requeue":
            return states.requeue(state)
        case "reweight":
            return states.reweight(state, request["weights"], request["from_tokens"])
        case "unreadable":
            raise DataError(request["why"])
        case kind:
            raise DataError(f"unknown kind of request {kind!r}")


def describe(request: Request) -> str:
    """A request in a few words."""
    match request["kind"]:
        case "append":
            counts = [f"{len(files):,} of {source}" for source, files in request["files"].items()]
            weights = f", weights {_shown(request['weights'])}" if request["weights"] else ""
            return f"append of files: {', '.join(counts)}{weights}"
        case "remove":
            return f"removal of {len(request['file_ids']):,} files"
        case "skip":
            for_good = " for good" if request["for_good"] else ""
            return f"skip of {request['num_steps']:,} steps{for_good}{_because(request)}"
        case "reweight":
            when = f" from {request['from_tokens']:,} tokens on" if request["from_tokens"] is not None else ""
            return f"weights {_shown(request['weights'])}{when}"
        case "requeue":
            return "return of what was skipped"
        case kind:
            return str(kind)


def num_rollbacks(run: Path) -> int:
    """How often the run went back to a checkpoint by itself."""
    return sum("because" in request for _, request in pending(run, 0))


def _is_request(request: Any) -> bool:
    """Whether JSON has the form of a request; whether it fits a run is another question."""
    match request:
        case {"kind": "append", "files": dict(files), "weights": weights}:
            listed = all(isinstance(paths, dict) and all(map(is_file_id, paths)) for paths in files.values())
            return (
                listed
                and all(isinstance(path, str) for paths in files.values() for path in paths.values())
                and (weights is None or _are_weights(weights))
            )
        case {"kind": "remove", "file_ids": [*file_ids]}:
            return all(map(is_file_id, file_ids))
        case {"kind": "skip", "num_steps": int(), "for_good": bool()} | {"kind": "requeue"}:
            return True
        case {"kind": "reweight", "weights": weights, "from_tokens": int() | None}:
            return _are_weights(weights)
    return False


def _refuse_endless(state: DataState, num_steps: int) -> None:
    """Refuses to skip what the order would go through epoch after epoch, long enough for a hang."""
    in_epoch = sum(Order(state).live_groups().values()) * state.samples_per_group // state.batch.batch_sequences
    if num_steps > _MOST_EPOCHS * (in_epoch + 1):
        raise DataError(f"skip of {num_steps} steps: the whole data is {in_epoch} steps; skip no more than that")


def _because(request: Request) -> str:
    """Why the run itself made a request; nothing if a person did."""
    return f" ({request['because']})" if "because" in request else ""


def _are_weights(values: Any) -> bool:
    if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
        return False
    return all(math.isfinite(value) and value >= 0 for value in values.values()) and any(values.values())


def _shown(weights: Mapping[str, float]) -> str:
    return " ".join(f"{source}={weight:g}" for source, weight in weights.items())


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    matches = [re.fullmatch(r"([0-9]{4}|[1-9][0-9]{4,})\.json", path.name) for path in folder.iterdir()]
    return [int(match[1]) for match in matches if match]

"""Changes to a run's data, queued in its folder: `requests/0001.json`, `0002.json`, ...

A command writes a request; the run takes it up when it starts or at its next checkpoint, whichever comes first, and
notes the number in its data state. A request is never changed or deleted: a run that goes back to an older checkpoint
takes it up again. What is no request is refused like one that does not fit: it must not end a run.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep import publish
from resume import state as states
from resume.manifest import DataError
from resume.order import changeable
from resume.state import DataState

FOLDER = "requests"

Request = Mapping[str, Any]
"""{"kind": "append", "files": {source: {file_id: path}}, "weights": {...} | None},
{"kind": "remove", "file_ids": [...]}, {"kind": "skip", "num_steps": n, "for_good": bool} (of a rollback also "because":
text), {"kind": "requeue"},
{"kind": "reweight", "weights": {...}, "from_tokens": n | None}; of a file that holds none of these,
{"kind": "unreadable", "why": ...}"""

_FILE_ID = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}-\d+")


def queue(run: Path, request: Request, taken: int = 0) -> int:
    """Writes a request under the next free number above `taken`, the newest that the run took, and returns that."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
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
            request = json.loads(path.read_text(encoding="utf-8"))
            why = None if _is_request(request) else "its fields are not those of a request"
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); restore it, or delete it") from error
        except ValueError as error:
            request, why = None, str(error)
        if why is not None:
            request = {"kind": "unreadable", "why": f"{path}: not a request ({why}); make it again by command"}
        found.append((number, request))
    return found


def applied(state: DataState, request: Request) -> DataState:
    """The state after a request.

    Raises:
        DataError: the request does not fit the state.
    """
    state = changeable(state)
    try:
        match request["kind"]:
            case "append":
                files = {source: list(listed) for source, listed in request["files"].items()}
                return states.append(state, files, request["weights"])
            case "remove":
                return states.remove(state, request["file_ids"])
            case "skip":
                return states.skip(state, request["num_steps"], request["for_good"])
            case "requeue":
                return states.requeue(state)
            case "reweight":
                return states.reweight(state, request["weights"], request["from_tokens"])
            case "unreadable":
                raise DataError(request["why"])
            case kind:
                raise DataError(f"unknown kind of request {kind!r}")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a request ({type(error).__name__}: {error})") from error


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
            listed = all(isinstance(paths, dict) and _are_file_ids(list(paths)) for paths in files.values())
            return (
                listed
                and all(isinstance(path, str) for paths in files.values() for path in paths.values())
                and (weights is None or _are_weights(weights))
            )
        case {"kind": "remove", "file_ids": [*file_ids]}:
            return _are_file_ids(file_ids)
        case {"kind": "skip", "num_steps": int(), "for_good": bool()} | {"kind": "requeue"}:
            return True
        case {"kind": "reweight", "weights": weights, "from_tokens": int() | None}:
            return _are_weights(weights)
    return False


def _because(request: Request) -> str:
    """Why the run itself made a request; nothing if a person did."""
    return f" ({request['because']})" if "because" in request else ""


def _are_file_ids(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) and _FILE_ID.fullmatch(value) for value in values)


def _are_weights(values: Any) -> bool:
    if not isinstance(values, dict) or not all(type(value) in (int, float) for value in values.values()):
        return False
    return all(math.isfinite(value) and value >= 0 for value in values.values()) and any(values.values())


def _shown(weights: Mapping[str, float]) -> str:
    return " ".join(f"{source}={weight:g}" for source, weight in weights.items())


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"(\d+)\.json", path.name))]

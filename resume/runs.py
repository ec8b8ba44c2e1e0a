"""A run's data as it stands in its folder: the newest checkpoint's state and books, and what waits to be taken up."""

import contextlib
import dataclasses
import json
import statistics
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from data_prep.fingerprint import fingerprint
from data_prep.manifest import Manifest, ManifestError, read_manifest
from resume import checkpoint, requests
from resume import ledger as ledgers
from resume import state as states
from resume.ledger import Ledger
from resume.manifest import DataError, DataFile, file_of, listed_files, look_for
from resume.order import Order
from resume.requests import Request
from resume.state import DataState

FILES = "files.json"
METRICS = "metrics.jsonl"

_TAIL_BYTES = 64 * 1024
_SHORTEST_BEGINNING = 6


class RequestError(DataError):
    """A command that does not fit the run; the data is not to blame."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says about its data."""

    folder: Path
    checkpoint: Path
    config: dict[str, Any]
    state: DataState
    order: Order
    ledger: Ledger
    pending: list[tuple[int, Request]]

    @property
    def paths(self) -> dict[str, Path]:
        """Where the run's files were when it last started, and those that wait to be appended, by identity."""
        paths = read_paths(self.folder)
        for _, request in self.pending:
            if request.get("kind") == "append":
                paths |= {i: Path(path) for files in request["files"].values() for i, path in files.items()}
        return paths

    @property
    def data_folders(self) -> dict[Path, Manifest]:
        """The data folders that the run was started with and that still are there."""
        found = {}
        for path in map(Path, self.config["data"]["paths"]):
            try:
                found[path] = read_manifest(path)
            except ManifestError:
                continue  # perhaps moved; the run says so when it needs it
        return found

    def with_pending(self) -> tuple[DataState, list[str]]:
        """The state after the waiting requests, and what will be refused of them."""
        state, refused = self.state, []
        for number, request in self.pending:
            try:
                state = requests.applied(state, request)
            except DataError as error:
                refused.append(f"request {number}: {error}")
        return state, refused

    def look_for(self, file_ids: Sequence[str]) -> dict[str, DataFile]:
        """Files of the run, those of them that are found on disk."""
        sources = {file_id: source for source, ids in self.state.sources.items() for file_id in ids}
        paths, nowhere = self.paths, Path("place unknown")
        hints = {i: file_of(i, paths.get(i, nowhere), self.state.token_bytes, sources[i]) for i in file_ids}
        listed = {file.file_id: file for file in listed_files(self.data_folders, "train")}
        search = [Path(path) for path in (*self.config["data"]["paths"], *self.config["data"].get("search", ()))]
        return look_for(file_ids, [listed, hints], search)

    def identify(self, name: str, known: Collection[str]) -> str:
        """The one of `known` that is given by identity, by its beginning, by path, or by file name.

        Raises:
            RequestError: none or several files fit.
        """
        if name in known:
            return name
        paths = {file_id: path for file_id, path in self.paths.items() if file_id in known}
        fitting = {file_id for file_id, path in paths.items() if path == Path(name).absolute()}
        if not fitting:
            fitting = {i for i in known if len(name) >= _SHORTEST_BEGINNING and i.startswith(name)}
            fitting |= {file_id for file_id, path in paths.items() if path.as_posix().endswith(f"/{name}")}
        if not fitting and Path(name).is_file():  # moved or renamed since, or reached another way
            fitting = {fingerprint(name).file_id} & set(known)
        if not fitting:
            raise RequestError(
                f"{name}: no file of the run; give a path, a file name, or an identity or its first "
                f"{_SHORTEST_BEGINNING} characters or more, as `python -m resume audit {self.folder}` lists them"
            )
        if len(fitting) > 1:
            places = {str(paths.get(file_id, file_id)) for file_id in fitting}
            examples = sorted(places if len(places) > 1 else fitting)[:2]
            raise RequestError(f"{name}: fits {len(fitting)} files of the run, as {' and '.join(examples)}; give more")
        return fitting.pop()

    def step_s(self) -> float | None:
        """Seconds that a step took of late, by the run's log; None without one."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            with (self.folder / METRICS).open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - _TAIL_BYTES))
                lines = log.read().decode("utf-8", errors="replace").splitlines()[-200:]
            records = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
            return statistics.median(record["step_s"] for record in records if "step_s" in record)
        return None


def open_run(folder: Path) -> Run:
    """Reads what a run folder says about its data.

    Raises:
        DataError: no checkpoint yet, or not a run folder.
        CheckpointError: the newest checkpoint's record is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder")
    newest = checkpoint.latest(folder)
    if newest is None and (bad := sorted(path.name for path in folder.glob("step-*.bad*"))):
        raise DataError(f"{folder}: no good checkpoint is left, only {', '.join(bad)}; restore one of them from a copy")
    if newest is None:
        raise DataError(f"{folder}: no checkpoint yet, so there is nothing to ask or change; wait for the first one")
    record = checkpoint.read_record(newest)
    try:
        state = states.from_json(record["data"])
        order = Order(state)
        ledger = ledgers.from_json(record["trained"], order.file_ids)
        config = tomllib.loads(checkpoint.read_config(newest, record))
    except KeyError as error:
        raise DataError(f"{newest}: its record has no {error}; it was written by another version") from error
    except DataError as error:
        raise DataError(f"{newest}: {error}") from error
    return Run(folder, newest, config, state, order, ledger, requests.pending(folder, state.requests_taken))


def read_paths(run: Path) -> dict[str, Path]:
    """Where the run's files were last, by identity; a hint, as a file is known by its content."""
    try:
        return {file_id: Path(path) for file_id, path in json.loads((run / FILES).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}

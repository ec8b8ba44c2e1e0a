"""A data folder grows by generations: each preparation that finds new input adds shards, and one folder that says how.

    generations/0000/inputs.json        the input files and the settings
                     shards.json        the shards, and where in its stream each begins
                     documents.parquet  every document that was read: where from, what became of it (`documents_table`)
                     hashes.npy, bands.npy, sketch.npy   of the kept documents: later ones are compared with them
                     bad_lines.jsonl    what gave no document
                     summary.json       counts, for the report

A generation counts from the moment its folder has its name; the manifest follows from the generations. What an earlier
generation wrote is never touched again.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import publish
from data_prep.manifest import ShardRecord

FOLDER = "generations"
INPUTS_FILE, SHARDS_FILE, DOCUMENTS_FILE = "inputs.json", "shards.json", "documents.parquet"
HASHES_FILE, BANDS_FILE, SKETCH_FILE = "hashes.npy", "bands.npy", "sketch.npy"
BAD_LINES_FILE, SUMMARY_FILE = "bad_lines.jsonl", "summary.json"


SOURCE = "source "
"""Begins the names of settings that belong to one source."""


class GenerationError(ValueError):
    """A generation of a data folder cannot be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class Input:
    """An input file, known by its content."""

    source: str
    name: str
    file_id: str


@dataclass(frozen=True, slots=True)
class Generation:
    """What one preparation added to a data folder."""

    folder: Path
    settings: dict[str, Any]
    """What shapes the result besides the input."""
    inputs: tuple[Input, ...]
    shards: tuple[tuple[ShardRecord, int], ...]
    """Each shard with the place of its first target in the stream of its source and split."""


def read_generations(folder: Path) -> list[Generation]:
    """The generations of a data folder, oldest first; none if it is no data folder.

    Raises:
        GenerationError: one of them cannot be read.
    """
    found = sorted(p for p in (folder / FOLDER).glob("*") if re.fullmatch(r"\d{4,}", p.name))
    return [_read(path) for path in sorted(found, key=lambda path: int(path.name))]


def folder_of(folder: Path, number: int) -> Path:
    """The folder of a generation."""
    return folder / FOLDER / f"{number:04d}"


def write_inputs(generation: Path, settings: dict[str, Any], inputs: Iterable[Input]) -> None:
    """Write `inputs.json`."""
    table = {"settings": settings, "files": [[i.source, i.name, i.file_id] for i in inputs]}
    publish.write_text(generation / INPUTS_FILE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def write_shards(generation: Path, shards: Sequence[tuple[ShardRecord, int]]) -> None:
    """Write `shards.json`."""
    table = [{**asdict(record), "stream_start": start} for record, start in shards]
    publish.write_text(generation / SHARDS_FILE, json.dumps(table, indent=1) + "\n")


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings that differ, in words. Sources may come and go; those that both have must be read alike."""
    both = {**old, **new}
    names = [name for name in both if not name.startswith(SOURCE) or (name in old and name in new)]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)


def _read(folder: Path) -> Generation:
    inputs, shards = _json(folder / INPUTS_FILE), _json(folder / SHARDS_FILE)
    try:
        return Generation(
            folder,
            dict(inputs["settings"]),
            tuple(Input(*item) for item in inputs["files"]),
            tuple((ShardRecord(**item), start) for item in shards if (start := item.pop("stream_start")) is not None),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GenerationError(
            f"{folder}: {INPUTS_FILE} or {SHARDS_FILE} is not as written ({error}); restore it"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenerationError(f"{path}: not readable ({error}); restore it, or prepare the data anew") from error

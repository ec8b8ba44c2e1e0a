"""The items of evaluation sets as they are published: what each record says, whatever its fields are called."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.reading.file_kinds import LINE_SUFFIXES, compression, content_suffix
from data_prep.reading.streams import decompressed

RECORD_SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet", ".csv", ".tsv")


class Item(NamedTuple):
    """A record of a .jsonl, .json or .parquet file, a row of a table, or a line of another file."""

    task: str
    """The file or folder that was named."""
    id: str
    """Its file, and its number there from 1."""
    texts: list[str]


def read_items(paths: Sequence[Path]) -> list[Item]:
    """The items of files, and of those in folders that hold records.

    Raises:
        ValueError: no such file, a folder without one, or a file that cannot be read.
    """
    items: list[Item] = []
    for path in paths:
        files = _files_of(path)
        if not files:
            raise ValueError(f"{path}: no file of {' '.join(RECORD_SUFFIXES)} in the folder")
        for file in files:
            try:
                records = [list(_strings(record)) for record in _records(file)]
            except (OSError, ValueError, RecursionError, csv.Error) as error:
                raise ValueError(f"{file}: cannot be read as an evaluation set: {error}") from error
            name = file.relative_to(path).as_posix() if file != path else path.name
            items += [Item(path.name, f"{name}:{number}", texts) for number, texts in enumerate(records, start=1)]
    return items


def _files_of(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if content_suffix(f.name) in RECORD_SUFFIXES) if path.is_dir() else [path]


def _records(file: Path) -> Iterable[Any]:
    suffix = content_suffix(file.name)
    if suffix == ".parquet":
        import pyarrow.parquet as pq  # here, not above: 0.25 s that sets of other kinds need not wait for

        return pq.read_table(file).to_pylist()
    raw = b"".join(decompressed(str(file))) if compression(file.name) else file.read_bytes()
    text = raw.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        return csv.reader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",")
    lines = [line for line in text.split("\n") if line.strip()]
    if suffix in LINE_SUFFIXES:
        return [json.loads(line) for line in lines]
    return _elements(json.loads(text)) if suffix == ".json" else lines


def _elements(value: Any) -> Iterable[Any]:
    """The records of a JSON file: an array, the longest array in an object, or the values of an object."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    arrays = [part for part in value.values() if isinstance(part, list)]
    return max(arrays, key=len, default=list(value.values()))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)

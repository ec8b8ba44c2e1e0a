"""Writes what a generation remembers of its documents: the table, what later documents are compared with, bad lines."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import documents_table, generations, unit_step
from data_prep.documents_table import EXACT_DUPLICATE, KEPT, NEAR_DUPLICATE, DocumentsWriter
from data_prep.line_numbers import first_lines
from data_prep.reduce import TRAIN, VALIDATION, Decided, Documents, FinishedUnit
from data_prep.summary import in_order, read_lines

_VERDICTS = (KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE)


def write(
    generation: Path,
    units: Sequence[FinishedUnit],
    documents: Documents,
    decided: Decided,
    older: Sequence[Path],
    near: bool,
) -> None:
    """Write `documents.parquet`, `bad_lines.jsonl` and the arrays into the folder of a generation."""
    lines_before = first_lines(units)
    _write_arrays(generation, units, documents, decided, near)
    id_of = _ids(units, documents, decided, older)
    with DocumentsWriter(generation / generations.DOCUMENTS_FILE) as table:
        for index, unit in enumerate(units):
            rows = slice(*np.searchsorted(documents.unit, [index, index + 1]).tolist())
            table.add(_rows(unit, lines_before[index], rows, documents, decided, id_of))
    with (generation / generations.BAD_LINES_FILE).open("w", encoding="utf-8") as file:
        for unit, before in zip(units, lines_before, strict=True):
            for item in in_order(unit.folder / unit_step.BAD_LINES_FILE):
                where = {"path": unit.unit.paths[item["file"]], "line": item["line"] + before}
                where |= {"place": item["place"], "reason": item["reason"], "head": item["head"]}
                file.write(json.dumps(where, ensure_ascii=False) + "\n")


def _write_arrays(
    generation: Path, units: Sequence[FinishedUnit], documents: Documents, decided: Decided, near: bool
) -> None:
    """Rows of kept documents only: the others were dropped for one that is among them."""
    kept = decided.kept
    np.save(generation / generations.HASHES_FILE, documents.hashes[kept])
    if not near or not units:
        return
    ends = np.searchsorted(documents.unit, np.arange(len(units) + 1))
    names = ((generations.BANDS_FILE, unit_step.BANDS_FILE, 1), (generations.SKETCH_FILE, unit_step.SKETCH_FILE, 0))
    for name, unit_name, axis in names:
        first = np.load(units[0].folder / unit_name, mmap_mode="r")
        shape = list(first.shape)
        shape[axis] = int(kept.sum())
        # Filled in place on disk: the sketches of a large corpus do not fit into memory.
        out = np.lib.format.open_memmap(generation / name, mode="w+", dtype=first.dtype, shape=tuple(shape))
        at = 0
        for index, unit in enumerate(units):
            rows = np.flatnonzero(kept[ends[index] : ends[index + 1]])
            target = (slice(None), slice(at, at + rows.size)) if axis else slice(at, at + rows.size)
            # One at a time: each open file takes a descriptor, of which there are often a thousand.
            out[target] = np.load(unit.folder / unit_name, mmap_mode="r").take(rows, axis=axis)
            at += rows.size
        out.flush()


def _rows(
    unit: FinishedUnit,
    lines_before: int,
    rows: slice,
    documents: Documents,
    decided: Decided,
    id_of: Callable[[int], str],
) -> dict[str, list[Any]]:
    """The documents of a unit in the order of their lines."""
    records = np.load(unit.folder / unit_step.DOCUMENTS_FILE, mmap_mode="r")
    kinds, places = decided.verdicts.kind[rows].tolist(), decided.place[rows].tolist()
    twins, held_out = decided.verdicts.duplicate_of[rows].tolist(), decided.held_out[rows].tolist()
    split = [None if kind else (VALIDATION if held else TRAIN) for kind, held in zip(kinds, held_out, strict=True)]
    found: list[tuple[Any, ...]] = [
        (file, line, place, _VERDICTS[kind], id_of(twin) if kind else None, *rest)
        for file, line, place, kind, twin, *rest in zip(
            records["file"].tolist(),
            records["line"].tolist(),
            records["place"].tolist(),
            kinds,
            twins,
            split,
            [None if start < 0 else start for start in places],
            records["num_tokens"].tolist(),
            records["text_bytes"].tolist(),
            np.char.decode(records["language"], "ascii").tolist(),
            strict=True,
        )
    ]
    for item in read_lines(unit.folder / unit_step.DROPPED_FILE):
        found.append((item["file"], item["line"], item["place"], item["reason"], *[None] * 6))
    found.sort(key=lambda row: row[:2])
    columns = [list(column) for column in zip(*found, strict=True)] or [[] for _ in range(10)]
    names = (
        "file",
        "line",
        "place",
        "verdict",
        "duplicate_of",
        "split",
        "start",
        "num_tokens",
        "text_bytes",
        "language",
    )
    table: dict[str, list[Any]] = dict(zip(names, columns, strict=True))
    table["path"] = [unit.unit.paths[file] for file in table.pop("file")]
    table["line"] = [line + lines_before for line in table["line"]]
    table["source"] = [unit.source] * len(table["path"])
    return table


def _ids(
    units: Sequence[FinishedUnit], documents: Documents, decided: Decided, older: Sequence[Path]
) -> Callable[[int], str]:
    """Ids of rows as verdicts count them: kept documents of older generations, then those of this one."""
    num_older = sum(len(np.load(folder / generations.HASHES_FILE, mmap_mode="r")) for folder in older)
    named = np.unique(decided.verdicts.duplicate_of)
    older_ids = _older_ids(older, named[(named >= 0) & (named < num_older)])
    first_row = np.searchsorted(documents.unit, np.arange(len(units)))

    def id_of(row: int) -> str:
        if row < num_older:
            return older_ids[row]
        row -= num_older
        unit = int(documents.unit[row])
        record = _records(units[unit].folder)[row - int(first_row[unit])]
        return f"{units[unit].unit.paths[int(record['file'])]}#{int(record['place'])}"

    return id_of


def _older_ids(older: Sequence[Path], rows: np.ndarray) -> dict[int, str]:
    """Ids of some rows of older generations; only those are read into memory."""
    found: dict[int, str] = {}
    first = 0
    for folder in older:
        num_rows = len(np.load(folder / generations.HASHES_FILE, mmap_mode="r"))
        own = rows[(rows >= first) & (rows < first + num_rows)]
        if own.size:
            ids = documents_table.kept_ids(folder / generations.DOCUMENTS_FILE, own - first)
            found.update(zip(own.tolist(), ids, strict=True))
        first += num_rows
    return found


@functools.lru_cache(maxsize=64)
def _records(folder: Path) -> np.ndarray:
    return np.load(folder / unit_step.DOCUMENTS_FILE, mmap_mode="r")

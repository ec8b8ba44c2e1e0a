"""What a generation holds, in numbers and samples: `summary.json`, from which the report is made.

One table per source:
    files, input_bytes             what was read
    read_bytes                     text of all documents as read
    documents, text_bytes, tokens  what is kept, in both splits
    splits                         {split: {documents, text_bytes, tokens}}
    exact_duplicates, near_duplicates   {documents, text_bytes}
    dropped, bad, masked           {reason: count}
    languages                      {language: documents that passed the filters}
    length_histogram               [[from bytes, documents], ...]: kept documents by powers of two of their length
    samples                        {reason: [{id, line, text}]}: beginnings of dropped documents
    bad_lines                      {reason: [{path, line, head}]}
    licence
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import unit_step
from data_prep.duplicates.dedup import EXACT, NEAR
from data_prep.line_numbers import first_lines
from data_prep.reduce import TRAIN, VALIDATION, Decided, Documents, FinishedUnit
from data_prep.sources import Source

NUM_SAMPLES = 10
"""Of each reason."""


def summarise(
    sources: Sequence[Source], units: Sequence[FinishedUnit], documents: Documents, decided: Decided
) -> dict[str, Any]:
    """The content of `summary.json`."""
    lines_before = first_lines(units)
    return {
        "sources": {
            source.name: _of_source(source, units, lines_before, documents, decided)
            for source in sources
            if any(unit.source == source.name for unit in units)
        }
    }


def _of_source(
    source: Source, units: Sequence[FinishedUnit], lines_before: Sequence[int], documents: Documents, decided: Decided
) -> dict[str, Any]:
    own = [index for index, unit in enumerate(units) if unit.source == source.name]
    of_source = np.isin(documents.unit, own)
    kept = of_source & decided.kept
    summaries = [units[index].summary for index in own]
    samples, bad_lines = _samples(units, own, lines_before)
    return {
        "files": len({path for index in own for path in units[index].unit.paths}),
        "input_bytes": sum(units[index].unit.size_bytes for index in own),
        "read_bytes": sum(summary.read_bytes for summary in summaries),
        **_counts(documents, kept),
        "splits": {
            TRAIN: _counts(documents, kept & ~decided.held_out),
            VALIDATION: _counts(documents, kept & decided.held_out),
        },
        "exact_duplicates": _counts(documents, of_source & (decided.verdicts.kind == EXACT)),
        "near_duplicates": _counts(documents, of_source & (decided.verdicts.kind == NEAR)),
        **{
            name: dict(_total(getattr(summary, name) for summary in summaries).most_common())
            for name in ("dropped", "bad", "masked", "languages")
        },
        "length_histogram": _histogram(documents.text_bytes[kept]),
        "samples": samples,
        "bad_lines": bad_lines,
        "licence": source.config.licence,
    }


def _counts(documents: Documents, members: np.ndarray) -> dict[str, int]:
    return {
        "documents": int(np.count_nonzero(members)),
        "text_bytes": int(documents.text_bytes[members].sum(dtype=np.int64)),
        "tokens": int(documents.num_tokens[members].sum()),
    }


def _total(counts: Iterator[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _histogram(text_bytes: np.ndarray) -> list[list[int]]:
    powers, counts = np.unique(np.frexp(text_bytes.astype(np.float64))[1] - 1, return_counts=True)
    return [[2 ** max(int(power), 0), int(count)] for power, count in zip(powers, counts, strict=True)]


def _samples(
    units: Sequence[FinishedUnit], own: Sequence[int], lines_before: Sequence[int]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    samples: dict[str, list[dict[str, Any]]] = {}
    bad_lines: dict[str, list[dict[str, Any]]] = {}
    for index in own:
        unit, before = units[index], lines_before[index]
        for item in read_lines(unit.folder / unit_step.DROPPED_FILE):
            found = samples.setdefault(item["reason"], [])
            if "text" in item and len(found) < NUM_SAMPLES:
                path = unit.unit.paths[item["file"]]
                found.append({"id": f"{path}#{item['place']}", "line": item["line"] + before, "text": item["text"]})
        for item in in_order(unit.folder / unit_step.BAD_LINES_FILE):
            found = bad_lines.setdefault(item["reason"], [])
            if len(found) < NUM_SAMPLES:
                path = unit.unit.paths[item["file"]]
                found.append({"path": path, "line": item["line"] + before, "head": item["head"]})
    return samples, bad_lines


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file of ours."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def in_order(path: Path) -> list[dict[str, Any]]:
    """The same in the order of the input: what a step found in a second look comes late."""
    return sorted(read_lines(path), key=lambda item: (item["file"], item["line"], item["place"]))

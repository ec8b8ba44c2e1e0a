"""What became of documents, as `inspect` tells it: kept, left out and why, or a duplicate of which; lines of text."""

import difflib
from collections import Counter
from collections.abc import Iterator

from data_prep.documents_table import EXACT_DUPLICATE, NEAR_DUPLICATE
from data_prep.looking.documents_query import Row
from data_prep.looking.inspect_documents import Choose, heading, picked, places
from data_prep.looking.prepared import BadLineRecord, NotFoundError, PreparedFolder
from data_prep.looking.text_table import one_line, visible

EXAMPLE_CHARACTERS = 1_000
"""So much is shown of each of several documents that were left out."""


def fate(folder: PreparedFolder, name: str) -> Iterator[str]:
    """What became of a document, named by PATH#PLACE, PATH:LINE or, if it is a whole file, by PATH."""
    path, place, line = parse_id(name)
    path = folder.full_path(path)
    rows = folder.find(path, place=place, line=line)
    bad_lines = [bad for bad in folder.bad_lines(path) if place is None and line in (None, bad.line)]
    if place is None and line is None and len(rows) + len(bad_lines) > 1:
        lines = f"{path}:{(rows[0] if rows else bad_lines[0]).line}"
        raise NotFoundError(f"{path}: has {len(rows) + len(bad_lines):,} documents and bad lines; name one, as {lines}")
    if not rows and not bad_lines:
        near = " and ".join(f"{path}#{place} (line {line})" for place, line in folder.neighbours(path, place, line))
        raise NotFoundError(
            f"{name}: no document of {folder.folder}; nearest: {near or 'none'}; bad lines are named PATH:LINE"
        )
    for row in rows:
        yield from _fate_of_row(folder, row)
    for bad in bad_lines:
        yield from _bad_line(bad)


def dropped(folder: PreparedFolder, reason: str, choose: Choose, source: str | None) -> Iterator[str]:
    """Documents, or lines, that were left out for a reason."""
    counts = reasons(folder)
    if reason not in counts:
        near = difflib.get_close_matches(reason, counts, n=1)
        known = ", ".join(f"{name} ({count:,})" for name, count in counts.most_common())
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise NotFoundError(f"--dropped {reason!r}: nothing was left out for that. {hint}There are {known or 'none'}")
    yield f"{counts[reason]:,} times {reason}"
    bad_lines = [bad for bad in folder.bad_lines() if bad.reason == reason]
    for rank in choose(len(bad_lines)):
        yield from _bad_line(bad_lines[rank])
    samples = _samples(folder, reason)
    for row in picked(folder, reason, choose, source, None):
        yield f"=== {heading(row)}"
        if row.duplicate_of is not None:
            yield f"    {row.verdict} of {one_line(row.duplicate_of)}"
        text = folder.raw_text(row) or samples.get(row.id)
        yield from (_gone(row) if text is None else _shortened(visible(text)), "")


def reasons(folder: PreparedFolder) -> Counter[str]:
    """Every reason for which documents or lines were left out, and how often."""
    counts: Counter[str] = Counter()
    for summary in folder.summaries():
        for table in summary.values():
            counts.update(table["dropped"])
            counts.update(table["bad"])
            counts[EXACT_DUPLICATE] += table["exact_duplicates"]["documents"]
            counts[NEAR_DUPLICATE] += table["near_duplicates"]["documents"]
    return Counter({reason: count for reason, count in counts.items() if count})


def parse_id(name: str) -> tuple[str, int | None, int | None]:
    """Path, place and line of PATH#PLACE, PATH:LINE or PATH."""
    for mark in ("#", ":"):
        path, _, number = name.rpartition(mark)
        if path and number.isascii() and number.isdecimal():
            return (path, int(number), None) if mark == "#" else (path, None, int(number))
    return name, None, None


def _fate_of_row(folder: PreparedFolder, row: Row) -> Iterator[str]:
    yield f"=== {heading(row)}"
    if row.is_kept:
        yield f"    kept, {places(folder, row)}"
        yield visible(folder.text(row))
        return
    if row.duplicate_of is None:
        yield f"    left out by the filter {row.verdict}"
    else:
        yield f"    left out as {row.verdict} of {one_line(row.duplicate_of)}"
    text = folder.raw_text(row)
    yield _gone(row) if text is None else visible(text)
    if row.duplicate_of is None:
        return
    original = folder.original(row)
    if original is None:
        elsewhere = f"is not in {folder.folder}, but in a data folder that dedup.against names"
        yield f"=== {one_line(row.duplicate_of)} {elsewhere}"
    else:
        yield from _fate_of_row(folder, original)


def _bad_line(bad: BadLineRecord) -> Iterator[str]:
    yield f"=== {one_line(bad.path)}:{bad.line} (generation {bad.generation})"
    yield f"    bad line, {bad.reason}; it begins:"
    yield visible(bad.head.decode("utf-8", "backslashreplace"))


def _samples(folder: PreparedFolder, reason: str) -> dict[str, str]:
    """Beginnings of documents that were left out, by id, as the preparation noted them."""
    tables = [table for summary in folder.summaries() for table in summary.values()]
    return {item["id"]: item["text"] for table in tables for item in table["samples"].get(reason, ())}


def _shortened(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} ... ({len(text):,} characters)"


def _gone(row: Row) -> str:
    return f"    (the text is not to be had: {one_line(row.path)} is gone, or has changed)"

"""Units count lines from their own start; every line is a document or bad, so those of files follow from the counts."""

from collections import Counter
from collections.abc import Sequence

from data_prep.reduce import FinishedUnit


def first_lines(units: Sequence[FinishedUnit]) -> list[int]:
    """For each unit, in the order of the input, how many lines of its file come before it."""
    lines_before: Counter[str] = Counter()
    found: list[int] = []
    for unit in units:
        if unit.unit.kind == "texts":
            found.append(0)  # whole files
            continue
        (path,) = unit.unit.paths
        found.append(lines_before[path])
        lines_before[path] += unit.summary.num_lines
    return found

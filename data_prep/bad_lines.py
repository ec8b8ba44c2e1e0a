"""Bad lines are left out and told; too many of them stop a preparation, as they mean that the input is misread."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from data_prep import unit_step
from data_prep.line_numbers import first_lines
from data_prep.reading.documents import BadLine, InputError, Unit, read_unit
from data_prep.reduce import FinishedUnit
from data_prep.summary import in_order

NUM_EXAMPLES, NUM_REASONS = 3, 5
HARMLESS = ("blank line", "empty text", "empty file")
"""Listed like the others, but no sign that the input is misread: every package of Python has an empty file."""
ENOUGH_LINES = 10_000
"""Of a source, to judge it before all of it has been read."""


class Watch:
    """Judges sources while their units come in."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self._units: dict[str, list[FinishedUnit]] = {}
        self._num_lines: Counter[str] = Counter()
        self._num_bad: Counter[str] = Counter()

    def add(self, unit: FinishedUnit) -> None:
        """Takes a unit into account.

        Raises:
            InputError: of a source that has shown enough lines, too many are bad.
        """
        source = unit.source
        self._units.setdefault(source, []).append(unit)
        self._num_lines[source] += unit.summary.num_lines
        self._num_bad[source] += _num_bad(unit)
        num_lines = self._num_lines[source]
        if num_lines >= ENOUGH_LINES and self._num_bad[source] > self._max_bad_fraction * num_lines:
            check(self._units[source], self._max_bad_fraction)


def check(units: Sequence[FinishedUnit], max_bad_fraction: float) -> None:
    """Refuse a source with too many bad lines.

    Raises:
        InputError: with the commonest reasons, and examples.
    """
    for source in dict.fromkeys(unit.source for unit in units):
        own = [unit for unit in units if unit.source == source]
        num_bad, num_lines = sum(map(_num_bad, own)), sum(unit.summary.num_lines for unit in own)
        if num_bad > max_bad_fraction * num_lines:
            raise InputError(
                f"{source}: {num_bad:,} of {num_lines:,} lines are bad ({num_bad / num_lines:.1%}), above "
                f"engine.max_bad_fraction = {max_bad_fraction:g}. Mend the input, or raise the limit to leave them out:"
                + by_reason(own)
            )


def check_documents(units: Sequence[FinishedUnit]) -> None:
    """Refuse an input that gives no document.

    Raises:
        InputError: with the commonest reasons, and examples.
    """
    if not any(unit.summary.num_documents for unit in units):
        dropped = sum(sum(unit.summary.dropped.values()) for unit in units)
        filters = f"; the filters dropped {dropped:,}" if dropped else ""
        raise InputError(f"the input has no documents; nothing was written{filters}{by_reason(units)}")


def of_beginning(units: Iterable[tuple[object, Unit]]) -> str:
    """Why the first lines of an input give no documents, a line per reason."""
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    found = ((item, unit) for _, unit in units for item in read_unit(unit))
    for item, unit in itertools.islice(found, ENOUGH_LINES):
        reason = item.reason if isinstance(item, BadLine) else "dropped by a filter"
        reasons[reason] += 1
        examples.setdefault(reason, f"{unit.paths[item.file]}#{item.place}")
    lines = [f"\n  {count:,} x {reason}, e.g. {examples[reason]}" for reason, count in reasons.most_common(NUM_REASONS)]
    return f"; of its first {reasons.total():,} lines:{''.join(lines)}" if lines else ""


def by_reason(units: Sequence[FinishedUnit]) -> str:
    """One line per reason, the commonest first; empty if there are no bad lines."""
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for unit, before in zip(units, first_lines(units), strict=True):
        if not unit.summary.bad:
            continue
        for reason, count in unit.summary.bad.items():
            counts[reason] = counts.get(reason, 0) + count
        for item in in_order(unit.folder / unit_step.BAD_LINES_FILE):
            found = examples.setdefault(item["reason"], [])
            if len(found) < NUM_EXAMPLES:
                found.append(f"{unit.unit.paths[item['file']]}:{item['line'] + before}")
    commonest = sorted(counts, key=lambda reason: (-counts[reason], reason))[:NUM_REASONS]
    return "".join(f"\n  {counts[reason]:,} x {reason}, e.g. {', '.join(examples[reason])}" for reason in commonest)


def _num_bad(unit: FinishedUnit) -> int:
    return sum(count for reason, count in unit.summary.bad.items() if reason not in HARMLESS)

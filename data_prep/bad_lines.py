"""Bad lines are left out and told; too many of them stop a preparation, as they mean that the input is misread."""

from collections.abc import Sequence

from data_prep import unit_step
from data_prep.line_numbers import first_lines
from data_prep.reading.documents import InputError
from data_prep.reduce import FinishedUnit
from data_prep.summary import read_lines

NUM_EXAMPLES, NUM_REASONS = 3, 5


def check(units: Sequence[FinishedUnit], max_bad_fraction: float) -> None:
    """Refuse a source with too many bad lines, or an input with nothing else.

    Raises:
        InputError: with the commonest reasons, and examples.
    """
    for source in dict.fromkeys(unit.source for unit in units):
        own = [unit for unit in units if unit.source == source]
        num_bad = sum(sum(unit.summary.bad.values()) for unit in own)
        num_lines = sum(unit.summary.num_lines for unit in own)
        if num_bad > max_bad_fraction * num_lines:
            raise InputError(
                f"{source}: {num_bad:,} of {num_lines:,} lines are bad ({num_bad / num_lines:.1%}), above "
                f"engine.max_bad_fraction = {max_bad_fraction:g}. Mend the input, or raise the limit to leave them out:"
                + by_reason(own)
            )
    if not any(unit.summary.num_documents for unit in units):
        dropped = sum(sum(unit.summary.dropped.values()) for unit in units)
        filters = f"; the filters dropped {dropped:,}" if dropped else ""
        raise InputError(f"the input has no documents; nothing was written{filters}{by_reason(units)}")


def by_reason(units: Sequence[FinishedUnit]) -> str:
    """One line per reason, the commonest first; empty if there are no bad lines."""
    counts: dict[str, int] = {}
    examples: dict[str, list[str]] = {}
    for unit, before in zip(units, first_lines(units), strict=True):
        if not unit.summary.bad:
            continue
        for reason, count in unit.summary.bad.items():
            counts[reason] = counts.get(reason, 0) + count
        for item in read_lines(unit.folder / unit_step.BAD_LINES_FILE):
            found = examples.setdefault(item["reason"], [])
            if len(found) < NUM_EXAMPLES:
                found.append(f"{unit.unit.paths[item['file']]}:{item['line'] + before}")
    commonest = sorted(counts, key=lambda reason: (-counts[reason], reason))[:NUM_REASONS]
    return "".join(f"\n  {counts[reason]:,} x {reason}, e.g. {', '.join(examples[reason])}" for reason in commonest)

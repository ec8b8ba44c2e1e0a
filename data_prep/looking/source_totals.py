"""The counts of a source over all generations of a data folder, from their summaries (`summary`)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_COUNTS = ("files", "input_bytes", "read_bytes", "documents", "text_bytes", "tokens")
_COUNTERS = ("dropped", "bad", "masked", "languages")


@dataclass(slots=True)
class SourceTotals:
    """What was read of a source, and what became of it."""

    files: int = 0
    input_bytes: int = 0
    read_bytes: int = 0
    documents: int = 0
    """Kept, in both splits; also text_bytes and tokens."""
    text_bytes: int = 0
    tokens: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    masked: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Kept documents by the power of two that their bytes reach."""
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bad_lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    licence: str = ""

    @property
    def lines(self) -> int:
        """Lines, rows or files that were read."""
        left_out = self.dropped.total() + self.bad.total() + self.exact_duplicates + self.near_duplicates
        return self.documents + left_out

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for."""
        return self.text_bytes / max(self.tokens, 1)

    def add(self, table: Mapping[str, Any]) -> None:
        """Adds what one generation says of the source."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + table[name])
        for name in _COUNTERS:
            getattr(self, name).update(table[name])
        self.exact_duplicates += table["exact_duplicates"]["documents"]
        self.near_duplicates += table["near_duplicates"]["documents"]
        self.lengths.update(dict(table["length_histogram"]))
        for name in ("samples", "bad_lines"):
            for reason, items in table[name].items():
                getattr(self, name).setdefault(reason, []).extend(items)
        self.licence = table["licence"] or self.licence


def by_source(summaries: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, SourceTotals]:
    """The totals of each source, in the order in which the generations name them."""
    found: dict[str, SourceTotals] = {}
    for summary in summaries:
        for name, table in summary.items():
            found.setdefault(name, SourceTotals()).add(table)
    return found


def whole(sources: Mapping[str, SourceTotals]) -> SourceTotals:
    """The sum over sources, without their samples."""
    total = SourceTotals()
    for source in sources.values():
        for name in (*_COUNTS, "exact_duplicates", "near_duplicates"):
            setattr(total, name, getattr(total, name) + getattr(source, name))
        for name in (*_COUNTERS, "lengths"):
            getattr(total, name).update(getattr(source, name))
    return total


def ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Names with their counts, the largest first; equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))

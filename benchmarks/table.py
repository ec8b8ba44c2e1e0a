"""Tables of measurements: printed for a reader, kept as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Table:
    """Named columns and rows of text and numbers; None is "not measured"."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""

    def records(self) -> list[dict[str, Any]]:
        """The rows as JSON objects."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def print(self) -> None:
        """Prints the table, numbers to the right."""
        texts = [[_text(value) for value in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.columns, *texts, strict=True)]
        print(f"\n{self.title}")
        print(
            "  ".join(
                name.ljust(w) if i == 0 else name.rjust(w) for i, (name, w) in enumerate(zip(self.columns, widths))
            )
        )
        for row, values in zip(texts, self.rows, strict=True):
            print("  ".join(t.ljust(w) if isinstance(v, str) else t.rjust(w) for t, v, w in zip(row, values, widths)))
        if self.note:
            print(self.note)


def _text(value: str | float | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"

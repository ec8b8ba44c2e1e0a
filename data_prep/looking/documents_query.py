"""Asks the table of all documents of a generation (`documents_table`), group by group, however long it is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.documents_table import KEPT

Bounds = Mapping[str, tuple[Any, Any]]
"""Lowest and highest value of columns that can matter: groups that have only others are not read."""


class DocumentsError(ValueError):
    """The table of documents cannot be read; the message names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What the table says of a document."""

    path: str
    line: int
    place: int
    source: str
    language: str | None
    verdict: str
    duplicate_of: str | None
    split: str | None
    start: int | None
    num_tokens: int | None
    text_bytes: int | None
    generation: int
    """Number of the generation whose table it is."""

    @property
    def id(self) -> str:
        """What stands for the document everywhere."""
        return f"{self.path}#{self.place}"

    @property
    def extent(self) -> tuple[int, int]:
        """The places of its stream that a kept document takes, first to stop, its EOS included."""
        assert self.start is not None
        assert self.num_tokens is not None
        return self.start, self.start + self.num_tokens

    @property
    def is_kept(self) -> bool:
        """Whether it is in a shard."""
        return self.verdict == KEPT


_COLUMNS = [field.name for field in fields(Row) if field.name != "generation"]


class DocumentsQuery:
    """The table of one generation, for questions."""

    def __init__(self, path: Path, generation: int) -> None:
        self._path, self._generation = path, generation

    def select(self, where: Any, columns: Sequence[str], bounds: Bounds | None = None) -> Iterator[Row]:
        """The documents that fit, in the order of the table, read as far as they are asked for.

        where: an expression of `pyarrow.compute`; columns: those it speaks of.
        """
        with self._opened() as file:
            for index in self._groups(file, bounds or {}):
                if file.read_row_group(index, columns=list(columns)).filter(where).num_rows:
                    yield from self._rows(file.read_row_group(index, columns=_COLUMNS).filter(where))

    def count(self, where: Any, columns: Sequence[str]) -> int:
        """How many documents fit."""
        return sum(table.filter(where).num_rows for table in self.tables(columns))

    def pick(self, where: Any, columns: Sequence[str], ranks: Sequence[int]) -> list[Row]:
        """Some of the documents that fit, by their ranks among them, in the order of the table.

        Cost: reads `columns` of the table up to the last rank, and all columns of the groups that hold what is picked.
        """
        found: list[Row] = []
        before = 0
        with self._opened() as file:
            for index in range(file.num_row_groups if ranks else 0):
                count = file.read_row_group(index, columns=list(columns)).filter(where).num_rows
                own = sorted(rank - before for rank in ranks if before <= rank < before + count)
                if own:
                    found += self._rows(file.read_row_group(index, columns=_COLUMNS).filter(where).take(own))
                before += count
                if before > max(ranks):
                    break
        return found

    def tables(self, columns: Sequence[str], bounds: Bounds | None = None) -> Iterator[Any]:
        """Columns of all documents, a pyarrow table for each group of them."""
        with self._opened() as file:
            for index in self._groups(file, bounds or {}):
                yield file.read_row_group(index, columns=list(columns))

    def longest(self) -> int:
        """No document has more tokens."""
        with self._opened() as file:
            ends = [_statistics(file, index).get("num_tokens") for index in range(file.num_row_groups)]
        return max((end[1] for end in ends if end is not None), default=0)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq  # here, not above: 0.25 s for commands that ask nothing of a table

        try:
            with pq.ParquetFile(self._path) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise DocumentsError(
                f"{self._path}: not readable ({error}); restore it, or prepare the data anew"
            ) from error

    def _groups(self, file: Any, bounds: Bounds) -> Iterator[int]:
        for index in range(file.num_row_groups):
            known = _statistics(file, index) if bounds else {}
            ends = ((known[name], bound) for name, bound in bounds.items() if name in known)
            if all(low <= bound[1] and high >= bound[0] for (low, high), bound in ends):
                yield index

    def _rows(self, table: Any) -> Iterator[Row]:
        for values in table.to_pylist():
            yield Row(**values, generation=self._generation)


def _statistics(file: Any, index: int) -> dict[str, tuple[Any, Any]]:
    """Lowest and highest value of the columns of a group, of those that have any."""
    group = file.metadata.row_group(index)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {
        column.path_in_schema: (column.statistics.min, column.statistics.max)
        for column in columns
        if column.statistics is not None and column.statistics.has_min_max
    }

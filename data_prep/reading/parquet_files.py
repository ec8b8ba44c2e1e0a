"""Rows of parquet files as documents, one row group at a time."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from data_prep.reading import storage
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import is_url
from data_prep.reading.records import BadLine, Document, Unit, bad_line

ROWS_AT_ONCE = 256
GROUP_STEP = 2**32
"""What one row group adds to the place of a document."""
UNREADABLE = "unreadable parquet file"


class UnreadableError(ValueError):
    """A file is no parquet file, or damaged where it tells of itself."""


def row_groups(path: str) -> tuple[list[int], list[str]]:
    """How many rows each row group of the file has, and the names of its columns.

    Raises:
        UnreadableError: it is no readable parquet file.
    """
    import pyarrow as pa

    try:
        with _open(path) as file:
            groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            return groups, file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        _raise_unless_content(error)
        raise UnreadableError(f"{path}: {UNREADABLE} ({error})") from error


def read_rows(unit: Unit) -> Iterator[Document | BadLine]:
    """Each row of the unit's row group is a document; an unreadable file is one bad line."""
    base = unit.start * GROUP_STEP
    try:
        found_rows = _rows_of_unit(unit)
    except UnreadableError:
        yield BadLine(0, 1, base, UNREADABLE)
        return
    extract = unit.layout.extractor()
    for index, row in enumerate(found_rows):
        try:
            if isinstance(row, BadRecordError):
                raise row
            text, turns = extract(row)
        except BadRecordError as error:
            yield bad_line(error, 0, index + 1, base + index)
        else:
            yield Document(text, 0, base + index, index + 1, turns)


def _rows_of_unit(unit: Unit) -> Iterable[dict[str, Any] | BadRecordError]:
    groups, columns = row_groups(unit.paths[0])
    try:
        return rows(unit.paths[0], unit.start, unit.layout.columns(columns))
    except BadRecordError as error:
        return itertools.repeat(error, groups[unit.start])


def rows(path: str, group: int, columns: list[str]) -> Iterator[dict[str, Any] | BadRecordError]:
    """These columns of the rows of a row group; in place of each row that cannot be read the reason."""
    import pyarrow as pa

    num_rows = num_read = 0
    reason = "unreadable row group"
    try:
        with _open(path) as file:
            num_rows = file.metadata.row_group(group).num_rows
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                yield from _rows_of_batch(batch)
                num_read += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        _raise_unless_content(error)
        reason = f"{reason} ({type(error).__name__})"
    # Those too that cannot be read are counted, so that the rows of later groups keep their numbers.
    yield from itertools.repeat(BadRecordError(reason), num_rows - num_read)


def _rows_of_batch(batch: Any) -> Iterable[dict[str, Any] | BadRecordError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, KeyError):
        return [_row(batch, index) for index in range(batch.num_rows)]


def _row(batch: Any, index: int) -> dict[str, Any] | BadRecordError:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecordError("invalid UTF-8")
    except (ValueError, OverflowError, KeyError):  # times beyond the years 1 to 9999, to the nanosecond, of no zone
        return BadRecordError("a value that cannot be read")


def _open(path: str) -> Any:
    import pyarrow.parquet as pq  # here, not above: 0.25 s for every worker, needed only for parquet

    source: str | BinaryIO = storage.open_range(path) if is_url(path) else path
    return pq.ParquetFile(source)


def _raise_unless_content(error: Exception) -> None:
    """Arrow reports damaged content as a bare OSError; a disk or a network that fails says more than that."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error

"""Rows of parquet files as documents, one row group at a time."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from data_prep.reading import storage
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import is_url
from data_prep.reading.records import BadLine, Document, Unit, bad_line
from data_prep.reading.storage import InputError

ROWS_AT_ONCE = 256
GROUP_STEP = 2**32
"""What one row group adds to the place of a document."""


def row_groups(path: str) -> tuple[int, list[str]]:
    """How many row groups the file has, and the names of its columns.

    Raises:
        InputError: it is no readable parquet file.
    """
    import pyarrow as pa

    try:
        with _open(path) as file:
            return file.num_row_groups, file.schema_arrow.names
    except (pa.ArrowException, OSError) as error:
        _raise_unless_content(error)
        raise InputError(f"{path}: not a readable parquet file ({error}); repair it or leave it out") from error


def read_rows(unit: Unit) -> Iterator[Document | BadLine]:
    """Each row of the unit's row group is a document."""
    extract, base = unit.layout.extractor(), unit.start * GROUP_STEP
    columns = unit.layout.columns(row_groups(unit.paths[0])[1])
    for index, row in enumerate(rows(unit.paths[0], unit.start, columns)):
        try:
            if isinstance(row, BadRecordError):
                raise row
            text, turns = extract(row)
        except BadRecordError as error:
            yield bad_line(error, 0, index + 1, base + index)
        else:
            yield Document(text, 0, base + index, index + 1, turns)


def rows(path: str, group: int, columns: list[str] | None = None) -> Iterator[dict[str, Any] | BadRecordError]:
    """The rows of a row group; in place of a row that cannot be read, and of all that follow a damage, the reason."""
    import pyarrow as pa

    try:
        with _open(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                try:
                    yield from batch.to_pylist()
                except UnicodeDecodeError:
                    yield from (_row(batch, index) for index in range(batch.num_rows))
    except (pa.ArrowException, OSError) as error:
        _raise_unless_content(error)
        yield BadRecordError(f"unreadable row group ({type(error).__name__})")


def _row(batch: Any, index: int) -> dict[str, Any] | BadRecordError:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return BadRecordError("invalid UTF-8")


def _open(path: str) -> Any:
    import pyarrow.parquet as pq  # here, not above: 0.25 s for every worker, needed only for parquet

    source: str | BinaryIO = storage.open_range(path) if is_url(path) else path
    return pq.ParquetFile(source)


def _raise_unless_content(error: Exception) -> None:
    """Arrow reports damaged content as a bare OSError; a disk or a network that fails says more than that."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error

"""The table of all documents of a generation: where each came from, and what became of it. `documents.parquet`.

path, line, place   where it was read; `path#place` is its id (place: byte offset, row or index; see documents)
source, language    as the preparation knew them
verdict             "kept", "exact duplicate", "near duplicate", or the name of the filter that refused it
duplicate_of        id of the older document that it repeats
split, start        the stream that holds it, and the place of its first token there, counted without the leading EOS
num_tokens          its EOS included; text_bytes: after cleaning
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KEPT, EXACT_DUPLICATE, NEAR_DUPLICATE = "kept", "exact duplicate", "near duplicate"
GROUP_ROWS = 100_000


class DocumentsWriter:
    """Writes the table; close it, or use it as a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = pa.dictionary(pa.int32(), pa.string())
        fields = {"path": names, "line": pa.int64(), "place": pa.uint64(), "source": names, "language": names}
        fields |= {"verdict": names, "duplicate_of": pa.string(), "split": names, "start": pa.int64()}
        fields |= {"num_tokens": pa.int32(), "text_bytes": pa.int32()}
        self._schema = pa.schema(list(fields.items()))
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[Any] = []
        self._num_waiting = 0

    def add(self, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Appends rows; None stands for what does not apply to a document."""
        import pyarrow as pa

        arrays = [pa.array(columns[field.name], type=_plain(field.type)).cast(field.type) for field in self._schema]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        self._num_waiting += self._waiting[-1].num_rows
        if self._num_waiting >= GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        """Writes what is left, and the end of the file."""
        self._flush()
        self._writer.close()

    def __enter__(self) -> "DocumentsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).unify_dictionaries())
            self._waiting, self._num_waiting = [], 0


def _plain(kind: Any) -> Any:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def kept_ids(path: Path, rows: np.ndarray) -> list[str]:
    """Ids of some of the kept documents of a table, given by ascending numbers: those of the generation's sketches."""
    import pyarrow.parquet as pq

    found: list[str] = []
    first = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["path", "place", "verdict"]):
            kept = np.flatnonzero(np.array(batch["verdict"].cast("string").to_pylist()) == KEPT)
            here = kept[rows[(rows >= first) & (rows < first + kept.size)] - first]
            taken = batch.take(here)
            pairs = zip(taken["path"].to_pylist(), taken["place"].to_pylist(), strict=True)
            found += [f"{name}#{place}" for name, place in pairs]
            first += kept.size
    return found

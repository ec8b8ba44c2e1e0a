"""Shards of packed rows: documents are collected until they fill a shard, and packed among themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep import publish
from data_prep.chat.chat_folder import ChatFolder
from data_prep.chat.packing import Document, Rows, pack_rows
from data_prep.chat.row_marks import write_marks
from data_prep.checksums import write_checksums
from data_prep.manifest import ShardRecord, record_shard
from data_prep.shards import token_dtype, write_shard
from data_prep.tokenizing.tokenizer import Tokenizer


@dataclass(slots=True)
class RowShards:
    """The shards of one split that a preparation adds."""

    folder: Path
    """The data folder that is being made."""
    split: str
    source: str
    first_number: int
    """Of the first shard: how many the split has of this source already."""
    chat: ChatFolder
    tokenizer: Tokenizer
    shard_tokens: int
    records: list[ShardRecord] = field(default_factory=list)
    num_units: int = 0
    num_tokens: int = 0
    """Of documents, padding left out."""
    num_trained: int = 0
    _units: list[Sequence[Document]] = field(default_factory=list)
    _lines: list[str] = field(default_factory=list)
    _num_waiting: int = 0
    """Tokens of the units that are not yet in a shard."""

    @property
    def num_rows(self) -> int:
        """Rows of all shards."""
        return sum(record.sample_count for record in self.records)

    @property
    def num_waiting_units(self) -> int:
        """Units that are not yet in a shard."""
        return len(self._units)

    def add(self, unit: Sequence[Document], line: str) -> None:
        """Take up a unit, and what of the input file belongs to it; a full shard is written."""
        num_tokens = sum(len(document.tokens) for document in unit)
        self._units.append(unit)
        self._lines.append(line)
        self.num_units += 1
        self.num_tokens += num_tokens
        self.num_trained += sum(int(document.is_trained.sum()) for document in unit)
        self._num_waiting += self.chat.row_tokens if self._has_lines else num_tokens
        if self._num_waiting >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the units that wait as a shard."""
        if not self._units:
            return
        rows = pack_rows(self._units, self.chat.row_tokens, self.tokenizer.eos_id, kind=self.chat.kind)
        path = self.folder / self.split / f"{self.source}-{self.first_number + len(self.records):05d}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records.append(self._write(path, rows))
        if self._has_lines:
            lines = "".join(f"{self._lines[unit]}\n" for unit in rows.first_unit)
            publish.write_text(path.with_suffix(".jsonl"), lines)
        self._units, self._lines, self._num_waiting = [], [], 0

    @property
    def _has_lines(self) -> bool:
        return self.chat.kind == "prompts"

    def _write(self, path: Path, rows: Rows) -> ShardRecord:
        row_tokens, tokenizer = self.chat.row_tokens, self.tokenizer
        dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        blocks = (np.array([tokenizer.eos_id], dtype), rows.tokens.reshape(-1).astype(dtype))
        options = {"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest}
        header = write_shard(path, blocks, eos_id=tokenizer.eos_id, **options)
        write_checksums(path, row_tokens)
        # A row's first input is the last token of the row before it; its own tokens are one place further on.
        starts = np.concatenate([[False], rows.is_first.reshape(-1)])[:-1]
        starts[::row_tokens] = True
        write_marks(path, rows.is_trained.reshape(-1), starts)
        return record_shard(self.folder, path, header, source=self.source, sample_tokens=row_tokens)

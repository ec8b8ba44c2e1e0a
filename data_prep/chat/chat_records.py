"""The records of JSON Lines, JSON and parquet files, each with its line; a bad one costs only itself."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.reading import corpus, head, parquet_files, storage, streams
from data_prep.reading.corpus import InputFile
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.file_kinds import compression, file_kind
from data_prep.reading.records import parse_object
from data_prep.reading.storage import InputError

KINDS = ("jsonl", "json", "parquet")
HARMLESS = ("blank line",)
"""Counted like the others, but no sign that the input is misread."""
NUM_EXAMPLES, NUM_REASONS, ENOUGH_LINES = 3, 5, 10_000


class Record(NamedTuple):
    """An object of a file; in place of a bad one the reason."""

    line: int
    """Line, element or row, from 1."""
    value: dict[str, Any] | BadRecordError


def find_files(inputs: Sequence[str]) -> list[InputFile]:
    """The files that are named, or that patterns match, or that lie in folders; sorted within each.

    Raises:
        InputError: there is none, or one of a kind that holds no records.
    """
    patterns = list[str]()
    for name in inputs:
        folder = Path(name).expanduser()
        inside = [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and file_kind(str(path)) in KINDS]
        if folder.is_dir() and not inside:
            raise InputError(f"{name}: the folder holds no .jsonl, .json or .parquet file; name one that does")
        patterns += inside or [name]
    found = corpus.find_inputs(patterns)
    for file in found:
        if file_kind(file.path) not in KINDS:
            raise InputError(f"{file.path}: not a file of records; expected .jsonl, .json (also .gz, .zst) or .parquet")
    return found


def read_records(file: InputFile) -> Iterator[Record]:
    """Every record of a file, in order.

    Raises:
        OSError, InputError: the file cannot be read.
    """
    if file_kind(file.path) == "parquet":
        yield from _rows(file.path)
        return
    line = 0
    try:
        for line, (content, is_cut) in enumerate(_texts(file.path), start=1):
            try:
                if is_cut:
                    raise BadRecordError(streams.LINE_TOO_LONG)
                yield Record(line, parse_object(content, "utf-8"))
            except BadRecordError as error:
                yield Record(line, error)
    except streams.StreamError as error:
        yield Record(line + 1, BadRecordError(str(error)))


def _texts(path: str) -> Iterator[tuple[bytes, bool]]:
    kind = "lines" if file_kind(path) == "jsonl" else head.json_kind(path, "utf-8")
    if kind == "array":
        yield from ((element, False) for element in head.array_elements(path, "utf-8"))
    elif kind == "object":
        yield b"".join(head.blocks(path)), False
    elif compression(path):
        yield from ((content, is_cut) for _, content, is_cut in streams.compressed_lines(path))
    else:
        with storage.open_range(path) as opened:
            yield from (
                (content, is_cut) for _, content, is_cut in streams.lines(iter(lambda: opened.read(2**20), b""))
            )


def _rows(path: str) -> Iterator[Record]:
    try:
        rows_of_groups, columns = parquet_files.row_groups(path)
    except parquet_files.UnreadableError:
        yield Record(1, BadRecordError(parquet_files.UNREADABLE))
        return
    rows = (row for group in range(len(rows_of_groups)) for row in parquet_files.rows(path, group, columns))
    yield from (Record(number, row) for number, row in enumerate(rows, start=1))


class BadRecords:
    """Counts what could not be used, by reason, and stops a preparation whose input is misread."""

    def __init__(self, max_bad_fraction: float) -> None:
        self._max_bad_fraction = max_bad_fraction
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._num_read = 0

    def add(self, where: str, reason: str | None) -> None:
        """Takes a record into account; `reason` is None for a good one.

        Raises:
            InputError: enough has been read, and too much of it is bad.
        """
        self._num_read += 1
        if reason is not None:
            self.counts[reason] += 1
            examples = self._examples.setdefault(reason, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append(where)
        if self._num_read % ENOUGH_LINES == 0:
            self.check()

    def check(self) -> None:
        """Refuse an input of which too much is bad.

        Raises:
            InputError: with the commonest reasons, and examples.
        """
        num_bad = sum(count for reason, count in self.counts.items() if reason not in HARMLESS)
        if num_bad > self._max_bad_fraction * self._num_read:
            raise InputError(
                f"{num_bad:,} of {self._num_read:,} records are bad ({num_bad / self._num_read:.1%}), above "
                f"--max-bad-fraction {self._max_bad_fraction:g}. Mend the input, or raise the limit to leave them out:"
                + self.by_reason()
            )

    def by_reason(self) -> str:
        """One line per reason, the commonest first; empty if nothing was bad."""
        commonest = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))[:NUM_REASONS]
        lines = [f"\n  {self.counts[r]:,} x {r}, e.g. {', '.join(self._examples[r])}" for r in commonest]
        return "".join(lines)

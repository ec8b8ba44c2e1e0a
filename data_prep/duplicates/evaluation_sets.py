"""The items of evaluation sets: their questions, answers and passages, out of files of the usual kinds."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.config_file import ConfigError
from data_prep.reading import storage
from data_prep.reading.file_kinds import COMPRESSIONS, LINE_SUFFIXES, compression, content_suffix, is_url
from data_prep.reading.storage import InputError
from data_prep.reading.streams import StreamError, decompressed

TEXT_SUFFIXES = (".txt", ".md")
TABLE_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (".json", *LINE_SUFFIXES, ".parquet", *TABLE_SUFFIXES, *TEXT_SUFFIXES)
_KINDS = f"{' '.join(SUFFIXES)}, all but .parquet also with {' or '.join(COMPRESSIONS)} behind"
_SPACE = re.compile(r"\s*")


def find_files(pattern: str) -> list[str]:
    """The files of an evaluation set, sorted.

    Raises:
        ConfigError: nothing matches, or a file is of another kind than SUFFIXES; a URL that cannot be reached.
    """
    try:
        found = [path for path, _ in storage.find(pattern)]
    except (InputError, OSError) as error:
        raise ConfigError(f"decontaminate.paths: {error}") from error
    if not found and not is_url(pattern) and Path(pattern).expanduser().is_dir():
        example = f"{pattern.rstrip('/')}/**/*.jsonl"
        raise ConfigError(f"decontaminate.paths: {pattern}: a folder; name its files with a pattern such as {example}")
    if not found:
        raise ConfigError(f"decontaminate.paths: {pattern}: no file matches")
    for path in found:
        if content_suffix(path) not in SUFFIXES or (compression(path) and content_suffix(path) == ".parquet"):
            raise ConfigError(f"decontaminate.paths: {path}: unknown kind of file; known are {_KINDS}")
    return found


def items(path: str) -> Iterator[str]:
    """Every string of the records of .json, .jsonl and .parquet, every cell of a table, every line of other files.

    Raises:
        ConfigError: the file cannot be read, or is not what its name says.
    """
    suffix = content_suffix(path)
    if suffix == ".parquet":
        return _parquet_strings(path)
    text = _text(path)
    if suffix in TABLE_SUFFIXES:
        return _cells(path, text, "\t" if suffix == ".tsv" else ",")
    if suffix == ".json":
        return _values(path, text)
    lines = text.split("\n")
    return _records(path, lines) if suffix in LINE_SUFFIXES else iter(lines)


def _text(path: str) -> str:
    try:
        if compression(path):
            raw = b"".join(decompressed(path))
        else:
            with storage.open_range(path) as file:
                raw = file.read()
        return raw.decode("utf-8-sig")
    except (OSError, StreamError, InputError, UnicodeDecodeError) as error:
        raise ConfigError(f"decontaminate.paths: {path}: cannot be read as UTF-8 text ({error})") from error


def _records(path: str, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield from _strings(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, error) from error


def _values(path: str, text: str) -> Iterator[str]:
    """The strings of a JSON value, or of several one behind the other."""
    decoder, place = json.JSONDecoder(), 0
    while (place := _after_space(text, place)) < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
            yield from _strings(value)
        except (ValueError, RecursionError) as error:
            number = error.lineno if isinstance(error, json.JSONDecodeError) else text.count("\n", 0, place) + 1
            raise _not_json(path, number, error) from error


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None  # no space at all is a match
    return found.end()


def _not_json(path: str, number: int, error: Exception) -> ConfigError:
    return ConfigError(f"decontaminate.paths: {path}:{number}: not JSON ({error}); mend the line")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _cells(path: str, text: str, delimiter: str) -> Iterator[str]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in rows:
            yield from row
    except csv.Error as error:
        raise ConfigError(f"decontaminate.paths: {path}:{rows.line_num}: not a table ({error})") from error


def _parquet_strings(path: str) -> Iterator[str]:
    """The strings of every column that holds any, however deep."""
    import pyarrow as pa  # here, not above: 0.25 s that sets of other kinds need not wait for
    import pyarrow.parquet as pq

    try:
        with storage.open_range(path) as raw, pq.ParquetFile(raw) as file:
            columns = [field.name for field in file.schema_arrow if _holds_strings(field.type)]
            for batch in file.iter_batches(columns=columns):
                for column in batch.columns:
                    yield from _strings(column.to_pylist())
    except (pa.ArrowException, InputError, OSError) as error:
        raise ConfigError(f"decontaminate.paths: {path}: cannot be read as parquet ({error})") from error


def _holds_strings(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _holds_strings(kind.value_type)
    if kind.num_fields:
        return any(_holds_strings(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

"""A document read again from its raw file, as it was before cleaning, and the shell command that shows it."""

import dataclasses
import shlex
from pathlib import Path

from data_prep.reading.corpus import InputFile
from data_prep.reading.documents import plan_units, read_unit
from data_prep.reading.file_kinds import compression, file_kind, is_url
from data_prep.reading.parquet_files import GROUP_STEP
from data_prep.reading.records import Document, Unit
from data_prep.reading.storage import InputError
from data_prep.reading.templates import Layout

_SEEK_BYTES = 64 * 1024 * 1024
"""Beyond, a line is found faster by its place than by its number."""
_PRINTERS = {"": "cat", ".gz": "gzip -dc", ".zst": "zstd -dc"}


def read_again(path: str, place: int, layout: Layout, most_bytes: int | None = None) -> str | None:
    """The text of the document at a place of a file; None if the file is gone or holds no document there any more.

    most_bytes: None, too, if more of the file than that has to be read.
    """
    try:
        for unit in _units(path, place, layout):
            if most_bytes is not None and _reading_bytes(unit, place) > most_bytes:
                return None
            for item in read_unit(unit):
                if item.place == place:
                    return item.text if isinstance(item, Document) else None
                if item.place > place:
                    return None
    except (OSError, InputError):
        return None
    return None


def show_command(path: str, line: int, place: int) -> str | None:
    """The shell command that prints the raw line or file of a document; None if a shell alone cannot."""
    kind, name = file_kind(path), shlex.quote(path)
    if is_url(path) or kind not in ("jsonl", "text"):
        return None
    printer = f"{_PRINTERS[compression(path)]} {name}"
    if kind == "text":  # the file, or the rest of it from the document on
        return printer if place == 0 else f"{printer} | tail -c +{place + 1} | head"
    if compression(path):
        return f"{printer} | sed -n {line}p"
    return f"sed -n {line}p {name}" if place < _SEEK_BYTES else f"tail -c +{place + 1} {name} | head -n 1"


def _units(path: str, place: int, layout: Layout) -> list[Unit]:
    """The unit of a file that holds a place, cut down to it where a unit is a range of bytes."""
    size_bytes = 1 if is_url(path) else Path(path).stat().st_size
    units = plan_units([InputFile(path, path, size_bytes)], layout)
    if units and units[0].kind == "rows":
        return [unit for unit in units if unit.start == place // GROUP_STEP]
    if compression(path) or not units or units[0].kind not in ("lines", "text-lines"):
        return units
    return [dataclasses.replace(units[0], start=place, stop=place + 1, size_bytes=0)]


def _reading_bytes(unit: Unit, place: int) -> int:
    if unit.kind in ("lines", "text-lines"):
        return place if compression(unit.paths[0]) else 0
    return unit.size_bytes

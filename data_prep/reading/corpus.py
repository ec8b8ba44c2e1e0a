"""Which files make the input: those that the user's patterns match, or the Python sources of this installation."""

import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_prep.reading import storage
from data_prep.reading.file_kinds import KNOWN_SUFFIXES, file_kind, is_url
from data_prep.reading.storage import Found, InputError

MIN_SOURCE_BYTES = 200
"""Shorter Python files are stubs and empty `__init__.py`."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input, with a name that does not depend on where the installation lies."""

    path: str
    """Local path or URL."""
    name: str
    size_bytes: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that the patterns match (`**` crosses folders), in the order of the patterns, sorted within each.

    A file that several patterns match comes once, at its first place.

    Patterns may be URLs: s3://bucket/**/*.parquet.

    Raises:
        InputError: a pattern that matches nothing, a folder, or a file of unknown kind; a URL that cannot be reached.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        for path, size_bytes in _matches(pattern):
            real = path if is_url(path) else str(Path(path).resolve())
            found.setdefault(real, InputFile(path, path, size_bytes))
    return list(found.values())


def installed_python() -> list[InputFile]:
    """Every Python source of the standard library and of the installed packages: a corpus that is always at hand."""
    found: dict[str, InputFile] = {}
    for kind in ("stdlib", "purelib", "platlib"):
        root = Path(sysconfig.get_path(kind)).resolve()
        label = "stdlib" if kind == "stdlib" else "packages"
        # The standard library's folder may hold the packages of another environment.
        passed_over = {"__pycache__", *(("site-packages", "dist-packages") if kind == "stdlib" else ())}
        for entry in _python_files(str(root), passed_over):
            real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if entry.is_file() and (size_bytes := entry.stat().st_size) >= MIN_SOURCE_BYTES and real not in found:
                inside = entry.path[len(str(root)) :].replace(os.sep, "/")
                found[real] = InputFile(entry.path, label + inside, size_bytes)
    return sorted(found.values(), key=lambda file: file.name)


def _python_files(folder: str, passed_over: set[str]) -> Iterator["os.DirEntry[str]"]:
    """The Python files of a folder and of those below it; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name in passed_over:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _python_files(entry.path, passed_over)
            elif entry.name.endswith(".py"):
                yield entry


def choose(files: Sequence[InputFile], max_bytes: int) -> list[InputFile]:
    """At most max_bytes of whole files, picked by the hash of their names for variety, in their old order.

    Raises:
        InputError: not one file is small enough.
    """
    chosen: set[InputFile] = set()
    rest_bytes = max_bytes
    for file in sorted(files, key=lambda file: xxhash.xxh3_64_intdigest(file.name.encode("utf-8", "surrogateescape"))):
        if file.size_bytes <= rest_bytes:
            chosen.add(file)
            rest_bytes -= file.size_bytes
    if not chosen:
        smallest = min(file.size_bytes for file in files)
        raise InputError(
            f"input.max_input_bytes = {max_bytes:,}: files are taken whole, and the smallest has {smallest:,} bytes"
        )
    return [file for file in files if file in chosen]


def total_bytes(files: Iterable[InputFile]) -> int:
    """Size of the input."""
    return sum(file.size_bytes for file in files)


def _matches(pattern: str) -> list[Found]:
    found = storage.find(pattern)
    if not found and not is_url(pattern) and Path(pattern).expanduser().is_dir():
        raise InputError(f"{pattern}: a folder; name its files with a pattern such as {pattern.rstrip('/')}/**/*.jsonl")
    if not found:
        relative = "" if is_url(pattern) else f"; patterns are relative to {Path.cwd()}"
        raise InputError(f"{pattern}: no file matches{relative}")
    for path, _ in found:
        if file_kind(path) is None:
            raise InputError(f"{path}: unknown kind of file; known are {' '.join(KNOWN_SUFFIXES)}")
    return found

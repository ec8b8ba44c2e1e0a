"""Which files make the input: those that the user's patterns match, or the Python sources of this installation."""

import glob
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_prep.documents import KNOWN_SUFFIXES, InputError

MIN_SOURCE_BYTES = 200
"""Shorter Python files are stubs and empty `__init__.py`."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input, with a name that does not depend on where the installation lies."""

    path: Path
    name: str
    size_bytes: int


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that the patterns match (`**` crosses folders), in the order of the patterns, sorted within each.

    A file that several patterns match comes once, at its first place.

    Raises:
        InputError: a pattern that matches nothing, a folder, or a file of unknown kind.
    """
    found: dict[Path, InputFile] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            found.setdefault(path.resolve(), InputFile(path, str(path), path.stat().st_size))
    return list(found.values())


def installed_python() -> list[InputFile]:
    """Every Python source of the standard library and of the installed packages: a corpus that is always at hand."""
    roots = {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    found: dict[Path, InputFile] = {}
    for name, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root).parts
            # The standard library's folder may hold the packages of another environment.
            if "__pycache__" in inside or (name == "stdlib" and {"site-packages", "dist-packages"} & set(inside)):
                continue
            if path.is_file() and (size_bytes := path.stat().st_size) >= MIN_SOURCE_BYTES:
                label = "stdlib" if name == "stdlib" else "packages"
                found.setdefault(path.resolve(), InputFile(path, "/".join((label, *inside)), size_bytes))
    return sorted(found.values(), key=lambda file: file.name)


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


def _glob(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207 - unlike Path.glob it takes absolute patterns


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    # A name with brackets is first taken as it stands, then as a pattern.
    names = [str(expanded)] if expanded.exists() else sorted(_glob(str(expanded)))
    paths = [Path(name) for name in names]
    if paths == [expanded] and expanded.is_dir():
        raise InputError(f"{pattern}: a folder; name its files with a pattern such as {pattern.rstrip('/')}/**/*.jsonl")
    paths = [path for path in paths if not path.is_dir()]
    if not paths:
        raise InputError(f"{pattern}: no file matches; patterns are relative to {Path.cwd()}")
    for path in paths:
        if not path.name.endswith(KNOWN_SUFFIXES):
            raise InputError(f"{path}: unknown kind of file; known are {', '.join(KNOWN_SUFFIXES)}")
    return paths

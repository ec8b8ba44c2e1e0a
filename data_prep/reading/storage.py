"""Files wherever they lie: local ones by plain `open`, those of s3://, gs://, hf://, https:// ... through fsspec."""

import fnmatch
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_prep.fingerprint import HEAD_BYTES, TAIL_BYTES, fingerprint
from data_prep.reading.file_kinds import is_url

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "az": "adlfs",
    "abfs": "adlfs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
    "sftp": "paramiko",
}
_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "checksum", "sha256", "blob_id", "LastModified")


class InputError(ValueError):
    """The input as a whole cannot be used: nothing found, unknown kind, too much of it bad."""


class Found(NamedTuple):
    """A file that a pattern matches."""

    path: str
    size_bytes: int


def open_range(path: str) -> BinaryIO:
    """Open a file for reading from any place in it.

    Raises:
        InputError: a URL whose protocol needs a package that is not installed.
        OSError: the file cannot be read.
    """
    if not is_url(path):
        return Path(path).open("rb")
    with _named_errors(path):
        file_system, inside = _file_system(path)
        return file_system.open(inside, "rb")


def find(pattern: str) -> list[Found]:
    """The files that a pattern matches, sorted; a name with brackets is first taken as it stands.

    `**` does not follow links to folders.

    Raises:
        InputError: see `open_range`; a server that does not tell the size of a file; a folder that cannot be read; or
            what matches is a link that leads nowhere, no regular file, or of a name that is not UTF-8.
    """
    return _find_remote(pattern) if is_url(pattern) else _find_local(pattern)


def identity(path: str) -> str:
    """A string that changes when the file's content does: size, MD5 of head and tail, and of a file longer than these
    two the time of its last change (local) or what the storage tells of its content (remote).

    Raises:
        InputError: the file cannot be read.
    Cost: at most HEAD_BYTES + TAIL_BYTES are read.
    """
    try:
        return _remote_identity(path) if is_url(path) else _local_identity(Path(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the input file ({error.strerror or error})") from error


def _find_local(pattern: str) -> list[Found]:
    expanded = Path(pattern).expanduser()
    names = {str(expanded)} if os.path.lexists(expanded) else _matching(expanded)
    found = [(name, _checked(name)) for name in sorted(names)]
    return [Found(name, status.st_size) for name, status in found if not stat.S_ISDIR(status.st_mode)]


def _matching(pattern: Path) -> set[str]:
    """What a pattern matches, part by part; links to folders are followed only where the pattern crosses one folder."""
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    places = {pattern.anchor or "."}
    for number, part in enumerate(parts, start=1):
        if part == "**":
            is_last = number == len(parts)
            places |= {entry.path for place in places for entry in _below(place) if is_last or _is_folder(entry)}
        elif not glob.has_magic(part):
            joined = (os.path.join(place, part) for place in places)  # noqa: PTH118 - Path drops the dot in front
            places = {name for name in joined if os.path.lexists(name)}
        else:
            fits = re.compile(fnmatch.translate(part)).match
            entries = (entry for place in places for entry in _entries(place, with_hidden=part.startswith(".")))
            places = {entry.path for entry in entries if fits(entry.name)}
    return {place.removeprefix("./") for place in places}


def _below(folder: str) -> Iterator["os.DirEntry[str]"]:
    """All that is below a folder, but for what is hidden or behind links."""
    for entry in _entries(folder):
        yield entry
        if _is_folder(entry):
            yield from _below(entry.path)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    return entry.is_dir(follow_symlinks=False)


def _entries(folder: str, *, with_hidden: bool = False) -> list["os.DirEntry[str]"]:
    try:
        if not Path(folder).is_dir():
            return []
        with os.scandir(folder) as entries:
            return [entry for entry in entries if with_hidden or not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot read the folder ({error.strerror or error}); make it readable, or choose a pattern that "
            "leaves it out"
        ) from error


def _checked(name: str) -> os.stat_result:
    """The status of a file or folder that can be used."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name!r}: the name is not UTF-8; rename the file or its folder") from error
    try:
        status = os.stat(name)  # noqa: PTH116
    except OSError as error:
        remedy = "restore what it leads to, or remove the link" if Path(name).is_symlink() else "make it readable"
        what = "a link that leads nowhere" if Path(name).is_symlink() else "cannot read the input file"
        raise InputError(f"{name}: {what} ({error.strerror or error}); {remedy}") from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise InputError(f"{name}: no regular file but a pipe, socket or device; copy what it gives into a file")
    return status


def _find_remote(pattern: str) -> list[Found]:
    with _named_errors(pattern):
        file_system, inside = _file_system(pattern)
        if file_system.isfile(inside):
            found = {inside: file_system.info(inside)}
        else:
            found = file_system.glob(inside, detail=True)
        files = {name: info for name, info in sorted(found.items()) if info["type"] == "file"}
        return [Found(file_system.unstrip_protocol(name), _size_bytes(name, info)) for name, info in files.items()]


def _local_identity(path: Path) -> str:
    found = fingerprint(path)
    # An edit in the unread middle shows only in the time of the last change.
    is_read_whole = found.size_bytes <= HEAD_BYTES + TAIL_BYTES
    return found.file_id if is_read_whole else f"{found.file_id}-{path.stat().st_mtime_ns}"


def _remote_identity(path: str) -> str:
    with _named_errors(path):
        file_system, inside = _file_system(path)
        info = file_system.info(inside)
        size_bytes = _size_bytes(path, info)
        head = file_system.cat_file(inside, start=0, end=min(HEAD_BYTES, size_bytes))
        is_short = size_bytes <= min(HEAD_BYTES, TAIL_BYTES)
        tail = head if is_short else file_system.cat_file(inside, start=size_bytes - TAIL_BYTES, end=size_bytes)
    file_id = f"{_md5(head)}-{_md5(tail)}-{size_bytes}"
    tags = [f"{tag}={info[tag]}" for tag in _CONTENT_TAGS if info.get(tag)]
    return file_id if size_bytes <= HEAD_BYTES + TAIL_BYTES else "-".join([file_id, *tags[:1]])


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _size_bytes(name: str, info: dict[str, Any]) -> int:
    if info.get("size") is None:
        raise InputError(f"{name}: the server does not tell the size of the file; download it and name the local copy")
    return int(info["size"])


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec  # here, not above: only URLs need it

    return fsspec.url_to_fs(path)


@contextmanager
def _named_errors(path: str) -> Iterator[None]:
    """Failures to reach a protocol, as an InputError that names the package to install."""
    protocol = path.partition("://")[0].lower()
    try:
        yield
    except ImportError as error:
        packages = "fsspec" if error.name == "fsspec" else _PACKAGES.get(protocol)
        remedy = f"pip install {packages}" if packages else str(error)
        raise InputError(f"{path}: reading {protocol}:// needs a package that is not installed: {remedy}") from error
    except ValueError as error:
        if not str(error).startswith("Protocol not known"):
            raise
        raise InputError(f"{path}: unknown protocol {protocol}://; known are {', '.join(_PACKAGES)}") from error

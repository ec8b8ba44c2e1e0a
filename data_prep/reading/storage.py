"""Files wherever they lie: local ones by plain `open`, those of s3://, gs://, hf://, https:// ... through fsspec."""

import glob as local_glob
import hashlib
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

    Raises:
        InputError: see `open_range`; or a server that does not tell the size of a file.
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
    names = [str(expanded)] if expanded.exists() else sorted(local_glob.glob(str(expanded), recursive=True))  # noqa: PTH207 - unlike Path.glob it takes absolute patterns
    return [Found(name, Path(name).stat().st_size) for name in names if not Path(name).is_dir()]


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

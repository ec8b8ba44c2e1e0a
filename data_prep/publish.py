"""A file or a folder appears under its final name whole, or not at all.

Everything is written under a temporary name beside its place, fsynced, and renamed. The temporary name carries host,
process and random bits, so that two runs on a shared file system never meet, and so that the leftovers of a killed run
can be told from the work of a living one.
"""

import os
import re
import secrets
import shutil
import socket
from pathlib import Path

_TEMPORARY = re.compile(r"(?P<name>.+)\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")


def temporary_beside(path: Path) -> Path:
    """A fresh name in the folder of path: `<name>.tmp-<host>-<pid>-<random>`."""
    return path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, already fsynced file or folder to path, and make the rename durable."""
    temporary.replace(path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; they survive a power cut as what is put into them does."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Fsync a folder: only then do its renames survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Fsync the files of a folder, and the folder: what libraries wrote into it survives a power cut."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically: readers see the old content or the new one, never a part."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def publish_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in the place of folder, whatever stands there; the old one is then deleted.

    Between the two renames folder is absent; it is never partly old and partly new.
    """
    sync_folder(temporary)
    if folder.exists():
        retired = temporary_beside(folder)
        folder.replace(retired)
        publish(temporary, folder)
        shutil.rmtree(retired)
    else:
        publish(temporary, folder)


def remove_leftovers(folder: Path, of: str | None = None) -> list[Path]:
    """Delete what dead processes of this host left in a folder under temporary names; return what was deleted.

    `of`: only those of this final name.
    """
    removed: list[Path] = []
    for candidate in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(candidate.name)
        if match is None or (of is not None and match["name"] != of) or match["host"] != socket.gethostname():
            continue
        if not _is_alive(int(match["pid"])):
            shutil.rmtree(candidate) if candidate.is_dir() else candidate.unlink()
            removed.append(candidate)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it lives, under another user
        return True
    return True

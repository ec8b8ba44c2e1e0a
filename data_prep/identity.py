"""Whether a prepared folder is what this input and this configuration would give: `inputs.json`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_prep import publish
from data_prep.corpus import InputFile
from data_prep.documents import InputError
from data_prep.fingerprint import HEAD_BYTES, TAIL_BYTES, fingerprint

INPUTS_FILE = "inputs.json"
STEPS_VERSION = 1
"""Raised when the same input and configuration begin to give other shards."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The settings that shape the shards, and the files that they are made of."""

    config_digest: str
    files: tuple[tuple[str, str], ...]
    """Name and file id of each input file, in order."""


def identify(files: Sequence[InputFile], settings: dict[str, Any]) -> Identity:
    """Fingerprint the input.

    Raises:
        InputError: a file that cannot be read.
    """
    content = json.dumps({"steps_version": STEPS_VERSION, **settings}, sort_keys=True)
    digest = xxhash.xxh3_128(content.encode("utf-8")).hexdigest()
    return Identity(digest, tuple((file.name, _file_id(file)) for file in files))


def write(folder: Path, identity: Identity) -> None:
    """Write `<folder>/inputs.json`."""
    publish.write_text(folder / INPUTS_FILE, json.dumps(asdict(identity), indent=1) + "\n")


def difference(folder: Path, identity: Identity) -> str | None:
    """What tells a prepared folder from the identity, in words; None if nothing does."""
    try:
        table = json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8"))
        old_digest, old_files = table["config_digest"], dict(table["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no readable {INPUTS_FILE}"
    if old_digest != identity.config_digest:
        return "its configuration differs (see its prepare.toml)"
    new_files = dict(identity.files)
    for name in [*new_files, *old_files]:
        if old_files.get(name) != new_files.get(name):
            change = "is new" if name not in old_files else "is gone" if name not in new_files else "has changed"
            return f"the input file {name} {change}"
    return None if list(old_files) == list(new_files) else "the order of its input files differs"


def _file_id(file: InputFile) -> str:
    try:
        file_id = fingerprint(file.path).file_id
        if file.size_bytes > HEAD_BYTES + TAIL_BYTES:
            # An edit in the unread middle shows only in the time of the last change.
            return f"{file_id}-{file.path.stat().st_mtime_ns}"
    except OSError as error:
        raise InputError(f"{file.path}: cannot read the input file ({error.strerror})") from error
    return file_id

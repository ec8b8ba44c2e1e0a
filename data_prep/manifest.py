"""The manifest: the list of shards that make a data set, each pinned by its fingerprint and payload hash."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep import publish
from data_prep.fingerprint import Fingerprint, fingerprint
from data_prep.shards import ShardHeader

FORMAT = "bessemer-data/1"
MANIFEST_FILE = "manifest.json"
_REMEDY = "prepare the data first: make prepare-data"

Table = TypeVar("Table")


class ManifestError(ValueError):
    """A data folder has no usable manifest; the message names the file, the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One shard of a data set."""

    file: str
    """Path relative to the manifest, with forward slashes: a hint, the fingerprint is the identity."""
    split: str
    source: str
    size_bytes: int
    md5_head: str
    md5_tail: str
    payload_xxh3: str
    dtype: str
    token_count: int
    document_count: int
    sample_count: int

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity of the shard's content."""
        return Fingerprint(self.size_bytes, self.md5_head, self.md5_tail)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A prepared data set."""

    format: str = FORMAT
    tokenizer_file: str
    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    sample_tokens: int
    shards: tuple[ShardRecord, ...]


def num_samples(token_count: int, sample_tokens: int) -> int:
    """Samples in a shard: its targets over sample_tokens, the shorter last one included."""
    return -(-(token_count - 1) // sample_tokens)


def record_shard(folder: Path, path: Path, header: ShardHeader, *, source: str, sample_tokens: int) -> ShardRecord:
    """Describe a written shard; the folder it lies in, below the data folder, is its split."""
    found = fingerprint(path)
    return ShardRecord(
        file=path.relative_to(folder).as_posix(),
        split=path.parent.name,
        source=source,
        size_bytes=found.size_bytes,
        md5_head=found.md5_head,
        md5_tail=found.md5_tail,
        payload_xxh3=header.payload_xxh3,
        dtype=header.dtype,
        token_count=header.token_count,
        document_count=header.document_count,
        sample_count=num_samples(header.token_count, sample_tokens),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `<folder>/manifest.json` atomically."""
    publish.write_text(folder / MANIFEST_FILE, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `<folder>/manifest.json`.

    Raises:
        ManifestError: no folder, no manifest, no shards in it, malformed JSON, a key that is missing or of a wrong
            type, or another format.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such data folder; {_REMEDY}")
    if not path.is_file():
        raise ManifestError(f"{folder}: the folder has no {MANIFEST_FILE}; {_REMEDY}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path}: not readable as JSON ({error}); restore it, or {_REMEDY}") from error
    manifest = _from_table(path, "manifest", table, Manifest)
    if manifest.format != FORMAT:
        raise ManifestError(f"{path}: format = {manifest.format!r}, this program reads {FORMAT!r}; {_REMEDY}")
    if not manifest.shards:
        raise ManifestError(f"{path}: shards is empty, there is nothing to train on; {_REMEDY}")
    return manifest


def with_shards(manifest: Manifest, shards: tuple[ShardRecord, ...]) -> Manifest:
    """The manifest of the same data folder with other shards."""
    return dataclasses.replace(manifest, shards=shards)


def merged(folders: Mapping[Path, Manifest]) -> Manifest:
    """One manifest of the shards of several data folders, of one tokenizer; the first gives all else."""
    first, *others = folders.values()
    return dataclasses.replace(first, shards=first.shards + tuple(shard for m in others for shard in m.shards))


def _from_table(path: Path, where: str, table: Any, table_type: type[Table]) -> Table:
    """Build a dataclass from a JSON object; unknown keys are ignored, so that a later version may add some."""
    if not isinstance(table, dict):
        raise ManifestError(f"{path}: {where} is {table!r}, expected an object")
    hints = typing.get_type_hints(table_type)
    missing = [name for name in hints if name not in table]
    if missing:
        raise ManifestError(f"{path}: {where} has no key {missing[0]!r}; restore the file, or {_REMEDY}")
    return table_type(**{name: _value(path, f"{where}.{name}", table[name], hint) for name, hint in hints.items()})


def _value(path: Path, where: str, value: Any, hint: Any) -> Any:
    expected = list if typing.get_origin(hint) is tuple else hint
    if type(value) is not expected:
        raise ManifestError(f"{path}: {where} = {value!r}, expected {expected.__name__}")
    if expected is list:
        return tuple(_from_table(path, f"{where}[{i}]", item, ShardRecord) for i, item in enumerate(value))
    return value

"""Is a file still the one that was prepared? Three levels, dearer and surer.

stat      size, modification time and inode are those of the last check; a file that looks otherwise is fingerprinted
headtail  size, header, MD5 of the first and last MiB
full      also the xxh3 of the whole payload
"""

import contextlib
import json
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

from data_prep import publish
from data_prep.checksums import (
    TABLE_OFFSET,
    ChecksumError,
    checksum_path,
    read_checksum_header,
    sample_checksums,
    verify_checksums,
)
from data_prep.fingerprint import fingerprint
from data_prep.manifest import Manifest
from data_prep.shards import HEADER_BYTES, read_header, verify_payload
from resume.manifest import DataError, DataFile, listed_files

Level = Literal["stat", "headtail", "full"]
LEVELS: tuple[Level, ...] = get_args(Level)

_THREADS = 8
_BLOCK_BYTES = 16 * 1024 * 1024
_Stat = list[int]


class StatCache:
    """What files looked like when they were last found good, kept in the run folder for each machine."""

    def __init__(self, run: Path):
        self._path = run / "checked" / f"{socket.gethostname()}.json"
        self._entries: dict[str, tuple[str, _Stat]] = {}
        # None yet, or damaged: everything is checked anew.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            table = json.loads(self._path.read_text(encoding="utf-8"))
            self._entries = {name: (file_id, stat) for name, (file_id, stat) in table.items()}

    def holds(self, file: DataFile) -> bool:
        """Whether the file looks as it did when it was last found to be this one."""
        return self._entries.get(str(file.path.absolute())) == (file.file_id, _stat(file.path))

    def write(self, good: Sequence[DataFile]) -> None:
        """Replaces the cache by files that were just found good."""
        entries = {str(file.path.absolute()): (file.file_id, _stat(file.path)) for file in good}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        publish.write_text(self._path, json.dumps(entries))


def check_files(
    files: Sequence[DataFile],
    level: Level,
    tokenizer_digest: str,
    cache: StatCache | None = None,
    show_progress: bool = False,
) -> None:
    """Checks files against their identities.

    Raises:
        DataError: one is missing, truncated, changed, or of another tokenizer.
        ShardError: one is not a shard, or its payload changed.
    """

    def check(file: DataFile) -> None:
        try:
            _check(file, level, tokenizer_digest, cache)
        except OSError as error:
            raise DataError(f"{file.path}: {error.strerror}; restore it or prepare the data again") from error

    with ThreadPoolExecutor(_THREADS) as executor:
        hidden = None if show_progress else True
        for _ in tqdm(
            executor.map(check, files), total=len(files), desc="check shards", unit="shard", leave=False, disable=hidden
        ):
            pass


def damaged_samples(file: DataFile) -> list[int]:
    """The samples of a shard that differ from their checksums, none without a checksum file.

    Raises:
        ChecksumError: the checksum file itself is damaged.
    Cost: reads the whole shard.
    """
    header = read_checksum_header(file.path)
    if header is None:
        return []
    verify_checksums(file.path, header)
    recorded = np.fromfile(checksum_path(file.path), dtype="<u4", offset=TABLE_OFFSET)
    token_bytes = file.dtype.itemsize
    per_block = max(1, _BLOCK_BYTES // (header.sample_tokens * token_bytes))
    damaged: list[int] = []
    with file.path.open("rb") as shard:
        for first in range(0, len(recorded), per_block):
            shard.seek(HEADER_BYTES + first * header.sample_tokens * token_bytes)
            content = memoryview(shard.read((per_block * header.sample_tokens + 1) * token_bytes))
            found = np.array(sample_checksums(content, header.sample_tokens, token_bytes))
            damaged += (first + np.flatnonzero(found != recorded[first : first + per_block])).tolist()
    return damaged


def open_split(folders: Mapping[Path, Manifest], split: str) -> list[DataFile]:
    """The files of a split of data folders of one tokenizer, checked by fingerprint, ordered by identity.

    Raises:
        DataError: no shard of that split; also see `check_files`.
    """
    files = listed_files(folders, split)
    if not files:
        splits = sorted({record.split for manifest in folders.values() for record in manifest.shards})
        raise DataError(
            f"{', '.join(map(str, folders))}: no shard of split {split!r}; the splits are {', '.join(splits)}"
        )
    check_files(files, "headtail", next(iter(folders.values())).tokenizer_digest)
    return files


def _check(file: DataFile, level: Level, tokenizer_digest: str, cache: StatCache | None) -> None:
    wanted_bytes = int(file.file_id.rsplit("-", 1)[1])
    if not file.path.is_file():
        raise DataError(f"{file.path}: in the manifest but not on disk; restore it or prepare the data again")
    if file.path.stat().st_size != wanted_bytes:
        raise DataError(
            f"{file.path}: {file.path.stat().st_size} bytes, its {file.num_tokens} tokens make {wanted_bytes}; "
            "the shard is truncated or replaced: restore it"
        )
    if level == "stat" and cache is not None and cache.holds(file):
        return
    header = read_header(file.path)
    if header.tokenizer_digest != tokenizer_digest:
        raise DataError(
            f"{file.path}: written with tokenizer {header.tokenizer_digest}, the data's tokenizer is "
            f"{tokenizer_digest}; encode the text again with one tokenizer"
        )
    found = fingerprint(file.path).file_id
    if found != file.file_id:
        raise DataError(
            f"{file.path}: fingerprint {found}, manifest has {file.file_id}. The file changed "
            "after it was prepared; restore it, or add the new version under another name"
        )
    try:
        read_checksum_header(file.path)
    except ChecksumError as error:
        raise DataError(str(error)) from error
    if level == "full":
        verify_payload(file.path)


def _stat(path: Path) -> _Stat:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]

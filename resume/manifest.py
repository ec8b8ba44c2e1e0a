"""The shards of one split, each known by its content and checked before the first token is read."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.fingerprint import fingerprint
from data_prep.manifest import Manifest, ShardRecord, num_samples
from data_prep.shards import HEADER_BYTES, read_header


class DataError(ValueError):
    """Prepared data that cannot be trained on; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One shard: who it is (file_id: MD5 of head and tail, and size), where it lies, what it holds."""

    file_id: str
    path: Path
    dtype: np.dtype
    num_tokens: int

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all but the first, which is context only."""
        return self.num_tokens - 1

    def num_samples(self, sequence_length: int) -> int:
        """Samples of `sequence_length` targets; the last one may be shorter, none is dropped or padded away."""
        return num_samples(self.num_tokens, sequence_length)


def open_split(folder: Path, manifest: Manifest, split: str, show_progress: bool = False) -> list[DataFile]:
    """Checks every shard of a split against the manifest and returns them, ordered by identity.

    Compared are size, header, and MD5 of head and tail: a truncated, replaced or re-tokenised shard is refused here,
    where it costs a line, instead of as a SIGBUS or a garbled loss in the middle of a run.

    Raises:
        DataError: no shard of that split, a missing, changed or foreign one, or the same content twice.
    """
    records = [record for record in manifest.shards if record.split == split]
    if not records:
        splits = ", ".join(sorted({record.split for record in manifest.shards}))
        raise DataError(f"{folder}/manifest.json lists no shard of split {split!r}; its splits are {splits}")
    bar = tqdm(
        records, desc=f"check {split} shards", unit="shard", leave=False, disable=None if show_progress else True
    )
    files = sorted((_checked(folder, manifest, record) for record in bar), key=lambda file: file.file_id)
    for first, second in itertools.pairwise(files):
        if first.file_id == second.file_id:
            raise DataError(f"{first.path} and {second.path} have the same content; remove one from the manifest")
    return files


def refuse_overlap(training: Sequence[DataFile], validation: Sequence[DataFile]) -> None:
    """Refuses a shard that would be trained on and validated with.

    Raises:
        DataError: such a shard exists.
    """
    trained = {file.file_id: file.path for file in training}
    for file in validation:
        if file.file_id in trained:
            raise DataError(f"{file.path} (validation) has the content of {trained[file.file_id]} (train); remove one")


def _checked(folder: Path, manifest: Manifest, record: ShardRecord) -> DataFile:
    path = folder / record.file
    if not path.is_file():
        raise DataError(f"{path}: in the manifest but not on disk; restore it or prepare the data again")
    expected_bytes = HEADER_BYTES + record.token_count * np.dtype(record.dtype).itemsize
    if path.stat().st_size != expected_bytes:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes, the manifest's {record.token_count} tokens make {expected_bytes}; "
            "the shard is truncated or replaced: restore it"
        )
    header = read_header(path)
    if header.tokenizer_digest != manifest.tokenizer_digest:
        raise DataError(
            f"{path}: written with tokenizer {header.tokenizer_digest}, the data folder's tokenizer is "
            f"{manifest.tokenizer_digest}; encode the text again with one tokenizer"
        )
    found = fingerprint(path)
    if found != record.fingerprint:
        raise DataError(
            f"{path}: fingerprint {found.file_id}, manifest has {record.fingerprint.file_id}. The file changed "
            "after it was prepared; restore it, or add the new version under another name"
        )
    dtype = np.dtype(header.dtype).newbyteorder("<")
    return DataFile(file_id=found.file_id, path=path, dtype=dtype, num_tokens=header.token_count)

"""The shards of a run: each known by its content, listed by manifests, found again wherever it lies."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.fingerprint import fingerprint
from data_prep.manifest import Manifest, num_samples
from data_prep.shards import HEADER_BYTES

_FILE_ID = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}-[0-9]{4,18}")


class DataError(ValueError):
    """Prepared data that cannot be trained on; the message names the file and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One shard: who it is (file_id: MD5 of head and tail, and size), where it lies, what it holds."""

    file_id: str
    path: Path
    dtype: np.dtype
    num_tokens: int
    source: str = ""

    @property
    def num_targets(self) -> int:
        """Tokens to predict: all but the first, which is context only."""
        return self.num_tokens - 1

    def num_samples(self, sequence_length: int) -> int:
        """Samples of `sequence_length` targets; the last one may be shorter, none is dropped or padded away."""
        return num_samples(self.num_tokens, sequence_length)


def is_file_id(value: object) -> bool:
    """Whether a value read from a file has the form of a shard's identity, of one that has a token at least."""
    return isinstance(value, str) and _FILE_ID.fullmatch(value) is not None and _size_of(value) > HEADER_BYTES


def listed_files(folders: Mapping[Path, Manifest], split: str) -> list[DataFile]:
    """What the manifests of data folders list as one split, ordered by identity. Nothing but the manifests is read.

    Raises:
        DataError: the same content twice.
    """
    files: dict[str, DataFile] = {}
    for folder, manifest in folders.items():
        for record in manifest.shards:
            if record.split != split:
                continue
            file = DataFile(
                file_id=record.fingerprint.file_id,
                path=folder / record.file,
                dtype=np.dtype(record.dtype).newbyteorder("<"),
                num_tokens=record.token_count,
                source=record.source,
            )
            if file.file_id in files:
                twin = files[file.file_id].path
                raise DataError(f"{file.path} and {twin} have the same content; remove one from the manifest")
            files[file.file_id] = file
    return [files[file_id] for file_id in sorted(files)]


def refuse_other_tokenizers(folders: Mapping[Path, Manifest]) -> None:
    """Refuses data folders that were not all encoded by one tokenizer.

    Raises:
        DataError: names two that differ.
    """
    (first, reference), *others = folders.items()
    for folder, manifest in others:
        for name in ("tokenizer_digest", "eos_id"):
            if getattr(manifest, name) != getattr(reference, name):
                raise DataError(
                    f"{folder}: {name} is {getattr(manifest, name)}, that of {first} is {getattr(reference, name)}; "
                    "encode the text of both with one tokenizer (--tokenizer.path)"
                )


def refuse_overlap(training: Iterable[DataFile], validation: Iterable[DataFile]) -> None:
    """Refuses a shard that would be trained on and validated with.

    Raises:
        DataError: such a shard exists.
    """
    trained = {file.file_id: file.path for file in training}
    for file in validation:
        if file.file_id in trained:
            raise DataError(f"{file.path} (validation) has the content of {trained[file.file_id]} (train); remove one")


def find_files(
    file_ids: Sequence[str], places: Sequence[Mapping[str, DataFile]], folders: Iterable[Path]
) -> dict[str, DataFile]:
    """`look_for`, but all of them.

    Raises:
        DataError: some are nowhere.
    """
    found = look_for(file_ids, places, folders)
    lost = [file_id for file_id in file_ids if file_id not in found]
    if lost:
        hint = next(place[lost[0]] for place in places if lost[0] in place)
        raise DataError(
            f"{len(lost)} of the run's {len(file_ids)} training shards are not on disk, one of them {hint.path} "
            f"({lost[0]}); restore them, name the folder they were moved to with --data.search FOLDER, or take them "
            "out with `python -m resume remove RUN FILE`"
        )
    return found


def look_for(
    file_ids: Sequence[str], places: Sequence[Mapping[str, DataFile]], folders: Iterable[Path]
) -> dict[str, DataFile]:
    """Finds files by content: where the first of `places` says, or the next, or anywhere below `folders`.

    One that is there, but of another size, is given if there is no better: checking it says what is wrong.

    Cost: a fingerprint (2 MiB read) of each file of a fitting size, only if a file is not where it should be.
    """
    found: dict[str, DataFile] = {}
    truncated: dict[str, DataFile] = {}
    for file_id in file_ids:
        listed = [place[file_id] for place in places if file_id in place]
        there = [file for file in listed if file.path.is_file()]
        whole = [file for file in there if file.path.stat().st_size == _size_of(file_id)]
        if whole:
            found[file_id] = whole[0]
        elif there:
            truncated[file_id] = there[0]
    lost = [file_id for file_id in file_ids if file_id not in found]
    for file_id, path in (_search(set(lost), folders) if lost else {}).items():
        hint = next(place[file_id] for place in places if file_id in place)
        found[file_id] = dataclasses.replace(hint, path=path)
    return truncated | found


def file_of(file_id: str, path: Path, token_bytes: int, source: str = "") -> DataFile:
    """A file from its identity alone, which holds its size, and where it should lie."""
    return DataFile(
        file_id=file_id,
        path=path,
        dtype=np.dtype(f"<u{token_bytes}"),
        num_tokens=(_size_of(file_id) - HEADER_BYTES) // token_bytes,
        source=source,
    )


def _size_of(file_id: str) -> int:
    return int(file_id.rsplit("-", 1)[1])


def _search(lost: Collection[str], folders: Iterable[Path]) -> dict[str, Path]:
    sizes = set(map(_size_of, lost))
    candidates = {path.resolve() for folder in folders if folder.is_dir() for path in folder.rglob("*.bin")}
    fitting = [path for path in sorted(candidates) if path.is_file() and path.stat().st_size in sizes]
    return {file_id: path for path in fitting if (file_id := fingerprint(path).file_id) in lost}

"""Shards of random tokens for the loader benchmark, and the places at which a row of tokens may be found in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.checksums import write_checksums
from data_prep.fingerprint import fingerprint
from data_prep.shards import HEADER_BYTES, ShardWriter, open_tokens
from resume.manifest import DataFile, file_of

NUM_SHARDS = 10
VOCAB_SIZE = 65_536
EOS_ID = 0
TOKENIZER_DIGEST = "benchmark"
_TOKEN_BYTES = 2
_KEY_TOKENS = 8
_WARM_BYTES = 16 * 1024 * 1024


class WrongRowsError(ValueError):
    """A loader delivered something that is not a row of the data: its figures are void."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Ten shards, each under two names: beside its checksum file, and without one."""

    folder: Path
    sequence_length: int
    shards: list[Path]
    checked_shards: list[Path]
    file_ids: list[str]

    @property
    def row_bytes(self) -> int:
        """Bytes of the tokens of one sample, its context token included."""
        return (self.sequence_length + 1) * _TOKEN_BYTES

    @property
    def num_samples(self) -> int:
        """Samples of `sequence_length` targets."""
        return sum((path.stat().st_size - HEADER_BYTES) // _TOKEN_BYTES - 1 for path in self.shards) // (
            self.sequence_length
        )

    def files(self, with_checksums: bool) -> list[DataFile]:
        """The shards as the loader knows them."""
        paths = self.checked_shards if with_checksums else self.shards
        return [file_of(file_id, path, _TOKEN_BYTES) for file_id, path in zip(self.file_ids, paths, strict=True)]

    def starts(self, stride: int) -> dict[bytes, tuple[int, int]]:
        """Shard and first token of every row that starts at a multiple of stride, by its first 16 bytes."""
        found: dict[bytes, tuple[int, int]] = {}
        for shard, path in enumerate(self.shards):
            tokens = open_tokens(path)
            firsts = np.arange(0, len(tokens) - self.sequence_length, stride)
            heads = np.ascontiguousarray(tokens[firsts[:, None] + np.arange(_KEY_TOKENS)])
            keys = heads.view(f"V{_KEY_TOKENS * _TOKEN_BYTES}").ravel()
            found |= {key.tobytes(): (shard, first) for key, first in zip(keys, firsts.tolist(), strict=True)}
        return found

    def check(self, rows: NDArray[Any], stride: int, may_repeat: bool = False) -> None:
        """Checks that rows (R, sequence_length + 1) are different rows of the data that start at multiples of stride.

        Raises:
            WrongRowsError: they are not.
        """
        starts = self.starts(stride)
        tokens = [open_tokens(path) for path in self.shards]
        seen: set[tuple[int, int]] = set()
        for row in rows:
            narrow = row.astype(np.uint16)
            place = starts.get(narrow[:_KEY_TOKENS].tobytes())
            if place is None or (place in seen and not may_repeat):
                raise WrongRowsError(f"a row of {len(row)} tokens that is {'repeated' if place else 'not in the data'}")
            shard, first = place
            if not np.array_equal(row, tokens[shard][first : first + self.sequence_length + 1]):
                raise WrongRowsError(f"the row at token {first} of {self.shards[shard].name} differs from the data")
            seen.add(place)


def write_corpus(folder: Path, num_bytes: int, sequence_length: int) -> Corpus:
    """Writes shards of whole samples, about num_bytes in all, and leaves them in the page cache."""
    samples_per_shard = num_bytes // NUM_SHARDS // _TOKEN_BYTES // sequence_length
    shard_tokens = samples_per_shard * sequence_length
    rng = np.random.default_rng(0)
    writer = ShardWriter(
        folder / "checked",
        "random",
        vocab_size=VOCAB_SIZE,
        tokenizer_digest=TOKENIZER_DIGEST,
        eos_id=EOS_ID,
        shard_tokens=shard_tokens,
    )
    with writer:
        for _ in range(NUM_SHARDS):  # one document a shard, less the EOS that the writer adds
            writer.add(rng.integers(EOS_ID + 1, VOCAB_SIZE, shard_tokens - 1, dtype=np.uint16))
    checked = [path for path, _ in writer.close()]
    plain = folder / "plain"
    plain.mkdir()
    for path in checked:
        write_checksums(path, sequence_length)
        (plain / path.name).hardlink_to(path)
        _warm(path)
    file_ids = [fingerprint(path).file_id for path in checked]
    return Corpus(folder, sequence_length, [plain / path.name for path in checked], checked, file_ids)


def _warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(_WARM_BYTES):
            pass

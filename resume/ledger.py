"""What was really trained: per file a count and a digest of the samples that committed steps were given.

Kept beside the data state and independently of it: it adds up what the loader delivered, while the state says what it
should have delivered. The audit compares the two. A digest is a sum of hashes, so that it can be updated sample by
sample, in any order and on any rank, and ranks add up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resume.chain import Ints
from resume.manifest import DataError


@dataclasses.dataclass(frozen=True, slots=True)
class Quarantined:
    """A sample that was not trained because its bytes are not those that were written."""

    file_id: str
    first_token: int
    sequence_length: int
    step: int


class Ledger:
    """Counts (files,) int64 and digests (files,) uint64 of trained samples, by the order's file indices."""

    def __init__(self, file_ids: Sequence[str]):
        self.file_ids = list(file_ids)
        self.counts = np.zeros(len(file_ids), dtype=np.int64)
        self.digests = np.zeros(len(file_ids), dtype=np.uint64)
        self.quarantined: list[Quarantined] = []
        self.not_applied: list[int] = []
        """Steps that the guard left out: their samples were read, and not learned from."""

    def add(self, files: Ints, samples: Ints, sequence_length: int) -> None:
        """Books samples (P,) of files (P,) that a committed step trained."""
        np.add.at(self.counts, files, 1)
        np.add.at(self.digests, files, sample_hashes(samples * sequence_length, sequence_length))

    def moved_to(self, file_ids: Sequence[str]) -> "Ledger":
        """The same books under the file indices of another order, which lists all of these files."""
        moved = Ledger(file_ids)
        index = {file_id: i for i, file_id in enumerate(file_ids)}
        where = [index[file_id] for file_id in self.file_ids]
        moved.counts[where], moved.digests[where] = self.counts, self.digests
        moved.quarantined, moved.not_applied = list(self.quarantined), list(self.not_applied)
        return moved

    def to_json(self) -> dict[str, Any]:
        """The books as JSON values, by file index."""
        return {
            "counts": self.counts.tolist(),
            "digests": [f"{digest:016x}" for digest in self.digests.tolist()],
            "quarantined": [dataclasses.astuple(entry) for entry in self.quarantined],
            "not_applied": self.not_applied,
        }


def from_json(record: Mapping[str, Any], file_ids: Sequence[str]) -> Ledger:
    """Reads what `to_json` wrote, for the order that it was written with.

    Raises:
        DataError: it was written for another number of files, or a field is missing.
    """
    ledger = Ledger(file_ids)
    try:
        counts = np.array([int(count) for count in record["counts"]], dtype=np.int64)
        digests = np.array([int(digest, 16) for digest in record["digests"]], dtype=np.uint64)
        ledger.quarantined = [Quarantined(*entry) for entry in record["quarantined"]]
        ledger.not_applied = [int(step) for step in record["not_applied"]]
        for entry in ledger.quarantined:
            numbers = (entry.first_token, entry.sequence_length - 1, entry.step)
            if not isinstance(entry.file_id, str) or min(numbers) < 0:
                raise ValueError(f"{entry}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"the checkpoint's record of trained samples is damaged ({error})") from error
    if not len(counts) == len(digests) == len(file_ids):
        raise DataError(
            f"the checkpoint's record of trained samples has {len(counts)} files, its state {len(file_ids)}"
        )
    ledger.counts, ledger.digests = counts, digests
    return ledger


def sample_hashes(first_tokens: Ints, sequence_length: int) -> NDArray[np.uint64]:
    """A 64-bit hash (P,) of each sample by where it begins (P,) and how long it is: the finaliser of SplitMix64."""
    x = first_tokens.astype(np.uint64) ^ np.uint64(sequence_length << 40)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Which sample is trained at which position: a pure function of the files' identities, the seed and the position.

Nothing is stored or materialised. Positions count samples over all epochs; epoch e visits every sample once, in an
order of its own. Any rank of any world size reads its positions of the same global order.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resume.manifest import DataFile
from resume.permutation import Permutation

PERMUTATION_NAME = "gfeistel8/24-v1"


class Order:
    """The global order of all samples of a set of files."""

    def __init__(self, files: Sequence[DataFile], *, seed: int, sequence_length: int):
        """Sorts the files by identity, so that neither paths nor listing order matter.

        Raises:
            ValueError: there are no files.
        """
        if not files:
            raise ValueError("Order: no files")
        self.files = sorted(files, key=lambda file: file.file_id)
        self.seed = seed
        self.sequence_length = sequence_length
        counts = [file.num_samples(sequence_length) for file in self.files]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - counts
        self._permutations: dict[int, Permutation] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Samples in all files together."""
        return int(self._ends[-1])

    def resolve(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Maps positions (P,) to file indices (P,) into `files` and sample indices (P,) inside those files.

        Cost: about 40 ns per position in blocks of 4,096 or more.
        """
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        values = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            values[chosen] = self._permutation(int(epoch))(offsets[chosen])
        file_indices = np.searchsorted(self._ends, values, side="right")
        return file_indices, values - self._starts[file_indices]

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._permutations:
            key = order_key(self.seed, epoch, [file.file_id for file in self.files])
            self._permutations = {epoch: Permutation(self.samples_per_epoch, key)}
        return self._permutations[epoch]


def order_key(seed: int, epoch: int, file_ids: Sequence[str]) -> int:
    """The 64-bit key of one epoch's permutation: blake2b over length-prefixed fields, so that no two inputs collide."""
    digest = hashlib.blake2b(digest_size=8)
    for field in ("order", str(seed), str(epoch), *file_ids):
        data = field.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")

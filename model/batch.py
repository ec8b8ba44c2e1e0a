"""What one forward and backward reads: inputs, targets, and where documents begin."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import DocumentBoundaries, document_boundaries
from kernels.cross_entropy import IGNORE


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows of tokens and, for each, the token that follows it.

    Shapes: tokens, targets (B, T) int64; targets are IGNORE where there is nothing to predict.
    """

    tokens: Tensor
    targets: Tensor
    boundaries: DocumentBoundaries | None
    num_targets: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy does not wait when the memory is pinned."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.boundaries.to(device) if self.boundaries is not None else None,
            self.num_targets,
        )

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory."""
        boundaries = self.boundaries.pinned() if self.boundaries is not None else None
        return Batch(self.tokens.pin_memory(), self.targets.pin_memory(), boundaries, self.num_targets)


def collate(samples: Sequence[NDArray], sequence_length: int, eos_id: int, isolate_documents: bool = False) -> Batch:
    """Stacks samples of at most sequence_length + 1 tokens; what a short one lacks is EOS with ignored targets."""
    tokens = torch.full((len(samples), sequence_length), eos_id, dtype=torch.int64)
    targets = torch.full((len(samples), sequence_length), IGNORE, dtype=torch.int64)
    for row, sample in enumerate(samples):
        values = torch.from_numpy(sample.astype(np.int64))
        tokens[row, : len(values) - 1] = values[:-1]
        targets[row, : len(values) - 1] = values[1:]
    boundaries = document_boundaries(tokens, eos_id) if isolate_documents else None
    return Batch(tokens, targets, boundaries, sum(max(0, len(sample) - 1) for sample in samples))

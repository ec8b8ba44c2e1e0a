"""What one forward and backward reads: inputs, targets, and where documents begin; on the host, and on the device."""

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


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRows:
    """A batch on the host, as narrow as in the shards: a quarter of the bytes of int64, tokens and targets in one.

    Row r has row_targets[r] targets: its tokens 1..row_targets[r], each with the token before it as input.

    Shapes: tokens (B, T + 1).
    Dtypes: tokens int16, which holds the bits of uint16 because torch can do little with that one, or int32.
    """

    tokens: Tensor
    row_targets: Sequence[int]
    boundaries: DocumentBoundaries | None

    @property
    def num_targets(self) -> int:
        """Targets of all rows together."""
        return sum(self.row_targets)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, widened there; the copy does not wait when the memory is pinned."""
        narrow = self.tokens.to(device, non_blocking=True)
        targets = _widened(narrow[:, 1:])
        num_targets = self.num_targets
        if num_targets < targets.numel():
            ends = torch.tensor(self.row_targets, dtype=torch.int64, pin_memory=self.tokens.is_pinned())
            ends = ends.to(device, non_blocking=True)
            behind_end = torch.arange(targets.shape[1], device=device) >= ends[:, None]
            targets = targets.masked_fill(behind_end, IGNORE)
        boundaries = self.boundaries.to(device) if self.boundaries is not None else None
        return Batch(_widened(narrow[:, :-1]), targets, boundaries, num_targets)


def empty_rows(num_rows: int, sequence_length: int, token_bytes: int, pin_memory: bool = False) -> Tensor:
    """Room for the tokens of TokenRows, to be filled through `as_unsigned`; token_bytes is 2 or 4."""
    dtype = {2: torch.int16, 4: torch.int32}[token_bytes]
    return torch.empty(num_rows, sequence_length + 1, dtype=dtype, pin_memory=pin_memory)


def as_unsigned(tokens: Tensor) -> NDArray[np.unsignedinteger]:
    """The memory of TokenRows' tokens as the unsigned integers that it holds."""
    return tokens.numpy().view(np.uint16 if tokens.dtype == torch.int16 else np.uint32)


def token_rows(tokens: Tensor, row_targets: Sequence[int], *, eos_id: int, isolate_documents: bool) -> TokenRows:
    """TokenRows, with the boundaries of the documents if they are to be isolated, pinned if the tokens are."""
    if not isolate_documents:
        return TokenRows(tokens, row_targets, None)
    signed_eos = eos_id - 2**16 if tokens.dtype == torch.int16 and eos_id >= 2**15 else eos_id
    boundaries = document_boundaries(tokens[:, :-1], signed_eos)
    return TokenRows(tokens, row_targets, boundaries.pinned() if tokens.is_pinned() else boundaries)


def collate(samples: Sequence[NDArray], sequence_length: int, eos_id: int) -> TokenRows:
    """Stacks samples of at most sequence_length + 1 tokens; what a short one lacks is EOS, which is no target."""
    tokens = torch.full((len(samples), sequence_length + 1), eos_id, dtype=torch.int32)
    for row, sample in zip(as_unsigned(tokens), samples):
        row[: len(sample)] = sample
    return TokenRows(tokens, [max(0, len(sample) - 1) for sample in samples], None)


def _widened(narrow: Tensor) -> Tensor:
    wide = narrow.to(torch.int64, memory_format=torch.contiguous_format)
    return wide.bitwise_and_(0xFFFF) if narrow.dtype == torch.int16 else wide

"""What one forward and backward reads: inputs, targets, and where documents begin; on the host, and on the device."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import DocumentBoundaries, boundaries_from_starts, document_boundaries
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
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """What an objective wants beside tokens, by name, such as the log-probabilities of a reference model."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; the copy does not wait when the memory is pinned."""
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.boundaries.to(device) if self.boundaries is not None else None,
            self.num_targets,
            {name: value.to(device, non_blocking=True) for name, value in self.extra.items()},
        )

    @property
    def num_units(self) -> int:
        """What an objective's sums are divided by: the targets, unless it counts otherwise."""
        return self.num_targets

    @property
    def num_tokens(self) -> int:
        """Inputs that are computed."""
        return self.tokens.numel()

    @property
    def document_numbers(self) -> Tensor:
        """The number of each input's document in its row, from 0: (B, T)."""
        if self.boundaries is None:
            return torch.zeros_like(self.tokens)
        return self.boundaries.ids_BT - self.boundaries.ids_BT[:, :1]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRows:
    """A batch on the host, as narrow as in the shards: a quarter of the bytes of int64, tokens and targets in one.

    Row r has row_targets[r] targets: its tokens 1..row_targets[r], each with the token before it as input; or, where
    `trained` is given, those of them that it marks.

    Shapes: tokens (B, T + 1); trained (B, T).
    Dtypes: tokens int16, which holds the bits of uint16 because torch can do little with that one, or int32.
    """

    tokens: Tensor
    row_targets: Sequence[int]
    boundaries: DocumentBoundaries | None
    trained: Tensor | None = None
    extra: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """See `Batch.extra`."""
    num_pairs: int | None = None
    """Of rows that hold pairs of answers: how many."""

    @property
    def num_targets(self) -> int:
        """Targets of all rows together."""
        return sum(self.row_targets)

    @property
    def num_units(self) -> int:
        """What an objective's sums are divided by: the pairs of answers where rows hold some, else the targets."""
        return self.num_targets if self.num_pairs is None else self.num_pairs

    @property
    def num_tokens(self) -> int:
        """Inputs of the rows that have a target."""
        return (self.tokens.shape[1] - 1) * sum(count > 0 for count in self.row_targets)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, widened there; the copy does not wait when the memory is pinned."""
        narrow = self.tokens.to(device, non_blocking=True)
        targets = _widened(narrow[:, 1:])
        num_targets = self.num_targets
        if self.trained is not None:
            targets = targets.masked_fill(~self.trained.to(device, non_blocking=True), IGNORE)
        elif num_targets < targets.numel():
            ends = torch.tensor(self.row_targets, dtype=torch.int64, pin_memory=self.tokens.is_pinned())
            ends = ends.to(device, non_blocking=True)
            behind_end = torch.arange(targets.shape[1], device=device) >= ends[:, None]
            targets = targets.masked_fill(behind_end, IGNORE)
        boundaries = self.boundaries.to(device) if self.boundaries is not None else None
        extra = {name: value.to(device, non_blocking=True) for name, value in self.extra.items()}
        return Batch(_widened(narrow[:, :-1]), targets, boundaries, num_targets, extra)


def empty_rows(num_rows: int, sequence_length: int, token_bytes: int, pin_memory: bool = False) -> Tensor:
    """Room for the tokens of TokenRows, to be filled through `as_unsigned`; token_bytes is 2 or 4."""
    dtype = {2: torch.int16, 4: torch.int32}[token_bytes]
    return torch.empty(num_rows, sequence_length + 1, dtype=dtype, pin_memory=pin_memory)


def as_unsigned(tokens: Tensor) -> NDArray[np.unsignedinteger]:
    """The memory of TokenRows' tokens as the unsigned integers that it holds."""
    return tokens.numpy().view(np.uint16 if tokens.dtype == torch.int16 else np.uint32)


def token_rows(
    tokens: Tensor,
    row_targets: Sequence[int],
    *,
    eos_id: int,
    isolate_documents: bool,
    trained: NDArray[np.bool_] | None = None,
    starts: NDArray[np.bool_] | None = None,
) -> TokenRows:
    """TokenRows, with the boundaries of the documents if they are to be isolated, pinned if the tokens are.

    `trained` and `starts`, (B, T), mark the targets that count and the inputs that begin a document, for rows that do
    not tell by themselves: there every target counts, and documents, whose starts are found by EOS, see each other
    unless they are isolated.
    """
    boundaries = None
    if starts is not None:
        boundaries = boundaries_from_starts(torch.from_numpy(starts))
    elif isolate_documents:
        signed_eos = eos_id - 2**16 if tokens.dtype == torch.int16 and eos_id >= 2**15 else eos_id
        boundaries = document_boundaries(tokens[:, :-1], signed_eos)
    marks = None
    if trained is not None:
        marks, row_targets = torch.from_numpy(trained), trained.sum(axis=1).tolist()
    if tokens.is_pinned():
        boundaries = boundaries.pinned() if boundaries is not None else None
        marks = marks.pin_memory() if marks is not None else None
    return TokenRows(tokens, row_targets, boundaries, marks)


def collate(samples: Sequence[NDArray], sequence_length: int, eos_id: int) -> TokenRows:
    """Stacks samples of at most sequence_length + 1 tokens; what a short one lacks is EOS, which is no target."""
    tokens = torch.full((len(samples), sequence_length + 1), eos_id, dtype=torch.int32)
    for row, sample in zip(as_unsigned(tokens), samples):
        row[: len(sample)] = sample
    return TokenRows(tokens, [max(0, len(sample) - 1) for sample in samples], None)


def _widened(narrow: Tensor) -> Tensor:
    wide = narrow.to(torch.int64, memory_format=torch.contiguous_format)
    return wide.bitwise_and_(0xFFFF) if narrow.dtype == torch.int16 else wide

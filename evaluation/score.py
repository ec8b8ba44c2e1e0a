"""How well a model predicts held-out tokens, as sums that add up over batches and ranks."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_prep.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE, cross_entropy_sum
from model.batch import Batch, collate
from model.transformer import logits
from resume.samples import SampleReader


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Sums over held-out targets; they add up over batches and ranks, and are divided at the very end."""

    loss_sum: float = 0.0
    num_targets: float = 0
    num_bytes: float = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.loss_sum + other.loss_sum, self.num_targets + other.num_targets, self.num_bytes + other.num_bytes
        )

    @property
    def loss_mean(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.num_targets if self.num_targets else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(min(self.loss_mean, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits of loss per byte of text."""
        return self.loss_sum / math.log(2) / self.num_bytes if self.num_bytes else math.nan


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], token_bytes: NDArray[np.int32], device: torch.device) -> Score:
    """Sums loss, targets and bytes over batches; the model is left in the mode it came in.

    Shapes: token_bytes (V,), the bytes each token stands for.
    """
    was_training = model.training
    model.eval()
    total = Score()
    for batch in batches:
        on_device = batch.to(device)
        loss_sum = model(
            on_device.tokens,
            on_device.boundaries,
            readout=lambda hidden, head, targets=on_device.targets: cross_entropy_sum(logits(hidden, head), targets),
        )
        targets = batch.targets[batch.targets != IGNORE].numpy()
        total += Score(loss_sum.item(), batch.num_targets, int(token_bytes[targets].sum()))
    model.train(was_training)
    return total


def shard_batches(
    reader: SampleReader,
    *,
    num_sequences: int,
    batch_size: int,
    eos_id: int,
    isolate_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """num_sequences samples spread evenly over a split (all, if it has fewer), dealt to the ranks batch by batch.

    Every rank gets the same number of batches, empty ones if need be: a sharded model's forward is a collective.
    """
    ends = np.cumsum([file.num_samples(reader.sequence_length) for file in reader.files])
    total = int(ends[-1])
    chosen = min(num_sequences, total)
    for start in range(0, chosen, batch_size * world_size):
        mine = np.arange(start + rank * batch_size, min(start + (rank + 1) * batch_size, chosen)) * total // chosen
        files = np.searchsorted(ends, mine, side="right")
        behind = ends[files] - mine  # samples from here to the end of the file
        lengths = [reader.files[file].num_samples(reader.sequence_length) for file in files]
        samples = [reader.read(f, n - b) for f, n, b in zip(files.tolist(), lengths, behind.tolist(), strict=True)]
        nothing = np.full(1, eos_id)
        yield collate(samples or [nothing], reader.sequence_length, eos_id, isolate_documents)


def text_batches(tokens: Sequence[int], *, sequence_length: int, batch_size: int, eos_id: int) -> Iterator[Batch]:
    """Consecutive windows over one document: every token is a target once, the first one after EOS."""
    stream = np.array([eos_id, *tokens], dtype=np.int64)
    starts = range(0, len(stream) - 1, sequence_length)
    samples = [stream[start : start + sequence_length + 1] for start in starts]
    for first in range(0, len(samples), batch_size):
        yield collate(samples[first : first + batch_size], sequence_length, eos_id)


def padded_token_bytes(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int32]:
    """Bytes per token id (vocab_size,); ids that the model has beyond the tokenizer's stand for none."""
    token_bytes = tokenizer.token_bytes()
    return np.pad(token_bytes, (0, vocab_size - len(token_bytes)))


def unigram_entropy(tokens: NDArray) -> float:
    """The entropy in nats of the tokens' own frequencies: the loss of the best model that ignores context."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())

"""How well a model predicts held-out tokens, as sums that add up over batches and ranks."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.tokenizing.tokenizer import Tokenizer
from kernels.cross_entropy import IGNORE
from kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.batch import TokenRows, as_unsigned, collate, empty_rows, token_rows
from model.transformer import Transformer
from resume.samples import NO_SAMPLE, RowsRead, SampleReader

Annotate = Callable[[TokenRows, NDArray[np.int64], NDArray[np.int64]], TokenRows]
"""(rows, files, samples) -> the rows with what an objective wants beside tokens; files are indices into the reader's,
samples NO_SAMPLE in rows that are empty."""


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
def score(
    model: Transformer, batches: Iterable[TokenRows], token_bytes: NDArray[np.int32], device: torch.device
) -> Score:
    """Sums loss, targets and bytes over batches; the model is left in the mode it came in.

    Shapes: token_bytes (V,), the bytes each token stands for.
    """
    soft_cap = model.config.logit_softcap
    was_training = model.training
    model.eval()
    token_bytes_V = torch.from_numpy(token_bytes).to(device)
    total = Score()
    for rows in batches:
        batch = rows.to(device)
        loss_sum = model(
            batch.tokens,
            batch.boundaries,
            readout=lambda hidden, head, targets=batch.targets: linear_cross_entropy_sum(
                hidden, head, targets, soft_cap=soft_cap
            ),
        )
        num_bytes = token_bytes_V[batch.targets[batch.targets != IGNORE]].sum()
        total += Score(loss_sum.item(), batch.num_targets, int(num_bytes.item()))
    model.train(was_training)
    return total


def shard_batches(
    reader: SampleReader,
    *,
    num_sequences: int,
    batch_size: int,
    isolate_documents: bool = False,
    rank: int = 0,
    world_size: int = 1,
    annotate: Annotate | None = None,
) -> Iterator[TokenRows]:
    """num_sequences samples spread evenly over a split (all, if it has fewer), dealt to the ranks batch by batch.

    Every rank gets the same number of batches, empty ones if need be: a sharded model's forward is a collective. Every
    batch has batch_size rows, empty ones if need be: a compiled model is compiled for one shape.
    """
    ends = np.cumsum([file.num_samples(reader.sequence_length) for file in reader.files])
    total = int(ends[-1])
    chosen = min(num_sequences, total)
    for start in range(0, chosen, batch_size * world_size):
        places = np.arange(start + rank * batch_size, start + (rank + 1) * batch_size)
        spread = np.minimum(places, chosen - 1) * total // chosen
        files = np.searchsorted(ends, spread, side="right")
        firsts = np.concatenate(([0], ends))[files]
        samples = np.where(places < chosen, spread - firsts, NO_SAMPLE)
        tokens = empty_rows(batch_size, reader.sequence_length, reader.dtype.itemsize)
        read = reader.read_into(files, samples, as_unsigned(tokens))
        batch = rows_of(reader, tokens, read, slice(None), isolate_documents)
        yield batch if annotate is None else annotate(batch, files, samples)


def rows_of(
    reader: SampleReader, tokens: torch.Tensor, read: RowsRead, chosen: slice, isolate_documents: bool
) -> TokenRows:
    """Some of the rows that a reader has read as a batch; `tokens` are these rows'."""
    marked = {}
    if read.trained is not None and read.starts is not None:
        marked = {"trained": read.trained[chosen], "starts": read.starts[chosen]}
    row_targets = read.num_targets[chosen].tolist()
    return token_rows(tokens, row_targets, eos_id=reader.eos_id, isolate_documents=isolate_documents, **marked)


def text_batches(tokens: Sequence[int], *, sequence_length: int, batch_size: int, eos_id: int) -> Iterator[TokenRows]:
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

"""Rows of documents, laid out as chat data are: a token of context, documents of prompt and answer, then EOS."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.attention import boundaries_from_starts
from kernels.cross_entropy import IGNORE
from model.batch import Batch

Document = tuple[list[int], list[int]]
"""Prompt and answer, of which the answer is trained."""
EOS = 0


def packed(rows: Sequence[Sequence[Document]], length: int, extra: Mapping[str, Tensor] | None = None) -> Batch:
    """A batch with `length` inputs in each row, the last token of a full row being a target only."""
    tokens = torch.full((len(rows), length + 1), EOS)
    starts, is_trained = torch.zeros(2, len(rows), length + 1, dtype=torch.bool)
    for row, documents in enumerate(rows):
        end = 1
        starts[row, 0] = True
        for prompt, answer in documents:
            starts[row, end] = True
            is_trained[row, end + len(prompt) : end + len(prompt) + len(answer)] = True
            tokens[row, end : end + len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            end += len(prompt) + len(answer)
        assert end <= length + 1, f"row {row}: {end - 1} tokens for {length}"
        if end <= length:
            starts[row, end] = True
    targets = tokens[:, 1:].masked_fill(~is_trained[:, 1:], IGNORE)
    boundaries = boundaries_from_starts(starts[:, :-1])
    return Batch(tokens[:, :-1], targets, boundaries, int(is_trained.sum()), extra or {})


def random_documents(count: int, vocab_size: int, seed: int, most_tokens: int = 5) -> list[Document]:
    """Prompts and answers of 1 to most_tokens tokens, none of them EOS."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        size = int(torch.randint(1, most_tokens + 1, (), generator=generator))
        return torch.randint(1, vocab_size, (size,), generator=generator).tolist()

    return [(text(), text()) for _ in range(count)]

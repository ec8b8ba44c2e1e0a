"""How likely a model finds continuations of contexts: what multiple choice compares.

Requests that read the same tokens are one row of a batch: of four letters behind one question, one is computed. Rows
that begin alike (a subject's examples) share the keys and values of what they have in common, which is read once. What
to share is found from the tokens alone: rows are sorted, the common beginnings of neighbours make a tree, and each node
of it is one group, or leaves its rows to the nodes below, whichever saves more.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from kernels.launch import sum_dtype
from model.cache import KVCache
from model.config import ModelConfig
from model.transformer import Transformer, soft_capped

READOUT_ROWS = 1_024
"""Positions whose logits are whole at a time."""


class LikelihoodError(ValueError):
    """A context or continuation that cannot be scored; the message says which and why."""


class LogLikelihood(NamedTuple):
    """What a model thinks of one continuation."""

    sum: float
    """Log-probability of all its tokens, in nats."""
    num_tokens: int
    is_greedy: bool
    """Whether each token is the likeliest one."""


@dataclass(slots=True)
class _Row:
    """Tokens to read for some requests; of the first num_shareable, no output is wanted."""

    tokens: NDArray[np.uint32]
    num_shareable: int
    requests: list[int]


class _Group(NamedTuple):
    rows: list[_Row]
    num_shared: int
    """Tokens at their beginning that all rows have in common, and that are read once."""


@torch.inference_mode()
def log_likelihoods(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    pass_cost: int = 1_024,
) -> list[LogLikelihood]:
    """Scores each (context, continuation), both in tokens, in the order given.

    pass_cost is what one more forward pass costs, in tokens: groups that save less read everything anew.

    Dtypes: logits are products in fp32 (fp64 of fp64 models): in bf16 the choices of a question often tie.
    Raises:
        LikelihoodError: a context or continuation is empty, or longer than the model's context, or has foreign ids.
    """
    results: list[LogLikelihood | None] = [None] * len(pairs)
    groups = _groups(_rows(model.config, pairs), pass_cost)
    num_rows = sum(len(group.rows) for group in groups)
    with tqdm(total=num_rows, desc="score", unit="row", disable=None, leave=False) as progress:
        for group in groups:
            prefix = _read_prefix(model, group)
            for rows in _batches(group.rows, batch_size):
                for request, result in _score_rows(model, rows, prefix, pairs):
                    results[request] = result
                progress.update(len(rows))
    return [result for result in results if result is not None]


def _rows(config: ModelConfig, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
    """The different inputs, in the order of their shareable beginnings."""
    rows: dict[bytes, _Row] = {}
    for request, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise LikelihoodError(f"request {request}: an empty {'continuation' if context else 'context'}")
        ids = np.array([*context, *continuation], dtype=np.int64)
        if len(ids) - 1 > config.context_length:
            raise LikelihoodError(
                f"request {request}: {len(ids) - 1} tokens to read in a context of {config.context_length}; shorten it"
            )
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise LikelihoodError(
                f"request {request}: an id outside the model's vocabulary of {config.vocab_size}; "
                "it was encoded with another tokenizer"
            )
        tokens = ids[:-1].astype(">u4")  # big-endian, so that bytes sort as tokens do
        row = rows.setdefault(tokens.tobytes(), _Row(tokens, len(context) - 1, []))
        row.num_shareable = min(row.num_shareable, len(context) - 1)
        row.requests.append(request)
    return sorted(rows.values(), key=lambda row: row.tokens[: row.num_shareable].tobytes())


@dataclass(slots=True)
class _Node:
    """Neighbouring rows with `depth` tokens in common, from `first` on, and the best division of them so far."""

    depth: int
    first: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)


def _groups(rows: Sequence[_Row], pass_cost: int) -> list[_Group]:
    """Sorted rows by what they share; first those that share nothing, together."""
    divisions = _shared(_common_lengths(rows), pass_cost)
    in_groups = np.zeros(len(rows), dtype=bool)
    for first, end, _ in divisions:
        in_groups[first:end] = True
    alone = [row for row, is_grouped in zip(rows, in_groups, strict=True) if not is_grouped]
    shared = [_Group(list(rows[first:end]), depth) for first, end, depth in divisions]
    return [_Group(alone, 0), *shared] if alone else shared


def _common_lengths(rows: Sequence[_Row]) -> list[int]:
    """Shareable tokens that each row has in common with the next one; the last has none."""
    if not rows:
        return []
    lengths = []
    for row, following in itertools.pairwise(rows):
        shortest = min(row.num_shareable, following.num_shareable)
        differences = np.flatnonzero(row.tokens[:shortest] != following.tokens[:shortest])
        lengths.append(int(differences[0]) if len(differences) else shortest)
    return [*lengths, 0]


def _shared(depths: Sequence[int], pass_cost: int) -> list[tuple[int, int, int]]:
    """(first, end, tokens in common) of the groups that save most, from what each row has in common with the next."""
    open_nodes = [_Node(0, 0)]
    for row, depth in enumerate(depths):
        first, saved, groups = row, 0, []
        while open_nodes[-1].depth > depth:  # a node that ends with this row
            node = open_nodes.pop()
            first, saved, groups = node.first, node.saved + saved, node.groups + groups
            saved_as_one = node.depth * (row - first) - pass_cost
            if saved_as_one > saved:
                saved, groups = saved_as_one, [(first, row + 1, node.depth)]
        if open_nodes[-1].depth < depth:
            open_nodes.append(_Node(depth, first))
        open_nodes[-1].saved += saved
        open_nodes[-1].groups.extend(groups)
    return open_nodes[0].groups


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Rows of like length together, the longest first: memory that is too small shows at once."""
    by_length = sorted(rows, key=lambda row: -len(row.tokens))
    for first in range(0, len(rows), batch_size):
        yield by_length[first : first + batch_size]


def _read_prefix(model: Transformer, group: _Group) -> KVCache | None:
    """The keys and values of what the rows have in common."""
    if not group.num_shared:
        return None
    weight = model.embedding.weight
    prefix = KVCache(model.config, 1, group.num_shared, weight.dtype, weight.device)
    tokens = torch.from_numpy(group.rows[0].tokens[None, : group.num_shared].astype(np.int64))
    model(tokens.to(weight.device), cache=prefix, readout=lambda hidden, head: hidden)
    return prefix


def _score_rows(
    model: Transformer,
    rows: Sequence[_Row],
    prefix: KVCache | None,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Iterator[tuple[int, LogLikelihood]]:
    """One forward pass. Rows are padded behind: a causal model's outputs never depend on what comes later."""
    weight, num_read = model.embedding.weight, prefix.length if prefix else 0
    padded = np.zeros((len(rows), max(len(row.tokens) for row in rows) - num_read), dtype=np.int64)
    places, targets, lengths = [], [], []
    for number, row in enumerate(rows):
        padded[number, : len(row.tokens) - num_read] = row.tokens[num_read:]
        for request in row.requests:
            context, continuation = pairs[request]
            start = number * padded.shape[1] + len(context) - 1 - num_read
            places.extend(range(start, start + len(continuation)))
            targets.extend(continuation)
            lengths.append(len(continuation))
    cache = None
    if prefix:
        cache = KVCache(model.config, len(rows), num_read + padded.shape[1], weight.dtype, weight.device)
        cache.copy_row(prefix)
    places_N, targets_N = (torch.tensor(ids, device=weight.device) for ids in (places, targets))

    def readout(hidden_BTD: Tensor, head_VD: Tensor) -> Tensor:
        return _scores(hidden_BTD.flatten(0, 1)[places_N], head_VD, targets_N, model.config.logit_softcap)

    scores = model(torch.from_numpy(padded).to(weight.device), cache=cache, readout=readout).cpu()
    requests = [request for row in rows for request in row.requests]
    for request, part in zip(requests, scores.split(lengths, dim=1), strict=True):
        yield request, LogLikelihood(part[0].sum().item(), part.shape[1], bool(part[1].all().item()))


def _scores(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, soft_cap: float | None) -> Tensor:
    """(2, N) in fp64: the log-probability of each target, and whether it is the likeliest token."""
    dtype = sum_dtype(hidden_ND)
    exact_head_VD, pieces = head_VD.to(dtype), []
    chunks = zip(hidden_ND.split(READOUT_ROWS), targets_N.split(READOUT_ROWS), strict=True)
    for hidden_MD, targets_M in chunks:
        logits_MV = soft_capped(F.linear(hidden_MD.to(dtype), exact_head_VD), soft_cap)
        log_probs_M = logits_MV.log_softmax(dim=-1).gather(1, targets_M[:, None])[:, 0]
        pieces.append(torch.stack((log_probs_M.double(), (logits_MV.argmax(dim=-1) == targets_M).double())))
    return torch.cat(pieces, dim=1)

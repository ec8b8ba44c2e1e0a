"""Generation with a KV cache: prompts are read once, then every step reads one token per sample.

How the next token is chosen is told in evaluation/sampling.py.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.sampling import GenerationError, Sampling, choose, seen_tokens
from kernels.launch import sum_dtype
from model.cache import KVCache
from model.transformer import Transformer, soft_capped


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    num_samples: int = 1,
) -> Iterator[list[int | None]]:
    """Continues a prompt, yielding after each step the new token of every sample, None for those that have ended.

    A sample ends with the first of stop_ids, which is yielded. All end after max_new_tokens, or when prompt and
    continuation fill the model's context_length. The arguments are checked here, not at the first step.

    Raises:
        GenerationError: the prompt is empty, leaves no room in the context, or has ids outside the vocabulary; a count
            is not positive; later, the logits are NaN.
    """
    limit = checked_limit(model, prompt, max_new_tokens, num_samples)
    # Ended samples go on being computed and ignored: with rows dropped, another matrix product might round the other
    # samples' logits differently.
    return _steps(model, [prompt], [limit], sampling, frozenset(stop_ids), num_samples, drops_ended=False)


def complete(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    num_samples: int = 1,
) -> list[list[int]]:
    """The whole continuation of every sample, a stop token included as its last; see `generate`."""
    steps = generate(
        model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, num_samples=num_samples
    )
    return _collected(steps, num_samples)


def complete_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    num_samples: int = 1,
    batch_size: int | None = None,
    first_samples: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """The samples of each prompt, as `complete` gives them one by one, with prompts of any lengths read together.

    Draws go by the number of a sample: of each prompt they are counted from its number in first_samples on, by default
    from 0, so that equal prompts get equal samples.

    At most batch_size samples are computed at a time, but always those of a whole prompt; by default all. Samples that
    have ended leave the computation, so that logits may be rounded otherwise than one by one.

    Raises:
        GenerationError: as `generate`, before anything is computed; batch_size is not positive.
    """
    if batch_size is not None and batch_size < 1:
        raise GenerationError(f"batch_size = {batch_size}: must be at least 1; leave it out to take all at once")
    limits = [checked_limit(model, prompt, max_new_tokens, num_samples, f"prompt {i}: ") for i, prompt in
              enumerate(prompts)]  # fmt: skip
    num_together = len(prompts) if batch_size is None else max(1, batch_size // num_samples)
    answers: list[list[list[int]]] = [[] for _ in prompts]
    for batch in _batches(model, [len(prompt) for prompt in prompts], num_together):
        steps = _steps(
            model, [prompts[i] for i in batch], [limits[i] for i in batch], sampling, frozenset(stop_ids), num_samples,
            drops_ended=True, first_samples=[first_samples[i] for i in batch] if first_samples is not None else None,
        )  # fmt: skip
        rows = _collected(steps, len(batch) * num_samples)
        for place, i in enumerate(batch):
            answers[i] = rows[place * num_samples : (place + 1) * num_samples]
    return answers


def checked_limit(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int, num_samples: int = 1, where: str = ""
) -> int:
    """How many tokens may follow a prompt; see `generate` for what is refused."""
    config = model.config
    if max_new_tokens < 1 or num_samples < 1:
        raise GenerationError(f"max_new_tokens = {max_new_tokens}, num_samples = {num_samples}: must be at least 1")
    if not prompt:
        raise GenerationError(
            f"{where}the prompt is empty; start from the end-of-document token to generate from nothing"
        )
    if len(prompt) >= config.context_length:
        raise GenerationError(
            f"{where}the prompt has {len(prompt)} tokens, which leaves no room in a context of "
            f"{config.context_length}; shorten it"
        )
    foreign = [token for token in prompt if not 0 <= token < config.vocab_size]
    if foreign:
        raise GenerationError(
            f"{where}the prompt has the id {foreign[0]}, the model's vocabulary ends at {config.vocab_size - 1}; "
            "it was encoded with another tokenizer"
        )
    return min(max_new_tokens, config.context_length - len(prompt))


def empty_cache(
    model: Transformer, batch_size: int, capacity: int, *, padding: Sequence[int] = (), num_recallable: int = 0
) -> KVCache:
    """A cache of the model's dtype, where the model is."""
    weight = model.embedding.weight
    return KVCache(
        model.config, batch_size, capacity, weight.dtype, weight.device, padding=padding, num_recallable=num_recallable
    )


def read(model: Transformer, rows: Sequence[Sequence[int]], cache: KVCache, num_scored: int = 1) -> Tensor:
    """Reads tokens behind the cached ones and returns the logits that follow the last num_scored of each row.

    Shapes: (B, num_scored, V): the logits of a long prompt's other tokens would be gigabytes.
    Dtypes: fp32 at least.
    """
    soft_cap = model.config.logit_softcap

    def readout(hidden_BTD: Tensor, head_VD: Tensor) -> Tensor:
        logits_BNV = F.linear(hidden_BTD[:, -num_scored:], head_VD)
        return soft_capped(logits_BNV.to(sum_dtype(logits_BNV)), soft_cap)

    return model(torch.tensor(rows, device=model.embedding.weight.device), cache=cache, readout=readout)


@torch.inference_mode()
def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    sampling: Sampling,
    stop_ids: frozenset[int],
    num_samples: int,
    *,
    drops_ended: bool,
    first_samples: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """Yields the new tokens of every sample, those of a prompt side by side, with as many tokens as its limit."""
    num_rows = len(prompts) * num_samples
    logits_BV, cache = _read_prompts(model, prompts, max(limits), num_samples)
    seen_BV = seen_tokens((prompts[row // num_samples] for row in range(num_rows)), sampling, logits_BV)
    numbers = [
        row % num_samples + (first_samples[row // num_samples] if first_samples else 0) for row in range(num_rows)
    ]
    live = list(range(num_rows))  # the samples that the rows of the cache are of
    has_ended = [False] * num_rows
    for step in range(max(limits)):
        tokens = choose(logits_BV, sampling, step, samples=[numbers[row] for row in live], seen_BV=seen_BV)
        new: list[int | None] = [None] * num_rows
        for row, token in zip(live, tokens, strict=True):
            if not has_ended[row]:
                new[row] = token
                has_ended[row] = token in stop_ids or step + 1 == limits[row // num_samples]
        yield new
        if all(has_ended):
            return
        kept = [place for place, row in enumerate(live) if not has_ended[row]]
        if drops_ended and 2 * len(kept) <= len(live):  # else copying the cache costs more than it saves
            cache.select(kept)
            live, tokens = [live[place] for place in kept], [tokens[place] for place in kept]
            seen_BV = seen_BV[kept] if seen_BV is not None else None
        logits_BV = read(model, [[token] for token in tokens], cache)[:, -1]
        if seen_BV is not None:
            seen_BV[range(len(tokens)), tokens] = True


def _read_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], num_new: int, num_samples: int
) -> tuple[Tensor, KVCache]:
    """The logits after every prompt, and the cache, each row as often as it has samples."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = empty_cache(model, len(prompts), longest + num_new, padding=padding)
    padded = [[prompt[0]] * missing + list(prompt) for prompt, missing in zip(prompts, padding, strict=True)]
    logits_BV = read(model, padded, cache)[:, -1]
    if num_samples > 1:
        cache.select([row for row in range(len(prompts)) for _ in range(num_samples)])
    return logits_BV.repeat_interleave(num_samples, dim=0), cache


def _batches(model: Transformer, lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of prompts to be continued together, the longest first: what does not fit into memory shows at once."""
    # The chunks of chunk_soft experts are counted from the first token, so that rows in step are as long.
    has_chunks = bool(model.config.expert_layers) and model.config.moe.kind == "chunk_soft"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for _, group in itertools.groupby(order, key=lambda i: lengths[i] if has_chunks else None):
        together = list(group)
        yield from (together[start : start + size] for start in range(0, len(together), size))


def _collected(steps: Iterator[list[int | None]], num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for tokens in steps:
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows

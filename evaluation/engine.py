"""Generation with a KV cache: the prompt is read once, then every step reads one token per sample.

Temperature divides the logits, top-k keeps the k likeliest tokens, top-p then keeps the fewest of those whose
probabilities, summed from the top, reach p. The token is drawn by inverting the cumulative distribution at a uniform
number that depends on (seed, step, sample) alone: the same on every device, and whatever the other samples do.

Source: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p).
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import sum_dtype
from model.cache import KVCache
from model.transformer import Transformer, soft_capped


class GenerationError(ValueError):
    """A prompt or a setting that cannot be generated from; the message says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep only the k likeliest tokens."""
    top_p: float | None = None
    """Keep only the likeliest tokens whose probabilities together reach p."""
    seed: int = 0
    """Equal seeds give equal samples."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k = {self.top_k}: must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p = {self.top_p}: must be above 0 and at most 1")


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
    _check(model, prompt, max_new_tokens, num_samples)
    num_steps = min(max_new_tokens, model.config.context_length - len(prompt))
    return _steps(model, list(prompt), num_steps, sampling, frozenset(stop_ids), num_samples)


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
    samples: list[list[int]] = [[] for _ in range(num_samples)]
    for tokens in generate(
        model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, num_samples=num_samples
    ):
        for sample, token in zip(samples, tokens, strict=True):
            if token is not None:
                sample.append(token)
    return samples


def choose(logits_BV: Tensor, sampling: Sampling, step: int) -> list[int]:
    """The next token of each sample B, from the logits that follow its last token.

    Raises:
        GenerationError: a logit is NaN.
    """
    if logits_BV.isnan().any():
        raise GenerationError(f"the model's logits are NaN at step {step}: its weights or its dtype are broken")
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1).tolist()
    num_kept = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    kept_BK, ids_BK = logits_BV.topk(num_kept, dim=-1)
    # On the CPU in fp64: a few thousand numbers, and the draw is then the same function on every device.
    kept_BK = kept_BK.cpu().double()
    # The likeliest becomes 0 before the division, which a tiny temperature would otherwise take to infinity.
    probabilities_BK = ((kept_BK - kept_BK[:, :1]) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p is not None:
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK
        probabilities_BK = probabilities_BK * (before_BK < sampling.top_p)
    cumulative_BK = probabilities_BK.cumsum(dim=-1)
    uniform_B = torch.tensor(
        [_uniform(sampling.seed, step, sample) for sample in range(len(cumulative_BK))], dtype=torch.float64
    )
    threshold_B1 = uniform_B[:, None] * cumulative_BK[:, -1:]
    # right=True: the first entry strictly above the threshold, hence one of positive probability.
    drawn_B1 = torch.searchsorted(cumulative_BK, threshold_B1, right=True).clamp_(max=num_kept - 1)
    return ids_BK.cpu().gather(1, drawn_B1).flatten().tolist()


@torch.inference_mode()
def _steps(
    model: Transformer,
    prompt: list[int],
    num_steps: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    num_samples: int,
) -> Iterator[list[int | None]]:
    device = model.embedding.weight.device
    has_ended = [False] * num_samples
    logits_BV, cache = _read_prompt(model, prompt, len(prompt) + num_steps, num_samples)
    for step in range(num_steps):
        tokens = choose(logits_BV, sampling, step)
        yield [None if ended else token for token, ended in zip(tokens, has_ended, strict=True)]
        has_ended = [ended or token in stop_ids for token, ended in zip(tokens, has_ended, strict=True)]
        if all(has_ended) or step == num_steps - 1:
            return
        # Ended samples go on being computed and ignored: with rows dropped, another matrix product might round the
        # other samples' logits differently.
        tokens_BT = torch.tensor(tokens, device=device)[:, None]
        logits_BV = _last_logits(model, tokens_BT, cache)


def _read_prompt(model: Transformer, prompt: list[int], capacity: int, num_samples: int) -> tuple[Tensor, KVCache]:
    """Reads the prompt as one row, then gives every sample a copy of its keys, values and last logits."""
    weight = model.embedding.weight
    tokens_BT = torch.tensor([prompt], device=weight.device)
    if num_samples == 1:
        cache = KVCache(model.config, 1, capacity, weight.dtype, weight.device)
        return _last_logits(model, tokens_BT, cache), cache
    row = KVCache(model.config, 1, len(prompt), weight.dtype, weight.device)
    logits_BV = _last_logits(model, tokens_BT, row)
    cache = KVCache(model.config, num_samples, capacity, weight.dtype, weight.device)
    cache.copy_row(row)
    return logits_BV.expand(num_samples, -1), cache


def _last_logits(model: Transformer, tokens_BT: Tensor, cache: KVCache) -> Tensor:
    """(B, V) in fp32 at least, after the last of tokens: the logits of a long prompt's others would be gigabytes."""
    soft_cap = model.config.logit_softcap

    def readout(hidden_BTD: Tensor, head_VD: Tensor) -> Tensor:
        logits_BV = F.linear(hidden_BTD[:, -1], head_VD)
        return soft_capped(logits_BV.to(sum_dtype(logits_BV)), soft_cap)

    return model(tokens_BT, cache=cache, readout=readout)


def _uniform(seed: int, step: int, sample: int) -> float:
    """A number of [0, 1) with 53 random bits."""
    digest = hashlib.blake2b(f"generate|{seed}|{step}|{sample}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _check(model: Transformer, prompt: Sequence[int], max_new_tokens: int, num_samples: int) -> None:
    config = model.config
    if not prompt:
        raise GenerationError("the prompt is empty; start from the end-of-document token to generate from nothing")
    if len(prompt) >= config.context_length:
        raise GenerationError(
            f"the prompt has {len(prompt)} tokens, which leaves no room in a context of {config.context_length}; "
            "shorten it"
        )
    foreign = [token for token in prompt if not 0 <= token < config.vocab_size]
    if foreign:
        raise GenerationError(
            f"the prompt has the id {foreign[0]}, the model's vocabulary ends at {config.vocab_size - 1}; "
            "it was encoded with another tokenizer"
        )
    if max_new_tokens < 1 or num_samples < 1:
        raise GenerationError(f"max_new_tokens = {max_new_tokens}, num_samples = {num_samples}: must be at least 1")

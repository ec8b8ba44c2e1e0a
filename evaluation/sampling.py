"""How the next token is chosen from logits.

A repetition penalty divides the positive logits of tokens that are there already, and multiplies the negative ones.
Temperature divides the logits, top-k keeps the k likeliest tokens, top-p then keeps the fewest of those whose
probabilities, summed from the top, reach p, and min-p those that are at least p times as likely as the likeliest. The
token is drawn by inverting the cumulative distribution at a uniform number that depends on (seed, step, sample) alone:
the same on every device, and whatever the other samples do.

Source: Keskar et al., "CTRL", 2019, section 4.1 (repetition penalty); Holtzman et al., "The Curious Case of Neural Text
Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
    min_p: float | None = None
    """Keep only tokens at least p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens of the prompt and the answer so far less likely; 1.2 in the paper."""
    seed: int = 0
    """Equal seeds give equal samples."""

    def __post_init__(self) -> None:
        """Refuses settings that leave nothing to draw from."""
        if not 0.0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature = {self.temperature}: must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k = {self.top_k}: must be at least 1; leave it out to keep every token")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise GenerationError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise GenerationError(f"min_p = {self.min_p}: must be between 0 and 1")
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise GenerationError(f"repetition_penalty = {self.repetition_penalty}: must be positive; 1 is none")


def seen_tokens(rows: Iterable[Sequence[int]], sampling: Sampling, like_BV: Tensor) -> Tensor | None:
    """Which tokens of the vocabulary each row has, (B, V); None where no penalty asks for it."""
    if sampling.repetition_penalty == 1.0:
        return None
    seen_BV = torch.zeros_like(like_BV, dtype=torch.bool)
    for seen_V, row in zip(seen_BV, rows, strict=True):
        seen_V[list(row)] = True
    return seen_BV


def choose(
    logits_BV: Tensor,
    sampling: Sampling,
    step: int,
    *,
    samples: Sequence[int] | None = None,
    seen_BV: Tensor | None = None,
) -> list[int]:
    """The next token of each row, from the logits that follow its last token.

    A row's draw goes by its number among the samples of its prompt, by default its own, and tokens seen are penalised.

    Raises:
        GenerationError: a logit is NaN.
    """
    if sampling.temperature == 0.0:
        return _penalised(logits_BV, sampling, seen_BV, step).argmax(dim=-1).tolist()
    kept_BK, ids_BK = _kept(logits_BV, sampling, seen_BV, step)
    numbers = range(len(logits_BV)) if samples is None else samples
    drawn_B = draw(kept_BK, [uniform(sampling.seed, "generate", step, number) for number in numbers])
    return ids_BK.gather(1, drawn_B[:, None]).flatten().tolist()


def probabilities(logits_BV: Tensor, sampling: Sampling, step: int, seen_BV: Tensor | None = None) -> Tensor:
    """The distribution (B, V) that `choose` draws from, in fp64 on the CPU: all on one token where it is greedy."""
    zeros_BV = torch.zeros(logits_BV.shape, dtype=torch.float64)
    if sampling.temperature == 0.0:
        likeliest_B1 = _penalised(logits_BV, sampling, seen_BV, step).argmax(dim=-1, keepdim=True)
        return zeros_BV.scatter_(1, likeliest_B1.cpu(), 1.0)
    kept_BK, ids_BK = _kept(logits_BV, sampling, seen_BV, step)
    return zeros_BV.scatter_(1, ids_BK, kept_BK / kept_BK.sum(dim=-1, keepdim=True))


def draw(weights_BK: Tensor, uniform_B: Sequence[float]) -> Tensor:
    """A column of each row (B,), with probabilities in proportion to the weights, at numbers of [0, 1)."""
    cumulative_BK = weights_BK.cumsum(dim=-1)
    threshold_B1 = torch.tensor(uniform_B, dtype=torch.float64)[:, None] * cumulative_BK[:, -1:]
    # right=True: the first entry strictly above the threshold, hence one of positive probability.
    return torch.searchsorted(cumulative_BK, threshold_B1, right=True).flatten().clamp_(max=weights_BK.shape[-1] - 1)


def uniform(seed: int, use: str, step: int, sample: int = 0) -> float:
    """A number of [0, 1) with 53 random bits."""
    digest = hashlib.blake2b(f"{use}|{seed}|{step}|{sample}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _kept(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
    """Weights of the tokens that may be drawn, the likeliest first, and their ids; both (B, K) on the CPU."""
    logits_BV = _penalised(logits_BV, sampling, seen_BV, step)
    num_kept = min(sampling.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    kept_BK, ids_BK = logits_BV.topk(num_kept, dim=-1)
    # On the CPU in fp64: a few thousand numbers, and the draw is then the same function on every device.
    kept_BK = kept_BK.cpu().double()
    # The likeliest becomes 0 before the division, which a tiny temperature would otherwise take to infinity.
    weights_BK = ((kept_BK - kept_BK[:, :1]) / sampling.temperature).softmax(dim=-1)
    is_kept_BK = torch.ones_like(weights_BK, dtype=torch.bool)
    if sampling.top_p is not None:
        is_kept_BK = weights_BK.cumsum(dim=-1) - weights_BK < sampling.top_p
    if sampling.min_p is not None:
        is_kept_BK = is_kept_BK & (weights_BK >= sampling.min_p * weights_BK[:, :1])
    return weights_BK * is_kept_BK, ids_BK.cpu()


def _penalised(logits_BV: Tensor, sampling: Sampling, seen_BV: Tensor | None, step: int) -> Tensor:
    if logits_BV.isnan().any():
        raise GenerationError(f"the model's logits are NaN at step {step}: its weights or its dtype are broken")
    if seen_BV is None:
        return logits_BV
    penalty = sampling.repetition_penalty
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)

"""Beam search: the continuations of highest probability, found by keeping the best few after every token.

The score of an answer of n tokens, its stop token included, is the sum of their log-probabilities / n^length_penalty.
Of the candidates of a step, every beam with every next token, the best num_beams may end there, and the best num_beams
that do not end go on. The search is over when num_beams answers have ended and the best beam, divided by its own
n^length_penalty, is no better than the worst of them: the rule of transformers' early_stopping = False.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", 2012; Wu et al., "Google's Neural Machine
Translation System", 2016 (length normalisation).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.engine import checked_limit, empty_cache, read
from evaluation.sampling import GenerationError
from model.transformer import Transformer


class _Beam(NamedTuple):
    tokens: list[int]
    log_probability: float
    parent: int
    """The row of the cache that has all of its tokens but the last."""

    def score(self, length_penalty: float) -> float:
        return self.log_probability / len(self.tokens) ** length_penalty


@torch.inference_mode()
def beam_search(
    model: Transformer,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    length_penalty: float = 1.0,
) -> list[tuple[list[int], float]]:
    """The num_beams best continuations that were found, a stop token included, with their scores, the best first.

    Raises:
        GenerationError: as `generate`; num_beams is not positive.
    """
    num_steps = checked_limit(model, prompt, max_new_tokens)
    if num_beams < 1:
        raise GenerationError(f"num_beams = {num_beams}: must be at least 1")
    cache = empty_cache(model, 1, len(prompt) + num_steps)
    logits_BV = read(model, [prompt], cache)[:, -1]
    beams, ended = [_Beam([], 0.0, 0)], []
    for step in range(1, num_steps + 1):
        # Enough that num_beams are left if all stop tokens of all beams are among the best.
        candidates = _best(beams, logits_BV, max(2, 1 + len(stop_ids)) * num_beams)
        is_over = [step == num_steps or beam.tokens[-1] in stop_ids for beam in candidates]
        ended += [beam for beam, over in zip(candidates[:num_beams], is_over, strict=False) if over]
        ended = sorted(ended, key=lambda beam: beam.score(length_penalty), reverse=True)[:num_beams]
        beams = [beam for beam, over in zip(candidates, is_over, strict=True) if not over][:num_beams]
        is_full = len(ended) == num_beams
        if not beams or (is_full and beams[0].score(length_penalty) <= ended[-1].score(length_penalty)):
            break
        cache.select([beam.parent for beam in beams])
        logits_BV = read(model, [[beam.tokens[-1]] for beam in beams], cache)[:, -1]
    return [(beam.tokens, beam.score(length_penalty)) for beam in ended]


def _best(beams: Sequence[_Beam], logits_BV: Tensor, count: int) -> list[_Beam]:
    """The best beams that are longer by one token."""
    if logits_BV.isnan().any():
        raise GenerationError("the model's logits are NaN: its weights or its dtype are broken")
    sums_B1 = torch.tensor([[beam.log_probability] for beam in beams], dtype=torch.float64, device=logits_BV.device)
    sums_BV = sums_B1 + logits_BV.double().log_softmax(dim=-1)
    best, places = sums_BV.flatten().topk(min(count, sums_BV.numel()))
    candidates = []
    for log_probability, place in zip(best.tolist(), places.tolist(), strict=True):
        parent, token = divmod(place, logits_BV.shape[-1])
        candidates.append(_Beam([*beams[parent].tokens, token], log_probability, parent))
    return candidates

"""Speculative decoding: a cheap draft guesses some tokens, the model reads all of them at once and keeps those that it
could have said itself. What comes out is distributed as without a draft, and greedily it is the same.

A guess drawn from q(x) is kept with probability min(1, p(x) / q(x)), where p is the model's distribution; the first
that is not kept is replaced by a token of max(0, p - q), normalised, and the rest are forgotten. Behind the last guess
comes one more token of p: every round adds at least one. Greedy decoding is the case of p all on one token.

The draft is a smaller model of the same vocabulary, or the text itself: what followed the last time that the latest
tokens stood there (prompt lookup), which costs nothing and helps where answers repeat their prompts.

Source: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023, algorithm 1; Saxena,
"Prompt Lookup Decoding", 2023.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.engine import checked_limit, empty_cache, read
from evaluation.sampling import GenerationError, Sampling, draw, probabilities, seen_tokens, uniform
from model.transformer import Transformer


class Round(NamedTuple):
    """What one reading by the model has added: the guesses that were kept, and a token of its own behind them unless
    they end the answer."""

    tokens: list[int]
    num_accepted: int
    num_guessed: int


class SpeculativeResult(NamedTuple):
    """An answer, and how many of the guesses are part of it."""

    tokens: list[int]
    num_accepted: int
    num_guessed: int


class _Guess(NamedTuple):
    token: int
    drawn_from_V: Tensor


def complete_speculative(
    model: Transformer,
    draft: Transformer | None,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    num_guesses: int = 4,
) -> SpeculativeResult:
    """The whole continuation of a prompt; see `generate_speculative`."""
    rounds = list(
        generate_speculative(
            model, draft, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids,
            num_guesses=num_guesses,
        )
    )  # fmt: skip
    tokens = [token for one in rounds for token in one.tokens]
    return SpeculativeResult(tokens, sum(one.num_accepted for one in rounds), sum(one.num_guessed for one in rounds))


def generate_speculative(
    model: Transformer,
    draft: Transformer | None,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int] = (),
    num_guesses: int = 4,
) -> Iterator[Round]:
    """Continues a prompt as `evaluation.engine.generate` does, several tokens at a time, with the guesses of a draft
    model, or of the text so far if there is none. Greedily, the tokens are the same.

    Raises:
        GenerationError: as `generate`; the draft has another vocabulary, or num_guesses is not positive.
    """
    limit = checked_limit(model, prompt, max_new_tokens)
    if num_guesses < 1:
        raise GenerationError(f"num_guesses = {num_guesses}: must be at least 1")
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        raise GenerationError(
            f"the draft has a vocabulary of {draft.config.vocab_size} tokens, the model one of "
            f"{model.config.vocab_size}; choose a draft of the same tokenizer"
        )
    return _rounds(model, draft, list(prompt), limit, sampling, frozenset(stop_ids), num_guesses)


@torch.inference_mode()
def _rounds(
    model: Transformer,
    draft: Transformer | None,
    tokens: list[int],
    limit: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    num_guesses: int,
) -> Iterator[Round]:
    end, num_prompt = len(tokens) + limit, len(tokens)
    cache = empty_cache(model, 1, end, num_recallable=num_guesses + 1)
    guesser = _Lookup(model.config.vocab_size) if draft is None else _Model(draft, sampling, end, num_guesses)
    while len(tokens) < end:
        if cache.length < len(tokens) - 1:  # the prompt, or what could not be forgotten one by one
            read(model, [tokens[cache.length : -1]], cache)
        step = len(tokens) - num_prompt
        guesses = guesser.guess(tokens, min(num_guesses, end - len(tokens) - 1), step)
        read_tokens = [tokens[-1], *(guess.token for guess in guesses)]
        logits_NV = read(model, [read_tokens], cache, num_scored=len(read_tokens))[0]
        new = _judged(logits_NV, guesses, tokens, sampling, step)
        num_accepted = len(new) - 1
        ends = [place for place, token in enumerate(new) if token in stop_ids]
        new = new[: ends[0] + 1] if ends else new
        yield Round(new, min(num_accepted, len(new)), len(guesses))
        if ends:
            return
        tokens += new
        cache.truncate(len(tokens) - 1)


def _judged(
    logits_NV: Tensor, guesses: Sequence[_Guess], tokens: Sequence[int], sampling: Sampling, step: int
) -> list[int]:
    """The guesses up to the first that is not kept, and one token of the model's own."""
    new: list[int] = []
    for i in range(len(logits_NV)):
        logits_1V = logits_NV[i : i + 1]
        p_V = probabilities(logits_1V, sampling, step + i, seen_tokens([[*tokens, *new]], sampling, logits_1V))[0]
        if i < len(guesses):
            token, q_V = guesses[i]
            if uniform(sampling.seed, "accept", step + i) * q_V[token] < p_V[token]:
                new.append(token)
                continue
            p_V = (p_V - q_V).clamp_(min=0.0)
        break
    return [*new, int(draw(p_V[None], [uniform(sampling.seed, "generate", step + len(new))]))]


class _Model:
    """Guesses by a model, one token at a time, from its own cache of the same text."""

    def __init__(self, model: Transformer, sampling: Sampling, end: int, num_guesses: int):
        self.model, self.sampling = model, sampling
        self.room = min(end, model.config.context_length)
        self.cache = empty_cache(model, 1, self.room, num_recallable=num_guesses)

    def guess(self, tokens: Sequence[int], count: int, step: int) -> list[_Guess]:
        """At most count tokens, fewer at the end of the draft's context, none behind it."""
        self.cache.truncate(min(self.cache.length, len(tokens) - 1))
        text, guesses = list(tokens), []
        for i in range(min(count, self.room - len(tokens))):
            logits_1V = read(self.model, [text[self.cache.length :]], self.cache)[:, -1]
            seen_1V = seen_tokens([text], self.sampling, logits_1V)
            q_1V = probabilities(logits_1V, self.sampling, step + i, seen_1V)
            token = int(draw(q_1V, [uniform(self.sampling.seed, "guess", step + i)]))
            guesses.append(_Guess(token, q_1V[0]))
            text.append(token)
        return guesses


class _Lookup:
    """Guesses what followed the latest tokens when they last stood in the text, three of them or as many as repeat."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def guess(self, tokens: Sequence[int], count: int, step: int) -> list[_Guess]:
        """At most count tokens, none where nothing repeats."""
        for size in (3, 2, 1):
            latest = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == latest:
                    text = list(tokens)
                    for place in range(start + size, start + size + count):
                        text.append(text[place])  # perhaps one of the guesses, of what repeats itself
                    return [self._certain(token) for token in text[len(tokens) :]]
        return []

    def _certain(self, token: int) -> _Guess:
        return _Guess(token, F.one_hot(torch.tensor(token), self.vocab_size).double())

import dataclasses
import itertools

import pytest
import scipy.stats
import torch

from evaluation import speculative
from evaluation.engine import complete, complete_batch
from evaluation.sampling import GenerationError, Sampling
from evaluation.speculative import complete_speculative, generate_speculative
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

ALL = {**VARIANTS, **MOE_VARIANTS}
GREEDY = Sampling()
SMALL = dataclasses.replace(LLAMA, num_layers=1, hidden_size=8, num_heads=2, head_size=4, ffn_size=8, init_std=0.6)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random_tokens(LLAMA, 1, length, seed)[0].tolist()


def similar_model(model: Transformer, noise: float = 0.1) -> Transformer:
    """A draft that is often right: the same weights, each a little off."""
    draft = make_model(model.config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for (name, parameter), own in zip(model.named_parameters(), draft.parameters(), strict=True):
            factor = 1 + noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            own.copy_(parameter * factor if "norm" not in name else parameter)
    return draft


def test_a_thousand_greedy_answers_are_those_without_a_draft():
    model = make_model(dataclasses.replace(LLAMA, num_layers=1), dtype=torch.float64)
    draft = similar_model(model)
    prompts = [prompt_of(1 + seed % 12, seed) for seed in range(1_000)]
    settings = {"max_new_tokens": 5, "sampling": GREEDY, "stop_ids": {5, 60, 101}}
    results = [complete_speculative(model, draft, prompt, num_guesses=2, **settings) for prompt in prompts]
    expected = complete_batch(model, prompts, batch_size=250, **settings)
    assert [[result.tokens] for result in results] == expected
    num_accepted, num_guessed = (sum(result[i] for result in results) for i in (1, 2))
    assert 0.2 < num_accepted / num_guessed < 0.9


@pytest.mark.parametrize("prompt_length", [1, 13])
@pytest.mark.parametrize("variant", ALL)
def test_every_kind_of_model_goes_back_behind_a_wrong_guess(variant, prompt_length):
    model, prompt = make_model(ALL[variant], dtype=torch.float64), prompt_of(prompt_length)
    sampling = Sampling(repetition_penalty=5.0)  # else a tied model repeats one token, which any draft can guess
    expected = complete(model, prompt, max_new_tokens=20, sampling=sampling)[0]
    result = complete_speculative(model, similar_model(model), prompt, max_new_tokens=20, sampling=sampling)
    assert result.tokens == expected
    assert 0 < result.num_accepted < result.num_guessed


@pytest.mark.parametrize("draft_variant", ["latent windowed", "chunk soft"])
def test_the_draft_may_be_any_model(draft_variant):
    model, draft = make_model(LLAMA, dtype=torch.float64), make_model(ALL[draft_variant], dtype=torch.float64, seed=5)
    found = complete_speculative(model, draft, prompt_of(6), max_new_tokens=15, sampling=GREEDY)
    assert [found.tokens] == complete(model, prompt_of(6), max_new_tokens=15, sampling=GREEDY)


@pytest.mark.parametrize("num_guesses", [1, 2, 5, 30])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0), Sampling(repetition_penalty=1.3)], ids=str)
def test_a_draft_that_is_the_model_is_always_right(sampling, num_guesses):
    model = make_model(LLAMA, dtype=torch.float64)
    found = complete_speculative(
        model, model, prompt_of(6), max_new_tokens=21, sampling=sampling, num_guesses=num_guesses
    )
    assert len(found.tokens) == 21
    assert found.num_accepted == found.num_guessed == 21 - -(-21 // (num_guesses + 1))


def test_repetition_is_penalised_inside_of_guesses():
    model = make_model(LLAMA, dtype=torch.float64)
    sampling = Sampling(repetition_penalty=1.5)
    for draft in (similar_model(model), None):
        found = complete_speculative(model, draft, prompt_of(6), max_new_tokens=30, sampling=sampling)
        assert [found.tokens] == complete(model, prompt_of(6), max_new_tokens=30, sampling=sampling)


def test_without_a_draft_the_text_is_looked_up():
    model = make_model(dataclasses.replace(LLAMA, tie_embeddings=True), dtype=torch.float64)  # repeats itself
    expected = complete(model, prompt_of(9), max_new_tokens=40, sampling=GREEDY)[0]
    found = complete_speculative(model, None, prompt_of(9), max_new_tokens=40, sampling=GREEDY)
    assert found.tokens == expected
    assert found.num_accepted > 20


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),
        ([1, 2, 3, 7, 1, 2, 3, 9, 8, 7, 1, 2, 3], [9, 8, 7, 1]),  # the latest place
        ([5, 1, 2, 6, 3, 1, 2], [6, 3, 1, 2]),  # two in a row
        ([4, 1, 7, 9], []),
        ([4, 9, 9], [9, 9, 9, 9]),
        ([4, 8, 9, 8, 9], [8, 9, 8, 9]),
        ([4], []),
    ],
)
def test_what_followed_last_time_is_guessed(tokens, expected):
    assert [guess.token for guess in speculative._Lookup(10).guess(tokens, 4, 0)] == expected


def two_token_shares(model, prompt: list[int], temperature: float, top_k: int) -> list[float]:
    """The probability of every pair of tokens, by full forwards."""
    shares = []
    for first, second in itertools.product(range(model.config.vocab_size), repeat=2):
        share = 1.0
        for text, token in ((prompt, first), ([*prompt, first], second)):
            logits = model(torch.tensor([text]))[0, -1] / temperature
            logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
            share *= float(logits.softmax(dim=-1)[token].detach())
        shares.append(share)
    return shares


def chi_square_p(model, draft, temperature: float, top_k: int, num_draws: int = 1_000) -> float:
    """How likely pairs as far from the model's distribution are; the third token makes room for two guesses."""
    size = model.config.vocab_size
    counts = [0] * size**2
    for seed in range(num_draws):
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        tokens = complete_speculative(model, draft, [3, 1], max_new_tokens=3, sampling=sampling, num_guesses=2).tokens
        counts[tokens[0] * size + tokens[1]] += 1
    expected = [num_draws * share for share in two_token_shares(model, [3, 1], temperature, top_k)]
    assert not any(count for count, share in zip(counts, expected, strict=True) if share == 0)
    # Rare pairs are one class: each would be too few for the test.
    rare = sum(share for share in expected if share < 5), sum(c for c, e in zip(counts, expected) if e < 5)
    pairs = [(e, c) for e, c in zip(expected, counts, strict=True) if e >= 5] + ([rare] if rare[0] > 0 else [])
    return float(scipy.stats.chisquare([c for _, c in pairs], [e for e, _ in pairs]).pvalue)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 5), (1.7, 4)])
@pytest.mark.parametrize("has_draft", [True, False], ids=["draft", "lookup"])
def test_samples_are_distributed_as_the_model_says(has_draft, temperature, top_k):
    config = dataclasses.replace(SMALL, vocab_size=5)
    model = make_model(config, dtype=torch.float64)
    draft = make_model(config, dtype=torch.float64, seed=3) if has_draft else None
    assert chi_square_p(model, draft, temperature, top_k) > 0.01


def test_keeping_every_guess_would_be_found(monkeypatch):
    config = dataclasses.replace(SMALL, vocab_size=5)
    model, draft = (make_model(config, dtype=torch.float64, seed=seed) for seed in (0, 3))
    uniform = speculative.uniform
    monkeypatch.setattr(
        speculative, "uniform", lambda seed, use, step: 0.0 if use == "accept" else uniform(seed, use, step)
    )
    assert chi_square_p(model, draft, 1.0, 5, num_draws=400) < 1e-6


def test_guesses_are_kept_as_often_as_the_distributions_overlap():
    config = dataclasses.replace(SMALL, vocab_size=5)
    model, draft = (make_model(config, dtype=torch.float64, seed=seed) for seed in (0, 3))
    p, q = (one(torch.tensor([[3, 1]]))[0, -1].softmax(dim=-1) for one in (model, draft))
    num_kept = sum(
        complete_speculative(
            model, draft, [3, 1], max_new_tokens=2, sampling=Sampling(temperature=1.0, seed=seed), num_guesses=1
        ).num_accepted
        for seed in range(600)
    )
    assert num_kept / 600 == pytest.approx(float(torch.minimum(p, q).sum().detach()), abs=0.06)


def test_rounds_come_as_they_are_read_and_end_with_a_stop_token():
    model = make_model(LLAMA, dtype=torch.float64)
    free = complete(model, prompt_of(6), max_new_tokens=20, sampling=GREEDY)[0]
    for stop in free[:6]:
        rounds = list(
            generate_speculative(
                model, model, prompt_of(6), max_new_tokens=20, sampling=GREEDY, stop_ids={stop}, num_guesses=4
            )
        )
        assert [token for one in rounds for token in one.tokens] == free[: free.index(stop) + 1]
        assert all(one.num_accepted <= len(one.tokens) for one in rounds)


@pytest.mark.parametrize("draft_context", [4, 8, 11, 64])
def test_both_contexts_end_where_they_do(draft_context):
    model = make_model(dataclasses.replace(LLAMA, context_length=14), dtype=torch.float64)
    draft = make_model(dataclasses.replace(LLAMA, context_length=draft_context), dtype=torch.float64)
    found = complete_speculative(model, draft, prompt_of(6), max_new_tokens=50, sampling=GREEDY)
    assert [found.tokens] == complete(model, prompt_of(6), max_new_tokens=50, sampling=GREEDY)
    assert len(found.tokens) == 8
    assert (found.num_guessed > 0) == (draft_context > 6)


@pytest.mark.parametrize(
    ("prompt", "settings", "complaint"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "leaves no room in a context of 64"),
        ([1], {"num_guesses": 0}, "num_guesses = 0: must be at least 1"),
        ([1], {"draft": "other"}, "the draft has a vocabulary of 130 tokens, the model one of 131"),
    ],
)
def test_what_cannot_be_guessed_at_is_refused_before_the_first_round(prompt, settings, complaint):
    draft = make_model(dataclasses.replace(LLAMA, vocab_size=130)) if settings.pop("draft", None) else None
    with pytest.raises(GenerationError, match=complaint):
        generate_speculative(make_model(LLAMA), draft, prompt, **{"max_new_tokens": 5, "sampling": GREEDY, **settings})

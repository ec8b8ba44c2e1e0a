import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from evaluation import engine
from evaluation.engine import complete, generate
from evaluation.sampling import GenerationError, Sampling, choose, probabilities, seen_tokens
from model.convert import write_hugging_face
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

GREEDY = Sampling()
WARM = Sampling(temperature=1.0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random_tokens(LLAMA, 1, length, seed)[0].tolist()


def greedy_by_full_forwards(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


ALL = {**VARIANTS, **MOE_VARIANTS}


@pytest.mark.parametrize("variant", ALL)
def test_greedy_takes_the_likeliest_token_of_the_full_forward(variant):
    model = make_model(ALL[variant], dtype=torch.float64)
    found = complete(model, prompt_of(5), max_new_tokens=20, sampling=GREEDY)
    assert found == [greedy_by_full_forwards(model, prompt_of(5), 20)]


@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3 tied"])
def test_greedy_equals_the_generation_of_transformers(variant, tmp_path):
    model = make_model(VARIANTS[variant])
    write_hugging_face(tmp_path, model.config, model.state_dict(), eos_id=None, dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([prompt_of(7)])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    assert complete(model, prompt_of(7), max_new_tokens=16, sampling=GREEDY) == [expected[0, 7:].tolist()]


def test_every_step_yields_one_token_per_sample():
    model = make_model(LLAMA)
    steps = generate(model, prompt_of(3), max_new_tokens=6, sampling=WARM, num_samples=4)
    first = next(steps)
    assert len(first) == 4
    rest = list(steps)
    assert len(rest) == 5
    whole = complete(model, prompt_of(3), max_new_tokens=6, sampling=WARM, num_samples=4)
    assert whole == [list(sample) for sample in zip(first, *rest, strict=True)]


def test_samples_differ_but_equal_seeds_repeat_them():
    model = make_model(LLAMA)
    samples = complete(model, prompt_of(3), max_new_tokens=12, sampling=WARM, num_samples=3)
    assert len({tuple(sample) for sample in samples}) == 3
    torch.manual_seed(17)  # the global generator plays no part
    assert complete(model, prompt_of(3), max_new_tokens=12, sampling=WARM, num_samples=3) == samples
    other = dataclasses.replace(WARM, seed=1)
    assert complete(model, prompt_of(3), max_new_tokens=12, sampling=other, num_samples=3) != samples


@pytest.mark.parametrize("prompt_length", [4, 11])
@pytest.mark.parametrize("variant", ["llama", "alternating windows", "latent windowed", "chunk soft"])
def test_a_sample_does_not_depend_on_how_many_there_are(variant, prompt_length):
    model, prompt = make_model(ALL[variant], dtype=torch.float64), prompt_of(prompt_length)
    many = complete(model, prompt, max_new_tokens=10, sampling=WARM, num_samples=5)
    few = complete(model, prompt, max_new_tokens=10, sampling=WARM, num_samples=2)
    assert few == many[:2]
    assert complete(model, prompt, max_new_tokens=10, sampling=WARM) == many[:1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tokens_are_chosen_by_capped_logits(dtype, monkeypatch):
    model = make_model(dataclasses.replace(LLAMA, logit_softcap=1.5), dtype=dtype)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(engine, "choose", lambda logits, *_, **__: seen.append(logits) or [0])
    complete(model, prompt_of(5), max_new_tokens=1, sampling=GREEDY)
    expected = model(torch.tensor([prompt_of(5)]))[:, -1]
    assert seen[0].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(seen[0].to(dtype), expected, rtol=tolerance, atol=tolerance)


def test_the_prompt_is_read_once_for_all_samples():
    model = make_model(LLAMA)
    shapes: list[tuple[int, ...]] = []
    model.embedding.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    complete(model, prompt_of(9), max_new_tokens=4, sampling=WARM, num_samples=3)
    assert shapes == [(1, 9), (3, 1), (3, 1), (3, 1)]


def test_only_the_last_position_of_the_prompt_is_scored(monkeypatch):
    model = make_model(LLAMA)
    scored: list[tuple[int, ...]] = []
    linear = engine.F.linear

    def watched_linear(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        if weight is model.head.weight:
            scored.append(tuple(x.shape))
        return linear(x, weight, *rest)

    monkeypatch.setattr(engine.F, "linear", watched_linear)
    complete(model, prompt_of(9), max_new_tokens=2, sampling=GREEDY)
    assert scored == [(1, 1, LLAMA.hidden_size)] * 2


def test_nothing_is_kept_for_a_backward():
    model = make_model(LLAMA)
    modes: list[bool] = []
    model.blocks[0].register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    complete(model, prompt_of(3), max_new_tokens=3, sampling=GREEDY)
    assert modes == [True, True, True]


def test_a_sample_ends_with_its_stop_token_and_the_others_go_on_unchanged():
    model = make_model(LLAMA)
    free = complete(model, prompt_of(3), max_new_tokens=12, sampling=WARM, num_samples=4)
    stop = free[2][3]
    steps = list(generate(model, prompt_of(3), max_new_tokens=12, sampling=WARM, num_samples=4, stop_ids={stop}))
    for i, sample in enumerate(free):
        end = sample.index(stop) + 1 if stop in sample else len(sample)
        column = [tokens[i] for tokens in steps]
        assert column[:end] == sample[:end]
        assert all(token is None for token in column[end:])
    stopped = complete(model, prompt_of(3), max_new_tokens=12, sampling=WARM, num_samples=4, stop_ids={stop})
    assert stopped[2] == free[2][: free[2].index(stop) + 1]


def test_generation_ends_when_every_sample_has():
    model = make_model(LLAMA)
    first = complete(model, prompt_of(3), max_new_tokens=1, sampling=WARM, num_samples=3)
    stop_ids = [sample[0] for sample in first]
    steps = list(generate(model, prompt_of(3), max_new_tokens=50, sampling=WARM, num_samples=3, stop_ids=stop_ids))
    assert len(steps) == 1


def test_generation_ends_when_the_context_is_full():
    model = make_model(dataclasses.replace(LLAMA, context_length=10))
    assert len(complete(model, prompt_of(4), max_new_tokens=100, sampling=GREEDY)[0]) == 6
    assert len(complete(model, prompt_of(9), max_new_tokens=100, sampling=GREEDY)[0]) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_models_of_every_dtype_generate(dtype):
    model = make_model(LLAMA).to(dtype)
    assert len(complete(model, prompt_of(4), max_new_tokens=5, sampling=WARM, num_samples=2)[1]) == 5


@pytest.mark.gpu
def test_a_model_on_cuda_generates_what_it_does_on_the_cpu():
    model = make_model(LLAMA, dtype=torch.float64)
    expected = complete(model, prompt_of(4), max_new_tokens=10, sampling=WARM, num_samples=2)
    assert complete(model.cuda(), prompt_of(4), max_new_tokens=10, sampling=WARM, num_samples=2) == expected


def test_a_model_in_training_generates_and_stays_in_training():
    model = make_model(LLAMA).train()
    expected = complete(model, prompt_of(4), max_new_tokens=5, sampling=GREEDY)
    for block in model.blocks:
        block.recompute = "blocks"
    assert complete(model, prompt_of(4), max_new_tokens=5, sampling=GREEDY) == expected
    assert model.training
    model(torch.tensor([prompt_of(4)])).sum().backward()  # no inference tensor was left in it


def test_gradients_are_on_between_steps():
    steps = generate(make_model(LLAMA), prompt_of(4), max_new_tokens=3, sampling=GREEDY)
    next(steps)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def draws(logits: list[float], sampling: Sampling, num_draws: int = 4_000) -> list[float]:
    """How often each token was chosen, as a share, over many steps."""
    logits_BV = torch.tensor([logits] * 4)
    chosen = [token for step in range(num_draws // 4) for token in choose(logits_BV, sampling, step)]
    return [chosen.count(token) / num_draws for token in range(len(logits))]


LOGITS = [0.0, 2.0, 1.0, -1.0, 1.5]


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    return (torch.tensor(logits) / temperature).softmax(0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    expected = softmax(LOGITS, temperature)
    assert draws(LOGITS, Sampling(temperature=temperature)) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [0.01, 1e-300])
def test_a_low_temperature_approaches_greedy(temperature):
    assert draws(LOGITS, Sampling(temperature=temperature), num_draws=400) == [0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 99])
def test_top_k_draws_from_the_k_likeliest_in_their_proportions(top_k):
    kept = sorted(range(5), key=lambda token: -LOGITS[token])[:top_k]
    expected = softmax([logit if token in kept else float("-inf") for token, logit in enumerate(LOGITS)])
    found = draws(LOGITS, Sampling(temperature=1.0, top_k=top_k))
    assert found == pytest.approx(expected, abs=0.03)
    assert all(share == 0 for token, share in enumerate(found) if token not in kept)


# The likeliest tokens of LOGITS are 1, 4, 2, 0, 3 with probabilities 0.46, 0.28, 0.17, 0.06, 0.02.
@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, {1}),
        (0.45, {1}),
        (0.47, {1, 4}),
        (0.73, {1, 4}),
        (0.76, {1, 4, 2}),
        (0.95, {0, 1, 2, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_draws_from_the_fewest_tokens_that_reach_p(top_p, kept):
    expected = softmax([logit if token in kept else float("-inf") for token, logit in enumerate(LOGITS)])
    found = draws(LOGITS, Sampling(temperature=1.0, top_p=top_p))
    assert found == pytest.approx(expected, abs=0.03)
    assert all(share == 0 for token, share in enumerate(found) if token not in kept)


def test_top_p_counts_within_what_top_k_has_kept():
    # Of 0.62 and 0.38, the first alone reaches 0.6; of all five it would not.
    assert draws(LOGITS, Sampling(temperature=1.0, top_k=2, top_p=0.6)) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_samples_and_steps_draw_independently():
    logits_BV = torch.zeros(2, 2)
    pairs = [tuple(choose(logits_BV, WARM, step)) for step in range(2_000)]
    shares = [pairs.count(pair) / 2_000 for pair in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert shares == pytest.approx([0.25] * 4, abs=0.04)
    repeats = sum(first == second for first, second in itertools.pairwise(pairs)) / 2_000
    assert repeats == pytest.approx(0.25, abs=0.04)


# Against the likeliest, tokens 0 to 4 of LOGITS are 0.14, 1, 0.37, 0.05 and 0.61 times as likely.
@pytest.mark.parametrize(("min_p", "kept"), [(0.0, {0, 1, 2, 3, 4}), (0.2, {1, 2, 4}), (0.5, {1, 4}), (1.0, {1})])
def test_min_p_draws_from_tokens_at_least_p_times_as_likely_as_the_likeliest(min_p, kept):
    expected = softmax([logit if token in kept else float("-inf") for token, logit in enumerate(LOGITS)])
    found = draws(LOGITS, Sampling(temperature=1.0, min_p=min_p))
    assert found == pytest.approx(expected, abs=0.03)
    assert all(share == 0 for token, share in enumerate(found) if token not in kept)


SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.03, "repetition_penalty": 1.4},
    {"temperature": 1.0, "repetition_penalty": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_distribution_is_that_of_the_processors_of_transformers(settings):
    logits = 3 * torch.randn(4, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = random_tokens(dataclasses.replace(LLAMA, vocab_size=60), 4, 30)
    processors = [
        RepetitionPenaltyLogitsProcessor(settings.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(settings["temperature"]),
        TopKLogitsWarper(settings.get("top_k", 60)),
        TopPLogitsWarper(settings.get("top_p", 1.0)),
        MinPLogitsWarper(settings.get("min_p", 0.0)),
    ]
    expected = logits
    for processor in processors:
        expected = processor(rows, expected)
    sampling = Sampling(**settings)
    found = probabilities(logits, sampling, 0, seen_tokens(rows.tolist(), sampling, logits))
    torch.testing.assert_close(found, expected.softmax(dim=-1), rtol=1e-12, atol=1e-12)


def test_greedy_puts_all_probability_on_the_likeliest_token():
    assert probabilities(torch.tensor([LOGITS]), GREEDY, 0).tolist() == [[0.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}])
def test_what_prompt_and_answer_have_is_penalised(settings):
    """Against logits computed without a cache."""
    model, tokens = make_model(LLAMA, dtype=torch.float64), prompt_of(6)
    sampling = Sampling(repetition_penalty=1.5, **settings)
    found = complete(model, tokens, max_new_tokens=15, sampling=sampling)[0]
    for step, token in enumerate(found):
        logits = model(torch.tensor([tokens]))[:, -1]
        for seen in set(tokens):
            logits[0, seen] *= 1.5 if logits[0, seen] < 0 else 1 / 1.5
        assert choose(logits, dataclasses.replace(sampling, repetition_penalty=1.0), step) == [token]
        tokens.append(token)
    assert found != complete(model, prompt_of(6), max_new_tokens=15, sampling=Sampling(**settings))[0]


def test_broken_logits_are_refused():
    with pytest.raises(GenerationError, match="logits are NaN at step 7"):
        choose(torch.tensor([[0.0, float("nan")]]), GREEDY, step=7)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temperature": -0.1}, r"temperature = -0\.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": 0}, "top_k = 0: must be at least 1"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.5}, r"top_p = 1\.5"),
        ({"min_p": -0.1}, r"min_p = -0\.1"),
        ({"min_p": 1.1}, r"min_p = 1\.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0: must be positive"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty = nan"),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(GenerationError, match=complaint):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompt", "counts", "complaint"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "64 tokens, which leaves no room in a context of 64"),
        ([1, 131], {}, "has the id 131, the model's vocabulary ends at 130"),
        ([-1], {}, "has the id -1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([1], {"num_samples": 0}, "num_samples = 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_before_the_first_step(prompt, counts, complaint):
    with pytest.raises(GenerationError, match=complaint):
        generate(make_model(LLAMA), prompt, **{"max_new_tokens": 5, "sampling": GREEDY, **counts})

"""Prompts of different lengths continued together."""

import dataclasses

import pytest
import torch

from evaluation.engine import complete, complete_batch
from evaluation.sampling import GenerationError, Sampling
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

GREEDY = Sampling()
WARM = Sampling(temperature=1.0)
ALL = {**VARIANTS, **MOE_VARIANTS}
LENGTHS = [4, 13, 1, 8, 8, 20]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [random_tokens(LLAMA, 1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def one_by_one(model, prompts, **settings) -> list[list[list[int]]]:
    return [complete(model, prompt, **settings) for prompt in prompts]


def shapes_read(model) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.embedding.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape)))
    return shapes


@pytest.mark.parametrize("variant", ALL)
def test_prompts_of_any_length_continue_together_as_one_by_one(variant):
    model, prompts = make_model(ALL[variant], dtype=torch.float64), prompts_of(LENGTHS)
    settings = {"max_new_tokens": 12, "sampling": GREEDY, "stop_ids": {3, 7, 11, 50, 60, 100}}
    assert complete_batch(model, prompts, **settings) == one_by_one(model, prompts, **settings)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "latent windowed", "deepseek-v3", "chunk soft"])
def test_samples_of_a_batch_are_those_of_each_prompt_alone(variant):
    model, prompts = make_model(ALL[variant], dtype=torch.float64), prompts_of(LENGTHS)
    sampling = Sampling(temperature=1.2, repetition_penalty=1.3, seed=3)
    settings = {"max_new_tokens": 12, "sampling": sampling, "num_samples": 3, "stop_ids": set(range(0, 131, 9))}
    expected = one_by_one(model, prompts, **settings)
    assert len({len(sample) for samples in expected for sample in samples}) > 3
    for batch_size in (None, 7):
        assert complete_batch(model, prompts, batch_size=batch_size, **settings) == expected


def test_a_batch_in_fp32_continues_as_one_by_one():
    model, prompts = make_model(VARIANTS["gemma2"]), prompts_of(LENGTHS)
    assert complete_batch(model, prompts, max_new_tokens=8, sampling=GREEDY) == one_by_one(
        model, prompts, max_new_tokens=8, sampling=GREEDY
    )


@pytest.mark.parametrize(("batch_size", "num_samples", "together"), [(2, 1, 2), (4, 2, 2), (3, 2, 1), (1, 5, 1)])
def test_no_more_samples_are_computed_at_a_time_than_the_batch_has(batch_size, num_samples, together):
    model = make_model(LLAMA)
    shapes = shapes_read(model)
    complete_batch(
        model, prompts_of(LENGTHS), max_new_tokens=3, sampling=WARM, num_samples=num_samples, batch_size=batch_size
    )
    assert max(rows for rows, length in shapes if length > 1) == together
    assert max(rows for rows, length in shapes if length == 1) == together * num_samples


def test_the_longest_prompts_come_first():
    model = make_model(LLAMA)
    shapes = shapes_read(model)
    complete_batch(model, prompts_of(LENGTHS), max_new_tokens=1, sampling=GREEDY, batch_size=2)
    assert shapes == [(2, 20), (2, 8), (2, 4)]


def test_samples_that_have_ended_leave_the_batch():
    model, prompts = make_model(LLAMA, dtype=torch.float64), prompts_of(LENGTHS)
    free = one_by_one(model, prompts, max_new_tokens=12, sampling=GREEDY)
    stop_ids = {sample[1] for [sample] in free[:4]}
    shapes = shapes_read(model)
    found = complete_batch(model, prompts, max_new_tokens=12, sampling=GREEDY, stop_ids=stop_ids)
    assert found == one_by_one(model, prompts, max_new_tokens=12, sampling=GREEDY, stop_ids=stop_ids)
    rows = [rows for rows, length in shapes[: 1 + max(len(sample) for [sample] in found)]]
    assert rows[0] == 6
    assert rows[2] <= 3


def test_prompts_end_at_the_end_of_the_context_each_by_itself():
    model = make_model(dataclasses.replace(LLAMA, context_length=22), dtype=torch.float64)
    found = complete_batch(model, prompts_of(LENGTHS), max_new_tokens=12, sampling=GREEDY)
    assert [len(sample) for [sample] in found] == [12, 9, 12, 12, 12, 2]
    assert found == one_by_one(model, prompts_of(LENGTHS), max_new_tokens=12, sampling=GREEDY)


def test_no_prompts_have_no_answers():
    assert complete_batch(make_model(LLAMA), [], max_new_tokens=5, sampling=GREEDY) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "complaint"),
    [
        ([[1], []], {}, "prompt 1: the prompt is empty"),
        ([[1] * 64], {}, "prompt 0: the prompt has 64 tokens, which leaves no room in a context of 64"),
        ([[1], [2], [131]], {}, "prompt 2: the prompt has the id 131"),
        ([[1]], {"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ([[1]], {"num_samples": 0}, "num_samples = 0"),
    ],
)
def test_a_batch_that_cannot_be_continued_is_refused(prompts, settings, complaint):
    with pytest.raises(GenerationError, match=complaint):
        complete_batch(make_model(LLAMA), prompts, **{"max_new_tokens": 5, "sampling": GREEDY, **settings})


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["llama", "gemma2", "latent windowed", "deepseek-v3"])
def test_a_batch_on_cuda_gives_what_it_does_on_the_cpu(variant):
    model, prompts = make_model(ALL[variant], dtype=torch.float64), prompts_of(LENGTHS)
    expected = complete_batch(model, prompts, max_new_tokens=10, sampling=WARM, num_samples=2)
    assert complete_batch(model.cuda(), prompts, max_new_tokens=10, sampling=WARM, num_samples=2) == expected

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation import log_likelihood
from evaluation.log_likelihood import LikelihoodError, LogLikelihood, log_likelihoods
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model

Pair = tuple[list[int], list[int]]


def by_full_forwards(model: Transformer, pairs: list[Pair]) -> list[LogLikelihood]:
    """Every pair on its own, all logits whole."""
    results = []
    for context, continuation in pairs:
        with torch.no_grad():
            log_probs_TV = model(torch.tensor([context + continuation]))[0].log_softmax(dim=-1)
        found = [
            (log_probs_TV[len(context) + i - 1, token].item(), log_probs_TV[len(context) + i - 1].argmax().item())
            for i, token in enumerate(continuation)
        ]
        is_greedy = [top for _, top in found] == continuation
        results.append(LogLikelihood(sum(value for value, _ in found), len(continuation), is_greedy))
    return results


def questions_of_two_subjects(num_questions: int = 3, seed: int = 0) -> list[Pair]:
    """Two subjects with their own examples, questions of several lengths, four choices, some of one token."""
    drawn = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [drawn.randrange(LLAMA.vocab_size) for _ in range(length)]

    pairs: list[Pair] = [(tokens(3), tokens(2))]  # a stranger
    for _ in range(2):
        examples = tokens(21)
        for number in range(num_questions):
            question = examples + tokens(2 + number)
            pairs += [(question, tokens(1 + (number + choice) % 3)) for choice in range(4)]
    drawn.shuffle(pairs)
    return pairs


def assert_equal(found: list[LogLikelihood], expected: list[LogLikelihood], tolerance: float) -> None:
    assert [(one.num_tokens, one.is_greedy) for one in found] == [(one.num_tokens, one.is_greedy) for one in expected]
    assert [one.sum for one in found] == pytest.approx([one.sum for one in expected], abs=tolerance)


@pytest.mark.parametrize("variant", {**VARIANTS, **MOE_VARIANTS})
def test_sharing_what_contexts_have_in_common_changes_nothing(variant):
    model = make_model({**VARIANTS, **MOE_VARIANTS}[variant], dtype=torch.float64).eval()
    pairs = questions_of_two_subjects()
    expected = by_full_forwards(model, pairs)
    assert_equal(log_likelihoods(model, pairs, batch_size=4, pass_cost=10), expected, 1e-9)
    assert_equal(log_likelihoods(model, pairs, batch_size=5, pass_cost=10**9), expected, 1e-9)


def test_in_fp32_shared_and_separate_agree():
    model = make_model(LLAMA).eval()
    pairs = questions_of_two_subjects(5)
    expected = by_full_forwards(model.double(), pairs)
    model.float()
    for pass_cost in (0, 10**9):
        assert_equal(log_likelihoods(model, pairs, pass_cost=pass_cost), expected, 1e-5)


def test_a_greedy_continuation_is_called_greedy():
    model = make_model(LLAMA, dtype=torch.float64).eval()
    tokens = [5, 6, 7]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % LLAMA.vocab_size]
    found = log_likelihoods(model, [(tokens[:3], tokens[3:]), (wrong[:3], wrong[3:])])
    assert [one.is_greedy for one in found] == [True, False]


def count_tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each forward pass from now on."""
    counts: list[int] = []
    forward = Transformer.forward

    def counted(self, tokens_BT, *arguments, **options):
        counts.append(tokens_BT.numel())
        return forward(self, tokens_BT, *arguments, **options)

    monkeypatch.setattr(Transformer, "forward", counted)
    return counts


def test_the_examples_of_a_subject_are_read_once_and_one_question_with_four_letters_is_one_row(monkeypatch):
    model = make_model(LLAMA).eval()
    examples, counts = list(range(30)), count_tokens_read(monkeypatch)
    pairs = [([*examples, 40 + question, 50, 51], [60 + choice]) for question in range(8) for choice in range(4)]
    log_likelihoods(model, pairs, batch_size=8, pass_cost=10)
    assert counts == [30, 8 * 3]


def test_where_sharing_saves_less_than_a_pass_costs_everything_is_one_batch(monkeypatch):
    model = make_model(LLAMA).eval()
    counts = count_tokens_read(monkeypatch)
    pairs = [([1, 2, 3, 4 + question], [60]) for question in range(8)]
    log_likelihoods(model, pairs, batch_size=8, pass_cost=21)  # it saves 3 tokens of seven rows
    assert counts == [8 * 4]
    log_likelihoods(model, pairs, batch_size=8, pass_cost=20)
    assert counts[1:] == [3, 8 * 1]


def saved_at_most(depths: list[int], pass_cost: int) -> int:
    """What rows save that have so much in common with their neighbours: as one group, or parted where that is least."""
    if not depths:
        return 0
    least, parts = min(depths), [[]]
    for depth in depths:
        if depth == least:
            parts.append([])
        else:
            parts[-1].append(depth)
    return max(least * len(depths) - pass_cost, sum(saved_at_most(part, pass_cost) for part in parts))


@given(st.lists(st.integers(0, 6), max_size=9), st.integers(0, 8))
def test_the_groups_are_those_that_save_most(depths: list[int], pass_cost: int):
    groups = log_likelihood._shared([*depths, 0], pass_cost)
    ends = [0, *(end for _, end, _ in groups)]
    assert all(first >= end for (first, _, _), end in zip(groups, ends, strict=False))  # in order, none twice
    assert all(depth == min(depths[first : end - 1]) for first, end, depth in groups)
    saved = sum(depth * (end - first - 1) - pass_cost for first, end, depth in groups)
    assert saved == max(0, saved_at_most(depths, pass_cost))


def test_no_requests_have_no_results():
    assert log_likelihoods(make_model(LLAMA), []) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "request 1: an empty context"),
        (([1], []), "request 1: an empty continuation"),
        (([1] * 64, [1, 2]), "request 1: 65 tokens to read in a context of 64; shorten it"),
        (([1], [131]), "request 1: an id outside the model's vocabulary of 131; it was encoded with another tokenizer"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, message):
    with pytest.raises(LikelihoodError, match=message):
        log_likelihoods(make_model(LLAMA), [([1], [2]), pair])


def test_a_pair_may_fill_the_context():
    model = make_model(LLAMA, dtype=torch.float64).eval()
    pairs = [([1, 2] * 32, [3])]
    assert_equal(log_likelihoods(model, pairs), by_full_forwards(model, pairs), 1e-9)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.answer_quality import Answer, quality, quality_line, repeated_share, split_stop


@given(st.lists(st.integers(0, 3), max_size=40))
def test_the_repeated_share_counts_every_run_of_four_that_stood_there_before(tokens: list[int]):
    runs = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
    num_repeated = sum(run in runs[:i] for i, run in enumerate(runs))
    assert repeated_share(tokens) == pytest.approx(num_repeated / len(runs) if runs else 0.0)


def test_a_loop_repeats_itself_and_a_list_does_not():
    answers = [Answer([1, 2] * 20, False, "ab" * 20), Answer(list(range(40)), True, "..."), Answer([], True, "\n")]
    figures = quality(answers)
    assert figures == pytest.approx(
        {"stop_rate": 2 / 3, "repetition_rate": 1 / 3, "mean_tokens": 80 / 3, "empty_rate": 1 / 3}
    )
    assert quality_line(figures) == "stop rate 66.7%  repetition 33.3%  mean length 26.7 tokens  empty 33.3%"


def test_only_a_stop_token_at_the_end_ends_an_answer():
    assert split_stop([5, 6, 2], {2, 3}) == ([5, 6], True)
    assert split_stop([5, 2, 6], {2, 3}) == ([5, 2, 6], False)
    assert split_stop([], {2}) == ([], False)
    assert split_stop([2], {2}) == ([], True)

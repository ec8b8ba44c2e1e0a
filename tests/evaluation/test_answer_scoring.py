import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.answer_scoring import judge, normalised


@pytest.mark.parametrize(
    ("output", "right", "is_correct"),
    [
        ("Elna lives in Brill.", "Elna lives in Brill.", True),
        ("  elna lives\nin BRILL", "Elna lives in Brill.", True),
        ("**Brill**", "Brill", True),
        ("北京。", "北京", True),
        ("Ｂｒｉｌｌ", "Brill", True),
        ("It is far. #### Brill", "Brill", True),
        ("Elna lives in Brill, I think", "Elna lives in Brill.", False),
        ("C", "C++", False),
        ("...", "Brill", False),
    ],
)
def test_a_whole_answer_counts_but_for_case_spaces_and_the_punctuation_around_it(
    output: str, right: str, is_correct: bool
):
    assert judge([output], [right], "exact")["correct"] == is_correct


@given(st.text(st.sampled_from(string.printable + "。，ＡＢ北京é")))
def test_a_normalised_text_stays_as_it_is(text: str):
    assert normalised(normalised(text)) == normalised(text)


def test_most_samples_decide_and_the_ill_formed_do_not_vote():
    found = judge(["#### 7", "none", "no idea", "8, no, 9", "0.70e1"], ["#### 7"], "numeric")
    assert found == {"prediction": "7", "correct": True, "ill_formed": False, "num_correct_samples": 2}


def test_among_equals_the_first_answer_wins():
    assert judge(["3", "4", "4", "3"], ["4"], "numeric")["prediction"] == "3"
    assert judge(["4", "3", "3", "4"], ["4"], "numeric")["prediction"] == "4"


@pytest.mark.parametrize(("texts", "scoring"), [(["none", ""], "numeric"), ([" . "], "exact"), ([], "numeric")])
def test_an_ill_formed_answer_is_wrong(texts: list[str], scoring):
    found = judge(texts, ["5"], scoring)
    assert found == {"prediction": None, "correct": False, "ill_formed": True, "num_correct_samples": 0}


def test_any_of_several_right_answers_counts():
    assert judge(["The USA"], ["United States", "the USA"], "exact")["correct"]

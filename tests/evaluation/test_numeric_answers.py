from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.numeric_answers import Number, final_number, numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 5 + 7 = 12 apples.", "12"),
        ("She has 5 - 7 = -2 apples", "-2"),
        ("5 + 7 = 12\n#### 12", "12"),
        ("#### 1,234.50 (not 7)", "1234.5"),
        ("#### 5 or rather\n#### 6", "6"),
        ("The answer is -$5.", "-5"),
        ("It costs $1,000, not more.", "1000"),
        ("\N{MINUS SIGN}7", "-7"),
        ("(-3)", "-3"),
        ("x=-3", "-3"),
        ("10-3", "3"),
        ("GPT-4", "4"),
        ("wait...5", "5"),
        ("答案是１，２３４。", "1234"),
        ("等于-5个", "-5"),
        ("3/4", "3/4"),
        ("2 1/2 cups", "5/2"),
        ("-1/2", "-1/2"),
        ("7 / 8.", "7/8"),
        ("5/0 is no fraction, 7 is", "7"),
        ("3/4.5", "4.5"),
        (r"so \boxed{\frac{3}{4}}, not 9", "3/4"),
        (r"$2\frac{1}{2}$", "5/2"),
        (r"\boxed{1{,}000\%}", "1000"),
        (".5", "1/2"),
        ("1.5e3", "1500"),
        ("2E-2 m", "1/50"),
        ("72.", "72"),
        ("5kg", "5"),
        ("1,2345", "2345"),
        ("12,345,678", "12345678"),
    ],
)
def test_the_final_number_is_read(text: str, value: str):
    found = final_number(text)
    assert found is not None
    assert found.value == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "####", "5 apples\n#### five", "x2", "H2O", "9" * 5000, r"\boxed{x}"])
def test_a_text_without_a_number_where_it_should_be_has_none(text: str):
    assert final_number(text) is None


@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from(["", "$", "€"]), st.booleans())
def test_a_number_is_read_as_it_was_written(whole: int, num_decimals: int, currency: str, has_commas: bool):
    value = Fraction(whole, 10**num_decimals)
    digits = f"{abs(whole) // 10**num_decimals:{',' if has_commas else ''}}"
    decimals = f".{abs(whole) % 10**num_decimals:0{num_decimals}}" if num_decimals else ""
    written = f"{'-' if whole < 0 else ''}{currency}{digits}{decimals}"
    assert final_number(f"First 3, so the answer is {written}.") == Number(value)
    assert final_number(f"3 of them. #### {written}\n") == Number(value)


@given(st.integers(0, 999), st.integers(0, 10**6), st.integers(1, 10**6))
def test_fractions_and_mixed_numbers_are_exact(whole: int, upper: int, lower: int):
    assert final_number(f"it is {upper}/{lower}") == Number(Fraction(upper, lower))
    assert final_number(f"it is {whole} {upper}/{lower}") == Number(whole + Fraction(upper, lower))


@given(st.text(st.sampled_from("0123456789.,-+/%$eE #\\boxed{frac} \n一"), max_size=60) | st.text(max_size=60))
def test_any_text_can_be_read(text: str):
    found = final_number(text)
    assert found is None or isinstance(found.value, Fraction)
    if not any(character.isdigit() for character in text):
        assert found is None


def test_a_long_loop_of_digits_is_read_at_once():
    assert list(numbers("1" * 300_000 + " " + "1,111" * 50_000 + " 2 3"))[-1] == Number(Fraction(3))


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [
        ("50%", "50", True),
        ("50%", "0.5", True),
        ("0.5", "50％", True),
        ("50%", "50 %", True),
        ("50%", "0.5%", False),
        ("50%", "5", False),
        ("0.50", "1/2", True),
        ("0.33", "1/3", False),
    ],
)
def test_a_percentage_beside_a_plain_number_may_be_meant_both_ways(one: str, other: str, are_equal: bool):
    first, second = final_number(one), final_number(other)
    assert first is not None
    assert second is not None
    assert first.equals(second) == second.equals(first) == are_equal

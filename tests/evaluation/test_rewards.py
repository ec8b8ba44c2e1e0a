from pathlib import Path

import pytest

from data_prep.config_file import ConfigError
from evaluation.rewards import load_reward

CODE = """
def length(prompt, text, row):
    return len(text) + row["bonus"]

def endless(prompt, text, row):
    return float("inf")

def words(prompt, text, row, *, scale=2):
    return f"{scale}"

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_a_function_judges_an_answer_by_the_prompt_and_its_record(file):
    assert load_reward(f"{file}:length")("p", "abc", {"bonus": 0.5}) == 3.5
    assert load_reward(f"{file}:words")("p", "abc", {}) == 2.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py", "expected FILE.py:FUNCTION"),
        ("mine.txt:f", "expected FILE.py:FUNCTION"),
        ("other.py:f", "there is no file"),
        ("mine.py:lenght", "has no function lenght"),
        ("mine.py:number", "has no function number"),
    ],
)
def test_a_name_of_nothing_is_refused(name, message, file):
    with pytest.raises(ConfigError, match=message):
        load_reward(str(file.parent / name))


def test_what_a_function_gets_wrong_is_told_with_the_answer(file):
    with pytest.raises(ConfigError, match="returned inf for the answer 'abc'; expected a finite number"):
        load_reward(f"{file}:endless")("p", "abc", {})
    with pytest.raises(ConfigError, match="failed on the answer 'abc': KeyError: 'bonus'"):
        load_reward(f"{file}:length")("p", "abc", {})

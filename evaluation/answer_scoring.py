"""Whether an answer is right: by the number it ends in, or as a whole; and which of several answers has most votes."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from evaluation.numeric_answers import MARK, Number, final_number

Scoring = Literal["numeric", "exact", "none"]
Prediction = Number | str | None
"""What an answer says; None of an ill-formed one."""
_EDGES = " .,!?;:\"'`*()[]。，！？；：、“”‘’「」"


def prediction(text: str, scoring: Scoring) -> Prediction:
    """What a text answers: its final number, or what it says behind the last mark, if it has one, as a whole."""
    if scoring == "numeric":
        return final_number(text)
    return normalised(text.rpartition(MARK)[2]) or None


def normalised(text: str) -> str:
    """A text without differences of case, width and white space, and without punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)


def judge(texts: Sequence[str], right_answers: Sequence[str], scoring: Scoring) -> dict[str, Any]:
    """What becomes of the answers to one question: the prediction that most of them make, and whether it is right.

    Ill-formed answers have no vote; among equals the first one wins.
    """
    predictions = [prediction(text, scoring) for text in texts]
    right = [prediction(answer, scoring) for answer in right_answers]
    votes = Counter(_key(made) for made in predictions if made is not None)
    winner = votes.most_common(1)[0][0] if votes else None
    chosen = next((made for made in predictions if made is not None and _key(made) == winner), None)
    return {
        "prediction": None if winner is None else str(winner),
        "correct": _is_right(chosen, right),
        "ill_formed": chosen is None,
        "num_correct_samples": sum(_is_right(made, right) for made in predictions),
    }


def _key(made: Number | str) -> Fraction | str:
    return made.value if isinstance(made, Number) else made


def _is_right(made: Prediction, right: Sequence[Prediction]) -> bool:
    if isinstance(made, Number):
        return any(isinstance(answer, Number) and made.equals(answer) for answer in right)
    return made is not None and made in right

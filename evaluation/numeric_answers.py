"""The number that an answer ends in, read without ever evaluating what a model wrote.

What stands behind the last `####` counts, else what is in the last `\\boxed{}`, else the whole text; of the first the
first number, of the others the last one. A number has an optional sign and currency, thousands set off by commas, a
decimal point, an exponent or a fraction with or without a whole number before it, and maybe a percent sign.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (`####`).
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MARK = "####"
_MAX_DIGITS = 64
"""A longer number is a loop of the model, and would take its time to convert."""
_NUMBER = re.compile(
    r"""
    (?: (?<![\w.)\]%]) (?P<sign>[-+]) [$€£¥]? | (?<!\w) (?<!\d\.) )
    (?:
        (?: (?P<whole>\d{1,3}) [ ] )? (?P<upper>\d+) [ ]?/[ ]? (?P<lower>0*[1-9]\d*) (?! \d | \.\d )
      | (?P<decimal> (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? | (?<!\.) \.\d+ )
        (?: [eE] (?P<exponent>[-+]?\d{1,3}) (?!\w) )?
    )
    (?: [ ]? (?P<percent>%) )?
    """,
    re.VERBOSE | re.ASCII,
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX_FRACTION = re.compile(r"(\d?)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", re.ASCII)
_PLAIN = {full_width: full_width - 0xFEE0 for full_width in range(0xFF01, 0xFF5F)}
_PLAIN |= {ord("\N{MINUS SIGN}"): "-", ord("\N{FRACTION SLASH}"): "/", ord("\N{NO-BREAK SPACE}"): " "}


class Number(NamedTuple):
    """An exact value; of 5 % it is 5."""

    value: Fraction
    is_percent: bool = False

    def equals(self, other: "Number") -> bool:
        """Whether they are the same; of a percentage beside a plain number, 50 % is both 50 and 0.5."""
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percent, plain = (self.value, other.value) if self.is_percent else (other.value, self.value)
        return plain in (percent, percent / 100)


def final_number(text: str) -> Number | None:
    """The number that an answer ends in; None if it has none where it should be."""
    text = _without_latex(text.translate(_PLAIN))
    if MARK in text:
        return next(numbers(text.rpartition(MARK)[2]), None)
    boxed = _BOXED.findall(text)
    found = list(numbers(boxed[-1] if boxed else text))
    return found[-1] if found else None


def numbers(text: str) -> Iterator[Number]:
    """The numbers in a text, in order."""
    for match in _NUMBER.finditer(text):
        parts = match.groupdict()
        if len(match[0]) > _MAX_DIGITS:
            continue
        if parts["lower"]:
            value = Fraction(int(parts["upper"]), int(parts["lower"])) + int(parts["whole"] or 0)
        else:
            value = Fraction(parts["decimal"].replace(",", "")) * Fraction(10) ** int(parts["exponent"] or 0)
        yield Number(-value if parts["sign"] == "-" else value, parts["percent"] is not None)


def _without_latex(text: str) -> str:
    for escaped, plain in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\!", ""), ("\\,", "")):
        text = text.replace(escaped, plain)
    return _LATEX_FRACTION.sub(lambda match: f"{match[1]}{' ' if match[1] else ''}{match[2]}/{match[3]}", text)

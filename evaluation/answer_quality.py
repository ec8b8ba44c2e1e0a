"""Whether a model's answers end, repeat themselves, or are empty: what goes wrong first after fine-tuning.

An answer repeats itself if more than REPEATED_SHARE of its runs of four tokens stood in it before: seq-rep-4, which is
near 0.01 for human text, and near 1 in a loop.

Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020, section 6 (seq-rep-n).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

REPEATED_SHARE = 0.3
_RUN = 4


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of one answer, without the one that ended it."""

    tokens: Sequence[int]
    has_stopped: bool
    """Whether it ended by itself, and not because there was no more room for it."""
    text: str


def split_stop(tokens: Sequence[int], stop_ids: Collection[int]) -> tuple[Sequence[int], bool]:
    """The tokens without a stop token as their last, and whether there was one."""
    has_stopped = bool(tokens) and tokens[-1] in stop_ids
    return (tokens[:-1] if has_stopped else tokens), has_stopped


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of the runs of four tokens that stood there before; 0 of an answer without any."""
    runs = [tuple(tokens[i : i + _RUN]) for i in range(len(tokens) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def quality(answers: Sequence[Answer]) -> dict[str, float]:
    """Rates of stopping, repetition and emptiness, and the mean length in tokens, over at least one answer."""
    count = len(answers)
    return {
        "stop_rate": sum(answer.has_stopped for answer in answers) / count,
        "repetition_rate": sum(repeated_share(answer.tokens) > REPEATED_SHARE for answer in answers) / count,
        "mean_tokens": sum(len(answer.tokens) for answer in answers) / count,
        "empty_rate": sum(not answer.text.strip() for answer in answers) / count,
    }


def quality_line(figures: dict[str, float]) -> str:
    """The figures of `quality` in words."""
    return (
        f"stop rate {figures['stop_rate']:.1%}  repetition {figures['repetition_rate']:.1%}  "
        f"mean length {figures['mean_tokens']:,.1f} tokens  empty {figures['empty_rate']:.1%}"
    )

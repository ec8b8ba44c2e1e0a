"""The turns of a conversation, and how they are written for a model: `<|im_start|>role\\n...<|im_end|>\\n`."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

ROLES = ("system", "user", "assistant", "tool")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class Turn(NamedTuple):
    """What one side of a conversation said."""

    role: str
    """One of ROLES."""
    content: str


class Piece(NamedTuple):
    """A stretch of a written conversation: the name of one special token, or ordinary text."""

    text: str
    is_special: bool


def plain_text(turns: Sequence[Turn]) -> str:
    """What was said, without who said it: the text that filters and sketches see."""
    return "\n".join(turn.content for turn in turns)


def pieces(turns: Sequence[Turn]) -> Iterator[Piece]:
    """The conversation in the ChatML form, its special tokens apart.

    They stay apart because a turn that spells `<|im_end|>` speaks about the token and does not end.
    """
    for turn in turns:
        yield Piece(TURN_START, True)
        yield Piece(f"{turn.role}\n{turn.content}", False)
        yield Piece(TURN_END, True)
        yield Piece("\n", False)

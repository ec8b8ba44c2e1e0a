"""What a conversation is made of, and the parts that it is written in."""

from typing import Literal, NamedTuple

Kind = Literal["chat", "pairs", "prompts"]
"""What a chat data folder holds: conversations, a chosen and a rejected answer, or prompts to be answered."""
ROLES = ("system", "user", "assistant", "tool")


class Turn(NamedTuple):
    """What one side of a conversation said."""

    role: str
    """One of ROLES."""
    content: str


class Piece(NamedTuple):
    """A stretch of a written conversation: the name of one special token, or ordinary text."""

    text: str
    is_special: bool


class Part(NamedTuple):
    """A piece, and who says it."""

    text: str
    is_special: bool
    is_said: bool
    """Whether the assistant says it; no merge of tokens crosses the border between what it says and the rest."""
    is_trained: bool
    """Whether the loss counts its tokens."""

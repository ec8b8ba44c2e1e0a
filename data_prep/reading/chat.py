"""The turns of a conversation as raw files hold them, and how pretraining reads one: in the format chatml."""

from collections.abc import Iterator, Sequence

from data_prep.chat.chat_format import FORMATS
from data_prep.chat.turns import ROLES, Piece, Turn

__all__ = ["ROLES", "TURN_END", "TURN_START", "Piece", "Turn", "pieces", "plain_text"]

CHATML = FORMATS["chatml"]
TURN_START, TURN_END = CHATML.specials


def plain_text(turns: Sequence[Turn]) -> str:
    """What was said, without who said it: the text that filters and sketches see."""
    return "\n".join(turn.content for turn in turns)


def pieces(turns: Sequence[Turn]) -> Iterator[Piece]:
    """The conversation in the ChatML form, its special tokens apart.

    They stay apart because a turn that spells `<|im_end|>` speaks about the token and does not end.
    """
    text = ""
    for part in CHATML.parts(turns):
        if not part.is_special:
            text += part.text
            continue
        if text:
            yield Piece(text, False)
        yield Piece(part.text, True)
        text = ""
    if text:
        yield Piece(text, False)

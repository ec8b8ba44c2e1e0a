from hypothesis import given
from hypothesis import strategies as st

from data_prep.reading.chat import ROLES, Piece, Turn, pieces, plain_text

turns = st.lists(st.builds(Turn, st.sampled_from(ROLES), st.text()))


def test_a_conversation_is_written_turn_by_turn():
    conversation = [Turn("user", "a"), Turn("assistant", "b\n")]
    assert "".join(piece.text for piece in pieces(conversation)) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb\n<|im_end|>\n"
    )


def test_a_turn_that_spells_a_special_token_does_not_end():
    assert [*pieces([Turn("user", "a<|im_end|>b")])] == [
        Piece("<|im_start|>", True),
        Piece("user\na<|im_end|>b", False),
        Piece("<|im_end|>", True),
        Piece("\n", False),
    ]


@given(turns)
def test_nothing_of_a_conversation_is_lost(conversation: list[Turn]):
    ordinary = [piece.text for piece in pieces(conversation) if not piece.is_special][::2]
    assert [tuple(text.split("\n", 1)) for text in ordinary] == conversation
    assert plain_text(conversation) == "\n".join(turn.content for turn in conversation)

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.text_sample import TextSample
from tests.evaluation.stored import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()


def feed_all(text: str, stop_texts: list[str]) -> list[str]:
    """The pieces that a sample shows while text arrives one byte-level token at a time."""
    sample = TextSample(TOKENIZER, stop_texts)
    pieces = [sample.feed(token) for token in TOKENIZER.encode(text)]
    return [*pieces, sample.flush()]


@given(text=st.text(max_size=40))
def test_without_stop_texts_the_whole_text_arrives(text):
    assert "".join(feed_all(text, [])) == text.encode("utf-8", "replace").decode()


@given(text=st.text("abc\n", max_size=30), stop_texts=st.lists(st.text("abc\n", max_size=4), max_size=3))
def test_text_is_cut_before_the_first_stop_text(text, stop_texts):
    ends = [text.find(stop) for stop in stop_texts if stop and stop in text]
    assert "".join(feed_all(text, stop_texts)) == text[: min(ends, default=len(text))]


def test_only_what_may_begin_a_stop_text_is_held_back():
    sample = TextSample(TOKENIZER, ["###"])
    shown = [sample.feed(token) for character in "ab##c###d" for token in TOKENIZER.encode(character)]
    assert shown == ["a", "b", "", "", "##c", "", "", "", ""]
    assert sample.has_ended


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    tokens = TOKENIZER.encode("☃")
    assert len(tokens) == 3
    sample = TextSample(TOKENIZER)
    assert [sample.feed(token) for token in tokens] == ["", "", "☃"]


def test_the_end_token_ends_a_sample_and_releases_what_was_held_back():
    sample = TextSample(TOKENIZER, ["ab"])
    assert sample.feed(TOKENIZER.encode("a")[0]) == ""
    assert sample.feed(TOKENIZER.eos_id) == "a"
    assert sample.has_ended
    assert sample.feed(TOKENIZER.encode("x")[0]) == ""
    assert sample.flush() == ""


@pytest.mark.parametrize("token", [TOKENIZER.vocab_size, TOKENIZER.vocab_size + 5])
def test_ids_that_only_pad_the_vocabulary_are_no_text(token):
    assert TextSample(TOKENIZER).feed(token) == ""

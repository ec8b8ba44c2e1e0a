import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenizing.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError, load_tokenizer, train_bpe

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 5,
    "The quick brown fox isn't lazy, it's 12345 years old.\n" * 5,
    "今天天气很好，我们去公园散步吧。机器学习需要大量的数据。" * 5,
    "special: <|endoftext|> and </s> are only text 🚀🌍" * 5,
]
TEXTS = [
    *CORPUS,
    "<|endoftext|>",
    "a<|im_start|>b<|im_end|><|pad|></s>",
    "日本語 한국어 Ελληνικά 👩‍👩‍👧‍👦 \U0001f680",
    "tabs\tand\r\nline ends \x00 nul  two   three    spaces   ",
    " leading space",
    "é vs e\u0301",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(CORPUS, 400)


def train_sentencepiece(model_type: str, vocab_size: int, **options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_writer=model,
        model_type=model_type,
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def piece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "small.model"
    path.write_bytes(train_sentencepiece("bpe", 420))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_unchanged(bpe: Tokenizer, text: str):
    assert bpe.decode(bpe.encode(text)) == text


@given(text=st.text())
def test_byte_level_text_of_any_kind_comes_back_and_its_bytes_add_up(bpe: Tokenizer, text: str):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes()[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("text", TEXTS)
def test_special_tokens_spelled_in_a_text_stay_text(bpe: Tokenizer, text: str):
    assert min(bpe.encode(text)) >= len(SPECIAL_TOKENS)
    (ids,) = bpe.encode_batch([text])
    assert ids == bpe.encode(text)


def test_special_tokens_come_first_and_stand_for_no_bytes(bpe: Tokenizer):
    assert [bpe._backend.token_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert bpe.eos_id == 0
    sizes = bpe.token_bytes()
    assert (sizes.dtype, sizes.shape) == (np.dtype("int32"), (bpe.vocab_size,))
    assert sizes[:4].tolist() == [0, 0, 0, 0]
    assert sizes[4:].min() == 1
    assert bpe.decode([0, 1, 2, 3]) == ""


def test_digits_are_read_one_by_one(bpe: Tokenizer):
    assert len(bpe.encode("12345")) == 5


def test_training_twice_gives_the_same_bytes(bpe: Tokenizer, tmp_path: Path):
    again = train_bpe(CORPUS, 400)
    assert again.digest == bpe.digest
    bpe.save(tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    again.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(TokenizerError, match="at least 260"):
        train_bpe(CORPUS, 259)
    assert train_bpe(["a"], 260).vocab_size == 260


def test_a_saved_tokenizer_is_loaded_equal_from_file_and_folder(bpe: Tokenizer, tmp_path: Path):
    assert bpe.file is None
    name = bpe.save(tmp_path)
    for path in (tmp_path, tmp_path / name, str(tmp_path)):
        loaded = load_tokenizer(path)
        assert (loaded.digest, loaded.vocab_size, loaded.eos_id) == (bpe.digest, bpe.vocab_size, 0)
        assert loaded.file == tmp_path / "tokenizer.json"
        assert [loaded.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]


def test_the_choice_of_end_token_is_part_of_the_digest(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path)
    other = load_tokenizer(tmp_path, "<|im_end|>")
    assert (other.eos_id, other.digest != bpe.digest) == (2, True)
    assert load_tokenizer(tmp_path, eos_id=2).digest == other.digest


def test_truncation_and_padding_set_in_a_file_are_ignored(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    truncating = tokenizers.Tokenizer.from_file(str(path))
    truncating.enable_truncation(3)
    truncating.enable_padding(length=8)
    truncating.save(str(path))
    loaded = load_tokenizer(path)
    assert [loaded.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]


def test_without_a_known_end_token_the_error_names_the_candidates(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|fin|>").replace("<|im_end|>", "<|fin2|>"))
    with pytest.raises(TokenizerError, match=r"looked for <\|endoftext\|>, .*</s>.*--tokenizer\.eos-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "<|fin|>").eos_id == 0
    with pytest.raises(TokenizerError, match="looked for <nope>"):
        load_tokenizer(path, "<nope>")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_what_is_no_tokenizer_is_refused_by_name(tmp_path: Path, name: str):
    with pytest.raises(TokenizerError, match=f"{name}: no such tokenizer"):
        load_tokenizer(tmp_path / name)
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor one \.model"):
        load_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"model": 5}')
    with pytest.raises(TokenizerError, match=f"{name}: not a"):
        load_tokenizer(tmp_path)


def test_a_byte_fallback_tokenizer_json_counts_bytes_like_sentencepiece(tmp_path: Path):
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0, "<0xE4>": 1, "▁a": 2, "▁": 3, "a": 4, "é": 5}, [("▁", "a")])
    )
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    made.add_special_tokens(["</s>"])
    made.add_tokens(["<tool>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).token_bytes().tolist() == [0, 1, 2, 1, 1, 2, 6]


def test_special_tokens_of_a_published_file_are_told_from_those_found_in_text(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.add_tokens(["<tool_call>"])
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_id("<|im_end|>") == 2
    found = loaded.special_id("<tool_call>")
    assert found == 400
    assert loaded.encode("a<tool_call>") == [*loaded.encode("a"), 400]
    assert [loaded.is_special(i) for i in (2, 4, 400)] == [True, False, False]
    assert loaded.added_tokens == [*SPECIAL_TOKENS, "<tool_call>"]
    assert loaded.unknown_id is None


def test_marks_of_a_sentencepiece_model_are_found_by_name(piece_file: Path):
    tokenizer = load_tokenizer(piece_file)
    assert [tokenizer.special_id(mark) for mark in ("<unk>", "<s>", "</s>", "a", "<0x41>")] == [0, 1, 2, None, None]
    assert [tokenizer.is_special(i) for i in (0, 1, 2, 3)] == [True, True, True, False]
    assert tokenizer.unknown_id == 0


def test_a_tokenizer_of_unknown_kind_does_not_guess_its_bytes(tmp_path: Path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "a": 1}, "a"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="does not say which bytes"):
        load_tokenizer(tmp_path).token_bytes()


@pytest.mark.parametrize("text", [text for text in TEXTS if "\x00" not in text])
def test_sentencepiece_text_comes_back_and_its_bytes_add_up(piece_file: Path, text: str):
    tokenizer = load_tokenizer(piece_file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    # One byte more than the text: the space that sentencepiece puts before it.
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8")) + 1


def test_a_sentencepiece_model_declares_its_end_token_and_is_saved_as_it_was(piece_file: Path, tmp_path: Path):
    tokenizer = load_tokenizer(piece_file.parent)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2, 420)
    assert tokenizer.save(tmp_path) == "tokenizer.model"
    assert (tmp_path / "tokenizer.model").read_bytes() == piece_file.read_bytes()
    assert load_tokenizer(tmp_path).digest == tokenizer.digest
    assert load_tokenizer(tmp_path, "<s>").eos_id == 1
    with pytest.raises(TokenizerError, match="looked for <nope>"):
        load_tokenizer(tmp_path, "<nope>")


def test_a_sentencepiece_model_without_end_token_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece("unigram", 330, eos_id=-1))
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        load_tokenizer(tmp_path)


@pytest.fixture(params=["bpe", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer, piece_file: Path) -> Tokenizer:
    return bpe if request.param == "bpe" else load_tokenizer(piece_file)


def test_a_stream_of_ids_prints_whole_characters_as_they_are_complete(any_tokenizer: Tokenizer):
    for text in TEXTS:
        decoder = any_tokenizer.stream_decoder()
        parts = [decoder.feed(token_id) for token_id in any_tokenizer.encode(text)]
        # A stream continues a text, so it keeps the space that sentencepiece puts before the first word.
        first_space = " " if any_tokenizer.file_name == "tokenizer.model" else ""
        assert "".join(parts) + decoder.flush() == first_space + text
        assert not any("\ufffd" in part for part in parts)


def test_a_stream_that_ends_inside_a_character_shows_it_as_replaced(bpe: Tokenizer):
    decoder = bpe.stream_decoder()
    ids = bpe.encode("\u20bf")
    assert bpe.token_bytes()[ids].tolist() == [1, 1, 1]
    assert [decoder.feed(token_id) for token_id in ids[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(ids[1]) == "\ufffd"
    assert decoder.feed(10**6) == ""  # an id of a padded vocabulary


def test_independent_reading_of_the_vocabulary_agrees_on_bytes(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    decode: Callable[[list[str]], str] = tokenizers.decoders.ByteLevel().decode
    sizes = bpe.token_bytes()
    for piece, token_id in vocabulary.items():
        decoded = decode([piece])
        if token_id > 3 and "\ufffd" not in decoded:
            assert sizes[token_id] == len(decoded.encode("utf-8"))

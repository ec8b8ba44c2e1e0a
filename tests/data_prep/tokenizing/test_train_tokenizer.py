import inspect
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from data_prep.reading import documents
from data_prep.tokenizing import backends, byte_pairs, encoders, tokenizer
from data_prep.tokenizing.backends import CHARACTER_OF_BYTE, TokenizerError
from data_prep.tokenizing.byte_pairs import ASCII_SPLIT_PATTERN, SPLIT_PATTERN, count_words
from data_prep.tokenizing.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_bpe, train_bpe_from_counts
from data_prep.tokenizing.train_tokenizer import CHAT_MARKS, Algorithm, main, train, train_sentencepiece

SOURCES = [inspect.getsource(module) for module in (backends, byte_pairs, documents, encoders, tokenizer)]
CORPUS = [
    *SOURCES,
    "今天天气很好，我们去公园散步吧。机器学习需要大量的数据，数据越多越好。" * 5,
    "<|im_start|>user </s> says <0x41> and <|endoftext|><|im_end|> 🚀" * 50,
]
ALGORITHMS: tuple[Algorithm, ...] = ("bpe", "sentencepiece-bpe", "sentencepiece-unigram")
VOCAB_SIZE = 600


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return train(CORPUS, request.param, VOCAB_SIZE)


@settings(max_examples=200)
@given(text=st.text() | st.text("a \n\t\x00▁é\u0301你<|im_start>", max_size=30))
def test_any_text_comes_back_from_any_kind_of_tokenizer(trained: Tokenizer, text: str):
    ids = trained.encode(text)
    # Sentencepiece writes spaces as U+2581 and cannot tell the two apart.
    expected = text if trained.file_name == "tokenizer.json" else text.replace("\u2581", " ")
    assert trained.decode(ids) == expected
    assert trained.token_bytes()[ids].sum() == len(expected.encode("utf-8"))
    assert not any(map(trained.is_special, ids))


def test_a_text_that_continues_another_is_encoded_without_a_space_between(trained: Tokenizer):
    ids = trained.encode("def f(") + trained.encode("x):")
    assert trained.decode(ids) == "def f(x):"


def test_digits_are_read_one_by_one_and_indentation_at_once(trained: Tokenizer):
    assert len(trained.encode("x12345")) == 6
    assert len(trained.encode("x\n        x")) <= 5


def test_marks_come_first_and_are_found_by_name(trained: Tokenizer):
    marks = SPECIAL_TOKENS if trained.file_name == "tokenizer.json" else ("<unk>", "</s>", *CHAT_MARKS)
    assert [trained.special_id(mark) for mark in marks] == list(range(len(marks)))
    assert [trained.is_special(i) for i in (0, len(marks) - 1, len(marks))] == [True, True, False]
    assert trained.special_id("<|nothing|>") is None
    assert trained.special_id("return") is None
    assert trained.eos_id == SPECIAL_TOKENS.index("<|endoftext|>") if marks is SPECIAL_TOKENS else 1
    assert trained.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_texts_give_equal_files(algorithm: Algorithm):
    assert train(iter(CORPUS), algorithm, VOCAB_SIZE).content == train(CORPUS, algorithm, VOCAB_SIZE).content


def test_a_tokenizer_that_is_saved_and_loaded_is_the_same(trained: Tokenizer, tmp_path: Path):
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.digest, loaded.eos_id) == (trained.digest, trained.eos_id)
    assert loaded.encode_batch(CORPUS) == trained.encode_batch(CORPUS)


@settings(max_examples=300)
@given(text=st.text(st.characters(max_codepoint=127)) | st.text("aZ09 _'sLl\n\r\t\x0b\x1c\x85"))
def test_the_pattern_for_ascii_splits_as_the_one_for_all_text(text: str):
    ascii_text = text.encode("ascii", "ignore").decode("ascii")
    assert re.findall(ASCII_SPLIT_PATTERN, ascii_text, re.ASCII) == regex.findall(SPLIT_PATTERN, ascii_text)


@given(texts=st.lists(st.text()))
def test_counted_words_are_those_that_the_tokenizer_sees_and_add_up(texts: list[str]):
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    seen = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    parts = sum((count_words([text]) for text in texts), Counter())
    assert count_words(texts) == parts
    # The two libraries have different versions of Unicode.
    if all(map(str.isascii, texts)):
        assert parts == seen


def test_counts_in_any_order_give_the_same_tokenizer_as_their_texts():
    counts = count_words(CORPUS)
    shuffled = dict(sorted(counts.items(), reverse=True))
    assert train_bpe_from_counts(shuffled, VOCAB_SIZE).content == train_bpe(CORPUS, VOCAB_SIZE).content


def pair_counts(words: dict[tuple[str, ...], int]) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        for pair in itertools.pairwise(word):
            counts[pair] += count
    return counts


def merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in word:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def test_each_merge_joins_a_most_frequent_pair_of_its_moment():
    # No word repeats a character next to itself: how often (a, a) is in aaa is a matter of taste.
    text = "low lower lowest newer newest wider widest never clever 今天 今夜 天气 气候 " * 3 + "lowe lowe newe"
    made = json.loads(train_bpe([text], 400).content)
    assert made["model"]["merges"]
    words: dict[tuple[str, ...], int] = {}
    for word, count in count_words([text]).items():
        words[tuple(CHARACTER_OF_BYTE[byte] for byte in word.encode("utf-8"))] = count
    for left, right in made["model"]["merges"]:
        counts = pair_counts(words)
        assert counts[left, right] == max(counts.values(), default=0) > 0, (left, right)
        words = {merge(word, (left, right)): count for word, count in words.items()}
    assert all(len(word) == 1 for word in words)


def test_the_vocabulary_compresses_like_that_of_the_tokenizers_trainer():
    other = LibraryTokenizer(models.BPE())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"), spell])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=996, initial_alphabet=alphabet, show_progress=False)
    )
    theirs = sum(len(encoding.ids) for encoding in other.encode_batch(CORPUS))
    ours = sum(map(len, train_bpe(CORPUS, 1000).encode_batch(CORPUS)))
    assert abs(ours - theirs) < 0.005 * theirs


def test_too_many_words_leave_out_the_rarest_and_endless_ones_are_never_learned(monkeypatch: pytest.MonkeyPatch):
    texts = ["seldom " + "always always " * 5 + "=" * 5000]
    vocabulary = json.loads(train_bpe(texts, 300).content)["model"]["vocab"]
    assert {"\u0120always", "seldom"} <= set(vocabulary)
    assert "==" not in vocabulary
    monkeypatch.setattr(byte_pairs, "MAX_LEARNED_BYTES", len(" always") + len("seldom") - 1)
    assert "seldom" not in json.loads(train_bpe(texts, 300).content)["model"]["vocab"]


def test_a_small_corpus_yields_fewer_tokens():
    assert train_bpe(["ab"], 1000).vocab_size == 261
    assert train_bpe(["a"], 1000).vocab_size == 260


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_is_an_error_and_not_a_tokenizer_of_bytes(algorithm: Algorithm, texts: list[str]):
    with pytest.raises(TokenizerError, match="^no text to train on: "):
        train(texts, algorithm, 1000)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_sentencepiece_vocabulary_that_does_not_fit_the_text_is_an_error(model: Literal["bpe", "unigram"]):
    with pytest.raises(TokenizerError, match=r"vocab_size = 90000: this text yields at most \d+ tokens; give more"):
        train_sentencepiece(CORPUS, 90_000, model)
    with pytest.raises(TokenizerError, match=r"vocab_size = 100: .* need at least \d+"):
        train_sentencepiece(CORPUS, 100, model)
    with pytest.raises(TokenizerError, match="no text to train on"):
        train_sentencepiece(["", "\n"], 1000, model)


def test_long_lines_are_learned_from_as_well():
    line = "supercalifragilistic " * 2000
    trained = train_sentencepiece([line], 290, "bpe")
    assert max(map(len, trained.token_contents())) > 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_command_line_trains_on_files(algorithm: Algorithm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for i, text in enumerate(SOURCES):
        (tmp_path / f"source{i}.py").write_text(text, encoding="utf-8")
    out = tmp_path / "made" / algorithm
    assert main([str(out), f"{tmp_path}/*.py", "--vocab-size", "500", "--algorithm", algorithm]) == 0
    made = load_tokenizer(out)
    assert (made.vocab_size, made.decode(made.encode(SOURCES[2]))) == (500, SOURCES[2])
    assert capsys.readouterr().out.startswith(f"{out / made.file_name}: 500 tokens")


def test_the_command_line_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "out"), str(tmp_path / "none.txt")]) == 65
    assert "none.txt" in capsys.readouterr().err
    assert main([str(tmp_path / "out")]) == 65
    assert "no files to train on" in capsys.readouterr().err
    (tmp_path / "a.py").write_text(SOURCES[2], encoding="utf-8")
    assert main([str(tmp_path / "out"), str(tmp_path / "a.py"), "--vocab-size", "10"]) == 65
    assert capsys.readouterr().err == "error: vocab_size = 10: a byte-level BPE needs at least 260\n"
    assert main([str(tmp_path / "out"), str(tmp_path / "a.py"), "--training-bytes", "-5"]) == 65
    assert capsys.readouterr().err == "error: training_bytes = -5: must be positive\n"
    (tmp_path / "empty.txt").write_text("\n")
    assert main([str(tmp_path / "out"), str(tmp_path / "empty.txt")]) == 65
    assert capsys.readouterr().err.startswith("error: no text to train on: ")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("a file where a folder should be")
    assert main([str(tmp_path / "out"), str(tmp_path / "a.py"), "--vocab-size", "300"]) == 74

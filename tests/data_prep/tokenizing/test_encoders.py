import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import pre_tokenizers as split_by

from data_prep.tokenizing import encoder_libraries, encoders
from data_prep.tokenizing.backends import TokenizerError, load_backend
from data_prep.tokenizing.byte_pairs import SPLIT_PATTERN
from data_prep.tokenizing.encoder_libraries import ENCODER_FOLDER, Reference, Tiktoken, UnfitError, Version1
from data_prep.tokenizing.encoders import encoder_named, fastest_encoder, proof_texts
from data_prep.tokenizing.stable_unicode import has_later_letters
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe
from data_prep.tokenizing.train_tokenizer import train_sentencepiece

CORPUS = [
    "def add(a, b):\n    return a + b\n" * 5,
    "The quick brown fox isn't lazy, it's 12345 years old. WE'LL SEE   \t\n\n\n" * 5,
    "今天天气很好，我们去公园散步吧。机器学习需要大量的数据。" * 5,
    "special: <|endoftext|> and </s> are only text 🚀🌍 é e\u0301 Ελληνικά русский 日本語 한국어" * 5,
]
MARKS = ["<|endoftext|>", "<|im_start|>"]
LLAMA_3_PATTERN = SPLIT_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
LATER = "\u088f's \U000323b0's"
"""Letters of Unicode 17, which only the newest tables know: to others they are signs, and join the apostrophe."""

needs_version_1 = pytest.mark.skipif(not ENCODER_FOLDER.is_dir(), reason="requirements-encoder.txt is not installed")
Change = Callable[[dict[str, Any]], None]


def wrapped(made: LibraryTokenizer, change: Change = lambda table: None) -> Tokenizer:
    table = json.loads(made.to_str())
    change(table)
    raw = json.dumps(table).encode("utf-8")
    return Tokenizer(load_backend(raw, "tokenizer.json"), raw, eos_id=0)


def byte_level(split: Any, normalizer: Any = None, added: Sequence[AddedToken] = (), change: Change = lambda t: None):
    made = LibraryTokenizer(models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = split
    made.decoder = decoders.ByteLevel()
    alphabet = split_by.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(list(added))
    return wrapped(made, change)


def by(pattern: str) -> Any:
    spell = split_by.ByteLevel(add_prefix_space=False, use_regex=False)
    return split_by.Sequence([split_by.Split(Regex(pattern), "isolated"), spell])


def llama_2(*, byte_fallback: bool = True) -> Tokenizer:
    made = LibraryTokenizer(models.BPE(byte_fallback=byte_fallback, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = split_by.Metaspace()
    marks = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 if byte_fallback else 0))]
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=60, special_tokens=marks, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])

    def change(table: dict[str, Any]) -> None:
        table["pre_tokenizer"] = None
        table["added_tokens"] = table["added_tokens"][:2]

    return wrapped(made, change)


def mistral() -> Tokenizer:
    def change(table: dict[str, Any]) -> None:
        table["normalizer"] = None
        table["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

    return wrapped(LibraryTokenizer.from_str(llama_2().content.decode("utf-8")), change)


def unigram() -> Tokenizer:
    made = LibraryTokenizer(models.Unigram())
    made.pre_tokenizer = split_by.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return wrapped(made)


def ignore_merges(table: dict[str, Any]) -> None:
    table["model"]["ignore_merges"] = True


def begin_with_a_mark(table: dict[str, Any]) -> None:
    ignore_merges(table)
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    table["post_processor"] = json.loads(template.__getstate__())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "trained here": lambda: train_bpe(CORPUS, 500),
    "qwen": lambda: byte_level(by(SPLIT_PATTERN), normalizers.NFC()),
    "qwen with tool calls": lambda: byte_level(
        by(SPLIT_PATTERN), normalizers.NFC(), [AddedToken("<tool_call>", normalized=False)]
    ),
    "gpt-2": lambda: byte_level(split_by.ByteLevel(add_prefix_space=False)),
    "gpt-2 with a space in front": lambda: byte_level(split_by.ByteLevel(add_prefix_space=True)),
    "llama-3": lambda: byte_level(by(LLAMA_3_PATTERN), change=begin_with_a_mark),
    "starcoder": lambda: byte_level(
        split_by.Sequence([split_by.Digits(individual_digits=True), split_by.ByteLevel(add_prefix_space=False)])
    ),
    "deepseek": lambda: byte_level(
        split_by.Sequence(
            [
                split_by.Split(Regex(r"[\r\n]"), "isolated"),
                split_by.Split(Regex(r"\s?\p{L}+"), "isolated"),
                split_by.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "awkward added tokens": lambda: byte_level(
        by(SPLIT_PATTERN), added=[AddedToken("<tool>x", lstrip=True, rstrip=True), AddedToken("old", single_word=True)]
    ),
    "llama-2": llama_2,
    "llama-2 without bytes": lambda: llama_2(byte_fallback=False),
    "mistral": mistral,
    "unigram": unigram,
    "sentencepiece bpe": lambda: train_sentencepiece(CORPUS, 420, "bpe"),
    "sentencepiece unigram": lambda: train_sentencepiece(CORPUS, 360, "unigram"),
}
RUN_BY_TIKTOKEN = {"trained here", "qwen", "gpt-2", "llama-3"}
NOT_RUN_BY_VERSION_1 = {
    *("gpt-2 with a space in front", "deepseek", "awkward added tokens"),
    *("sentencepiece bpe", "sentencepiece unigram"),
}
MADE: dict[str, Tokenizer] = {}


def tokenizer_of(kind: str) -> Tokenizer:
    if kind not in MADE:
        MADE[kind] = KINDS[kind]()
    return MADE[kind]


CHOSEN: dict[str, encoders.Encoder] = {}


def chosen(kind: str) -> encoders.Encoder:
    if kind not in CHOSEN:
        CHOSEN[kind] = fastest_encoder(tokenizer_of(kind), ["a sample"])
    return CHOSEN[kind]


TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*encoders.SNIPPETS, LATER, "<tool_call>", "old"])))


def assert_same(encoder: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    for text, ids in zip(texts, encoder.encode_arrays(texts), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text), text


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_encoder_gives_the_ids_of_the_tokenizer(kind: str):
    tokenizer = tokenizer_of(kind)
    encoder = chosen(kind)
    assert_same(encoder, tokenizer, [*CORPUS, LATER, "", "x" * 10_000])
    again = encoder_named(tokenizer, encoder.name)
    assert type(again) is type(encoder)
    assert encoder.encode_arrays([]) == []

    @settings(max_examples=40)
    @given(parts=TEXT)
    def agrees(parts: list[str]) -> None:
        assert_same(encoder, tokenizer, ["".join(parts), *parts[:1]])

    agrees()


@needs_version_1
@pytest.mark.parametrize("kind", KINDS)
def test_version_1_is_chosen_wherever_it_gives_the_same_ids(kind: str):
    encoder = chosen(kind)
    assert isinstance(encoder, Reference if kind in NOT_RUN_BY_VERSION_1 else Version1)
    assert len(encoder.rejected) == (2 if kind in NOT_RUN_BY_VERSION_1 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_tiktoken_is_chosen_next_for_vocabularies_it_can_run(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoders, "CANDIDATES", (Tiktoken,))
    tokenizer = tokenizer_of(kind)
    encoder = fastest_encoder(tokenizer)
    assert isinstance(encoder, Tiktoken if kind in RUN_BY_TIKTOKEN else Reference)
    if kind in RUN_BY_TIKTOKEN:
        assert_same(encoder, tokenizer, [*CORPUS, LATER, "e\u0301 \u212b", "".join(encoders.SNIPPETS)])


@needs_version_1
def test_a_token_that_counts_only_as_a_whole_word_is_found_out_by_the_proof():
    (why, _) = chosen("awkward added tokens").rejected
    assert why.startswith("tokenizers 1.")
    assert "gives ids" in why


@pytest.mark.parametrize(("kind", "library"), [("trained here", "tiktoken"), ("unigram", "tokenizers")])
def test_an_installation_without_version_1_encodes_with_what_it_has(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    tokenizer = tokenizer_of(kind)
    monkeypatch.setattr(encoder_libraries, "ENCODER_FOLDER", tmp_path)
    encoder = fastest_encoder(tokenizer)
    assert encoder.name == f"{library} {importlib.metadata.version(library)}"
    assert encoder.rejected[0] == f"Version1: not installed in {tmp_path}"
    assert type(encoder_named(tokenizer, encoder.name)) is type(encoder)
    assert_same(encoder, tokenizer, [*CORPUS, LATER])


def test_an_installation_without_any_faster_library_encodes_with_the_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    tokenizer = tokenizer_of("trained here")
    monkeypatch.setattr(encoder_libraries, "ENCODER_FOLDER", tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    encoder = fastest_encoder(tokenizer)
    assert type(encoder) is Reference
    assert encoder.rejected[1] == "Tiktoken: tiktoken is not installed"
    assert_same(encoder, tokenizer, CORPUS)


class OneIdShort(Reference):
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids[:-1] if text == "only in the sample" else ids for text, ids in zip(texts, self.right(texts))]

    def right(self, texts: Sequence[str]) -> list[np.ndarray]:
        return super().encode_arrays(texts)


class Broken(Reference):
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise RuntimeError("no more")


def test_a_library_that_differs_or_fails_is_passed_over_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    tokenizer = tokenizer_of("trained here")
    monkeypatch.setattr(encoders, "LONG_TEXTS", ())
    monkeypatch.setattr(encoders, "CANDIDATES", (Broken, OneIdShort))
    assert fastest_encoder(tokenizer).rejected == ["Broken: no more"]  # the built-in texts do not tell
    encoder = fastest_encoder(tokenizer, ["fine", "only in the sample"])
    assert type(encoder) is Reference
    assert encoder.rejected[1].startswith(f"{encoder.name}: 'only in the sample' gives ids [] instead of [")


def test_only_the_beginning_of_a_long_sample_is_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoders, "SAMPLE_CHARACTERS", 10)
    assert list(encoders._beginning(["1234567", "abcdefg", "never"])) == ["1234567", "abc"]


def test_an_encoder_that_is_not_here_is_an_error_that_says_what_is():
    tokenizer = tokenizer_of("sentencepiece bpe")
    with pytest.raises(
        TokenizerError, match=r"'tokenizers 9' is not here .*tokenizer\.json.*sentencepiece 0\..*install"
    ):
        encoder_named(tokenizer, "tokenizers 9")


def test_the_proof_spells_out_the_vocabulary_and_its_added_tokens():
    tokenizer = tokenizer_of("qwen with tool calls")
    texts = proof_texts(tokenizer)
    assert {"<tool_call><tool_call>", "<|im_start|>é", " return", "天气"} <= set(texts)
    found = {i for ids in tokenizer.encode_batch(texts) for i in ids}
    whole = {
        i for i in range(tokenizer.vocab_size) if "\ufffd" not in tokenizer.decode([i]) and not tokenizer.is_special(i)
    }
    assert whole <= found


def test_letters_that_came_after_unicode_3_are_told_from_all_others():
    assert not has_later_letters("")
    assert not any(
        map(has_later_letters, [*CORPUS, "\x00\x7f\xff", "👩\u200d👧 ✌\U0001f3fd\ufe0f", "\ue000 𠀀 ﬁ \u3099"])
    )
    for text in ("\u0221", "\u088f", "\U000323b0", "Ꞌ", "\U0010ffff", "a" * 1000 + "\u1e9e"):
        assert has_later_letters(text), ascii(text)


@needs_version_1
def test_letters_that_only_the_newer_library_knows_take_the_way_of_the_older():
    tokenizer = tokenizer_of("trained here")
    encoder = Version1(tokenizer)
    assert_same(encoder, tokenizer, ["plain", LATER, "你好", f"a{LATER}b"])
    without_care = encoder._encode([f"a{LATER}b"])[0].tolist()
    assert without_care != tokenizer.encode(f"a{LATER}b")


def test_tiktoken_leaves_what_its_regex_cannot_do_to_the_reference():
    tokenizer = tokenizer_of("trained here")
    encoder = Tiktoken(tokenizer)
    text = " " * 200_000 + "x"
    with pytest.raises(ValueError, match="stack"):
        encoder._encoding.encode_to_numpy(" " * 1_000_000 + "x")
    assert_same(encoder, tokenizer, ["before", text, "after"])


def _swapped(table: dict[str, Any]) -> None:
    pieces = {token_id: piece for piece, token_id in table["model"]["vocab"].items()}
    table["model"]["vocab"] |= {pieces[300]: 301, pieces[301]: 300}


def _with_unreachable_token(table: dict[str, Any]) -> None:
    table["model"]["vocab"]["zqzq"] = 500


def _with_prefix(table: dict[str, Any]) -> None:
    table["model"]["end_of_word_suffix"] = "</w>"


def _with_split_that_removes(table: dict[str, Any]) -> None:
    table["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_swapped, "order of its merges"),
        (_with_unreachable_token, "order of its merges"),
        (_with_prefix, "suffixes"),
        (_with_split_that_removes, "way of splitting"),
        (lambda table: table.update(normalizer={"type": "NFKC"}), "normalizer NFKC"),
        (lambda table: table.update(pre_tokenizer=None), "byte-level"),
    ],
)
def test_tiktoken_is_not_given_a_vocabulary_that_it_would_read_otherwise(change: Change, reason: str):
    content = tokenizer_of("trained here").content.decode("utf-8")
    with pytest.raises(UnfitError, match=reason):
        Tiktoken(wrapped(LibraryTokenizer.from_str(content), change))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen", "gpt-2", "llama-2"])
def test_every_character_of_unicode_gets_the_same_ids(kind: str):
    tokenizer = tokenizer_of(kind)
    encoder = fastest_encoder(tokenizer)
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = [f"a{c}b 1{c}{c}'s{c}\n {c}\u0323a\u0345{c}" for c in characters]
    for start in range(0, len(texts), 50_000):
        batch = texts[start : start + 50_000]
        for text, ids, expected in zip(batch, encoder.encode_arrays(batch), tokenizer.encode_batch(batch), strict=True):
            assert ids.tolist() == expected, ascii(text)

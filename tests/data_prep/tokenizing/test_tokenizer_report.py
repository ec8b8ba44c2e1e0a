import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.reading import documents
from data_prep.reading.documents import read_unit
from data_prep.reading.records import BadLine, Document, Unit
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe
from data_prep.tokenizing.tokenizer_report import main, read_texts, report, table
from data_prep.tokenizing.train_tokenizer import train_sentencepiece
from tests.data_prep.tokenizing.test_encoders import llama_2
from tests.data_prep.tokenizing.test_spelling import without_unknown

ENGLISH = ["The cat isn't on the mat; it_is number_1.\n" * 20, "Another text about cats and mats."]
CHINESE = ["今天天气很好，我们去公园散步吧。" * 10, "龘靐 are rare characters, 龘靐 everywhere."]
TEXTS = {"en": ENGLISH, "zh": CHINESE}


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(ENGLISH + CHINESE[:1], 340)


def test_every_column_agrees_with_a_slow_count(bpe: Tokenizer):
    rows = report(bpe, TEXTS, "mine")
    assert [(row.tokenizer, row.language) for row in rows] == [("mine", "en"), ("mine", "zh")]
    for row, texts in zip(rows, TEXTS.values(), strict=True):
        ids = [i for text in texts for i in bpe.encode(text)]
        num_partial = sum("\ufffd" in bpe.decode([i]) for i in ids)
        assert row.num_tokens == len(ids)
        assert row.bytes_per_token == sum(len(text.encode()) for text in texts) / len(ids)
        assert row.characters_per_token == sum(len(text) for text in texts) / len(ids)
        assert (row.num_partial_tokens, row.partial_fraction) == (num_partial, num_partial / len(ids))
        assert row.used_fraction == len(set(ids)) / 340
        assert row.num_unknown == 0
    assert rows[1].num_partial_tokens > 0


@pytest.mark.parametrize(
    ("text", "num_words"),
    [
        ("it_is number_1, isn't it?", 5),
        ("今天 is 天气", 5),
        ("カタカナ𠀀", 5),
        ("한국어 말", 2),
        ("naïve — été", 2),
        (" \n…!", 0),
    ],
)
def test_each_character_of_a_script_without_spaces_is_a_word(bpe: Tokenizer, text: str, num_words: int):
    (row,) = report(bpe, {"x": [text]})
    assert row.num_words == num_words
    assert row.tokens_per_word == len(bpe.encode(text)) / max(num_words, 1)


def test_what_a_vocabulary_cannot_express_is_counted():
    with_bytes, without = llama_2(), llama_2(byte_fallback=False)
    text = ["龘 and 靐"]
    assert report(with_bytes, {"zh": text})[0].num_unknown == 0
    assert report(without, {"zh": text})[0].num_unknown == without.encode(text[0]).count(0) > 0


def test_characters_that_vanish_without_an_unknown_token_are_counted_as_well():
    without = without_unknown()
    assert without.unknown_id is None
    assert report(without, {"zh": ["龘 fox 靐 lazy\n龘"]})[0].num_unknown == 3


@pytest.mark.parametrize("max_bytes", [1000, 4000])
def test_a_large_input_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int):
    english, chinese = ENGLISH[1] * 3, "今天天气很好，我们去公园散步吧。" * 3
    for name, text in (("a", english), ("b", chinese), ("c", english)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 500)
    num_read = 0

    def counted(unit: Unit) -> Iterator[Document | BadLine]:
        nonlocal num_read
        for item in read_unit(unit):
            num_read += 1
            yield item

    monkeypatch.setattr(documents, "read_unit", counted)
    texts = read_texts([f"{tmp_path}/*.jsonl"], max_bytes)
    size = {language: sum(len(text.encode()) for text in found) for language, found in texts.items()}
    assert all(max_bytes <= size[language] <= max_bytes + len(chinese.encode()) for language in ("en", "zh"))
    # What is taken of two languages, and what is passed over, each with the text that goes beyond.
    assert num_read <= 3 * max_bytes / len(english) + 2 + 3


def test_no_texts_divide_by_nothing(bpe: Tokenizer):
    (row,) = report(bpe, {"en": []})
    assert (row.bytes_per_token, row.tokens_per_word, row.partial_fraction, row.used_fraction) == (0, 0, 0, 0)


def test_the_table_puts_the_rows_of_a_language_together(bpe: Tokenizer):
    other = train_sentencepiece(ENGLISH + CHINESE, 360, "bpe")
    lines = table(report(bpe, TEXTS, "one") + report(other, TEXTS, "two")).splitlines()
    assert lines[0].split() == [
        *("language", "tokenizer", "MB", "bytes/token", "chars/token", "tokens/word", "partial", "used", "unknown")
    ]
    assert [line.split()[:2] for line in lines[1:]] == [["en", "one"], ["en", "two"], ["zh", "one"], ["zh", "two"]]


def test_the_command_line_compares_tokenizers_on_files_by_language(
    bpe: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bpe.save(tmp_path)
    lines = [json.dumps({"text": text}) for text in (CHINESE[0], "broken"[:0], ENGLISH[0] * 3)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    (tmp_path / "code.py").write_text("def f(x):\n    return x\n" * 10)
    assert (
        main([str(tmp_path), str(tmp_path / "tokenizer.json"), "--", f"{tmp_path}/mixed.jsonl", f"{tmp_path}/*.py"])
        == 0
    )
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        [language, str(path)] for language in ("code", "en", "zh") for path in (tmp_path, tmp_path / "tokenizer.json")
    ]
    assert len(read_texts([f"{tmp_path}/mixed.jsonl"], max_language_bytes=1)["en"]) == 1


def test_the_command_line_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["tokenizer.json", "a.txt"]) == 64
    assert "expected TOKENIZER" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("text")
    assert main([str(tmp_path), "--", str(tmp_path / "a.txt")]) == 65
    assert "tokenizer.json" in capsys.readouterr().err
    assert main(["x", "--", str(tmp_path / "none.txt")]) == 65
    assert "none.txt" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "fertility" in capsys.readouterr().out

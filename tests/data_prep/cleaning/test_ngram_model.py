import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import ngram_model
from data_prep.cleaning.ngram_model import NgramModel, NgramModelError

REFERENCE = "The cat sat on the mat. 猫坐在垫子上。The dog ran after the cat, and the cat ran away. " * 40


@pytest.fixture(scope="module")
def model() -> NgramModel:
    return NgramModel.train([REFERENCE], order=4, table_bits=18)


def slow_perplexity(reference: str, text: str, order: int) -> float:
    """The formula of the module with dictionaries and floats."""
    units = " ".join(reference.split())
    counts: dict[str, int] = {}
    for length in range(1, order + 1):
        for start in range(len(units) - length + 1):
            counts[units[start : start + length]] = counts.get(units[start : start + length], 0) + 1
    text = " ".join(text.split())
    total = 0.0
    for end in range(1, len(text) + 1):
        probability = 1 / 65536
        for length in range(1, min(order, end) + 1):
            gram = text[end - length : end]
            context = counts.get(gram[:-1], 0) if length > 1 else len(units)
            probability = (counts.get(gram, 0) + 4 * probability) / (context + 4)
        total -= math.log2(probability)
    return 2 ** (total / len(text))


@pytest.mark.parametrize(
    "text", ["The dog sat on the mat.", "猫坐在垫子上。", "zqxj 7788 %%%%", "a", "the  cat\n\tran", "Unseen: 龘龘龘"]
)
def test_perplexity_is_that_of_the_formula(model: NgramModel, text: str) -> None:
    assert model.perplexity(text) == pytest.approx(slow_perplexity(REFERENCE, text, 4), rel=1e-3)


def test_text_like_the_reference_is_less_surprising_than_noise(model: NgramModel) -> None:
    assert model.perplexity("The cat ran after the dog.") < 4
    assert model.perplexity("猫坐在垫子上。") < 8
    assert model.perplexity("xK9#qq zzWv 0x7f") > 500


def test_long_texts_are_scored_in_blocks_without_a_seam(model: NgramModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model.perplexity(REFERENCE)
    retrained = NgramModel.train([REFERENCE], order=4, table_bits=18)
    monkeypatch.setattr(ngram_model, "_BLOCK_UNITS", 101)
    assert model.perplexity(REFERENCE) == whole
    in_blocks = NgramModel.train([REFERENCE], order=4, table_bits=18)
    assert np.array_equal(in_blocks.counts, retrained.counts)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=60))
def test_a_perplexity_is_at_least_one(model: NgramModel, text: str) -> None:
    assert 1.0 <= model.perplexity(text) <= 2**40


def test_a_small_table_still_gives_probabilities() -> None:
    crowded = NgramModel.train([REFERENCE], order=4, table_bits=4)
    assert crowded.perplexity("anything at all") >= 1.0


def test_an_empty_text_has_perplexity_one(model: NgramModel) -> None:
    assert model.perplexity(" \n") == 1.0


def test_a_saved_model_scores_and_digests_alike(model: NgramModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m.npz")
    loaded = NgramModel.load(tmp_path / "m.npz")
    assert loaded.digest == model.digest
    assert loaded.perplexity("The cat.") == model.perplexity("The cat.")
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def test_the_digest_sees_every_count(model: NgramModel) -> None:
    other = NgramModel(model.counts.copy(), model.num_units)
    other.counts[2, 77] += 1
    assert other.digest != model.digest


def test_the_scores_of_a_model_are_frozen() -> None:
    model = NgramModel.train(["abracadabra 上海自来水来自海上 " * 50], order=3, table_bits=12)
    assert model.digest == "3d6b4a2b66cc9fed0417b1c1532a8756"
    assert model.perplexity("abra 上海 cadabra") == 3.319269


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 broken"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(NgramModelError, match="not an n-gram model.*make one with"):
        NgramModel.load(tmp_path / "m.npz")


def test_pickled_arrays_and_other_formats_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", header=np.array([1, 1]), counts=np.array([{}], dtype=object))
    with pytest.raises(NgramModelError, match="not an n-gram model"):
        NgramModel.load(tmp_path / "p.npz")
    np.savez(tmp_path / "f.npz", header=np.array([2, 1]), counts=np.zeros((2, 16), np.uint32))
    with pytest.raises(NgramModelError, match="another format"):
        NgramModel.load(tmp_path / "f.npz")
    with pytest.raises(NgramModelError, match="cannot read"):
        NgramModel.load(tmp_path / "absent.npz")


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(NgramModelError, match="reference text is empty"):
        NgramModel.train(["", " \n "])


def test_the_command_trains_and_tells_perplexities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(REFERENCE * 15, encoding="utf-8")
    out = tmp_path / "m.npz"
    assert ngram_model.main([str(out), str(tmp_path / "text.txt"), "--table-bits", "14"]) == 0
    assert "held out: 1 % below" in capsys.readouterr().out
    assert NgramModel.load(out).perplexity("The cat sat on the mat.") < 10


def test_the_command_names_a_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gb.txt").write_bytes("中文".encode("gb18030"))
    assert ngram_model.main([str(tmp_path / "m.npz"), str(tmp_path / "gb.txt")]) == 65
    assert "gb.txt: invalid UTF-8); give UTF-8 texts" in capsys.readouterr().err
    assert not (tmp_path / "m.npz").exists()


def test_the_command_takes_the_texts_of_any_file_that_a_preparation_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"id": f"zqxj{index}", "text": REFERENCE[:1500]}) for index in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{broken"]), encoding="utf-8")
    pq.write_table(pa.table({"text": [REFERENCE[:1500]] * 30}), tmp_path / "b.parquet")
    assert ngram_model.main([str(tmp_path / "m.npz"), str(tmp_path / "*.*"), "--table-bits", "14"]) == 0
    printed = capsys.readouterr().out
    assert "held out: 1 % below" in printed
    assert f"left out 1: {tmp_path / 'a.jsonl'}: " in printed
    expected = NgramModel.train([REFERENCE[:1500]] * (90 - 90 // 20), table_bits=14)
    assert NgramModel.load(tmp_path / "m.npz").digest == expected.digest


@pytest.mark.parametrize("out", ["absent/m.npz", "folder", "file.txt/m.npz"])
def test_a_model_that_cannot_be_written_is_told_before_training(
    tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text(REFERENCE, encoding="utf-8")
    monkeypatch.setattr(NgramModel, "train", None)
    assert ngram_model.main([str(tmp_path / out), str(tmp_path / "file.txt")]) == 65
    assert f"{tmp_path / out}: cannot write the model (" in (message := capsys.readouterr().err)
    assert "name a file in a folder that exists" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder"]
    model = NgramModel(np.zeros((1, 16), np.uint32), 1)
    with pytest.raises(NgramModelError, match="cannot write the model"):
        model.save(tmp_path / out)


def test_a_pattern_without_files_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ngram_model.main([str(tmp_path / "m.npz"), str(tmp_path / "*.jsonl")]) == 65
    assert "no file matches" in capsys.readouterr().err

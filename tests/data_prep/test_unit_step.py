import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep.cleaning.clean_config import CleanConfig
from data_prep.duplicates.dedup_config import DecontaminateConfig
from data_prep.reading.corpus import find_inputs
from data_prep.reading.documents import Unit, plan_units
from data_prep.reading.templates import Layout
from data_prep.tokenizing.encoders import fastest_encoder
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer, train_bpe
from data_prep.unit_step import (
    DOCUMENTS_FILE,
    TOKENS_FILE,
    Recipe,
    UnitTask,
    kind_of_file,
    marks_of_turns,
    process_unit,
    recipe_digest,
    text_hash,
    unit_key,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["some words to learn from, some more words"], 280).save(folder)
    return load_tokenizer(folder)


def recipe(tokenizer: Tokenizer, **changes: object) -> Recipe:
    options = {
        "tokenizer_file": str(tokenizer.file),
        "tokenizer_digest": tokenizer.digest,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "marks": marks_of_turns(tokenizer),
        "encoder": fastest_encoder(tokenizer).name,
        "clean": CleanConfig(filters=()),
        "decontaminate": DecontaminateConfig(),
        "exact": True,
        "near": "off",
        "kind": "auto",
    }
    return Recipe(**{**options, **changes})  # pyright: ignore[reportArgumentType]


def units_of(path: Path, texts: list[str], layout: str = "text", **sizes: int) -> list[Unit]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return plan_units(find_inputs([str(path)]), Layout.named(layout), **sizes)


def test_the_tokens_of_a_unit_are_its_documents_with_an_end_behind_each(tmp_path: Path, tokenizer: Tokenizer):
    texts = ["some words", "more words to learn", "文字"]
    (unit,) = units_of(tmp_path / "a.jsonl", texts)
    summary = process_unit(UnitTask(unit, recipe(tokenizer), str(tmp_path / "unit")))
    tokens = np.fromfile(tmp_path / "unit" / TOKENS_FILE, dtype="<u2")
    expected = [ids for text in texts for ids in (*tokenizer.encode(text), tokenizer.eos_id)]
    assert tokens.tolist() == expected
    records = np.load(tmp_path / "unit" / DOCUMENTS_FILE)
    assert records["num_tokens"].sum() == summary.num_tokens == len(expected)
    assert records["line"].tolist() == [1, 2, 3]
    assert [(int(r["hash_high"]), int(r["hash_low"])) for r in records] == [text_hash(t, exact=True) for t in texts]


def test_threads_of_a_worker_do_not_mix_up_what_they_count(tmp_path: Path, tokenizer: Tokenizer):
    units = units_of(
        tmp_path / "a.jsonl", [f"write to a{i}@mail.org or b{i}@mail.org" for i in range(800)], range_bytes=2000
    )
    made = recipe(tokenizer)
    tasks = [UnitTask(unit, made, str(tmp_path / f"unit{i}")) for i, unit in enumerate(units)]
    with ThreadPoolExecutor(4) as threads:
        summaries = list(threads.map(process_unit, tasks))
    assert len(units) > 10
    assert sum(summary.masked["email"] for summary in summaries) == 1600


@pytest.mark.parametrize(
    "change",
    [
        {"clean": CleanConfig(filters=("text.length",))},
        {"eos_id": 1},
        {"tokenizer_digest": "other"},
        {"exact": False},
        {"near": "minhash"},
        {"kind": "code"},
    ],
)
def test_whatever_shapes_a_unit_names_it(tmp_path: Path, tokenizer: Tokenizer, change: dict[str, object]):
    (unit,) = units_of(tmp_path / "a.jsonl", ["x"])
    keys = {
        unit_key(unit, ["id"], recipe_digest(recipe(tokenizer))),
        unit_key(unit, ["id"], recipe_digest(recipe(tokenizer, **change))),
        unit_key(unit, ["other id"], recipe_digest(recipe(tokenizer))),
        unit_key(units_of(tmp_path / "a.jsonl", ["x"], "starcoder")[0], ["id"], recipe_digest(recipe(tokenizer))),
    }
    assert len(keys) == 4
    moved = recipe(tokenizer, tokenizer_file=str(tmp_path / "elsewhere.json"), encoder="another")
    assert unit_key(unit, ["id"], recipe_digest(moved)) in keys


def test_the_kind_is_configured_or_of_the_layout_or_of_the_suffix(tmp_path: Path):
    (text,) = units_of(tmp_path / "a.jsonl", ["x"])
    (code,) = units_of(tmp_path / "a.jsonl", ["x"], "starcoder")
    (tmp_path / "a.py").write_text("pass")
    (file,) = plan_units(find_inputs([str(tmp_path / "a.py")]), Layout.named("auto"))
    assert [kind_of_file(unit, 0, "auto") for unit in (text, code, file)] == ["prose", "code", "code"]
    assert [kind_of_file(unit, 0, "prose") for unit in (text, code, file)] == ["prose"] * 3

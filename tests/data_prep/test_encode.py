import json
import multiprocessing
import os
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep import encode
from data_prep.documents import BadLine, plan_units
from data_prep.encode import SCRATCH_DTYPE, EncodedUnit, WorkerDiedError, encode_units
from data_prep.merge import TRAIN, merge, split_threshold
from data_prep.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXTS = [f"document {i}: " + "some words, 一些文字 🚀 " * (i % 7) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 320).save(folder)
    return load_tokenizer(folder)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    records = [json.dumps({"text": text}) for text in TEXTS]
    records[100] = "not JSON"
    records[200] = '{"text": 5}'
    path.write_text("\n".join(records) + "\n")
    return path


def run(path: Path, tokenizer: Tokenizer, scratch: Path, num_workers: int, range_bytes: int) -> list[EncodedUnit]:
    units = plan_units([path], source="s", range_bytes=range_bytes)
    assert tokenizer.file is not None
    scratch.mkdir()
    return list(encode_units(units, tokenizer.file, tokenizer.eos_id, scratch, num_workers))


def ids_of(encoded: list[EncodedUnit]) -> list[list[int]]:
    documents = []
    for unit in encoded:
        ids = np.fromfile(unit.tokens_file, dtype=SCRATCH_DTYPE)
        documents += [part.tolist() for part in np.split(ids, np.cumsum(unit.num_tokens)[:-1])]
    return documents


def test_units_give_the_ids_and_sizes_of_their_documents(lines: Path, tokenizer: Tokenizer, tmp_path: Path):
    encoded = run(lines, tokenizer, tmp_path / "scratch", num_workers=0, range_bytes=3000)
    expected = [text for i, text in enumerate(TEXTS) if i not in (100, 200)]
    assert ids_of(encoded) == tokenizer.encode_batch(expected)
    text_bytes = np.concatenate([unit.text_bytes for unit in encoded])
    assert text_bytes.tolist() == [len(text.encode()) for text in expected]


def test_two_workers_give_the_same_units_in_the_same_order_as_none(lines: Path, tokenizer: Tokenizer, tmp_path: Path):
    alone = run(lines, tokenizer, tmp_path / "0", num_workers=0, range_bytes=2000)
    pooled = run(lines, tokenizer, tmp_path / "2", num_workers=2, range_bytes=2000)
    assert len(alone) > 2 * encode.IN_FLIGHT_PER_WORKER
    assert [unit.unit for unit in pooled] == [unit.unit for unit in alone]
    assert [unit.tokens_file.read_bytes() for unit in pooled] == [unit.tokens_file.read_bytes() for unit in alone]
    assert [unit.bad_lines for unit in pooled] == [unit.bad_lines for unit in alone]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("range_bytes", [50, 1000, 10**6])
def test_bad_lines_are_numbered_by_file_however_it_is_cut(
    lines: Path, tokenizer: Tokenizer, tmp_path: Path, range_bytes: int
):
    encoded = run(lines, tokenizer, tmp_path / "scratch", 0, range_bytes)
    merged = merge(encoded, tmp_path / "out", "s", tokenizer, 1000, threshold=0)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(bad["path"], bad["line"]) for bad in listed] == [(str(lines), 101), (str(lines), 201)]
    assert merged.bad_lines.by_reason() == [
        f"1 x invalid JSON, e.g. {lines}:101",
        f"1 x text is not a string, e.g. {lines}:201",
    ]
    assert merged.splits[TRAIN].num_documents == 298
    assert list((tmp_path / "scratch").iterdir()) == []


def test_equal_texts_fall_on_the_same_side(tokenizer: Tokenizer, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    encoded = run(path, tokenizer, tmp_path / "scratch", 0, 10**6)
    merged = merge(encoded, tmp_path / "out", "s", tokenizer, 1000, split_threshold(0.2))
    counts = [split.num_documents for split in merged.splits.values()]
    assert sum(counts) == 900
    assert all(count % 3 == 0 for count in counts)
    assert 120 < counts[1] < 240


def test_a_text_that_encodes_to_the_end_token_costs_only_itself(tmp_path: Path):
    # With ignore_merges a word that is in the vocabulary becomes that token, the end token's spelling included.
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"</s>": 0, "a": 1, "<": 2, "/": 3, "s": 4, ">": 5}, [], ignore_merges=True)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a a"}\n{"text": "a </s> a"}\n{"text": "a"}\n')
    (unit,) = run(path, load_tokenizer(tmp_path), tmp_path / "scratch", 0, 10**6)
    assert ids_of([unit]) == [[1, 1], [1]]
    assert unit.bad_lines == (BadLine(str(path), 2, "text encodes to the end-of-document token"),)


def test_a_killed_worker_is_reported_and_not_waited_for(lines: Path, tokenizer: Tokenizer, tmp_path: Path):
    units = plan_units([lines], source="s", range_bytes=200)
    assert tokenizer.file is not None
    with closing(encode_units(units, tokenizer.file, tokenizer.eos_id, tmp_path, 2)) as encoded:
        next(encoded)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="--engine.num-workers"):
            list(encoded)
    assert multiprocessing.active_children() == []


def test_closing_early_stops_the_workers(lines: Path, tokenizer: Tokenizer, tmp_path: Path):
    units = plan_units([lines], source="s", range_bytes=200)
    assert tokenizer.file is not None
    with closing(encode_units(units, tokenizer.file, tokenizer.eos_id, tmp_path, 2)) as encoded:
        next(encoded)
    assert multiprocessing.active_children() == []

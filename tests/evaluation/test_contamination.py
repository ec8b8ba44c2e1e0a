import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.manifest import ManifestError, read_manifest
from data_prep.shards import open_tokens
from evaluation import contamination
from evaluation.contamination import check
from evaluation.set_items import Item, read_items
from evaluation.shared_runs import Place
from tests.prepared import tokenizer, write_data

WORDS = [f"{a}{b}" for a in ("mo", "ra", "ti", "lu") for b in ("na", "ke", "so", "di", "ri")]


def text_of(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def brute_force(items: list[Item], documents: list[str], ngram: int) -> list[tuple[int, int]]:
    """Of each item its runs, and those that some document has, by comparing words."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return {tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}

    of_items = [set().union(*map(runs, item.texts)) for item in items]
    common = {run for run, count in Counter(run for found in of_items for run in found).items() if count > 10}
    of_documents = set().union(*map(runs, documents))
    return [(len(found - common), len((found - common) & of_documents)) for found in of_items]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[Item]]:
    """Documents that quote some of the items, over borders of shards, too."""
    rng = random.Random(0)
    items = [Item("quiz", str(i), [text_of(rng, rng.randint(3, 30)), text_of(rng, 4)]) for i in range(60)]
    items += [
        Item("same", str(i), [f"choose the one right answer out of the four that stand below it {i}"])
        for i in range(12)
    ]
    documents = [text_of(rng, 60) for _ in range(40)]
    for number, item in enumerate(items[:70:3]):
        words = item.texts[0].upper().split()
        quoted = ", ".join(words[: rng.randint(1, len(words))])
        documents[number] = f"{text_of(rng, 9)}\n{quoted}.\n{text_of(rng, 9)}"
    folder = tmp_path_factory.mktemp("contamination") / "data"
    return write_data(folder, texts=[*documents, "held out " * 40], num_held_out=1, shard_tokens=500), documents, items


@pytest.mark.parametrize("ngram", [5, 8, 13])
def test_the_same_runs_are_found_as_by_comparing_words(world, ngram: int):
    data, documents, items = world
    found = check(data, items, split="train", ngram=ngram, num_workers=1)
    expected = brute_force(items, documents, ngram)
    assert [(finding.num_runs, finding.num_found) for finding in found] == expected
    assert any(0 < num_found < num_runs for num_runs, num_found in expected)
    assert any(num_runs == 0 for num_runs, _ in expected)
    for finding in found:
        assert (finding.place is not None) == (finding.num_found > 0)


def test_the_place_is_where_the_document_begins(world):
    data, documents, items = world
    found = check(data, items, split="train", ngram=8, num_workers=1)
    for item, finding in zip(items, found, strict=True):
        if isinstance(finding.place, Place):
            tokens = open_tokens(data / finding.place.shard)[finding.place.token :]
            begin = tokenizer().decode(tokens[:12].tolist())
            assert any(document.startswith(begin[:10]) for document in documents), item
            assert open_tokens(data / finding.place.shard)[finding.place.token - 1] == read_manifest(data).eos_id


def test_several_processes_find_the_same_as_one(world):
    data, _, items = world
    alone = check(data, items, split="train", ngram=8, num_workers=1)
    assert check(data, items, split="train", ngram=8, num_workers=2) == alone


def test_only_the_split_is_searched(world):
    data, _, _ = world
    item = Item("held", "1", ["held out " * 7])
    (in_training,) = check(data, [item], split="train", ngram=13, num_workers=1)
    (held_out,) = check(data, [item], split="validation", ngram=13, num_workers=1)
    assert (in_training.num_runs, in_training.num_found) == (2, 0)
    assert (held_out.num_runs, held_out.num_found) == (2, 2)


def test_items_are_the_records_of_every_kind_of_file(tmp_path: Path):
    records = [{"question": "What is it?", "choices": {"text": ["one", "two"]}, "n": 3}, {"question": "Who, then?"}]
    texts = [["What is it?", "one", "two"], ["Who, then?"]]
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (sets / "b.json").write_text(json.dumps(records))
    (sets / "c.json").write_text(json.dumps({"version": ["1"], "data": records}))
    (sets / "d.json").write_text(json.dumps({"first": records[0], "second": records[1]}))
    (sets / "e.csv").write_text('What is it?,one,"two"\n"Who, then?"\n')
    (sets / "README.md").write_text("not a set")
    pq.write_table(
        pa.table({"question": ["What is it?", "Who, then?"], "choices": [["one", "two"], None]}), sets / "f.parquet"
    )
    items = read_items([sets])
    assert [item.texts for item in items] == texts * 6
    assert {item.task for item in items} == {"sets"}
    assert [item.id for item in items[:3]] == ["a.jsonl:1", "a.jsonl:2", "b.json:1"]
    assert [item.task for item in read_items([sets / "a.jsonl", sets / "README.md"])] == ["a.jsonl"] * 2 + ["README.md"]


def test_the_command_prints_shares_and_lists_what_it_found(world, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, documents, _ = world
    quiz, clean = tmp_path / "quiz.jsonl", tmp_path / "clean.csv"
    quoted = " ".join(documents[30].split()[10:30])
    quiz.write_text(json.dumps({"question": quoted}) + "\n" + json.dumps({"question": "too short"}) + "\n")
    clean.write_text(f"{text_of(random.Random(9), 40)},A\n")
    out = tmp_path / "found.jsonl"
    assert contamination.main([str(data), str(quiz), str(clean), "--out", str(out), "--num-workers", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["quiz.jsonl", "2", "1", "1", "100.00%"]
    assert lines[2] == ["clean.csv", "1", "1", "0", "0.00%"]
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["task"], record["id"], record["runs"], record["found"]) == ("quiz.jsonl", "quiz.jsonl:1", 8, 8)
    assert record["text"] == quoted
    stored = np.array(open_tokens(data / record["shard"])[record["token"] :][:8])
    assert documents[30].startswith(tokenizer().decode(stored.tolist()))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "SET"], "nowhere: no such data folder"),
        (["DATA", "no-such-set.jsonl"], "no-such-set.jsonl: cannot be read as an evaluation set"),
        (["DATA", "EMPTY"], "no file of .jsonl"),
        (["DATA", "BROKEN"], "broken.jsonl: cannot be read as an evaluation set"),
        (["DATA", "SHORT"], "no item has a text of 13 words"),
        (["DATA", "SET", "--split", "test"], "no shard of split 'test'"),
    ],
)
def test_bad_input_is_one_line(world, tmp_path: Path, arguments, complaint, capsys: pytest.CaptureFixture[str]):
    places = {"DATA": world[0], "SET": tmp_path / "set.txt", "EMPTY": tmp_path / "empty"}
    places |= {"BROKEN": tmp_path / "broken.jsonl", "SHORT": tmp_path / "short.txt"}
    places["SET"].write_text(text_of(random.Random(1), 20))
    places["EMPTY"].mkdir()
    places["BROKEN"].write_text("{broken\n")
    places["SHORT"].write_text("too short\n")
    assert contamination.main([str(places.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_runs_that_every_text_shares_are_refused():
    with pytest.raises(ValueError, match="--ngram 3: must be at least 5"):
        contamination.ContaminationCommand(data=Path("a"), sets=(Path("b"),), ngram=3)


def test_a_folder_without_a_manifest_is_no_data_folder(tmp_path: Path):
    with pytest.raises(ManifestError, match="no manifest.json"):
        check(tmp_path, [Item("a", "1", ["word " * 20])], split="train", ngram=13, num_workers=1)

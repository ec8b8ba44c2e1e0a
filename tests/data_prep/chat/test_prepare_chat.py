import contextlib
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import publish
from data_prep.chat import prepare_chat
from data_prep.chat.chat_folder import read_chat_folder
from data_prep.chat.chat_format import FORMATS
from data_prep.chat.row_marks import RowMarks, marks_path
from data_prep.chat.turns import Turn
from data_prep.checksums import read_checksum_header
from data_prep.manifest import read_manifest
from data_prep.shards import open_tokens, verify_payload
from data_prep.tokenizing.tokenizer import train_bpe
from tests.data_prep.chat.vocabularies import byte_level, json_lines

ROW = 64


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tok").mkdir()
    byte_level("<|endoftext|>").save(tmp_path / "tok")
    return tmp_path


def chats(start: int, stop: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"who {i}"}, {"role": "assistant", "content": "fox " * (1 + i % 9)}]}
        for i in range(start, stop)
    ]


def prepare(place: Path, *inputs: Path, output: str = "data", **flags: object) -> tuple[int, str]:
    options = {"output": place / output, "tokenizer": place / "tok", "row_tokens": ROW} | flags
    arguments = [f for key, value in options.items() for f in (f"--{key.replace('_', '-')}", str(value))]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = prepare_chat.main([*map(str, inputs), *arguments])
    return code, printed.getvalue()


def documents(folder: Path, split: str) -> Iterator[list[tuple[list[int], list[bool]]]]:
    """Of each row the documents with the marks of their tokens, padding and context left out."""
    for record in read_manifest(folder).shards:
        if record.split != split:
            continue
        shard = folder / record.file
        tokens = np.array(open_tokens(shard)).tolist()
        trained, starts = RowMarks(shard).rows(np.arange(record.sample_count), ROW)
        for row in range(record.sample_count):
            assert starts[row, 0]
            firsts = [1, *(int(i) for i in np.flatnonzero(starts[row]) if i > 1), ROW + 1]
            own = [
                (tokens[row * ROW + a : row * ROW + b], trained[row, a - 1 : b - 1].tolist())
                for a, b in itertools.pairwise(firsts)
            ]
            if set(own[-1][0]) == {0}:
                assert not any(own.pop()[1])
            elif own[-1][0][-1] == 0:  # a padding of one token is no input of its row, and begins no document
                own[-1] = (own[-1][0][:-1], own[-1][1][:-1])
            yield own


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def as_counted(encoded: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Counter[tuple[Any, ...]]:
    return Counter((tuple(ids), tuple(is_trained)) for ids, is_trained in encoded)


def test_every_conversation_stands_once_in_the_rows_with_its_mask(place: Path):
    code, printed = prepare(place, json_lines(place / "a.jsonl", chats(0, 120)), validation_share=0.1)
    assert code == 0, printed
    folder, tokenizer, chatml = place / "data", byte_level("<|endoftext|>"), FORMATS["chatml"]
    found = [document for split in ("train", "validation") for row in documents(folder, split) for document in row]
    expected = [
        chatml.encode(tokenizer, [Turn(**message) for message in record["messages"]]) for record in chats(0, 120)
    ]
    assert as_counted(found) == as_counted(expected)
    assert 2 <= sum(len(row) for row in documents(folder, "validation")) <= 25
    chat = read_chat_folder(folder)
    assert chat is not None
    assert (chat.kind, chat.row_tokens, chat.chat_format) == ("chat", ROW, chatml)
    manifest = read_manifest(folder)
    assert manifest.sample_tokens == ROW
    assert not (place / "data.work").exists()
    for record in manifest.shards:
        verify_payload(folder / record.file)
        header = read_checksum_header(folder / record.file)
        assert header is not None
        assert header.sample_tokens == ROW
    lines = printed.splitlines()
    assert lines[0].split() == ["split", "conversations", "tokens", "trained", "share", "rows", "utilisation", "shards"]
    assert lines[1].split()[0] == "train"
    assert int(lines[1].split()[1]) + int(lines[2].split()[1]) == 120
    assert "240 turns" in lines[3]


def test_equal_input_gives_equal_bytes_whatever_it_is_called(place: Path):
    source = json_lines(place / "a.jsonl", chats(0, 60))
    for name in ("one", "two"):
        assert prepare(place, source, output=name)[0] == 0
    assert digests(place / "one") == digests(place / "two")


def test_many_small_shards_hold_the_same_conversations(place: Path):
    source = json_lines(place / "a.jsonl", chats(0, 60))
    for name, shard_tokens in (("one", 2**20), ("many", 2 * ROW)):
        assert prepare(place, source, output=name, shard_tokens=shard_tokens)[0] == 0
    one, many = ([d for row in documents(place / name, "train") for d in row] for name in ("one", "many"))
    assert as_counted(one) == as_counted(many)
    assert len(read_manifest(place / "many").shards) > 5


def test_pairs_stand_together_chosen_first_and_only_answers_are_trained(place: Path):
    records = [{"prompt": f"who {i}", "chosen": "fox " * (i % 4 + 1), "rejected": f"dog {i}"} for i in range(40)]
    long = {"prompt": "who", "chosen": "fox " * 90, "rejected": "dog " * 90}
    assert prepare(place, json_lines(place / "p.jsonl", [*records, long]), kind="pairs")[0] == 0
    tokenizer, num_pairs = byte_level("<|endoftext|>"), 0
    for row in [*documents(place / "data", "train"), *documents(place / "data", "validation")]:
        assert len(row) % 2 == 0
        for chosen, rejected in zip(row[::2], row[1::2], strict=True):
            num_pairs += 1
            texts = [tokenizer.decode([i for i, counts in zip(*d) if counts]) for d in (chosen, rejected)]
            assert [text[:3] for text in texts] == ["fox", "dog"]
            prompts = [d[0][: d[1].index(True)] for d in (chosen, rejected)]
            assert prompts[0] == prompts[1]
    assert num_pairs == 41


def test_prompts_stand_one_in_a_row_beside_the_lines_they_come_from(place: Path):
    records = [{"question": f"who {i}", "answer": f"#### {i}"} for i in range(30)]
    long = {"question": "who " * 99, "answer": "x"}
    code, printed = prepare(
        place, json_lines(place / "p.jsonl", [*records, long]), kind="prompts", shard_tokens=4 * ROW
    )
    assert code == 0
    assert "dropped, longer than a row: 1" in printed
    tokenizer, folder = byte_level("<|endoftext|>"), place / "data"
    seen = []
    for record in read_manifest(folder).shards:
        lines = (folder / record.file).with_suffix(".jsonl").read_text().splitlines()
        assert len(lines) == record.sample_count
        tokens = open_tokens(folder / record.file)
        trained, _ = RowMarks(folder / record.file).rows(np.arange(record.sample_count), ROW)
        assert not trained.any()
        for row, line in enumerate(map(json.loads, lines)):
            prompt = FORMATS["chatml"].prompt(tokenizer, [Turn("user", line["question"])])
            own = tokens[row * ROW + 1 : (row + 1) * ROW + 1].tolist()
            assert own == prompt + [tokenizer.eos_id] * (ROW - len(prompt))
            seen.append(line)
    assert sorted(seen, key=str) == sorted(records, key=str)


def test_cuts_and_drops_are_counted(place: Path):
    def chat(question: str, answer: str) -> dict[str, str]:
        return {"prompt": question, "response": answer}

    records = [
        *(chat(f"q{i}", "fox") for i in range(200)),
        chat("q1", "fox"),
        chat("x" * 200, "y"),
        chat("z", "y" * 200),
    ]
    source = json_lines(place / "a.jsonl", records)
    with source.open("a") as file:
        file.write("{broken\n\n")
    code, printed = prepare(place, source)
    assert code == 0
    assert "cut at a row's end: 1; dropped, duplicate: 1, no answer within a row's length: 1" in printed
    assert (
        f"bad records were left out:\n  1 x blank line, e.g. {source}:205\n  1 x invalid JSON, e.g. {source}:204"
        in printed
    )
    longest = max((d for row in documents(place / "data", "train") for d in row), key=lambda d: len(d[0]))
    assert len(longest[0]) == ROW
    assert longest[1][-1]


def test_further_input_adds_shards_and_leaves_the_old_ones(place: Path):
    first, second = json_lines(place / "a.jsonl", chats(0, 60)), json_lines(place / "b.jsonl", chats(50, 90))
    assert prepare(place, first)[0] == 0
    before, shards = digests(place / "data"), read_manifest(place / "data").shards
    assert "already holds all of this input; nothing was written" in prepare(place, first)[1]
    assert digests(place / "data") == before
    code, printed = prepare(place, first, second)
    assert code == 0
    assert "dropped, duplicate: 10" in printed
    after = digests(place / "data")
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    manifest = read_manifest(place / "data")
    assert manifest.shards[: len(shards)] == shards
    assert [record.file for record in manifest.shards if record.split == "train"] == [
        "train/chat-00000.bin",
        "train/chat-00001.bin",
    ]
    for record in manifest.shards:
        assert marks_path(place / "data" / record.file).exists()
    found = [d for split in ("train", "validation") for row in documents(place / "data", split) for d in row]
    assert len(found) == len(as_counted(found)) == 90
    third = json_lines(place / "c.jsonl", chats(0, 5))
    assert "has every conversation of this input already; nothing was written" in prepare(place, third)[1]
    assert digests(place / "data") == after
    assert prepare(place, json_lines(place / "d.jsonl", chats(90, 99)), source="more")[0] == 0
    assert any(record.file == "train/more-00000.bin" for record in read_manifest(place / "data").shards)


class KilledError(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, moment: int, call: Any) -> bool:
    """Runs a preparation that ends before its n-th rename; whether it came so far."""
    real, count = publish.publish, 0

    def counted(temporary: Path, path: Path) -> None:
        nonlocal count
        count += 1
        if count == moment:
            raise KilledError
        real(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(publish, "publish", counted)
        try:
            call()
        except KilledError:
            return True
    return False


def test_a_preparation_that_dies_at_any_rename_leaves_nothing_half_and_can_be_run_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = json_lines(place / "a.jsonl", chats(0, 40)), json_lines(place / "b.jsonl", chats(40, 60))
    assert prepare(place, first, output="old")[0] == 0
    shutil.copytree(place / "old", place / "new")
    assert prepare(place, second, output="new")[0] == 0
    moment = 0
    while True:
        moment += 1
        if not killed_at(monkeypatch, moment, lambda: prepare(place, first, output="first")):
            break
        assert not (place / "first").exists() or digests(place / "first") == digests(place / "old")
        assert prepare(place, first, output="first")[0] == 0
        assert digests(place / "first") == digests(place / "old")
        shutil.rmtree(place / "first")
    assert moment > 10
    moment = 0
    while True:
        moment += 1
        shutil.rmtree(place / "grown", ignore_errors=True)
        shutil.copytree(place / "old", place / "grown")
        if not killed_at(monkeypatch, moment, lambda: prepare(place, second, output="grown")):
            break
        listed = read_manifest(place / "grown")
        assert listed in (read_manifest(place / "old"), read_manifest(place / "new"))
        for record in listed.shards:
            verify_payload(place / "grown" / record.file)
            RowMarks(place / "grown" / record.file)
        assert prepare(place, second, output="grown")[0] == 0
        assert digests(place / "grown") == digests(place / "new")
    assert moment > 10


def mistaken(place: Path) -> dict[str, tuple[list[object], dict[str, object], str]]:
    good = json_lines(place / "good.jsonl", chats(0, 30))
    texts = json_lines(place / "texts.jsonl", [{"text": "x"}] * 30)
    one = json_lines(place / "one.jsonl", chats(0, 1))
    mixed = json_lines(place / "mixed.jsonl", [*chats(0, 30), {"text": "x"}])
    (place / "empty.jsonl").write_text("")
    (place / "notes.txt").write_text("x")
    (place / "plain").mkdir()
    (place / "home").mkdir()
    (place / "home" / "letter").write_text("dear")
    train_bpe(["text"], 300).save(place / "plain")
    json_lines(place / "no-tokens" / "tokenizer.json", [1])
    return {
        "no such file": ([place / "god.jsonl"], {}, r"god.jsonl: no file matches"),
        "text file": ([place / "notes.txt"], {}, r"notes.txt: not a file of records; expected .jsonl"),
        "empty file": ([place / "empty.jsonl"], {}, r"the train split is empty.*Add conversations"),
        "pretraining text": ([texts], {}, r"30 of 30 records are bad \(100.0%\), above --max-bad-fraction 0.01"),
        "one bad in thirty": ([mixed], {}, r"1 of 31 records are bad.*Mend the input, or raise the limit"),
        "pairs of chats": ([good], {"kind": "pairs"}, r"30 x no field 'chosen', e.g. .*good.jsonl:1"),
        "one conversation": ([one], {}, r"the validation split is empty: the input has 1 conversations beside"),
        "unknown format": ([good], {"format": "chatlm"}, r"chat format 'chatlm': unknown; did you mean 'chatml'"),
        "format without tokens": (
            [good],
            {"tokenizer": place / "plain", "format": "llama3"},
            r"has no <\|begin_of_text",
        ),
        "no tokenizer": ([good], {"tokenizer": place / "home"}, r"found neither tokenizer.json nor"),
        "no such tokenizer": ([good], {"tokenizer": place / "nowhere"}, r"nowhere: no such tokenizer"),
        "not a tokenizer": ([good], {"tokenizer": place / "no-tokens"}, r"not a tokenizer.json"),
        "unknown eos": ([good], {"eos_token": "<end>"}, r"no end-of-document token, looked for <end>"),
        "odd rows": ([good], {"row_tokens": 100}, r"--row-tokens 100: must be a positive multiple of 8"),
        "whole share": ([good], {"validation_share": 1}, r"--validation-share 1: must be at least 0 and below 1"),
        "percent": ([good], {"max_bad_fraction": 5}, r"--max-bad-fraction 5: must be in \[0, 1\]"),
        "path as source": ([good], {"source": "a/b"}, r"--source 'a/b': names files; use letters"),
        "tiny shards": ([good], {"shard_tokens": 8}, r"--shard-tokens 8: must be at least --row-tokens, 64"),
        "somebody's folder": ([good], {"output": place / "home"}, r"home: exists and is not a chat data folder"),
        "a file as output": (
            [good],
            {"output": place / "notes.txt"},
            r"notes.txt: exists and is not a chat data folder",
        ),
    }


def test_mistakes_are_answered_with_the_way_out_and_nothing_is_written(place: Path):
    mistakes = mistaken(place)
    before = digests(place)
    for name, (inputs, flags, message) in mistakes.items():
        code, printed = prepare(place, *inputs, **flags)  # pyright: ignore[reportArgumentType]
        assert code == 65, name
        assert printed.startswith("error: "), name
        assert re.search(message, printed, re.DOTALL), (name, printed)
        assert printed.count("\n") <= 3, (name, printed)
        assert digests(place) == before, name


def test_other_options_than_before_are_refused_by_name(place: Path):
    assert prepare(place, json_lines(place / "a.jsonl", chats(0, 30)))[0] == 0
    more = json_lines(place / "b.jsonl", chats(30, 60))
    for flags, message in (
        ({"row_tokens": 128}, "row_tokens was 64, is 128"),
        ({"format": "alpaca"}, "format was 'chatml', is 'alpaca'"),
        ({"kind": "prompts"}, "kind was 'chat', is 'prompts'"),
        ({"default_system": "be quick"}, "default_system was '', is 'be quick'"),
    ):
        code, printed = prepare(place, more, **flags)  # pyright: ignore[reportArgumentType]
        assert code == 65
        assert message in printed
        assert "choose another --output" in printed


def test_the_end_of_document_is_the_models(place: Path):
    source = json_lines(place / "a.jsonl", chats(0, 30))
    tokenizer = byte_level("<|endoftext|>")
    (place / "tok" / "config.json").write_text(json.dumps({"eos_token_id": [tokenizer.special_id("<|im_end|>"), 0]}))
    assert prepare(place, source, output="hf")[0] == 0
    assert read_manifest(place / "hf").eos_id == tokenizer.special_id("<|im_end|>")
    assert prepare(place, source, output="again", tokenizer=place / "hf")[0] == 0
    assert read_manifest(place / "again").eos_id == tokenizer.special_id("<|im_end|>")
    assert prepare(place, source, output="named", eos_token="</s>")[0] == 0
    assert read_manifest(place / "named").eos_id == tokenizer.special_id("</s>")


@pytest.mark.parametrize("module", ["prepare_chat", "show_mask"])
def test_help_is_instant_and_needs_neither_torch_nor_a_tokenizer_library(module: str):
    program = (
        "import resource, sys\n"
        f"from data_prep.chat import {module} as command\n"
        "try:\n    command.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'tokenizers', 'numpy'} & sys.modules.keys()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert used.ru_utime + used.ru_stime < 0.5, used\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: python -m data_prep" in done.stdout

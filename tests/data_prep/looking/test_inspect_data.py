import dataclasses
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import __main__ as command_line
from data_prep import config_file, documents_table, pipeline
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.documents_table import DocumentsWriter
from data_prep.engine import EngineConfig
from data_prep.looking import folder_statistics, inspect_data
from data_prep.looking.documents_query import DocumentsQuery
from data_prep.looking.folder_statistics import QUANTILES, quantiles
from data_prep.looking.inspect_documents import chosen
from data_prep.looking.inspect_fates import parse_id
from data_prep.looking.prepared import PreparedFolder
from data_prep.looking.text_table import visible
from data_prep.prepare_config import InputConfig, OutputConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data_prep.reading.chat import TURN_END, TURN_START
from data_prep.shards import open_tokens
from data_prep.tokenizing.tokenizer import train_bpe
from tests.data_prep.looking.prepared_example import LONG, SAMPLE_TOKENS, TEXTS, Example, make


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_table, "GROUP_ROWS", 2)
        return make(tmp_path_factory.mktemp("example"))


@pytest.fixture
def inspect(example: Example, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object, code: int = 0, folder: Path = example.folder) -> str:
        assert inspect_data.main([str(folder), *map(str, arguments)]) == code
        output = capsys.readouterr()
        assert bool(output.err) == bool(code)
        assert not code or re.fullmatch(r"error: [^\n]+\n", output.err)
        return output.err if code else output.out

    return run


def test_every_sample_of_every_shard_names_the_documents_that_its_tokens_are_of(example: Example):
    folder = PreparedFolder(example.folder)
    for shard in folder.shards:
        record = shard.record
        stream = example.streams[shard.generation, record.source, record.split]
        tokens = open_tokens(example.folder / record.file)
        for first in range(0, shard.span.num_targets, SAMPLE_TOKENS):
            owned = stream[shard.span.start + first : shard.span.start + first + SAMPLE_TOKENS]
            owned = owned[: shard.span.num_targets - first]
            assert [token for _, token in owned] == tokens[first + 1 : first + 1 + len(owned)].tolist()
            place = shard.span.start + first
            rows = list(folder.rows_between(shard, place, place + len(owned)))
            assert [row.id for row in rows] == list(dict.fromkeys(name for name, _ in owned))


@given(st.data())
def test_the_documents_of_any_stretch_are_those_that_own_its_tokens(example: Example, data: st.DataObject):
    folder = PreparedFolder(example.folder)
    shard = data.draw(st.sampled_from(folder.shards))
    stream = example.streams[shard.generation, shard.record.source, shard.record.split]
    first = data.draw(st.integers(-1, len(stream) - 1))
    stop = data.draw(st.integers(max(first + 1, 1), len(stream)))
    found = [row.id for row in folder.rows_between(shard, first, stop)]
    assert found == list(dict.fromkeys(name for name, _ in stream[max(first, 0) : stop]))


def test_the_marks_of_chat_turns_are_part_of_a_text_and_other_special_tokens_are_not(example: Example):
    folder, encode = PreparedFolder(example.folder), example.tokenizer.encode
    start, end = (example.tokenizer.special_id(name) for name in (TURN_START, TURN_END))
    tokens = [start, *encode("user\nwhat?"), end, *encode("\n"), example.tokenizer.eos_id]
    assert folder.decode(np.array(tokens)) == "<|im_start|>user\nwhat?<|im_end|>\n"


def test_a_file_that_was_prepared_twice_repeats_its_older_self(example: Example, monkeypatch: pytest.MonkeyPatch):
    folder = PreparedFolder(example.folder)
    kept = folder.find(str(example.raw / "web.jsonl"), line=1)[0]
    again = dataclasses.replace(kept, generation=1, verdict="exact duplicate", duplicate_of=kept.id)
    for known, expected in (([kept, again], kept), ([again, kept], kept), ([again], None), ([], None)):
        monkeypatch.setattr(folder, "find", lambda *_, known=known, **__: known)
        assert folder.original(again) == expected
    dropped = dataclasses.replace(kept, verdict="text.length")
    monkeypatch.setattr(folder, "find", lambda *_, **__: [dropped])
    assert folder.original(again) is None


def test_a_sample_shows_its_text_with_the_borders_of_documents_and_where_each_came_from(example: Example, inspect):
    # The border between the first document and the long one lies in sample 4: 72 tokens, then others.
    shown = inspect("--sample", "train/web-00000.bin:4")
    assert "tokens 64 to 80, 16 of them targets; documents: 2" in shown
    first, second = shown.split("=== ")[1], shown.split("=== ")[3]
    assert first.startswith(f"{example.id('web.jsonl', 1)} (line 1, source web, en, generation 0)")
    assert "its tokens 63 to 71 of 0 to 71" in first
    assert TEXTS["first"].endswith(first.splitlines()[-1])
    assert "=== end of document" in shown
    assert second.startswith(f"{example.id('web.jsonl', 4)} (line 4, source web, en, generation 0)")
    assert LONG.startswith(second.splitlines()[3])
    assert second.endswith("... goes on behind the sample\n")


def test_the_command_that_a_sample_names_shows_the_raw_line(inspect):
    command = inspect("--sample", "train/web-00003.bin:2").splitlines()[4].strip()
    shown = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
    assert json.loads(shown)["text"] == TEXTS["later"]


@pytest.mark.parametrize("name", ["file", "path", "identity", "beginning", "copy"])
def test_a_shard_is_named_as_the_audit_names_it(example: Example, inspect, name: str, tmp_path: Path):
    path = example.folder / "train/web-00001.bin"
    file_id = next(
        s for s in PreparedFolder(example.folder).shards if s.record.file.endswith(path.name)
    ).record.fingerprint
    shutil.copy(path, tmp_path / "copy.bin")
    names = {"file": "web-00001.bin", "path": path, "identity": file_id.file_id, "beginning": file_id.file_id[:12]}
    expected = inspect("--sample", "train/web-00001.bin:3")
    assert inspect("--sample", f"{names.get(name, tmp_path / 'copy.bin')}:3") == expected


def test_another_sequence_length_gives_other_samples(inspect):
    whole = inspect("--sample", "train/web-00000.bin:0", "--sample-tokens", 96)
    assert "tokens 0 to 96, 96 of them targets; documents: 2" in whole
    assert TEXTS["first"] in whole


def test_the_list_of_a_shard_names_documents_that_begin_before_it_and_go_on_behind(example: Example, inspect):
    lines = inspect("--shard", "train/web-00001.bin").splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "1"]
    assert "tokens 1 to 79, begins before" in lines[1]
    assert example.id("web.jsonl", 4) in lines[1]
    assert "tokens 80 to 96, goes on behind" in lines[2]
    shown = inspect("--shard", "train/web-00001.bin", "--document", 0)
    assert "train/web-00000.bin tokens 73 to 96, train/web-00001.bin tokens 1 to 79" in shown
    assert LONG in shown
    assert "documents 0 to 1" in inspect("--shard", "train/web-00001.bin", "--document", 2, code=78)


def test_documents_are_drawn_by_a_seed_and_hold_what_was_read(inspect):
    kept = [TEXTS[name] for name in ("first", "long", "script", "held out", "later", "note")]
    everything = inspect("--documents", 100)
    assert all(text in everything for text in kept)
    assert everything.count("=== ") == 6
    assert TEXTS["first"] in inspect("--documents", 1, "--first")
    assert inspect("--documents", 2, "--seed", 1) == inspect("--documents", 2, "--seed", 1)
    assert len({inspect("--documents", 2, "--seed", seed) for seed in range(6)}) > 1
    assert TEXTS["held out"] in inspect("--documents", 9, "--split", "validation")
    assert inspect("--documents", 9, "--source", "notes").count("=== ") == 1


@given(st.integers(1, 60), st.integers(0, 50), st.integers(0, 2**64 - 1))
def test_what_is_drawn_are_different_ones_as_many_as_there_are(number: int, count: int, seed: int):
    ranks = chosen(number, seed)(count)
    assert len(set(ranks)) == len(ranks) == min(number, count)
    assert all(0 <= rank < count for rank in ranks)


def test_the_fate_of_a_kept_document_is_where_it_lies(example: Example, inspect):
    shown = inspect("--id", example.id("web.jsonl", 7))
    assert "kept, 101 tokens, the last its end: train/web-00001.bin tokens 80 to 96, train/web-00002.bin" in shown
    assert TEXTS["script"] in shown
    assert inspect("--id", "web.jsonl:7") == inspect("--id", example.raw / "web.jsonl:7") == shown
    assert "kept" in inspect("--id", "note.txt")


def test_the_fate_of_a_duplicate_leads_to_the_kept_one_with_both_texts(example: Example, inspect):
    shown = inspect("--id", "web.jsonl:6")
    assert f"left out as near duplicate of {example.id('web.jsonl', 4)}" in shown
    assert TEXTS["near"] in shown
    assert LONG in shown.split("kept, ")[1]
    across = inspect("--id", "more.jsonl:1")
    assert "generation 1" in across
    assert f"=== {example.id('web.jsonl', 7)} (line 7, source web, en, generation 0)" in across


def test_a_duplicate_of_another_data_folder_says_so(inspect):
    assert "elsewhere/old.jsonl#77 is not in" in inspect("--id", "more.jsonl:3")


def test_the_fate_of_a_dropped_document_is_its_filter_and_of_a_bad_line_its_reason(inspect):
    assert "left out by the filter text.length\nshort\n" in inspect("--id", "web.jsonl:3")
    assert 'bad line, invalid JSON; it begins:\n{"text": \\xff<i>' in inspect("--id", "web.jsonl:2")


def test_an_unknown_id_names_what_is_near(example: Example, inspect):
    path = example.raw / "web.jsonl"
    between = inspect("--id", f"{path}#5", code=78)
    assert f"{example.id('web.jsonl', 1)} (line 1) and {example.id('web.jsonl', 3)} (line 3)" in between
    assert f"nearest: {example.id('web.jsonl', 8)} (line 8)" in inspect("--id", f"{path}:99", code=78)
    assert str(path) in inspect("--id", "some/where/web.jsonl:1", code=78)
    assert f"nearest: {path}," in inspect("--id", "wep.jsonl:1", code=78)
    assert "has 8 documents and bad lines; name one" in inspect("--id", "web.jsonl", code=78)


def test_examples_of_a_reason_have_their_text(example: Example, inspect):
    assert "short" in inspect("--dropped", "text.length")
    near = inspect("--dropped", "near duplicate")
    assert near.startswith("2 times near duplicate\n")
    assert f"near duplicate of {example.id('web.jsonl', 4)}" in near
    assert inspect("--dropped", "near duplicate", "-n", 1).count("=== ") == 1
    assert "\\xff<i>" in inspect("--dropped", "invalid JSON")
    assert "did you mean 'text.length'? There are exact duplicate (2)" in inspect("--dropped", "text.lenght", code=78)


def test_without_its_raw_file_a_dropped_document_has_what_the_preparation_noted(tmp_path: Path, inspect):
    moved = make(tmp_path)
    changed = (moved.raw / "web.jsonl").read_bytes().replace(b"short", b"other")
    (moved.raw / "web.jsonl").write_bytes(changed)
    (moved.raw / "more.jsonl").unlink()
    shown = inspect("--dropped", "text.length", folder=moved.folder)
    assert "short" in shown
    assert "other" not in shown
    assert "more.jsonl is gone, or has changed" in inspect("--id", "more.jsonl:1", folder=moved.folder)


def test_a_search_names_the_documents_that_contain_a_text(example: Example, inspect):
    shown = inspect("--search", "第二次准备")
    assert shown.startswith(f"{example.id('more.jsonl', 2)} (line 2")
    assert "no kept document contains it" in inspect("--search", "not there at all")
    assert inspect("--search", "document", "-n", 1).count("\n") == 1


def test_statistics_count_what_the_streams_hold(example: Example, inspect):
    counts = folder_statistics.count(PreparedFolder(example.folder))
    for (source, split), found in counts.items():
        streams = [s for (_, *key), s in example.streams.items() if key == [source, split]]
        owners = Counter(name for stream in streams for name, _ in stream)
        assert (found.documents, found.tokens) == (len(owners), sum(map(len, streams)))
        assert Counter(found.lengths) == Counter(owners.values())
    lines = inspect().splitlines()
    assert "tokenizer.json, byte-level BPE of 300 tokens; documents end with id 0, <|endoftext|>" in lines[0]
    assert lines[3].split()[:4] == ["web", "train", "4", "4"]
    assert [line.split() for line in lines[-2:]] == [
        ["0000", "1", "4", "4", "310", "1", "2", "1"],
        ["0001", "2", "2", "2", "90", "0", "2", "0"],
    ]


def test_documents_of_equal_length_are_all_counted(tmp_path: Path):
    rows = {name: [None] * 5 for name in ("line", "place", "language", "duplicate_of", "start")}
    rows |= {"path": ["a"] * 5, "source": ["web"] * 5, "verdict": ["kept"] * 4 + ["text.length"]}
    rows |= {"split": ["train"] * 5, "num_tokens": [7, 7, 7, 9, 7], "text_bytes": [20, 30, 40, 50, 60]}
    with DocumentsWriter(tmp_path / "documents.parquet") as table:
        table.add(rows)
    folder: Any = SimpleNamespace(shards=[], documents=[DocumentsQuery(tmp_path / "documents.parquet", 0)])
    found = folder_statistics.count(folder)["web", "train"]
    assert (found.documents, found.tokens, found.text_bytes, found.lengths) == (4, 30, 140, {7: 3, 9: 1})


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80))
def test_quantiles_are_lengths_that_the_share_of_documents_does_not_surpass(lengths: list[int]):
    expected = np.quantile(lengths, QUANTILES, method="inverted_cdf").tolist()
    assert quantiles(dict(Counter(lengths))) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "train/nothing.bin"), "is none of the shards of"),
        (("--shard", "web-00000.bin"), "fits several of the shards of .*train/web-00000.bin, validation/web-00000.bin"),
        (("--sample", "train/web-00000.bin:6"), "has samples 0 to 5 of 16 tokens"),
        (("--sample", "train/web-00000.bin"), "expected SHARD:NUMBER"),
        (("--documents", "1", "--source", "wep"), "no source of .*; it has notes, web"),
        (("--search", ""), "give a text"),
    ],
)
def test_a_request_that_does_not_fit_is_one_line_that_says_what_would(
    inspect, arguments: tuple[str, ...], message: str
):
    assert re.search(message, inspect(*arguments, code=78))


def test_a_folder_that_is_none_or_is_damaged_is_told_by_the_exit_code(example: Example, inspect, tmp_path: Path):
    assert "make prepare-data" in inspect(folder=tmp_path, code=78)
    damaged = tmp_path / "damaged"
    shutil.copytree(example.folder, damaged)
    (damaged / "generations/0001/documents.parquet").write_bytes(b"nothing")
    assert "0001/documents.parquet: not readable" in inspect(folder=damaged, code=65)
    (damaged / "train/web-00000.bin").write_bytes(b"BESSEMER")
    assert "cut short" in inspect(folder=damaged, code=65)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jsonl#120", ("a/b.jsonl", 120, None)),
        ("a/b.jsonl:12", ("a/b.jsonl", None, 12)),
        ("a#b.txt", ("a#b.txt", None, None)),
        ("s3://bucket/a.jsonl:7", ("s3://bucket/a.jsonl", None, 7)),
        ("#3", ("#3", None, None)),
    ],
)
def test_an_id_is_a_path_with_a_place_or_a_line(name: str, expected: tuple[str, int | None, int | None]):
    assert parse_id(name) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "web"), "--source: goes with --documents or --dropped or --search"),
        (("--id", "raw.jsonl:1", "--source", "web"), "--source: goes with"),
        (("--document", "0"), "--document: goes with --shard"),
        (("--documents", "1", "--document", "0"), "--document: goes with --shard"),
        (("--dropped", "text.length", "--split", "train"), "--split: goes with --documents or --search"),
        (("--shard", "train/web-00000.bin", "--sample-tokens", "8"), "--sample-tokens: goes with --sample"),
        (("--seed", "0"), "--seed: goes with"),
        (("--first",), "--first: goes with"),
        (("--documents", "1", "-n", "3"), "-n: goes with --dropped or --search"),
    ],
)
def test_an_option_without_what_it_goes_with_is_an_error(inspect, arguments: tuple[str, ...], message: str):
    assert inspect(*arguments, code=64).startswith(f"error: {message}")


def test_names_that_are_spelled_to_move_the_cursor_do_not(tmp_path: Path, inspect):
    name, shown_name = "a\x1b[2J\nkept\x9b.jsonl", r"a\x1b[2J\nkept\x9b.jsonl"
    (tmp_path / "raw").mkdir()
    harbours = [" ".join(f"{number} boats lay in harbour {number * 7}." for number in range(n, 200)) for n in (0, 90)]
    records = "".join(json.dumps({"text": text}) + "\n" for text in (*harbours, harbours[0], "a"))
    (tmp_path / "raw" / name).write_text(f"{records}{{broken\x1b\n", encoding="utf-8")
    config = small_config(tmp_path, {"web": SourceConfig(paths=(f"{tmp_path}/raw/*.jsonl",))}, harbours)
    pipeline.prepare(config)
    folder = tmp_path / "out"
    shards = [shard.record.file for shard in PreparedFolder(folder).shards]
    inspect(folder=folder)  # what the preparation has printed ends here
    questions = [
        *(("--documents", 2), ("--search", "boats"), ("--shard", shards[0]), ("--sample", f"{shards[0]}:0")),
        *(("--dropped", "exact duplicate"), ("--dropped", "text.length"), ("--dropped", "invalid JSON")),
        *(("--id", f"{name}:{line}") for line in range(1, 6)),
    ]
    for question in questions:
        shown = inspect(*question, folder=folder)
        assert shown_name in shown, question
        assert visible(shown) == shown
    for question in (("--id", name), ("--id", f"{name}:9"), ("--id", "\x1b\udcff:1"), ("--shard", "\x1b")):
        shown = inspect(*question, folder=folder, code=78)
        assert visible(shown) == shown


def small_config(place: Path, sources: dict[str, SourceConfig], texts: list[str]) -> PrepareConfig:
    train_bpe(texts, 300).save(place)
    return PrepareConfig(
        sources=sources,
        clean=CleanConfig(filters=("text.length",)),
        tokenizer=TokenizerConfig(path=str(place)),
        output=OutputConfig(folder=str(place / "out"), shard_tokens=256, sample_tokens=64, validation_fraction=0.2),
        engine=EngineConfig(kind="inline", max_bad_fraction=0.5),
    )


def test_each_source_is_read_again_in_its_own_layout_in_every_generation(tmp_path: Path, inspect):
    texts = [
        " ".join(f"{number} boats lay in harbour {number * 7}." for number in range(n, n + 40))
        for n in range(0, 400, 40)
    ]
    twin = texts[1].replace("boats", "ships", 2)
    parts = {"web": texts[:5], "notes": [*texts[5:8], twin, "a"], "later": texts[8:]}
    layouts: dict[str, Any] = {"web": {"text_field": "body"}, "notes": {"layout": "{note}\n{body?}"}}
    for name, part in parts.items():
        lines = [json.dumps({"body" if name == "web" else "note": text, "title": "not this"}) for text in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    notes_paths = (f"{tmp_path}/notes.jsonl", f"{tmp_path}/later.jsonl")
    paths = {"web": (f"{tmp_path}/web.jsonl",), "notes": notes_paths}
    sources = {
        name: SourceConfig(paths=paths[name], licence=f"licence of {name}", **layout)
        for name, layout in layouts.items()
    }
    for num_files in (1, 2):  # of notes; web has one
        sources["notes"] = dataclasses.replace(sources["notes"], paths=notes_paths[:num_files])
        pipeline.prepare(small_config(tmp_path, sources, texts))
    folder = tmp_path / "out"
    inspect(folder=folder)  # what the preparation has printed ends here
    for name, part in parts.items():
        for line, text in enumerate(part, start=1):
            shown = inspect("--id", f"{name}.jsonl:{line}", folder=folder)
            where = "source web" if name == "web" else "source notes"
            assert re.search(rf"{where}(, latin)?, generation {int(name == 'later')}\)", shown)
            assert f"\n{text}\n" in shown
    assert "source notes" in inspect("--documents", 1, "--source", "notes", folder=folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(f"Source {source}</h2>" in page and f"licence of {source}" in page for source in sources)
    assert "<mark>ships</mark>" in page
    assert "<pre>a</pre>" in page


def test_control_characters_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\x07\n\tc\x9b 数") == "a\\x1b[2Jb\\x07\n\tc\\x9b 数"


def test_commands_lead_to_their_modules(example: Example, capsys: pytest.CaptureFixture[str]):
    assert command_line.main(["inspect", str(example.folder), "--documents", "1"]) == 0
    assert "=== " in capsys.readouterr().out
    assert command_line.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{command} " in shown for command in command_line.COMMANDS)
    assert command_line.main(["inspekt"]) == 64
    assert "inspekt: no such command; there are prepare, prepare-chat, show-mask, inspect" in capsys.readouterr().err


def test_the_configuration_says_how_files_are_read(example: Example):
    folder = PreparedFolder(example.folder)
    assert folder.config == config_file.load(example.folder / "prepare.toml", PrepareConfig)
    assert folder.layout_of("notes") == folder.config.sources["notes"].read_layout()


def test_a_real_preparation_in_two_generations_can_be_looked_into(tmp_path: Path, inspect):
    words = [f"{number} boats lay in the harbour of town {number * 7919 % 1000}." for number in range(400)]
    texts = [" ".join(words[start : start + 40]) for start in range(0, 400, 40)]
    raw, folder = tmp_path / "raw.jsonl", tmp_path / "out"
    twin = texts[1].replace("boats", "ships", 2)
    lines = [
        *(json.dumps({"text": text}) for text in texts[:6]),
        "{broken",
        json.dumps({"text": twin}),
        '{"text": "a"}',
    ]
    raw.write_text("\n".join([*lines, json.dumps({"text": texts[3]})]) + "\n", encoding="utf-8")
    later = tmp_path / "later.jsonl"
    later.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[5:]), encoding="utf-8")
    train_bpe(texts, 300).save(tmp_path)
    for paths in ((raw,), (raw, later)):
        pipeline.prepare(
            PrepareConfig(
                input=InputConfig(paths=tuple(map(str, paths)), source="web"),
                clean=CleanConfig(filters=("text.length",)),
                tokenizer=TokenizerConfig(path=str(tmp_path)),
                output=OutputConfig(folder=str(folder), shard_tokens=256, sample_tokens=64, validation_fraction=0.2),
                engine=EngineConfig(kind="inline", max_bad_fraction=0.5),
            )
        )
    inspect("--documents", 1, folder=folder)  # what the preparation has printed ends here
    for line, text in enumerate(texts[:6], start=1):
        shown = inspect("--id", f"raw.jsonl:{line}", folder=folder)
        assert "    kept, " in shown
        assert shown.endswith(f"\n{text}\n")
    assert "bad line, invalid JSON" in inspect("--id", "raw.jsonl:7", folder=folder)
    assert f"near duplicate of {raw}#{len(lines[0]) + 1}\n{twin}\n===" in inspect("--id", "raw.jsonl:8", folder=folder)
    assert "left out by the filter text.length\na\n" in inspect("--id", "raw.jsonl:9", folder=folder)
    assert f"exact duplicate of {raw}#" in inspect("--id", "raw.jsonl:10", folder=folder)
    assert f"exact duplicate of {raw}#" in inspect("--id", "later.jsonl:1", folder=folder)
    assert "generation 1" in inspect("--id", "later.jsonl:2", folder=folder)
    assert f"<code>{raw}#{len(lines[0]) + 1}</code>" in (folder / "report.html").read_text(encoding="utf-8")
    whole = PreparedFolder(folder)
    rows = [row for query in whole.documents for row in query.select(pc.field("verdict") == "kept", ["verdict"])]
    assert sorted(whole.text(row) for row in rows) == sorted(texts)
    for shard in whole.shards:
        for number in range(shard.record.sample_count):
            assert inspect("--sample", f"{shard.record.file}:{number}", folder=folder).count("=== ") >= 1

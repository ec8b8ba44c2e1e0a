"""A data folder that grows: files are added, shards that are there stay as they are."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from data_prep import documents_table, generations, manifest, publish
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.config_file import ConfigError
from data_prep.duplicates.dedup_config import DecontaminateConfig, DedupConfig
from data_prep.engine import EngineConfig
from data_prep.manifest import read_manifest
from data_prep.pipeline import OutputError, main, prepare
from data_prep.prepare_config import InputConfig, OutputConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data_prep.shards import open_tokens, verify_payload
from data_prep.tokenizing.backends import TokenizerError
from data_prep.tokenizing.tokenizer import load_tokenizer

WORDS = [f"{a}{b}" for a in ("ba", "ko", "li", "mu", "ne", "ro", "si", "tu", "va", "wo") for b in "bcdfghjklm"]


def text(seed: int, num_words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def config_for(place: Path, pattern: str = "*.jsonl", **options: object) -> PrepareConfig:
    output = {"folder": str(place / "data"), "sample_tokens": 16, "shard_tokens": 512, "validation_fraction": 0.1}
    return PrepareConfig(
        input=InputConfig(paths=(str(place / pattern),)),
        clean=CleanConfig(filters=()),
        dedup=DedupConfig(),
        tokenizer=TokenizerConfig(vocab_size=300, training_bytes=10_000),
        output=OutputConfig(**{**output, **options}),  # pyright: ignore[reportArgumentType]
        engine=EngineConfig(num_workers=0),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(folder: Path) -> list[str]:
    """The documents of all streams, decoded."""
    made, found = read_manifest(folder), []
    tokenizer = load_tokenizer(folder, eos_id=made.eos_id)
    streams = {(record.split, record.source): [] for record in made.shards}
    for record in made.shards:
        streams[record.split, record.source].append(open_tokens(folder / record.file)[1:])
    for pieces in streams.values():
        stream = np.concatenate(pieces)
        documents = np.split(stream, np.flatnonzero(stream == made.eos_id) + 1)[:-1]
        found += [tokenizer.decode(document[:-1]) for document in documents]
    return sorted(found)


def table(folder: Path, generation: int) -> list[dict]:
    return pq.read_table(generations.folder_of(folder, generation) / generations.DOCUMENTS_FILE).to_pylist()


def test_added_files_become_further_shards_and_no_earlier_file_changes(tmp_path: Path):
    write_lines(tmp_path / "b.jsonl", [text(i) for i in range(60)])
    prepare(config_for(tmp_path))
    before = contents(tmp_path / "data")
    first = read_manifest(tmp_path / "data")
    # Sorts before the file that is there, repeats a document exactly, and one but for a word.
    near = text(7).replace(text(7).split()[30], "other", 1)
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(100, 120)] + [text(3), near])
    made = prepare(config_for(tmp_path))
    assert made == read_manifest(tmp_path / "data")
    assert made.shards[: len(first.shards)] == first.shards
    assert len(made.shards) > len(first.shards)
    after = contents(tmp_path / "data")
    top = {"manifest.json", "report.html"}
    assert {name: after[name] for name in before if name not in top} == {
        name: content for name, content in before.items() if name not in top
    }
    assert texts_of(tmp_path / "data") == sorted([text(i) for i in [*range(60), *range(100, 120)]])
    rows = table(tmp_path / "data", 1)
    assert [row["verdict"] for row in rows[20:]] == ["exact duplicate", "near duplicate"]
    originals = {row["line"]: f"{row['path']}#{row['place']}" for row in table(tmp_path / "data", 0)}
    assert [row["duplicate_of"] for row in rows[20:]] == [originals[4], originals[8]]
    for record in made.shards:
        verify_payload(tmp_path / "data" / record.file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "data"]


def test_a_folder_grown_in_steps_holds_the_documents_of_one_made_at_once(tmp_path: Path):
    rng = random.Random(1)
    texts = [text(rng.randrange(40), 20) for _ in range(200)]
    for step in range(4):
        write_lines(tmp_path / f"{step}.jsonl", texts[50 * step : 50 * step + 50])
        prepare(config_for(tmp_path))
    prepare(config_for(tmp_path, folder=str(tmp_path / "at_once")))
    assert texts_of(tmp_path / "data") == texts_of(tmp_path / "at_once") == sorted(set(texts))
    steps = [row for number in range(4) for row in table(tmp_path / "data", number)]
    assert [row["verdict"] for row in steps] == [row["verdict"] for row in table(tmp_path / "at_once", 0)]


def test_a_document_that_bridges_two_old_ones_changes_neither(tmp_path: Path):
    words = text(1, 200).split()
    left, right = " ".join(words[:130]), " ".join(words[70:])
    write_lines(tmp_path / "a.jsonl", [left, right])
    prepare(config_for(tmp_path, validation_fraction=0.0))
    before = {name: content for name, content in contents(tmp_path / "data").items() if name.endswith(".bin")}
    write_lines(tmp_path / "b.jsonl", [" ".join(words), text(2, 200)])
    prepare(config_for(tmp_path, validation_fraction=0.0))
    after = contents(tmp_path / "data")
    assert {name: after[name] for name in before} == before
    assert left in texts_of(tmp_path / "data")
    assert right in texts_of(tmp_path / "data")


def test_a_file_that_moved_or_is_gone_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [text(ord(name) + i) for i in range(0, 60, 2)])
    prepare(config_for(tmp_path))
    before = contents(tmp_path / "data")
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    (tmp_path / "b.jsonl").unlink()
    prepare(config_for(tmp_path))
    assert "already prepared" in capsys.readouterr().out
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("added", [[], [text(i) for i in range(7)]], ids=["nothing", "repetitions"])
def test_new_files_with_nothing_new_in_them_are_noted_and_not_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], added: list[str]
):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    first = prepare(config_for(tmp_path))
    write_lines(tmp_path / "b.jsonl", added)
    assert prepare(config_for(tmp_path)) == first
    assert [row["verdict"] for row in table(tmp_path / "data", 1)] == ["exact duplicate"] * len(added)
    capsys.readouterr()
    assert prepare(config_for(tmp_path)) == first
    assert "already prepared" in capsys.readouterr().out


def test_a_tokenizer_that_was_changed_is_not_used_for_more(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    prepare(config_for(tmp_path))
    with (tmp_path / "data" / "tokenizer.json").open("a") as file:
        file.write(" ")
    write_lines(tmp_path / "b.jsonl", [text(99)])
    with pytest.raises(OutputError, match=r"tokenizer\.json: not the tokenizer that made the shards"):
        prepare(config_for(tmp_path))


@pytest.mark.parametrize("near", ["off", "simhash", None])
def test_folders_that_cannot_be_compared_with_are_refused_at_once(tmp_path: Path, near: str | None):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    if near is not None:
        other = dataclasses.replace(config_for(tmp_path, folder=str(tmp_path / "old")), dedup=DedupConfig(near=near))
        prepare(other)
    config = dataclasses.replace(config_for(tmp_path), dedup=DedupConfig(against=(str(tmp_path / "old"),)))
    with pytest.raises(ConfigError, match="prepared with other" if near else "is not a data folder"):
        prepare(config)


def test_other_weights_change_the_proposed_mixture_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [text(ord(name) * 1000 + i) for i in range(40)])

    def weighted(weight: float) -> PrepareConfig:
        sources = {name: SourceConfig(paths=(str(tmp_path / f"{name}.jsonl"),)) for name in "ab"}
        sources["a"] = dataclasses.replace(sources["a"], weight=weight)
        return dataclasses.replace(config_for(tmp_path), input=InputConfig(), sources=sources)

    prepare(weighted(0.3))
    before = contents(tmp_path / "data")
    prepare(weighted(0.9))
    assert "mixture.toml was written anew" in capsys.readouterr().out
    after = contents(tmp_path / "data")
    assert [name for name in after if after[name] != before[name]] == ["mixture.toml"]
    assert b"a=0.9 b=0.1" in after["mixture.toml"]
    with pytest.raises(ConfigError, match="add up to 1 and leave nothing for the others"):
        weighted(1.0)


def test_two_files_of_equal_content_give_their_documents_once(tmp_path: Path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [text(i) for i in range(30)])
    prepare(config_for(tmp_path))
    assert texts_of(tmp_path / "data") == sorted(text(i) for i in range(30))
    assert [row["verdict"] for row in table(tmp_path / "data", 0)] == ["kept"] * 30 + ["exact duplicate"] * 30


@pytest.mark.parametrize("broken", ["publish", "manifest"])
def test_an_append_that_breaks_off_is_completed_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    prepare(config_for(tmp_path))
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, [text(i) for i in (range(30) if name[0] == "a" else range(50, 90))])
    publish_one, count = publish.publish, 0

    def publish_some(temporary: Path, path: Path) -> None:
        nonlocal count
        if path.parent == tmp_path / "data" / "train" and (count := count + 1) > 2:
            raise KeyboardInterrupt
        publish_one(temporary, path)

    def no_manifest(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if broken == "publish":
            patched.setattr(publish, "publish", publish_some)
        else:
            patched.setattr(manifest, "write_manifest", no_manifest)
        with pytest.raises(KeyboardInterrupt):
            prepare(config_for(tmp_path))
    assert len(read_manifest(tmp_path / "data").shards) == len(
        generations.read_generations(tmp_path / "data")[0].shards
    )
    prepare(config_for(tmp_path))
    made = read_manifest(tmp_path / "data")
    assert texts_of(tmp_path / "data") == sorted(text(i) for i in [*range(30), *range(50, 90)])
    assert "0001" in (tmp_path / "data" / "report.html").read_text()
    assert not (tmp_path / "data.work").exists()
    assert {path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.bin")} == {
        record.file for record in made.shards
    }


def test_several_sources_share_a_folder_a_tokenizer_and_a_mixture(tmp_path: Path):
    write_lines(tmp_path / "web.jsonl", [text(i) for i in range(80)])
    (tmp_path / "code").mkdir()
    for i in range(30):
        (tmp_path / "code" / f"{i}.py").write_text(f"def f{i}():\n    return '{text(1000 + i)}'\n")
    base = config_for(tmp_path)
    config = dataclasses.replace(
        base,
        input=InputConfig(),
        sources={
            "web": SourceConfig(paths=(str(tmp_path / "web.jsonl"),), weight=0.8),
            "code": SourceConfig(paths=(str(tmp_path / "code" / "*.py"),), max_epochs=4, licence="MIT"),
        },
    )
    made = prepare(config)
    assert {(record.source, record.split) for record in made.shards} >= {("web", "train"), ("code", "train")}
    assert {record.file for record in made.shards if record.source == "code"} >= {"train/code-00000.bin"}
    assert len(texts_of(tmp_path / "data")) == 110
    lines = (tmp_path / "data" / "mixture.toml").read_text().splitlines()[1:]
    folder = json.dumps(str(tmp_path / "data"))
    assert lines == ["[data]", f"paths = [{folder}]", 'mixture = ["web=0.8 code=0.2"]', 'max_epochs = ["code=4"]']
    rows = table(tmp_path / "data", 0)
    assert {(row["source"], row["language"]) for row in rows} >= {("code", "code")}


def test_a_source_can_be_added_later_and_left_out(tmp_path: Path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [text(ord(name) * 1000 + i) for i in range(40)])
    sources = {name: SourceConfig(paths=(str(tmp_path / f"{name}.jsonl"),)) for name in "ab"}
    base = dataclasses.replace(config_for(tmp_path), input=InputConfig())
    prepare(dataclasses.replace(base, sources={"a": sources["a"]}))
    made = prepare(dataclasses.replace(base, sources=sources))
    assert {record.source for record in made.shards} == {"a", "b"}
    assert prepare(dataclasses.replace(base, sources={"b": sources["b"]})) == made
    other = dataclasses.replace(sources["b"], kind="code")
    with pytest.raises(OutputError, match="source b was"):
        prepare(dataclasses.replace(base, sources={"b": other}))


def test_a_tokenizer_that_cannot_spell_the_input_is_refused(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    vocabulary = {"[UNK]": 0, "</s>": 1, **{letter: 2 + i for i, letter in enumerate("abcdef ")}}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(
        config_for(tmp_path), tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    )
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot spell \d+% of the input's characters"):
        prepare(config)


def test_what_another_data_folder_holds_is_not_taken_again(tmp_path: Path):
    write_lines(tmp_path / "old.jsonl", [text(i) for i in range(30)])
    prepare(config_for(tmp_path, "old.jsonl", folder=str(tmp_path / "old")))
    write_lines(tmp_path / "new.jsonl", [text(i) for i in range(20, 60)])
    config = dataclasses.replace(config_for(tmp_path, "new.jsonl"), dedup=DedupConfig(against=(str(tmp_path / "old"),)))
    prepare(config)
    assert texts_of(tmp_path / "data") == sorted(text(i) for i in range(30, 60))
    assert table(tmp_path / "data", 0)[0]["duplicate_of"].startswith(f"{tmp_path}/old.jsonl#")


def test_texts_of_evaluation_sets_are_dropped_by_name(tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(40)] + [f"{text(90)} {text(91, 20)} {text(92)}"])
    (tmp_path / "exam.txt").write_text(text(91, 20) + "\n")
    config = dataclasses.replace(
        config_for(tmp_path), decontaminate=DecontaminateConfig(paths=(str(tmp_path / "exam.txt"),))
    )
    prepare(config)
    assert [row["verdict"] for row in table(tmp_path / "data", 0)][40:] == ["contaminated:exam.txt"]
    assert len(texts_of(tmp_path / "data")) == 40


def test_dialogues_are_encoded_with_the_marks_of_their_turns(tmp_path: Path):
    turns = [{"role": "user", "content": text(1)}, {"role": "assistant", "content": f"{text(2)} <|im_end|>"}]
    lines = [
        json.dumps({"messages": turns}),
        json.dumps({"messages": [{"role": "user", "content": text(i)} for i in (3, 4)]}),
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    made = prepare(config_for(tmp_path, validation_fraction=0.0))
    tokenizer = load_tokenizer(tmp_path / "data", eos_id=made.eos_id)
    start, end = tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")
    stream = np.concatenate([open_tokens(tmp_path / "data" / record.file)[1:] for record in made.shards])
    assert (np.count_nonzero(stream == start), np.count_nonzero(stream == end)) == (4, 4)
    first = stream[: int(np.flatnonzero(stream == made.eos_id)[0])]
    assert first[0] == start
    said = f"user\n{text(1)}\nassistant\n{text(2)} <|im_end|>\n"
    assert tokenizer.decode(first) == said


def test_the_table_of_documents_says_where_each_is(tmp_path: Path):
    texts = [text(i, 30 + i) for i in range(50)]
    write_lines(tmp_path / "a.jsonl", [*texts[:20], "x", *texts[20:], texts[5]])
    config = dataclasses.replace(config_for(tmp_path), clean=CleanConfig(filters=("text.length",)))
    made = prepare(config)
    tokenizer = load_tokenizer(tmp_path / "data", eos_id=made.eos_id)
    rows = table(tmp_path / "data", 0)
    assert [row["line"] for row in rows] == list(range(1, 53))
    assert [row["verdict"] for row in rows if row["verdict"] != documents_table.KEPT] == [
        "text.length",
        "exact duplicate",
    ]
    lines = (tmp_path / "a.jsonl").read_bytes()
    for row in rows:
        raw = json.loads(lines[row["place"] :].split(b"\n", 1)[0])["text"]
        if row["verdict"] == documents_table.KEPT:
            shards = [record.file for record in made.shards if record.split == row["split"]]
            stream = np.concatenate([open_tokens(tmp_path / "data" / file)[1:] for file in shards])
            tokens = stream[row["start"] : row["start"] + row["num_tokens"]]
            assert tokens[-1] == made.eos_id
            assert tokenizer.decode(tokens[:-1]) == raw


def test_the_command_line_tells_what_came_of_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_lines(tmp_path / "a.jsonl", [text(i) for i in range(50)] + [text(1), "x" * 5])
    (tmp_path / "mine.toml").write_text(
        f"""
        [sources.web]
        paths = ["{tmp_path}/a.jsonl"]
        [clean]
        filters = ["text.length"]
        [tokenizer]
        vocab_size = 300
        [output]
        folder = "{tmp_path}/data"
        sample_tokens = 16
        shard_tokens = 1600
        """
    )
    assert main([str(tmp_path / "mine.toml"), "--engine.num-workers", "0"]) == 0
    printed = capsys.readouterr().out
    header, train = (line.split() for line in printed.splitlines() if "documents" in line or " train " in line)
    row = dict(zip([*header[:4], "MB text", *header[6:]], train, strict=True))
    assert (row["source"], row["split"], row["dropped"], row["duplicates"], row["bad"]) == (
        "web",
        "train",
        "1",
        "1",
        "0",
    )
    assert "report.html" in printed

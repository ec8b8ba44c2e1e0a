import dataclasses
import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest

from data_prep import config_file, generations, preparation, unit_step, work_area
from data_prep.checksums import read_checksum_header
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.duplicates.dedup_config import DedupConfig
from data_prep.engine import EngineConfig
from data_prep.manifest import Manifest, read_manifest
from data_prep.pipeline import OutputError, main, prepare
from data_prep.prepare_config import InputConfig, OutputConfig, PrepareConfig, TokenizerConfig
from data_prep.reading.documents import InputError, read_unit
from data_prep.shards import open_tokens, read_header, verify_payload
from data_prep.tokenizing.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
TEXTS = [f"text {i} 文字 " + "word " * (i % 11) + f"end {i}" for i in range(200)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    return config_for(tmp_path)


def config_for(place: Path, **output: object) -> PrepareConfig:
    options = {"folder": str(place / "data"), "sample_tokens": 16, "shard_tokens": 512, "validation_fraction": 0.1}
    return PrepareConfig(
        input=InputConfig(paths=(str(place / "*.jsonl"),)),
        clean=CleanConfig(filters=()),
        dedup=DedupConfig(near="off"),
        tokenizer=TokenizerConfig(vocab_size=300, training_bytes=10_000),
        output=OutputConfig(**{**options, **output}),  # pyright: ignore[reportArgumentType]
        engine=EngineConfig(num_workers=0, max_bad_fraction=0.02),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """The documents of a split, decoded from the targets of its shards."""
    pieces = [open_tokens(folder / record.file)[1:] for record in manifest.shards if record.split == split]
    stream = np.concatenate(pieces)
    documents = np.split(stream, np.flatnonzero(stream == manifest.eos_id) + 1)[:-1]
    return [load_tokenizer(folder, eos_id=manifest.eos_id).decode(document[:-1]) for document in documents]


def test_every_document_is_in_one_split_and_in_order(config: PrepareConfig, tmp_path: Path):
    manifest = prepare(config)
    assert manifest == read_manifest(tmp_path / "data")
    train, validation = (texts_of(tmp_path / "data", manifest, split) for split in ("train", "validation"))
    assert train == [text for text in TEXTS if text in set(train)]
    assert validation == [text for text in TEXTS if text not in set(train)]
    assert 5 < len(validation) < 40
    assert sum(record.document_count for record in manifest.shards) == len(TEXTS)


def test_the_folder_holds_all_that_training_needs(config: PrepareConfig, tmp_path: Path):
    manifest = prepare(config)
    folder = tmp_path / "data"
    assert {path.name for path in folder.iterdir()} == {
        "manifest.json",
        "tokenizer.json",
        "train",
        "validation",
        "prepare.toml",
        "generations",
        "report.html",
    }
    tokenizer = load_tokenizer(folder / manifest.tokenizer_file, eos_id=manifest.eos_id)
    assert tokenizer.digest == manifest.tokenizer_digest
    for record in manifest.shards:
        verify_payload(folder / record.file)
        checksums = read_checksum_header(folder / record.file)
        assert checksums is not None
        assert checksums.sample_tokens == manifest.sample_tokens
        assert read_header(folder / record.file).tokenizer_digest == manifest.tokenizer_digest
        assert record.sample_count == -(-(record.token_count - 1) // 16)
    assert len([record for record in manifest.shards if record.split == "train"]) > 2
    assert config_file.load(folder / "prepare.toml", PrepareConfig) == config
    assert [path.name for path in tmp_path.iterdir()].count("data") == 1
    assert not list(tmp_path.glob("data.tmp*"))


@pytest.mark.parametrize(
    "flags",
    [
        "--engine.kind pool --engine.num-workers 2 --engine.unit-bytes 900",
        "--engine.kind dask --engine.num-workers 4 --engine.unit-bytes 700 --engine.dashboard 127.0.0.1:0",
        "--engine.kind inline --engine.unit-bytes 300",
    ],
)
def test_engine_workers_and_units_do_not_change_a_byte(config: PrepareConfig, tmp_path: Path, flags: str):
    config = dataclasses.replace(config, dedup=DedupConfig(), clean=CleanConfig(filters=("text.length",)))
    (tmp_path / "base.toml").write_text(config_file.to_toml(config))
    made = []
    for folder, chosen in ((tmp_path / "one" / "data", "--engine.kind inline"), (tmp_path / "two" / "data", flags)):
        assert main([str(tmp_path / "base.toml"), "--output.folder", str(folder), *chosen.split()]) == 0
        made.append(contents(folder))
        made[-1].pop("prepare.toml")
    assert made[0] == made[1]


def test_a_second_run_changes_nothing_and_says_so(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    first = prepare(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    assert "torchrun --nproc_per_node=8 train/pretrain.py --data.paths" in capsys.readouterr().out
    assert prepare(config) == first
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before


def test_other_settings_and_changed_files_are_refused_until_overwriting_is_allowed(
    config: PrepareConfig, tmp_path: Path
):
    prepare(config)
    before = contents(tmp_path / "data")
    with pytest.raises(OutputError, match=r"differs: output.sample_tokens was 16, is 32.*--output\.overwrite True"):
        prepare(config_for(tmp_path, sample_tokens=32))
    write_lines(tmp_path / "a.jsonl", TEXTS[:-1])
    with pytest.raises(InputError, match=r"the input file .*a\.jsonl has changed.*--output\.overwrite True"):
        prepare(config)
    assert contents(tmp_path / "data") == before
    for options in ({}, {"sample_tokens": 32}):
        made = prepare(config_for(tmp_path, overwrite=True, **options))
        assert sum(record.document_count for record in made.shards) == len(TEXTS) - 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_a_change_in_the_unread_middle_of_a_large_file_shows_in_its_time(config: PrepareConfig, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_lines(path, ["x" * 1000] * 3000 + TEXTS)
    prepare(config)
    with path.open("r+b") as file:
        file.seek(1_400_000)
        file.write(b"y")
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="has changed"):
        prepare(config)


def test_a_folder_that_is_no_data_folder_is_never_touched(config: PrepareConfig, tmp_path: Path):
    home = tmp_path / "data"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a data folder"):
        prepare(config_for(tmp_path, overwrite=True))
    assert (home / "thesis.txt").exists()
    (home / "thesis.txt").unlink()
    assert prepare(config).shards  # an empty folder is room enough


def test_a_prepared_folder_can_be_moved(config: PrepareConfig, tmp_path: Path):
    prepare(config)
    (tmp_path / "data").rename(tmp_path / "moved")
    before = contents(tmp_path / "moved")
    prepare(config_for(tmp_path, folder=str(tmp_path / "moved")))
    assert contents(tmp_path / "moved") == before


def test_bad_lines_below_the_limit_are_left_out_and_listed(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    place_of_bad = len("\n".join(lines[:10]).encode()) + 1
    lines[10:10] = ["", "{"]
    path.write_text("\n".join(lines), encoding="utf-8")
    manifest = prepare(config)
    assert sum(record.document_count for record in manifest.shards) == len(TEXTS)
    place = tmp_path / "data" / "generations" / "0000" / "bad_lines.jsonl"
    assert [json.loads(line) for line in place.read_text().splitlines()] == [
        {"path": str(path), "line": 11, "place": place_of_bad, "reason": "blank line", "head": ""},
        {"path": str(path), "line": 12, "place": place_of_bad + 1, "reason": "invalid JSON", "head": b"{".hex()},
    ]
    printed = capsys.readouterr().out
    assert f"bad lines were left out; all are listed in {place}:" in printed
    assert f"1 x invalid JSON, e.g. {path}:12" in printed


def test_bad_lines_above_the_limit_stop_the_run_with_reasons_and_places(config: PrepareConfig, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "{\n" * 4 + "5\n", encoding="utf-8")
    with pytest.raises(
        InputError, match=r"text: 5 of 205 lines are bad \(2\.4%\), above engine\.max_bad_fraction"
    ) as caught:
        prepare(config)
    assert f"4 x invalid JSON, e.g. {path}:201, {path}:202, {path}:203\n" in str(caught.value)
    assert f"1 x not a JSON object, e.g. {path}:205" in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_an_input_without_documents_is_refused(config: PrepareConfig, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="the input has no documents"):
        prepare(config)


def test_a_small_input_still_holds_out_one_text(config: PrepareConfig, tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", ["one 1", "two 2", "three 3", "two 2"])
    config = config_for(tmp_path, validation_fraction=1e-9)
    manifest = prepare(dataclasses.replace(config, dedup=DedupConfig(exact=False, near="off")))
    folder = tmp_path / "data"
    train, validation = texts_of(folder, manifest, "train"), texts_of(folder, manifest, "validation")
    assert sorted(train + validation) == ["one 1", "three 3", "two 2", "two 2"]
    assert len(set(validation)) == 1
    assert not set(train) & set(validation)


def test_an_empty_split_is_refused_with_a_way_out(config: PrepareConfig, tmp_path: Path):
    with pytest.raises(InputError, match="training split is empty: all 200 documents"):
        prepare(config_for(tmp_path, validation_fraction=1 - 1e-12))
    write_lines(tmp_path / "a.jsonl", ["one", "one"])
    with pytest.raises(InputError, match=r"validation split is empty.*--output\.validation-fraction 0"):
        prepare(config)
    manifest = prepare(config_for(tmp_path, validation_fraction=0.0))
    assert [(record.split, record.document_count) for record in manifest.shards] == [("train", 1)]


def test_a_given_tokenizer_is_copied_and_its_end_token_recorded(config: PrepareConfig, tmp_path: Path):
    first = prepare(config)
    flags = ["--input.paths", str(tmp_path / "a.jsonl"), "--output.folder", str(tmp_path / "other")]
    flags += ["--tokenizer.path", str(tmp_path / "data"), "--tokenizer.eos-token", "<|im_end|>", "--clean.filters"]
    assert main([*flags, "--engine.num-workers", "0", "--output.validation-fraction", "0.1"]) == 0
    manifest = read_manifest(tmp_path / "other")
    assert (manifest.eos_id, manifest.vocab_size) == (2, first.vocab_size)
    assert load_tokenizer(tmp_path / "other", eos_id=2).digest == manifest.tokenizer_digest
    names = ("data/tokenizer.json", "other/tokenizer.json")
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_a_failure_leaves_the_folder_as_it_was_and_the_work_for_the_next_run(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patched:
        patched.setattr(generations, "write_shards", fail)
        with pytest.raises(OSError, match="No space"):
            prepare(config)
    assert not (tmp_path / "data").exists()
    assert list((tmp_path / "data.work" / "units").glob("*/*/summary.json"))
    prepare(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


def test_two_preparations_of_one_folder_do_not_run_at_once(config: PrepareConfig, tmp_path: Path):
    elsewhere = dataclasses.replace(config.engine, work_folder=str(tmp_path / "elsewhere"))
    with (
        work_area.opened(tmp_path / "data"),
        pytest.raises(work_area.WorkAreaError, match=rf"is running \(process {os.getpid()} on .*--output\.folder"),
    ):
        prepare(dataclasses.replace(config, engine=elsewhere))


def test_a_work_folder_keeps_what_is_not_ours(config: PrepareConfig, tmp_path: Path):
    scratch = tmp_path / "scratch"
    (scratch / "mine").mkdir(parents=True)
    (scratch / "mine" / "thesis.txt").write_text("years of work")
    prepare(dataclasses.replace(config, engine=dataclasses.replace(config.engine, work_folder=str(scratch))))
    assert [path.name for path in scratch.rglob("*")] == ["mine", "thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data", "scratch"]


def test_a_source_that_is_misread_is_refused_before_all_of_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"words": "{i}"}}\n' for i in range(40_000)))
    (tmp_path / "good.jsonl").write_text('{"text": "something to train a tokenizer on"}\n' * 9)
    read: list[int] = []
    monkeypatch.setattr(unit_step, "read_unit", lambda unit: read.append(1) or read_unit(unit))
    engine = EngineConfig(num_workers=0, unit_bytes=20_000)
    layout = InputConfig(paths=(str(tmp_path / "*.jsonl"),), layout="text")
    with pytest.raises(InputError, match=r"text: 1\d,\d{3} of 1\d,\d{3} lines are bad"):
        prepare(dataclasses.replace(config_for(tmp_path), engine=engine, input=layout))
    assert len(read) < 20  # of more than forty
    (tmp_path / "good.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"no documents.*of its first 10,000 lines:\n  10,000 x no field 'text', e\.g\."
    ):
        prepare(dataclasses.replace(config_for(tmp_path), engine=engine, input=layout))


def test_more_units_than_files_may_be_open(tmp_path: Path):
    for number in range(150):
        write_lines(tmp_path / f"{number:03d}.jsonl", [f"text {number} " + "word " * 30])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        made = prepare(dataclasses.replace(config_for(tmp_path), dedup=DedupConfig(threshold=1.0)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sum(record.document_count for record in made.shards) == 150


def test_bad_files_are_listed_in_one_order_whatever_the_units(tmp_path: Path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_bytes(b"\xff" * 5 if name in "ac" else f"{name} good text".encode())
        (tmp_path / f"{name}2.txt").write_bytes(b"ok\n" * 3 + b"\xff")
    listed = []
    for unit_bytes in (1, 10, 1000):
        base = config_for(tmp_path, folder=str(tmp_path / f"data{unit_bytes}"), validation_fraction=0.0)
        engine = EngineConfig(num_workers=0, max_bad_fraction=1, unit_bytes=unit_bytes)
        prepare(dataclasses.replace(base, engine=engine, input=InputConfig(paths=(str(tmp_path / "*.txt"),))))
        listed.append((tmp_path / f"data{unit_bytes}" / "generations" / "0000" / "bad_lines.jsonl").read_text())
    assert len(listed[0].splitlines()) == 6
    assert listed[0] == listed[1] == listed[2]


def test_empty_files_and_blank_lines_are_listed_but_do_not_stop_a_run(tmp_path: Path):
    for number in range(20):
        (tmp_path / f"{number}.py").write_text("" if number % 2 else f"def f{number}(): return {number}\n")
    config = dataclasses.replace(config_for(tmp_path), input=InputConfig(paths=(str(tmp_path / "*.py"),)))
    assert sum(record.document_count for record in prepare(config).shards) == 10
    listed = (tmp_path / "data" / "generations" / "0000" / "bad_lines.jsonl").read_text().splitlines()
    assert len(listed) == 10


def test_relative_paths_mean_the_same_everywhere(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    made = prepare(dataclasses.replace(config, input=InputConfig(paths=("*.jsonl",))))
    listed = json.loads((tmp_path / "data" / "generations" / "0000" / "inputs.json").read_text())["files"]
    assert [name for _, name, _ in listed] == ["a.jsonl"]
    monkeypatch.chdir("/")
    assert prepare(config) == made  # the same content under its absolute name


@pytest.mark.parametrize(
    ("flags", "exit_code", "message"),
    [
        (["--input.paths", "nowhere/*.txt"], 65, "nowhere/*.txt: no file matches"),
        (["--input.pathz", "a"], 78, "did you mean '--input.paths'"),
        (["missing.toml"], 78, "cannot read the config file"),
        (["--tokenizer.path", "nowhere"], 65, "nowhere: no such tokenizer"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    flags: list[str], exit_code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(flags) == exit_code
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("input", "source", "../web"),
        ("input", "max_input_bytes", 0),
        ("tokenizer", "eos_token", "</s>"),
        ("tokenizer", "training_bytes", 0),
        ("output", "shard_tokens", 1000),
        ("output", "sample_tokens", 0),
        ("output", "validation_fraction", 1.0),
        ("engine", "num_workers", -1),
        ("engine", "max_bad_fraction", 1.5),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(section: str, key: str, value: object):
    with pytest.raises(config_file.ConfigError, match=rf"{section}\.{key}"):
        config_file.from_table({section: {key: value}}, PrepareConfig)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("prepare-*.toml")), ids=lambda path: path.name)
def test_the_configs_of_the_repository_load(path: Path):
    assert config_file.load(path, PrepareConfig).output.folder.startswith("data/")


def test_the_installed_corpus_needs_no_paths(tmp_path: Path):
    config = PrepareConfig(
        input=InputConfig(max_input_bytes=300_000),
        tokenizer=TokenizerConfig(vocab_size=400, training_bytes=100_000),
        output=OutputConfig(folder=str(tmp_path / "data"), sample_tokens=64, shard_tokens=64 * 1024),
        engine=EngineConfig(num_workers=0),
    )
    manifest = prepare(config)
    assert {record.source for record in manifest.shards} == {"python"}
    assert not list((tmp_path / "data").glob("**/*.tmp*"))
    text = "".join(texts_of(tmp_path / "data", manifest, "train"))
    assert 200_000 < len(text) < 300_000
    assert "import" in text


def test_finished_units_of_a_broken_run_are_not_done_again(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "cut_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    with monkeypatch.context() as patched:
        patched.setattr(unit_step, "read_unit", fail)
        patched.setattr(preparation, "train", fail)
        prepare(config)
    with monkeypatch.context() as patched:  # other settings are other units
        patched.setattr(unit_step, "read_unit", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(
                dataclasses.replace(config_for(tmp_path, overwrite=True), clean=CleanConfig(filters=("text.length",)))
            )


def test_another_filter_or_tokenizer_gives_another_result(config: PrepareConfig, tmp_path: Path):
    first = prepare(config)
    for change in (
        {"clean": CleanConfig(min_characters=60, filters=("text.length",))},
        {"tokenizer": TokenizerConfig(vocab_size=268)},
    ):
        output = dataclasses.replace(config.output, overwrite=True)
        made = prepare(dataclasses.replace(config, output=output, **change))
        assert made.shards != first.shards
        assert sum(r.document_count for r in made.shards) == sum(
            len(text.encode()) >= 60 or "tokenizer" in change for text in TEXTS
        )


BAD_LINES = {
    "blank line": b"",
    "invalid JSON": b'{"text": "cut sho',
    "not a JSON object": b"5",
    "no field": b'{"txt": "other field"}',
    "null": b'{"text": null}',
    "not a string": b'{"text": 17}',
    "empty text": b'{"text": " "}',
    "invalid UTF-8": b'{"text": "\xff\xfe latin"}',
    "lone surrogate": b'{"text": "half \\ud83d of a pair"}',
    "zero bytes": b'{"text": "a\x00b"}',
}


@pytest.mark.parametrize("unit_bytes", [400, 10**6])
def test_bad_lines_of_ten_kinds_cost_exactly_themselves(tmp_path: Path, unit_bytes: int):
    rng = random.Random(0)
    lines = [json.dumps({"text": text}).encode() for text in TEXTS] + [*BAD_LINES.values()] * 3
    for name in ("a", "b", "c"):
        rng.shuffle(lines)
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    engine = EngineConfig(num_workers=0, max_bad_fraction=0.2, unit_bytes=unit_bytes)
    made = prepare(dataclasses.replace(config_for(tmp_path), engine=engine))
    assert sum(record.document_count for record in made.shards) == len(TEXTS)  # of three files with the same texts
    place = tmp_path / "data" / "generations" / "0000"
    listed = [json.loads(line) for line in (place / "bad_lines.jsonl").read_text().splitlines()]
    assert len(listed) == 3 * 3 * len(BAD_LINES)
    assert len({item["reason"] for item in listed}) == len(BAD_LINES)
    for item in listed:
        raw = Path(item["path"]).read_bytes()
        line = raw.split(b"\n")[item["line"] - 1]
        assert line in BAD_LINES.values()
        assert raw[item["place"] :].startswith(bytes.fromhex(item["head"]))
        assert bytes.fromhex(item["head"]) == line

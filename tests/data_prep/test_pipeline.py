import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import config_file, identity, publish
from data_prep.checksums import read_checksum_header
from data_prep.documents import InputError
from data_prep.manifest import Manifest, read_manifest
from data_prep.pipeline import OutputError, main, prepare
from data_prep.prepare_config import EngineConfig, InputConfig, OutputConfig, PrepareConfig, TokenizerConfig
from data_prep.shards import open_tokens, read_header, verify_payload
from data_prep.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
TEXTS = [f"text {i} 文字 " + "word " * (i % 11) for i in range(200)]


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
        "inputs.json",
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


def test_the_number_of_workers_does_not_change_a_byte(config: PrepareConfig, tmp_path: Path):
    made = []
    for num_workers in (1, 2):
        folder = tmp_path / f"data{num_workers}"
        flags = ["--output.folder", str(folder), "--engine.num-workers", str(num_workers)]
        (tmp_path / "base.toml").write_text(config_file.to_toml(config))
        assert main([str(tmp_path / "base.toml"), *flags]) == 0
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


def test_other_input_or_settings_are_refused_until_overwriting_is_allowed(config: PrepareConfig, tmp_path: Path):
    prepare(config)
    before = contents(tmp_path / "data")
    with pytest.raises(OutputError, match=r"its configuration differs.*--output\.folder.*--output\.overwrite True"):
        prepare(config_for(tmp_path, sample_tokens=32))
    write_lines(tmp_path / "b.jsonl", ["new"])
    with pytest.raises(OutputError, match=r"the input file .*b\.jsonl is new"):
        prepare(config)
    (tmp_path / "b.jsonl").unlink()
    write_lines(tmp_path / "a.jsonl", TEXTS[:-1])
    with pytest.raises(OutputError, match=r"the input file .*a\.jsonl has changed"):
        prepare(config)
    assert contents(tmp_path / "data") == before
    manifest = prepare(config_for(tmp_path, overwrite=True))
    assert sum(record.document_count for record in manifest.shards) == len(TEXTS) - 1
    assert not list(tmp_path.glob("data.tmp*"))


def test_a_change_in_the_unread_middle_of_a_large_file_shows_in_its_time(config: PrepareConfig, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    write_lines(path, ["x" * 1000] * 3000 + TEXTS)
    prepare(config)
    with path.open("r+b") as file:
        file.seek(1_400_000)
        file.write(b"y")
    os.utime(path, ns=(1, 1))
    with pytest.raises(OutputError, match="has changed"):
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
    lines[10:10] = ["", "{"]
    path.write_text("\n".join(lines), encoding="utf-8")
    manifest = prepare(config)
    assert sum(record.document_count for record in manifest.shards) == len(TEXTS)
    listed = [json.loads(line) for line in (tmp_path / "data" / "bad_lines.jsonl").read_text().splitlines()]
    assert listed == [
        {"path": str(path), "line": 11, "reason": "blank line"},
        {"path": str(path), "line": 12, "reason": "invalid JSON"},
    ]
    assert f"2 bad lines were left out; all are listed in {tmp_path / 'data' / 'bad_lines.jsonl'}" in (
        capsys.readouterr().out
    )


def test_bad_lines_above_the_limit_stop_the_run_with_reasons_and_places(config: PrepareConfig, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "\n" * 4 + "{\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"5 of 205 lines are bad \(2\.4%\), above engine\.max_bad_fraction") as caught:
        prepare(config)
    assert f"4 x blank line, e.g. {path}:201, {path}:202, {path}:203\n" in str(caught.value)
    assert f"1 x invalid JSON, e.g. {path}:205" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_input_without_documents_is_refused(config: PrepareConfig, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="the input has no documents"):
        prepare(config)


def test_a_small_input_still_holds_out_one_text(config: PrepareConfig, tmp_path: Path):
    write_lines(tmp_path / "a.jsonl", ["one", "two", "three", "two"])
    manifest = prepare(config_for(tmp_path, validation_fraction=1e-9))
    folder = tmp_path / "data"
    train, validation = texts_of(folder, manifest, "train"), texts_of(folder, manifest, "validation")
    assert sorted(train + validation) == ["one", "three", "two", "two"]
    assert len(set(validation)) == 1
    assert not set(train) & set(validation)


def test_a_small_input_with_bad_lines_lists_them_once(config: PrepareConfig, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    prepare(config_for(tmp_path, validation_fraction=1e-9))
    assert len((tmp_path / "data" / "bad_lines.jsonl").read_text().splitlines()) == 1


def test_an_empty_split_is_refused_with_a_way_out(config: PrepareConfig, tmp_path: Path):
    with pytest.raises(InputError, match="training split is empty: all 200 documents"):
        prepare(config_for(tmp_path, validation_fraction=1 - 1e-12))
    write_lines(tmp_path / "a.jsonl", ["one", "one"])
    with pytest.raises(InputError, match=r"validation split is empty.*--output\.validation-fraction 0"):
        prepare(config)
    manifest = prepare(config_for(tmp_path, validation_fraction=0.0))
    assert {record.split for record in manifest.shards} == {"train"}


def test_a_given_tokenizer_is_copied_and_its_end_token_recorded(config: PrepareConfig, tmp_path: Path):
    first = prepare(config)
    flags = ["--input.paths", str(tmp_path / "a.jsonl"), "--output.folder", str(tmp_path / "other")]
    flags += ["--tokenizer.path", str(tmp_path / "data"), "--tokenizer.eos-token", "<|im_end|>"]
    assert main([*flags, "--engine.num-workers", "0", "--output.validation-fraction", "0.1"]) == 0
    manifest = read_manifest(tmp_path / "other")
    assert (manifest.eos_id, manifest.vocab_size) == (2, first.vocab_size)
    assert load_tokenizer(tmp_path / "other", eos_id=2).digest == manifest.tokenizer_digest
    names = ("data/tokenizer.json", "other/tokenizer.json")
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_a_failure_leaves_nothing_behind(config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(identity, "write", fail)
    with pytest.raises(OSError, match="No space"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_folder_published_by_another_run_meanwhile_is_kept(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write, times = identity.write, []

    def write_after_another_run(folder: Path, current: identity.Identity) -> None:
        monkeypatch.setattr(identity, "write", write)
        prepare(config)
        times.append((tmp_path / "data" / "manifest.json").stat().st_mtime_ns)
        write(folder, current)

    monkeypatch.setattr(identity, "write", write_after_another_run)
    prepare(config)
    assert times == [(tmp_path / "data" / "manifest.json").stat().st_mtime_ns]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


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
    text = "".join(texts_of(tmp_path / "data", manifest, "train"))
    assert 200_000 < len(text) < 300_000
    assert "import" in text


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    # Not a zombie: in a container nobody may collect the orphans.
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def start_and_signal(config: PrepareConfig, folder: Path, number: signal.Signals) -> tuple[int, str, list[int]]:
    """Exit code, errors and workers of a long run that its process group ends with a signal (SIGKILL: only itself)."""
    write_lines(folder / "a.jsonl", [f"{i} " + "many different words in a long text " * 400 for i in range(2000)])
    (folder / "run.toml").write_text(config_file.to_toml(config))
    command = [sys.executable, "-m", "data_prep.pipeline", str(folder / "run.toml"), "--engine.num-workers", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True, text=True
    ) as process:
        while len(workers := children(process.pid)) < 3 and process.poll() is None:  # two, and a tracker of resources
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(number) if number == signal.SIGKILL else os.killpg(process.pid, number)
        errors = process.communicate()[1]
    return process.returncode, errors, workers


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupted_run_says_so_and_leaves_nothing(config: PrepareConfig, tmp_path: Path):
    exit_code, errors, workers = start_and_signal(config, tmp_path, signal.SIGINT)
    assert (exit_code, errors.splitlines()[-1]) == (130, "error: interrupted; nothing was written")
    assert not any(is_running(worker) for worker in workers[1:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "run.toml"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_run_leaves_no_workers_and_the_next_run_cleans_up(config: PrepareConfig, tmp_path: Path):
    exit_code, _, workers = start_and_signal(config, tmp_path, signal.SIGKILL)
    assert exit_code == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    (leftover,) = tmp_path.glob("data.tmp*")
    deadline_s = time.monotonic() + 20
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(is_running(worker) for worker in workers)
    assert publish.remove_leftovers(tmp_path, "data") == [leftover]

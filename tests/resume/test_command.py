"""`python -m resume` as users meet it: figures that add up, refusals that change nothing, findings by name."""

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_prep import checksums
from data_prep.manifest import Manifest, record_shard, write_manifest
from data_prep.shards import ShardWriter
from resume import __main__ as command
from resume import requests
from resume.runs import open_run
from resume.verify import LEVELS
from tests.prepared import rot, texts_about, tokenizer, write_data
from tests.runs import tiny_run
from tests.trained import Sample, file_ids, pretrain_in_process, resume, samples_in, total, trained
from train.config import RunConfig

OK, USAGE, BAD_DATA, CANNOT_WRITE, BAD_REQUEST = 0, 2, 65, 73, 78
COMMANDS = ("status", "plan", "append", "remove", "skip", "requeue", "reweight", "audit", "verify")

Steps = dict[int, collections.Counter[Sample]]


# A small world, which is only read: data folders, shards that do not belong, and two runs


def recording(run: Path, *folders: Path, num_steps: int, **data: Any) -> RunConfig:
    """A tiny run over data folders that writes down what it trains."""
    data = {"record_samples": True, "paths": tuple(map(str, folders)), "micro_batch_sequences": 12, **data}
    return tiny_run(folders[0], run, data=data, run={"num_steps": num_steps, "validate_every": 1_000})


def succeeds(config: RunConfig) -> None:
    code, output = pretrain_in_process(config)
    assert code == OK, output


def shelf(root: Path) -> None:
    """Shards and folders that a run must not be given."""
    for name, original in (
        ("copy.bin", "data/train/test-00000.bin"),
        ("copy of more.bin", "more/train/test-00000.bin"),
        ("cut.bin", "more/train/test-00000.bin"),
        ("rotten.bin", "more/train/test-00000.bin"),
        ("held out.bin", "data/validation/test-00000.bin"),
    ):
        shutil.copy(root / original, root / name)
    os.truncate(root / "cut.bin", 5_000)
    rot(root / "rotten.bin", 300)
    (root / "text.bin").write_text("hello")
    (root / "empty").mkdir()
    shutil.copytree(root / "data", root / "doubled")
    shutil.copytree(root / "more", root / "cut")
    os.truncate(root / "cut" / "train" / "test-00001.bin", 5_000)
    wide_folder(root / "wide")


def wide_folder(folder: Path) -> None:
    """A data folder of 32-bit tokens that claims to be of the same tokenizer."""
    made = tokenizer()
    ids = {"tokenizer_digest": made.digest, "eos_id": made.eos_id}
    with ShardWriter(folder / "train", "wide", vocab_size=70_000, shard_tokens=1_000, **ids) as writer:
        writer.add(np.arange(10, 200))
    shards = [record_shard(folder, path, header, source="test", sample_tokens=32) for path, header in writer.close()]
    listed = {"tokenizer_file": "tokenizer.json", "vocab_size": 70_000, "sample_tokens": 32, "shards": tuple(shards)}
    write_manifest(folder, Manifest(**listed, **ids))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's folder, whose name asks for care.

    `run` has one source and has trained 6 steps of 12 samples, most of an epoch; `mixed` has two, and 10 steps.
    """
    root = tmp_path_factory.mktemp("Läufe & 'Proben'")
    write_data(root / "data", checksum_tokens=32)
    write_data(root / "more", texts=texts_about("more", 40))
    write_data(root / "books", texts=texts_about("books", 40), source="books")
    write_data(root / "other", texts=texts_about("other", 40), vocab_size=270)
    code = write_data(root / "code", texts=texts_about("code", 50), source="code")
    web = write_data(root / "web", texts=texts_about("web", 80), source="web")
    shelf(root)
    succeeds(recording(root / "run", root / "data", num_steps=6))
    succeeds(recording(root / "mixed", code, web, num_steps=10, mixture=("code=0.5 web=0.5",)))
    return root


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Path:
    """A copy of `run` that may be changed."""
    return shutil.copytree(root / "run", tmp_path / "run")


@pytest.fixture
def mixed(root: Path, tmp_path: Path) -> Path:
    """A copy of `mixed` that may be changed."""
    return shutil.copytree(root / "mixed", tmp_path / "mixed")


def shown(*arguments: object) -> str:
    code, output = resume(*arguments)
    assert code == OK, output
    return output


def values(*arguments: object) -> dict[str, Any]:
    return json.loads(shown(*arguments, "--json"))


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w/-])\d[\d,]*(?:\.\d+)?", text)]


def row(table: str, *cells: str) -> str:
    """The one line of a table that has these cells, in this order, without the first one."""
    fitting = [line for line in table.splitlines() if re.match(r"\s*" + r"\s.*?".join(map(re.escape, cells)), line)]
    assert len(fitting) == 1, (cells, table)
    return fitting[0].strip().removeprefix(cells[0])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def targets_in(file_id: str) -> int:
    return (int(file_id.rsplit("-", 1)[1]) - 4096) // 2 - 1


def by_source(root: Path, counts: collections.Counter[Sample], *names: str) -> dict[str, int]:
    """Samples trained of each of the data folders of these names."""
    return {name: sum(counts[sample] for sample in samples_in(root / name)) for name in names}


def steps_of(steps: Steps, sample: Sample) -> list[int]:
    return [step for step, samples in steps.items() for _ in range(samples[sample])]


# status


@pytest.mark.parametrize(("name", "folders"), [("run", {"all": "data"}), ("mixed", {"code": "code", "web": "web"})])
def test_status_says_what_the_ranks_wrote_down(root: Path, name: str, folders: dict[str, str]):
    steps, status = trained(root / name), values("status", root / name)
    counts = total(steps)
    assert (status["run"], status["checkpoint"]) == (str(root / name), f"step-{max(steps)}")
    assert (status["step"], status["num_steps"]) == (max(steps), max(steps))
    assert (status["sample"], status["batch_sequences"]) == (12 * max(steps), 12)
    seen = sum(n * min(s.length, targets_in(s.file_id) - s.first) for s, n in counts.items())
    assert status["tokens_seen"] == seen
    assert status["pending"] == status["quarantined"] == []
    drawn = by_source(root, counts, *folders.values())
    assert [source["source"] for source in status["sources"]] == sorted(folders)
    for source in status["sources"]:
        folder = folders[source["source"]]
        ids, samples = file_ids(root / folder), samples_in(root / folder)
        assert (source["files"], source["removed_files"]) == (len(ids), 0)
        assert (source["tokens"], source["groups"]) == (sum(map(targets_in, ids)), len(samples))
        assert source["drawn_groups"] == drawn[folder]
        assert source["epochs"] == pytest.approx(drawn[folder] / len(samples))
        assert source["share"] == 1 / len(folders)


@pytest.mark.parametrize("name", ["run", "mixed"])
def test_the_table_of_status_has_the_figures_of_its_json(root: Path, name: str):
    status, table = values("status", root / name), shown("status", root / name)
    for figure in (f"step {status['step']} of {status['num_steps']}", f"{status['tokens_seen']:,} tokens"):
        assert figure in table.splitlines()[0]
    assert f"next is sample {status['sample']} (12 samples of 32 tokens a step)" in table
    for source in status["sources"]:
        expected = [source[field] for field in ("files", "removed_files", "tokens", "groups")]
        expected += [100 * source["share"], source["drawn_groups"], source["epochs"]]
        assert numbers(row(table, source["source"])) == pytest.approx(expected, abs=0.001)
    for event in status["events"]:
        assert numbers(row(table, event["kind"], event["what"]))[:2] == [event["step"], event["tokens"]]


# From a request to an event


def test_what_is_asked_for_waits_in_status_and_is_an_event_once_the_run_has_gone_on(
    root: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shard = tmp_path / "ein Band, größer.bin"
    shutil.copy(root / "books" / "train" / "books-00000.bin", shard)
    shutil.copytree(root / "more", tmp_path / "more")
    monkeypatch.chdir(tmp_path)
    gone = file_ids(root / "code")[1]
    asked: list[tuple[tuple[object, ...], str]] = [
        (("append", mixed, "more", "--source", "web"), "append of files: 4 of web"),
        (
            ("append", mixed, shard.name, "--source", "books", "--weights", "web=2 code=1 books=1"),
            "append of files: 1 of books, weights web=2 code=1 books=1",
        ),
        (("remove", mixed, gone, root / "web" / "train" / "web-00003.bin"), "removal of 2 files"),
        (("skip", mixed, "--steps", 2), "skip of 2 steps"),
        (("skip", mixed, "--steps", 1, "--for-good"), "skip of 1 steps for good"),
        (("requeue", mixed), "return of what was skipped"),
        (("reweight", mixed, "books=0, code=1, web=1"), "weights books=0 code=1 web=1"),
        (("reweight", mixed, "web=1 code=1 books=1", "--from-tokens", "2e4"), "weights web=1 code=1 books=1 from"),
    ]
    before = contents(mixed)
    for number, (arguments, what) in enumerate(asked, 1):
        output = shown(*arguments)
        assert output.startswith(f"request {number}: {what}")
        assert f"{mixed} takes it up when it starts again, or at its next checkpoint" in output
    assert contents(mixed).items() >= before.items()  # only requests are written
    assert {p.parent for p in contents(mixed).keys() - before.keys()} == {mixed / "requests"}

    status, table = values("status", mixed), shown("status", mixed)
    assert [(entry["number"], entry["what"]) for entry in status["pending"]] == [
        (number, requests.describe(request)) for number, request in requests.pending(mixed, 0)
    ]
    for (number, entry), (_, what) in zip(enumerate(status["pending"], 1), asked, strict=True):
        assert f"request {number} waits for the run: {entry['what']}\n" in table + "\n"
        assert entry["what"].startswith(what)
    plan = values("plan", mixed)
    assert plan["will_be_refused"] == []
    files = {"books": (1, 0), "code": (5, 1), "web": (12, 1)}
    assert {s["source"]: (s["files"], s["removed_files"]) for s in plan["sources_at_end"]} == files

    succeeds(recording(mixed, root / "code", root / "web", num_steps=12, mixture=("code=0.5 web=0.5",)))
    status, table = values("status", mixed), shown("status", mixed)
    assert status["pending"] == []
    assert "waits for the run" not in table
    kinds = ["batch", "reweight", "append", "append", "append", "reweight", "remove", "skip", "skip", "requeue"]
    assert [event["kind"] for event in status["events"]] == [*kinds, "reweight", "reweight"]
    assert {event["step"] for event in status["events"][3:]} == {10}
    assert status["events"][-1]["tokens"] == 20_000
    assert status["skipped_samples"] == 36
    assert ", 36 before it were skipped" in table
    assert status["sample"] == 12 * 12 + 36
    assert {s["source"]: (s["files"], s["removed_files"]) for s in status["sources"]} == files
    history = values("audit", mixed, shard.name)["files"][0]  # relative when it was appended, absolute in the run
    assert history["path"] == str(shard)
    assert values("audit", mixed)["agree"]
    assert values("verify", mixed)["findings"] == []


def test_shards_that_are_given_twice_or_known_already_are_appended_once_and_counted(root: Path, run: Path):
    shard = root / "more" / "train" / "test-00000.bin"
    assert shown("append", run, shard, shard).splitlines()[0] == "request 1: append of files: 1 of all; 640 tokens"
    rest = sum(map(targets_in, file_ids(root / "more")[1:]))
    assert f"3 of test; {rest:,} tokens; 1 others are part of the run already" in shown("append", run, root / "more")
    ids = [i for _, request in requests.pending(run, 0) for files in request["files"].values() for i in files]
    assert sorted(ids) == sorted(file_ids(root / "more"))


def test_a_return_of_what_was_skipped_where_nothing_was_changes_nothing(run: Path):
    before = values("plan", run, "--steps", 30)
    shown("requeue", run)
    assert values("plan", run, "--steps", 30) == before


def test_a_file_goes_by_path_name_identity_its_beginning_or_content(root: Path, run: Path, tmp_path: Path):
    ids = file_ids(root / "data")
    moved = shutil.copy(root / "data" / "train" / "test-00004.bin", tmp_path / "renamed.bin")
    names = (root / "data/train/test-00000.bin", "test-00001.bin", ids[2], ids[3][:6], moved)
    for number, name in enumerate(names, 1):
        one_fewer = f"removal of 1 files; {targets_in(ids[number - 1])} tokens an epoch fewer"
        assert shown("remove", run, name, name).startswith(f"request {number}: {one_fewer}")
    assert [request["file_ids"] for _, request in requests.pending(run, 0)] == [[i] for i in ids]
    plan = values("plan", run)
    assert plan["sources_at_end"][0]["removed_files"] == 5
    assert [(c["what"], c["step"]) for c in plan["coming"]] == [("is exhausted", 7)]


def test_a_name_that_fits_several_files_is_refused_and_two_of_them_named(root: Path, run: Path):
    shown("append", run, root / "more")
    twins = [str(root / name / "train" / "test-00000.bin") for name in ("data", "more")]
    code, output = resume("remove", run, "test-00000.bin")
    assert code == BAD_REQUEST
    assert f"test-00000.bin: fits 2 files of the run, as {' and '.join(twins)}; give more" in output
    shown("remove", run, "more/train/test-00000.bin")


def test_a_removed_file_cannot_be_appended_again(root: Path, run: Path):
    shard = root / "data" / "train" / "test-00002.bin"
    shown("remove", run, shard)
    code, output = resume("append", run, shard)
    assert code == BAD_REQUEST
    assert f"{shard}: removed from the run; what was removed cannot come back" in output
    code, output = resume("remove", run, shard)
    assert code == BAD_REQUEST
    assert "is removed already" in output


def test_requests_that_cannot_be_written_are_an_error_of_writing(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "requests").write_text("")
    assert refused(capsys, "requeue", run) == (CANNOT_WRITE, f"error: {run}/requests: File exists\n")


# plan


def epochs_begin(steps: Steps, samples: set[Sample]) -> dict[int, int]:
    """When epochs 1, 2, ... begin: in that step a sample of the source is trained a second, third, ... time."""
    begins: dict[int, int] = {}
    counts: collections.Counter[Sample] = collections.Counter()
    for step, trained_now in steps.items():
        counts.update({sample: n for sample, n in trained_now.items() if sample in samples})
        begins.setdefault(max(counts.values(), default=0) - 1, step)
    return {epoch: step for epoch, step in begins.items() if epoch > 0}


def test_a_plan_of_a_mixture_says_what_then_happens(root: Path, mixed: Path):
    plan, table = values("plan", mixed, "--steps", 60), shown("plan", mixed, "--steps", 60)
    succeeds(recording(mixed, root / "code", root / "web", num_steps=60, mixture=("code=0.5 web=0.5",)))
    steps = trained(mixed)
    happened = {
        (source, f"begins epoch {epoch}"): step
        for source in ("code", "web")
        for epoch, step in epochs_begin(steps, samples_in(root / source)).items()
        if step > 10
    }
    assert len(happened) >= 5
    within = [entry for entry in plan["coming"] if entry["is_within_run"]]
    assert {(entry["source"], entry["what"]): entry["step"] for entry in within} == happened
    assert [entry["tokens"] for entry in plan["coming"]] == sorted(entry["tokens"] for entry in plan["coming"])
    for entry in within:
        assert 12 * 32 * (entry["step"] - 1) <= entry["tokens"] < 12 * 32 * entry["step"]
    # Behind the run's end, of each source the next epoch alone.
    behind = [entry for entry in plan["coming"] if not entry["is_within_run"]]
    assert sorted(entry["source"] for entry in behind) == ["code", "web"]
    assert all(entry["step"] > 60 for entry in behind)
    drawn = by_source(root, total(steps), "code", "web")
    assert {entry["source"]: entry["drawn_groups"] for entry in plan["sources_at_end"]} == drawn
    assert plan["data_ends_after_step"] is None

    assert table.startswith("from step 10 to 60, ")
    lines = table.splitlines()
    coming = [line for line in lines if "begins epoch" in line]
    for line, entry in zip(coming, plan["coming"], strict=True):
        assert numbers(line)[:2] == [entry["step"], entry["tokens"]]
        where = "" if entry["is_within_run"] else ", after the run"
        assert line.endswith(f"{entry['source']:6}  {entry['what']}{where}")
    for source, n in drawn.items():
        assert n in numbers(row("\n".join(lines[:5]), source))


def test_a_plan_says_when_each_source_runs_out_and_where_the_data_ends(root: Path, tmp_path: Path):
    run = tmp_path / "run"
    ends = {"mixture": ("code=0.5 web=0.5",), "max_epochs": ("code=2", "web=1")}
    succeeds(recording(run, root / "code", root / "web", num_steps=1, **ends))
    plan, table = values("plan", run, "--steps", 100), shown("plan", run, "--steps", 100)
    succeeds(recording(run, root / "code", root / "web", num_steps=100, **ends))
    steps, code, web = trained(run), samples_in(root / "code"), samples_in(root / "web")
    num_samples = 2 * len(code) + len(web)
    last = -(-num_samples // 12)
    assert max(steps) == plan["data_ends_after_step"] == last
    whats = [("code", "begins epoch 1"), ("web", "is exhausted"), ("code", "is exhausted")]
    assert [(entry["source"], entry["what"]) for entry in plan["coming"]] == whats
    begins, web_ends, all_ends = plan["coming"]
    assert {1: begins["step"]} == epochs_begin(steps, code)
    # From its first draw that it cannot make, the others take over a source's share.
    last_of_web = max(step for step, samples in steps.items() if samples.keys() & web)
    assert last_of_web <= web_ends["step"] <= last_of_web + 1
    assert all_ends["tokens"] == 32 * num_samples
    assert [entry["epochs"] for entry in plan["sources_at_end"]] == [2, 1]
    assert f"THE DATA ENDS after step {last}, before the run does" in table
    told = [line for line in table.splitlines() if "epoch 1" in line or "exhausted" in line]
    assert [numbers(line)[0] for line in told] == [entry["step"] for entry in plan["coming"]]


def test_a_plan_reckons_with_what_waits_and_says_what_of_it_will_be_refused(root: Path, run: Path):
    (before,) = values("plan", run)["coming"]
    shown("append", run, root / "more")
    (after,) = values("plan", run)["coming"]
    assert after["tokens"] - before["tokens"] == 32 * len(samples_in(root / "more"))
    (_, again) = requests.pending(run, 0)[0]
    requests.queue(run, again)
    plan = values("plan", run)
    assert plan["coming"] == [after]
    (told,) = plan["will_be_refused"]
    assert told.startswith("request 2: file ")
    assert "is part of the run already" in told
    assert shown("plan", run).splitlines()[-1] == f"will be refused: {told}"


def test_a_long_plan_is_cut_in_the_middle_and_json_has_all_of_it(root: Path):
    plan, table = values("plan", root / "run", "--steps", 500), shown("plan", root / "run", "--steps", 500)
    told = [int(epoch) for epoch in re.findall(r"begins epoch (\d+)", table)]
    num = len(plan["coming"])
    assert [entry["what"] for entry in plan["coming"]] == [f"begins epoch {i + 1}" for i in range(num)]
    assert f"... {num - 40} more: --json" in table
    assert told == [*range(1, 21), *range(num - 19, num + 1)]


# audit


def test_the_books_of_each_file_add_up_to_what_the_ranks_wrote_down(root: Path):
    for name, folders in (("run", ["data"]), ("mixed", ["code", "web"])):
        counts = total(trained(root / name))
        expected: collections.Counter[str] = collections.Counter()
        for sample, times in counts.items():
            expected[sample.file_id] += times
        audit, table = values("audit", root / name), shown("audit", root / name)
        assert audit["agree"]
        assert {row["file_id"] for row in audit["files"]} == {i for f in folders for i in file_ids(root / f)}
        for entry in audit["files"]:
            booked, num_samples = expected[entry["file_id"]], -(-targets_in(entry["file_id"]) // 32)
            assert entry["booked"] == entry["computed"] == booked
            assert (entry["num_samples"], entry["quarantined"], entry["agrees"]) == (num_samples, 0, True)
            line = row(table, "/".join(Path(entry["path"]).parts[-3:]), entry["source"])
            assert numbers(line) == [num_samples, booked, booked, 0]
            assert line.endswith("yes")
        assert f"{counts.total()} samples trained; the books and the order agree, file by file" in table


def test_the_history_of_a_file_names_its_samples_and_their_steps(root: Path):
    steps = trained(root / "run")
    for file_id, name in zip(file_ids(root / "data"), sorted((root / "data/train").glob("*.bin")), strict=True):
        of_file = {s.first // 32: step for step, samples in steps.items() for s in samples if s.file_id == file_id}
        table = shown("audit", root / "run", name)
        assert table.startswith(f"{name} ({file_id})\n")
        assert f"{len(of_file)} samples trained by the books, as the order says" in table
        told = re.search(r"epoch 0: (\d+) samples of 32 tokens trained at steps (\d+) to (\d+): ([\d -]+)\n", table)
        assert told is not None
        assert [int(n) for n in told.groups()[:3]] == [len(of_file), min(of_file.values()), max(of_file.values())]
        assert set(from_ranges(told[4])) == set(of_file)
        assert f"epoch 0: of its samples {-(-targets_in(file_id) // 32) - len(of_file)} waiting" in table


def from_ranges(text: str) -> Iterator[int]:
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def test_the_history_of_a_sample_names_the_step_of_each_epoch(root: Path):
    run, steps = root / "mixed", trained(root / "mixed")
    found = 0
    for source in ("code", "web"):
        file_id = file_ids(root / source)[0]
        for number in range(20):
            expected = steps_of(steps, Sample(file_id, 32 * number, 32))
            (history,) = values("audit", run, file_id, "--sample", number)["files"]
            assert (history["first_token"], history["last_token"]) == (32 * number, 32 * number + 32)
            epochs = history["epochs"]
            assert [part["step"] for epoch in epochs for part in epoch["trained"]] == expected
            told = [f"epoch {i}: trained at step {step}" for i, step in enumerate(expected)]
            if not expected:
                told = ["epoch 0: waits"]
            assert shown("audit", run, file_id, "--sample", number).splitlines()[3:] == told
            found += len(expected)
    assert found > 20


def test_a_bitmap_counts_how_often_each_sample_was_trained(root: Path, tmp_path: Path):
    run, counts = root / "mixed", total(trained(root / "mixed"))
    ids = [i for name in ("code", "web") for i in file_ids(root / name)]
    for arguments, chosen in (([], ids), (ids[2:4], ids[2:4])):
        out = tmp_path / "how often.npz"
        written = values("audit", run, *arguments, "--bitmap", out)
        assert (written["bitmap"], sorted(written["files"])) == (str(out), sorted(chosen))
        with np.load(out) as bitmaps:
            assert set(bitmaps.files) == set(chosen)
            for file_id in chosen:
                firsts = range(0, targets_in(file_id), 32)
                assert bitmaps[file_id].tolist() == [counts[Sample(file_id, first, 32)] for first in firsts]
    assert shown("audit", run, "--bitmap", out).startswith(f"{out}: how often each sample of 13 files was trained")


def rebook(run: Path, change: Callable[[dict[str, Any]], None], with_hash: bool = True) -> None:
    """Forges the books of the newest checkpoint."""
    path = open_run(run).checkpoint / "record.json"
    record = json.loads(path.read_text())
    old = record.pop("xxh3_128")
    change(record["trained"])
    new = xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())
    path.write_text(json.dumps({"xxh3_128": new if with_hash else old, **record}))


def forge(trained_record: dict[str, Any]) -> None:
    """A sample too many in the second file, another sample in the fourth."""
    trained_record["counts"][1] += 1
    digest = trained_record["digests"][3]
    trained_record["digests"][3] = f"{int(digest, 16) ^ 1:016x}"


def test_forged_books_are_found_and_their_files_named(run: Path):
    rebook(run, forge)
    ids = open_run(run).order.file_ids
    code, output = resume("audit", run, "--json")
    assert code == BAD_DATA
    audit = json.loads(output)
    assert not audit["agree"]
    assert [entry["file_id"] for entry in audit["files"] if not entry["agrees"]] == [ids[1], ids[3]]
    code, table = resume("audit", run)
    assert code == BAD_DATA
    assert "in 2 of 5 files the books and the order differ" in table
    paths = {entry["file_id"]: Path(entry["path"]).name for entry in audit["files"]}
    assert sorted(re.findall(r"(test-\d+\.bin).* NO$", table, re.MULTILINE)) == sorted([paths[ids[1]], paths[ids[3]]])
    for i, file_id in enumerate(ids):
        for flags in ([], ["--sample", 0]):
            code, output = resume("audit", run, file_id, *flags)
            assert code == (BAD_DATA if i in (1, 3) else OK)
            assert ("BUT THE ORDER DIFFERS" in output) == (i in (1, 3))


def test_books_forged_without_their_hash_are_refused_by_every_command(run: Path, capsys: pytest.CaptureFixture[str]):
    rebook(run, forge, with_hash=False)
    code, output = resume("verify", run)
    assert (code, "step-6/record.json: damaged, its hash does not match" in output) == (BAD_DATA, True)
    for arguments in (["status"], ["plan"], ["audit"], ["requeue"]):
        code, error = refused(capsys, *arguments, run)
        assert code == BAD_DATA
        assert f"{run}/step-6/record.json: damaged, its hash does not match; restore the file" in error
    assert not (run / "requests").exists()


# verify


@pytest.mark.parametrize("level", LEVELS)
def test_files_and_checkpoints_of_a_sound_run_are_good(root: Path, level: str):
    for name, num_files, num_checkpoints in (("run", 5, 2), ("mixed", 13, 4)):
        flags = ("verify", root / name, "--level", level)
        counts = f"{num_files} files ({level}) and {num_checkpoints} checkpoints"
        assert shown(*flags) == f"{counts} are good\n"
        found = {"files": num_files, "checkpoints": num_checkpoints, "findings": []}
        assert values(*flags) == {"level": level, **found}


def test_every_bad_file_is_named_with_a_remedy_and_a_moved_one_is_found(root: Path, tmp_path: Path):
    run, data = tmp_path / "run", write_data(tmp_path / "data", checksum_tokens=32)
    succeeds(recording(run, data, num_steps=1))
    away, cut, rotten, replaced, moved = sorted((data / "train").glob("*.bin"))
    lost = file_ids(data)[0]
    away.rename(tmp_path / "away.bin")
    os.truncate(cut, 5_000)
    rot(rotten, 100)
    shutil.copy(root / "more" / "train" / "test-00000.bin", replaced)
    (data / "deep").mkdir()
    moved.rename(data / "deep" / "renamed.bin")

    out = f"or take it out with `python -m resume remove {run} {lost[:12]}`"
    remedies = {
        away: f"{away} ({lost}): missing; restore it, .*--data.search FOLDER, {out}",
        cut: f"{cut}: 5000 bytes, its 641 tokens make 5378; .* restore it",
        rotten: f"{rotten}: fingerprint .*The file changed after it was prepared; restore it",
        replaced: f"{replaced}: fingerprint .*The file changed after it was prepared; restore it",
    }
    for level in LEVELS:
        code, output = resume("verify", run, "--level", level)
        assert code == BAD_DATA
        *told, verdict = output.splitlines()
        # Nothing of a file's looks has changed where it rotted: that is what the closer levels are for.
        bad = [path for path in remedies if level != "stat" or path != rotten]
        assert verdict == f"{len(told)} findings in 5 files ({level}) and 1 checkpoints"
        which = f"{rotten}: samples 3 differ from their checksums"
        assert told.count(which) == (level == "full")
        findings = [line for line in told if line != which]
        assert len(findings) == len(bad)
        for path in bad:
            (line,) = (line for line in findings if line.startswith(str(path)))
            assert re.match(as_pattern(remedies[path]), line)
        code, output = resume("verify", run, "--level", level, "--json")
        assert code == BAD_DATA
        assert json.loads(output)["findings"] == told


def as_pattern(text: str) -> str:
    return ".*".join(map(re.escape, text.split(".*")))


def test_a_flipped_bit_far_inside_a_shard_is_found_by_full_alone_and_its_sample_by_the_checksums(tmp_path: Path):
    run, data = tmp_path / "run", write_data(tmp_path / "data")
    made = tokenizer()
    options = {"vocab_size": made.vocab_size, "tokenizer_digest": made.digest, "eos_id": made.eos_id}
    with ShardWriter(tmp_path / "large", "large", shard_tokens=1_500_000, **options) as writer:
        writer.add(np.full(1_200_000, made.eos_id + 1))
    ((shard, _),) = writer.close()
    checksums.write_checksums(shard, 32)
    succeeds(recording(run, data, num_steps=1))
    shown("append", run, shard)
    succeeds(recording(run, data, num_steps=2))
    rot(shard, 600_000)
    for level in ("stat", "headtail"):
        assert shown("verify", run, "--level", level) == f"6 files ({level}) and 2 checkpoints are good\n"
    code, output = resume("verify", run)
    assert code == BAD_DATA
    payload, sample, verdict = output.splitlines()
    assert payload.startswith(f"{shard}: the payload's xxh3 is ")
    assert payload.endswith("copy the file again or prepare the data anew")
    # Token 600,000 is the last target of one sample and the context of the next.
    assert sample == f"{shard}: samples 18749-18750 differ from their checksums"
    assert verdict == "2 findings in 6 files (full) and 2 checkpoints"


def test_damaged_checksums_are_found_and_made_anew_as_the_finding_says(tmp_path: Path):
    run, data = tmp_path / "run", write_data(tmp_path / "data", checksum_tokens=32)
    succeeds(recording(run, data, num_steps=1))
    bad = [data / "train" / f"test-0000{i}.xxh3" for i in (1, 3)]
    content = bytearray(bad[0].read_bytes())
    content[-1] ^= 1
    bad[0].write_bytes(content)
    os.truncate(bad[1], 70)
    code, output = resume("verify", run, "--level", "headtail")
    assert (code, output.splitlines()[0].split(": ")[0]) == (BAD_DATA, str(bad[1]))
    assert "1 findings in 5 files (headtail)" in output
    code, output = resume("verify", run)
    assert code == BAD_DATA
    *findings, _ = output.splitlines()
    remedy = f"make it anew with: python -m data_prep checksums {data}"
    assert sorted(line.split(": ")[0] for line in findings) == [str(path) for path in bad]
    assert all(line.endswith(remedy) for line in findings)
    assert checksums.main([str(data)]) == OK
    assert shown("verify", run) == "5 files (full) and 1 checkpoints are good\n"


def test_every_damaged_checkpoint_is_named(run: Path):
    flipped, missing = (run / f"step-{step}" / "rank-00000.safetensors" for step in (3, 6))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    code, output = resume("verify", run, "--level", "stat")
    assert code == BAD_DATA
    remedy = "restore the file, or move its folder away to resume from an older step"
    first, second, verdict = output.splitlines()
    assert first.startswith(f"{flipped}: ")
    assert first.endswith(f"The file is damaged; {remedy}")
    assert second == f"{missing}: missing; {remedy}"
    assert verdict == "2 findings in 5 files (stat) and 2 checkpoints"


def test_checkpoints_are_checked_though_the_newest_one_cannot_be_read(run: Path):
    """Which shards the run has stands in it, but what is left of the others is what one wants to know then."""
    older, record = run / "step-3" / "rank-00000.safetensors", run / "step-6" / "record.json"
    older.unlink()
    record.write_bytes(record.read_bytes()[:100])
    code, output = resume("verify", run, "--level", "stat")
    assert code == BAD_DATA
    first, second, third, verdict = output.splitlines()
    assert first.startswith(f"{older}: missing; ")
    assert second.startswith(f"{record}: unreadable ")
    assert third == f"{run}: the shards are not checked, as the newest checkpoint cannot be read"
    assert verdict == "3 findings in 0 files (stat) and 2 checkpoints"


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    capsys.readouterr()
    code = command.main([str(argument) for argument in arguments])
    output, error = capsys.readouterr()
    assert output == ""
    assert re.fullmatch("error: [^\n]+\n", error)
    return code, error


def words(root: Path, line: str) -> list[str]:
    """A command line, in which ROOT is the world's folder."""
    return [word.replace("ROOT", str(root)) for word in shlex.split(line)]


def refused_without_a_trace(
    root: Path, capsys: pytest.CaptureFixture[str], line: str, expected: int, message: str
) -> None:
    """Refuses a command line with such a message (... is anything), and leaves every run as it was."""
    before = {name: contents(root / name) for name in ("run", "mixed", "empty")}
    code, error = refused(capsys, *words(root, line))
    assert re.search(re.escape(message.replace("ROOT", str(root))).replace(r"\.\.\.", ".*"), error), error
    assert code == expected
    assert {name: contents(root / name) for name in before} == before


MORE, NO_MANIFEST = "ROOT/more/train/test-00000.bin", "the folder has no manifest.json; prepare the data first"
TWIN = "ROOT/copy.bin has the content of ROOT/data/train/test-00000.bin; leave one of them out"
AGAIN = "every shard is part of the run already, or waits to be"
CUT_SHORT = "the file has 5,000 bytes, its header promises 5,378 ... cut short or overwritten; copy it again"
HELD_OUT = "ROOT/data/validation/test-00000.bin (validation) has the content of"
WIDE = "ROOT/wide/train/wide-00000.bin: tokens of uint32, the run's have 2 bytes each"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("run ROOT/copy.bin", BAD_DATA, TWIN),
        ("run ROOT/more ROOT/copy.bin", BAD_DATA, TWIN),
        ("run ROOT/doubled", BAD_DATA, "ROOT/doubled/train/... has the content of ROOT/data/train/...; leave one"),
        ("run ROOT/data", BAD_REQUEST, f"ROOT/data: {AGAIN}"),
        ("run ROOT/data/train/test-00001.bin", BAD_REQUEST, f"ROOT/data/train/test-00001.bin: {AGAIN}"),
        (f"run {MORE} 'ROOT/copy of more.bin'", BAD_DATA, f"ROOT/copy of more.bin has the content of {MORE}"),
        ("run ROOT/more 'ROOT/copy of more.bin'", BAD_DATA, f"ROOT/copy of more.bin has the content of {MORE}"),
        ("run ROOT/cut.bin", BAD_DATA, f"ROOT/cut.bin: {CUT_SHORT}"),
        ("run ROOT/cut", BAD_DATA, "ROOT/cut/train/test-00001.bin: 5000 bytes, ... truncated or replaced: restore it"),
        ("run ROOT/rotten.bin", BAD_DATA, "ROOT/rotten.bin: the payload's xxh3 is ... copy the file again"),
        ("run ROOT/wide/train/wide-00000.bin", BAD_DATA, WIDE),
        ("run ROOT/wide", BAD_DATA, WIDE),
        ("run ROOT/other", BAD_DATA, "ROOT/other: tokenizer_digest is ..., that of ROOT/data is ...; encode the text"),
        (
            "run ROOT/other/train/test-00000.bin",
            BAD_DATA,
            "ROOT/other/train/test-00000.bin: written with tokenizer ...; encode the text again with one tokenizer",
        ),
        ("run 'ROOT/held out.bin'", BAD_DATA, f"{HELD_OUT} ROOT/held out.bin (train); remove one"),
        ("run ROOT/nowhere", BAD_DATA, "ROOT/nowhere: cannot read the shard (No such file or directory)"),
        ("mixed ROOT/nowhere", BAD_DATA, "ROOT/nowhere: cannot read the shard (No such file or directory)"),
        ("run ROOT/text.bin", BAD_DATA, "ROOT/text.bin: not a shard, it starts with b'hello'"),
        ("run ROOT/empty", BAD_DATA, f"ROOT/empty: {NO_MANIFEST}"),
        ("run ROOT/more --weights all=1", BAD_REQUEST, "it has no mixture to change"),
        ("mixed ROOT/books", BAD_REQUEST, 'give all of them one, as in --weights "books=0.5 code=0.5 web=0.5"'),
        ("mixed ROOT/more --source web --weights web=1", BAD_REQUEST, 'as in "code=0 web=1"'),
        ("mixed ROOT/more --source web --weights web", BAD_REQUEST, "'web' in mixture 'web': expected source=weight"),
        (f"mixed {MORE}", BAD_REQUEST, f"{MORE}: say with --source which source ...; the run has code, web"),
        (f"mixed {MORE} --source books", BAD_REQUEST, "books: no weight in the mixture of code, web"),
    ],
)
def test_what_cannot_be_appended_is_refused_in_one_line_and_leaves_no_trace(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: str, code: int, message: str
):
    refused_without_a_trace(root, capsys, f"append ROOT/{arguments}", code, message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("remove ROOT/run nothing.bin", "nothing.bin: no file of the run; give a path, a file name, or an identity"),
        ("remove ROOT/run ROOT/nowhere.bin", "ROOT/nowhere.bin: no file of the run"),
        ("remove ROOT/run test-00000.bin est-00001.bin", "est-00001.bin: no file of the run"),
        ("remove ROOT/run 'ROOT/held out.bin'", "held out.bin: no file of the run"),
        ("remove ROOT/run ''", "no file of the run"),
        ("skip ROOT/run --steps 0", "cannot skip 0 steps of 12 samples"),
        ("skip ROOT/run --steps -3", "cannot skip -3 steps of 12 samples"),
        ("skip ROOT/run --steps 9", "--steps 9: the whole data is 8 steps; skip no more than that"),
        (f"skip ROOT/run --steps {10**30} --for-good", "the whole data is 8 steps"),
        ("reweight ROOT/run all=1", "draws from all its files as one pool; start it with data.mixture"),
        ("reweight ROOT/mixed web", "'web' in mixture 'web': expected source=weight, each source once, weights >= 0"),
        ("reweight ROOT/mixed 'web=1 code=much'", "'code=much' in mixture"),
        ("reweight ROOT/mixed 'web=1 code=-1'", "'code=-1' in mixture"),
        ("reweight ROOT/mixed 'web=nan code=1'", "'web=nan' in mixture"),
        ("reweight ROOT/mixed 'web=1 web=1'", "'web=1' in mixture"),
        ("reweight ROOT/mixed 'web=0 code=0'", "no source has a weight above 0"),
        ("reweight ROOT/mixed ''", "no source has a weight above 0"),
        ("reweight ROOT/mixed web=1", 'the data\'s sources are code, web; ..., as in "code=0 web=1"'),
        ("reweight ROOT/mixed 'web=1 code=1 books=1'", "the mixture names books, code, web, the data's sources are"),
        ("reweight ROOT/mixed 'web=1 code=1' --from-tokens 3808", "the run is at 3,840 already; leave the number out"),
        ("reweight ROOT/mixed 'web=1 code=1' --from-tokens -5", "--from-tokens -5.0: expected a number of tokens"),
        ("reweight ROOT/mixed 'web=1 code=1' --from-tokens nan", "--from-tokens nan: expected a number of tokens"),
        ("reweight ROOT/mixed 'web=1 code=1' --from-tokens inf", "--from-tokens inf: expected a number of tokens"),
        ("plan ROOT/run --steps 5", "--steps 5 lies behind the run, which is at step 6"),
        ("audit ROOT/run nothing.bin", "nothing.bin: no file of the run"),
        ("audit ROOT/run --sample 3", "--sample wants the FILE that the sample is of"),
        ("audit ROOT/run test-00000.bin --sample 20", "has samples 0 to 19 of 32 tokens"),
        ("audit ROOT/run test-00000.bin --sample -1", "--sample -1: "),
        ("audit ROOT/run --bitmap ROOT/run/bitmap", "bitmap: expected a name that ends in .npz"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_in_one_line_and_leaves_no_trace(
    root: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
):
    refused_without_a_trace(root, capsys, line, BAD_REQUEST, message)


def test_a_bitmap_cannot_be_written_into_a_folder_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]):
    line, message = "audit ROOT/run --bitmap ROOT/nowhere/bitmap.npz", "ROOT/nowhere/bitmap.npz: No such file"
    refused_without_a_trace(root, capsys, line, CANNOT_WRITE, message)


REST = {"append": "ROOT/more", "remove": "test-00000.bin", "skip": "--steps 1", "reweight": "web=1"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_wants_a_run_with_a_checkpoint(root: Path, capsys: pytest.CaptureFixture[str], name: str):
    rest = REST.get(name, "")
    for run, message in (
        ("empty", "no checkpoint yet, so there is nothing to ask or change; wait for the first one"),
        ("data", "no checkpoint yet"),
        ("nowhere", "no such run folder"),
        ("copy.bin", "no such run folder"),
    ):
        refused_without_a_trace(root, capsys, f"{name} ROOT/{run} {rest}", BAD_DATA, f"ROOT/{run}: {message}")


# The command line itself


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_each_command_has_help_and_refuses_what_it_does_not_know(
    root: Path, capsys: pytest.CaptureFixture[str], name: str | None
):
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"] if name else ["--help"])
    assert ended.value.code == OK
    output, _ = capsys.readouterr()
    assert output.startswith(f"usage: python -m resume {f'{name} ' if name else ''}[-h]")
    assert all(other in output for other in ([name] if name else COMMANDS))
    rest = REST.get(name or "", "").split()
    with pytest.raises(SystemExit) as ended:
        command.main([name, str(root / "run"), *rest, "--frobnicate"] if name else ["frobnicate"])
    assert ended.value.code == USAGE
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("usage: python -m resume")
    assert "frobnicate" in error.splitlines()[-1]


@pytest.mark.parametrize(
    "line",
    ["", "skip ROOT/run", "skip ROOT/run --steps 1.5", "remove ROOT/run", "append ROOT/run", "reweight ROOT/run"],
)
def test_what_is_left_out_or_no_number_is_an_error_of_usage(root: Path, capsys: pytest.CaptureFixture[str], line: str):
    with pytest.raises(SystemExit) as ended:
        command.main(words(root, line))
    assert ended.value.code == USAGE
    assert capsys.readouterr().err.startswith("usage: python -m resume")


def test_as_a_process_it_prints_the_same_from_anywhere_and_a_reader_who_left_is_no_error(root: Path, tmp_path: Path):
    line = [sys.executable, "-m", "resume", "status", "run"]
    made = subprocess.run(line, cwd=root, capture_output=True, timeout=60)
    assert (made.returncode, made.stderr) == (OK, b"")
    assert made.stdout.decode() == shown("status", root / "run").replace(f"{root}/run:", "run:", 1)
    # As in `| head -n 0`: by the time that something is printed, nobody reads it.
    reader, writer = os.pipe()
    os.close(reader)
    try:
        piped = subprocess.run(line, cwd=root, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(writer)
    assert (piped.returncode, piped.stderr) == (OK, b"")


def test_without_a_standard_output_the_exit_code_still_tells(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)  # what Python has after `>&-`
    assert command.main(["verify", str(run)]) == OK
    rebook(run, forge)
    assert command.main(["audit", str(run)]) == BAD_DATA

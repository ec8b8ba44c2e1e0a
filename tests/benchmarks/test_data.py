import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from benchmarks import data, data_child, data_corpus, data_ours, data_peers, data_report, data_sections
from benchmarks.data_child import TOKENS, AbsentError, ChildError, Finished, Job, Measured, Stream
from benchmarks.data_corpus import COPIES, EOS_ID, PAD_ID, Corpus, make_corpus, planted
from benchmarks.data_report import Goal
from benchmarks.data_size import installed_sizes
from data_prep.reading.corpus import InputFile

MODULES = ("argparse", "ast", "inspect", "typing", "subprocess", "threading", "logging", "shutil", "tarfile", "zipfile")
CHINESE = "数据准备从原始文本开始，经过清洗、去重和编码，最后写成训练所用的文件。第{}条记录各不相同，序号是{}。"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("bench-corpus")
    chinese = folder / "chinese.jsonl"
    texts = ["".join(CHINESE.format(i, i * j) for j in range(1, 30)) for i in range(20)]
    chinese.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    library = Path(argparse_file()).parent
    files = [library / f"{name}.py" for name in (*MODULES, "csv", "glob", "heapq", "queue", "random", "string")]
    sources = [InputFile(path=str(p), name=p.name, size_bytes=p.stat().st_size) for p in files if p.exists()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.reading.corpus.installed_python", lambda: sources)
        patch.setattr(data_corpus, "VOCAB_SIZE", 600)
        return make_corpus(folder / "corpus", 0.2, str(chinese))


def argparse_file() -> str:
    import argparse

    return str(argparse.__file__)


def job(corpus: Corpus, folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "files": corpus.parts,
        "tokenizer": corpus.tokenizer,
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "vocab_size": corpus.vocab_size,
        "folder": str(folder),
        "num_workers": 2,
    }
    return Job(**(values | changes))


def texts_of(path: str | Path) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_the_corpus_holds_every_document_once_in_parts_and_once_by_kind(corpus: Corpus):
    parts = [text for part in corpus.parts for text in texts_of(part)]
    by_kind = {kind: texts_of(files[0]) for kind, files in corpus.kind_files().items()}
    assert set(by_kind) == {"code", "english", "chinese"}
    assert len(parts) == len(set(parts))
    assert sorted(parts) == sorted(text for texts in by_kind.values() for text in texts)
    assert sum(len(text.encode()) for text in parts) == sum(corpus.text_bytes) == sum(corpus.kind_bytes.values())
    assert all("准备" in text for text in by_kind["chinese"])


def test_the_ids_that_count_as_right_are_those_of_the_library_one_document_at_a_time(corpus: Corpus):
    tokenizer = Tokenizer.from_file(corpus.tokenizer)
    expected = [i for text in texts_of(corpus.parts[2]) for i in (*tokenizer.encode(text).ids, EOS_ID)]
    assert np.load(corpus.folder / "part-2.ids.npy").tolist() == expected
    assert corpus.digest([2]) == data_child.digest(np.array(expected[:-1]))
    assert corpus.digest([0, 1]) != corpus.digest([1, 0])


def test_copies_differ_from_their_original_as_much_as_they_are_meant_to():
    text = "\n".join(f"The {i}th line names {chr(97 + i % 26) * 3} and {chr(0x4E00 + i)}数字。" for i in range(2_000))
    copies = dict(zip(COPIES, planted(text), strict=True))
    words = data_corpus._WORD.findall(text)
    assert copies["exact"] == text
    assert copies["white space"].split() == text.split()
    assert copies["white space"] != text
    for sort, share in (("1 %", 0.01), ("2 %", 0.02), ("4 %", 0.04), ("20 %", 0.2)):
        found = data_corpus._WORD.findall(copies[sort])
        changed = np.mean([a != b for a, b in zip(words, found, strict=True)])
        assert 0.7 * share < changed < 1.2 * share  # a word may be replaced by itself
    assert copies == dict(zip(COPIES, planted(text), strict=True))


@given(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1), st.data())
def test_documents_are_the_same_wherever_a_way_writes_eos(documents: list[list[int]], data: st.DataObject):
    def eos(fewest: int) -> list[int]:
        return [0] * data.draw(st.integers(fewest, 3))

    written = [*eos(0), *(i for document in documents[:-1] for i in (*document, *eos(1))), *documents[-1], *eos(0)]
    expected = [i for document in documents for i in (*document, 0)][:-1]
    assert data_child.one_between(np.array(written), 0).tolist() == expected


@pytest.mark.parametrize("way", ["steel_llm", "megatron", "arrow", "tinyllama"])
def test_every_other_way_gives_the_ids_of_the_library(corpus: Corpus, tmp_path: Path, way: str):
    measured = data_child.run("benchmarks.data_peers", way, job(corpus, tmp_path))
    assert measured.digest == corpus.digest(measured.order)
    assert sorted(measured.order) == list(range(len(corpus.parts)))
    assert measured.elapsed_s > 0
    assert measured.cpu_s > 0


def test_ours_and_the_encoder_alone_give_the_ids_of_the_library(corpus: Corpus, tmp_path: Path):
    for way, options in (("raw_encode", {}), ("plain", {"engine": "pool"})):
        folder = tmp_path / way
        folder.mkdir()
        measured = data_child.run("benchmarks.data_ours", way, job(corpus, folder, options=options), with_memory=True)
        assert measured.digest == corpus.digest(measured.order)
        assert measured.peak_bytes is not None
        assert 20e6 < measured.peak_bytes < 2e9


def test_chunks_are_cut_where_they_are_full_and_filled_where_they_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_peers, "_CHUNK_TOKENS", 10)
    builder = data_peers.PackedBuilder(tmp_path, "process", separator=99)
    for first, size in ((0, 3), (3, 22), (25, 10)):
        builder.add(np.arange(first, first + size, dtype=TOKENS))
    builder.write()
    chunks = [np.fromfile(path, TOKENS, offset=24) for path in sorted(tmp_path.iterdir())]
    assert np.concatenate(chunks).tolist() == [*range(35), *[99] * 5]


def test_memory_is_that_of_all_processes_of_a_command():
    child = "import time; content = b'x' * 100_000_000; time.sleep(0.5)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    printed, cpu_s, peak_bytes = data_child.measure([sys.executable, "-c", parent], with_memory=True)
    assert printed == "done\n"
    assert peak_bytes is not None
    assert 100e6 < peak_bytes < 200e6
    assert cpu_s < 2


def test_the_time_of_processes_that_a_command_leaves_behind_counts():
    busy = "import os, time\nwhile time.process_time() < 0.5: pass"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {busy!r}], stdout=-3); print('done')"
    _, cpu_s, _ = data_child.measure([sys.executable, "-c", parent])
    assert cpu_s > 0.5


def test_a_command_that_fails_says_why_and_a_library_that_is_absent_says_its_name(corpus: Corpus, tmp_path: Path):
    with pytest.raises(ChildError, match="no such thing"):
        data_child.measure([sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "datatrove.py").write_text("raise ImportError('datatrove', name='datatrove')\n", encoding="utf-8")
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(AbsentError, match="datatrove"):
            data_child.run("benchmarks.data_peers", "datatrove", job(corpus, tmp_path))


def test_data_preparation_needs_arrow_and_not_torch():
    sizes = installed_sizes()
    assert sizes["pyarrow"] > 50e6
    assert sizes["numpy"] > 10e6
    assert not {"torch", "sympy", "transformers", "bessemer"} & set(sizes)


def test_a_goal_is_reached_from_above_or_from_below():
    assert [Goal("", 10, value).verdict for value in (9.9, 10.0, None)] == ["fail", "pass", "not measured"]
    assert [Goal("", 10, value, is_upper_bound=True).verdict for value in (10.0, 10.1)] == ["pass", "fail"]


_runs: dict[str, Measured] = {}


def run_here(module: str, way: str, job: Job, with_memory: bool = False) -> Measured:
    """What `data_child.run` does, in this process and once for each way; of other projects' ways only the tokens."""
    if way not in _runs:
        _runs[way] = _run_here(way, job)
    return _runs[way]


def _run_here(way: str, job: Job) -> Measured:
    if way in ("datatrove", "nanogpt"):
        raise AbsentError(way)
    if way in data_ours.WAYS and way != "raw_encode":
        finished = data_ours.WAYS[way](Job(**(_fields(job) | {"options": job.options | {"engine": "inline"}})))
    else:
        path = Path(job.folder) / "all.bin"
        parts = [np.load(file.replace(".jsonl", ".ids.npy")) for file in job.files]
        np.concatenate(parts).tofile(path)
        finished = Finished([Stream(str(path))], [int(file[-7]) for file in job.files], {"encoder": "none"})
    ids = data_child.tokens_of(finished.streams, job.eos_id, job.pad_id)
    if way == "arrow":
        ids = ids[:-1]
    return Measured(1.0, 1.0, 1_000, tuple(finished.order), data_child.digest(ids), ids.size, dict(finished.facts))


def _fields(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in Job.__slots__}


def test_a_small_run_of_all_sections_writes_its_results(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.environment.RESULTS", tmp_path / "results")
    monkeypatch.setattr(data, "make_corpus", lambda *_: corpus)
    monkeypatch.setattr(data_child, "run", run_here)
    monkeypatch.setattr(data_sections, "_STEP_BYTES", 50_000)
    default = "--input.max-input-bytes 300000 --tokenizer.vocab-size 400 --engine.kind inline"
    arguments = ["--rounds", "1", "--documents", "20000", "--workers", "1", "--folder", str(tmp_path)]
    assert data.main([*arguments, "--default-arguments", default]) == 0
    (written,) = (tmp_path / "results").glob("*.json")
    result = json.loads(written.read_text(encoding="utf-8"))
    remarks = {row["name"]: row["remark"] for row in result["rows"] if row["remark"]}
    assert remarks.keys() == {"nanoGPT's way", "nanoGPT's way without datasets", "datatrove"}
    assert remarks["nanoGPT's way without datasets"].startswith("VOID: other tokens")
    assert all("mb_per_s" not in row for row in result["rows"] if row["remark"])
    assert all(row["mb_per_s"] > 0 and not row["remark"] for row in result["pipeline"])
    assert result["pipeline"][0]["copies"]["exact"].get("kept", 0) == 0
    assert {row["kind"] for row in result["steps"]} == {"code", "english", "chinese"}
    assert result["default"]["tokens"] > 10_000
    assert result["dedup"]["documents"] == 20_000
    assert {goal["verdict"] for goal in result["goals"]} <= {"pass", "fail", "not measured"}
    assert len(result["goals"]) == 15
    assert len(list((tmp_path / "results").glob("*.png"))) == 1
    assert "Planted copies" in capsys.readouterr().out


def test_copies_that_were_kept_and_shards_that_differ_take_away_the_speed():
    def measured(digest: str, verdicts: list[str]) -> Measured:
        return Measured(1.0, 1.0, None, (), digest, 0, {"copies": verdicts})

    rest = ["near duplicate", "near duplicate", "kept", "kept"]
    good = ["exact duplicate", "exact duplicate", *rest]
    refused = [
        "text.digits",
        "kept",
        *rest,
    ]  # the original, too: the copy with other line ends is the first that passes
    digests: set[str] = set()
    assert data_sections._wrong_verdicts(measured("a", good + refused), digests) == ""
    assert "1 exact" in data_sections._wrong_verdicts(measured("a", [*good, "kept", "kept", *rest]), digests)
    assert "1 exact" in data_sections._wrong_verdicts(measured("a", ["exact duplicate", "kept", *rest]), digests)
    assert "other shards" in data_sections._wrong_verdicts(measured("b", good), digests)


def test_a_table_of_ways_has_a_line_for_those_without_speed():
    records = [{"name": "absent way", "remark": "not installed (it)"}]
    table = data_report.ways_table("title", records, "note", {})
    assert table.rows[0][0] == "absent way: not installed (it)"

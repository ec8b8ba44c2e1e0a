import gzip
import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.looking.raw_text import read_again, show_command
from data_prep.reading.corpus import InputFile
from data_prep.reading.documents import plan_units, read_unit
from data_prep.reading.records import Document
from data_prep.reading.templates import Layout

TEXTS = [f"text number {number}: {'数据 and more ' * number}".strip() for number in range(30)]
LINES = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in TEXTS]
LINES.insert(7, b"{not json")


def written(folder: Path, name: str) -> Path:
    path, content = folder / name, b"\n".join([*LINES, b""])
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    elif name.endswith(".txt"):
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(zstandard.compress(content) if name.endswith(".zst") else content)
    return path


@pytest.mark.parametrize("name", ["it's a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.parquet"])
@pytest.mark.parametrize("layout", ["auto", "text"])
def test_every_document_is_read_again_from_its_place(tmp_path: Path, name: str, layout: str):
    path = written(tmp_path, name)
    found = _documents(path, Layout.named(layout))
    assert [document.text for document in found] == TEXTS
    for document in found:
        assert read_again(str(path), document.place, Layout.named(layout)) == document.text


@pytest.mark.parametrize("split", ["lines", "paragraphs", "file"])
def test_documents_of_text_files_are_read_again(tmp_path: Path, split: str):
    path, layout = written(tmp_path, "a.txt"), Layout.named("text", split=split)  # pyright: ignore[reportArgumentType]
    found = _documents(path, layout)
    assert len(found) == (1 if split == "file" else len(TEXTS))
    assert [read_again(str(path), document.place, layout) for document in found] == [item.text for item in found]


def test_a_place_without_a_document_and_a_file_that_is_gone_give_nothing(tmp_path: Path):
    path, layout = written(tmp_path, "a.jsonl"), Layout.named("text")
    bad_place = sum(len(line) + 1 for line in LINES[:7])
    assert read_again(str(path), bad_place, layout) is None
    assert read_again(str(path), bad_place + 3, layout) is None
    assert read_again(str(path), 10**9, layout) is None
    compressed = str(written(tmp_path, "a.jsonl.gz"))
    assert read_again(compressed, 1, layout) is None
    assert read_again(str(tmp_path / "gone.jsonl"), 0, layout) is None


def test_a_limit_on_reading_holds_where_a_file_is_read_from_its_beginning(tmp_path: Path):
    layout = Layout.named("text")
    for name, is_found in (("a.jsonl", True), ("a.jsonl.gz", False), ("a.json", False)):
        path = written(tmp_path, name)
        place = _documents(path, layout)[-1].place
        assert (read_again(str(path), place, layout, most_bytes=10) is not None) is is_found


@pytest.mark.parametrize("name", ["it's a.jsonl", "a.jsonl.gz"])
def test_the_command_prints_the_raw_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, name)
    for document in _documents(path, Layout.named("text"))[::9]:
        for seek_bytes in (10**9, 0):
            monkeypatch.setattr("data_prep.looking.raw_text._SEEK_BYTES", seek_bytes)
            command = show_command(str(path), document.line, document.place)
            assert command is not None
            shown = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
            assert json.loads(shown)["text"] == document.text


def test_the_command_of_a_text_file_prints_it_and_other_kinds_have_none(tmp_path: Path):
    command = show_command(str(written(tmp_path, "a.txt")), 1, 0)
    assert command is not None
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stdout.decode() == "\n\n".join(TEXTS)
    for path in ("a.parquet", "a.json", "s3://bucket/a.jsonl"):
        assert show_command(path, 1, 0) is None


def _documents(path: Path, layout: Layout) -> list[Document]:
    units = plan_units([InputFile(str(path), path.name, path.stat().st_size)], layout)
    return [item for unit in units for item in read_unit(unit) if isinstance(item, Document)]

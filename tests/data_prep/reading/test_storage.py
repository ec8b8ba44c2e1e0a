import gzip
import io
import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.fingerprint import fingerprint
from data_prep.reading import storage
from data_prep.reading.corpus import find_inputs
from data_prep.reading.documents import BadLine, plan_units, read_unit
from data_prep.reading.storage import InputError, identity, open_range
from data_prep.reading.templates import Layout

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch):
    file_system = fsspec.filesystem("memory")
    monkeypatch.setattr(type(file_system), "store", {})
    monkeypatch.setattr(type(file_system), "pseudo_dirs", [""])
    return file_system


def read(pattern: str, **options: int) -> list[object]:
    layout = Layout.named("auto")
    units = plan_units(find_inputs([pattern]), layout, **options)
    return [item if isinstance(item, BadLine) else (item.text, item.place) for u in units for item in read_unit(u)]


def test_every_kind_of_file_reads_alike_from_a_url_and_from_the_disk(tmp_path: Path, memory):
    lines = "".join(json.dumps({"text": f"{number} 一"}) + "\n" for number in range(50)).encode() + b"cut {"
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two", None]}), table, row_group_size=2)
    contents = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.json": b'[{"text": "one"}, {"text": "two"}]',
        "d.txt": "整个文件".encode(),
        "e.parquet": table.getvalue(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        memory.pipe(f"/x/{name}", content)
    for name in contents:
        local = read(str(tmp_path / name), range_bytes=300)
        assert local
        assert read(f"memory://x/{name}", range_bytes=300) == local
    assert len(read("memory://x/*")) == 51 + 51 + 2 + 1 + 3


def test_a_file_opens_at_any_place(tmp_path: Path, memory):
    (tmp_path / "a").write_bytes(b"0123456789")
    memory.pipe("/a", b"0123456789")
    for path in (str(tmp_path / "a"), "memory://a"):
        with open_range(path) as file:
            file.seek(7)
            assert file.read(2) == b"78"


def test_identity_changes_with_the_content(tmp_path: Path, memory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "HEAD_BYTES", 10)
    monkeypatch.setattr(storage, "TAIL_BYTES", 10)
    contents = [b"", b"a", b"b", b"0123456789", b"0123456789-0123456789", b"012345678_-0123456789", b"0" * 21]
    found = []
    for content in contents:
        memory.pipe("/a", content)
        found.append(identity("memory://a"))
        assert found[-1] == identity("memory://a")
    assert len(set(found)) == len(contents)


def test_a_short_file_has_the_same_identity_wherever_it_lies(tmp_path: Path, memory):
    path = tmp_path / "a"
    for size in (0, 1000, storage.HEAD_BYTES, storage.HEAD_BYTES + 1, 2 * storage.HEAD_BYTES):
        path.write_bytes(os.urandom(size))
        memory.pipe("/a", path.read_bytes())
        assert identity(str(path)) == identity("memory://a") == fingerprint(path).file_id


def test_of_a_long_file_an_edit_in_the_middle_shows(tmp_path: Path, memory, monkeypatch: pytest.MonkeyPatch):
    content = bytes(3 * storage.HEAD_BYTES)
    path = tmp_path / "a"
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    before = identity(str(path))
    os.utime(path, ns=(2, 2))
    assert identity(str(path)) != before
    info = {"size": len(content), "type": "file", "name": "/a"}
    memory.pipe("/a", content)
    monkeypatch.setattr(type(memory), "info", lambda *_, **__: info)
    before = identity("memory://a")
    info["ETag"] = '"1234"'
    assert identity("memory://a") == f'{before}-ETag="1234"'


def test_a_missing_file_is_named(tmp_path: Path, memory):
    with pytest.raises(InputError, match=r"nope: cannot read the input file \(No such file"):
        identity(str(tmp_path / "nope"))
    with pytest.raises(InputError, match=r"memory://nope: cannot read the input file"):
        identity("memory://nope")


def test_a_server_that_does_not_tell_the_size_is_refused(memory, monkeypatch: pytest.MonkeyPatch):
    memory.pipe("/a.txt", b"a")
    monkeypatch.setattr(type(memory), "info", lambda *_, **__: {"size": None, "type": "file", "name": "/a.txt"})
    with pytest.raises(InputError, match="does not tell the size of the file; download it"):
        find_inputs(["memory://a.txt"])


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"s3://b/a\.txt: reading s3:// needs a package .*: pip install s3fs"):
        find_inputs(["s3://b/a.txt"])
    with pytest.raises(InputError, match=r"needs a package .*: pip install s3fs"):
        open_range("s3://b/a.txt")
    with pytest.raises(InputError, match=r"unknown protocol nope://; known are s3, "):
        find_inputs(["nope://b/a.txt"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(InputError, match=r"memory://a: .* pip install fsspec"):
        identity("memory://a")

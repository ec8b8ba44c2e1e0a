import gzip
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep import streams
from data_prep.documents import BadLine, Document, InputError, Unit, plan_units, read_unit

BAD = {
    b"": "blank line",
    b" \t\r": "blank line",
    b'{"text": "cut': "invalid JSON",
    b'{"text": "a"} x': "invalid JSON",
    b"[" * 100_000: "invalid JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "invalid JSON",
    b"5": "not a JSON object",
    b'["text"]': "not a JSON object",
    b'{"texts": "a"}': "no field 'text'",
    b'{"text": null}': "text is null",
    b'{"text": 7}': "text is not a string",
    b'{"text": ["a"]}': "text is not a string",
    b'{"text": ""}': "empty text",
    b'{"text": " \\n "}': "empty text",
    b'{"text": "a \\ud83d b"}': "lone surrogate",
    b'{"text": "\xff"}': "invalid UTF-8",
}


def line(text: str) -> bytes:
    return json.dumps({"id": 1, "text": text}, ensure_ascii=False).encode()


def read(paths: Sequence[Path], **options: int) -> list[Document | BadLine]:
    return [item for unit in plan_units(paths, source="s", **options) for item in read_unit(unit)]


def texts(items: Sequence[Document | BadLine]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad(items: Sequence[Document | BadLine]) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, BadLine)]


@pytest.mark.parametrize(("content", "reason"), BAD.items(), ids=[f"{i}-{r}" for i, r in enumerate(BAD.values())])
def test_a_bad_line_costs_only_itself(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line("one"), content, line("two")]))
    items = read([path])
    assert texts(items) == ["one", "two"]
    assert items[1] == BadLine(str(path), 2, reason)


def test_the_same_lines_are_good_and_bad_in_every_container(tmp_path: Path):
    content = b"\n".join([line("一"), *BAD, line("two\nlines"), *reversed(BAD), line("end")]) + b"\n"
    plain, zipped, squeezed = (tmp_path / f"a.jsonl{suffix}" for suffix in ("", ".gz", ".zst"))
    plain.write_bytes(content)
    # In two members each, as `cat a.gz b.gz` makes them.
    zipped.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    squeezed.write_bytes(zstandard.compress(content[:500]) + zstandard.compress(content[500:]))
    expected = [*BAD.values(), *reversed(BAD.values())]
    for path in (plain, zipped, squeezed):
        items = read([path])
        assert texts(items) == ["一", "two\nlines", "end"]
        assert [reason for _, reason in bad(items)] == expected
        assert [number for number, _ in bad(items)] == [*range(2, 18), *range(19, 35)]


json_lines = st.lists(
    st.one_of(st.text(max_size=30).map(line), st.sampled_from([*BAD]), st.just(b'{"text": "' + b"x" * 200 + b'"}')),
    max_size=12,
)


@given(json_lines, st.integers(1, 80), st.booleans())
def test_however_a_file_is_cut_into_ranges_each_line_is_read_once(lines: list[bytes], range_bytes: int, ends: bool):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(b"\n".join(line[:2000] for line in lines) + (b"\n" if ends else b""))
        whole, parts = read([path]), read([path], range_bytes=range_bytes)
    strip = [[(type(i), getattr(i, "text", getattr(i, "reason", ""))) for i in items] for items in (whole, parts)]
    assert strip[0] == strip[1]
    assert [i.id for i in whole if isinstance(i, Document)] == [i.id for i in parts if isinstance(i, Document)]


def test_a_range_that_begins_at_a_line_owns_that_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [line("one"), line("two")]
    path.write_bytes(b"\n".join(lines) + b"\n")
    first, second = plan_units([path], source="s", range_bytes=len(lines[0]) + 1)
    assert texts(list(read_unit(first))) == ["one"]
    assert texts(list(read_unit(second))) == ["two"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + line("one"))
    (tmp_path / "a.txt").write_bytes(mark + b"two")
    assert texts(read([tmp_path / "a.jsonl", tmp_path / "a.txt"])) == ["one", "two"]


def test_a_line_longer_than_the_limit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(streams, "_READ_BYTES", 32)
    content = b"\n".join([line("one"), line("x" * 200), line("y" * 79), line("z" * 300)])
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    for path in tmp_path.iterdir():
        items = read([path])
        assert texts(items) == ["one", "y" * 79]
        assert bad(items) == [(2, streams.LINE_TOO_LONG), (4, streams.LINE_TOO_LONG)]


def noise(num_lines: int) -> bytes:
    return b"".join(line(os.urandom(1000).hex()) + b"\n" for _ in range(num_lines))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_stream_gives_its_whole_lines_and_one_bad_one(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.jsonl{suffix}"
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    compressed = compress(noise(300))
    path.write_bytes(compressed[: len(compressed) // 2])
    items = read([path])
    assert 100 < len(texts(items)) < 200
    assert bad(items) == [(len(items), f"truncated {suffix} stream")]
    path.write_bytes(b"")
    assert bad(read([path])) == [(1, f"truncated {suffix} stream")]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_stream_gives_one_bad_line_after_the_good_ones(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.jsonl{suffix}"
    compress = gzip.compress if suffix == ".gz" else zstandard.compress
    compressed = bytearray(compress(noise(100)) + compress(noise(300)))
    compressed[-200_000] ^= 0xFF
    compressed[-4] ^= 0xFF
    path.write_bytes(compressed + b"not a stream")
    items = read([path])
    assert len(texts(items)) >= 100
    assert [reason for _, reason in bad(items)][-1] == f"damaged {suffix} stream"


def write_parquet(path: Path, values: list[str | None], kind: pa.DataType | None = None) -> None:
    table = pa.table({"n": list(range(len(values))), "text": pa.array(values, kind or pa.string())})
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_rows_are_documents_and_row_groups_are_units(tmp_path: Path, kind: pa.DataType):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", None, "三", "", "end"], kind)
    units = plan_units([path], source="s")
    assert [(unit.kind, unit.start) for unit in units] == [("rows", 0), ("rows", 1), ("rows", 2)]
    items = read([path])
    assert texts(items) == ["one", "三", "end"]
    assert bad(items) == [(2, "text is null"), (2, "empty text")]
    assert len({item.id for item in items if isinstance(item, Document)}) == 3


def test_parquet_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path):
    values = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    items = read([tmp_path / "a.parquet"])
    assert texts(items) == ["one", "three"]
    assert bad(items) == [(2, "invalid UTF-8")]


def test_a_damaged_row_group_is_one_bad_line(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 5000, "y" * 5000]}), path, row_group_size=1, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    items = read([path])
    assert texts(items) == ["y" * 5000]
    assert [(number, reason.split(" (")[0]) for number, reason in bad(items)] == [(1, "unreadable row group")]


def test_a_parquet_file_without_the_text_column_is_refused_with_its_columns(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "n": [1], "tags": [["a"]]}), path)
    with pytest.raises(InputError, match=r"no text column 'text'; its text columns are \['content'\].*text-field"):
        plan_units([path], source="s")
    assert len(plan_units([path], source="s", text_field="content")) == 1
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match="not a readable parquet file"):
        plan_units([path], source="s")


def test_text_files_are_grouped_and_a_bad_one_costs_only_itself(tmp_path: Path):
    contents = {"a.txt": b"one", "b.md": b"# two", "c.py": b"x = 1\n\nbad = '\xff'", "d.txt": b" \n", "e.txt": b"end"}
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_bytes(contents[path.name])
    assert [len(unit.paths) for unit in plan_units(paths, source="s")] == [5]
    assert [len(unit.paths) for unit in plan_units(paths, source="s", group_bytes=20)] == [2, 2, 1]
    assert texts(read(paths)) == texts(read(paths, group_bytes=1)) == ["one", "# two", "end"]
    assert [item for item in read(paths) if isinstance(item, BadLine)] == [
        BadLine(str(tmp_path / "c.py"), 3, "invalid UTF-8"),
        BadLine(str(tmp_path / "d.txt"), 1, "empty text"),
    ]


def test_units_keep_the_order_of_the_files(tmp_path: Path):
    names = ["z.txt", "a.jsonl", "b.txt", "a.txt"]
    for name in names:
        (tmp_path / name).write_bytes(line(name))
    units = plan_units([tmp_path / name for name in names], source="s")
    assert [[Path(path).name for path in unit.paths] for unit in units] == [["z.txt"], ["a.jsonl"], ["b.txt", "a.txt"]]
    assert all(isinstance(unit, Unit) and unit.source == "s" for unit in units)


def test_another_field_can_hold_the_text(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": 5}\n')
    (unit,) = plan_units([path], source="s", text_field="content")
    assert texts(list(read_unit(unit))) == ["one"]


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(InputError, match=r"a\.csv: unknown kind of file; known are \.txt"):
        plan_units([tmp_path / "a.csv"], source="s")

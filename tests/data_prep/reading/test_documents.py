import gzip
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep.reading import json_array, parquet_files, records, streams, text_files
from data_prep.reading.corpus import InputFile
from data_prep.reading.documents import BadLine, Document, InputError, Unit, plan_units, read_unit
from data_prep.reading.templates import Layout

TEXT = Layout.named("text")
BAD = {
    b"": "blank line",
    b" \t\r": "blank line",
    b'{"text": "cut': "invalid JSON",
    b'{"text": "a"} x': "invalid JSON",
    b'{"text": "tab\there"}': "invalid JSON",
    b"[" * 100_000: "invalid JSON",
    b"5": "not a JSON object",
    b'["text"]': "not a JSON object",
    b'{"texts": "a"}': "no field 'text'",
    b'{"text": null}': "text is null",
    b'{"text": 7}': "text is not a string",
    b'{"text": ' + b"9" * 5000 + b"}": "text is not a string",
    b'{"text": ["a"]}': "text is not a string",
    b'{"text": ""}': "empty text",
    b'{"text": " \\n "}': "empty text",
    b'{"text": "a \\ud83d b"}': "lone surrogate",
    b'{"text": "\xff"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\xbd"}': "invalid UTF-8",
    b'{"text": "a\0b"}': "zero bytes: UTF-16, or no text",
    '{"text": "a"}'.encode("utf-16"): "UTF-16, not UTF-8",
}
UNUSUAL = {
    b'{"text": "a", "score": NaN, "rank": -Infinity}': "a",
    b'{"text": "a", "n": 1e999, "m": ' + b"9" * 5000 + b"}": "a",
    b'{"text": "a", "author": "\\udc00"}': "a",
    b'{"text": "a", "text": "b"}': "b",
    b'{"text": "a\\u0000\\ud83d\\ude00"}': "a\0😀",
    b'\xef\xbb\xbf{"text": "a"}': "a",
    b' {"text": "a", "meta": ' + b"[" * 500 + b"]" * 500 + b"}\r": "a",
}


@pytest.fixture(params=["orjson", "json"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "json":
        monkeypatch.setattr(records, "_fast_loads", None)
    return request.param


def line(text: str) -> bytes:
    return json.dumps({"id": 1, "text": text}, ensure_ascii=False).encode()


def plan(paths: Sequence[Path], layout: Layout = TEXT, **options: int) -> list[Unit]:
    return plan_units([InputFile(str(p), str(p), p.stat().st_size) for p in paths], layout, **options)


def read(paths: Sequence[Path], layout: Layout = TEXT, **options: int) -> list[Document | BadLine]:
    return [item for unit in plan(paths, layout, **options) for item in read_unit(unit)]


def texts(items: Sequence[Document | BadLine]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def bad(items: Sequence[Document | BadLine]) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, BadLine)]


@pytest.mark.parametrize(("content", "reason"), BAD.items(), ids=[f"{i}-{r}" for i, r in enumerate(BAD.values())])
@pytest.mark.usefixtures("parser")
def test_a_bad_line_costs_only_itself(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line("one"), content, line("two")]))
    first, second, third = read([path])
    assert first == Document("one", 0, 0, 1)
    assert second == BadLine(0, 2, len(line("one")) + 1, reason, content[:200])
    assert third == Document("two", 0, len(line("one")) + len(content) + 2, 3)


@pytest.mark.parametrize(("content", "text"), UNUSUAL.items())
@pytest.mark.usefixtures("parser")
def test_what_the_json_module_accepts_is_good(tmp_path: Path, content: bytes, text: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content + b"\n" + content)
    assert texts(read([path])) == [text, text]


def outcome(content: bytes, read: Callable[[bytes], Any]) -> object:
    try:
        return read(content)
    except ValueError as error:
        return str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8) | st.characters(categories=["Cs"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "\ud800"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.just("text"), json_values), st.booleans(), st.data())
def test_orjson_and_json_agree_on_every_line(record: dict[str, object], is_ascii: bool, data: st.DataObject):
    content = json.dumps(record, ensure_ascii=is_ascii).encode("utf-8", "surrogatepass")
    place = data.draw(st.integers(0, len(content)))
    cut = data.draw(st.sampled_from([0, 1, 2]))
    content = (
        content[:place] + data.draw(st.sampled_from([b"", b"\\", b'"', b"\0", b"e5", b"\xff"])) + content[place + cut :]
    )
    extract = records.json_extractor(TEXT)
    fast = outcome(content, extract)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_fast_loads", None)
        assert outcome(content, extract) == fast


def test_the_same_lines_are_good_and_bad_in_every_container(tmp_path: Path):
    content = b"\n".join([line("一"), *BAD, line("two\nlines"), *reversed(BAD), line("end")]) + b"\n"
    plain, zipped, squeezed = (tmp_path / f"a.jsonl{suffix}" for suffix in ("", ".gz", ".zst"))
    plain.write_bytes(content)
    # In two members each, as `cat a.gz b.gz` makes them.
    zipped.write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
    squeezed.write_bytes(zstandard.compress(content[:500]) + zstandard.compress(content[500:]))
    plain_items = read([plain])
    assert texts(plain_items) == ["一", "two\nlines", "end"]
    # The line of UTF-16 holds no line end.
    assert [reason for _, reason in bad(plain_items)] == [*BAD.values(), *reversed(BAD.values())]
    assert [item.line for item in plain_items] == [*range(1, 2 * len(BAD) + 4)]
    for path in (zipped, squeezed):
        assert read([path]) == plain_items
    (tmp_path / "a.ndjson").write_bytes(content)
    assert read([tmp_path / "a.ndjson"]) == plain_items


good_lines = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: not text.isspace())
some_lines = st.lists(st.one_of(good_lines, st.sampled_from([b for b in BAD if len(b) < 2000])), max_size=25)


@given(some_lines, st.integers(1, 300), st.booleans())
def test_bad_lines_of_all_kinds_cost_exactly_themselves_however_a_file_is_cut_into_ranges(
    lines: list[str | bytes], range_bytes: int, ends: bool
):
    contents = [item if isinstance(item, bytes) else line(item) for item in lines]
    content = b"\n".join(contents) + (b"\n" if ends and contents else b"")
    if contents and not contents[-1] and not ends:
        lines = lines[:-1]  # nothing behind the last line end is no line
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        units = plan([path], range_bytes=range_bytes)
        items = [item for unit in units for item in read_unit(unit)]
    assert texts(items) == [item for item in lines if isinstance(item, str)]
    assert [reason for _, reason in bad(items)] == [BAD[item] for item in lines if isinstance(item, bytes)]
    assert all(content.startswith(original, item.place) for original, item in zip(contents, items))
    assert sum(unit.size_bytes for unit in units) == len(content)


def test_a_range_that_begins_at_a_line_owns_that_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines = [line("one"), line("two")]
    path.write_bytes(b"\n".join(lines) + b"\n")
    first, second = plan([path], range_bytes=len(lines[0]) + 1)
    assert texts(list(read_unit(first))) == ["one"]
    assert texts(list(read_unit(second))) == ["two"]


def test_a_range_inside_an_endless_line_reads_no_further_than_itself():
    class Counting:
        num_bytes = place = 0

        def seek(self, place: int) -> None:
            self.place = place

        def read(self, size: int) -> bytes:
            assert self.place < 3 * 1024**2, "read on after its end"
            self.place += size
            return b"x" * size

    assert list(streams.range_lines(Counting(), 1024**2, 2 * 1024**2)) == []  # pyright: ignore[reportArgumentType]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + line("one"))
    (tmp_path / "a.txt").write_bytes(mark + b"two")
    (tmp_path / "a.json").write_bytes(mark + b"[" + line("three") + b"]")
    assert texts(read([tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "a.json"])) == ["one", "two", "three"]


def test_a_line_longer_than_the_limit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(streams, "_READ_BYTES", 32)
    contents = [line("one"), line("x" * 700), line("y" * 79), line("z" * 800)]
    content = b"\n".join(contents)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
    for path in tmp_path.iterdir():
        items = read([path])
        assert texts(items) == ["one", "y" * 79]
        assert bad(items) == [(2, streams.LINE_TOO_LONG), (4, streams.LINE_TOO_LONG)]
        assert isinstance(items[1], BadLine)
        assert (items[1].place, items[1].head) == (len(contents[0]) + 1, contents[1][:200])
        assert items[3].place == content.index(contents[3])


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
    assert len({item.place for item in items}) == len(items)
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


def test_a_damaged_stream_of_a_text_costs_only_that_file(tmp_path: Path):
    whole, cut = tmp_path / "a.txt.gz", tmp_path / "b.txt.gz"
    whole.write_bytes(gzip.compress(b"one"))
    cut.write_bytes(gzip.compress(os.urandom(1000))[:500])
    items = read([cut, whole, whole])
    assert texts(items) == ["one", "one"]
    assert bad(items) == [(1, "truncated .gz stream")]


def test_a_small_zstandard_file_that_holds_very_much_is_read_in_parts(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    compressor = zstandard.ZstdCompressor().compressobj()
    zeros = bytes(16 * 1024**2)
    path.write_bytes(b"".join([*(compressor.compress(zeros) for _ in range(16)), compressor.flush()]))
    assert path.stat().st_size < 64 * 1024
    sizes = [len(block) for block in streams.decompressed(str(path))]
    assert sum(sizes) == 16 * len(zeros)
    assert max(sizes) <= 32 * 1024**2


def test_frames_of_zstandard_with_a_long_window_and_skipped_ones_are_read(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    skipped = b"\x50\x2a\x4d\x18" + (700).to_bytes(4, "little") + bytes(700)
    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    content = noise(50)
    frames = [zstandard.ZstdCompressor(compression_params=settings).compress(content), zstandard.compress(line("end"))]
    path.write_bytes(skipped + skipped.join(frames) + skipped)
    assert b"".join(streams.decompressed(str(path))) == content + line("end")


def test_zero_bytes_behind_gzip_are_padding(tmp_path: Path):
    path = tmp_path / "a.jsonl.GZ"
    for zeros in (1, 512, 100_000):
        padding = bytes(zeros)
        path.write_bytes(gzip.compress(line("one") + b"\n") + padding + gzip.compress(line("two")) + padding)
        assert read([path]) == [Document("one", 0, 0, 1), Document("two", 0, len(line("one")) + 1, 2)]
    path.write_bytes(bytes(512))
    assert bad(read([path])) == [(1, "damaged .gz stream")]


def write_parquet(path: Path, values: list[str | None], kind: pa.DataType | None = None) -> None:
    table = pa.table({"n": list(range(len(values))), "text": pa.array(values, kind or pa.string())})
    pq.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_rows_are_documents_and_row_groups_are_units(tmp_path: Path, kind: pa.DataType):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one", None, "三", "", "end"], kind)
    units = plan([path], Layout.named("auto"))
    assert [(unit.kind, unit.start, unit.layout.name) for unit in units] == [("rows", i, "wikipedia") for i in range(3)]
    items = [item for unit in units for item in read_unit(unit)]
    assert items == [
        Document("one", 0, 0, 1),
        BadLine(0, 2, 1, "text is null"),
        Document("三", 0, 2**32, 1),
        BadLine(0, 2, 2**32 + 1, "empty text"),
        Document("end", 0, 2 * 2**32, 1),
    ]


def test_parquet_text_that_is_not_utf8_costs_only_its_row(tmp_path: Path):
    values = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    items = read([tmp_path / "a.parquet"])
    assert texts(items) == ["one", "three"]
    assert bad(items) == [(2, "invalid UTF-8")]


def test_a_damaged_row_group_is_one_bad_line_and_another_tells_the_layout(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 5000, "y" * 5000]}), path, row_group_size=1, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    items = read([path], Layout.named("auto"))
    assert texts(items) == ["y" * 5000]
    assert [(number, reason.split(" (")[0]) for number, reason in bad(items)] == [(1, "unreadable row group")]


def test_a_failing_disk_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, ["one"])
    (unit,) = plan([path])

    def fail(path: str) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(parquet_files, "_open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        list(read_unit(unit))


def test_a_parquet_file_without_the_text_column_is_refused_with_its_columns(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1], "tags": [["a"]]}), path)
    with pytest.raises(InputError, match=r"no column 'text'; its columns are body, n, tags\. Name one .*text_field"):
        plan([path])
    assert len(plan([path], Layout.of_template("body"))) == 1


@pytest.mark.parametrize("layout", ["text", "auto"])
def test_an_unreadable_parquet_file_is_one_bad_line(tmp_path: Path, layout: str):
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    write_parquet(paths[0], ["one", "two", "three"])
    content = paths[0].read_bytes()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(content[: len(content) // 2])
    items = read([paths[1], paths[2], paths[0]], Layout.named(layout))
    assert items[:2] == [BadLine(0, 1, 0, parquet_files.UNREADABLE)] * 2
    assert texts(items) == ["one", "two", "three"]


UNREADABLE_VALUES = {
    "nanoseconds": pa.array([1_700_000_000_123_456_789] * 3, pa.timestamp("ns")),
    "far": pa.array([9 * 10**14] * 3, pa.timestamp("s")),
    "date": pa.array([3_000_000] * 3, pa.date32()),
    "zone": pa.array([1] * 3, pa.timestamp("us", tz="Mars/Olympus")),
}


if importlib.util.find_spec("pandas") is not None:
    del UNREADABLE_VALUES["nanoseconds"]  # pandas, where it is installed, has a type for them


@pytest.mark.parametrize("name", UNREADABLE_VALUES)
def test_values_that_cannot_be_read_matter_only_where_they_are_used(tmp_path: Path, name: str):
    path = tmp_path / "a.parquet"
    values = UNREADABLE_VALUES[name]
    pq.write_table(pa.table({"made": values, "text": ["a", "b", "c"]}), path)
    assert texts(read([path], Layout.named("auto"))) == ["a", "b", "c"]
    pq.write_table(pa.table({"meta": pa.StructArray.from_arrays([values], ["made"]), "text": ["a", "b", "c"]}), path)
    reason = "a value that cannot be read"
    assert bad(read([path], Layout.of_template("{meta.by?}\n{text}"))) == [(1, reason), (2, reason), (3, reason)]


def test_one_value_that_cannot_be_read_costs_one_row(tmp_path: Path):
    made = pa.array([1, 9 * 10**14, None], pa.timestamp("s"))
    table = pa.table({"meta": pa.StructArray.from_arrays([made], ["made"]), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    items = read([tmp_path / "a.parquet"], Layout.of_template("{meta.by?}\n{text}"))
    assert texts(items) == ["a", "c"]
    assert bad(items) == [(2, "a value that cannot be read")]


def test_a_damaged_row_group_costs_its_rows_and_shifts_no_other(tmp_path: Path):
    path = tmp_path / "a.parquet"
    values = [f"{number} {os.urandom(500).hex()}" for number in range(10)]
    pq.write_table(pa.table({"text": values}), path, row_group_size=4, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:1000] = bytes(996)
    path.write_bytes(content)
    for layout in ("text", "auto"):
        items = read([path], Layout.named(layout))
        assert texts(items) == values[4:]
        assert [item.place for item in items] == [*range(4), *range(2**32, 2**32 + 4), 2 * 2**32, 2 * 2**32 + 1]
        assert [number for number, _ in bad(items)] == [1, 2, 3, 4]
    pq.write_table(pa.table({"content": values}), path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:1000] = bytes(996)
    path.write_bytes(content)
    with pytest.raises(InputError, match="no column 'text'; its columns are content"):
        plan([path])
    assert len(bad(read([path], Layout.named("auto")))) == 10


def test_conversations_in_parquet_are_read_as_those_in_json(tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tables, lines = (read([tmp_path / name], Layout.named("auto")) for name in ("a.parquet", "a.jsonl"))
    assert [(d.text, d.turns) for d in tables if isinstance(d, Document)] == [
        (d.text, d.turns) for d in lines if isinstance(d, Document)
    ]
    assert texts(tables) == ["问\n答"] * 2


def test_text_files_are_grouped_and_a_bad_one_costs_only_itself(tmp_path: Path):
    contents = {"a.txt": b"one", "b.md": b"# two", "c.cpp": b"x = 1\n\nbad = '\xff'", "d.txt": b" \n", "e.txt": b"end"}
    paths = [tmp_path / name for name in contents]
    for path in paths:
        path.write_bytes(contents[path.name])
    assert [len(unit.paths) for unit in plan(paths)] == [5]
    assert [len(unit.paths) for unit in plan(paths, group_bytes=20)] == [2, 2, 1]
    assert texts(read(paths)) == texts(read(paths, group_bytes=1)) == ["one", "# two", "end"]
    items = read(paths)
    assert items[1] == Document("# two", 1, 0, 1)
    assert [item for item in items if isinstance(item, BadLine)] == [
        BadLine(2, 3, 7, "invalid UTF-8", b"bad = '\xff'"),
        BadLine(3, 1, 0, "empty text", b" \n"),
    ]


def test_a_text_that_is_utf16_or_binary_says_so(tmp_path: Path):
    for name, content in {"a.txt": "字".encode("utf-16"), "b.txt": b"\x7fELF\0\0"}.items():
        (tmp_path / name).write_bytes(content)
    assert bad(read([tmp_path / "a.txt", tmp_path / "b.txt"])) == [(1, records.UTF_16), (1, records.ZERO_BYTES)]


@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
def test_files_of_another_encoding_are_read_if_they_are_named(tmp_path: Path, encoding: str):
    (tmp_path / "a.txt").write_bytes("中文\n二".encode(encoding))
    lines = ['{"text": "一"}'.encode(encoding), b'{"text": "\xff"}', '{"text": "三"}'.encode(encoding)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "三".encode())
    layout = Layout.named("auto", encoding=encoding)
    items = read([tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.jsonl"], layout)
    assert texts(items) == ["中文\n二", "三", "一", "三"]
    assert bad(items) == [(2, f"invalid {encoding.upper()}")]
    assert bad(read([tmp_path / "a.txt"])) == [(1, "invalid UTF-8")]
    (tmp_path / "a.txt").write_bytes("好\n".encode(encoding) + b"\xff\xff")
    assert bad(read([tmp_path / "a.txt"], layout)) == [(2, f"invalid {encoding.upper()}")]


@given(
    st.lists(st.sampled_from(["", " ", "一行", "two words", "x" * 50, "\r"]), max_size=20),
    st.integers(1, 60),
    st.booleans(),
)
def test_the_lines_of_a_text_file_are_documents_in_ranges_of_any_size(lines: list[str], range_bytes: int, gz: bool):
    content = "\n".join(lines).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.txt.gz" if gz else "a.txt")
        path.write_bytes(gzip.compress(content) if gz else content)
        items = read([path], Layout.named("auto", split="lines"), range_bytes=range_bytes)
    assert texts(items) == [line for line in lines if line.strip()]
    assert all(content.startswith(text.encode(), item.place) for text, item in zip(texts(items), items))


def test_paragraphs_of_a_text_file_are_documents(tmp_path: Path):
    content = "\n\n第一段\n still the first\r\n\n \n\n\xa0second\nparagraph".encode()
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(content))
    (tmp_path / "b.c").write_text("// whole\n\nfile")
    for suffix in ("md", "rst", "markdown"):
        (tmp_path / f"c.{suffix}").write_bytes(content)
    layout = Layout.named("auto", split="paragraphs")
    expected = ["第一段\n still the first", "\xa0second\nparagraph"]
    names = ["a.txt", "b.c", "a.txt.zst", "c.md", "c.rst", "c.markdown"]
    items = read([tmp_path / name for name in names], layout, range_bytes=3)
    assert texts(items) == [*expected, "// whole\n\nfile", *expected * 4]
    assert [item.place for item in items[:2]] == [2, content.index(b"\xc2\xa0")]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "big5"])
def test_lines_of_any_white_space_are_blank(tmp_path: Path, encoding: str):
    path = tmp_path / "a.txt"
    path.write_bytes("　\n　　一\n　 　\r\n二　\n".encode(encoding) + b"\xff\n")
    for split in ("lines", "paragraphs"):
        items = read([path], Layout.named("auto", encoding=encoding, split=split))
        assert texts(items) == ["　　一", "二　"][: 2 if split == "lines" else 1]
        assert [reason for _, reason in bad(items)] == [f"invalid {encoding.upper()}"]


def test_a_text_longer_than_the_limit_is_left_out_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 20)
    (tmp_path / "a.txt").write_text("one\n\n" + "two\n" * 6 + "\nthree")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    paths = [tmp_path / "a.txt", tmp_path / "a.txt.gz"]
    assert bad(read(paths)) == [(1, text_files.TEXT_TOO_LONG)] * 2
    for path in paths:
        items = read([path], Layout.named("auto", split="paragraphs"))
        assert texts(items) == ["one", "three"]
        assert bad(items) == [(2, streams.LINE_TOO_LONG)]


def test_units_keep_the_order_of_the_files(tmp_path: Path):
    names = ["z.txt", "a.jsonl", "b.txt", "a.txt"]
    for name in names:
        (tmp_path / name).write_bytes(line(name))
    units = plan([tmp_path / name for name in names])
    assert [[Path(path).name for path in unit.paths] for unit in units] == [["z.txt"], ["a.jsonl"], ["b.txt", "a.txt"]]


def test_a_file_of_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(InputError, match=r"a\.csv: unknown kind of file; known are \.txt"):
        plan([tmp_path / "a.csv"])


def test_a_json_file_is_an_array_or_one_object_or_an_object_on_each_line(tmp_path: Path):
    contents = {
        "array.json": json.dumps([{"text": "一"}, {"text": "b"}], ensure_ascii=False),
        "pretty.json": "\n" + json.dumps([{"text": "一"}, {"text": "b"}], indent=2),
        "lines.json": '{"text": "一"}\n{"text": "b"}\n',
        "bad-lines.json": '{"text": "cut,\n{"text": "一"}\n{"text": "b"}\n',
        "object.json": json.dumps({"text": "一", "meta": [{"a": 1}]}, indent=1),
        "empty.json": "",
        "none.json": "[]",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for suffix in ("", ".gz"):
        kinds = {name: [unit.kind for unit in plan([tmp_path / f"{name}{suffix}"])] for name in contents}
        assert {name: kind[0] for name, kind in kinds.items() if kind} == {
            "array.json": "array",
            "pretty.json": "array",
            "lines.json": "lines",
            "bad-lines.json": "lines",
            "object.json": "object",
            "none.json": "array",
            **({"empty.json": "lines"} if suffix else {}),
        }
        found = {name: texts(read([tmp_path / f"{name}{suffix}"])) for name in contents}
        assert found == {name: ["一", "b"] for name in contents} | {
            "object.json": ["一"],
            "empty.json": [],
            "none.json": [],
        }


@pytest.mark.parametrize("encoding", ["gb18030", "big5"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_arrays_of_another_encoding_are_cut_at_characters(tmp_path: Path, encoding: str, suffix: str):
    path = tmp_path / f"a.json{suffix}"
    # Second bytes of characters: every one that is ASCII, among them backslashes, brackets and braces.
    pairs = [bytes([first, second]) for first in range(0xA4, 0xC0) for second in range(0x40, 0x7F)]
    characters = "".join(pair.decode(encoding, "ignore") for pair in pairs)
    # At the end of a text a backslash hides the quotation mark behind it.
    expected = [character for character in characters if character.encode(encoding).endswith(b"\\")]
    assert len(expected) > 10
    expected += [characters[start : start + 7] for start in range(0, len(characters), 7)]
    content = json.dumps([{"text": text} for text in expected], ensure_ascii=False).encode(encoding)
    content = content[:-1] + b', {"text": "\xff"}, {"text": "end"}]'
    path.write_bytes(gzip.compress(content) if suffix else content)
    items = read([path], Layout.named("auto", encoding=encoding))
    assert texts(items) == [*expected, "end"]
    assert bad(items) == [(len(expected) + 1, f"invalid {encoding.upper()}")]
    assert [item.head for item in items if isinstance(item, BadLine)] == [b'{"text": "\xff"}']
    marked = b"\xef\xbb\xbf" + json.dumps([{"text": "一"}, {"text": "二"}], ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(marked) if suffix else marked)
    assert texts(read([path], Layout.named("auto", encoding=encoding))) == ["一", "二"]


def test_a_json_file_of_another_encoding_may_be_one_object(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(json.dumps({"text": "成功"}, indent=1, ensure_ascii=False).encode("big5"))
    assert texts(read([tmp_path / "a.json"], Layout.named("auto", encoding="big5"))) == ["成功"]


ELEMENTS = {bytes(key): reason for key, reason in BAD.items() if len(key) < 2000 and reason != "blank line"}
del ELEMENTS[b'{"text": "a"} x'], ELEMENTS['{"text": "a"}'.encode("utf-16")]


@given(
    st.lists(st.one_of(good_lines, st.sampled_from([*ELEMENTS])), max_size=12),
    st.sampled_from([b",\n", b"\n,\n ", b" ,\r\n  "]),
    st.integers(1, 40),
)
def test_a_bad_element_of_an_array_on_lines_costs_only_itself(items: list[str | bytes], comma: bytes, block: int):
    contents = [item if isinstance(item, bytes) else line(item) for item in items]
    array = b"[\n" + comma.rpartition(b"\n")[2] + comma.join(contents) + b"\n]\n"
    blocks = [array[start : start + block] for start in range(0, len(array), block)]
    extract = records.json_extractor(TEXT)
    found = [outcome(element, extract) for element in json_array.elements(blocks)]
    expected = [ELEMENTS[item] if isinstance(item, bytes) else (item, ()) for item in items]
    assert [reason for reason in found if reason != "blank line"] == expected


@example([{}, [{}]], 0, 1)  # nested objects that begin like elements
@given(
    st.lists(json_values, max_size=5),
    st.sampled_from([None, 0, 1, 4]),
    st.integers(1, 50),
)
def test_any_array_is_split_into_its_elements(values: list[object], indent: int | None, block: int):
    array = json.dumps(values, indent=indent).encode()
    blocks = [array[start : start + block] for start in range(0, len(array), block)]
    assert repr([json.loads(element) for element in json_array.elements(blocks)]) == repr(json.loads(array))


def test_an_array_cut_short_gives_what_came_before_and_one_bad_line(tmp_path: Path):
    path = tmp_path / "a.json"
    content = json.dumps([{"text": "one"}, {"text": "two"}, {"text": "three"}]).encode()
    for end, found in ((-1, ["one", "two", "three"]), (-3, ["one", "two"]), (-21, ["one"]), (1, [])):
        path.write_bytes(content[:end])
        items = read([path])
        assert texts(items) == found
        assert bad(items) == [(len(found) + 1, json_array.TRUNCATED_ARRAY)]
        assert [item.place for item in items] == [*range(len(found) + 1)]
    path.write_bytes(content + b"\n" + content + b" x")
    items = read([path])
    assert texts(items) == ["one", "two", "three"] * 2
    assert bad(items) == [(7, json_array.TEXT_BEHIND_ARRAY)]


def test_a_broken_object_of_a_pretty_array_costs_no_other_object():
    values = [{"text": str(number), "tags": ["a", {"b": [1]}], "meta": {"n": 1}} for number in range(5)]
    array = json.dumps(values, indent=2).encode()
    for place in range(array.index(b'"1"'), array.index(b'"2"') - 20):
        for broken in (array[:place] + array[place + 1 :], array[:place] + b"\n" + array[place:]):
            found = list[str]()
            for element in json_array.elements([broken]):
                extracted = outcome(element, records.json_extractor(TEXT))
                found += [extracted[0]] if isinstance(extracted, tuple) else []
            assert [text for text in found if text in "0234"] == ["0", "2", "3", "4"], broken


def test_an_array_element_too_long_to_hold_ends_the_array(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_array, "MAX_LINE_BYTES", 50)
    blocks = [b'[{"text": "a"},', b'{"text": "', *[b"x" * 20] * 5, b'"}]']
    elements = json_array.elements(blocks)
    assert next(elements) == b'{"text": "a"}'
    with pytest.raises(streams.StreamError, match="array element longer than 64 MiB"):
        next(elements)


@pytest.mark.parametrize("filler", [b'"' + b"x" * 4_000_000 + b'"', b"9" * 4_000_000, b"[" + b"1," * 200_000 + b"1]"])
def test_a_long_element_is_looked_through_about_once(filler: bytes):
    class Counting:
        num_bytes = 0

        def finditer(self, buffer: bytearray, at: int):
            Counting.num_bytes += len(buffer) - at
            return token.finditer(buffer, at)

    array = b'[{"text": ' + filler + b"}, 5]"
    blocks = [array[start : start + 4096] for start in range(0, len(array), 4096)]
    token = json_array._TOKEN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_TOKEN", Counting())
        assert [*json_array.elements(blocks)] == [array[1:-4], b"5"]
    assert Counting.num_bytes < 4 * len(array)

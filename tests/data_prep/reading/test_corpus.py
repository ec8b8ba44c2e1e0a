import glob
import os
import sysconfig
from pathlib import Path

import pytest

from data_prep.reading import corpus, storage
from data_prep.reading.corpus import InputFile, choose, find_inputs, installed_python
from data_prep.reading.file_kinds import compression, content_suffix, file_kind
from data_prep.reading.storage import InputError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/d.jsonl", "odd[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(patterns: list[str]) -> list[str]:
    return [file.name for file in find_inputs(patterns)]


def test_files_come_in_the_order_of_the_patterns_sorted_within_each_and_once(tree: Path):
    assert names(["deep/**/*.jsonl", "*.txt", "**/*.txt"]) == [
        "deep/d.jsonl",
        "a.txt",
        "b.txt",
        "odd[1].txt",
        "deep/er/c.txt",
    ]


def test_a_name_with_brackets_and_an_absolute_path_are_found(tree: Path):
    assert names(["odd[1].txt"]) == ["odd[1].txt"]
    assert names([f"{tree}/[ab].txt"]) == [f"{tree}/a.txt", f"{tree}/b.txt"]
    assert find_inputs(["a.txt"]) == [InputFile("a.txt", "a.txt", 5)]


def test_a_pattern_over_everything_passes_over_folders(tree: Path):
    assert len(names(["**"])) == 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.parquet", r"\*\.parquet: no file matches; patterns are relative to /"),
        ("nope.txt", "nope.txt: no file matches"),
        ("deep", r"deep: a folder; name its files .* deep/\*\*/\*\.jsonl"),
        ("dee*", r"dee\*: no file matches"),
        ("*", r"odd\.csv: unknown kind of file; known are"),
    ],
)
def test_a_pattern_that_leads_nowhere_is_refused(tree: Path, pattern: str, message: str):
    (tree / "odd.csv").write_text("a,b")
    with pytest.raises(InputError, match=message):
        find_inputs([pattern])


def test_patterns_match_as_those_of_the_glob_module(tree: Path):
    (tree / "deep/.hidden").mkdir()
    for name in ("deep/.hidden/e.txt", ".f.txt", "deep/er/.g.txt"):
        (tree / name).write_text(name)
    patterns = [
        "*",
        "**",
        "**/*.txt",
        "deep/**",
        "*/*",
        "*/*/*.txt",
        "**/er/*",
        "de*/**/c.txt",
        ".*",
        "**/.*",
        "[!a].txt",
    ]
    patterns += ["./deep/../a.txt", "deep/../**/b.txt", "deep/*/../*.jsonl", "**/**/c.txt", "?.txt", "*.TXT", "a.txt/*"]
    for pattern in patterns:
        for prefix in ("", f"{tree}/"):
            matched = glob.glob(prefix + pattern, recursive=True)  # noqa: PTH207 - Path.glob matches otherwise
            expected = {os.path.normpath(name) for name in matched if Path(name).is_file()}
            assert {os.path.normpath(found.path) for found in storage.find(prefix + pattern)} == expected, pattern


def test_two_stars_do_not_follow_links_to_folders(tree: Path):
    (tree / "deep/loop").symlink_to("..")
    (tree / "other").symlink_to("deep")
    assert names(["**/*.jsonl"]) == ["deep/d.jsonl"]
    assert names(["other/*.jsonl"]) == names(["othe*/*.jsonl"]) == ["other/d.jsonl"]


def test_a_link_that_leads_nowhere_is_named(tree: Path):
    (tree / "gone.txt").symlink_to("nowhere")
    for pattern in ("gone.txt", "*.txt"):
        with pytest.raises(InputError, match=r"gone\.txt: a link that leads nowhere \(No such file .*remove the link"):
            find_inputs([pattern])


def test_what_is_no_regular_file_is_refused(tree: Path):
    os.mkfifo(tree / "pipe.txt")
    for pattern in ("pipe.txt", "*.txt"):
        with pytest.raises(InputError, match=r"pipe\.txt: no regular file but a pipe, socket or device; copy"):
            find_inputs([pattern])


def test_a_folder_that_cannot_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    def refuse(folder: str):
        if Path(folder).name == "er":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"deep/er: cannot read the folder \(Permission denied\); make it readable"):
        find_inputs(["**/*.jsonl"])
    assert names(["deep/*.jsonl"]) == ["deep/d.jsonl"]


def test_a_name_that_is_not_utf8_is_refused_in_readable_form(tree: Path):
    Path(os.fsdecode(b"\xd6\xd0.txt")).write_text("a")
    for pattern in ("*.txt", os.fsdecode(b"\xd6\xd0.txt")):
        with pytest.raises(InputError) as refused:
            find_inputs([pattern])
        assert str(refused.value) == r"'\udcd6\udcd0.txt': the name is not UTF-8; rename the file or its folder"


def test_the_installed_corpus_is_ordered_and_has_no_caches_or_stubs():
    files = installed_python()
    assert [file.name for file in files] == sorted({file.name for file in files})
    assert min(file.size_bytes for file in files) >= corpus.MIN_SOURCE_BYTES
    assert not any("__pycache__" in Path(file.path).parts for file in files)
    assert {"stdlib/json/decoder.py", "packages/numpy/__init__.py"} <= {file.name for file in files}
    assert not any(file.name.startswith("stdlib/site-packages") for file in files)


def test_names_do_not_depend_on_where_the_installation_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = "x = 1\n" * 100
    found = []
    for place in ("here", "over/there"):
        for name in ("lib/a.py", "lib/site-packages/other.py", "packages/p/b.py", "packages/p/__pycache__/b.py"):
            path = tmp_path / place / name
            path.parent.mkdir(parents=True)
            path.write_text(source)
        (tmp_path / place / "packages/p/stub.py").write_text("")
        roots = {"stdlib": "lib", "purelib": "packages", "platlib": "packages"}
        monkeypatch.setattr(
            sysconfig, "get_path", lambda kind, roots=roots, place=place: tmp_path / place / roots[kind]
        )
        found.append([file.name for file in installed_python()])
    assert found == [["packages/p/b.py", "stdlib/a.py"]] * 2


def test_a_byte_limit_takes_whole_files_in_their_order_and_always_the_same():
    files = [InputFile(f"{i}.py", f"{i}.py", 10 + i) for i in range(50)]
    chosen = choose(files, 300)
    assert 250 < corpus.total_bytes(chosen) <= 300
    assert chosen == [file for file in files if file in chosen]
    assert chosen != files[: len(chosen)]
    assert choose(files[::-1], 300) == chosen[::-1]
    assert choose(files, 10**6) == files


def test_a_byte_limit_below_every_file_is_refused():
    with pytest.raises(InputError, match=r"max_input_bytes = 5: files are taken whole, and the smallest has 7 bytes"):
        choose([InputFile("a", "a", 9), InputFile("b", "b", 7)], 5)


def test_a_file_that_is_linked_into_two_places_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.py").write_text("x = 1\n" * 100)
    (tmp_path / "p/b.py").symlink_to("a.py")
    (tmp_path / "p/gone.py").symlink_to("nowhere.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: tmp_path)
    (file,) = installed_python()
    assert file.size_bytes == 600


def test_urls_are_matched_sorted_and_named_in_full():
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl.gz"):
        memory.pipe(f"/corpus/{name}", name.encode())
    memory.mkdir("/corpus/folder.jsonl")
    assert find_inputs(["memory://corpus/**/*.jsonl*", "memory://corpus/a.jsonl"]) == [
        InputFile("memory:///corpus/a.jsonl", "memory:///corpus/a.jsonl", 7),
        InputFile("memory:///corpus/b.jsonl", "memory:///corpus/b.jsonl", 7),
        InputFile("memory:///corpus/deep/c.jsonl.gz", "memory:///corpus/deep/c.jsonl.gz", 15),
    ]
    with pytest.raises(InputError, match=r"memory://corpus/\*\.txt: no file matches$"):
        find_inputs(["memory://corpus/*.txt"])
    memory.pipe("/odd/a.csv", b"a")
    with pytest.raises(InputError, match="unknown kind of file"):
        find_inputs(["memory://odd/*"])


@pytest.mark.parametrize(
    ("path", "kind", "suffix", "packed"),
    [
        ("a/b.JSONL", "jsonl", ".jsonl", ""),
        ("a.ndjson.zst", "jsonl", ".ndjson", ".zst"),
        ("a.json.gz", "json", ".json", ".gz"),
        ("a.b.cpp", "text", ".cpp", ""),
        ("notes.txt.gz", "text", ".txt", ".gz"),
        ("a.Jsonl.GZ", "jsonl", ".jsonl", ".gz"),
        ("a.json.Zst", "json", ".json", ".zst"),
        ("a.parquet", "parquet", ".parquet", ""),
        ("a.parquet.gz", None, ".parquet", ".gz"),
        ("https://x.org/a.jsonl.gz?download=true&b=.zst", "jsonl", ".jsonl", ".gz"),
        ("a?.txt", "text", ".txt", ""),
        ("v1.2/Makefile", None, "", ""),
        (".gz", None, "", ".gz"),
    ],
)
def test_a_suffix_tells_the_kind_of_a_file(path: str, kind: str | None, suffix: str, packed: str):
    assert (file_kind(path), content_suffix(path), compression(path)) == (kind, suffix, packed)

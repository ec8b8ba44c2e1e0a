"""Each level finds what it promises to find, and trusts what it promises to trust."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.checksums import ChecksumError, checksum_path, write_checksums
from data_prep.fingerprint import HEAD_BYTES, fingerprint
from data_prep.manifest import read_manifest
from data_prep.shards import HEADER_BYTES, ShardError, ShardWriter
from resume import verify
from resume.manifest import DataError, DataFile, file_of, listed_files
from resume.verify import LEVELS, Level, StatCache, check_files, damaged_samples, open_split
from tests.prepared import rot, texts_about, tokenizer, write_data

DIGEST = tokenizer().digest


@pytest.fixture
def files(tmp_path: Path) -> list[DataFile]:
    folder = write_data(tmp_path / "data")
    return listed_files({folder: read_manifest(folder)}, "train")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> DataFile:
    """A shard that is longer than the head and the tail that make its identity; its tokens are of no tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    num_tokens = 2 * HEAD_BYTES
    options = {"vocab_size": 300, "tokenizer_digest": DIGEST, "eos_id": 0, "shard_tokens": num_tokens}
    with ShardWriter(folder, "large", **options) as writer:
        writer.add(np.random.default_rng(1).integers(1, 300, num_tokens - 1))
    path = folder / "large-00000.bin"
    return file_of(fingerprint(path).file_id, path, 2)


@pytest.fixture
def own(large: DataFile, tmp_path: Path) -> DataFile:
    """A copy of the large shard that may be damaged."""
    return dataclasses.replace(large, path=Path(shutil.copy2(large.path, tmp_path)))


def cached(run: Path, *good: DataFile) -> StatCache:
    """The cache of a run that has found these files good, read back as its next life does."""
    StatCache(run).write(good)
    return StatCache(run)


def touch(path: Path, later_s: int = 60) -> None:
    looked = path.stat()
    os.utime(path, ns=(looked.st_atime_ns, looked.st_mtime_ns + later_s * 10**9))


def test_a_cache_holds_what_was_written_and_is_replaced_by_what_is_written_next(files: list[DataFile], tmp_path: Path):
    run, empty = tmp_path / "run", StatCache(tmp_path / "run")
    assert not any(map(empty.holds, files))
    cache = cached(run, *files[:3])
    assert [cache.holds(file) for file in files[:4]] == [True, True, True, False]
    cache = cached(run, files[3])
    assert [cache.holds(file) for file in files[:4]] == [False, False, False, True]


def test_a_cache_knows_a_file_however_its_path_is_written(
    files: list[DataFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cache = cached(tmp_path / "run", files[0])
    monkeypatch.chdir(tmp_path)
    assert cache.holds(dataclasses.replace(files[0], path=files[0].path.relative_to(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"/a": 5}', b'{"/a": ["x"]}', b'{"/a": ["x", [1, 2, 3], 4]}', b'"x"'],
)
def test_a_damaged_cache_is_none_so_that_all_is_checked_anew_and_is_written_over(
    files: list[DataFile], tmp_path: Path, content: bytes
):
    run = tmp_path / "run"
    cached(run, *files)
    (path,) = (run / "checked").iterdir()
    path.write_bytes(content)
    damaged = StatCache(run)
    assert not any(map(damaged.holds, files))
    rot(files[0].path, 5)
    with pytest.raises(DataError, match="fingerprint"):
        check_files(files, "stat", DIGEST, damaged)
    assert cached(run, files[1]).holds(files[1])


def change_time(file: DataFile) -> None:
    touch(file.path)


def change_size(file: DataFile) -> None:
    looked = file.path.stat()
    with file.path.open("ab") as shard:
        shard.write(b"\0")
    os.utime(file.path, ns=(looked.st_atime_ns, looked.st_mtime_ns))


def put_another_in_its_place(file: DataFile) -> None:
    Path(shutil.copy2(file.path, file.path.with_suffix(".copy"))).replace(file.path)


@pytest.mark.parametrize("change", [change_time, change_size, put_another_in_its_place])
def test_a_cache_does_not_hold_a_file_that_looks_otherwise(
    files: list[DataFile], tmp_path: Path, change: Callable[[DataFile], None]
):
    cache = cached(tmp_path / "run", *files)
    change(files[0])
    assert [cache.holds(file) for file in files[:2]] == [False, True]


def test_a_cache_does_not_hold_another_identity_at_the_same_place(files: list[DataFile], tmp_path: Path):
    cache = cached(tmp_path / "run", *files)
    assert not cache.holds(dataclasses.replace(files[0], file_id=files[1].file_id))
    assert not cache.holds(dataclasses.replace(files[0], path=files[1].path))


def test_a_touched_file_is_looked_at_closely_once_and_trusted_again_when_it_was_found_good(
    files: list[DataFile], tmp_path: Path
):
    cache = cached(tmp_path / "run", *files)
    touch(files[0].path)
    check_files(files, "stat", DIGEST, cache)
    cache = cached(tmp_path / "run", *files)
    rot(files[0].path, 5)  # leaves no trace in size and time: whoever looks at the content finds it
    check_files(files, "stat", DIGEST, cache)
    touch(files[0].path)
    with pytest.raises(DataError, match=r"test-\d+\.bin: fingerprint"):
        check_files(files, "stat", DIGEST, cache)


def test_without_a_cache_the_level_stat_looks_at_the_content(files: list[DataFile]):
    rot(files[0].path, 5)
    with pytest.raises(DataError, match="fingerprint"):
        check_files(files, "stat", DIGEST)


MIDDLE = HEAD_BYTES - HEADER_BYTES // 2  # a token in the middle of the large shard, in neither head nor tail


@pytest.mark.parametrize(
    ("token", "found_by"),
    [(0, {"headtail", "full"}), (2 * HEAD_BYTES, {"headtail", "full"}), (MIDDLE, {"full"})],
    ids=["head", "tail", "middle"],
)
def test_rot_that_leaves_size_and_time_is_found_by_the_levels_that_read_its_place(
    own: DataFile, tmp_path: Path, token: int, found_by: set[Level]
):
    cache = cached(tmp_path / "run", own)
    for level in LEVELS:
        check_files([own], level, DIGEST, cache)
    rot(own.path, token)
    for level in LEVELS:
        if level in found_by:
            with pytest.raises((DataError, ShardError), match=r"large-00000\.bin: (fingerprint|the payload's xxh3)"):
                check_files([own], level, DIGEST, cache)
        else:
            check_files([own], level, DIGEST, cache)


def remove_file(file: DataFile) -> None:
    file.path.unlink()


def put_a_folder_in_its_place(file: DataFile) -> None:
    file.path.unlink()
    file.path.mkdir()


def cut_off(file: DataFile) -> None:
    os.truncate(file.path, file.path.stat().st_size - 2)


def write_noise(file: DataFile) -> None:
    file.path.write_bytes(b"noise".ljust(file.path.stat().st_size))


def write_another_header(file: DataFile) -> None:
    content = file.path.read_bytes()
    file.path.write_bytes(content.replace(DIGEST.encode(), DIGEST[::-1].encode(), 1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_file, "in the manifest but not on disk; restore it or prepare the data again"),
        (put_a_folder_in_its_place, "in the manifest but not on disk"),
        (cut_off, "the shard is truncated or replaced: restore it"),
        (write_noise, "not a shard, it starts with b'noise"),
        (write_another_header, "written with tokenizer .*; encode the text again with one tokenizer"),
    ],
)
def test_what_is_not_the_file_is_refused_by_name_at_every_level_whatever_was_good_before(
    files: list[DataFile], tmp_path: Path, level: Level, change: Callable[[DataFile], None], message: str
):
    cache = cached(tmp_path / "run", *files)
    change(files[2])
    if files[2].path.is_file():
        touch(files[2].path)
    with pytest.raises((DataError, ShardError), match=f"{files[2].path}: .*{message}"):
        check_files(files, level, DIGEST, cache)


def test_of_several_bad_files_the_first_is_named_whichever_is_found_first(files: list[DataFile]):
    for file in (files[1], files[3]):
        file.path.unlink()
    for _ in range(5):
        with pytest.raises(DataError, match=f"{files[1].path}: "):
            check_files(files, "headtail", DIGEST)


def test_no_files_are_good():
    check_files([], "full", DIGEST)


def test_a_shard_without_checksums_has_no_damaged_samples_that_could_be_named(files: list[DataFile]):
    rot(files[0].path, 5)
    assert damaged_samples(files[0]) == []


@settings(max_examples=15)
@given(data=st.data(), sample_tokens=st.integers(1, 90), block=st.sampled_from([1, 100, 700, 1 << 24]))
def test_damaged_samples_are_those_that_hold_a_flipped_token_as_target_or_context(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sample_tokens: int, block: int
):
    folder = write_data(tmp_path_factory.mktemp("data") / "data", num_held_out=70)
    (file, *_) = listed_files({folder: read_manifest(folder)}, "train")
    write_checksums(file.path, sample_tokens)
    flipped = data.draw(st.sets(st.integers(0, file.num_targets), max_size=4))
    for token in flipped:
        rot(file.path, token)
    samples = range(file.num_samples(sample_tokens))
    expected = [i for i in samples if flipped & set(range(i * sample_tokens, (i + 1) * sample_tokens + 1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_BLOCK_BYTES", block)  # so that a small shard has many blocks
        assert damaged_samples(file) == expected


def test_damaged_checksums_accuse_no_sample(files: list[DataFile]):
    write_checksums(files[0].path, 16)
    content = bytearray(checksum_path(files[0].path).read_bytes())
    content[-1] ^= 1
    checksum_path(files[0].path).write_bytes(content)
    with pytest.raises(ChecksumError, match=r"test-\d+\.xxh3: damaged.*python -m data_prep checksums"):
        damaged_samples(files[0])


def test_a_split_is_opened_from_several_folders_and_checked_in_all_of_them(tmp_path: Path):
    one, other = write_data(tmp_path / "one"), write_data(tmp_path / "other", texts=texts_about("other", 60))
    folders = {folder: read_manifest(folder) for folder in (one, other)}
    files = open_split(folders, "validation")
    assert sorted(file.path for file in files) == sorted(path for f in folders for path in f.glob("validation/*.bin"))
    assert [file.file_id for file in files] == sorted(file.file_id for file in files)
    lost = next(other.glob("validation/*.bin"))
    lost.unlink()
    with pytest.raises(DataError, match=f"{lost}: in the manifest but not on disk"):
        open_split(folders, "validation")
    assert open_split(folders, "train")  # the other split is not concerned

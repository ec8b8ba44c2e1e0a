import itertools
import os
import re
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.checksums import TABLE_OFFSET, checksum_path, write_checksums
from data_prep.manifest import read_manifest
from data_prep.shards import HEADER_BYTES, ShardWriter, open_tokens
from resume import samples as samples_module
from resume.manifest import DataError, DataFile
from resume.samples import NO_SAMPLE, BadSampleError, RowsRead, SampleReader
from resume.verify import open_split
from tests.prepared import write_data

EOS = 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data with checksums for each 16 targets."""
    folder = write_data(tmp_path_factory.mktemp("checked") / "data")
    for record in read_manifest(folder).shards:
        write_checksums(folder / record.file, 16)
    return folder


def files_of(folder: Path) -> list[DataFile]:
    return open_split({folder: read_manifest(folder)}, "train")


def make_reader(files: Sequence[DataFile], sequence_length: int = 32, vocab_size: int = 300, **options) -> SampleReader:
    return SampleReader(files, sequence_length=sequence_length, vocab_size=vocab_size, eos_id=EOS, **options)


def read(reader: SampleReader, wanted: Sequence[tuple[int, int]]) -> tuple[RowsRead, np.ndarray]:
    """The rows of (file, sample) pairs, in memory that held something else before, and one row too many."""
    rows = np.full((len(wanted) + 1, reader.sequence_length + 1), 77, dtype=reader.dtype)
    found = reader.read_into(*np.array(wanted, dtype=np.int64).reshape(-1, 2).T, rows)
    assert (rows[-1] == 77).all()
    return found, rows[:-1]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes([old ^ 1]))


@settings(max_examples=20)
@given(length=st.integers(1, 700))
def test_every_token_of_a_shard_but_its_first_is_a_target_once(checked: Path, length: int):
    files = files_of(checked)
    reader = make_reader(files, length)
    assert reader.num_checked_files == (len(files) if length % 16 == 0 else 0)
    for index, file in enumerate(files):
        found, rows = read(reader, [(index, i) for i in range(file.num_samples(length))])
        num_targets = found.num_targets.tolist()
        assert all(1 <= n <= length for n in num_targets)
        targets = np.concatenate([row[1 : n + 1] for row, n in zip(rows, num_targets, strict=True)])
        assert np.array_equal(targets, open_tokens(file.path)[1:])
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))
        assert (rows[-1][num_targets[-1] + 1 :] == EOS).all()
    reader.close()


@given(st.data())
def test_rows_do_not_depend_on_their_company(data: Path, draw: st.DataObject):
    files = files_of(data)
    reader = make_reader(files)
    pair = st.tuples(st.integers(0, len(files) - 1), st.one_of(st.integers(0, 25), st.just(NO_SAMPLE)))
    wanted = draw.draw(st.lists(pair, max_size=12))
    together, rows = read(reader, wanted)
    for row, one in enumerate(wanted):
        alone, (expected,) = read(reader, [one])
        assert np.array_equal(rows[row], expected)
        assert together.num_targets[row] == alone.num_targets[0]
    reader.close()


def test_a_sample_behind_the_end_of_its_file_is_eos_without_a_target(data: Path):
    files = files_of(data)
    reader = make_reader(files)
    behind = files[0].num_samples(32)
    found, rows = read(reader, [(0, behind), (0, behind + 5), (0, NO_SAMPLE), (0, behind - 1)])
    assert found.num_targets[:3].tolist() == [0, 0, 0]
    assert (rows[:3] == EOS).all()
    assert found.num_targets[3] > 0
    reader.will_need(np.zeros(3, dtype=np.int64), np.array([behind, NO_SAMPLE, 0]))
    reader.close()


def test_wide_tokens_are_read_as_they_are(tmp_path: Path):
    options = {"vocab_size": 70_000, "tokenizer_digest": "d1", "eos_id": EOS, "shard_tokens": 1_000}
    tokens = np.arange(69_000, 69_100)
    with ShardWriter(tmp_path, "wide", **options) as writer:
        writer.add(tokens)
    ((path, header),) = writer.close()
    write_checksums(path, 50)
    file = DataFile(file_id="f", path=path, dtype=np.dtype("<u4"), num_tokens=header.token_count, source="wide")
    reader = make_reader([file], 50, vocab_size=70_000)
    found, rows = read(reader, [(0, 0), (0, 1), (0, 2)])
    assert found.num_targets.tolist() == [50, 50, 1]
    assert rows[:2, 1:].ravel().tolist() == tokens.tolist()
    reader.close()


def test_files_of_two_dtypes_are_refused(data: Path):
    files = files_of(data)
    other = DataFile(file_id="f", path=Path("other.bin"), dtype=np.dtype("<u4"), num_tokens=10, source="other")
    with pytest.raises(DataError, match=r"one dtype, not .*uint16, other\.bin of uint32"):
        make_reader([files[0], other])


@pytest.mark.parametrize("group_samples", [1, 4])
def test_reading_ahead_changes_nothing(data: Path, group_samples: int):
    reader, plain = (make_reader(files_of(data), group_samples=n) for n in (group_samples, 1))
    wanted = [(1, 3), (0, 0), (1, 2)]
    reader.will_need(*np.array(wanted).T)
    assert np.array_equal(read(reader, wanted)[1], read(plain, wanted)[1])
    for opened in (reader, plain):
        opened.close()


def test_each_group_is_announced_once_and_whole(data: Path, monkeypatch: pytest.MonkeyPatch):
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, num_bytes, __: announced.append((offset, num_bytes)))
    reader = make_reader(files_of(data), group_samples=4)
    for samples in ([5, 4, 0], [7, 3], [9]):
        reader.will_need(np.zeros(len(samples), dtype=np.int64), np.array(samples))
    assert announced == [(HEADER_BYTES + first * 32 * 2, (4 * 32 + 1) * 2) for first in (4, 0, 8)]
    monkeypatch.setattr(samples_module, "_RECENT_GROUPS", 2)
    reader.will_need(np.zeros(1, dtype=np.int64), np.array([16]))
    assert len(reader._recent_groups) == 2
    reader.will_need(np.zeros(1, dtype=np.int64), np.array([4]))
    assert len(announced) == 5  # forgotten, so announced again
    reader.close()


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_files_than_may_be_open_are_read_in_turn(checked: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples_module, "_max_open_files", lambda: 2)
    files = files_of(checked)
    assert len(files) > 3
    before, reader = num_open_files(), make_reader(files)
    for index in [*range(len(files)), 0]:
        assert np.array_equal(read(reader, [(index, 0)])[1][0], open_tokens(files[index].path)[:33])
        assert num_open_files() <= before + 2 * 2  # a shard and its checksums each
    reader.close()
    assert num_open_files() == before


def test_the_soft_limit_of_open_files_is_raised_and_shared(monkeypatch: pytest.MonkeyPatch):
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    unlimited = resource.RLIM_INFINITY
    cases = {
        (1_024, 4_096): ((4_096, 4_096), 512),
        (1_024, unlimited): ((65_536, unlimited), 8_192),
        (1_024, 1_024): (None, 128),
        (unlimited, unlimited): (None, 8_192),
    }
    for limits, (expected, num_files) in cases.items():
        raised.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert samples_module._max_open_files() == num_files
        assert raised == ([] if expected is None else [expected])


def test_a_token_id_beyond_the_vocabulary_names_file_sample_and_id(data: Path):
    reader = make_reader(files_of(data), vocab_size=5)
    name = re.escape(str(reader.files[1].path))
    with pytest.raises(DataError, match=rf"{name}: token id \d+ at token \d+ \(sample 2\).*vocab_size is 5"):
        read(reader, [(0, NO_SAMPLE), (1, 2), (0, 0)])
    reader.close()


def test_a_shard_that_shrinks_while_in_use_is_an_error_not_a_crash(tmp_path: Path):
    files = files_of(write_data(tmp_path / "data"))
    reader = make_reader(files)
    with files[0].path.open("r+b") as file:
        file.truncate(5_000)
    with pytest.raises(DataError, match="truncated while in use"):
        read(reader, [(0, files[0].num_samples(32) - 1)])
    reader.close()


@given(
    at=st.integers(0, 2**20),
    covered=st.sampled_from([1, 8, 16, 32]),
    bad_sample=st.sampled_from(["stop", "quarantine"]),
)
def test_any_flipped_byte_is_found_in_the_samples_that_hold_it_and_in_no_other(
    tmp_path_factory: pytest.TempPathFactory, data: Path, at: int, covered: int, bad_sample: str
):
    original = files_of(data)[0]
    path = tmp_path_factory.mktemp("rotten") / original.path.name
    shutil.copy(original.path, path)
    write_checksums(path, covered)
    at %= original.num_tokens * 2
    flip(path, HEADER_BYTES + at)
    file = DataFile(
        file_id="f", path=path, dtype=original.dtype, num_tokens=original.num_tokens, source=original.source
    )
    reader = make_reader([file], vocab_size=2**16, on_bad_sample=bad_sample)
    assert reader.num_checked_files == 1
    wanted = [(0, i) for i in range(file.num_samples(32))]
    hold_it = [i for _, i in wanted if i * 32 <= at // 2 <= i * 32 + 32]
    assert hold_it
    if bad_sample == "stop":
        place = rf"sample {hold_it[0]} \(tokens {hold_it[0] * 32} to .*resume verify RUN.*on-bad-sample quarantine"
        with pytest.raises(BadSampleError, match=place):
            read(reader, wanted)
    else:
        found, rows = read(reader, wanted)
        assert found.bad_rows == hold_it
        assert (rows[hold_it] == EOS).all()
        assert not found.num_targets[hold_it].any()
        good = [i for _, i in wanted if i not in hold_it]
        unharmed, expected = read(make_reader([original], vocab_size=2**16), [(0, i) for i in good])
        assert np.array_equal(rows[good], expected)
        assert np.array_equal(found.num_targets[good], unharmed.num_targets)
    reader.close()


def test_quarantined_ids_beyond_the_vocabulary_do_not_stop_the_run(tmp_path: Path):
    files = files_of(write_data(tmp_path / "data"))
    write_checksums(files[0].path, 32)
    flip_at = HEADER_BYTES + 2 * 40 + 1
    flip(files[0].path, flip_at)  # the high byte: an id of 256 more, or less
    reader = make_reader(files, on_bad_sample="quarantine", vocab_size=300)
    assert reader.num_checked_files == 1  # the others have no checksums, which is legal
    assert read(reader, [(0, 0), (0, 1), (1, 1)])[0].bad_rows == [1]
    reader.close()


@pytest.mark.parametrize("bad_sample", ["stop", "quarantine"])
def test_a_damaged_checksum_is_told_from_a_damaged_sample(tmp_path: Path, bad_sample: str):
    folder = write_data(tmp_path / "data")
    files = files_of(folder)
    flip(write_checksums(files[0].path, 32), TABLE_OFFSET + 4)
    reader = make_reader(files, on_bad_sample=bad_sample)
    assert read(reader, [(0, 0)])[0].bad_rows == []
    with pytest.raises(DataError, match=r"xxh3: damaged, .*python -m data_prep checksums") as caught:
        read(reader, [(0, 1)])
    assert not isinstance(caught.value, BadSampleError)
    reader.close()


def test_checksums_remade_for_other_samples_meanwhile_accuse_no_sample(tmp_path: Path):
    files = files_of(write_data(tmp_path / "data"))
    write_checksums(files[0].path, 32)
    reader = make_reader(files)
    write_checksums(files[0].path, 16)  # before the reader has opened them
    with pytest.raises(DataError, match="replaced while in use"):
        read(reader, [(0, 1)])
    reader.close()


def test_checksums_of_another_shard_are_refused_at_the_start(tmp_path: Path):
    folder = write_data(tmp_path / "data")
    files = files_of(folder)
    shutil.copy(write_checksums(files[1].path, 32), checksum_path(files[0].path))
    with pytest.raises(DataError, match=rf"made for a shard with .*python -m data_prep checksums {folder}"):
        make_reader(files)

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.manifest import read_manifest
from data_prep.shards import open_tokens
from resume.manifest import DataError, open_split
from resume.samples import SampleReader
from tests.prepared import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@settings(max_examples=20)
@given(length=st.integers(1, 700))
def test_every_token_of_a_shard_but_its_first_is_a_target_once(data: Path, length: int):
    files = open_split(data, read_manifest(data), "train")
    reader = SampleReader(files, sequence_length=length, vocab_size=300)
    for index, file in enumerate(files):
        samples = [reader.read(index, i) for i in range(file.num_samples(length))]
        assert all(2 <= len(sample) <= length + 1 for sample in samples)
        assert np.array_equal(np.concatenate([sample[1:] for sample in samples]), open_tokens(file.path)[1:])
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(samples))
    reader.close()


def test_reading_ahead_changes_nothing(data: Path):
    files = open_split(data, read_manifest(data), "train")
    reader = SampleReader(files, sequence_length=32, vocab_size=300)
    reader.will_need(0, 3)
    assert len(reader.read(0, 3)) == 33
    reader.close()


def test_more_files_than_may_be_open_are_read_in_turn(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resume.samples._MAX_OPEN_FILES", 2)
    files = open_split(data, read_manifest(data), "train")
    assert len(files) > 3
    reader = SampleReader(files, sequence_length=32, vocab_size=300)
    for index in [*range(len(files)), 0]:
        assert np.array_equal(reader.read(index, 0), open_tokens(files[index].path)[:33])
    reader.close()


def test_a_token_id_beyond_the_vocabulary_names_file_sample_and_id(data: Path):
    files = open_split(data, read_manifest(data), "train")
    reader = SampleReader(files, sequence_length=32, vocab_size=5)
    with pytest.raises(DataError, match=r"\.bin: token id \d+ at token \d+ \(sample 0\).*vocab_size is 5"):
        reader.read(0, 0)
    reader.close()


def test_a_shard_that_shrinks_while_in_use_is_an_error_not_a_crash(tmp_path: Path):
    folder = write_data(tmp_path / "data")
    files = open_split(folder, read_manifest(folder), "train")
    reader = SampleReader(files, sequence_length=32, vocab_size=300)
    with files[0].path.open("r+b") as file:
        file.truncate(5_000)
    last = files[0].num_samples(32) - 1
    with pytest.raises(DataError, match="truncated while in use"):
        reader.read(0, last)
    reader.close()

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.chat.row_marks import RowMarks, marks_path, write_marks
from data_prep.shards import ShardError, write_shard


def make_shard(path: Path, num_targets: int, seed: int = 0) -> Path:
    tokens = np.random.default_rng(seed).integers(0, 300, num_targets + 1).astype("<u2")
    write_shard(path, [tokens], vocab_size=300, tokenizer_digest="digest", eos_id=0)
    return path


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 9), st.randoms(use_true_random=False))
def test_rows_come_back_as_they_were_written(tmp_path_factory, length_in_bytes, num_rows, rng):
    length = 8 * length_in_bytes
    shard = make_shard(tmp_path_factory.mktemp("marks") / "a.bin", num_rows * length)
    trained, starts = (np.array([rng.random() < p for _ in range(num_rows * length)]) for p in (0.5, 0.1))
    write_marks(shard, trained, starts)
    samples = np.array([rng.randrange(num_rows) for _ in range(5)])
    found = RowMarks(shard).rows(samples, length)
    assert (found[0] == trained.reshape(num_rows, length)[samples]).all()
    assert (found[1] == starts.reshape(num_rows, length)[samples]).all()
    assert found[0].dtype == found[1].dtype == bool


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    made = make_shard(tmp_path / "a.bin", 64)
    write_marks(made, np.arange(64) % 2 == 0, np.arange(64) % 16 == 0)
    return made


@pytest.mark.parametrize("place", [0, 9, 17, 30, 50, 64, 79])
def test_any_damaged_byte_is_noticed(shard: Path, place: int):
    content = bytearray(marks_path(shard).read_bytes())
    assert len(content) == 64 + 2 * 8
    content[place] ^= 1
    marks_path(shard).write_bytes(content)
    with pytest.raises(ShardError, match=r"a.marks: damaged; prepare the conversations again"):
        RowMarks(shard)


@pytest.mark.parametrize("content", [b"", b"x", b"BESSMARK" + bytes(60)])
def test_a_file_cut_short_is_noticed(shard: Path, content: bytes):
    marks_path(shard).write_bytes(content)
    with pytest.raises(ShardError, match="a.marks"):
        RowMarks(shard)


def test_marks_of_another_shard_are_refused(shard: Path, tmp_path: Path):
    other = make_shard(tmp_path / "b.bin", 64, seed=1)
    marks_path(other).write_bytes(marks_path(shard).read_bytes())
    with pytest.raises(ShardError, match=r"made for another shard than b.bin"):
        RowMarks(other)


def test_missing_marks_and_odd_rows_are_refused(shard: Path, tmp_path: Path):
    with pytest.raises(ShardError, match="cannot read the marks"):
        RowMarks(make_shard(tmp_path / "c.bin", 8))
    with pytest.raises(ShardError, match="rows of 12 tokens"):
        RowMarks(shard).rows(np.array([0]), 12)

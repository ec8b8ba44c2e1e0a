from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume.manifest import DataFile
from resume.order import Order
from train.loader import rank_positions


def files_of(token_counts: list[int]) -> list[DataFile]:
    return [
        DataFile(file_id=f"{i:04}", path=Path(f"/nowhere/{i}"), dtype=np.dtype("<u2"), num_tokens=count)
        for i, count in enumerate(token_counts)
    ]


token_counts = st.lists(st.integers(2, 200), min_size=1, max_size=8)


@given(counts=token_counts, length=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_every_epoch_visits_every_sample_once(counts: list[int], length: int, seed: int, epoch: int):
    files = files_of(counts)
    order = Order(files, seed=seed, sequence_length=length)
    n = order.samples_per_epoch
    visited = list(zip(*(a.tolist() for a in order.resolve(np.arange(epoch * n, (epoch + 1) * n))), strict=True))
    expected = [(f, s) for f, file in enumerate(files) for s in range(file.num_samples(length))]
    assert sorted(visited) == expected


@given(counts=token_counts, cuts=st.lists(st.integers(0, 300), max_size=5))
def test_slicing_positions_does_not_change_the_order(counts: list[int], cuts: list[int]):
    order = Order(files_of(counts), seed=1, sequence_length=16)
    whole = np.stack(order.resolve(np.arange(300)))
    pieces = [np.stack(order.resolve(piece)) for piece in np.split(np.arange(300), sorted(cuts))]
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)


def test_the_order_depends_on_content_not_on_listing_order_or_paths():
    files = files_of([100, 200, 300])
    moved = [
        DataFile(file_id=f.file_id, path=Path("/moved") / f.path.name, dtype=f.dtype, num_tokens=f.num_tokens)
        for f in files
    ]
    one = Order(files, seed=1, sequence_length=8)
    other = Order(list(reversed(moved)), seed=1, sequence_length=8)
    for a, b in zip(one.resolve(np.arange(100)), other.resolve(np.arange(100)), strict=True):
        assert np.array_equal(a, b)


def test_epochs_and_seeds_give_different_orders():
    order = Order(files_of([5_000]), seed=1, sequence_length=8)
    n = order.samples_per_epoch
    first, second = order.resolve(np.arange(n))[1], order.resolve(np.arange(n, 2 * n))[1]
    other = Order(files_of([5_000]), seed=2, sequence_length=8).resolve(np.arange(n))[1]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_an_order_of_no_files_is_refused():
    with pytest.raises(ValueError, match="no files"):
        Order([], seed=1, sequence_length=8)


@given(
    start=st.integers(0, 1_000),
    world_size=st.integers(1, 8),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
)
def test_ranks_of_any_number_share_each_step_without_gap_or_overlap(
    start: int, world_size: int, micro_batch: int, accumulation: int
):
    batch = world_size * micro_batch * accumulation
    for step in range(2):
        read = []
        for rank in range(world_size):
            positions = rank_positions(
                start, batch_sequences=batch, micro_batch=micro_batch, rank=rank, world_size=world_size
            )
            groups = [next(positions) for _ in range(accumulation * (step + 1))][accumulation * step :]
            read += np.concatenate(groups).tolist()
        assert sorted(read) == list(range(start + step * batch, start + (step + 1) * batch))

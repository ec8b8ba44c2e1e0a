import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.chat.packing import Document, pack, pack_rows
from data_prep.chat.turns import Kind
from data_prep.chat.units import fitted


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """What is left of each bin, by the obvious search."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None)
@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_all_items_are_packed_once_as_full_as_best_fit_decreasing_does(case: tuple[int, list[int]]):
    capacity, lengths = case
    bins = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    rooms = sorted(capacity - sum(lengths[item] for item in items) for items in bins)
    assert rooms == plain_best_fit(lengths, capacity)
    assert not rooms or rooms[0] >= 0


@pytest.mark.parametrize("capacity", [512, 2048, 8192])
def test_rows_of_ordinary_conversations_are_full_to_995_in_a_thousand(capacity: int):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1, 20_000).astype(np.int64), 8, capacity)
    bins = pack(lengths, capacity)
    assert lengths.sum() / (len(bins) * capacity) >= 0.995


@pytest.mark.slow
def test_a_million_conversations_are_packed_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1, 1_000_000).astype(np.int64), 8, 2048)
    started_s = time.process_time()
    bins = pack(lengths, 2048)
    assert time.process_time() - started_s < 10
    assert lengths.sum() / (len(bins) * 2048) >= 0.999


def document(length: int, number: int) -> Document:
    return Document(np.full(length, number, np.uint16), np.arange(length) % 3 == 1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2), min_size=1, max_size=20),
    st.sampled_from(["chat", "pairs", "prompts"]),
)
def test_rows_hold_whole_units_with_their_marks_and_end_in_eos(lengths: list[list[int]], kind: Kind):
    eos, numbers = 0, iter(range(1, 100))
    units = [[document(length, next(numbers)) for length in of_unit] for of_unit in lengths]
    rows = pack_rows(units, 16, eos, kind=kind)
    found = []
    for tokens, is_trained, is_first, first_unit in zip(*rows, strict=True):
        starts = np.flatnonzero(is_first).tolist()
        assert starts[0] == 0
        here = []
        for first, stop in zip(starts, [*starts[1:], 16], strict=True):
            if tokens[first] == eos:
                assert stop == 16
                assert not tokens[first:].any()
                assert not is_trained[first:].any()
            else:
                here.append((set(tokens[first:stop].tolist()), stop - first))
                assert is_trained[first:stop].tolist() == document(stop - first, 1).is_trained.tolist()
        assert here[0] == ({int(units[first_unit][0].tokens[0])}, len(units[first_unit][0].tokens))
        found += here
    expected = [({int(d.tokens[0])}, len(d.tokens)) for unit in units for d in unit]
    assert sorted(found, key=str) == sorted(expected, key=str)
    if kind == "prompts":
        assert len(rows.tokens) == len(units)
    for unit in units:  # the second of a pair stands behind the first
        if len(unit) == 2:
            (row, at), *_ = np.argwhere(rows.tokens == unit[0].tokens[0])
            assert rows.tokens[row, at + len(unit[0].tokens)] == unit[1].tokens[0]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([10], [10]),
        ([17], [16]),
        ([8, 8], [8, 8]),
        ([3, 30], [3, 13]),
        ([30, 3], [13, 3]),
        ([20, 20], [8, 8]),
        ([9, 8], [8, 8]),
        ([6, 12], [6, 10]),
    ],
)
def test_what_is_longer_than_a_row_is_cut_at_its_end(lengths: list[int], expected: list[int]):
    cut = fitted([document(length, 1) for length in lengths], 16)
    assert [len(d.tokens) for d in cut] == [len(d.is_trained) for d in cut] == expected
    assert all(d.is_trained.tolist() == document(len(d.tokens), 1).is_trained.tolist() for d in cut)

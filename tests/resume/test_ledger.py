"""The books add up over ranks in any way, and tell a sample trained twice from two."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume import ledger as ledgers
from resume.ledger import Ledger, Quarantined, sample_hashes
from resume.manifest import DataError

NAMES = ["a", "b", "c"]
Booked = list[tuple[int, int]]
samples = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2**40)), max_size=30)


def booked(entries: Booked, length: int = 32) -> Ledger:
    books = Ledger(NAMES)
    files, numbers = (np.array([entry[i] for entry in entries], dtype=np.int64) for i in range(2))
    books.add(files, numbers, length)
    return books


def content(books: Ledger) -> Any:
    return books.to_json()


@given(samples, st.lists(st.integers(0, 3), min_size=30, max_size=30), st.randoms(use_true_random=False))
def test_the_books_of_ranks_add_up_to_the_whole_however_samples_are_split(entries: Booked, ranks: list[int], random):
    whole = booked(entries)
    shuffled = list(zip(ranks, entries, strict=False))
    random.shuffle(shuffled)
    parts = [booked([entry for rank, entry in shuffled if rank == r]) for r in range(4)]
    assert np.array_equal(sum(part.counts for part in parts), whole.counts)
    # As torch adds them over ranks: as signed numbers that wrap.
    digests = sum((part.digests.view(np.int64) for part in parts), np.zeros(3, dtype=np.int64))
    assert np.array_equal(digests.view(np.uint64), whole.digests)


@given(samples, st.integers(0, 30))
def test_booking_at_once_or_step_by_step_is_the_same(entries: Booked, at: int):
    by_steps = booked(entries[:at])
    files, numbers = (np.array([entry[i] for entry in entries[at:]], dtype=np.int64) for i in range(2))
    by_steps.add(files, numbers, 32)
    assert content(by_steps) == content(booked(entries))


@given(samples, st.permutations(["a", "b", "c", "new", "another"]))
def test_books_that_move_to_another_order_keep_what_each_file_had(entries: Booked, names: list[str]):
    books = booked(entries)
    books.quarantined = [Quarantined("b", 64, 32, 7)]
    moved = books.moved_to(names)
    for i, name in enumerate(names):
        old = NAMES.index(name) if name in NAMES else None
        assert moved.counts[i] == (0 if old is None else books.counts[old])
        assert moved.digests[i] == (0 if old is None else books.digests[old])
    assert moved.quarantined == books.quarantined
    moved.add(np.array([0]), np.array([3]), 32)
    moved.quarantined.append(Quarantined("a", 0, 32, 8))
    assert content(books) == content(booked(entries)) | {"quarantined": [("b", 64, 32, 7)]}  # a copy, not a view


@given(samples)
def test_books_survive_json(entries: Booked):
    books = booked(entries)
    books.quarantined, books.not_applied = [Quarantined("b", 2**40, 32, 7)], [3, 9]
    read = ledgers.from_json(json.loads(json.dumps(books.to_json())), NAMES)
    assert content(read) == content(books)
    assert (read.counts.dtype, read.digests.dtype) == (np.int64, np.uint64)
    assert (read.quarantined, read.not_applied) == (books.quarantined, books.not_applied)


GOOD = {"counts": [1, 0, 2], "digests": ["a", "0", "ff"], "quarantined": [["a", 0, 32, 1]], "not_applied": [4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1, 2]}, "has 2 files, its state 3"),
        ({"digests": ["a", "0", "ff", "0"]}, "damaged|has 3 files"),
        ({"counts": None}, "damaged"),
        ({"counts": 3}, "damaged"),
        ({"counts": [1, 0, "x"]}, "damaged"),
        ({"counts": [1, 0, None]}, "damaged"),
        ({"counts": [1, 0, 2**70]}, "damaged"),
        ({"digests": [1, 2, 3]}, "damaged"),
        ({"digests": ["a", "0", "xyz"]}, "damaged"),
        ({"digests": ["a", "0", "f" * 17]}, "damaged"),
        ({"digests": ["a", "0", "-1"]}, "damaged"),
        ({"quarantined": [["a", 0, 32]]}, "damaged"),
        ({"quarantined": 5}, "damaged"),
        ({"quarantined": [["a", 0, 0, 1]]}, "damaged"),
        ({"quarantined": [["a", -32, 32, 1]]}, "damaged"),
        ({"quarantined": [["a", "0", 32, 1]]}, "damaged"),
        ({"quarantined": [[7, 0, 32, 1]]}, "damaged"),
        ({"not_applied": ["x"]}, "damaged"),
    ],
)
def test_damaged_books_are_refused(change: dict[str, Any], message: str):
    assert ledgers.from_json(GOOD, NAMES).counts.tolist() == [1, 0, 2]
    with pytest.raises(DataError, match=f"record of trained samples.*({message})"):
        ledgers.from_json({**GOOD, **change}, NAMES)


@pytest.mark.parametrize("missing", ["counts", "digests", "quarantined", "not_applied"])
def test_books_without_a_field_are_refused(missing: str):
    with pytest.raises(DataError, match=f"damaged.*{missing}"):
        ledgers.from_json({name: value for name, value in GOOD.items() if name != missing}, NAMES)


def test_one_sample_twice_is_not_two_samples():
    twice, two = booked([(0, 5), (0, 5)]), booked([(0, 5), (0, 6)])
    assert twice.counts[0] == two.counts[0] == 2
    assert twice.digests[0] != two.digests[0]
    assert (
        len({int(booked(list(pair)).digests[0]) for pair in itertools.combinations([(0, i) for i in range(40)], 2)})
        == 780
    )


def test_samples_of_other_lengths_are_others_though_they_begin_at_the_same_token():
    firsts = np.arange(0, 4_096, 32)
    hashes = [sample_hashes(firsts, length) for length in (8, 16, 32, 2_048)]
    assert len(set(np.concatenate(hashes).tolist())) == 4 * len(firsts)
    # Four samples of 8 are not one of 32.
    assert booked([(0, i) for i in range(4)], length=8).digests[0] != booked([(0, 0)]).digests[0]


def test_nothing_booked_changes_nothing():
    assert content(booked([])) == {"counts": [0, 0, 0], "digests": ["0" * 16] * 3, "quarantined": [], "not_applied": []}

"""Invariants I1-I4, I6 and I10 of the data order, over random histories. `make test-slow` runs ten thousand more."""

import collections
import contextlib
from collections.abc import Callable

import pytest

from resume.chain import Fate
from tests.resume.histories import run_history
from tests.resume.oracle import BrokenPromiseError, Truth
from tests.resume.tables import computed_once

OPERATIONS = ["train", "save", "kill", "append", "remove", "skip", "requeue", "reweight", "batch", "refuse"]


def test_random_histories_keep_every_promise():
    counts: collections.Counter[str] = collections.Counter()
    most_epochs = 0
    for seed in range(50):
        # One in ten with the real permutations, without tables.
        with contextlib.nullcontext() if seed % 10 == 0 else computed_once():
            history = run_history(seed)
        counts.update(line.split()[0].rstrip(",") for line in history.trail)
        counts["again"] += any("kill" in a and "kill" in b for a, b in zip(history.trail, history.trail[1:]))
        most_epochs = max(most_epochs, history.num_epochs)
    # The histories are worth something: everything happens, and often.
    assert all(counts[operation] >= 5 for operation in OPERATIONS), counts
    assert counts["again"] >= 3
    assert most_epochs >= 3


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1_000, 11_000, 500))
def test_ten_thousand_random_histories_keep_every_promise(first: int):
    for seed in range(first, first + 500):
        with computed_once():
            run_history(seed)


def truth_of(**max_epochs: int) -> Truth:
    truth = Truth(max_epochs, ["web"])
    truth.append({"web": {"x": 2, "y": 1}})
    return truth


ALL = [("x", 0), ("y", 0), ("x", 1)]


def skipped_twice(truth: Truth) -> None:
    truth.takes(ALL[:1], Fate.SKIPPED)
    truth.takes(ALL[:1], Fate.SKIPPED)


def drawn_after_its_removal(truth: Truth) -> None:
    truth.remove(["y"])
    truth.takes(ALL)


def drawn_after_it_was_given_up(truth: Truth) -> None:
    truth.takes(ALL[:1], Fate.DROPPED)
    truth.takes(ALL[1:])
    truth.takes(ALL)


def drawn_too_soon_after_a_skip(truth: Truth) -> None:
    truth.takes(ALL[:1], Fate.SKIPPED)
    truth.takes([ALL[1], ALL[0], ALL[2]])


def drawn_without_weight(truth: Truth) -> None:
    truth.reweight(0, {"web": 1.0})
    truth.reweight(2, {"web": 0.0})
    truth.takes(ALL)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        (lambda truth: truth.takes([*ALL, ("x", 0)] * 2), "is SEEN|is DRAWN, not unseen|twice in epoch 1"),
        (lambda truth: truth.takes([("x", 0), ("x", 0)]), "twice in epoch 0"),
        (lambda truth: truth.takes([("x", 2)]), r"\('x', 2\) is ABSENT, not unseen"),
        (skipped_twice, "is SKIPPED, not unseen"),
        (drawn_after_its_removal, r"\('y', 0\) is REMOVED, not unseen|nothing left|ABSENT"),
        (drawn_after_it_was_given_up, "is DROPPED, not unseen"),
        (drawn_too_soon_after_a_skip, "is SKIPPED, not unseen"),
        (drawn_without_weight, "position 2 draws from web, which has no weight there"),
        (lambda truth: truth.takes(ALL * 3), "position 6 holds .* nothing left to give"),
    ],
)
def test_the_oracle_notices_what_must_not_be(history: Callable[[Truth], None], message: str):
    with pytest.raises(BrokenPromiseError, match=message):
        history(truth_of(web=2))


def test_the_oracle_agrees_with_what_may_be():
    truth = truth_of(web=2)
    truth.takes(ALL[:2], Fate.SKIPPED)
    truth.append({"web": {"z": 1}})
    truth.takes([("z", 0), ("x", 0), ("x", 1), ("y", 0), ("y", 0), ("z", 0), ("x", 0), ("x", 1)])
    assert [len(epoch.seen) for epoch in truth.sources["web"].epochs] == [4, 4]
    assert not truth.sources["web"].can_draw

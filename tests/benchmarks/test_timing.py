import itertools

import pytest

from benchmarks.timing import Budget, Ceiling, Ratio, interleave, is_noisy, num_sets, ratio, warm_up
from tests.benchmarks.host_clock import HostClock


class Scripted:
    """Timed calls whose durations are given, and which write down when they ran."""

    how = "graph"

    def __init__(self, name: str, durations_s: list[float], log: list[str]):
        self.name, self.log, self._durations_s = name, log, itertools.cycle(durations_s)

    def seconds(self) -> float:
        self.log.append(self.name)
        return next(self._durations_s)


def test_a_ratio_is_the_median_of_the_rounds_so_that_slow_rounds_that_hit_both_do_not_count():
    ours = [1.0, 10.0, 1.0, 1.0, 1.0]
    theirs = [2.0, 20.0, 2.0, 3.0, 2.0]
    assert ratio(ours, theirs) == Ratio(2.0, 2.0, 2.0)


def test_percentiles_are_those_of_the_ratios():
    found = ratio([1.0] * 10, [float(n) for n in range(1, 11)])
    assert (found.p20, found.median, found.p80) == (3.0, 5.5, 8.0)
    assert str(found) == "5.50 (3.00-8.00)"


def test_sides_that_were_measured_in_different_rounds_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("median", "expected"), [(1.0, False), (1.009, False), (0.991, False), (1.011, True), (0.98, True)]
)
def test_a_kernel_that_differs_from_itself_by_more_than_a_percent_is_noise(median: float, expected: bool):
    assert is_noisy(Ratio(median, median, median)) is expected


def test_every_other_round_runs_backwards():
    log: list[str] = []
    timed = {name: Scripted(name, [duration_s], log) for name, duration_s in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    assert interleave(timed, 3) == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [3.0] * 3}
    assert "".join(log) == "abccbaabc"


def test_warming_up_nothing_ends():
    assert warm_up({}, 60.0) == 0.0


def test_the_copy_ceiling_is_interpolated_over_the_logarithm_of_the_size():
    ceiling = Ceiling(((100, 1.0), (10_000, 3.0), (1_000_000, 3.5)))
    assert ceiling.at(1_000) == pytest.approx(2.0)
    assert ceiling.at(100_000) == pytest.approx(3.25)
    assert [ceiling.at(size) for size in (100, 10_000, 1_000_000)] == [1.0, 3.0, 3.5]


def test_beyond_what_was_measured_the_ceiling_is_that_of_the_nearest_size():
    ceiling = Ceiling(((100, 1.0), (10_000, 3.0)))
    assert (ceiling.at(1), ceiling.at(10**9)) == (1.0, 3.0)


def test_a_budget_is_spent_when_its_time_is_over():
    now_s = 100.0
    budget = Budget(10, lambda: now_s)
    assert (budget.left_s, budget.is_spent) == (10, False)
    now_s = 110.0
    assert (budget.left_s, budget.is_spent) == (0, True)


@pytest.mark.parametrize(
    ("set_bytes", "at_least", "expected"),
    [
        (100, 2, 16),  # many small ones, but not without bound
        (1_000, 2, 3),  # three times the cache
        (10_000, 2, 2),  # one is more than that, and two are the fewest
        (10_000, 5, 5),
        (90_000, 2, 2),
        (150_000, 2, 1),  # no more than a share of the memory
        (10**9, 2, 1),
    ],
)
def test_input_sets_exceed_the_cache_and_fit_the_memory(set_bytes: int, at_least: int, expected: int):
    assert num_sets(set_bytes, HostClock(cache_bytes=1_000, free=1_000_000), at_least) == expected

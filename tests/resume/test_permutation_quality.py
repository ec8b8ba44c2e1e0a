"""A battery of statistics that sees what is not a random order, and networks and formulas that it must reject.

Every statistic is standardised by its mean and variance under uniformly random permutations, then averaged over keys:
under that hypothesis each score is about a standard normal number. Keys are 0, 1, 2, ..., so a score is the same on
every run and machine. The battery is itself tested both ways: NumPy's shuffle passes, weak orders fail.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from resume.permutation import Permutation

Order = NDArray[np.int64]
MakeOrder = Callable[[int, int], Order]
"""(n, key) -> the order, an array (n,)."""

_LIMIT = 5.0
# Orders of one size are examined together, in groups of about so many values.
_GROUP_VALUES = 1_000_000
_SIZES = [(16, 6_000), (50, 5_000), (257, 3_000), (1_000, 500), (5_003, 200), (100_000, 20)]
"""(n, keys), a few seconds for all."""
_SLOW_SIZES = [(16, 60_000), (50, 60_000), (257, 60_000), (1_000, 20_000), (1_024, 40_000), (1_025, 40_000)]
_SLOW_SIZES += [(5_003, 8_000), (100_000, 200), (1_000_000, 40), (3_000_017, 8)]


def network(num_rounds: int | None = None) -> MakeOrder:
    """The production network, by default with its own number of rounds."""
    return lambda n, key: Permutation(n, key, num_rounds=num_rounds)(np.arange(n)).astype(np.int64)


def affine(n: int, key: int) -> Order:
    """The order a i + c mod n, of which many loaders are content."""
    rng = np.random.default_rng(key)
    a = next(a for a in iter(lambda: int(rng.integers(1, n)), 0) if math.gcd(a, n) == 1)
    return (a * np.arange(n) + int(rng.integers(n))) % n


def shuffle(n: int, key: int) -> Order:
    """A uniformly random order: what the battery must not reject."""
    return np.random.default_rng(key).permutation(n)


def chain(n: int, key: int) -> Order:
    """The order of the last of eleven generations, as ranks within its pool of n samples.

    A generation's pool is the unseen rest of the one before and a new file; a third of each is consumed.
    """
    sizes = [n]
    for _ in range(10):
        sizes.append(math.ceil(sizes[-1] * 1.2))  # backwards: four fifths of a pool are the rest of the one before
    sizes.reverse()
    order = Permutation(sizes[0], key)(np.arange(sizes[0])).astype(np.int64)
    num_samples = sizes[0]
    for generation, size in enumerate(sizes[1:], start=1):
        rest = order[len(order) // 3 :]
        new = np.arange(num_samples, num_samples + size - len(rest))
        num_samples += len(new)
        order = np.concatenate([rest, new])[Permutation(size, key * 16 + generation)(np.arange(size))]
    ranks = np.empty(n, dtype=np.int64)
    ranks[np.argsort(order)] = np.arange(n)
    return ranks


def battery(make: MakeOrder, n: int, num_keys: int) -> dict[str, float]:
    """Every statistic's score, a standard normal number if `make` draws orders of n uniformly."""
    totals: dict[str, float] = {}
    heads: list[NDArray] = []
    for orders in _groups(make, n, num_keys):
        for name, values in _scores(orders).items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
        heads.append(orders[:, [0, 1, n // 2, n - 1]])
    return {name: total / math.sqrt(num_keys) for name, total in totals.items()} | _head_scores(
        np.concatenate(heads), n
    )


def suspects(scores: dict[str, float]) -> dict[str, float]:
    """The scores that a good order would not have."""
    return {name: round(score, 1) for name, score in scores.items() if abs(score) >= _LIMIT}


def _groups(make: MakeOrder, n: int, num_keys: int) -> Iterator[NDArray]:
    group = max(1, _GROUP_VALUES // n)
    for first in range(0, num_keys, group):
        yield np.stack([make(n, key) for key in range(first, min(first + group, num_keys))])


def _scores(orders: NDArray) -> dict[str, NDArray]:
    """Scores of each order (K, n): the name of a statistic -> values (K,) of mean 0 and variance 1."""
    n = orders.shape[1]
    at = np.arange(n)
    cells = min(64, math.isqrt(n))
    low = min(16, math.isqrt(n))
    files = min(32, n // 4)
    scores = {
        "position x value": _independence(at * cells // n, orders * cells // n),
        "low bits": _independence(at % low, orders % low),
        "files per batch": _independence(at // min(512, n // 8), orders * files // n),
        "steps": _steps(orders),
        "index correlation": _correlation(orders, np.broadcast_to(at, orders.shape)) * math.sqrt(n - 1),
    }
    for lag in range(1, 5):
        scores[f"lag {lag}"] = _serial(orders, lag)
    # A correlation whose sign depends on the key cancels in the mean, its square does not.
    for name in ["index correlation", *(f"lag {lag}" for lag in range(1, 5))]:
        scores[f"{name} squared"] = (scores[name] ** 2 - 1) / math.sqrt(2)
    fixed = (orders == at).sum(axis=1) - 1.0  # the number of fixed points has mean and variance 1
    return scores | {"fixed points": fixed, "fixed points squared": (fixed**2 - 1) / math.sqrt(3)}


def _independence(rows: NDArray, columns: NDArray) -> NDArray:
    """Pearson's chi2 of the table row(position) x column(value), whose margins every permutation shares.

    Source: Haldane, "The mean and variance of chi2 ... when used as a test of homogeneity, when expectations are
    small", 1940 (exact).
    """
    keys, n = columns.shape
    row_sums, column_sums = np.bincount(rows), np.bincount(columns[0])
    shape = (len(row_sums), len(column_sums))
    cell = (np.arange(keys)[:, None] * shape[0] + rows) * shape[1] + columns
    counts = np.bincount(cell.ravel(), minlength=keys * shape[0] * shape[1]).reshape(keys, *shape)
    chi2 = n * ((counts**2 / np.outer(row_sums, column_sums)).sum(axis=(1, 2)) - 1)
    mean = n / (n - 1) * (shape[0] - 1) * (shape[1] - 1)
    (v1, w1), (v2, w2) = (_margin(sums, n) for sums in (row_sums, column_sums))
    variance = 2 * n / (n - 3) * (v1 - w1) * (v2 - w2) + n * n / (n - 1) * w1 * w2
    return (chi2 - mean) / math.sqrt(variance)


def _margin(sums: NDArray, n: int) -> tuple[float, float]:
    k = len(sums)
    return (k - 1) * (n - k) / (n - 1), float((n / sums).sum() - k * k) / (n - 2)


def _steps(orders: NDArray) -> NDArray:
    """Chi2 of (pi(i + 1) - pi(i)) mod n, around the circle, in at most 200 bins; the mean is exact."""
    keys, n = orders.shape
    bins = min(200, n - 1)
    bin_of = np.arange(n - 1) * bins // (n - 1)  # of step - 1: a step is never 0
    expected = np.bincount(bin_of) * (n / (n - 1))
    steps = (np.roll(orders, -1, axis=1) - orders) % n
    cell = np.arange(keys)[:, None] * bins + bin_of[steps - 1]
    counts = np.bincount(cell.ravel(), minlength=keys * bins).reshape(keys, bins)
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1)
    mean = float((_step_variances(n, bin_of) / expected).sum())
    return (chi2 - mean) / math.sqrt(2 * bins)


def _step_variances(n: int, bin_of: NDArray) -> NDArray:
    """Exact variances of the counts of steps per bin.

    Counting the ways to place two steps d and e on a circle gives E[c_d c_e] = n/(n-1) in general, n/(n-2) (of ordered
    pairs) for d = e, n(n-3)/((n-1)(n-2)) for d = -e. A step of n/2 is its own opposite, and counts as general.
    """
    p = n / (n - 1)
    general, same, opposite = p - p * p, n / (n - 2) - p * p, p * (n - 3) / (n - 2) - p * p
    half = np.arange(1, n) * 2 == n
    num_same = np.bincount(bin_of[~half], minlength=bin_of[-1] + 1)
    num_opposite = np.bincount(bin_of[~half & (bin_of == bin_of[::-1])], minlength=bin_of[-1] + 1)
    size = np.bincount(bin_of)
    num_general = size**2 - num_same - num_opposite
    return size * p + num_same * same + num_opposite * opposite + num_general * general


def _correlation(x: NDArray, y: NDArray) -> NDArray:
    """Pearson's r of each row of two arrays of permutations of 0..n-1."""
    n = x.shape[1]
    mean, square_sum = (n - 1) / 2, n * (n * n - 1) / 12
    return np.einsum("ki,ki->k", x - mean, y - mean) / square_sum


def _serial(orders: NDArray, lag: int) -> NDArray:
    """Circular serial correlation; mean and variance of Wald and Wolfowitz, 1943 (exact)."""
    n = orders.shape[1]
    x = np.arange(n) - (n - 1) / 2
    s2, s4 = float((x**2).sum()), float((x**4).sum())
    mean = -1 / (n - 1)
    variance = ((s2**2 - s4) / (n - 1) + (s2**2 - 2 * s4) / ((n - 1) * (n - 2))) / s2**2 - mean**2
    return (_correlation(orders, np.roll(orders, -lag, axis=1)) - mean) / math.sqrt(variance)


def _head_scores(heads: NDArray, n: int) -> dict[str, float]:
    """Over all keys: where the first, second, middle and last position lead, and the first step."""
    scores = {f"pi({name})": _uniform(heads[:, i], n) for i, name in enumerate(["0", "1", "n/2", "n-1"])}
    return scores | {"pi(1)-pi(0)": _uniform((heads[:, 1] - heads[:, 0]) % n - 1, n - 1)}


def _uniform(values: NDArray, n: int) -> float:
    """Score of chi2 of independent values in 0..n-1, in bins that expect five or more."""
    bins = min(n, len(values) // 5)
    if bins < 2:
        return 0.0
    expected = np.bincount(np.arange(n) * bins // n) * (len(values) / n)
    counts = np.bincount(values * bins // n, minlength=bins)
    return (float(((counts - expected) ** 2 / expected).sum()) - (bins - 1)) / math.sqrt(2 * (bins - 1))


def all_orders_score(make: MakeOrder, n: int, num_keys: int) -> float:
    """Score of chi2 of all n! orders over the keys."""
    names = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    drawn = np.array([names[tuple(make(n, key).tolist())] for key in range(num_keys)])
    return _uniform(drawn, len(names))


@pytest.mark.parametrize(("n", "num_keys"), _SIZES)
def test_the_order_is_as_random_as_the_battery_can_tell(n: int, num_keys: int):
    assert not suspects(battery(network(), n, num_keys))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "num_keys"), _SLOW_SIZES)
def test_the_order_is_as_random_as_the_battery_can_tell_from_many_keys(n: int, num_keys: int):
    assert not suspects(battery(network(), n, num_keys))


@pytest.mark.parametrize(("n", "num_keys"), _SIZES)
def test_the_battery_accepts_the_shuffle_of_numpy(n: int, num_keys: int):
    assert not suspects(battery(shuffle, n, num_keys))


@pytest.mark.parametrize(("n", "num_keys"), _SIZES)
def test_the_battery_rejects_an_affine_order(n: int, num_keys: int):
    found = suspects(battery(affine, n, num_keys))
    assert "steps" in found
    assert any(name.startswith("lag") for name in found)


@pytest.mark.parametrize(("n", "statistic"), [(16, "pi(1)-pi(0)"), (50, "steps"), (257, "steps"), (1_000, "low bits")])
def test_the_battery_rejects_four_rounds_of_a_small_network(n: int, statistic: str):
    assert statistic in suspects(battery(network(4), n, dict(_SIZES)[n]))


@pytest.mark.slow
def test_the_battery_rejects_four_rounds_of_five_thousand_from_many_keys():
    assert "files per batch" in suspects(battery(network(4), 5_003, 8_000))


def test_the_battery_rejects_six_rounds_of_sixteen():
    assert "steps" in suspects(battery(network(6), 16, 6_000))


@pytest.mark.parametrize("n", [5_003, 100_000])
def test_the_battery_rejects_three_rounds_at_any_size(n: int):
    assert suspects(battery(network(3), n, dict(_SIZES)[n])).keys() & {"low bits", "fixed points squared"}


@pytest.mark.parametrize("n", range(2, 7))
def test_all_orders_of_a_handful_are_equally_likely(n: int):
    assert abs(all_orders_score(network(), n, 4_000)) < _LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("n", range(2, 7))
def test_all_orders_of_a_handful_are_equally_likely_over_many_keys(n: int):
    assert abs(all_orders_score(network(), n, 60_000)) < _LIMIT


@pytest.mark.parametrize("n", [5, 6])
def test_eight_rounds_would_prefer_some_orders_of_a_handful(n: int):
    assert all_orders_score(network(8), n, 6_000) > _LIMIT


def test_ten_appends_leave_an_order_as_random_as_one_permutation():
    assert not suspects(battery(chain, 5_003, 100))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "num_keys"), [(5_000, 4_000), (100_000, 40)])
def test_ten_appends_leave_an_order_as_random_as_one_permutation_from_many_keys(n: int, num_keys: int):
    assert not suspects(battery(chain, n, num_keys))

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume.permutation import Permutation


def test_golden_vectors_hold_on_every_platform_and_version():
    assert Permutation(10, 1)(np.arange(10)).tolist() == [3, 9, 1, 0, 4, 6, 5, 7, 8, 2]
    assert Permutation(1024, 7)(np.array([0, 1, 1023])).tolist() == [801, 391, 332]
    n = 488_000_000
    assert Permutation(n, 7)(np.array([0, 1, n - 1])).tolist() == [281066422, 316706024, 319991580]


@given(n=st.integers(1, 5_000), key=st.integers(0, 2**64 - 1))
def test_every_index_occurs_once_and_the_inverse_finds_it(n: int, key: int):
    permutation = Permutation(n, key)
    indices = permutation(np.arange(n))
    assert np.array_equal(np.sort(indices), np.arange(n))
    assert np.array_equal(permutation.inverse(indices), np.arange(n))


@pytest.mark.parametrize("exponent", [10, 12, 16, 18])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_next_to_powers_of_two_are_bijections(exponent: int, offset: int):
    n = 2**exponent + offset
    assert np.array_equal(np.sort(Permutation(n, n)(np.arange(n))), np.arange(n))


@given(n=st.integers(2**40, 2**62), key=st.integers(0, 2**64 - 1), seed=st.integers(0, 2**32))
def test_huge_sizes_invert(n: int, key: int, seed: int):
    positions = np.random.default_rng(seed).integers(0, n, 100, dtype=np.uint64)
    permutation = Permutation(n, key)
    indices = permutation(positions)
    assert indices.max() < n
    assert np.array_equal(permutation.inverse(indices), positions)


def test_neighbours_land_far_apart_and_uncorrelated():
    n = 100_003
    correlations = []
    for key in range(20):
        indices = Permutation(n, key)(np.arange(n)).astype(np.float64)
        correlations.append(np.corrcoef(indices[:-1], indices[1:])[0, 1] * np.sqrt(n))
    # Twenty standard normals under the null hypothesis; Grain's four Simon rounds score in the hundreds here.
    assert np.abs(correlations).max() < 4.5
    assert abs(np.mean(correlations)) < 4.5 / np.sqrt(20)


def test_all_orders_of_five_are_about_equally_likely():
    orders = [tuple(Permutation(5, key)(np.arange(5)).tolist()) for key in range(6_000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 120
    chi2 = ((counts - 50) ** 2 / 50).sum()
    assert abs(chi2 - 119) < 5 * np.sqrt(2 * 119)


@pytest.mark.parametrize(("n", "key"), [(0, 1), (2**62 + 1, 1), (5, -1), (5, 2**64)])
def test_impossible_sizes_and_keys_are_refused(n: int, key: int):
    with pytest.raises(ValueError, match="Permutation"):
        Permutation(n, key)


def test_a_position_out_of_range_is_refused():
    with pytest.raises(ValueError, match="out of range"):
        Permutation(5, 1)(np.array([5]))

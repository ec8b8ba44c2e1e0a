import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume.permutation import Permutation

# (n, key): indices at the positions 0, 1, n // 2, n - 1, and the positions of the indices 0, 1, n // 2, n - 1. Runs of
# every release rest on them: whoever must change one gives the permutation another name.
GOLDEN = {
    (2, 0): ([0, 1, 1, 1], [0, 1, 1, 1]),
    (3, 1): ([0, 2, 2, 1], [0, 2, 2, 1]),
    (10, 2**64 - 1): ([8, 2, 6, 0], [9, 8, 7, 6]),
    (50, 7): ([30, 16, 33, 13], [6, 13, 37, 5]),
    (1_023, 7): ([425, 145, 212, 327], [103, 964, 866, 66]),
    (1_024, 2**63): ([948, 75, 663, 504], [347, 237, 11, 244]),
    (1_025, 7): ([408, 283, 505, 862], [91, 117, 132, 177]),
    (5_003, 3407): ([1954, 4195, 4931, 3151], [2280, 3665, 1882, 1026]),
    (65_537, 7): ([34042, 14236, 46296, 37032], [50452, 31154, 11226, 2678]),
    (10**6, 7): ([266479, 722114, 741245, 665497], [101660, 160054, 789234, 330026]),
    (488_000_000, 7): (
        [281066422, 316706024, 356634584, 319991580],
        [249793915, 223173502, 118368913, 255336998],
    ),
    (2**32, 7): ([613890549, 3907289290, 837612737, 3318558442], [991706958, 2541370868, 3377953337, 2552275238]),
    (2**32 + 1, 0): ([1037929711, 3605032260, 1960725495, 857957206], [2224995693, 3087585514, 908889499, 3493587022]),
    (10**12, 3407): (
        [91016086680, 665273881667, 118454836219, 655496209833],
        [162820538741, 945216923632, 976903925052, 589889691492],
    ),
    (2**62 - 1, 7): (
        [1957583330730903792, 608893941350476228, 2045613966890447611, 56263033192955192],
        [491097879706702488, 3868481089499805349, 115115720311948017, 3965322949368534041],
    ),
    (2**62, 2**64 - 1): (
        [1506795446131995036, 4095663601594450958, 139158358133023546, 1317100731476320389],
        [3467998625418346981, 626044735603593621, 4066254412597162368, 1686998564299969134],
    ),
}
WORD = 2**64 - 1


class ScalarPermutation:
    """The network written again, one number at a time in Python's own integers."""

    def __init__(self, n: int, key: int):
        self.n = n
        self.a = math.isqrt(n - 1) + 1
        self.b = -(-n // self.a)
        stream = b"".join(hashlib.blake2b(f"perm|{key}|{i}".encode()).digest() for i in range(3))
        words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(24)]
        self.keys = words[: 8 if n >= 1024 else 24]

    def index(self, position: int) -> int:
        while True:
            left, right = divmod(position, self.b)
            for i, key in enumerate(self.keys):
                if i % 2 == 0:
                    left = (left + self.hash(right, key, self.a)) % self.a
                else:
                    right = (right + self.hash(left, key, self.b)) % self.b
            position = left * self.b + right
            if position < self.n:
                return position

    @staticmethod
    def hash(x: int, key: int, modulus: int) -> int:
        t = (x * 0xFF51AFD7ED558CCD + key) & WORD
        t ^= t >> 32
        t = (t * 0xC4CEB9FE1A85EC53) & WORD
        return ((t >> 32) * modulus) >> 32


def assert_bijective(n: int, key: int):
    """Asserts that indices stay below n and that the inverse finds every position: then no two positions share one."""
    positions = np.arange(n, dtype=np.uint64)
    permutation = Permutation(n, key)
    indices = permutation(positions)
    assert int(indices.max()) < n, (n, key)
    assert np.array_equal(permutation.inverse(indices), positions), (n, key)


def test_golden_vectors_hold_on_every_platform_and_version():
    assert Permutation(10, 1)(np.arange(10)).tolist() == [3, 9, 1, 0, 4, 6, 5, 7, 8, 2]
    assert Permutation(1024, 7)(np.array([0, 1, 1023])).tolist() == [801, 391, 332]
    n = 488_000_000
    assert Permutation(n, 7)(np.array([0, 1, n - 1])).tolist() == [281066422, 316706024, 319991580]


@pytest.mark.parametrize(("n", "key"), GOLDEN)
def test_golden_vectors_and_their_inverses_hold_at_every_size(n: int, key: int):
    at = np.array([0, 1, n // 2, n - 1])
    permutation = Permutation(n, key)
    assert (permutation(at).tolist(), permutation.inverse(at).tolist()) == GOLDEN[n, key]


@given(
    n=st.integers(1, 2**62) | st.integers(1, 5_000) | st.integers(2**62 - 100, 2**62),
    key=st.integers(0, WORD),
    seed=st.integers(0, 2**32),
)
def test_the_formula_written_a_second_time_gives_the_same_order(n: int, key: int, seed: int):
    positions = np.random.default_rng(seed).integers(0, n, 20, dtype=np.uint64)
    scalar = ScalarPermutation(n, key)
    assert Permutation(n, key)(positions).tolist() == [scalar.index(int(position)) for position in positions]


def test_every_size_up_to_4096_is_a_bijection_with_its_inverse():
    for n in range(1, 4_097):
        assert_bijective(n, key=n)


@pytest.mark.slow
@pytest.mark.parametrize("key", [0, 1, WORD])
def test_every_size_up_to_4096_is_a_bijection_with_more_keys(key: int):
    for n in range(1, 4_097):
        assert_bijective(n, key)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_sizes_next_to_powers_of_two_are_bijections(offset: int):
    for exponent in range(1, 21):
        assert_bijective(2**exponent + offset, key=exponent)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", range(21, 25))
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_large_sizes_next_to_powers_of_two_are_bijections(exponent: int, offset: int):
    assert_bijective(2**exponent + offset, key=exponent)


@given(n=st.integers(1, 200_000), key=st.integers(0, WORD))
def test_any_size_and_key_make_a_bijection(n: int, key: int):
    assert_bijective(n, key)


@given(n=st.integers(2**40, 2**62), key=st.integers(0, WORD), seed=st.integers(0, 2**32))
def test_huge_sizes_invert(n: int, key: int, seed: int):
    positions = np.random.default_rng(seed).integers(0, n, 100, dtype=np.uint64)
    permutation = Permutation(n, key)
    indices = permutation(positions)
    assert indices.max() < n
    assert np.array_equal(permutation.inverse(indices), positions)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint32, np.uint64, ">i8"])
def test_the_integer_type_of_positions_does_not_matter(dtype: type | str):
    permutation = Permutation(50_001, 3)
    positions = np.arange(50_001).astype(dtype)
    indices = permutation(positions)
    assert indices.dtype == np.uint64
    assert np.array_equal(indices, permutation(np.arange(50_001)))
    assert np.array_equal(permutation.inverse(indices.astype(dtype)), np.arange(50_001))


@given(n=st.integers(1, 40_000), cuts=st.lists(st.integers(0, 40_000), max_size=6))
def test_any_slicing_of_the_positions_gives_the_same_indices(n: int, cuts: list[int]):
    permutation = Permutation(n, 11)
    whole = permutation(np.arange(n))
    parts = np.split(np.arange(n), sorted(min(cut, n) for cut in cuts))
    assert np.array_equal(np.concatenate([permutation(part) for part in parts]), whole)


def test_the_shape_and_memory_layout_of_positions_do_not_matter():
    permutation = Permutation(24_000, 5)
    whole = permutation(np.arange(24_000))
    grid = np.arange(24_000).reshape(20, 30, 40)
    assert np.array_equal(permutation(grid), whole.reshape(grid.shape))
    assert np.array_equal(permutation(grid.T), whole.reshape(grid.shape).T)
    assert np.array_equal(permutation(np.arange(24_000)[::-3]), whole[::-3])
    assert permutation(np.array(7)).shape == ()
    assert int(permutation(np.array(7))) == int(whole[7])
    assert permutation(np.empty((0, 3), dtype=np.int64)).shape == (0, 3)


def test_positions_are_left_as_they_were():
    positions = np.arange(20_000, dtype=np.uint64)
    Permutation(20_000, 1)(positions)
    Permutation(20_000, 1).inverse(positions)
    assert np.array_equal(positions, np.arange(20_000))


def test_another_key_or_size_is_another_order():
    orders = {Permutation(n, key)(np.arange(1_000)).tobytes() for n in (1_000, 1_001, 1_024) for key in range(5)}
    assert len(orders) == 15


@pytest.mark.parametrize(("n", "key"), [(0, 1), (2**62 + 1, 1), (5, -1), (5, 2**64)])
def test_impossible_sizes_and_keys_are_refused(n: int, key: int):
    with pytest.raises(ValueError, match="Permutation"):
        Permutation(n, key)


@pytest.mark.parametrize("position", [5, -1])
def test_a_position_out_of_range_is_refused(position: int):
    with pytest.raises(ValueError, match="out of range"):
        Permutation(5, 1)(np.array([position]))
    with pytest.raises(ValueError, match="out of range"):
        Permutation(5, 1).inverse(np.array([position]))

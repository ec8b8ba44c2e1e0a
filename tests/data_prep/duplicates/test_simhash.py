import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.duplicates import minhash, simhash
from data_prep.duplicates.dedup import find_duplicates
from data_prep.duplicates.minhash import exact_hash
from tests.data_prep.duplicates.test_minhash import MASK, TEXTS, slow_mix, slow_units


def slow_bits(text: str) -> int:
    p, a = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD
    units = slow_units(text)
    windows = [units[start : start + 4] for start in range(len(units) - 3)]
    hashes = [slow_mix(sum(unit * a * p ** (3 - i) for i, unit in enumerate(window)) & MASK) for window in windows]
    if len(windows) < simhash.MIN_SHINGLES:
        return exact_hash(text)[0]
    return sum(1 << bit for bit in range(64) if 2 * sum(h >> bit & 1 for h in hashes) > len(hashes))


@given(st.lists(TEXTS | TEXTS.map(lambda text: text * 9), max_size=6), st.integers(1, 200))
def test_sketches_are_the_majorities_of_a_slow_count_in_any_batch(texts: list[str], batch_units: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_BATCH_UNITS", batch_units)
        bands, sketches = simhash.sketch(texts)
    assert bands.shape == (simhash.NUM_BANDS, len(texts))
    assert [int.from_bytes(row.tobytes(), "little") for row in sketches] == [slow_bits(text) for text in texts]


def test_thousands_of_equal_votes_are_counted() -> None:
    text = "a" * 3_000 + "bcd" * 700
    _, sketches = simhash.sketch([text])
    assert int.from_bytes(sketches.tobytes(), "little") == slow_bits(text)


@given(st.integers(0, MASK), st.sets(st.integers(0, 63), max_size=simhash.MAX_DISTANCE))
def test_sketches_that_differ_in_at_most_three_bits_share_a_band(bits: int, flipped: set[int]) -> None:
    pair = np.array([bits, bits ^ sum(1 << bit for bit in flipped)], dtype=np.uint64)
    bands = [simhash._band(pair, blocks) for blocks in simhash._BLOCK_PAIRS]
    assert any(keys[0] == keys[1] for keys in bands)
    a, b = pair.astype("<u8").view(np.uint8).reshape(2, 1, 8)
    assert simhash.similarity(a, b).tolist() == [1 - len(flipped) / 64]


def test_rows_that_differ_by_a_character_are_found_and_distinct_short_ones_are_not_lost() -> None:
    draw = random.Random(0)
    rows = ["".join(chr(draw.randrange(0x4E00, 0x5A00)) for _ in range(draw.randrange(3, 400))) for _ in range(3_000)]
    long_rows = [row for row in rows if len(row) > 300]
    edited = [f"{row[:150]}改{row[151:]}" for row in long_rows]
    texts = [*rows, *edited]
    hashes = np.array([exact_hash(text) for text in texts], dtype=np.uint64)
    bands, sketches = simhash.sketch(texts)
    verdicts = find_duplicates(hashes, bands, sketches, threshold=1 - 3 / 64, near=True, similarity=simhash.similarity)
    assert len(set(rows)) == len(rows)
    assert not verdicts.kind[: len(rows)].any()
    found = verdicts.duplicate_of[len(rows) :]
    assert all(texts[of] == row for of, row in zip(found, long_rows) if of >= 0)
    assert (found >= 0).mean() > 0.5

import random
import re

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_prep.duplicates import minhash
from data_prep.duplicates.minhash import NUM_BANDS, NUM_BINS, ROWS_PER_BAND, exact_hash, similarity, sketch

MASK = (1 << 64) - 1
TEXTS = st.text(st.sampled_from("abcXYZ 019\n\t.,éÀ中文字典的\u3000Ａ😀ΩЖ"), max_size=120)


def slow_mix(number: int) -> int:
    number ^= number >> 33
    number = number * 0xFF51AFD7ED558CCD & MASK
    number ^= number >> 33
    number = number * 0xC4CEB9FE1A85EC53 & MASK
    return number ^ number >> 33


def slow_units(text: str) -> list[int]:
    raw = "".join(text.lower().split()).encode("utf-16-le")
    return [low + 256 * high for low, high in zip(raw[::2], raw[1::2])]


def slow_sketch(text: str) -> tuple[list[int], list[int]]:
    """The algorithm once more, with Python's integers and one shingle at a time."""
    p, a = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD
    units = slow_units(text)
    minima: list[int | None] = [None] * NUM_BINS
    for start in range(len(units) - 7):
        total = sum(unit * a * p ** (7 - i) for i, unit in enumerate(units[start : start + 8]))
        value = slow_mix(total & MASK)
        place = (value >> 32) * NUM_BINS >> 32
        if minima[place] is None or value < minima[place]:
            minima[place] = value
    filled = []
    for place, value in enumerate(minima):
        draw = slow_mix((place + 1) * p & MASK)
        asked, stride, question = draw % 113, draw // 113 % 112 + 1, 1
        while value is None:
            if asked < NUM_BINS and (donated := minima[asked]) is not None:
                value = (donated + question) & MASK
            asked, question = (asked + stride) % 113, question + 1
        filled.append(value)
    factors = [slow_mix((row + 1) * a & MASK) | 1 for row in range(ROWS_PER_BAND)]
    bands = [
        slow_mix((sum(filled[8 * band + row] * factors[row] for row in range(ROWS_PER_BAND)) + band * p) & MASK)
        for band in range(NUM_BANDS)
    ]
    return bands, [value & 255 for value in filled]


@given(st.lists(TEXTS.map("abcdefghijklmnopqrstuvwxyz0".__add__), min_size=1, max_size=5))
def test_sketches_equal_those_of_a_slow_implementation(texts: list[str]) -> None:
    bands, sketches = sketch(texts)
    assert bands.dtype == np.uint64
    assert sketches.dtype == np.uint8
    for index, text in enumerate(texts):
        slow_bands, slow_bytes = slow_sketch(text)
        assert bands[:, index].tolist() == slow_bands
        assert sketches[index].tolist() == slow_bytes


@given(st.lists(TEXTS, max_size=8), st.integers(1, 40), st.integers(1, 40))
def test_a_texts_sketch_does_not_depend_on_its_batch(texts: list[str], batch_units: int, chunk_windows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "_BATCH_UNITS", batch_units)
        patch.setattr(minhash, "_CHUNK_WINDOWS", chunk_windows)
        bands, sketches = sketch(texts)
    assert bands.shape == (NUM_BANDS, len(texts))
    assert sketches.shape == (len(texts), NUM_BINS)
    for index, text in enumerate(texts):
        alone, sketch_alone = sketch([text])
        assert np.array_equal(bands[:, [index]], alone)
        assert np.array_equal(sketches[[index]], sketch_alone)


def test_sketches_stay_what_they_are_because_shards_depend_on_them() -> None:
    texts = [
        "To be, or not to be, that is the question: " * 3,
        "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 3,
        "short",
        "",
    ]
    bands, sketches = sketch(texts)
    content = bands.astype("<u8").tobytes() + sketches.tobytes() + repr([exact_hash(text) for text in texts]).encode()
    assert minhash.VERSION == 1
    assert xxhash.xxh3_64_hexdigest(content) == "6e15725bc5489a70"


def test_folding_is_that_of_the_interpreter_in_the_scripts_that_have_case_and_for_white_space() -> None:
    scripts = [
        *range(0x01, 0xB5),
        *range(0xB6, 0x100),
        *range(0x391, 0x3CC),
        *range(0x400, 0x460),
        *range(0xFF21, 0xFF5B),
    ]
    cased = [chr(code) for code in [*scripts, *range(0x4E00, 0x9FFF)] if not chr(code).isspace()]
    spaces = [chr(code) for code in range(0x10000) if chr(code).isspace()]
    _, units, lengths = next(minhash.folded_batches(cased + spaces))
    assert lengths.tolist() == [1] * len(cased) + [0] * len(spaces)
    assert units.tobytes().decode("utf-16-le") == "".join(cased).lower()


def test_case_and_white_space_do_not_change_a_sketch() -> None:
    text = "The Quick Brown Fox jumps over the lazy dog, and 狐狸 jumps back over the dog."
    bands, sketches = sketch([text, text.upper().replace(" ", "\n\t"), text.replace(" ", "")])
    assert (bands == bands[:, :1]).all()
    assert (sketches == sketches[0]).all()


@given(st.integers(0, 2**32), st.floats(0, 0.5))
def test_similarity_estimates_the_jaccard_similarity(seed: int, changed: float) -> None:
    draw = random.Random(seed)
    text = [draw.choice("abcdefghijklmnop") for _ in range(2_000)]
    start, length = draw.randrange(1_000), int(changed * 2_000)
    other = [*text[:start], *(draw.choice("qrstuvwxyz") for _ in range(length)), *text[start + length :]]
    a, b = ({"".join(t[i : i + 8]) for i in range(len(t) - 7)} for t in (text, other))
    truth = len(a & b) / len(a | b)
    _, sketches = sketch(["".join(text), "".join(other)])
    deviation = (truth * (1 - truth) / NUM_BINS) ** 0.5
    assert abs(similarity(sketches[:1], sketches[1:])[0] - truth) <= 4.5 * deviation + 0.01


def test_unrelated_texts_have_similarity_zero_and_equal_ones_one() -> None:
    draw = random.Random(0)
    texts = ["".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(300)) for _ in range(400)]
    _, sketches = sketch(texts)
    assert np.abs(similarity(sketches[:200], sketches[200:])).max() < 0.06
    assert similarity(sketches[:200], sketches[200:]).mean() == pytest.approx(0, abs=0.002)
    assert (similarity(sketches, sketches) == 1).all()


def test_short_texts_agree_with_their_exact_copies_only() -> None:
    words = [f"{a}{b}{c}" for a in "你我他" for b in "来去看听说" for c in "了吗呢吧"]
    bands, sketches = sketch([*words, *words])
    num = len(words)
    assert np.array_equal(bands[:, :num], bands[:, num:])
    assert all(len(np.unique(band)) == num for band in bands)
    a, b = np.triu_indices(num, 1)
    assert similarity(sketches[a], sketches[b]).max() < 0.1


def test_twenty_windows_make_a_text_long_enough_to_be_compared_by_its_shingles() -> None:
    for length, agree in ((26, False), (27, True)):
        text = "abcdefghijklmnopqrstuvwxyz0"[:length]
        bands, _ = sketch([text, text.upper()])
        assert (bands[:, 0] == bands[:, 1]).all() == agree


def test_a_text_of_one_repeated_character_has_a_sketch() -> None:
    bands, sketches = sketch(["a" * 500, "a" * 900, "b" * 500])
    assert np.array_equal(bands[:, 0], bands[:, 1])
    assert not (bands[:, 0] == bands[:, 2]).any()
    assert similarity(sketches[:1], sketches[2:])[0] < 0.1


@given(st.text(st.sampled_from("ab \n\t\r\x0b\x0c\xa0\u3000字"), max_size=60), st.booleans())
def test_the_exact_hash_is_that_of_the_text_with_runs_of_white_space_as_one_space(text: str, is_long: bool) -> None:
    text = text * 200 if is_long else text
    collapsed = re.sub(r"[ \n\t\r\x0b\x0c\xa0\u3000]+", " ", text).strip(" ")
    high, low = exact_hash(text)
    assert high << 64 | low == xxhash.xxh3_128_intdigest(collapsed.encode())


def test_the_exact_hash_tells_case_and_the_place_of_white_space() -> None:
    assert len({exact_hash(text) for text in ("1 23", "12 3", "123", "a b", "A b", "", "a")}) == 7

"""One-permutation MinHash: 112 bytes and 14 band keys per document, by which near-duplicates are found.

A text is folded (lower case, no white space) and cut into all its runs of SHINGLE_CHARACTERS UTF-16 units: no word
segmenter, so that Chinese, English and code share one setting. Each run is hashed once; the hash names one of 112 bins
and each bin keeps its smallest hash. Two documents agree in a bin with a probability of their Jaccard similarity J, and
in one of the bands of 8 bins with 1 - (1 - J^8)^14: 0.05 at J = 0.5, 0.56 at 0.7, 0.92 at 0.8, 0.9996 at 0.9.

Every constant is an integer formula, and folding does not ask the interpreter's Unicode tables, because band keys, and
with them the shards, must not depend on the machine or on versions.

Source: Li, Owen, Zhang 2012 (one permutation); Shrivastava 2017 (empty bins borrow from bins drawn by hashing); Li,
König 2010 (b-bit sketches).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

VERSION = 1
"""To be raised with any change of the band keys or sketches."""
NUM_BANDS, ROWS_PER_BAND = 14, 8
NUM_BINS = NUM_BANDS * ROWS_PER_BAND
SKETCH_BYTES = NUM_BINS
SHINGLE_CHARACTERS = 8
MIN_SHINGLES = 20
"""Texts with fewer windows are only compared exactly: a band of them would rest on too few different hashes."""

_BATCH_UNITS = 1 << 18
_CHUNK_WINDOWS = 1 << 15  # arrays of 256 KiB: a core's cache holds the three that are in use
_MASK = (1 << 64) - 1
_P, _A = 0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD
_EMPTY = np.uint64(_MASK)


def mix(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers in place, by the finaliser of MurmurHash3, and return them."""
    shifted = hashes >> np.uint64(33)
    hashes ^= shifted
    hashes *= np.uint64(_A)
    np.right_shift(hashes, np.uint64(33), out=shifted)
    hashes ^= shifted
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    np.right_shift(hashes, np.uint64(33), out=shifted)
    hashes ^= shifted
    return hashes


def _fold_table() -> NDArray[np.uint16]:
    """What each UTF-16 unit becomes: its lower case in the scripts that have one, 0 for white space."""
    table = np.arange(1 << 16, dtype=np.uint16)
    for first, last, distance in (
        (0x41, 0x5A, 32),  # Latin
        (0xC0, 0xD6, 32),
        (0xD8, 0xDE, 32),
        (0x391, 0x3A1, 32),  # Greek
        (0x3A3, 0x3AB, 32),
        (0x400, 0x40F, 80),  # Cyrillic
        (0x410, 0x42F, 32),
        (0xFF21, 0xFF3A, 32),  # full-width Latin
    ):
        table[first : last + 1] += np.uint16(distance)
    for first, last in ((0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200B), (0x2028, 0x2029)):
        table[first : last + 1] = 0
    table[[0x1680, 0x202F, 0x205F, 0x3000, 0xFEFF]] = 0
    return table


def _probe_table() -> NDArray[np.int64]:
    """Row k: the bin that each bin asks k-th when it is empty; each asks every other in an order of its own.

    Double hashing modulo the prime 113; 112 names no bin and is never full.
    """
    assert NUM_BINS + 1 == 113
    draws = mix(np.arange(1, NUM_BINS + 1, dtype=np.uint64) * np.uint64(_P))
    start = (draws % np.uint64(113)).astype(np.int64)
    stride = (draws // np.uint64(113) % np.uint64(112)).astype(np.int64) + 1
    return (start + np.arange(113)[:, None] * stride) % 113


_FOLD = _fold_table()
_PROBE = _probe_table()
_ROW_FACTORS = mix(np.arange(1, ROWS_PER_BAND + 1, dtype=np.uint64) * np.uint64(_A)) | np.uint64(1)
_BAND_OFFSETS = np.arange(NUM_BANDS, dtype=np.uint64) * np.uint64(_P)


def exact_hash(text: str) -> tuple[int, int]:
    """XXH3-128 of the text, (high, low), with every run of white space taken as one space, and none at the ends.

    Case counts, and so does whether there is white space at all: "1 23" is no copy of "12 3".
    """
    digest = xxhash.xxh3_128_intdigest(_collapsed(text))
    return digest >> 64, digest & _MASK


def _collapsed(text: str) -> bytes:
    raw = text.replace("\xa0", " ").replace("\u3000", " ").encode("utf-8", "surrogatepass").translate(_TO_SPACE)
    octets = np.frombuffer(raw, dtype=np.uint8)
    stays = octets != 0x20
    if len(raw) - np.count_nonzero(stays) < 100:  # splitting costs less in all, arrays cost less per word
        return b" ".join(raw.split())
    stays[1:] |= stays[:-1]  # and the first of each run of spaces
    return octets[stays].tobytes().strip()


_TO_SPACE = bytes(0x20 if 0x09 <= byte <= 0x0D else byte for byte in range(256))


def sketch(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Band keys (NUM_BANDS, n) and sketches (n, SKETCH_BYTES) of n texts.

    A text of fewer than MIN_SHINGLES windows gets keys and a sketch drawn from its exact hash: it agrees with its exact
    copies and by accident with nothing.
    """
    minima = np.empty((len(texts), NUM_BINS), dtype=np.uint64)
    for first, units, lengths in folded_batches(texts):
        minima[first : first + len(lengths)] = _bin_minima(units, lengths)
        for row in np.flatnonzero(lengths < SHINGLE_CHARACTERS - 1 + MIN_SHINGLES).tolist():
            minima[first + row] = _drawn(texts[first + row])
    _fill_empty_bins(minima)
    return sketch_of_minima(minima)


def sketch_of_minima(minima: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Band keys and sketches of n texts of which the smallest hash in each bin (n, NUM_BINS) is known."""
    rows = minima.reshape(len(minima), NUM_BANDS, ROWS_PER_BAND)
    bands = mix((rows * _ROW_FACTORS).sum(axis=2, dtype=np.uint64) + _BAND_OFFSETS)
    return np.ascontiguousarray(bands.T), minima.astype(np.uint8)


def similarity(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The Jaccard similarity of k pairs, estimated from their sketches (k, SKETCH_BYTES).

    Bins that differ agree in their lowest byte once in 256, which is taken off. The standard error is about 0.04, for
    texts with few shingles sqrt(J (1 - J) / shingles).
    """
    num_equal = (a == b).sum(axis=1, dtype=np.uint8)
    return (num_equal / NUM_BINS - 1 / 256) / (1 - 1 / 256)


def folded_batches(texts: Sequence[str]) -> Iterator[tuple[int, NDArray[np.uint16], NDArray[np.int64]]]:
    """Runs of texts: index of the first one, the folded UTF-16 units of all, the number of units of each."""
    first = 0
    batch: list[bytes] = []
    num_bytes = 0
    for index, text in enumerate(texts):
        batch.append(text.encode("utf-16-le", "surrogatepass"))
        num_bytes += len(batch[-1])
        if num_bytes >= 2 * _BATCH_UNITS or index == len(texts) - 1:
            yield first, *_folded(batch)
            first, batch, num_bytes = index + 1, [], 0


def _folded(batch: Sequence[bytes]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    units = _FOLD[np.frombuffer(b"".join(batch), dtype="<u2")]
    stops = np.cumsum([len(raw) // 2 for raw in batch])
    stays = units != 0
    left = np.flatnonzero(~stays)
    lengths = np.diff(stops - np.searchsorted(left, stops), prepend=0)
    return units[stays], lengths


def window_hashes(units: NDArray[np.uint16], num_units: int) -> NDArray[np.uint64]:
    """A hash of each window of num_units units, a power of two.

    Doubling: the hash of a window is that of its first half times a power, plus that of its second half.
    """
    hashes = units.astype(np.uint64)
    hashes *= np.uint64(_A)
    width, factor = 1, _P
    while width < num_units:
        left = hashes[:-width] * np.uint64(factor)
        left += hashes[width:]
        hashes = left
        width, factor = 2 * width, factor * factor & _MASK
    return mix(hashes)


def _bin_minima(units: NDArray[np.uint16], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The smallest hash in each bin of each text, _EMPTY where there is none."""
    num_texts = len(lengths)
    minima = np.full((num_texts + 1) * NUM_BINS, _EMPTY)
    # Windows that reach into the next text go to the bins of one more row, which is thrown away.
    num_windows = np.maximum(lengths - (SHINGLE_CHARACTERS - 1), 0)
    counts = np.stack([num_windows, lengths - num_windows], axis=1).ravel()
    rows = np.stack([np.arange(num_texts), np.full(num_texts, num_texts)], axis=1).ravel()
    first_bins = np.repeat(rows * NUM_BINS, counts)
    for start in range(0, len(units) - (SHINGLE_CHARACTERS - 1), _CHUNK_WINDOWS):
        hashes = window_hashes(units[start : start + _CHUNK_WINDOWS + SHINGLE_CHARACTERS - 1], SHINGLE_CHARACTERS)
        bins = hashes >> np.uint64(32)
        bins *= np.uint64(NUM_BINS)
        bins >>= np.uint64(32)
        places = bins.view(np.int64)
        places += first_bins[start : start + len(hashes)]
        np.minimum.at(minima, places, hashes)
    return minima[: num_texts * NUM_BINS].reshape(num_texts, NUM_BINS)


def _fill_empty_bins(minima: NDArray[np.uint64]) -> None:
    """Each empty bin takes the hash of the first full one that it asks, plus the number of its question."""
    full = np.zeros((len(minima), NUM_BINS + 1), dtype=bool)
    full[:, :NUM_BINS] = minima != _EMPTY
    rows, bins = np.nonzero(~full[:, :NUM_BINS])
    for question, asked in enumerate(_PROBE, start=1):
        if not len(rows):
            return
        donors = asked[bins]
        found = full[rows, donors]
        minima[rows[found], bins[found]] = minima[rows[found], donors[found]] + np.uint64(question)
        rows, bins = rows[~found], bins[~found]
    assert not len(rows), "a text without shingles"


def _drawn(text: str) -> NDArray[np.uint64]:
    high, low = exact_hash(text)
    return mix(np.uint64(high) + np.arange(NUM_BINS, dtype=np.uint64) * np.uint64(low | 1))

"""SimHash: 64 bits per document, for corpora of short rows in which near-duplicates differ by a character or two.

Each run of SHINGLE_CHARACTERS UTF-16 units of the folded text votes with the 64 bits of its hash, as often as it
occurs; the majority is the document's bit. Similar texts differ in few bits. Two that differ in at most 3 agree in at
least 2 of 5 blocks of bits, so that the 10 pairs of blocks are bands that miss none of them.

Source: Charikar 2002; Manku, Jain, Das Sarma 2007 (the blocks).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from data_prep.duplicates import minhash

VERSION = 1
"""To be raised with any change of the band keys or sketches."""
NUM_BITS = 64
SKETCH_BYTES = NUM_BITS // 8
SHINGLE_CHARACTERS = 4
MIN_SHINGLES = 8
"""Texts with fewer windows are only compared exactly: few votes give the same majority to different texts."""
MAX_DISTANCE = 3
_BLOCK_STARTS = (0, 13, 26, 39, 52, 64)
_NUM_BLOCKS = len(_BLOCK_STARTS) - 1
_BLOCK_PAIRS = tuple(combinations(range(_NUM_BLOCKS), _NUM_BLOCKS - MAX_DISTANCE))
NUM_BANDS = len(_BLOCK_PAIRS)
# Votes are counted in eight lanes of a byte each, so that no more than 255 are added up at a time.
_MOST_VOTES = 255
_LANES = np.uint64(0x0101010101010101)


def sketch(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Band keys (NUM_BANDS, n) and sketches (n, SKETCH_BYTES) of n texts, in the form of `minhash.sketch`.

    The sketch of a text of fewer than MIN_SHINGLES windows is drawn from its exact hash.
    """
    bits = np.zeros(len(texts), dtype=np.uint64)
    for first, units, lengths in minhash.folded_batches(texts):
        bits[first : first + len(lengths)] = _majorities(units, lengths)
        for row in np.flatnonzero(lengths < SHINGLE_CHARACTERS - 1 + MIN_SHINGLES).tolist():
            bits[first + row] = minhash.exact_hash(texts[first + row])[0]
    return np.stack([_band(bits, blocks) for blocks in _BLOCK_PAIRS]), bits.astype("<u8").view(np.uint8).reshape(-1, 8)


def similarity(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The share of equal bits of k pairs of sketches (k, SKETCH_BYTES)."""
    return 1 - np.bitwise_count(a ^ b).sum(axis=1, dtype=np.uint8) / NUM_BITS


def _band(bits: NDArray[np.uint64], blocks: tuple[int, ...]) -> NDArray[np.uint64]:
    mask = sum((1 << _BLOCK_STARTS[block + 1]) - (1 << _BLOCK_STARTS[block]) for block in blocks)
    return minhash.mix(bits & np.uint64(mask))


def _majorities(units: NDArray[np.uint16], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """For each text, bit k is set if it is set in more than half of the hashes of its windows."""
    num_windows = np.maximum(lengths - (SHINGLE_CHARACTERS - 1), 0)
    texts = np.flatnonzero(num_windows)
    bits = np.zeros(len(lengths), dtype=np.uint64)
    if len(texts):
        first_windows = np.cumsum(lengths)[texts] - lengths[texts]
        hashes = minhash.window_hashes(units, SHINGLE_CHARACTERS)
        is_set = 2 * _count_votes(hashes, first_windows, num_windows[texts]) > num_windows[texts, None]
        bits[texts] = np.packbits(is_set, axis=1, bitorder="little").view("<u8").ravel()
    return bits


def _count_votes(
    hashes: NDArray[np.uint64], first_windows: NDArray[np.int64], num_windows: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many hashes of each text have each bit set, (texts, 64)."""
    num_pieces = -(-num_windows // _MOST_VOTES)
    first_pieces = np.cumsum(num_pieces) - num_pieces
    text_of_piece = np.repeat(np.arange(len(num_windows)), num_pieces)
    starts = first_windows[text_of_piece] + (np.arange(len(text_of_piece)) - first_pieces[text_of_piece]) * _MOST_VOTES
    stops = np.minimum(starts + _MOST_VOTES, (first_windows + num_windows)[text_of_piece])
    votes = np.empty((len(num_windows), NUM_BITS), dtype=np.int64)
    sums = np.zeros(len(hashes) + 1, dtype=np.uint64)
    for shift in range(8):
        # The running sum overflows, its differences do not.
        np.cumsum(hashes >> np.uint64(shift) & _LANES, out=sums[1:])
        lanes = (sums[stops] - sums[starts]).astype("<u8").view(np.uint8).reshape(-1, 8)
        votes[:, shift::8] = np.add.reduceat(lanes.astype(np.int64), first_pieces)
    return votes

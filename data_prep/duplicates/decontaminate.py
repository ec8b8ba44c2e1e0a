"""Finds documents that quote an evaluation set: a run of 13 successive tokens of one of its items.

A token is a word, or a single character in scripts without spaces, in mixed text both. Case, white space, punctuation
and full-width forms do not count, so that line breaks and other typography hide nothing. Runs are compared by 64-bit
hashes, of which an accidental hit in 10^12 tokens against 10^6 runs has a chance of one in twenty.

Thirteen words are a sentence that nobody writes twice. Thirteen Chinese characters are about eight words, and may be
the name of a law: where an evaluation set is full of such names, a larger ngram drops fewer innocent documents. Runs
that occur in more than BOILERPLATE_ITEMS different items of the sets (the instruction above every question, a licence)
say nothing about a leak and are ignored.

Source: Brown et al. 2020, appendix C (13-grams, and ignoring the common ones).
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.config_file import ConfigError
from data_prep.duplicates import evaluation_sets
from data_prep.duplicates.minhash import mix

VERSION = 2
"""To be raised with any change of what is found."""
BOILERPLATE_ITEMS = 10
_SEPARATOR, _LETTER, _ALONE = 0, 1, 2
_BATCH_UNITS = 1 << 18
_OVERLAP_UNITS = 1 << 12  # longer than any run of tokens that a person wrote
_FILTER_BITS = 22
_P, _Q = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_Q_INVERSE = pow(_Q, -1, 1 << 64)

Hashes = NDArray[np.uint64]


def _tables() -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """What each UTF-16 unit is folded to, and whether it separates tokens, is part of a word, or is a token alone."""
    units = np.arange(1 << 16)
    folded, kinds = units.astype(np.uint16), np.full(1 << 16, _LETTER, dtype=np.uint8)
    for first, last in (
        *((0x00, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0xA9), (0xAB, 0xB4), (0xB6, 0xB9), (0xBB, 0xBF)),
        *((0xD7, 0xD7), (0xF7, 0xF7), (0x2000, 0x206F), (0x20A0, 0x20CF), (0x2190, 0x2BFF), (0x2E00, 0x2E7F)),
        *((0x3000, 0x3004), (0x3008, 0x3020), (0x3030, 0x3030), (0x303D, 0x303F), (0x30FB, 0x30FB), (0xE000, 0xF8FF)),
        *((0xFE00, 0xFE6F), (0xFEFF, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF65), (0xFFE0, 0xFFFF)),
    ):
        kinds[first : last + 1] = _SEPARATOR
    for first, last in (
        *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Burmese, Khmer
        *((0x3005, 0x3007), (0x3040, 0x30FA), (0x30FC, 0x312F), (0x3400, 0x9FFF), (0xF900, 0xFAFF)),
        *((0xD800, 0xDFFF), (0xFF66, 0xFF9F)),  # halves of rarer characters
    ):
        kinds[first : last + 1] = _ALONE
    folded[0xFF01:0xFF5F] -= 0xFF01 - 0x21  # full-width ASCII
    for first, last, distance in ((0x41, 0x5A, 32), (0xC0, 0xDE, 32), (0x391, 0x3AB, 32), (0x400, 0x40F, 80)):
        folded[first : last + 1] += np.uint16(distance)
    folded[0x410:0x430] += np.uint16(32)
    folded[0xFF21:0xFF3B] += np.uint16(32)
    return folded, kinds


_FOLDED, _KINDS = _tables()


class Decontaminator:
    """The runs of tokens of evaluation sets, and which file each is from. Pickles, as plain arrays."""

    def __init__(self, paths: Iterable[str | Path], ngram: int = 13, min_item_tokens: int = 13) -> None:
        """Read evaluation sets, each a file or a pattern that matches files; see `evaluation_sets.items`.

        Args:
            ngram: tokens that a document and an item must share in a row.
            min_item_tokens: items shorter than ngram count if they are found whole and have at least so many tokens.
        Raises:
            ConfigError: a pattern that matches nothing, a file that cannot be read, is of an unknown kind or is not
                what its name says, or a set without an item that is long enough.
        """
        self._ngram = ngram
        self._lengths = tuple(range(min_item_tokens, ngram)) if min_item_tokens < ngram else ()
        found: dict[str, Hashes] = {}
        for pattern in map(str, paths):
            files = evaluation_sets.find_files(pattern)
            found |= {
                file: self._runs_of_items(list(evaluation_sets.items(file))) for file in files if file not in found
            }
            if not any(len(found[file]) for file in files):
                raise ConfigError(
                    f"decontaminate.paths: {pattern}: no item of {min(min_item_tokens, ngram)} tokens or more, so that "
                    "nothing can be found by it; lower decontaminate.min_item_tokens, or leave it out"
                )
        self.names = [file.rpartition("/")[2] for file in found]
        self._hashes, self._files = _without_boilerplate(list(found.values()))
        self._may_hit = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._may_hit[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    @property
    def digest(self) -> str:
        """Of everything that decides what is found, the places of the files left out."""
        state = xxhash.xxh3_128(json.dumps([VERSION, self._ngram, self._lengths, self.names]).encode("utf-8"))
        state.update(self._hashes.astype("<u8").tobytes())
        state.update(self._files.astype("<i4").tobytes())
        return state.hexdigest()

    def overlap(self, text: str) -> str | None:
        """The reason to drop the text, "contaminated:<file name>" of its first hit; None if it quotes nothing."""
        return self.overlaps([text])[0]

    def overlaps(self, texts: Sequence[str]) -> list[str | None]:
        """`overlap` of each text; many short texts at once are faster than one by one."""
        hits: list[str | None] = [None] * len(texts)
        for owners, pieces in piece_batches(texts):
            for piece, file in self._hits(pieces):
                if hits[owners[piece]] is None:
                    hits[owners[piece]] = f"contaminated:{self.names[file]}"
        return hits

    def _hits(self, pieces: Sequence[bytes]) -> list[tuple[int, int]]:
        """Piece and file of every hit, in the order of their places."""
        tokens, owners = piece_tokens(pieces)
        places: list[tuple[int, int, int]] = []
        for length, runs in token_runs(tokens, (self._ngram, *self._lengths)):
            suspects = np.flatnonzero(self._may_hit[runs >> np.uint64(64 - _FILTER_BITS)])
            suspects = suspects[owners[suspects] == owners[suspects + length - 1]]
            at = np.minimum(np.searchsorted(self._hashes, runs[suspects]), len(self._hashes) - 1)
            found = self._hashes[at] == runs[suspects] if len(self._hashes) else np.zeros(0, dtype=bool)
            places += zip(suspects[found].tolist(), owners[suspects[found]].tolist(), self._files[at[found]].tolist())
        return [(piece, file) for _, piece, file in sorted(places)]

    def _runs_of_items(self, items: Sequence[str]) -> Hashes:
        """The hashes of the runs of all items, each as often as there are items that have it."""
        found: list[Hashes] = [np.empty(0, dtype=np.uint64)]
        for owners, pieces in piece_batches(items):
            tokens, piece_of = piece_tokens(pieces)
            for length, runs in token_runs(tokens, (self._ngram,)):
                in_item = piece_of[: len(runs)] == piece_of[length - 1 :]
                found.append(_once_per_item(np.array(owners)[piece_of[: len(runs)][in_item]], runs[in_item]))
            num_tokens = np.bincount(piece_of, minlength=len(pieces))
            first_tokens = np.cumsum(num_tokens) - num_tokens
            for length, runs in token_runs(tokens, self._lengths):
                found.append(runs[first_tokens[num_tokens == length]])
        return np.concatenate(found)


def _once_per_item(items: NDArray[np.int64], hashes: Hashes) -> Hashes:
    order = np.lexsort((hashes, items))
    items, hashes = items[order], hashes[order]
    is_new = np.ones(len(hashes), dtype=bool)
    is_new[1:] = (items[1:] != items[:-1]) | (hashes[1:] != hashes[:-1])
    return hashes[is_new]


def _without_boilerplate(found: Sequence[Hashes]) -> tuple[Hashes, NDArray[np.int32]]:
    """The distinct hashes, ascending, that are in few items, and the first file that has each."""
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *found])
    files = np.repeat(np.arange(len(found), dtype=np.int32), [len(part) for part in found])
    distinct, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    is_rare = counts <= BOILERPLATE_ITEMS
    return distinct[is_rare], files[first][is_rare]


def piece_batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[bytes]]]:
    """Groups of texts in UTF-16, long ones in overlapping pieces, with the index of the text of each piece."""
    owners: list[int] = []
    pieces: list[bytes] = []
    num_bytes = 0
    for index, text in enumerate(texts):
        raw = text.encode("utf-16-le", "surrogatepass")
        for start in range(0, max(len(raw) - 2 * _OVERLAP_UNITS, 1), 2 * _BATCH_UNITS):
            owners.append(index)
            pieces.append(raw[start : start + 2 * (_BATCH_UNITS + _OVERLAP_UNITS)])
            num_bytes += len(pieces[-1])
            if num_bytes >= 2 * _BATCH_UNITS:
                yield owners, pieces
                owners, pieces, num_bytes = [], [], 0
    if pieces:
        yield owners, pieces


def piece_tokens(pieces: Sequence[bytes]) -> tuple[Hashes, NDArray[np.int64]]:
    """A hash of each token of the pieces, and the number of the piece that it is from."""
    units = np.frombuffer(b"\0\0".join(pieces) + b"\0\0", dtype="<u2")
    kinds = _KINDS[units]
    alone, in_word = kinds == _ALONE, kinds == _LETTER
    starts, stops = alone.copy(), alone.copy()
    starts[0] |= in_word[0]
    starts[1:] |= in_word[1:] & ~in_word[:-1]
    stops[:-1] |= in_word[:-1] & ~in_word[1:]  # the last unit is a separator
    first, last = np.flatnonzero(starts), np.flatnonzero(stops)
    # A token's polynomial in Q is a difference of running sums, brought to the power 0 by the inverse of Q.
    powers, inverses = _powers(len(units).bit_length())
    sums = np.cumsum((_FOLDED[units].astype(np.uint64) + np.uint64(1)) * powers[: len(units)])
    before = np.where(first > 0, sums[first - 1], np.uint64(0))
    hashes = mix((sums[last] - before) * inverses[first])
    ends = np.cumsum([len(piece) // 2 + 1 for piece in pieces])
    return hashes, np.searchsorted(ends, first, side="right")


def token_runs(tokens: Hashes, lengths: Sequence[int]) -> Iterator[tuple[int, Hashes]]:
    """For each length the hashes of all runs of so many tokens."""
    for length in lengths:
        if len(tokens) < length:
            continue
        # Horner's rule by halves: the hash of a run is that of its head times a power, plus that of its tail.
        runs, width = tokens, 1
        for bit in f"{length:b}"[1:]:
            runs = runs[:-width] * np.uint64(pow(_P, width, 1 << 64)) + runs[width:]
            width *= 2
            if bit == "1":
                runs = runs[:-1] * np.uint64(_P) + tokens[width:]
                width += 1
        yield length, mix(runs + np.uint64(length))


@functools.cache
def _powers(num_bits: int) -> tuple[Hashes, Hashes]:
    """The powers 0, 1, ... of Q and of its inverse, 2^num_bits of each."""
    ones = np.ones(1 << num_bits, dtype=np.uint64)
    powers, inverses = ones * np.uint64(_Q), ones * np.uint64(_Q_INVERSE)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)

"""What the filters look at in a text: its characters by class, its lines, its words, its n-grams.

Words are runs of characters other than white space, as the papers count them; scripts without spaces have no such
words. There, each character is a unit, three units count as two words (a Chinese word has 1.5 characters on average),
and an n-gram of n words spans 3n/2 units. Punctuation of Chinese and the bars of tables separate, like white space.
"""

from functools import cached_property
from typing import Final, NamedTuple

import numpy as np

from data_prep.cleaning import language
from data_prep.cleaning.ngram_model import NgramModel

_MAX_NGRAM_UNITS: Final = 1 << 20
"""N-gram rules look at so much of a text: their tables are of this size."""

# Of a unit: 0 separates words, 1 goes on in a word, 2 is a word by itself.
_ROLE_OF_CLASS: Final = np.ones(language.NUM_CLASSES, np.int8)
_ROLE_OF_CLASS[[language.SPACE, language.PUNCTUATION, language.NONE]] = 0
_ROLE_OF_CLASS[[language.HAN, language.KANA, language.SPACELESS]] = 2
_ROLE: Final = _ROLE_OF_CLASS[language.CLASS_OF_UNIT]
_ODD: Final = np.uint32(0x9E3779B1)
_INVERSE_OF_ODD: Final = np.uint32(pow(0x9E3779B1, -1, 1 << 32))
_SHIFT: Final = np.uint64(32)
_PLACES: Final = np.arange(_MAX_NGRAM_UNITS, dtype=np.uint64)
_OTHER_ODD: Final = np.uint32(0x85EBCA6B)


class Words(NamedTuple):
    """Where the words, or characters of scripts without spaces, of a text begin."""

    starts: np.ndarray
    """Index of the first unit of each word."""
    roles: np.ndarray
    """For each unit whether it separates words (0), goes on in one, or (2) is one by itself."""
    num_spaceless: int
    """How many are characters of scripts without spaces."""

    @property
    def num_words(self) -> int:
        """Words, with three spaceless characters as two."""
        return self.starts.size - self.num_spaceless + 2 * self.num_spaceless // 3

    @property
    def are_spaceless(self) -> bool:
        """Whether most are characters of scripts without spaces."""
        return 2 * self.num_spaceless > self.starts.size


class Profile:
    """What filters look at in a text; what not all of them need is measured when it is first asked for."""

    def __init__(self, text: str, kind: str, *, model: NgramModel | None = None) -> None:
        self.text = text
        self.kind = kind
        self.model = model
        self.num_turns: int | None = None
        """Turns of a dialogue, where known."""
        self.units = language.units(text)
        self.counts = language.count_classes(self.units)
        """Characters of each class of data_prep.cleaning.language."""
        self.num_visible = sum(self.counts) - self.counts[language.SPACE] - self.counts[language.NONE]
        """Characters that are not white space."""
        self.num_letters = sum(self.counts[language.FIRST_LETTER : language.LAST_LETTER + 1])

    @property
    def num_weighed(self) -> int:
        """Characters, with each of Chinese, Japanese and Korean as three, which is what it takes in UTF-8."""
        return len(self.text) + 2 * sum(self.counts[one] for one in (language.HAN, language.KANA, language.HANGUL))

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, without the white space around them."""
        return list(filter(None, map(str.strip, self.text.split("\n"))))

    @cached_property
    def language(self) -> str:
        """One of language.LANGUAGES."""
        return "code" if self.kind == "code" else language.language_of(self.text, self.counts)

    @cached_property
    def words(self) -> Words:
        """The words of the text."""
        roles = _roles(self.units)
        is_start = roles != 0
        if roles.dtype == np.bool_:
            np.greater(roles[1:], roles[:-1], out=is_start[1:])
        else:
            # A word begins at a unit of role 2, and at one of role 1 that does not follow another.
            np.greater(roles[1:], roles[:-1] == 1, out=is_start[1:])
        num_spaceless = sum(self.counts[one] for one in (language.HAN, language.KANA, language.SPACELESS))
        return Words(is_start.nonzero()[0], roles, num_spaceless)

    @cached_property
    def ngrams(self) -> "Ngrams":
        """Hashes of the words of the text, and their places."""
        return Ngrams(self.units[:_MAX_NGRAM_UNITS], self.words)

    @cached_property
    def num_ellipses(self) -> int:
        """Ellipses of either spelling."""
        return self.text.count("...") + self.text.count("…")

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        """Shares of lines that occurred before, and of characters in them."""
        return _duplicate_shares(self.lines)

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        """Shares of paragraphs that occurred before, and of characters in them."""
        if "\n\n" not in self.text:
            return 0.0, 0.0
        return _duplicate_shares(list(filter(None, map(str.strip, self.text.split("\n\n")))))


class Ngrams:
    """The words of a text as hashes, for finding n-grams that occur again.

    The hash of a word is sum(unit * ODD**i) over its units, divided by ODD**start, where i counts from the start of the
    text: so one product serves all words. All arithmetic is modulo 2**32, where an odd constant has an inverse.
    """

    def __init__(self, units: np.ndarray, words: Words) -> None:
        starts = words.starts
        if units.size == _MAX_NGRAM_UNITS:
            starts = starts[starts < units.size]
        self.are_spaceless = words.are_spaceless
        self.bounds = np.append(starts, units.size)
        """The start of each word, and the end of the text."""
        powers, inverses = _powers(units.size)
        values = powers * units
        values *= words.roles[: units.size] != 0
        self.hashes = np.add.reduceat(values, starts, dtype=np.uint32) * inverses[starts] if starts.size else values[:0]

    def top_share(self, num_words: int, limit: float) -> float:
        """The largest share of the text that one repeated n-gram takes, or 0 where it is surely not above the limit."""
        order, is_repeat = self._group(num_words)
        if not is_repeat.size:
            return 0.0
        starts, ends = self.bounds, self.bounds[self._width(num_words) :]
        longest = int((ends - starts[: ends.size]).max())
        # To pass the limit, an n-gram must occur more often than this even if it is the longest.
        num_needed = max(int(limit * int(self.bounds[-1]) / longest), 1)
        if b"\x01" * num_needed not in is_repeat.tobytes():
            return 0.0
        # Places in the order of n-grams that are equal to the one before them.
        places = is_repeat.nonzero()[0] + 1
        lengths = ends[order[places]] - starts[order[places]]
        is_second = np.append(True, places[1:] != places[:-1] + 1)
        firsts = order[places[is_second] - 1]
        sums = np.add.reduceat(lengths, is_second.nonzero()[0]) + ends[firsts] - starts[firsts]
        return int(sums.max()) / int(self.bounds[-1])

    def duplicate_share(self, num_words: int) -> float:
        """The share of the text in n-grams that occurred before."""
        order, is_repeat = self._group(num_words)
        repeats = np.sort(order[1:][is_repeat])
        if not repeats.size:
            return 0.0
        starts, ends = self.bounds[repeats], self.bounds[repeats + self._width(num_words)]
        # All n-grams have as many words, so that they end in the order in which they begin.
        starts[1:] = np.maximum(starts[1:], ends[:-1])
        return int((ends - starts).sum()) / int(self.bounds[-1])

    def _width(self, num_words: int) -> int:
        """Units of an n-gram."""
        return 3 * num_words // 2 if self.are_spaceless else num_words

    def _group(self, num_words: int) -> tuple[np.ndarray, np.ndarray]:
        """N-grams ordered by hash, then place; and for each but the first whether it is equal to the one before it."""
        width = self._width(num_words)
        num_ngrams = max(self.hashes.size - width + 1, 0)
        total = self.hashes[:num_ngrams].copy()
        for place in range(1, width):
            total *= _OTHER_ODD
            total += self.hashes[place : place + num_ngrams]
        ordered = total.astype(np.uint64)
        ordered <<= _SHIFT
        ordered |= _PLACES[:num_ngrams]
        ordered.sort()
        places = ordered.astype(np.uint32)
        ordered >>= _SHIFT
        return places, ordered[1:] == ordered[:-1]


def _duplicate_shares(pieces: list[str]) -> tuple[float, float]:
    """Shares of the pieces that occurred before, and of the characters in them."""
    distinct = set(pieces)
    if len(distinct) == len(pieces):
        return 0.0, 0.0
    num_characters = sum(map(len, pieces))
    return 1 - len(distinct) / len(pieces), 1 - sum(map(len, distinct)) / num_characters


def _roles(units: np.ndarray) -> np.ndarray:
    """The role of each unit; of ASCII only whether it is in a word."""
    if units.dtype != np.uint8:
        return _ROLE[units]
    is_inside = units > 32
    is_inside &= units != language.BAR
    return is_inside


_power_tables: list[np.ndarray] = [np.ones(1, np.uint32), np.ones(1, np.uint32)]


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """ODD**i and ODD**-i for i below the size; the tables grow with the longest text seen."""
    if _power_tables[0].size < size:
        length = 1 << (size - 1).bit_length()
        for index, base in enumerate((_ODD, _INVERSE_OF_ODD)):
            factors = np.full(length, base)
            factors[0] = 1
            _power_tables[index] = np.cumprod(factors, dtype=np.uint32)
    return _power_tables[0][:size], _power_tables[1][:size]

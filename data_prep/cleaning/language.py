"""The language of a text from the shares of its scripts, without a model, and the table of characters behind it.

Characters are looked at as UTF-16 units (bytes where a text is ASCII), so that one lookup table of 65,536 entries
classifies a text. The table is written out here, not taken from `unicodedata`, whose version differs between Pythons.
"""

from typing import Final

import numpy as np

SPACE, DIGIT, LATIN, CYRILLIC, ARABIC, LETTER, HANGUL, HAN, KANA, SPACELESS, SYMBOL, PUNCTUATION, NONE = range(13)
NUM_CLASSES: Final = 13
FIRST_LETTER, LAST_LETTER = LATIN, SPACELESS
BAR: Final = ord("|")
"""Stands between the cells of a table: punctuation, alone of the signs of ASCII."""
LANGUAGES: Final = ("zh", "en", "ja", "ko", "ru", "ar", "latin", "other", "code")

_RANGES: Final = (  # later ones win
    (0x0000, 0x0020, SPACE),
    (0x0030, 0x0039, DIGIT),
    (0x0041, 0x005A, LATIN),
    (0x0061, 0x007A, LATIN),
    (BAR, BAR, PUNCTUATION),
    (0x0085, 0x0085, SPACE),
    (0x00A0, 0x00A0, SPACE),
    (0x00C0, 0x024F, LATIN),
    (0x00D7, 0x00D7, SYMBOL),
    (0x00F7, 0x00F7, SYMBOL),
    (0x0250, 0x02FF, LETTER),
    (0x0300, 0x036F, NONE),  # combining marks
    (0x0370, 0x03FF, LETTER),
    (0x0400, 0x052F, CYRILLIC),
    (0x0530, 0x05FF, LETTER),
    (0x0600, 0x06FF, ARABIC),
    (0x0660, 0x0669, DIGIT),
    (0x06F0, 0x06F9, DIGIT),
    (0x0700, 0x074F, LETTER),
    (0x0750, 0x077F, ARABIC),
    (0x0780, 0x0DFF, LETTER),
    (0x08A0, 0x08FF, ARABIC),
    (0x0E00, 0x0FFF, SPACELESS),  # Thai, Lao, Tibetan
    (0x1000, 0x109F, SPACELESS),  # Burmese
    (0x10A0, 0x10FF, LETTER),
    (0x1100, 0x11FF, HANGUL),
    (0x1200, 0x177F, LETTER),
    (0x1780, 0x17FF, SPACELESS),  # Khmer
    (0x1800, 0x1DBF, LETTER),
    (0x1DC0, 0x1DFF, NONE),
    (0x1E00, 0x1EFF, LATIN),
    (0x1F00, 0x1FFF, LETTER),
    (0x2000, 0x200A, SPACE),
    (0x200B, 0x200F, NONE),
    (0x2010, 0x2027, PUNCTUATION),
    (0x2019, 0x2019, SYMBOL),  # the apostrophe of "don’t" is inside its word
    (0x2028, 0x2029, SPACE),
    (0x2030, 0x205E, PUNCTUATION),
    (0x2C00, 0x2DDF, LETTER),
    (0x2DE0, 0x2DFF, CYRILLIC),
    (0x2E80, 0x2FDF, HAN),  # radicals
    (0x3000, 0x3000, SPACE),
    (0x3001, 0x303F, PUNCTUATION),
    (0x3005, 0x3007, HAN),
    (0x3041, 0x30FF, KANA),
    (0x30FB, 0x30FB, PUNCTUATION),
    (0x3100, 0x312F, LETTER),
    (0x3130, 0x318F, HANGUL),
    (0x31A0, 0x31BF, LETTER),
    (0x31F0, 0x31FF, KANA),
    (0x3400, 0x4DBF, HAN),
    (0x4E00, 0x9FFF, HAN),
    (0xA000, 0xABFF, LETTER),
    (0xA640, 0xA69F, CYRILLIC),
    (0xA720, 0xA7FF, LATIN),
    (0xA960, 0xA97F, HANGUL),
    (0xAC00, 0xD7FF, HANGUL),
    (0xD840, 0xD88D, HAN),  # first halves of the planes of rare Han characters
    (0xDC00, 0xDFFF, NONE),  # second halves: their character is counted by the first
    (0xF900, 0xFAFF, HAN),
    (0xFB00, 0xFB06, LATIN),
    (0xFB50, 0xFDFF, ARABIC),
    (0xFE00, 0xFE0F, NONE),  # variation selectors
    (0xFE10, 0xFE6F, PUNCTUATION),
    (0xFE70, 0xFEFE, ARABIC),
    (0xFEFF, 0xFEFF, NONE),
    (0xFF00, 0xFF65, PUNCTUATION),
    (0xFF10, 0xFF19, DIGIT),
    (0xFF21, 0xFF3A, LATIN),
    (0xFF41, 0xFF5A, LATIN),
    (0xFF66, 0xFF9F, KANA),
    (0xFFA0, 0xFFDF, HANGUL),
)

_SAMPLE_CHARACTERS: Final = 1000
# Without "in", "is", "was": words of Dutch and German too.
_ENGLISH_WORDS: Final = (" the ", " of ", " and ", " to ", " that ", " for ", " with ", " are ", " you ", " this ")


def _class_table() -> np.ndarray:
    table = np.full(1 << 16, SYMBOL, np.uint8)
    for first, last, character_class in _RANGES:
        table[first : last + 1] = character_class
    return table


CLASS_OF_UNIT: Final = _class_table()


def units(text: str) -> np.ndarray:
    """The text as bytes if it is ASCII, else as UTF-16 units."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")


def count_classes(text_units: np.ndarray) -> list[int]:
    """How many characters of each class, from SPACE to NONE, the units of a text have."""
    if text_units.dtype != np.uint8:
        return np.bincount(CLASS_OF_UNIT[text_units], minlength=NUM_CLASSES).tolist()
    counts = [0] * NUM_CLASSES
    counts[SPACE] = int(np.count_nonzero(text_units <= 32))
    counts[DIGIT] = int(np.count_nonzero(text_units - np.uint8(48) < 10))
    counts[LATIN] = int(np.count_nonzero((text_units | np.uint8(32)) - np.uint8(97) < 26))
    counts[PUNCTUATION] = int(np.count_nonzero(text_units == BAR))
    counts[SYMBOL] = text_units.size - sum(counts)
    return counts


def language_of(text: str, counts: list[int]) -> str:
    """The language of a text whose classes were counted: one of LANGUAGES, never "code".

    The script with most bytes of UTF-8 wins, which weighs a Chinese character like a short English word. Han with a
    tenth of kana is Japanese. Latin is English if 4 of 100 words in its middle are common English ones, else "latin".
    """
    weights = {
        "latin": counts[LATIN],
        "zh": 3 * (counts[HAN] + counts[KANA]),
        "ru": 2 * counts[CYRILLIC],
        "ar": 2 * counts[ARABIC],
        "ko": 3 * counts[HANGUL],
        "other": 2 * counts[LETTER] + 3 * counts[SPACELESS],
    }
    script = max(weights, key=weights.__getitem__)
    if not weights[script]:
        return "other"
    if script == "latin":
        return "en" if _is_english(text) else "latin"
    if script == "zh" and 10 * counts[KANA] >= counts[HAN] + counts[KANA]:
        return "ja"
    return script


def _is_english(text: str) -> bool:
    middle = max((len(text) - _SAMPLE_CHARACTERS) // 2, 0)
    sample = text[middle : middle + _SAMPLE_CHARACTERS].replace("\n", " ")
    missing = max(sample.count(" "), 1)
    for word in _ENGLISH_WORDS:
        missing -= 25 * sample.count(word)
        if missing <= 0:
            return True
    return False

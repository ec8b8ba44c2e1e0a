"""Which texts every library reads alike, whatever version of Unicode its tables come from.

tokenizers 0.23 splits by Unicode 16 but composes (NFC) by an older one, 1.0 does both by Unicode 17, and Python has its
own. They agree on the characters of Unicode 3.2, whose properties are settled, and on later symbols and punctuation
(emoji), which no rule of a tokenizer treats one by one. They disagree on some of the letters and marks that came later.
"""

import unicodedata

import numpy as np

_FIRST_LATER = 0x220
"""No character before this one came after Unicode 3.2."""
_FIRST_SELDOM = 0x40000
"""From here on come only planes that are empty or private; all of them count as later."""
_UNKNOWN = 2
_BLOCK = 256


def has_later_letters(text: str) -> bool:
    """Whether libraries could disagree about a text, for a letter, mark or number that came after Unicode 3.2."""
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    codes = codes[codes >= _FIRST_LATER]
    found = _TABLE[codes]
    if (found == _UNKNOWN).any():
        for block in np.unique(codes[found == _UNKNOWN] // _BLOCK).tolist():
            _fill(block)
        found = _TABLE[codes]
    return bool(found.any())


def _fill(block: int) -> None:
    settled = unicodedata.ucd_3_2_0
    for code in range(block * _BLOCK, (block + 1) * _BLOCK):
        character = chr(code)
        is_later = settled.category(character) == "Cn" and unicodedata.category(character)[0] not in "SP"
        _TABLE[code] = is_later or code >= _FIRST_SELDOM


# Filled where texts have characters: all of it takes a tenth of a second.
_TABLE = np.full(0x110000, _UNKNOWN, dtype=np.uint8)

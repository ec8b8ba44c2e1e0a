"""Which texts every library reads alike, whatever version of Unicode its tables come from.

tokenizers 0.23 splits by Unicode 16 but composes (NFC) by an older one, 1.0 does both by Unicode 17, and Python has its
own. They agree on the characters of Unicode 3.2, whose properties are settled, and on later symbols and punctuation
(emoji), which no rule of a tokenizer treats one by one. They disagree on some of the letters and marks that came later.
"""

import functools
import unicodedata

import numpy as np

_FIRST_LATER = 0x220
"""No character before this one came after Unicode 3.2."""
_FIRST_SELDOM = 0x40000
"""From here on come only planes that are empty or private; all of them count as later."""


def has_later_letters(text: str) -> bool:
    """Whether libraries could disagree about a text, for a letter, mark or number that came after Unicode 3.2."""
    if text.isascii():
        return False
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return bool(_is_later()[codes[codes >= _FIRST_LATER]].any())


@functools.cache
def _is_later() -> np.ndarray:
    # 0.04 s, when the first text needs it.
    table = np.ones(0x110000, dtype=bool)
    settled = unicodedata.ucd_3_2_0
    for code in range(_FIRST_SELDOM):
        character = chr(code)
        table[code] = settled.category(character) == "Cn" and unicodedata.category(character)[0] not in "SP"
    return table

"""The steps that bring a text into one form: line ends, spaces, Unicode, control characters, white space, punctuation.

Their order makes one round enough: what a step uncovers (a mark that composes once a control character is gone) a later
one sees. So a second round changes nothing, in any text.
"""

import re
import unicodedata
from typing import Final

_CONTROLS_OF_ASCII: Final = bytes(code for code in (*range(32), 127) if code not in (9, 10, 13))
_LINE_BREAKS: Final = str.maketrans({"\x0b": "\n", "\x0c": "\n", "\u2028": "\n", "\u2029": "\n"})
_SPACES: Final = re.compile("[\xa0\u2000-\u200a\u202f\u205f]")
_CONTROLS: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u180e\u200b\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_MARKS_OF_DIRECTION: Final = re.compile("[\u200e\u200f]")
_RIGHT_TO_LEFT: Final = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
_JOINERS: Final = re.compile("[\u200c\u200d]")
# Behind Latin, Greek, Cyrillic and East Asian characters joiners have no use; elsewhere they shape letters and emoji.
_USELESS_JOINERS: Final = re.compile(
    "(?:\\A|(?<=[\x00-\u058f\u1100-\u11ff\u1e00-\u1fff\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef]))[\u200c\u200d]+"
)
_PRIVATE_USE: Final = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
_BLANK_LINES: Final = re.compile("\n{3,}")

_HALFWIDTH: Final = str.maketrans({0x3000: " ", **{0xFF01 + index: chr(0x21 + index) for index in range(94)}})
_FULLWIDTH: Final = str.maketrans(",;:?!", "，；：？！")
_AFTER_HAN: Final = re.compile(r"(?<=[\u3400-\u9fff])[,;:?!](?![\w/])", re.ASCII)


def unify_line_ends(text: str) -> str:
    """Line ends become LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def unify_spaces(text: str) -> str:
    """Vertical tabs, form feeds and Unicode's line separators become line ends; spaces of other widths, spaces."""
    if "\x0b" in text or "\x0c" in text or "\u2028" in text or "\u2029" in text:
        text = text.translate(_LINE_BREAKS)
    return text if text.isascii() else _SPACES.sub(" ", text)


def clean_characters(text: str, *, remove_private_use: bool) -> str:
    """NFC without control characters, useless joiners and marks of direction."""
    if text.isascii():
        content = text.encode("ascii")
        kept = content.translate(None, _CONTROLS_OF_ASCII)
        return text if len(kept) == len(content) else kept.decode("ascii")
    composed = unicodedata.normalize("NFC", text)
    kept = _without_controls(composed, remove_private_use)
    if kept != composed:
        kept = unicodedata.normalize("NFC", kept)
    # Last, as what stands before a joiner decides about it.
    if _JOINERS.search(kept):
        kept = unicodedata.normalize("NFC", _USELESS_JOINERS.sub("", kept))
    return kept


def narrow(text: str) -> str:
    """Full-width variants of ASCII become ASCII."""
    return text if text.isascii() else text.translate(_HALFWIDTH)


def widen_punctuation(text: str) -> str:
    """The signs , ; : ? ! behind Chinese become their full-width forms."""
    return text if text.isascii() else _AFTER_HAN.sub(lambda match: match[0].translate(_FULLWIDTH), text)


def tidy_lines(text: str) -> str:
    """No white space at the ends of lines and of the text, at most one blank line in a row."""
    text = text.strip()
    if " \n" in text or "\t\n" in text or "\u3000\n" in text:
        text = "\n".join([line.rstrip() for line in text.split("\n")])
    return _BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text


def _without_controls(text: str, remove_private_use: bool) -> str:
    text = _CONTROLS.sub("", text)
    if _MARKS_OF_DIRECTION.search(text) and not _RIGHT_TO_LEFT.search(text):
        text = _MARKS_OF_DIRECTION.sub("", text)
    return _PRIVATE_USE.sub("", text) if remove_private_use else text

"""Filters: named, pure rules that refuse a text, and rules that remove single lines of prose.

Words are those of data_prep.cleaning.text_profile.

Source: Gopher is Rae et al. 2021 (arXiv 2112.11446), table A1; C4 is Raffel et al. 2020 (arXiv 1910.10683), section
2.2; FineWeb is Penedo et al. 2024 (arXiv 2406.17557), section 3.6; RefinedWeb is Penedo et al. 2023 (arXiv 2306.01116),
appendix G; The Stack is Kocetkov et al. 2022 (arXiv 2211.15533) with the rules of Chen et al. 2021 (arXiv 2107.03374).
Filters named "text", "language" and "chat" are our own.
"""

import re
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from data_prep.cleaning import language
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.cleaning.text_profile import Profile

_BULLETS: Final = frozenset("-*•●○■□▪▫‣⁃◦·➢➤–—")
_BULLET_AND_SPACE: Final = frozenset("-*·–—")
_STOP_WORDS: Final = ("the", "to", "of", "and", "that", "with", "be", "have")
_TERMINAL: Final = (".", "!", "?", '"', "”", "。", "！", "？", "」", "』", "…", ".)", "。）")
_SENTENCE_ENDS: Final = (". ", ".\n", "! ", "!\n", "? ", "?\n", "。", "！", "？")
_GENERATED = re.compile(
    r"\bauto-?\s?generated\b|\bautomatically generated\b|\bgenerated (?:by|from)\b[^\n]{0,200}(?:\n.{0,80})?do not edit"
    r"|\bdo not (?:edit|modify)\b[^\n]{0,80}\bgenerated\b|@generated\b"
)
_GENERATED_CHARACTERS: Final = 1000
_POLICY_LINE = re.compile(r"terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.I)
_JAVASCRIPT = re.compile("javascript", re.IGNORECASE)
_LOREM_IPSUM = re.compile("lorem ipsum", re.IGNORECASE)
_MOJIBAKE: Final = ("\ufffd", "锟斤拷", "烫烫烫", "â€", "ï»¿")

_IS_LETTER: Final = (language.CLASS_OF_UNIT >= language.FIRST_LETTER) & (language.CLASS_OF_UNIT <= language.LAST_LETTER)
_DATA_BYTES: Final = bytes(chr(code).isalnum() or chr(code) in "+/=" for code in range(128)) + bytes(128)
_DATA_RUN: Final = 64
_DATA_RUNS: Final = re.compile(b"\x01{%d,}" % _DATA_RUN)
_CHARACTER_RUN: Final = 16


class Filter(NamedTuple):
    """A rule that refuses texts."""

    refuses: Callable[[Profile, CleanConfig], bool]
    kinds: tuple[str, ...]


FILTERS: Final[dict[str, Filter]] = {}
Rule = Callable[[Profile, CleanConfig], bool]


def _filter(name: str, *kinds: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        FILTERS[name] = Filter(rule, kinds or ("prose",))
        return rule

    return register


@_filter("text.length", "prose", "code", "chat")
def length(text: Profile, config: CleanConfig) -> bool:
    """Too short or too long."""
    too_long = config.max_characters is not None and len(text.text) > config.max_characters
    return too_long or text.num_weighed < config.min_characters


@_filter("text.mojibake", "prose", "chat")
def mojibake(text: Profile, config: CleanConfig) -> bool:
    """Remains of a wrong decoding, more than one."""
    if text.text.isascii():
        return False
    counts = [text.text.count(remains) for remains in _MOJIBAKE]
    num_characters = sum(count * len(remains) for count, remains in zip(counts, _MOJIBAKE, strict=True))
    return sum(counts) > 1 and num_characters > config.max_mojibake_share * len(text.text)


@_filter("text.alphanumeric")
def alphanumeric(text: Profile, config: CleanConfig) -> bool:
    """Few letters and digits."""
    return text.num_letters + text.counts[language.DIGIT] < config.min_alphanumeric_share * text.num_visible


@_filter("text.digits")
def digits(text: Profile, config: CleanConfig) -> bool:
    """Many digits."""
    return text.counts[language.DIGIT] > config.max_digit_share * text.num_visible


@_filter("text.distinct_lines", "prose", "code")
def distinct_lines(text: Profile, config: CleanConfig) -> bool:
    """Few distinct lines among more than ten."""
    num_lines = len(text.lines)
    return num_lines > 10 and len(set(text.lines)) < config.min_distinct_line_share * num_lines


@_filter("text.repeated_characters", "prose", "chat")
def repeated_characters(text: Profile, config: CleanConfig) -> bool:
    """Long runs of one character, white space aside."""
    units = text.units
    if not _may_have_runs(units):
        return False
    starts = np.flatnonzero(np.append(True, units[1:] != units[:-1]))
    lengths = np.diff(starts, append=units.size)
    is_counted = (lengths >= _CHARACTER_RUN) & (language.CLASS_OF_UNIT[units[starts]] != language.SPACE)
    return int(lengths[is_counted].sum()) > config.max_repeated_character_share * units.size


@_filter("language.kept", "prose", "chat")
def kept_language(text: Profile, config: CleanConfig) -> bool:
    """A language that is not wanted."""
    return bool(config.languages) and text.language not in config.languages


@_filter("language.cjk_share")
def cjk_share(text: Profile, config: CleanConfig) -> bool:
    """Few Chinese characters and kana among the letters."""
    if not config.min_cjk_share:
        return False
    return text.counts[language.HAN] + text.counts[language.KANA] < config.min_cjk_share * max(text.num_letters, 1)


@_filter("language.perplexity")
def perplexity(text: Profile, config: CleanConfig) -> bool:
    """A perplexity outside the limits."""
    if text.model is None or (config.max_perplexity is None and config.min_perplexity is None):
        return False
    found = text.model.perplexity(text.text)
    low = 0.0 if config.min_perplexity is None else config.min_perplexity
    return found < low or (config.max_perplexity is not None and found > config.max_perplexity)


@_filter("gopher.word_count")
def word_count(text: Profile, config: CleanConfig) -> bool:
    """Too few or too many words."""
    return not config.min_words <= text.words.num_words <= config.max_words


@_filter("gopher.word_length")
def word_length(text: Profile, config: CleanConfig) -> bool:
    """Words of unusual mean length; only of alphabets that write words apart."""
    num_words = text.words.starts.size - text.words.num_spaceless
    if text.language not in ("en", "latin", "ru") or not num_words:
        return False
    num_characters = text.num_visible - text.counts[language.PUNCTUATION] - text.words.num_spaceless
    return not config.min_mean_word_length <= num_characters / num_words <= config.max_mean_word_length


@_filter("gopher.symbol_ratio")
def symbol_ratio(text: Profile, config: CleanConfig) -> bool:
    """Many hash signs or ellipses."""
    return max(text.text.count("#"), text.num_ellipses) > config.max_symbol_ratio * text.words.num_words


@_filter("gopher.bullet_lines")
def bullet_lines(text: Profile, config: CleanConfig) -> bool:
    """Almost all lines are bullets."""
    heads = [line[:2] for line in text.lines if line[0] in _BULLETS]
    # "-5 °C" or "**bold**" is no bullet.
    num_bullets = sum(head[0] not in _BULLET_AND_SPACE or head[1:].isspace() for head in heads)
    return num_bullets > config.max_bullet_line_share * len(text.lines)


@_filter("gopher.ellipsis_lines")
def ellipsis_lines(text: Profile, config: CleanConfig) -> bool:
    """Many lines break off with an ellipsis."""
    if not text.num_ellipses:
        return False
    num_broken = len([line for line in text.lines if line.endswith(("...", "…"))])
    return num_broken > config.max_ellipsis_line_share * len(text.lines)


@_filter("gopher.alphabetic_words")
def alphabetic_words(text: Profile, config: CleanConfig) -> bool:
    """Many words without a letter."""
    starts = text.words.starts
    if not starts.size:
        return True
    allowed = (1 - config.min_alphabetic_word_share) * starts.size
    are_letters = _are_letters(text.units)
    # Most words begin with a letter, so that the others need not be looked at.
    if starts.size - np.count_nonzero(are_letters[starts]) <= allowed:
        return False
    num_alphabetic = np.count_nonzero(np.logical_or.reduceat(are_letters, starts))
    return bool(starts.size - num_alphabetic > allowed)


@_filter("gopher.stop_words")
def stop_words(text: Profile, config: CleanConfig) -> bool:
    """English without its commonest words."""
    if text.language != "en":
        return False
    if all(f" {word} " in text.text for word in _STOP_WORDS[: config.min_stop_words]):
        return False
    return len({*_STOP_WORDS} & {*re.findall("[a-z]+", text.text.lower())}) < config.min_stop_words


@_filter("gopher.duplicate_lines")
def duplicate_lines(text: Profile, config: CleanConfig) -> bool:
    """Many lines occurred before."""
    return text.duplicate_lines[0] > config.max_duplicate_line_share


@_filter("gopher.duplicate_line_characters")
def duplicate_line_characters(text: Profile, config: CleanConfig) -> bool:
    """Many characters are in lines that occurred before."""
    return text.duplicate_lines[1] > config.max_duplicate_line_character_share


@_filter("gopher.duplicate_paragraphs")
def duplicate_paragraphs(text: Profile, config: CleanConfig) -> bool:
    """Many paragraphs occurred before."""
    return text.duplicate_paragraphs[0] > config.max_duplicate_paragraph_share


@_filter("gopher.duplicate_paragraph_characters")
def duplicate_paragraph_characters(text: Profile, config: CleanConfig) -> bool:
    """Many characters are in paragraphs that occurred before."""
    return text.duplicate_paragraphs[1] > config.max_duplicate_paragraph_character_share


@_filter("gopher.top_ngrams")
def top_ngrams(text: Profile, config: CleanConfig) -> bool:
    """One n-gram of 2, 3 or 4 words takes much of the text."""
    low, high = config.max_top_4gram_share, config.max_top_2gram_share
    limits = {2: high, 3: (low + high) / 2, 4: low}
    # An n-gram of 3 or 4 words is made of two n-grams of 2, so that twice the share of those is a bound.
    harmless = min(limits[3], limits[4]) / 2
    share = text.ngrams.top_share(2, min(limits[2], harmless))
    return share > limits[2] or (
        share > harmless and any(text.ngrams.top_share(n, limits[n]) > limits[n] for n in (3, 4))
    )


@_filter("gopher.duplicate_ngrams")
def duplicate_ngrams(text: Profile, config: CleanConfig) -> bool:
    """Much of the text is in n-grams of 5 to 10 words that occurred before."""
    first, last = config.max_duplicate_5gram_share, config.max_duplicate_10gram_share
    limits = {n: first + (last - first) * (n - 5) / 5 for n in range(5, 11)}
    # What longer n-grams cover, shorter ones cover too.
    share = text.ngrams.duplicate_share(5)
    return share > limits[5] or any(
        share > limits[n] and text.ngrams.duplicate_share(n) > limits[n] for n in range(6, 11)
    )


@_filter("c4.lorem_ipsum")
def lorem_ipsum(text: Profile, config: CleanConfig) -> bool:
    """Filler text."""
    may_have = "psum" in text.text or "PSUM" in text.text
    return may_have and _LOREM_IPSUM.search(text.text) is not None


@_filter("c4.javascript")
def javascript(text: Profile, config: CleanConfig) -> bool:
    """A page that speaks of JavaScript."""
    return _JAVASCRIPT.search(text.text) is not None


@_filter("c4.curly_bracket")
def curly_bracket(text: Profile, config: CleanConfig) -> bool:
    """Prose with a curly bracket, which is rather code."""
    return "{" in text.text


@_filter("c4.sentences")
def sentences(text: Profile, config: CleanConfig) -> bool:
    """Few ends of sentences."""
    return sum(map((text.text + "\n").count, _SENTENCE_ENDS)) < config.min_sentences


@_filter("fineweb.line_punctuation")
def line_punctuation(text: Profile, config: CleanConfig) -> bool:
    """Few lines end like a sentence."""
    num_ended = sum(line.endswith(_TERMINAL) for line in text.lines)
    return num_ended < config.min_punctuated_line_share * len(text.lines)


@_filter("fineweb.short_lines")
def short_lines(text: Profile, config: CleanConfig) -> bool:
    """Mostly short lines."""
    num_short = sum(len(line) < 30 and len(line.encode("utf-8", "surrogatepass")) < 30 for line in text.lines)
    return num_short > config.max_short_line_share * len(text.lines)


@_filter("fineweb.lists")
def lists(text: Profile, config: CleanConfig) -> bool:
    """Many line ends for its words."""
    return text.text.count("\n") > config.max_lines_per_word * text.words.num_words


@_filter("code.generated", "code")
def generated(text: Profile, config: CleanConfig) -> bool:
    """A notice at the top says that a program wrote it."""
    head = text.text[:_GENERATED_CHARACTERS].lower()
    return "generated" in head and _GENERATED.search(head) is not None


@_filter("code.line_length", "code")
def line_length(text: Profile, config: CleanConfig) -> bool:
    """A very long line."""
    return max(map(len, text.lines), default=0) > config.max_line_characters


@_filter("code.mean_line_length", "code")
def mean_line_length(text: Profile, config: CleanConfig) -> bool:
    """Long lines."""
    return len(text.text) > config.max_mean_line_characters * (text.text.count("\n") + 1)


@_filter("code.alphanumeric", "code")
def code_alphanumeric(text: Profile, config: CleanConfig) -> bool:
    """Few letters and digits among all characters."""
    return text.num_letters + text.counts[language.DIGIT] < config.min_code_alphanumeric_share * len(text.text)


@_filter("code.digits", "code")
def code_digits(text: Profile, config: CleanConfig) -> bool:
    """Tables of numbers."""
    return text.counts[language.DIGIT] > config.max_code_digit_share * text.num_visible


@_filter("code.data", "code")
def data(text: Profile, config: CleanConfig) -> bool:
    """Hexadecimal or base64 data."""
    is_data = text.text.encode("utf-8", "surrogatepass").translate(_DATA_BYTES)
    if b"\x01" * _DATA_RUN not in is_data:
        return False
    return sum(map(len, _DATA_RUNS.findall(is_data))) > config.max_data_share * len(is_data)


@_filter("chat.turns", "chat")
def turns(text: Profile, config: CleanConfig) -> bool:
    """A dialogue of too few turns, where their number is known."""
    return text.num_turns is not None and text.num_turns < config.min_turns


def keeps_line(line: str, rules: frozenset[str], min_words: int) -> bool:
    """Whether the line rules leave a line of prose; blank lines stay."""
    bare = line.strip()
    if not bare:
        return True
    if "c4.terminal_punctuation" in rules and not bare.endswith(_TERMINAL):
        return False
    if "c4.words_per_line" in rules and Profile(bare, "prose").words.num_words < min_words:
        return False
    if "c4.javascript" in rules and _JAVASCRIPT.search(bare):
        return False
    if "refinedweb.numbers" in rules and not any(map(str.isalpha, bare)):
        return False
    return not ("c4.policy" in rules and _POLICY_LINE.search(bare))


def _may_have_runs(units: np.ndarray) -> bool:
    """Whether there may be 16 equal units in a row, not spaces: they fill aligned words of 8 bytes with one value."""
    num_units = 8 // units.itemsize
    words = units[: units.size // num_units * num_units].view("<u8")
    mask, ones = (0xFF, 0x0101010101010101) if num_units == 8 else (0xFFFF, 0x0001000100010001)
    is_uniform = words == (words & np.uint64(mask)) * np.uint64(ones)
    is_uniform &= words != np.uint64(32 * ones)
    if num_units == 4:
        is_uniform = is_uniform[1:] & (words[1:] == words[:-1])
    return bool(is_uniform.any())


def _are_letters(units: np.ndarray) -> np.ndarray:
    if units.dtype == np.uint8:
        return ((units | np.uint8(32)) - np.uint8(97)) < 26
    return _IS_LETTER[units]

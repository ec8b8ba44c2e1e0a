"""The section [clean] of a preparation: how texts are normalised, which are refused, what is masked."""

import math
from dataclasses import dataclass
from typing import Final, Literal

from data_prep.cleaning.language import LANGUAGES
from data_prep.cleaning.pii import MASKS, check_placeholder
from data_prep.config_file import ConfigError

DEFAULT_FILTERS: Final = (
    "text.length",
    "text.mojibake",
    "language.kept",
    "language.cjk_share",
    "text.alphanumeric",
    "text.digits",
    "gopher.word_count",
    "gopher.word_length",
    "gopher.symbol_ratio",
    "gopher.bullet_lines",
    "gopher.ellipsis_lines",
    "gopher.stop_words",
    "gopher.alphabetic_words",
    "c4.lorem_ipsum",
    "code.generated",
    "code.line_length",
    "code.mean_line_length",
    "code.alphanumeric",
    "code.digits",
    "code.data",
    "chat.turns",
    "text.distinct_lines",
    "text.repeated_characters",
    "gopher.duplicate_lines",
    "gopher.duplicate_line_characters",
    "gopher.duplicate_paragraphs",
    "gopher.duplicate_paragraph_characters",
    "gopher.top_ngrams",
    "gopher.duplicate_ngrams",
    "language.perplexity",
)
"""In the order in which they look at a text: cheap ones first."""
OTHER_FILTERS: Final = (
    "c4.javascript",
    "c4.curly_bracket",
    "c4.sentences",
    "fineweb.line_punctuation",
    "fineweb.short_lines",
    "fineweb.lists",
)
"""For web pages only: they would refuse poems, dialogues, tables, texts about programming."""
LINE_RULES: Final = (
    "c4.terminal_punctuation",
    "c4.words_per_line",
    "c4.javascript",
    "c4.policy",
    "refinedweb.numbers",
)
_FILTERS: Final = (*DEFAULT_FILTERS, *OTHER_FILTERS)
_SHARES: Final = (
    "min_alphanumeric_share",
    "max_digit_share",
    "max_symbol_ratio",
    "max_bullet_line_share",
    "max_ellipsis_line_share",
    "min_alphabetic_word_share",
    "min_distinct_line_share",
    "max_repeated_character_share",
    "max_duplicate_line_share",
    "max_duplicate_line_character_share",
    "max_duplicate_paragraph_share",
    "max_duplicate_paragraph_character_share",
    "max_top_2gram_share",
    "max_top_4gram_share",
    "max_duplicate_5gram_share",
    "max_duplicate_10gram_share",
    "min_punctuated_line_share",
    "max_short_line_share",
    "max_lines_per_word",
    "min_cjk_share",
    "min_code_alphanumeric_share",
    "max_code_digit_share",
    "max_data_share",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """How texts are normalised, which are refused, what is masked; the kinds are prose, code and chat."""

    filters: tuple[str, ...] = ("default",)
    """Filters that run: names ("gopher.word_count"), families ("fineweb"), "default" for the default set; none given:
    none."""
    skip_filters: tuple[str, ...] = ()
    """Names or families taken away from `filters`."""
    line_rules: tuple[str, ...] = ()
    """Rules that remove single lines of prose: c4.terminal_punctuation, c4.words_per_line, c4.javascript, c4.policy,
    refinedweb.numbers."""

    normalise: bool = True
    """Bring texts into one form before anything else (Unicode, line ends, control characters, white space). Off: they
    are taken as they are, but for what is masked."""
    remove_html: bool = True
    """Decode entities and remove tags that an extractor left in prose."""
    remove_private_use: bool = False
    """Remove characters of the private use areas: icons of web fonts, but also private symbols of a corpus."""
    punctuation: Literal["keep", "halfwidth", "fullwidth"] = "keep"
    """Width of punctuation in prose: halfwidth turns full-width ASCII variants into ASCII; fullwidth turns , ; : ? !
    after a Chinese character into their Chinese forms."""

    mask: tuple[str, ...] = ("email", "ip")
    """Personal data replaced by a placeholder: email, ip, phone, card, id (Chinese identity numbers)."""
    mask_code: bool = False
    """Mask in code as well; there, most addresses are fixtures and defaults."""
    placeholder: str = "[{kind}]"
    """What stands in the place of personal data; {kind} becomes EMAIL, IP, ..."""

    min_characters: int = 20
    """text.length: shortest text, of any kind. A Chinese, Japanese or Korean character counts as three."""
    max_characters: int | None = None
    """text.length: longest text. Default: no limit."""
    max_mojibake_share: float = 0.001
    """text.mojibake: share of replacement characters and of the usual remains of a wrong decoding; a single one is
    let pass."""
    min_alphanumeric_share: float = 0.5
    """text.alphanumeric: letters and digits among the characters of prose that are not white space."""
    max_digit_share: float = 0.3
    """text.digits: digits among the characters of prose that are not white space."""
    min_distinct_line_share: float = 0.2
    """text.distinct_lines: distinct lines among the non-blank lines, of more than ten."""
    max_repeated_character_share: float = 0.2
    """text.repeated_characters: share of a text in runs of 16 or more of one character."""

    languages: tuple[str, ...] = ()
    """language.kept: languages of prose and chat that are kept: zh, en, ja, ko, ru, ar, latin (others in Latin script,
    and English without its common words), other. Default: all."""
    min_cjk_share: float = 0.0
    """language.cjk_share: Chinese characters and kana among the letters; above 0 for sources that are to be Chinese."""
    perplexity_model: str | None = None
    """language.perplexity: a model made by `python -m data_prep train-ngrams`."""
    max_perplexity: float | None = None
    """language.perplexity: highest perplexity per character of prose; higher ones are noise or another language."""
    min_perplexity: float | None = None
    """language.perplexity: lowest perplexity per character of prose; lower ones are boilerplate."""

    min_words: int = 50
    """gopher.word_count; Gopher: 50, of web pages. Three Chinese characters count as two words. For prose in short
    pieces (input.split = "lines", encyclopedia stubs) take less: 10 are 15 Chinese characters."""
    max_words: int = 10_000_000
    """gopher.word_count; Gopher: 100,000, which drops books."""
    min_mean_word_length: float = 3.0
    """gopher.word_length, of alphabets; Gopher: 3."""
    max_mean_word_length: float = 12.0
    """gopher.word_length, of alphabets; Gopher: 10, of English, which drops Finnish and German."""
    max_symbol_ratio: float = 0.1
    """gopher.symbol_ratio: hash signs, or ellipses, per word; Gopher: 0.1."""
    max_bullet_line_share: float = 0.9
    """gopher.bullet_lines: lines that start with a bullet; Gopher: 0.9."""
    max_ellipsis_line_share: float = 0.3
    """gopher.ellipsis_lines: lines that end with an ellipsis; Gopher: 0.3."""
    min_alphabetic_word_share: float = 0.8
    """gopher.alphabetic_words: words with a letter in them; Gopher: 0.8."""
    min_stop_words: int = 2
    """gopher.stop_words, of English: how many of the, be, to, of, and, that, have, with occur; Gopher: 2."""
    max_duplicate_line_share: float = 0.3
    """gopher.duplicate_lines: lines that occurred before; Gopher: 0.3."""
    max_duplicate_line_character_share: float = 0.2
    """gopher.duplicate_line_characters: characters in lines that occurred before; Gopher: 0.2."""
    max_duplicate_paragraph_share: float = 0.3
    """gopher.duplicate_paragraphs; Gopher: 0.3."""
    max_duplicate_paragraph_character_share: float = 0.2
    """gopher.duplicate_paragraph_characters; Gopher: 0.2."""
    max_top_2gram_share: float = 0.20
    """gopher.top_ngrams: characters in the n-gram of 2 words that covers most; Gopher: 0.20."""
    max_top_4gram_share: float = 0.16
    """gopher.top_ngrams: the same for 4 words, in between for 3; Gopher: 0.16."""
    max_duplicate_5gram_share: float = 0.15
    """gopher.duplicate_ngrams: characters in n-grams of 5 words that occurred before; Gopher: 0.15."""
    max_duplicate_10gram_share: float = 0.10
    """gopher.duplicate_ngrams: the same for 10 words, in between for 6 to 9; Gopher: 0.10."""

    min_sentences: int = 3
    """c4.sentences: ends of sentences in prose."""
    min_words_per_line: int = 5
    """c4.words_per_line: words of a line; three Chinese characters count as two."""
    min_punctuated_line_share: float = 0.12
    """fineweb.line_punctuation: lines that end like a sentence; FineWeb: 0.12."""
    max_short_line_share: float = 0.67
    """fineweb.short_lines: lines under 30 bytes of UTF-8 (10 Chinese characters); FineWeb: 0.67 under 30 characters."""
    max_lines_per_word: float = 0.3
    """fineweb.lists: line ends per word; FineWeb: 0.3."""

    max_line_characters: int = 1000
    """code.line_length: longest line of code; The Stack: 1,000."""
    max_mean_line_characters: float = 100.0
    """code.mean_line_length: mean line of code; The Stack: 100."""
    min_code_alphanumeric_share: float = 0.25
    """code.alphanumeric: letters and digits among all characters of code; The Stack: 0.25."""
    max_code_digit_share: float = 0.5
    """code.digits: digits among the characters of code that are not white space."""
    max_data_share: float = 0.3
    """code.data: characters of code in runs of 64 or more letters and digits, as of hexadecimal and base64 data."""
    min_turns: int = 2
    """chat.turns: turns of a dialogue."""

    def __post_init__(self) -> None:
        _check_names("filters", self.filters, ("default", *_FILTERS))
        _check_names("skip_filters", self.skip_filters, _FILTERS)
        _check_names("line_rules", self.line_rules, LINE_RULES)
        _check_choices("mask", self.mask, tuple(MASKS))
        _check_choices("languages", self.languages, tuple(name for name in LANGUAGES if name != "code"))
        try:
            check_placeholder(self.placeholder)
        except ValueError as error:
            raise ConfigError(f"clean.placeholder = {self.placeholder!r}: {error}") from None
        for key in _SHARES:
            value = getattr(self, key)
            if not 0 <= value <= 1:
                raise ConfigError(f"clean.{key} = {value}: must be in [0, 1]")
        self._check_limits()
        self._check_perplexity()

    def _check_limits(self) -> None:
        limits = (
            ("characters", self.min_characters, self.max_characters),
            ("words", self.min_words, self.max_words),
            ("mean_word_length", self.min_mean_word_length, self.max_mean_word_length),
            ("perplexity", self.min_perplexity, self.max_perplexity),
        )
        for name, low, high in limits:
            if low is not None and not 0 <= low < math.inf:
                raise ConfigError(f"clean.min_{name} = {low}: must be finite and not negative")
            if high is not None and not high >= (low or 0):
                raise ConfigError(f"clean.max_{name} = {high}: must not be below clean.min_{name} = {low}")

    def _check_perplexity(self) -> None:
        if self.perplexity_model is None and (self.max_perplexity is not None or self.min_perplexity is not None):
            raise ConfigError(
                "clean.max_perplexity and clean.min_perplexity need clean.perplexity_model; "
                "make one with `python -m data_prep train-ngrams OUT.npz FILES...`"
            )
        for key in ("max_perplexity", "min_perplexity"):
            value = getattr(self, key)
            if value is not None and not 1 <= value < math.inf:
                raise ConfigError(f"clean.{key} = {value}: a perplexity is 1 or more")

    @property
    def active_filters(self) -> tuple[str, ...]:
        """The names of the filters that run, in the order in which they look at a text."""
        return tuple(
            name
            for name in _FILTERS
            if (_chosen(name, self.filters) or ("default" in self.filters and name in DEFAULT_FILTERS))
            and not _chosen(name, self.skip_filters)
        )


def _chosen(name: str, names: tuple[str, ...]) -> bool:
    return name in names or name.split(".")[0] in names


def _check_names(key: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    families = tuple(dict.fromkeys(name.split(".")[0] for name in known)) if key != "line_rules" else ()
    _check_choices(key, given, tuple(dict.fromkeys((*families, *known))))


def _check_choices(key: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"clean.{key}: {name!r} is not known; known are {', '.join(known)}")

"""Cleaning of one text: normalise it, judge it, tell its language.

A text is normalised once, at a cost linear in its length. A second time would change nothing in a text without HTML and
personal data; one that speaks about HTML would lose what the first time has decoded ("&lt;b&gt;" is "<b>" then), and a
placeholder may set free what stood beside it. What normalisation does by kind:

    every kind   line ends become LF; NFC (never NFKC, which rewrites Chinese punctuation); no control characters,
                 byte order marks, soft hyphens, zero-width spaces, bidirectional controls; joiners (ZWJ, ZWNJ) stay
                 only where scripts and emoji need them
    prose        HTML goes, but for code in Markdown, and entities are decoded; spaces of one width, no white space at
                 ends of lines, at most one blank line in a row;
                 if so configured: widths of punctuation, line rules
    chat, code   white space inside stays byte for byte
    not code     personal data is masked, unless clean.mask_code says: there too
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Final

from data_prep.cleaning import normalise
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.cleaning.filters import FILTERS, keeps_line
from data_prep.cleaning.markup import remove_html
from data_prep.cleaning.ngram_model import NgramModel, NgramModelError
from data_prep.cleaning.pii import Masker
from data_prep.cleaning.text_profile import Profile
from data_prep.config_file import ConfigError, to_table
from data_prep.reading.file_kinds import CODE_SUFFIXES, content_suffix

VERSION: Final = 2
"""Raised whenever the same settings give another result."""


class Cleaner:
    """Normalises, judges and tells the language of texts, by one configuration.

    Cheap to pickle: a copy reads the n-gram model again.
    """

    masked: Counter[str]
    """How many pieces of personal data of each kind were masked so far."""
    digest: str
    """Of everything that shapes the results: settings, n-gram model, version of this code."""

    def __init__(self, config: CleanConfig) -> None:
        """Load the n-gram model, if there is one.

        Raises:
            ConfigError: the model cannot be read.
        """
        self.config = config
        self._model = _load_model(config)
        self._masker = Masker(config.mask, config.placeholder)
        self.masked = self._masker.masked
        self._line_rules = frozenset(config.line_rules)
        names = config.active_filters
        self._filters: dict[str, list[tuple[str, Callable[[Profile, CleanConfig], bool]]]] = {
            kind: [(name, FILTERS[name].refuses) for name in names if kind in FILTERS[name].kinds]
            for kind in ("prose", "code", "chat")
        }
        self._profile = Profile("", "prose")
        self.digest = _digest(config, self._model)

    def __reduce__(self) -> tuple[type["Cleaner"], tuple[CleanConfig]]:
        return Cleaner, (self.config,)

    def normalise(self, text: str, kind: str = "prose") -> str:
        """The text in the form in which it is judged, compared and encoded."""
        if not self.config.normalise:
            return text if kind == "code" and not self.config.mask_code else self._masker(text)
        return {"prose": self._normalise_prose, "code": self._normalise_code, "chat": self._normalise_chat}[kind](text)

    def judge(self, text: str, kind: str, *, num_turns: int | None = None) -> str | None:
        """The name of the first filter that refuses a normalised text, None if all let it pass.

        num_turns: of a chat, for `chat.turns`.
        """
        if not self._filters[kind]:
            return None
        profile = self._look(text, kind, num_turns)
        for name, refuses in self._filters[kind]:
            if refuses(profile, self.config):
                return name
        return None

    def language(self, text: str, kind: str = "prose") -> str:
        """The language of a normalised text, one of language.LANGUAGES; cheap right after `judge` of the same text."""
        if kind == "code":
            return kind
        return self._look(text, kind, None).language

    def _look(self, text: str, kind: str, num_turns: int | None) -> Profile:
        if self._profile.text is not text or self._profile.kind != kind:
            self._profile = Profile(text, kind, model=self._model)
        self._profile.num_turns = num_turns
        return self._profile

    def _normalise_code(self, text: str) -> str:
        text = self._clean_characters(normalise.unify_line_ends(text)).strip("\n")
        return self._masker(text) if self.config.mask_code else text

    def _normalise_chat(self, text: str) -> str:
        return self._masker(self._clean_characters(normalise.unify_line_ends(text)).strip())

    def _normalise_prose(self, text: str) -> str:
        text = self._plain(text)
        if self.config.remove_html and (without := remove_html(text)) != text:
            text = self._plain(without)
        if self.config.punctuation == "fullwidth":
            text = normalise.widen_punctuation(text)
        text = normalise.tidy_lines(text)
        if self._line_rules:
            text = normalise.tidy_lines(self._remove_lines(text))
        return self._masker(text)

    def _plain(self, text: str) -> str:
        text = normalise.unify_spaces(normalise.unify_line_ends(text))
        if self.config.punctuation == "halfwidth":
            text = normalise.narrow(text)
        return self._clean_characters(text)

    def _clean_characters(self, text: str) -> str:
        return normalise.clean_characters(text, remove_private_use=self.config.remove_private_use)

    def _remove_lines(self, text: str) -> str:
        rules, min_words = self._line_rules, self.config.min_words_per_line
        lines = text.split("\n")
        return "\n".join([line for line in lines if keeps_line(line, rules, min_words)])


def kind_of(path: str, default: str) -> str:
    """The kind of the texts in a file: "code" by its suffix, else the default."""
    return "code" if content_suffix(path) in CODE_SUFFIXES else default


def _load_model(config: CleanConfig) -> NgramModel | None:
    if config.perplexity_model is None:
        return None
    try:
        return NgramModel.load(config.perplexity_model)
    except NgramModelError as error:
        raise ConfigError(f"clean.perplexity_model = {config.perplexity_model!r}: {error}") from error


def _digest(config: CleanConfig, model: NgramModel | None) -> str:
    """Of the settings without the model's path, which may be another on another machine."""
    settings = {key: value for key, value in to_table(config).items() if key != "perplexity_model"}
    content = {"version": VERSION, "model": None if model is None else model.digest, "settings": settings}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

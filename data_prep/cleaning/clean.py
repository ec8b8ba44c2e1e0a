"""Cleaning of one text: normalise it, judge it, tell its language.

Normalisation repeats its steps until they change nothing, so that it is idempotent by construction: what one step
uncovers (a tag behind an entity, an entity behind a full-width sign) the next round sees. What it does by kind:

    every kind   line ends become LF; NFC (never NFKC, which rewrites Chinese punctuation); no control characters,
                 byte order marks, soft hyphens, zero-width spaces, bidirectional controls; joiners (ZWJ, ZWNJ) stay
                 only where scripts and emoji need them
    prose        no HTML remains, spaces of one width, no white space at ends of lines, at most one blank line in a row;
                 if so configured: widths of punctuation, line rules
    chat, code   white space inside stays byte for byte
    not code     personal data is masked, unless clean.mask_code says: there too
"""

import hashlib
import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Final

from data_prep.cleaning.clean_config import CleanConfig
from data_prep.cleaning.filters import FILTERS, Profile, keeps_line
from data_prep.cleaning.ngram_model import NgramModel, NgramModelError
from data_prep.cleaning.pii import Masker
from data_prep.config_file import ConfigError, to_table
from data_prep.reading.file_kinds import CODE_SUFFIXES, content_suffix

VERSION: Final = 1
"""Raised whenever the same settings give another result."""

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
_USELESS_JOINERS: Final = re.compile("(?:\\A|(?<=[\x00-\u058f\u2e80-\ud7ff\uf900-\ufaff\uff00-\uffef]))[\u200c\u200d]+")
_PRIVATE_USE: Final = re.compile("[\ue000-\uf8ff\U000f0000-\U0010ffff]")
_BLANK_LINES: Final = re.compile("\n{3,}")

_ENTITY: Final = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ATTRIBUTES: Final = r"""(?:\s{1,20}[\w:-]{1,40}\s?=\s?(?:"[^"<>]{0,1000}"|'[^'<>]{0,1000}'|[^\s"'<>]{1,1000})){0,20}"""
_BLOCK_TAG: Final = re.compile(
    rf"</?(?:br|p|div|li|ul|ol|dl|dt|dd|tr|table|tbody|thead|hr|h[1-6]|section|article|blockquote){_ATTRIBUTES}\s?/?>\n?",
    re.IGNORECASE,
)
_INLINE_TAG: Final = re.compile(
    rf"</?(?:a|b|i|u|em|strong|span|font|img|td|th|sup|sub|small|big|center|code|tt){_ATTRIBUTES}\s?/?>", re.IGNORECASE
)
_COMMENT: Final = re.compile(r"<!--[^<>]{0,2000}-->")
_MAYBE_TAG: Final = re.compile(r"<[/!a-zA-Z]")

_HALFWIDTH: Final = str.maketrans({0x3000: " ", **{0xFF01 + index: chr(0x21 + index) for index in range(94)}})
_FULLWIDTH: Final = str.maketrans(",;:?!", "，；：？！")
_AFTER_HAN: Final = re.compile(r"(?<=[\u3400-\u9fff])[,;:?!](?![\w/])", re.ASCII)


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
        once = {"prose": self._normalise_prose, "code": self._normalise_code, "chat": self._normalise_chat}[kind]
        while (normal := once(text)) != text:
            text = normal
        return normal

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
        text = _remove_controls(_compose(_unify_line_ends(text)), self.config.remove_private_use).strip("\n")
        return self._masker(text) if self.config.mask_code else text

    def _normalise_chat(self, text: str) -> str:
        text = _remove_controls(_compose(_unify_line_ends(text)), self.config.remove_private_use)
        return self._masker(text.strip())

    def _normalise_prose(self, text: str) -> str:
        text = _unify_line_ends(text)
        if self.config.remove_html:
            text = remove_html(text)
        text = _remove_controls(_compose(_unify_spaces(text)), self.config.remove_private_use)
        if self.config.punctuation != "keep":
            text = set_punctuation(text, self.config.punctuation)
        text = _tidy_lines(text)
        if self._line_rules:
            text = self._remove_lines(text)
        return self._masker(text)

    def _remove_lines(self, text: str) -> str:
        rules, min_words = self._line_rules, self.config.min_words_per_line
        lines = text.split("\n")
        return "\n".join([line for line in lines if keeps_line(line, rules, min_words)])


def kind_of(path: str, default: str) -> str:
    """The kind of the texts in a file: "code" by its suffix, else the default."""
    return "code" if content_suffix(path) in CODE_SUFFIXES else default


def remove_html(text: str) -> str:
    """Decode entities, and remove comments and common tags; what only looks like a tag ("a < b") stays."""
    if "&" in text and _ENTITY.search(text):
        text = _ENTITY.sub(_decoded, text)
    if "<" in text and _MAYBE_TAG.search(text):
        text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", _COMMENT.sub("", text)))
    return text


def set_punctuation(text: str, width: str) -> str:
    """Turn full-width ASCII variants into ASCII ("halfwidth"), or , ; : ? ! behind Chinese into full width."""
    if text.isascii():
        return text
    if width == "halfwidth":
        return text.translate(_HALFWIDTH)
    return _AFTER_HAN.sub(lambda match: match[0].translate(_FULLWIDTH), text)


def _decoded(entity: re.Match[str]) -> str:
    character = html.unescape(entity[0])
    # A surrogate or an unknown name: not what an entity in a text could mean.
    return entity[0] if character == "\ufffd" else character


def _unify_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _unify_spaces(text: str) -> str:
    """Vertical tabs, form feeds and Unicode's line separators become line ends; spaces of other widths, spaces."""
    if "\x0b" in text or "\x0c" in text or "\u2028" in text or "\u2029" in text:
        text = text.translate(_LINE_BREAKS)
    return text if text.isascii() else _SPACES.sub(" ", text)


def _compose(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _remove_controls(text: str, remove_private_use: bool) -> str:
    if text.isascii():
        content = text.encode("ascii")
        kept = content.translate(None, _CONTROLS_OF_ASCII)
        return text if len(kept) == len(content) else kept.decode("ascii")
    text = _CONTROLS.sub("", text)
    if _MARKS_OF_DIRECTION.search(text) and not _RIGHT_TO_LEFT.search(text):
        text = _MARKS_OF_DIRECTION.sub("", text)
    if _JOINERS.search(text):
        text = _USELESS_JOINERS.sub("", text)
    return _PRIVATE_USE.sub("", text) if remove_private_use else text


def _tidy_lines(text: str) -> str:
    """No white space at the ends of lines and of the text, at most one blank line in a row."""
    text = text.strip()
    if " \n" in text or "\t\n" in text or "\u3000\n" in text:
        text = "\n".join([line.rstrip() for line in text.split("\n")])
    return _BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text


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

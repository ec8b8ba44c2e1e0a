"""The configuration of removing duplicates and texts of evaluation sets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_prep.config_file import ConfigError

if TYPE_CHECKING:
    from data_prep.duplicates.decontaminate import Decontaminator


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupConfig:
    """Which documents count as repetitions of an older one. The oldest always stays."""

    exact: bool = True
    """Drop copies that differ in white space only by the kind or length of its runs."""
    near: Literal["minhash", "simhash", "off"] = "minhash"
    """How near-duplicates are found: minhash for documents, simhash for short rows that differ by few characters."""
    threshold: float = 0.7
    """Similarity from which minhash drops a document: estimated Jaccard similarity of its 8-character runs."""
    max_distance: int = 3
    """Bits of 64 in which simhash lets near-duplicates differ, at most 3."""
    against: tuple[str, ...] = ()
    """Other data folders, prepared before with the same way of near; what they hold is older and not taken again."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"dedup.threshold = {self.threshold}: must be above 0 and at most 1")
        if not 0 <= self.max_distance <= 3:
            raise ConfigError(
                f"dedup.max_distance = {self.max_distance}: must be 0 to 3; beyond 3 the bands of simhash miss pairs"
            )
        if self.near != "off" and not self.exact:
            raise ConfigError(f'dedup.exact = false: dedup.near = "{self.near}" drops copies as well; use near = "off"')

    @property
    def digest(self) -> str:
        """Of everything that decides which documents are dropped."""
        from data_prep.duplicates import dedup, minhash, simhash  # here, so that holding a config needs no numpy

        if self.near == "off":
            return f"exact-{dedup.VERSION}" if self.exact else "off"
        version = {"minhash": minhash.VERSION, "simhash": simhash.VERSION}[self.near]
        return f"{self.near}-{version}-{dedup.VERSION}-{self.min_similarity!r}"

    @property
    def min_similarity(self) -> float:
        """The threshold in the terms of the chosen module's `similarity`."""
        return 1 - self.max_distance / 64 if self.near == "simhash" else self.threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class DecontaminateConfig:
    """Which evaluation sets no document may quote."""

    paths: tuple[str, ...] = ()
    """Files or patterns: of .jsonl, .json and .parquet every string of a record is an item, of .txt, .md and .csv every
    line or cell. None given: nothing is dropped."""
    ngram: int = 13
    """A document that shares this many successive tokens with an item is dropped: a token is a word, or a character
    of Chinese and other scripts without spaces."""
    min_item_tokens: int = 13
    """Items shorter than ngram count if they are found whole and have at least this many tokens; with ngram tokens or
    more asked for, they never do. Items below about 8 tokens are phrases that anyone may write."""

    def __post_init__(self) -> None:
        if not 2 <= self.ngram <= 64:
            raise ConfigError(f"decontaminate.ngram = {self.ngram}: must be 2 to 64")
        if self.min_item_tokens < 2:
            raise ConfigError(f"decontaminate.min_item_tokens = {self.min_item_tokens}: must be 2 or more")

    def load(self) -> "Decontaminator | None":
        """Read the evaluation sets; None if there are none.

        Raises:
            ConfigError: see `Decontaminator`.
        """
        from data_prep.duplicates.decontaminate import Decontaminator  # here, so that holding a config needs no numpy

        return Decontaminator(self.paths, self.ngram, self.min_item_tokens) if self.paths else None

    @property
    def digest(self) -> str:
        """Of the content of the evaluation sets and of the settings; reads the files."""
        decontaminator = self.load()
        return "" if decontaminator is None else decontaminator.digest

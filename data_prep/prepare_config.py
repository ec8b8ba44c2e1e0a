"""The configuration of a preparation: what to read, how to clean it, with which tokenizer, what to write, and how."""

import re
from dataclasses import dataclass, field
from typing import Literal

from data_prep.cleaning.clean_config import CleanConfig
from data_prep.config_file import ConfigError, UnplacedError
from data_prep.duplicates.dedup_config import DecontaminateConfig, DedupConfig
from data_prep.engine import EngineConfig
from data_prep.reading.templates import Layout

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One source: its files, and how their records become documents."""

    paths: tuple[str, ...] = ()
    """Files, patterns (** crosses folders) or URLs (s3://, hf://, https://). None given: the Python sources of this
    installation."""
    layout: str = "auto"
    """How records are laid out: a name ("text", "messages", "sharegpt", "wikipedia", ...; see
    docs/data-preparation.md), or a template such as "{title?}\\n{body}". auto: by the fields of the first record."""
    text_field: str | None = None
    """Field of a JSON line, or column of a parquet file, that holds the text; dots lead inside: "meta.text"."""
    split: Literal["file", "lines", "paragraphs"] = "file"
    """What makes a document in plain text files."""
    encoding: str = "utf-8"
    """Of plain text and JSON files, for example gb18030."""
    kind: Literal["auto", "prose", "code", "chat"] = "auto"
    """Which filters apply. auto: by the suffix of the file, and chat where a record has turns."""
    max_input_bytes: int | None = None
    """Read at most this much at a time: whole files, picked by the hash of their names. Default: everything."""
    weight: float | None = None
    """Share in the mixture that is proposed for training. Default: its share of the tokens."""
    max_epochs: int | None = None
    """How often training may see it, in the proposed mixture. Default: as often as the run wants."""
    licence: str = ""
    """Written into the report."""

    def __post_init__(self) -> None:
        if self.max_input_bytes is not None and self.max_input_bytes < 1:
            raise UnplacedError(f"max_input_bytes = {self.max_input_bytes}: must be positive; leave it out for all")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UnplacedError(f"weight = {self.weight}: must be positive")
        if self.max_epochs is not None and self.max_epochs < 1:
            raise UnplacedError(f"max_epochs = {self.max_epochs}: must be positive")
        if self.text_field is not None and self.layout != "auto":
            raise UnplacedError("text_field and layout say the same thing; keep one")
        self.read_layout()

    def read_layout(self) -> Layout:
        """The layout that the keys describe."""
        if self.text_field is not None:
            return Layout.of_template(self.text_field, encoding=self.encoding, split=self.split)
        make = Layout.of_template if "{" in self.layout else Layout.named
        return make(self.layout, encoding=self.encoding, split=self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig(SourceConfig):
    """What to read, if there is one source; several are tables [sources.NAME] with the same keys but `source`."""

    source: str | None = None
    """Name of the source, which names its shards. Default: "python" for the installation's sources, else "text"."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        if self.source is not None:
            _check_name("input.source", self.source)

    @property
    def source_name(self) -> str:
        """The name of the source, defaults resolved."""
        return self.source or ("text" if self.paths else "python")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Which tokenizer to load, or how to train one."""

    path: str | None = None
    """A tokenizer.json, a sentencepiece .model, or a folder with one. Default: train one on the input."""
    eos_token: str | None = None
    """The token that ends documents. Default: what the tokenizer declares, or the first usual name it knows."""
    algorithm: Literal["bpe", "sentencepiece-bpe", "sentencepiece-unigram"] = "bpe"
    """What is trained: a byte-level BPE, or sentencepiece with byte fallback."""
    vocab_size: int = 32_000
    """Tokens of a vocabulary trained here; up to 65,536 ids take two bytes each."""
    training_bytes: int = 32_000_000
    """About how much text to train on, sampled over the whole input."""

    def __post_init__(self) -> None:
        if self.path is None and self.eos_token is not None:
            raise ConfigError("tokenizer.eos_token is for tokenizer.path; one trained here ends documents with its own")
        if self.training_bytes < 1:
            raise ConfigError(f"tokenizer.training_bytes = {self.training_bytes}: must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """What to write, and where."""

    folder: str = "data/default"
    """The data folder to make, or to add to: files that it does not hold yet become further shards."""
    overwrite: bool = False
    """Replace a data folder that was made with another configuration, or from files that have changed."""
    shard_tokens: int = 128 * 1024 * 1024
    """Targets per shard file, a multiple of sample_tokens."""
    sample_tokens: int = 2048
    """Targets per training sample: the sequence length."""
    validation_fraction: float = 0.005
    """Share of the documents held out, chosen by the hash of their text; 0 holds out none."""
    mixture: tuple[str, ...] = ()
    """The mixture that is proposed for training, as `data.mixture` there: "web=0.7 code=0.3", and later stages with the
    number of tokens from which they hold, "20e9: web=0.4 code=0.6". Default: the sources' weights."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 1 or self.shard_tokens < 1 or self.shard_tokens % self.sample_tokens:
            raise ConfigError(
                f"output.shard_tokens = {self.shard_tokens}: must be a positive multiple of "
                f"output.sample_tokens = {self.sample_tokens}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"output.validation_fraction = {self.validation_fraction}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """One preparation of one source or of several."""

    input: InputConfig = field(default_factory=InputConfig)
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    clean: CleanConfig = field(default_factory=CleanConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in self.sources:
            _check_name(f"sources.{name}", name)
        if self.sources and self.input != InputConfig():
            raise ConfigError("[input] is for one source, [sources.NAME] for several; move [input] to a source's table")
        names = list(self.sources) or [self.input.source_name]
        for entry in self.output.mixture:
            named = {part.partition("=")[0] for part in entry.rpartition(":")[2].replace(",", " ").split()}
            if unknown := sorted(named - set(names)):
                raise ConfigError(f"output.mixture names {', '.join(unknown)}; the sources are {', '.join(names)}")
        given = {name: source.weight for name, source in self.sources.items() if source.weight is not None}
        if given and len(given) < len(self.sources) and sum(given.values()) >= 1:
            raise ConfigError(
                f"the weights of the sources {', '.join(given)} add up to {sum(given.values()):g} and leave nothing "
                "for the others; give every source a weight, or less than 1 to those that have one"
            )


def _check_name(key: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{key} = {name!r}: letters, digits, '.', '_' and '-' only, it names files")

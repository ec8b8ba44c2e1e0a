"""The configuration of a preparation: what to read, with which tokenizer, what to write, and how."""

import re
from dataclasses import dataclass, field

from data_prep.config_file import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """What to read."""

    paths: tuple[str, ...] = ()
    """Files or patterns (** crosses folders): .txt .md .py .jsonl .jsonl.gz .jsonl.zst .parquet.
    None given: the Python sources of this installation."""
    source: str | None = None
    """Name of the source, which names its shards. Default: "python" for the installation's sources, else "text"."""
    text_field: str = "text"
    """Field of a JSON line, or column of a parquet file, that holds the text."""
    max_input_bytes: int | None = None
    """Read at most this much: whole files, picked by the hash of their names. Default: everything."""

    def __post_init__(self) -> None:
        if self.source is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.source):
            raise ConfigError(f"input.source = {self.source!r}: letters, digits, '.', '_' and '-' only, it names files")
        if self.max_input_bytes is not None and self.max_input_bytes < 1:
            raise ConfigError(f"input.max_input_bytes = {self.max_input_bytes}: must be positive; leave it out for all")

    @property
    def source_name(self) -> str:
        """The name of the source, defaults resolved."""
        return self.source or ("text" if self.paths else "python")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Which tokenizer to load, or how to train one."""

    path: str | None = None
    """A tokenizer.json, a sentencepiece .model, or a folder with one. Default: train a byte-level BPE on the input."""
    eos_token: str | None = None
    """The token that ends documents. Default: what the tokenizer declares, or the first usual name it knows."""
    vocab_size: int = 32_000
    """Tokens of a BPE trained here; up to 65,536 ids take two bytes each."""
    training_bytes: int = 32_000_000
    """About how much text to train a BPE on, sampled over the whole input."""

    def __post_init__(self) -> None:
        if self.path is None and self.eos_token is not None:
            raise ConfigError("tokenizer.eos_token is for tokenizer.path; a BPE trained here ends with <|endoftext|>")
        if self.training_bytes < 1:
            raise ConfigError(f"tokenizer.training_bytes = {self.training_bytes}: must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """What to write, and where."""

    folder: str = "data/default"
    """The data folder to make."""
    overwrite: bool = False
    """Replace a data folder that was made from other input or with another configuration."""
    shard_tokens: int = 128 * 1024 * 1024
    """Targets per shard file, a multiple of sample_tokens."""
    sample_tokens: int = 2048
    """Targets per training sample: the sequence length."""
    validation_fraction: float = 0.005
    """Share of the documents held out, chosen by the hash of their text; 0 holds out none."""

    def __post_init__(self) -> None:
        if self.sample_tokens < 1 or self.shard_tokens < 1 or self.shard_tokens % self.sample_tokens:
            raise ConfigError(
                f"output.shard_tokens = {self.shard_tokens}: must be a positive multiple of "
                f"output.sample_tokens = {self.sample_tokens}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"output.validation_fraction = {self.validation_fraction}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How to run; nothing here changes the result."""

    num_workers: int | None = None
    """Worker processes; 0 and 1 run in this process. Default: one per core."""
    max_bad_fraction: float = 0.01
    """Share of bad lines above which the preparation stops; fewer are left out, counted and listed."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"engine.num_workers = {self.num_workers}: must not be negative")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"engine.max_bad_fraction = {self.max_bad_fraction}: must be in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """One preparation of one source."""

    input: InputConfig = field(default_factory=InputConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

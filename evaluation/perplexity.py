"""How well a model predicts held-out text: loss per token, perplexity, and bits per byte.

Bits per byte divides by the UTF-8 bytes that the predicted tokens stand for, so models with different tokenizers can be
compared; loss and perplexity per token cannot.

    python -m evaluation.perplexity runs/demo                             newest checkpoint, its own held-out shards
    python -m evaluation.perplexity runs/demo --data data/other --split train
    python -m evaluation.perplexity exported/ --text README.md docs/*.md
"""

import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from data_prep import command_line

if TYPE_CHECKING:
    from evaluation.model_folder import LoadedModel
    from evaluation.score import Score
    from model.batch import TokenRows

# torch and the model are imported where they are used, so that --help is instant.


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityCommand:
    """Scores a model on shards or on raw text."""

    model: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder (step-N) or Hugging Face folder."""
    data: Path | None = None
    """Data folder to score on; by default those that the run was started with."""
    split: str = "validation"
    """Split of the data folder."""
    text: tuple[Path, ...] = ()
    """Text files to score instead of shards; each is one document."""
    sequence_length: int | None = None
    """Tokens per window; by default the run's, or the model's context length."""
    isolate_documents: bool | None = None
    """Whether tokens see only their own document; by default as the run was trained."""
    max_sequences: int = 1_000
    """Windows to score at most, spread evenly over the split."""
    batch_size: int = 8
    """Windows per forward pass."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuses sizes that make no batch."""
        for key in ("sequence_length", "max_sequences", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least 1")


def evaluate(command: PerplexityCommand) -> "tuple[Score, int]":
    """Runs the command and returns the score and the tokens per window.

    Raises:
        ValueError: whatever is wrong with the model, the data or the text.
    """
    from tqdm import tqdm

    from evaluation.model_folder import load_model
    from evaluation.score import padded_token_bytes, score

    loaded = load_model(command.model, device=command.device)
    trained = training_settings(command.model)
    length = command.sequence_length or trained.get("sequence_length") or loaded.config.context_length
    batches = _text(command, loaded, length) if command.text else _shards(command, loaded, length, trained)
    token_bytes = padded_token_bytes(loaded.tokenizer, loaded.config.vocab_size)
    result = score(loaded.model, tqdm(batches, desc="score", unit="batch", disable=None), token_bytes, loaded.device)
    if not result.num_targets:
        raise ValueError("the text has no token to predict")
    return result, length


def _shards(
    command: PerplexityCommand, loaded: "LoadedModel", length: int, trained: dict[str, Any]
) -> "Iterator[TokenRows]":
    from data_prep.manifest import read_manifest
    from evaluation.score import shard_batches
    from resume.samples import SampleReader
    from resume.verify import open_split

    if command.data is None and "paths" not in trained:
        raise ValueError(f"{command.model} does not say what it was trained on; pass --data FOLDER or --text FILE")
    folders = {path: read_manifest(path) for path in ([command.data] if command.data else map(Path, trained["paths"]))}
    for folder, manifest in folders.items():
        if manifest.tokenizer_digest != loaded.tokenizer.digest:
            raise ValueError(f"{folder} was encoded with another tokenizer than {command.model}'s; score raw --text")
    files = open_split(folders, command.split)
    isolate = command.isolate_documents
    vocab_size, eos_id = loaded.config.vocab_size, loaded.tokenizer.eos_id
    return shard_batches(
        SampleReader(files, sequence_length=length, vocab_size=vocab_size, eos_id=eos_id),
        num_sequences=command.max_sequences,
        batch_size=command.batch_size,
        isolate_documents=trained.get("isolate_documents", False) if isolate is None else isolate,
    )


def _text(command: PerplexityCommand, loaded: "LoadedModel", length: int) -> "Iterator[TokenRows]":
    from evaluation.score import text_batches

    for path in command.text:
        try:
            tokens = loaded.tokenizer.encode(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from error
        yield from text_batches(
            tokens, sequence_length=length, batch_size=command.batch_size, eos_id=loaded.tokenizer.eos_id
        )


def training_settings(model: Path) -> dict[str, Any]:
    """The [data] table of the run that a model comes from; empty for a Hugging Face folder."""
    for config in (model / "config.toml", model.parent / "config.toml"):
        if config.is_file():
            return tomllib.loads(config.read_text(encoding="utf-8")).get("data", {})
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(
            PerplexityCommand, argv, prog="python -m evaluation.perplexity", description=__doc__
        )
        result, length = evaluate(command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"loss {result.loss_mean:.4f} nats/token  perplexity {result.perplexity:,.3f}  "
        f"bits/byte {result.bits_per_byte:.4f}  ({result.num_targets:,} tokens, {result.num_bytes:,} bytes, "
        f"windows of {length})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How well a model predicts held-out text: loss per token, perplexity, and bits per byte.

Bits per byte divides by the UTF-8 bytes that the predicted tokens stand for, so models with different tokenizers can be
compared; loss and perplexity per token cannot.

    python -m evaluation.perplexity runs/demo                             newest checkpoint, its own held-out shards
    python -m evaluation.perplexity runs/demo --data data/other --split train
    python -m evaluation.perplexity exported/ --text README.md docs/*.md
"""

import dataclasses
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from data_prep.manifest import read_manifest
from data_prep.tokenizer import Tokenizer
from evaluation.model_folder import load_model
from evaluation.score import Score, score, shard_batches, text_batches
from model.batch import Batch
from resume.manifest import open_split
from resume.samples import SampleReader


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityCommand:
    """Scores a model on shards or on raw text."""

    model: tyro.conf.Positional[str]
    """Run folder, checkpoint folder (step-N) or Hugging Face folder."""
    data: str | None = None
    """Data folder to score on; by default the one the run was trained with."""
    split: str = "validation"
    """Split of the data folder."""
    text: tuple[str, ...] = ()
    """Text files to score instead of shards; each is one document."""
    sequence_length: int | None = None
    """Tokens per window; by default the model's context length."""
    max_sequences: int = 1_000
    """Windows to score at most, spread evenly over the split."""
    batch_size: int = 8
    """Windows per forward pass."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it is available."""


def evaluate(command: PerplexityCommand) -> Score:
    """Runs the command and returns the score.

    Raises:
        ValueError: whatever is wrong with the model, the data or the text.
    """
    loaded = load_model(command.model, device=command.device)
    config, tokenizer = loaded.config, loaded.tokenizer
    length = command.sequence_length or config.context_length
    token_bytes = np.pad(tokenizer.token_bytes(), (0, config.vocab_size - tokenizer.vocab_size))
    if command.text:
        batches = _batches_of_files(command.text, tokenizer, length, command.batch_size)
    else:
        folder = Path(command.data or _training_data(Path(command.model)))
        manifest = read_manifest(folder)
        if manifest.tokenizer_digest != tokenizer.digest:
            raise ValueError(f"{folder} was encoded with another tokenizer than {command.model}'s; score raw --text")
        files = open_split(folder, manifest, command.split)
        reader = SampleReader(files, sequence_length=length, vocab_size=config.vocab_size)
        batches = shard_batches(
            reader, num_sequences=command.max_sequences, batch_size=command.batch_size, eos_id=manifest.eos_id
        )
    return score(loaded.model, tqdm(batches, desc="score", unit="batch", disable=None), token_bytes, loaded.device)


def _batches_of_files(paths: Sequence[str], tokenizer: Tokenizer, length: int, batch_size: int) -> Iterator[Batch]:
    for path in paths:
        tokens = tokenizer.encode(Path(path).read_text(encoding="utf-8"))
        yield from text_batches(tokens, sequence_length=length, batch_size=batch_size, eos_id=tokenizer.eos_id)


def _training_data(model: Path) -> str:
    for config in (model / "config.toml", model.parent / "config.toml"):
        if config.is_file():
            return tomllib.loads(config.read_text(encoding="utf-8"))["data"]["path"]
    raise ValueError(f"{model} does not say what it was trained on; pass --data FOLDER or --text FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    command = tyro.cli(PerplexityCommand, args=argv, prog="python -m evaluation.perplexity", description=__doc__)
    try:
        result = evaluate(command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"loss {result.loss_mean:.4f} nats/token  perplexity {result.perplexity:,.3f}  "
        f"bits/byte {result.bits_per_byte:.4f}  ({result.num_targets:,} tokens, {result.num_bytes:,} bytes)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes what a teacher says of a data folder's targets beside its shards, so that it need not be in memory later.

python -m train.teacher_cache runs/large data/default --k 64

Each shard's file appears whole: after an interruption the command goes on with the shards that have none yet. A run
with `--distill.cached True` reads them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import command_line

# torch and the model are imported where they are used, so that --help is instant.


def write_cache(
    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")],
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")],
    /,
    *,
    k: int = 64,
    temperature: float = 1.0,
    sequence_length: int | None = None,
    isolate_documents: bool = False,
    split: str = "train",
    batch_size: int = 8,
    device: str = "auto",
) -> None:
    """Writes a teacher's likeliest tokens beside each shard that lacks them.

    Args:
        model: The teacher: run folder, step-N checkpoint or Hugging Face folder.
        data: Data folder, made with the teacher's vocabulary.
        k: Tokens to keep of each distribution; all others are kept as one sum.
        temperature: Divides the logits, as distill.temperature in the run that reads the files.
        sequence_length: Tokens of a sample, as in that run; by default those that the folder was prepared for.
        isolate_documents: Whether tokens see only their own document, as data.isolate_documents in that run.
        split: Split of the data folder.
        batch_size: Samples per forward pass.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
    """
    for flag, value in (("--k", k), ("--temperature", temperature), ("--batch-size", batch_size)):
        if value <= 0:
            raise ValueError(f"{flag} {value}: must be positive")
    from train.teacher_targets import write_teacher_cache

    num_files, num_written = write_teacher_cache(
        model,
        data,
        num_kept=k,
        temperature=temperature,
        sequence_length=sequence_length,
        isolate_documents=isolate_documents,
        split=split,
        batch_size=batch_size,
        device=device,
    )
    print(f"{data}: {num_files} shards, {num_written} written now, {num_files - num_written} before")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command_line.read(write_cache, argv, prog="python -m train.teacher_cache", description=__doc__)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

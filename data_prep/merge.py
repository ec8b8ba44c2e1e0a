"""Encoded units to shards: split by hash, number the bad lines, count everything."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.documents import BadLine, InputError
from data_prep.encode import SCRATCH_DTYPE, EncodedUnit
from data_prep.shards import ShardHeader, ShardWriter
from data_prep.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
BAD_LINES_FILE = "bad_lines.jsonl"
NUM_EXAMPLES = 3
_HASHES = 2**64


@dataclass(slots=True)
class SplitCounts:
    """What one split received."""

    num_documents: int = 0
    num_tokens: int = 0
    """Targets: the documents' tokens and one EOS for each."""
    text_bytes: int = 0


@dataclass(slots=True)
class BadLines:
    """Bad lines by reason, with the first few of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[BadLine]] = field(default_factory=dict)

    def add(self, bad: BadLine) -> None:
        """Count one."""
        self.counts[bad.reason] += 1
        examples = self.examples.setdefault(bad.reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append(bad)

    def by_reason(self) -> list[str]:
        """One line per reason, the commonest first."""
        return [
            f"{count:,} x {reason}, e.g. " + ", ".join(f"{bad.path}:{bad.line}" for bad in self.examples[reason])
            for reason, count in self.counts.most_common()
        ]


@dataclass(slots=True)
class Merged:
    """The shards of a data set, and what went into them."""

    shards: dict[str, list[tuple[Path, ShardHeader]]]
    splits: dict[str, SplitCounts]
    bad_lines: BadLines
    smallest_hash: int = _HASHES
    largest_hash: int = -1

    @property
    def num_documents(self) -> int:
        """Documents of both splits."""
        return sum(split.num_documents for split in self.splits.values())


def split_threshold(validation_fraction: float) -> int:
    """Texts whose hash lies below it go to validation."""
    return int(validation_fraction * _HASHES)


def merge(
    encoded: Iterable[EncodedUnit], folder: Path, source: str, tokenizer: Tokenizer, shard_tokens: int, threshold: int
) -> Merged:
    """Write `<folder>/train/<source>-*.bin`, the same for validation, and bad_lines.jsonl if there are any.

    The units must come in the order of the input; their scratch files are deleted one by one.
    """
    merged = Merged({}, {TRAIN: SplitCounts(), VALIDATION: SplitCounts()}, BadLines())
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder / split,
                    source,
                    vocab_size=tokenizer.vocab_size,
                    tokenizer_digest=tokenizer.digest,
                    eos_id=tokenizer.eos_id,
                    shard_tokens=shard_tokens,
                )
            )
            for split in merged.splits
        }
        for unit in _numbered(encoded):
            _add_documents(unit, writers, merged, threshold)
            _list_bad_lines(unit.bad_lines, folder / BAD_LINES_FILE, merged.bad_lines)
            unit.tokens_file.unlink()
        merged.shards = {split: writer.close() for split, writer in writers.items()}
    return merged


def check_bad_lines(merged: Merged, max_bad_fraction: float) -> None:
    """Refuse an input with too many bad lines, or with nothing else.

    Raises:
        InputError: with the counts by reason, and examples.
    """
    num_bad = merged.bad_lines.counts.total()
    num_lines = num_bad + merged.num_documents
    reasons = "".join(f"\n  {line}" for line in merged.bad_lines.by_reason())
    if num_bad > max_bad_fraction * num_lines:
        raise InputError(
            f"{num_bad:,} of {num_lines:,} lines are bad ({num_bad / num_lines:.1%}), above engine.max_bad_fraction = "
            f"{max_bad_fraction:g}. Mend the input, or raise the limit to leave them out:{reasons}"
        )
    if not merged.num_documents:
        raise InputError(f"the input has no documents; nothing was written{':' if reasons else ''}{reasons}")


def _numbered(encoded: Iterable[EncodedUnit]) -> Iterator[EncodedUnit]:
    """Turn the line numbers of units into those of files: every line is a document or bad, so they can be counted."""
    lines_before: Counter[str] = Counter()
    for unit in encoded:
        path = unit.unit.paths[0]
        if unit.unit.kind == "texts":
            yield unit
            continue
        moved = tuple(BadLine(bad.path, bad.line + lines_before[path], bad.reason) for bad in unit.bad_lines)
        lines_before[path] += unit.num_tokens.size + len(unit.bad_lines)
        yield EncodedUnit(
            unit.unit, unit.tokens_file, unit.num_tokens, unit.text_bytes, unit.text_hashes, bad_lines=moved
        )


def _add_documents(unit: EncodedUnit, writers: dict[str, ShardWriter], merged: Merged, threshold: int) -> None:
    if not unit.num_tokens.size:
        return
    merged.smallest_hash = min(merged.smallest_hash, int(unit.text_hashes.min()))
    merged.largest_hash = max(merged.largest_hash, int(unit.text_hashes.max()))
    with unit.tokens_file.open("rb") as file:
        for num_tokens, text_bytes, text_hash in zip(
            unit.num_tokens.tolist(), unit.text_bytes.tolist(), unit.text_hashes.tolist(), strict=True
        ):
            split = VALIDATION if text_hash < threshold else TRAIN
            writers[split].add(np.fromfile(file, dtype=SCRATCH_DTYPE, count=num_tokens))
            counts = merged.splits[split]
            counts.num_documents += 1
            counts.num_tokens += num_tokens + 1
            counts.text_bytes += text_bytes


def _list_bad_lines(bad_lines: Iterable[BadLine], path: Path, tally: BadLines) -> None:
    lines: list[str] = []
    for bad in bad_lines:
        tally.add(bad)
        lines.append(json.dumps({"path": bad.path, "line": bad.line, "reason": bad.reason}) + "\n")
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

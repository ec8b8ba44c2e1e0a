"""How well a model predicts text of each domain: loss per token, perplexity, bits per byte.

A domain is a sub-folder or a file of the folder (.txt .jsonl .json .parquet, source code, also .gz and .zst), or a
source of a data folder. Every document is scored whole and alone, after an EOS as in training, so that its first token
counts; a longer one in windows that overlap, so that only the first tokens of a document lack context.

Models of different tokenizers compare by bits per byte, or by perplexity per token of one reference tokenizer, which is
exp(loss sum / tokens that the reference makes of the same text).

Source: Wei et al., "Skywork: A More Open Bilingual Foundation Model", 2023, section 4 (normalised perplexity).

    python -m evaluation.domains runs/demo texts/                       texts/wiki/*.jsonl, texts/law.txt, ...
    python -m evaluation.domains runs/demo data/demo --split validation
    python -m evaluation.domains runs/demo texts/ --reference other-model/ --json domains.json
"""

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_prep import command_line

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.tokenizing.tokenizer import Tokenizer
    from evaluation.domain_texts import Text
    from evaluation.model_folder import LoadedModel
    from evaluation.score import Score
    from model.transformer import Transformer

# torch and the model are imported where they are used, so that --help is instant.

_SORTED_BATCHES = 32
"""So many batches of windows are sorted by length at once, as windows of one length need no padding."""
ALL = "all"
"""The name of the sum over the domains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainSettings:
    """What is scored, and in what windows."""

    split: str = "validation"
    """Split to score, of a data folder."""
    window: int | None = None
    """Tokens that a forward reads at most; by default the run's sequence length, or the model's context length."""
    stride: int | None = None
    """Tokens by which the windows of a long document move on; by default half a window."""
    max_documents: int | None = None
    """Documents to score at most, the first of each domain."""
    reference: str | None = None
    """Tokenizer, or folder with one, whose tokens the normalised perplexity is per."""
    batch_size: int = 8
    """Windows per forward pass."""

    def __post_init__(self) -> None:
        """Refuses sizes that score nothing."""
        for key in ("window", "stride", "max_documents", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainsCommand(DomainSettings):
    """Scores a model on the texts of each domain."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder, checkpoint folder (step-N) or Hugging Face folder."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder with one sub-folder or file per domain, or a data folder."""
    json: Path | None = None
    """File to write the figures to."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""


def evaluate_domains(loaded: "LoadedModel", folder: Path, settings: DomainSettings) -> dict[str, dict[str, float]]:
    """The figures of each domain of a folder and, if there are several, of ALL.

    Raises:
        ValueError: no domain there, one without a document, windows that do not fit each other.
    """
    from data_prep.tokenizing.tokenizer import load_tokenizer
    from evaluation.domain_texts import domain_texts
    from evaluation.perplexity import training_settings

    window = settings.window or training_settings(loaded.path).get("sequence_length") or loaded.config.context_length
    stride = settings.stride or -(-window // 2)
    if stride > window:
        raise ValueError(f"--stride {stride}: longer than the window of {window}, tokens between them would not count")
    reference = load_tokenizer(settings.reference) if settings.reference else None
    figures: dict[str, dict[str, float]] = {}
    for name, texts in domain_texts(folder, loaded.tokenizer, settings.split).items():
        counts = {"documents": 0, "bytes": 0} | ({"reference_tokens": 0} if reference else {})
        documents = _counted(itertools.islice(texts, settings.max_documents), counts, reference)
        score = score_documents(loaded, documents, window=window, stride=stride, batch_size=settings.batch_size)
        if not score.num_targets:
            raise ValueError(f"{folder}: domain {name!r} has no document that can be read; add some, or move it away")
        figures[name] = _figures(score.loss_sum, score.num_targets, counts)
    return figures | ({ALL: _total(list(figures.values()))} if len(figures) > 1 else {})


def score_documents(
    loaded: "LoadedModel",
    documents: "Iterable[Sequence[int] | NDArray[np.unsignedinteger]]",
    *,
    window: int,
    stride: int,
    batch_size: int,
) -> "Score":
    """The loss over every token of the documents, each document alone and after an EOS."""
    import numpy as np

    from evaluation.score import Score

    eos_id = loaded.tokenizer.eos_id
    streams = (np.concatenate([[eos_id], np.asarray(tokens, dtype=np.int64)]) for tokens in documents)
    pieces = (piece for stream in streams for piece in windows(stream, window, stride))
    total = Score()
    while chunk := list(itertools.islice(pieces, _SORTED_BATCHES * batch_size)):
        chunk.sort(key=lambda piece: len(piece[0]))
        for first in range(0, len(chunk), batch_size):
            total += _score_windows(loaded.model, chunk[first : first + batch_size], eos_id)
    return total


def windows(stream: "NDArray[np.int64]", window: int, stride: int) -> "Iterator[tuple[NDArray[np.int64], int]]":
    """Pieces of at most window + 1 tokens, and how many of their first targets an earlier piece has counted."""
    num_counted, num_targets = 0, len(stream) - 1
    while num_counted < num_targets:
        end = min(num_counted + (stride if num_counted else window), num_targets)
        begin = max(0, end - window)
        yield stream[begin : end + 1], num_counted - begin
        num_counted = end


def _score_windows(model: "Transformer", pieces: "Sequence[tuple[NDArray[np.int64], int]]", pad_id: int) -> "Score":
    import torch

    from evaluation.score import Score
    from kernels.cross_entropy import IGNORE
    from kernels.linear_cross_entropy import linear_cross_entropy_sum

    length = max(len(tokens) for tokens, _ in pieces) - 1
    # Attention is causal, so that padding behind a text changes nothing of it.
    inputs = torch.full((len(pieces), length), pad_id, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for row, (tokens, num_counted) in enumerate(pieces):
        inputs[row, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
        targets[row, num_counted : len(tokens) - 1] = torch.from_numpy(tokens[1 + num_counted :])
    device = model.embedding.weight.device
    inputs, on_device = inputs.to(device), targets.to(device)
    soft_cap = model.config.logit_softcap
    with torch.no_grad():
        loss_sum = model(
            inputs,
            readout=lambda hidden, head: linear_cross_entropy_sum(hidden, head, on_device, soft_cap=soft_cap),
        )
    return Score(loss_sum.item(), int((targets != IGNORE).sum()))


def _counted(
    texts: "Iterable[Text]", counts: dict[str, int], reference: "Tokenizer | None"
) -> "Iterator[Sequence[int] | NDArray[np.unsignedinteger]]":
    """The tokens of the texts; what else is known of each is added to the counts as it passes by."""
    for text in texts:
        counts["documents"] += 1
        counts["bytes"] += len(text.text.encode("utf-8", "replace"))
        if reference is not None:
            counts["reference_tokens"] += len(reference.encode(text.text))
        yield text.tokens


def _figures(loss_sum: float, num_tokens: float, counts: Mapping[str, float]) -> dict[str, float]:
    from evaluation.score import Score

    score = Score(loss_sum, num_tokens, counts["bytes"])
    figures = {
        **counts,
        "tokens": num_tokens,
        "loss_sum": loss_sum,
        "loss": score.loss_mean,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
    }
    if "reference_tokens" in counts:
        figures["normalised_perplexity"] = Score(loss_sum, counts["reference_tokens"]).perplexity
    return figures


def _total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums over the domains, divided at the very end."""
    keys = [key for key in ("documents", "bytes", "reference_tokens") if key in parts[0]]
    sums = {key: sum(part[key] for part in parts) for key in (*keys, "loss_sum", "tokens")}
    return _figures(sums["loss_sum"], sums["tokens"], {key: sums[key] for key in keys})


def table(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The figures as lines of text."""
    from data_prep.looking.text_table import aligned

    columns = {"documents": ",.0f", "tokens": ",.0f", "loss": ".4f", "perplexity": ",.3f", "bits_per_byte": ".4f"}
    if any("normalised_perplexity" in row for row in figures.values()):
        columns["normalised_perplexity"] = ",.3f"
    rows = [[name, *(format(row[key], form) for key, form in columns.items())] for name, row in figures.items()]
    return aligned(["domain", *(key.replace("_", " ") for key in columns)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(DomainsCommand, argv, prog="python -m evaluation.domains", description=__doc__)
        figures = _run(command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(figures)))
    return 0


def _run(command: DomainsCommand) -> dict[str, dict[str, float]]:
    from data_prep import publish
    from evaluation.model_folder import load_model

    figures = evaluate_domains(load_model(command.model, device=command.device), command.folder, command)
    if command.json is not None:
        publish.write_text(command.json, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    return figures


if __name__ == "__main__":
    sys.exit(main())

"""What a data folder holds, in numbers, counted in its tables of documents."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.documents_table import KEPT
from data_prep.looking.prepared import PreparedFolder
from data_prep.looking.text_table import aligned

QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass(slots=True)
class StreamCounts:
    """The documents of a split of a source."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    shards: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    """Number of documents by their number of tokens."""


def quantiles(lengths: dict[int, int]) -> list[int]:
    """The lengths that QUANTILES of the documents do not surpass."""
    values = np.array(sorted(lengths), dtype=np.int64)
    reached = np.cumsum([lengths[value] for value in values.tolist()])
    wanted = [max(int(np.ceil(share * reached[-1])), 1) for share in QUANTILES]
    return values[np.searchsorted(reached, wanted)].tolist()


def count(folder: PreparedFolder) -> dict[tuple[str, str], StreamCounts]:
    """Counts by source and split.

    Cost: reads five columns of the tables, one group of rows at a time.
    """
    found: dict[tuple[str, str], StreamCounts] = {}
    for shard in folder.shards:
        found.setdefault((shard.record.source, shard.record.split), StreamCounts()).shards += 1
    for query in folder.documents:
        for table in query.tables(["source", "split", "verdict", "num_tokens", "text_bytes"]):
            _add(found, table)
    return found


def lines(folder: PreparedFolder) -> Iterator[str]:
    """The statistics as text."""
    yield f"{folder.folder}: {folder.describe_tokenizer()}"
    yield ""
    heads = ["source", "split", "shards", "documents", "tokens", "MB text", "bytes/token"]
    heads += [f"tokens at {share:.0%}" for share in QUANTILES[:-1]] + ["longest"]
    rows = [
        (source, split, *_cells(counts), *(f"{length:,}" for length in quantiles(counts.lengths)))
        for (source, split), counts in count(folder).items()
    ]
    yield from aligned(heads, rows)
    yield ""
    yield from _generation_lines(folder)


def _add(found: dict[tuple[str, str], StreamCounts], table: Any) -> None:
    import pyarrow.compute as pc

    kept = table.filter(pc.field("verdict") == KEPT)
    groups = kept.group_by(["source", "split", "num_tokens"]).aggregate([([], "count_all"), ("text_bytes", "sum")])
    for group in groups.to_pylist():
        counts = found.setdefault((group["source"], group["split"]), StreamCounts())
        length, documents = group["num_tokens"], group["count_all"]
        counts.documents += documents
        counts.tokens += documents * length
        counts.text_bytes += group["text_bytes_sum"]
        counts.lengths[length] = counts.lengths.get(length, 0) + documents


def _cells(counts: StreamCounts) -> tuple[str, ...]:
    return (
        f"{counts.shards:,}",
        f"{counts.documents:,}",
        f"{counts.tokens:,}",
        f"{counts.text_bytes / 1e6:,.2f}",
        f"{counts.text_bytes / max(counts.tokens, 1):.2f}",
    )


def _generation_lines(folder: PreparedFolder) -> Iterator[str]:
    heads = ["generation", "files", "shards", "documents", "tokens", "dropped", "duplicates", "bad"]
    rows: list[tuple[str, ...]] = []
    for generation, summary in zip(folder.generations, folder.summaries(), strict=True):
        sources = summary.values()
        numbers = (
            len(generation.inputs),
            len(generation.shards),
            sum(source["documents"] for source in sources),
            sum(source["tokens"] for source in sources),
            sum(sum(source["dropped"].values()) for source in sources),
            sum(source[f"{kind}_duplicates"]["documents"] for source in sources for kind in ("exact", "near")),
            sum(sum(source["bad"].values()) for source in sources),
        )
        rows.append((generation.folder.name, *(f"{number:,}" for number in numbers)))
    yield from aligned(heads, rows)

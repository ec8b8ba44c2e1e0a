"""The report of a data folder: `report.html`, one page that says what was read and what became of it.

It says the same of the same preparation: no times, no machine. It is made anew for each generation, from all of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep import publish
from data_prep.documents_table import NEAR_DUPLICATE
from data_prep.looking.documents_query import DocumentsQuery, Row
from data_prep.looking.html_parts import (
    Markup,
    differences,
    element,
    facts,
    folded,
    histogram,
    joined,
    page,
    share,
    stacked_bar,
    table,
)
from data_prep.looking.prepared import PreparedFolder
from data_prep.looking.source_totals import SourceTotals, by_source, ranked, whole
from data_prep.mixture_file import MIXTURE_FILE
from data_prep.reading.file_kinds import is_url

REPORT_FILE = "report.html"
NUM_PAIRS, PAIR_CHARACTERS = 10, 1_000
"""So many near-duplicates of each generation are shown beside what they repeat, so much of each."""
MAX_SHARDS = 500
"""So many shards are listed."""
_READ_AGAIN_BYTES = 64 * 1024 * 1024
_NUM_BAD_LINES = 10


def write(folder: Path) -> Path:
    """Write `<folder>/report.html`; returns its path.

    Cost: reads the columns of paths and verdicts of all documents; the texts of a few.
    """
    path = folder / REPORT_FILE
    publish.write_text(path, content(PreparedFolder(folder)))
    return path


def content(folder: PreparedFolder) -> str:
    """The page."""
    sources = by_source(folder.summaries())
    name = folder.published_name
    return page(
        f"{name}: prepared data",
        element("h1", name),
        element("p", f"Tokenizer: {folder.describe_tokenizer()}", of="note"),
        _totals(folder, whole(sources)),
        *(_source(source, totals) for source, totals in sources.items()),
        _pairs(folder),
        _generations(folder),
        _shards(folder),
        _licences(sources),
        _mixture(folder.folder / MIXTURE_FILE),
    )


def _totals(folder: PreparedFolder, total: SourceTotals) -> Markup:
    splits: dict[str, int] = {}
    for shard in folder.shards:
        splits[shard.record.split] = splits.get(shard.record.split, 0) + shard.span.num_targets
    rows = [*_facts(total), ("shards", len(folder.shards)), ("generations", len(folder.generations))]
    rows += [(f"tokens for {split}", tokens) for split, tokens in splits.items()]
    return joined([facts(rows), _flow(total)])


def _facts(totals: SourceTotals) -> list[tuple[str, object]]:
    return [
        ("files", totals.files),
        ("MB read from them", totals.input_bytes / 1e6),
        ("lines, rows or whole files", totals.lines),
        ("documents kept", totals.documents),
        ("MB of text kept", totals.text_bytes / 1e6),
        ("tokens", totals.tokens),
        ("bytes per token", totals.bytes_per_token),
        ("exact duplicates", totals.exact_duplicates),
        ("near duplicates", totals.near_duplicates),
    ]


def _flow(totals: SourceTotals) -> Markup:
    parts = (
        ("kept", totals.documents),
        ("dropped by filters", totals.dropped.total()),
        ("exact duplicates", totals.exact_duplicates),
        ("near duplicates", totals.near_duplicates),
        ("bad lines", totals.bad.total()),
    )
    return joined([element("h3", f"What became of the {totals.lines:,} that were read"), stacked_bar(parts)])


def _source(name: str, totals: SourceTotals) -> Markup:
    lengths = [(_size(2**power), totals.lengths[2**power]) for power in _powers(totals.lengths)]
    parts: list[object] = [element("h2", f"Source {name}"), facts(_facts(totals)), _flow(totals)]
    if lengths:
        parts += [element("h3", "Kept documents by length, from so many bytes on"), histogram(lengths)]
    if totals.languages:
        parts += [element("h3", "Languages of what passed the filters"), stacked_bar(ranked(totals.languages))]
    if totals.masked:
        parts += [element("h3", "Masked"), table(["what", "times"], ranked(totals.masked))]
    return joined([*parts, _dropped(totals), _bad(totals)])


def _powers(lengths: Any) -> range:
    powers = [length.bit_length() - 1 for length in lengths]
    return range(min(powers), max(powers) + 1) if powers else range(0)


def _size(size_bytes: int) -> str:
    for unit in ("", "K", "M"):
        if size_bytes < 1024:
            return f"{size_bytes}{unit}"
        size_bytes //= 1024
    return f"{size_bytes}G"


def _dropped(totals: SourceTotals) -> Markup:
    if not totals.dropped:
        return Markup()
    rows = [(reason, count, share(count, totals.lines)) for reason, count in ranked(totals.dropped)]
    samples = (
        folded(
            f"{reason}: {len(items)} samples",
            *(
                joined([element("code", f"{item['id']} (line {item['line']})"), element("pre", item["text"])])
                for item in items
            ),
        )
        for reason, _ in ranked(totals.dropped)
        if (items := totals.samples.get(reason))
    )
    heads = ["filter", "documents", "of what was read"]
    return joined([element("h3", "Dropped by filters"), table(heads, rows), *samples])


def _bad(totals: SourceTotals) -> Markup:
    if not totals.bad:
        return Markup()
    rows = [(reason, count, share(count, totals.lines)) for reason, count in ranked(totals.bad)]
    examples = (
        folded(
            f"{reason}: {len(items)} examples",
            table(["line", "begins"], [(f"{item['path']}:{item['line']}", _head(item["head"])) for item in items]),
        )
        for reason, _ in ranked(totals.bad)
        if (items := totals.bad_lines.get(reason, [])[:_NUM_BAD_LINES])
    )
    return joined([element("h3", "Bad lines"), table(["reason", "lines", "of what was read"], rows), *examples])


def _head(hexadecimal: str) -> Markup:
    return element("code", bytes.fromhex(hexadecimal).decode("utf-8", "backslashreplace"))


def _pairs(folder: PreparedFolder) -> Markup:
    shown = [pair for query in folder.documents for pair in _pairs_of(folder, query)]
    if not shown:
        return Markup()
    note = f"Up to {NUM_PAIRS} of each generation: what is kept, and what was dropped for it, as its file has it."
    return joined([element("h2", "Near duplicates"), element("p", note, of="note"), *shown])


def _pairs_of(folder: PreparedFolder, query: DocumentsQuery) -> Iterator[Markup]:
    import pyarrow.compute as pc

    where = pc.field("verdict") == NEAR_DUPLICATE
    count = query.count(where, ["verdict"])
    number = min(count, NUM_PAIRS)
    for row in query.pick(where, ["verdict"], [index * count // number for index in range(number)]):
        yield _pair(folder, row)


def _pair(folder: PreparedFolder, row: Row) -> Markup:
    original = folder.original(row)
    dropped = None if is_url(row.path) else folder.raw_text(row, _READ_AGAIN_BYTES)
    if original is None or dropped is None:
        return element("p", element("code", str(row.duplicate_of)), " is repeated by ", element("code", row.id))
    texts = differences(folder.text(original)[:PAIR_CHARACTERS], dropped[:PAIR_CHARACTERS])
    sides = (
        element("div", element("code", found.id), element("pre", text))
        for found, text in zip((original, row), texts, strict=True)
    )
    return element("div", *sides, of="pair")


def _generations(folder: PreparedFolder) -> Markup:
    if len(folder.generations) < 2:
        return Markup()
    rows: list[Sequence[object]] = []
    for generation, summary in zip(folder.generations, folder.summaries(), strict=True):
        total = whole(by_source([summary]))
        rows.append(
            (generation.folder.name, total.files, total.lines, total.documents, total.tokens, len(generation.shards))
        )
    heads = ["generation", "files", "lines", "documents kept", "tokens", "shards"]
    return joined([element("h2", "What each preparation added"), table(heads, rows)])


def _shards(folder: PreparedFolder) -> Markup:
    heads = ["shard", "generation", "tokens", "documents that end in it", "samples", "MB", "xxh3 of its tokens"]
    rows = [
        (
            s.file,
            shard.generation,
            s.token_count - 1,
            s.document_count,
            s.sample_count,
            s.size_bytes / 1e6,
            s.payload_xxh3,
        )
        for shard in folder.shards[:MAX_SHARDS]
        for s in [shard.record]
    ]
    more = len(folder.shards) - len(rows)
    note = [element("p", f"{more:,} more are in manifest.json", of="note")] if more else []
    return joined([element("h2", "Shards"), folded(f"{len(folder.shards):,} shards", table(heads, rows), *note)])


def _licences(sources: dict[str, SourceTotals]) -> Markup:
    rows = [(name, totals.licence or "not stated") for name, totals in sources.items()]
    return joined([element("h2", "Licences"), table(["source", "licence"], rows)])


def _mixture(path: Path) -> Markup:
    if not path.is_file():
        return Markup()
    return joined([element("h2", "Proposed mixture"), element("pre", path.read_text(encoding="utf-8"))])

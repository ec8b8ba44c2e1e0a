"""Kept documents as `inspect` shows them: by themselves, in their shards, in a training sample; lines of text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash

from data_prep.documents_table import KEPT
from data_prep.looking import raw_text
from data_prep.looking.documents_query import Row
from data_prep.looking.prepared import NotFoundError, PreparedFolder, Shard
from data_prep.looking.stream_places import Stretch, sample_places, stretches
from data_prep.looking.text_table import one_line, visible

Choose = Callable[[int], Sequence[int]]
"""Picks some of any count of things, by their ranks."""
_SEARCH_CONTEXT = 60


def chosen(number: int, seed: int | None) -> Choose:
    """Picks so many of any count of things: others for each seed, the first if there is none."""

    def ranks_of(count: int) -> Sequence[int]:
        if seed is None or number >= count:
            return range(min(number, count))
        found: dict[int, None] = {}
        for draw in range(2**63):
            found[xxhash.xxh3_64_intdigest(draw.to_bytes(8, "little"), seed) % count] = None
            if len(found) == number:
                break
        return list(found)

    return ranks_of


def documents(folder: PreparedFolder, choose: Choose, source: str | None, split: str | None) -> Iterator[str]:
    """Kept documents, whole."""
    for row in picked(folder, KEPT, choose, source, split):
        yield f"=== {heading(row)}"
        yield f"    {places(folder, row)}"
        yield from (visible(folder.text(row)), "")


def shard_documents(folder: PreparedFolder, shard: Shard) -> Iterator[str]:
    """A line for each document with tokens in a shard."""
    span = shard.span
    yield f"{span.file}: {shard.record.token_count:,} tokens, the first of them context; generation {shard.generation}"
    for index, row in enumerate(folder.rows_between(shard, span.start, span.start + span.num_targets)):
        first, stop = row.extent
        stretch = stretches([span], first, stop)[0]
        begins = ", begins before" if first < span.start else ""
        goes_on = ", goes on behind" if stop > span.start + span.num_targets else ""
        yield f"{index:>7}  tokens {stretch.first} to {stretch.stop - 1}{begins}{goes_on}  {heading(row)}"


def shard_document(folder: PreparedFolder, shard: Shard, number: int) -> Iterator[str]:
    """One of the documents of a shard, whole."""
    span = shard.span
    for index, row in enumerate(folder.rows_between(shard, span.start, span.start + span.num_targets)):
        if index == number:
            yield f"=== {heading(row)}"
            yield f"    {places(folder, row)}"
            yield visible(folder.text(row))
            return
    raise NotFoundError(f"--document {number}: {span.file} has documents 0 to {index}")


def sample(folder: PreparedFolder, shard: Shard, number: int, sample_tokens: int) -> Iterator[str]:
    """The text of a training sample, and where each piece of it came from."""
    span = shard.span
    num_samples = -(-span.num_targets // sample_tokens)
    if not 0 <= number < num_samples:
        raise NotFoundError(
            f"{span.file}:{number}: the shard has samples 0 to {num_samples - 1} of {sample_tokens:,} tokens"
        )
    first, stop = sample_places(span, number, sample_tokens)
    rows = list(folder.rows_between(shard, first, stop))
    yield (
        f"sample {number} of {span.file}: tokens {first - span.start + 1} to {stop - span.start}, "
        f"{stop - first - 1} of them targets; documents: {len(rows)}"
    )
    for row in rows:
        yield from _piece(folder, shard, row, first, stop)


def search(folder: PreparedFolder, wanted: str, number: int, source: str | None, split: str | None) -> Iterator[str]:
    """The first kept documents that contain a text."""
    if not wanted:
        raise NotFoundError("--search '': give a text to look for")
    found = 0
    for row in _kept_rows(folder, source, split):
        text = folder.text(row)
        if (at := text.find(wanted)) >= 0:
            around = text[max(at - _SEARCH_CONTEXT, 0) : at + len(wanted) + _SEARCH_CONTEXT]
            yield f"{heading(row)}, character {at}: {visible(around)!r}"
            found += 1
        if found == number:
            return
    if not found:
        yield "no kept document contains it"


def picked(
    folder: PreparedFolder, verdict: str, choose: Choose, source: str | None, split: str | None
) -> Iterator[Row]:
    """Documents with a verdict, chosen among those of all generations."""
    where, columns = _where(verdict, source, split)
    counts = [query.count(where, columns) for query in folder.documents]
    ranks, before = list(choose(sum(counts))), 0
    for query, count in zip(folder.documents, counts, strict=True):
        yield from query.pick(where, columns, [rank - before for rank in ranks if before <= rank < before + count])
        before += count


def heading(row: Row) -> str:
    """Id of a document, and where it came from."""
    language = f", {row.language}" if row.language else ""
    return f"{one_line(row.id)} (line {row.line}, source {row.source}{language}, generation {row.generation})"


def places(folder: PreparedFolder, row: Row) -> str:
    """Where the shards hold a kept document."""
    where = ", ".join(f"{s.file} tokens {s.first} to {s.stop - 1}" for s in folder.stretches_of(row))
    return f"{row.num_tokens} tokens, the last its end: {where}"


def _piece(folder: PreparedFolder, shard: Shard, row: Row, first: int, stop: int) -> Iterator[str]:
    """What a sample, the places first to stop, holds of a document."""
    (start, end), offset = row.extent, 1 - shard.span.start
    own_first, own_stop = max(start, first), min(end, stop)
    is_ended = own_stop == end
    stretch = Stretch(shard.span.file, own_first + offset, own_stop + offset - is_ended)
    yield ""
    yield f"=== {heading(row)}"
    yield f"    its tokens {own_first - start} to {own_stop - start - 1} of 0 to {end - start - 1}"
    if (command := raw_text.show_command(row.path, row.line, row.place)) is not None:
        yield f"    {one_line(command)}"
    yield visible(folder.decode(folder.tokens(stretch)))
    yield "=== end of document" if is_ended else "... goes on behind the sample"


def _kept_rows(folder: PreparedFolder, source: str | None, split: str | None) -> Iterator[Row]:
    where, columns = _where(KEPT, source, split)
    for query in folder.documents:
        yield from query.select(where, columns)


def _where(verdict: str, source: str | None, split: str | None) -> tuple[Any, list[str]]:
    import pyarrow.compute as pc

    where, columns = pc.field("verdict") == verdict, ["verdict"]
    for name, value in (("source", source), ("split", split)):
        if value is not None:
            where, columns = where & (pc.field(name) == value), [*columns, name]
    return where, columns

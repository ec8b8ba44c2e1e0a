"""The documents of a data folder, whole, out of its shards, which cut them where they are full."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import read_manifest
from data_prep.shards import open_tokens, read_header

_BLOCK_TOKENS = 4 * 1024 * 1024

Tokens = NDArray[np.unsignedinteger]


def shards_by_source(folder: Path, split: str) -> dict[str, list[Path]]:
    """The shards of one split of a data folder, of each source in the order of its stream.

    Raises:
        ManifestError: no data folder.
        ValueError: it has no such split.
    """
    found: dict[str, list[Path]] = {}
    records = read_manifest(folder).shards
    for record in records:
        if record.split == split:
            found.setdefault(record.source, []).append(folder / record.file)
    if not found:
        known = ", ".join(sorted({record.split for record in records}))
        raise ValueError(f"{folder}: no shard of split {split!r}; it has {known}")
    return found


def documents_in(shards: Sequence[Path], index: int) -> Iterator[tuple[int, Tokens]]:
    """The documents that begin in shards[index], without their EOS, each with its first token's place in that shard.

    One that runs into the next shards is read on there, so that all shards together give each document once. Empty
    ones, as the padding of rows is, are left out.

    Cost: memory for a few million tokens, and one document.
    """
    eos_id = read_header(shards[index]).eos_id
    tokens = open_tokens(shards[index])
    begin = None  # what comes before the first EOS began in an earlier shard
    for end in _places(tokens, eos_id):
        if begin is not None and end > begin:
            yield begin, np.array(tokens[begin:end])
        begin = end + 1
    if begin is not None and begin < tokens.size:
        rest = _rest(shards[index + 1 :], int(tokens[-1]), eos_id)
        yield begin, np.concatenate([tokens[begin:], *rest])


def _rest(shards: Sequence[Path], last: int, eos_id: int) -> Iterator[Tokens]:
    """The tokens up to the next EOS; nothing of a shard that does not go on with the token before it."""
    for shard in shards:
        tokens = open_tokens(shard)
        if tokens[0] != last:
            return
        end = next(_places(tokens, eos_id), None)
        yield np.array(tokens[1:end])
        if end is not None:
            return
        last = int(tokens[-1])


def _places(tokens: Tokens, wanted: int) -> Iterator[int]:
    blocks = range(0, tokens.size, _BLOCK_TOKENS)
    found = (np.flatnonzero(tokens[first : first + _BLOCK_TOKENS] == wanted) + first for first in blocks)
    return itertools.chain.from_iterable(places.tolist() for places in found)

"""Documents into rows of one length: best-fit decreasing, and the rows' tokens and marks.

Source: best-fit decreasing for bin packing, Johnson 1973; for training sequences Ding et al. 2024 (Fewer Truncations
Improve Language Modeling).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.chat.turns import Kind


class Document(NamedTuple):
    """What is trained as one document.

    Shapes: (num_tokens,). Dtypes: as the shard's; bool.
    """

    tokens: NDArray[np.unsignedinteger]
    is_trained: NDArray[np.bool_]


class Rows(NamedTuple):
    """Packed rows.

    Shapes: tokens, is_trained, is_first (rows, row_tokens); unit (rows,).
    """

    tokens: NDArray[np.unsignedinteger]
    is_trained: NDArray[np.bool_]
    """Of each token, whether it is trained as a target."""
    is_first: NDArray[np.bool_]
    """Whether a document begins at a token, or the padding."""
    first_unit: NDArray[np.int64]
    """The unit that stands first in each row."""


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Divide items into bins: the longest first, each into the fullest bin that has room for it.

    Cost: about 1 us per item, as long as the set of capacities, one bit each, fits a few machine words.
    """
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by what is left of them
    rooms = 0  # bit r: some bin has room r
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if rest := room - length:
            with_room[rest].append(chosen)
            rooms |= 1 << rest
    return bins


def row_capacity(kind: Kind, row_tokens: int) -> int:
    """Tokens of a row that documents may fill.

    A row's last token is a target but no input: a prompt would lose it, and an answer that ended there had no score.
    """
    return row_tokens if kind == "chat" else row_tokens - 1


def pack_rows(units: Sequence[Sequence[Document]], row_tokens: int, eos_id: int, *, kind: Kind = "chat") -> Rows:
    """Rows of units, which stay whole: a conversation, or two answers one behind the other; EOS behind the last.

    Every prompt gets a row of its own. Rows come in an order that depends on nothing but what is in them.
    """
    lengths = np.array([sum(len(document.tokens) for document in unit) for unit in units], dtype=np.int64)
    one_each = kind == "prompts"
    bins = [[item] for item in range(len(units))] if one_each else pack(lengths, row_capacity(kind, row_tokens))
    shape = (len(bins), row_tokens)
    tokens = np.full(shape, eos_id, dtype=units[0][0].tokens.dtype)
    is_trained, is_first = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, items in enumerate(bins):
        at = 0
        for document in (document for item in items for document in units[item]):
            stop = at + len(document.tokens)
            tokens[row, at:stop], is_trained[row, at:stop], is_first[row, at] = *document, True
            at = stop
        is_first[row, at : at + 1] = True
    shuffled = sorted(range(len(bins)), key=lambda row: (xxhash.xxh3_128_digest(tokens[row].tobytes()), bins[row]))
    first_unit = np.array([items[0] for items in bins], dtype=np.int64)
    return Rows(tokens[shuffled], is_trained[shuffled], is_first[shuffled], first_unit[shuffled])

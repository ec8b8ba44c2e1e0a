"""Several sources in one order: exact integer quotas per block of positions, nothing stored but the weights.

A segment of the order has quotas q_s that add up to 65,536, the positions of a block. In block k a permutation of its
own deals the positions: q_s of them draw from source s. So shares are exact in every block, the draws of a source
before any position follow by arithmetic (and one block's table), and any position can be asked for.
"""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_prep.config_file import ConfigError
from resume.chain import Ints, hashed_key
from resume.permutation import Permutation

BLOCK = 65_536
"""Positions per block: the resolution of weights is 1.5e-5."""

_TABLES_KEPT = 16

Weights = Mapping[str, float]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightsFrom:
    """Weights of sources that hold from a number of tokens on."""

    from_tokens: int
    weights: dict[str, float]


def parse_schedule(entries: Sequence[str]) -> list[WeightsFrom]:
    """Reads a mixture: "web=0.7 code=0.3" from the start, "20e9: web=0.4 code=0.6" from 20 billion tokens on.

    Raises:
        ConfigError: not that form, a weight that is negative or not finite, or steps that do not go up from 0.
    """
    schedule = [_parse_entry(entry) for entry in entries]
    starts = [entry.from_tokens for entry in schedule]
    if starts != sorted(set(starts)) or (starts and starts[0] != 0):
        raise ConfigError(
            f"data.mixture begins at {starts} tokens; the first entry must have no token count, and each later one a "
            'larger count than the one before, as in "web=0.7 code=0.3" "20e9: web=0.4 code=0.6"'
        )
    return schedule


def parse_weights(text: str) -> dict[str, float]:
    """Reads "web=0.7 code=0.3".

    Raises:
        ConfigError: not that form, a source twice, a weight that is negative or not finite, or none above 0.
    """
    weights: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        source, equals, number = part.partition("=")
        weight = _number(number)
        if not source or not equals or weight is None or weight < 0 or source in weights:
            raise ConfigError(f"{part!r} in mixture {text!r}: expected source=weight, each source once, weights >= 0")
        weights[source] = weight
    if not any(weights.values()):
        raise ConfigError(f"mixture {text!r}: no source has a weight above 0")
    return weights


def parse_max_epochs(entries: Sequence[str]) -> dict[str, int]:
    """Reads "4" (every source, under the key "") or "web=1" "code=4".

    Raises:
        ConfigError: not that form, or less than one epoch.
    """
    limits: dict[str, int] = {}
    for entry in entries:
        source, equals, number = entry.partition("=")
        source, number = (source, number) if equals else ("", entry)
        if not number.isdigit() or int(number) < 1 or source in limits:
            raise ConfigError(f"data.max_epochs: {entry!r}: expected a number, or source=number, at least 1, each once")
        limits[source] = int(number)
    return limits


def quotas_of(weights: Weights, sources: Sequence[str]) -> Ints:
    """Integer quotas (sources,) that add up to BLOCK, by largest remainder; a positive weight has at least 1."""
    # In exact arithmetic, over those that are drawn from: a source that joins later must not change, by the last bit of
    # a sum, what came before it.
    drawn = {source: Fraction(weights[source]) for source in sources if weights.get(source, 0.0) > 0}
    total = sum(drawn.values())
    exact = {source: weight / total * BLOCK for source, weight in drawn.items()}
    quotas = {source: max(1, math.floor(share)) for source, share in exact.items()}
    surplus = BLOCK - sum(quotas.values())
    if surplus >= 0:
        by_remainder = sorted(drawn, key=lambda source: (quotas[source] - exact[source], source))
        for source in by_remainder[:surplus]:
            quotas[source] += 1
    else:
        quotas[max(sorted(drawn), key=lambda source: quotas[source])] += surplus  # tiny weights were raised to 1
    return np.array([quotas.get(source, 0) for source in sources], dtype=np.int64)


class Mixture:
    """Which source each position of the order draws from, and its how-manieth draw that is."""

    def __init__(self, sources: Sequence[str], seed: int):
        self.sources = list(sources)
        self.seed = seed
        self.starts: list[int] = []
        self.quotas: list[Ints] = []
        self._drawn: list[Ints] = []  # draws of each source before the segment
        self._tables: OrderedDict[tuple[int, int], _Block] = OrderedDict()

    def push(self, start: int, quotas: Ints) -> None:
        """Has new quotas hold from `start` on, which is not before the last segment's start."""
        if self.starts and np.array_equal(self.quotas[-1], quotas):
            return
        drawn = self.drawn_before(start)
        if self.starts and self.starts[-1] == start:
            for kept in (self.starts, self.quotas, self._drawn):
                kept.pop()
            self._tables.clear()
        self.starts.append(start)
        self.quotas.append(quotas)
        self._drawn.append(drawn)

    def drawn_before(self, position: int) -> Ints:
        """Draws of each source (sources,) at positions 0..position-1."""
        if not self.starts:
            return np.zeros(len(self.sources), dtype=np.int64)
        segment = self._segment(position)
        quotas = self.quotas[segment]
        if quotas.max() == BLOCK:
            return self._drawn[segment] + (position - self.starts[segment]) * (quotas == BLOCK)
        block, offset = divmod(position - self.starts[segment], BLOCK)
        drawn = self._drawn[segment] + block * quotas
        return drawn + self._block(segment, block).drawn_before(offset) if offset else drawn

    def resolve(self, positions: Ints) -> tuple[Ints, Ints]:
        """Positions (P,) to sources (P,) and draws (P,) of these sources."""
        sources, draws = np.empty_like(positions), np.empty_like(positions)
        segments = np.searchsorted(self.starts, positions, side="right") - 1
        for segment in np.unique(segments).tolist():
            where = np.flatnonzero(segments == segment)
            offsets = positions[where] - self.starts[segment]
            only = np.flatnonzero(self.quotas[segment] == BLOCK)
            if len(only):
                sources[where], draws[where] = only[0], offsets + self._drawn[segment][only[0]]
                continue
            blocks, inside = np.divmod(offsets, BLOCK)
            for block, chosen in by_value(blocks):
                table = self._block(segment, block)
                source = table.sources[inside[chosen]].astype(np.int64)
                at = where[chosen]
                sources[at] = source
                base = self._drawn[segment] + block * self.quotas[segment]
                draws[at] = base[source] + table.ranks[inside[chosen]]
        return sources, draws

    def positions_of(self, source: int, draws: Ints) -> Ints:
        """The inverse: positions (P,) at which a source makes its draws (P,), which must lie before the next push."""
        positions = np.empty_like(draws)
        drawn = np.array([before[source] for before in self._drawn])
        segments = np.searchsorted(drawn, draws, side="right") - 1
        for segment in np.unique(segments).tolist():
            where = np.flatnonzero(segments == segment)
            quota = int(self.quotas[segment][source])
            blocks, ranks = np.divmod(draws[where] - self._drawn[segment][source], quota)
            if quota == BLOCK:
                positions[where] = self.starts[segment] + blocks * BLOCK + ranks
                continue
            for block, chosen in by_value(blocks):
                places = self._block(segment, block).places[source]
                positions[where[chosen]] = self.starts[segment] + block * BLOCK + places[ranks[chosen]]
        return positions

    def _segment(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def _block(self, segment: int, block: int) -> "_Block":
        key = (segment, block)
        if key not in self._tables:
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.popitem(last=False)
            quotas = self.quotas[segment]
            # Only sources that are drawn from: one that joins later must not change what came before.
            shares = [f"{s}={q}" for s, q in zip(self.sources, quotas.tolist(), strict=True) if q]
            fields = (str(self.seed), str(self.starts[segment]), str(block), *shares)
            self._tables[key] = _Block(quotas, hashed_key("mixture", *fields))
        self._tables.move_to_end(key)
        return self._tables[key]


def by_value(values: Ints) -> Iterator[tuple[int, Ints]]:
    """Each distinct one of values (P,), and the indices (N,) where it stands."""
    order = np.argsort(values, kind="stable")
    distinct, firsts = np.unique(values[order], return_index=True)
    return zip(distinct.tolist(), np.split(order, firsts)[1:], strict=True)


class _Block:
    """The positions of one block: their sources, and the rank of each among the draws of its source."""

    def __init__(self, quotas: Ints, key: int):
        slots = Permutation(BLOCK, key)(np.arange(BLOCK))
        self.sources: NDArray[np.uint16] = np.searchsorted(np.cumsum(quotas), slots, side="right").astype(np.uint16)
        by_source = np.argsort(self.sources, kind="stable")
        ends = np.cumsum(quotas)
        self.places = [by_source[end - quota : end] for end, quota in zip(ends.tolist(), quotas.tolist(), strict=True)]
        self.ranks = np.empty(BLOCK, dtype=np.int64)
        for places in self.places:
            self.ranks[places] = np.arange(len(places))

    def drawn_before(self, offset: int) -> Ints:
        return np.array([int(np.searchsorted(places, offset)) for places in self.places], dtype=np.int64)


def _parse_entry(entry: str) -> WeightsFrom:
    before, colon, weights = entry.rpartition(":")
    from_tokens = _number(before) if colon else 0
    if from_tokens is None or from_tokens < 0 or from_tokens != int(from_tokens):
        raise ConfigError(f'mixture {entry!r}: {before!r} is no number of tokens; write "20e9: web=0.4 code=0.6"')
    return WeightsFrom(int(from_tokens), parse_weights(weights))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

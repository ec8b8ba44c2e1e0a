"""Which documents repeat an older one: exact copies by their hash, near-duplicates by band keys and sketches.

Rows are documents in the order in which they came in, oldest first. Row j is dropped if an older row that is kept has
the same exact hash, or shares a band with it and is similar enough. Nothing younger is looked at, so that documents
that are added later change no verdict: neither one that resembles two kept documents, nor the middle one of a chain
A ~ B ~ C, of which C is kept unless it resembles A.

A band's run of equal keys may have any number of members (a licence text above different programs), so that a member is
compared with its NUM_PREVIOUS nearest older members and the NUM_OLDEST oldest of the run, which is all of them up to
the thirteenth. What this misses: in a longer run, a member that resembles only others in between, and shares with them
no band in which the run is shorter.

Most duplicates are settled first, by comparing each row only with the oldest of its runs: a row that is the oldest in
all of its bands stays for certain, and a row that resembles it goes for certain. Rows that go need no other comparison,
so that large groups cost little.

Bands are compared by their upper 32 bits. Of ten million documents some ten thousand meet by accident in each band; the
sketches tell them apart.
"""

import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.duplicates import minhash

VERSION = 1
"""To be raised with any change of the rule."""
KEPT, EXACT, NEAR = 0, 1, 2
NUM_OLDEST, NUM_PREVIOUS = 8, 4
_PAIRS_AT_ONCE = 1 << 19
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_NO_PAIRS = np.empty(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What became of each row."""

    duplicate_of: NDArray[np.int64]
    """An older row that is kept and that it repeats; -1: it is kept itself."""
    kind: NDArray[np.uint8]
    """KEPT, EXACT or NEAR."""

    @classmethod
    def all_kept(cls, num_rows: int) -> "Verdicts":
        """Verdicts where no duplicates are looked for."""
        return cls(np.full(num_rows, -1), np.full(num_rows, KEPT, dtype=np.uint8))


class Columns(Protocol):
    """One column of band keys, uint64 (n,), per band: a (bands, n) array, a list of columns, or SketchFiles.bands."""

    def __len__(self) -> int: ...
    def __getitem__(self, band: int, /) -> Any: ...


class Rows(Protocol):
    """Sketches, uint8 (n, bytes), of which rows are taken by an index array: an array, or SketchFiles.sketches."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> Any: ...


Similarity = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.float64]]


def find_duplicates(
    hashes: NDArray[np.uint64],
    bands: Columns,
    sketches: Rows,
    *,
    threshold: float,
    near: bool,
    similarity: Similarity = minhash.similarity,
    num_settled: int = 0,
    map_bands: Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]] = map,
) -> Verdicts:
    """Judge n rows with exact hashes (n, 2), band keys and sketches; rows of one hash have the same bands and sketch.

    Args:
        threshold: similarity from which a row is a near-duplicate.
        near: False looks for exact copies only, and reads neither bands nor sketches.
        similarity: of k pairs of sketches; `minhash.similarity` or `simhash.similarity`.
        num_settled: rows that were judged before and are kept; only those behind them are judged.
        map_bands: maps a picklable function over the numbers of the bands, as `map` and `Executor.map` do, in order.
    Raises:
        ValueError: 2^32 rows or more.
    Cost: per band two sorts of n 64-bit numbers; memory about 50 bytes a row, and 24 for each candidate pair.
    """
    if len(hashes) > _LOW:
        raise ValueError(f"{len(hashes):,} documents: at most {_LOW:,} are compared at once; divide the input")
    first = first_of_each(hashes)
    first[:num_settled] = np.arange(num_settled)
    if not near:
        return _resolve(first, np.full(len(first), -1), _NO_PAIRS)
    is_first = first == np.arange(len(first))
    numbers = range(len(bands))
    meetings = _merged(map_bands(partial(_in_band, bands, oldest_candidates, is_first, num_settled), numbers))
    certain = _certain_duplicates(meetings, similar_pairs(meetings, sketches, threshold, similarity), len(first))
    search = partial(band_candidates, is_dropped=certain >= 0)
    candidates = _merged(map_bands(partial(_in_band, bands, search, is_first, num_settled), numbers))
    return _resolve(first, certain, similar_pairs(candidates, sketches, threshold, similarity))


def first_of_each(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each row of (n, 2) hashes the oldest row with the same hash, which may be itself."""
    first = np.arange(len(hashes))
    packed, places = _runs(hashes[:, 0], None)
    # Only rows that agree in 32 bits with another are sorted by all 128.
    in_run = np.zeros(len(packed), dtype=bool)
    in_run[places] = True
    in_run[places - 1] = True
    rows = np.sort((packed[in_run] & _LOW).astype(np.int64))
    del packed, in_run
    high, low = hashes[rows, 0], hashes[rows, 1]
    order = np.lexsort((low, high))  # stable: rows of one hash stay in ascending order
    rows, high, low = rows[order], high[order], low[order]
    starts = np.ones(len(rows), dtype=bool)
    starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first[rows] = rows[starts][np.cumsum(starts) - 1]
    return first


def oldest_candidates(
    column: NDArray[np.uint64], taking_part: NDArray[np.bool_] | None = None, num_settled: int = 0
) -> NDArray[np.uint64]:
    """Those of `band_candidates` in which the older row is the oldest of its run."""
    rows, places, starts = _members(column, taking_part, num_settled)
    return _distinct(rows[places] << _32 | rows[starts])


def band_candidates(
    column: NDArray[np.uint64],
    taking_part: NDArray[np.bool_] | None = None,
    num_settled: int = 0,
    is_dropped: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint64]:
    """The pairs of rows to compare for sharing one band, distinct and ascending, as younger * 2^32 + older.

    A function of this one column: bands can be searched anywhere, in any order.

    Args:
        column: keys (n,) of all rows, oldest first.
        taking_part: rows to leave out are False; they do not count as members of a run either.
        num_settled: rows before it are not compared with older ones.
        is_dropped: rows whose fate is known: they count as members of a run, but are in no pair.
    """
    rows, places, starts = _members(column, taking_part, num_settled)
    if is_dropped is not None:
        is_open = ~is_dropped[rows[places]]
        places, starts = places[is_open], starts[is_open]
    pairs = []
    for distance in range(1, NUM_PREVIOUS + 1):
        chosen = places[places - starts >= distance]
        pairs.append(rows[chosen] << _32 | rows[chosen - distance])
    for member in range(NUM_OLDEST):
        far = places - starts > member + NUM_PREVIOUS
        pairs.append(rows[places[far]] << _32 | rows[starts[far] + member])
    found = _distinct(np.concatenate(pairs))
    return found if is_dropped is None else found[~is_dropped[found & _LOW]]


def similar_pairs(
    pairs: NDArray[np.uint64], sketches: Rows, threshold: float, similarity: Similarity = minhash.similarity
) -> NDArray[np.uint64]:
    """Those of the pairs of `band_candidates` whose sketches are similar, in the same order."""
    chunks = []
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        chunk = pairs[start : start + _PAIRS_AT_ONCE]
        both = sketches[np.concatenate([chunk >> _32, chunk & _LOW]).astype(np.int64)]
        chunks.append(chunk[similarity(both[: len(chunk)], both[len(chunk) :]) >= threshold])
    return np.concatenate(chunks) if chunks else pairs


def _in_band(
    bands: Columns, search: Callable[..., NDArray[np.uint64]], is_first: NDArray[np.bool_], num_settled: int, band: int
) -> NDArray[np.uint64]:
    return search(np.asarray(bands[band]), is_first, num_settled)


def _merged(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    merged = _NO_PAIRS
    for part in parts:
        merged = _distinct(np.concatenate([merged, part]))
    return merged


def _certain_duplicates(meetings: NDArray[np.uint64], similar: NDArray[np.uint64], num_rows: int) -> NDArray[np.int64]:
    """For each row that resembles one that meets no older one in any band, the oldest such; -1 for the others."""
    meets_older = np.zeros(num_rows, dtype=bool)
    meets_older[meetings >> _32] = True
    decisive = similar[~meets_older[similar & _LOW]][::-1]
    certain = np.full(num_rows, -1)
    certain[decisive >> _32] = decisive & _LOW  # of several the last one stays, which is the oldest
    return certain


def _members(
    column: NDArray[np.uint64], taking_part: NDArray[np.bool_] | None, num_settled: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """The rows by key and age, the places of the unsettled ones that are not the oldest of a run, and its place."""
    packed, places = _runs(column, taking_part)
    packed &= _LOW
    begins_run = np.diff(places, prepend=-1) != 1
    starts = (places[begins_run] - 1)[np.cumsum(begins_run) - 1]
    is_new = packed[places] >= num_settled
    return packed, places[is_new], starts[is_new]


def _runs(
    column: NDArray[np.uint64], taking_part: NDArray[np.bool_] | None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Key and row in one number, sorted, and the places in it whose key is that of the place before.

    Sorting numbers is many times faster than sorting an index by them, and leaves the rows of a run in order.
    """
    packed = column & ~_LOW
    packed |= np.arange(len(column), dtype=np.uint64)
    if taking_part is not None:
        packed = packed[taking_part]
    packed.sort()
    keys = (packed >> _32).astype(np.uint32)
    return packed, np.flatnonzero(keys[1:] == keys[:-1]) + 1


def _distinct(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The numbers in ascending order, each once; sorts its argument."""
    numbers.sort()
    is_new = np.ones(len(numbers), dtype=bool)
    is_new[1:] = numbers[1:] != numbers[:-1]
    return numbers[is_new]


def _resolve(first: NDArray[np.int64], certain: NDArray[np.int64], edges: NDArray[np.uint64]) -> Verdicts:
    """Go through the edges from the oldest row on: a row's first edge to a kept row drops it."""
    duplicate_of = certain.copy()
    is_kept = bytearray((certain < 0).astype(np.uint8).tobytes())
    for start in range(0, len(edges), _PAIRS_AT_ONCE):
        chunk = edges[start : start + _PAIRS_AT_ONCE]
        dropped, by = [], []
        for younger, older in zip((chunk >> _32).tolist(), (chunk & _LOW).tolist(), strict=True):
            if is_kept[older] and is_kept[younger]:
                is_kept[younger] = 0
                dropped.append(younger)
                by.append(older)
        duplicate_of[dropped] = by
    kind = np.where(duplicate_of >= 0, NEAR, KEPT).astype(np.uint8)
    copies = np.flatnonzero(first != np.arange(len(first)))
    # A copy of a row that is dropped shares its fate, as it has the same sketch.
    origins = first[copies]
    duplicate_of[copies] = np.where(kind[origins] == NEAR, duplicate_of[origins], origins)
    kind[copies] = np.where(kind[origins] == NEAR, NEAR, EXACT)
    return Verdicts(duplicate_of, kind)


class SketchFiles:
    """Band keys and sketches that lie in many .npy files, read where and when they are needed."""

    def __init__(self, parts: Iterable[tuple[Path, Path, int]]) -> None:
        """Join parts in order: files of bands (bands, n) and of sketches (n, bytes), and n."""
        parts = [part for part in parts if part[2]]
        slices = list(_slices([num_rows for _, _, num_rows in parts]))
        self.bands: Columns = _BandFiles([_ArrayFile.of(path) for path, _, _ in parts], slices)
        self.sketches: Rows = _RowFiles([_ArrayFile.of(path) for _, path, _ in parts], slices)


@dataclass(frozen=True, slots=True)
class _ArrayFile:
    """Where the array of an .npy file lies: parsed once, as files are opened dozens of times."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype

    @classmethod
    def of(cls, path: Path) -> "_ArrayFile":
        array = np.load(path, mmap_mode="r")
        return cls(path, array.offset, array.shape, "C" if array.flags.c_contiguous else "F", array.dtype)

    def map(self) -> NDArray[Any]:
        """The array, mapped for as long as it is referred to: mapped pages count as memory of the process."""
        with self.path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        num_values = math.prod(self.shape)
        return np.frombuffer(content, self.dtype, num_values, self.offset).reshape(self.shape, order=self.order)


@dataclass(frozen=True, slots=True)
class _BandFiles:
    files: Sequence[_ArrayFile]
    slices: Sequence[slice]

    def __len__(self) -> int:
        return self.files[0].shape[0] if self.files else 0

    def __getitem__(self, band: int) -> NDArray[np.uint64]:
        column = np.empty(self.slices[-1].stop, dtype=np.uint64)
        for file, part in zip(self.files, self.slices, strict=True):
            column[part] = file.map()[band]
        return column


@dataclass(frozen=True, slots=True)
class _RowFiles:
    files: Sequence[_ArrayFile]
    slices: Sequence[slice]

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        order = np.argsort(rows)
        ascending = rows[order]
        starts = np.searchsorted(ascending, [part.start for part in self.slices])
        result = np.empty((len(rows), self.files[0].shape[1]), dtype=np.uint8)
        for file, part, start, stop in zip(self.files, self.slices, starts, [*starts[1:], len(rows)], strict=True):
            if start < stop:
                result[order[start:stop]] = file.map()[ascending[start:stop] - part.start]
        return result


def _slices(sizes: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size

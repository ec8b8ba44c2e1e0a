"""One source as a chain of generations: pools of unseen groups, each in a permuted order of its own.

A group is the unit of order: `group_tokens` targets of one file that stay together (by default one sample). A pool
consists of what its predecessor had left, as ranges of the predecessor's positions, and of whole files:

    append(files)   new pool = rest of the old one + files     so the new mixes evenly with the unseen old
    remove(files)   new pool = rest without their groups
    skip(k)         the next k positions are passed over; they are part of the rest, so they return with the next pool,
                    at the latest at the end of the epoch; skipped for good, they never do
    exhausted       a new epoch: new pool = all live files

No list of indices exists: a position resolves to (file, group) by walking down the generations, a (file, group) is
located by walking up. Every pool event, and nothing else, costs a constant amount of memory (removals and skips for
good: as much as they take out).
"""

import bisect
import dataclasses
import enum
import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resume.permutation import Permutation

Ints = NDArray[np.int64]
Range = tuple[int, int]
"""Positions first..last-1."""

_NOTHING = np.zeros(0, dtype=np.int64)


class Fate(enum.IntEnum):
    """What became of a group in one epoch."""

    DRAWN = 0
    """At a position that the run passes (or passed) in order; the cursor says whether it has."""
    SKIPPED = 1
    """Passed over; it returns with the next pool."""
    DROPPED = 2
    """Passed over for good."""
    REMOVED = 3
    """Its file was taken out before it was drawn."""
    ABSENT = 4
    """Its file is not part of this epoch."""


@dataclasses.dataclass(frozen=True, slots=True)
class ChainFile:
    """A file by its content, and how many groups it holds."""

    file_id: str
    num_groups: int


class Generation:
    """A pool in its order: position p holds the pool's element permutation(p)."""

    def __init__(
        self,
        key: int,
        epoch: int,
        first_draw: int,
        rest: Sequence[Range],
        rest_holes: Ints,
        files: Range,
        group_counts: Ints,
        file_holes: Ints,
        removed: frozenset[int],
    ):
        """Sets the pool up from ranges of the predecessor's positions and from files.

        Shapes: rest_holes (H,) sorted offsets into the concatenated `rest` that are left out; group_counts (files,) of
        the files in the range `files`, 0 for removed ones; file_holes (H',) the same for their concatenation.
        """
        self.key, self.epoch, self.first_draw = key, epoch, first_draw
        self.rest, self.files, self.removed = tuple(rest), files, removed
        self.cursor = 0
        """Positions passed so far; of a generation with a successor, in all."""
        self.skipped: list[Range] = []
        self.dropped: list[Range] = []
        lengths = np.array([last - first for first, last in rest], dtype=np.int64)
        ends = np.cumsum(lengths)
        self._rest_firsts = np.array([first for first, _ in rest], dtype=np.int64)
        self._rest_lasts = self._rest_firsts + lengths
        self._rest_ends, self._rest_shifts = ends, self._rest_firsts - (ends - lengths)
        self._rest_holes = _Holes(rest_holes)
        self._file_ends = np.cumsum(group_counts)
        self._file_starts = self._file_ends - group_counts
        self._file_holes = _Holes(file_holes)
        self.num_rest = int(lengths.sum()) - len(rest_holes)
        self.num_new = (int(self._file_ends[-1]) if len(group_counts) else 0) - len(file_holes)
        self.n = self.num_rest + self.num_new
        self._permutation = Permutation(self.n, key) if self.n else None

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of it has been drawn or skipped: then it can be made anew without a trace."""
        return self.cursor == 0

    @property
    def has_files(self) -> bool:
        """Whether the pool took files in."""
        return self.files[0] < self.files[1]

    def rest_ranges(self) -> list[Range]:
        """The positions whose groups have not been trained and are not given up."""
        ranges = [*self.skipped, (self.cursor, self.n)]
        return [(first, last) for first, last in ranges if first < last]

    def elements(self, positions: Ints) -> Ints:
        """Positions (P,) to elements of the pool (P,): those below num_rest are of the predecessor, others of files."""
        return self._permutation(positions).view(np.int64) if self._permutation is not None else positions

    def positions(self, elements: Ints) -> Ints:
        """The inverse of `elements`."""
        return self._permutation.inverse(elements).view(np.int64) if self._permutation is not None else elements

    def rest_positions(self, elements: Ints) -> Ints:
        """Elements below num_rest to positions of the predecessor."""
        offsets = self._rest_holes.step_over(elements)
        if len(self._rest_ends) == 1:
            return offsets + self._rest_shifts[0]
        return offsets + self._rest_shifts[np.searchsorted(self._rest_ends, offsets, side="right")]

    def rest_elements(self, positions: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Positions of the predecessor to elements, and which of them are holes (their element means nothing)."""
        part = np.searchsorted(self._rest_firsts, positions, side="right") - 1
        assert len(positions) == 0 or (part.min() >= 0 and bool((positions < self._rest_lasts[part]).all()))
        return self._rest_holes.step_back(positions - self._rest_shifts[part])

    def file_groups(self, elements: Ints) -> tuple[Ints, Ints]:
        """Elements from num_rest on to file indices of the chain and groups in these files."""
        offsets = self._file_holes.step_over(elements - self.num_rest)
        files = np.searchsorted(self._file_ends, offsets, side="right")
        return files + self.files[0], offsets - self._file_starts[files]

    def file_elements(self, file: int, groups: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Groups of one file to elements, and which of them are holes."""
        elements, is_hole = self._file_holes.step_back(groups + self._file_starts[file - self.files[0]])
        return elements + self.num_rest, is_hole

    def holds_file(self, file: int) -> bool:
        """Whether the pool took the file in as a whole."""
        return self.files[0] <= file < self.files[1] and file not in self.removed


class Chain:
    """The generations of one source, from the first epoch to as far as they have been asked for."""

    def __init__(self, source: str, seed: int, max_epochs: int | None):
        self.source, self.seed, self.max_epochs = source, seed, max_epochs
        self.files: list[ChainFile] = []
        self.generations: list[Generation] = []
        self.removed: frozenset[int] = frozenset()
        self._dropped: dict[int, Ints] = {}
        self._first_draws: list[int] = []

    @property
    def drawn(self) -> int:
        """Positions passed so far, over all generations."""
        return self.generations[-1].first_draw + self.generations[-1].cursor if self.generations else 0

    @property
    def epoch(self) -> int:
        """The epoch that the last generation belongs to, from 0."""
        return self.generations[-1].epoch if self.generations else 0

    @property
    def num_live(self) -> int:
        """Groups of a whole epoch that would begin now."""
        dropped = sum(len(groups) for file, groups in self._dropped.items() if file not in self.removed)
        return int(self._group_counts(0, len(self.files)).sum()) - dropped

    @property
    def num_unseen(self) -> int:
        """Groups that this epoch still holds, skipped ones included."""
        return sum(last - first for first, last in self.generations[-1].rest_ranges()) if self.generations else 0

    def remaining(self, mark: Fate = Fate.DRAWN) -> int | None:
        """Positions until the source has nothing more to give, if they are passed like `mark`; None: no end."""
        may_renew = self.max_epochs is None or self.epoch + 1 < self.max_epochs
        if mark is Fate.SKIPPED and (self.num_unseen or (may_renew and self.num_live)):
            return None  # what is skipped comes back, so it can be skipped again
        if mark is Fate.DROPPED:
            return self.num_live if may_renew else self.num_unseen  # each group can be given up once
        if self.max_epochs is None:
            return None if self.num_live else self.num_unseen
        return self.num_unseen + max(0, self.max_epochs - 1 - self.epoch) * self.num_live

    def advance(self, count: int, mark: Fate = Fate.DRAWN) -> None:
        """Passes the next `count` positions, at most as many as remain; a new pool begins when the last is exhausted.

        With Fate.SKIPPED or Fate.DROPPED they are passed over.
        """
        while count > 0:
            generation = self.generations[-1]
            taken = min(count, generation.n - generation.cursor)
            if taken == 0:
                self._renew()
                continue
            passed = (generation.cursor, generation.cursor + taken)
            generation.cursor += taken
            if mark is Fate.SKIPPED:
                generation.skipped.append(passed)
            elif mark is Fate.DROPPED:
                generation.dropped.append(passed)
                self._drop(passed)
            count -= taken

    def append(self, files: Sequence[ChainFile]) -> None:
        """Adds files to the unseen of this epoch; in which order they are listed or added makes no difference."""
        first = len(self.files)
        if self.generations and self.generations[-1].is_untouched and self.generations[-1].has_files:
            first = self.generations[-1].files[0]  # made anew with all its files: two appends in a row are one of both
        sorted_anew = sorted([*self.files[first:], *files], key=lambda file: file.file_id)
        moved = {self.files[i].file_id for i in self.removed if i >= first}
        self.files[first:] = sorted_anew
        gone = {i for i, file in enumerate(sorted_anew, first) if file.file_id in moved}
        self.removed = frozenset(i for i in self.removed if i < first) | gone
        self._push((first, len(self.files)))

    def remove(self, file_ids: Sequence[str]) -> None:
        """Takes files out of what is unseen, for this and all later epochs."""
        wanted = set(file_ids)
        self.removed |= {i for i, file in enumerate(self.files) if file.file_id in wanted}
        self._push(None)

    def requeue(self) -> None:
        """Has what was skipped return now instead of at the end of the epoch."""
        if self.generations and self.generations[-1].skipped:
            self._push(None)

    def resolve(self, draws: Ints) -> tuple[Ints, Ints]:
        """Draws (P,), counted over all generations and already advanced over, to file indices (P,) and groups (P,).

        Cost: per generation that has to be walked down, a permutation and a few array operations.
        """
        files, groups = np.empty_like(draws), np.empty_like(draws)
        generation_of = np.searchsorted(self._first_draws, draws, side="right") - 1
        present = sorted(set(np.unique(generation_of).tolist()))
        where, positions = _NOTHING, _NOTHING
        level = -1
        while present or len(where):
            if not len(where):
                level = present[-1]
            if present and present[-1] == level:
                present.pop()
                start = np.flatnonzero(generation_of == level)
                where = np.concatenate((where, start))
                positions = np.concatenate((positions, draws[start] - self._first_draws[level]))
            generation = self.generations[level]
            elements = generation.elements(positions)
            if generation.num_rest == 0:
                files[where], groups[where] = generation.file_groups(elements)
                where = positions = _NOTHING
                continue
            is_new = elements >= generation.num_rest
            new, old = np.flatnonzero(is_new), np.flatnonzero(~is_new)
            if len(new):
                files[where[new]], groups[where[new]] = generation.file_groups(elements[new])
            positions, where = generation.rest_positions(elements[old]), where[old]
            level -= 1
        return files, groups

    def locate(self, file: int, groups: Ints, epoch: int) -> tuple[NDArray[np.int8], Ints]:
        """What becomes of groups (P,) of a file in an epoch: Fate (P,), and draws (P,) of those drawn or passed over.

        A draw beyond what the run has passed is the place where the group waits, unless later events move it.
        """
        fates = np.full(len(groups), Fate.ABSENT, dtype=np.int8)
        draws = np.full(len(groups), -1, dtype=np.int64)
        first = self._entry(file, epoch)
        if first is None:
            return fates, draws
        where = np.arange(len(groups))
        elements, is_hole = self.generations[first].file_elements(file, groups)
        fates[where[is_hole]] = Fate.DROPPED  # in an earlier epoch
        where, elements = where[~is_hole], elements[~is_hole]
        for index in range(first, len(self.generations)):
            generation = self.generations[index]
            positions = generation.positions(elements)
            fate = generation_fates(generation, positions)
            fates[where], draws[where] = fate, positions + generation.first_draw
            has_successor = index + 1 < len(self.generations) and self.generations[index + 1].epoch == epoch
            if not has_successor:
                break
            goes_on = (fate == Fate.SKIPPED) | ((fate == Fate.DRAWN) & (positions >= generation.cursor))
            where, positions = where[goes_on], positions[goes_on]
            if not len(where):
                break
            elements, is_hole = self.generations[index + 1].rest_elements(positions)
            fates[where[is_hole]], draws[where[is_hole]] = Fate.REMOVED, -1
            where, elements = where[~is_hole], elements[~is_hole]
        return fates, draws

    def _entry(self, file: int, epoch: int) -> int | None:
        """The generation that took the file in for an epoch."""
        low = bisect.bisect_left(self.generations, epoch, key=lambda generation: generation.epoch)
        high = bisect.bisect_right(self.generations, epoch, key=lambda generation: generation.epoch)
        return next((i for i in range(low, high) if self.generations[i].holds_file(file)), None)

    def _positions_in(self, index: int, file: int) -> Ints:
        """Where a generation holds what is left of a file."""
        groups = np.arange(self.files[file].num_groups, dtype=np.int64)
        first = self._entry(file, self.generations[index].epoch)
        if first is None or first > index:
            return _NOTHING
        elements, is_hole = self.generations[first].file_elements(file, groups)
        positions = self.generations[first].positions(elements[~is_hole])
        for generation, successor in zip(
            self.generations[first:index], self.generations[first + 1 : index + 1], strict=True
        ):
            fate = generation_fates(generation, positions)
            left = positions[(fate == Fate.SKIPPED) | ((fate == Fate.DRAWN) & (positions >= generation.cursor))]
            elements, is_hole = successor.rest_elements(left)
            positions = successor.positions(elements[~is_hole])
        return positions

    def _renew(self) -> None:
        """After the last position: first what was skipped, then a new epoch."""
        if self.generations[-1].skipped:
            self._push(None)
        else:
            self._start_epoch()

    def _start_epoch(self) -> None:
        files = (0, len(self.files))
        self._add(self.epoch + 1 if self.generations else 0, [], _NOTHING, files)

    def _push(self, files: Range | None) -> None:
        """A new generation of the same epoch: the rest of the last one, and new files."""
        if not self.generations:
            self._start_epoch()
            return
        last = self.generations[-1]
        if last.is_untouched:
            # Made anew from what it was made of, so that it does not matter in how many events that came about.
            self.generations.pop()
            self._first_draws.pop()
            rest, files = list(last.rest), (last.files[0], len(self.files)) if last.has_files else files
        else:
            rest = last.rest_ranges()
        self._add(last.epoch, rest, self._rest_holes(rest) if rest else _NOTHING, files)

    def _rest_holes(self, rest: Sequence[Range]) -> Ints:
        """Offsets into the ranges, of the last generation's positions, that hold groups of newly removed files."""
        predecessor = self.generations[-1]
        gone = self.removed - predecessor.removed
        if not gone:
            return _NOTHING
        positions = np.sort(np.concatenate([self._positions_in(len(self.generations) - 1, file) for file in gone]))
        offsets, start = [], 0
        for first, last in rest:
            low, high = np.searchsorted(positions, (first, last))
            offsets.append(positions[low:high] - first + start)
            start += last - first
        return np.concatenate(offsets) if offsets else _NOTHING

    def _add(self, epoch: int, rest: Sequence[Range], rest_holes: Ints, files: Range | None) -> None:
        files = files or (len(self.files), len(self.files))
        counts = self._group_counts(*files)
        starts = np.cumsum(counts) - counts
        holes = [
            self._dropped[i] + starts[i - files[0]]
            for i in range(*files)
            if i in self._dropped and counts[i - files[0]]
        ]
        generation = Generation(
            self._key(epoch, rest, files),
            epoch,
            self.drawn,
            rest,
            rest_holes,
            files,
            counts,
            np.sort(np.concatenate(holes)) if holes else _NOTHING,
            self.removed,
        )
        self.generations.append(generation)
        self._first_draws.append(generation.first_draw)

    def _key(self, epoch: int, rest: Sequence[Range], files: Range) -> int:
        """The 64-bit key of a generation's order, from whatever defines the pool: the same pool has the same order."""
        predecessor = self.generations[-1].key if self.generations else 0
        newly_removed = self.removed - (self.generations[-1].removed if self.generations else frozenset())
        return hashed_key(
            "order",
            str(self.seed),
            self.source,
            str(predecessor),
            str(epoch),
            ",".join(f"{first}-{last}" for first, last in rest),
            ",".join(sorted(self.files[i].file_id for i in newly_removed)),
            *(self.files[i].file_id for i in range(*files) if i not in self.removed),
        )

    def _group_counts(self, first: int, last: int) -> Ints:
        return np.array([0 if i in self.removed else self.files[i].num_groups for i in range(first, last)], np.int64)

    def _drop(self, passed: Range) -> None:
        draws = np.arange(*passed, dtype=np.int64) + self.generations[-1].first_draw
        files, groups = self.resolve(draws)
        for file in np.unique(files).tolist():
            before = self._dropped.get(file, _NOTHING)
            self._dropped[file] = np.sort(np.concatenate((before, groups[files == file])))


def generation_fates(generation: Generation, positions: Ints) -> NDArray[np.int8]:
    """Fate (P,) of positions (P,) of one generation, as far as that generation is concerned."""
    fates = np.full(len(positions), Fate.DRAWN, dtype=np.int8)
    for fate, ranges in ((Fate.SKIPPED, generation.skipped), (Fate.DROPPED, generation.dropped)):
        for first, last in ranges:
            fates[(first <= positions) & (positions < last)] = fate
    return fates


def hashed_key(*fields: str) -> int:
    """A 64-bit key: blake2b over length-prefixed fields, so that no two lists of fields are confused."""
    digest = hashlib.blake2b(digest_size=8)
    for field in fields:
        data = field.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


class _Holes:
    """Sorted offsets that are left out of a range: from offsets without them to offsets with them, and back."""

    def __init__(self, holes: Ints):
        self._holes = holes
        self._passed = holes - np.arange(len(holes))  # the j-th hole is passed from this offset without holes on

    def step_over(self, offsets: Ints) -> Ints:
        if not len(self._holes):
            return offsets
        return offsets + np.searchsorted(self._passed, offsets, side="right")

    def step_back(self, offsets: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        if not len(self._holes):
            return offsets, np.zeros(len(offsets), dtype=np.bool_)
        before = np.searchsorted(self._holes, offsets)
        is_hole = self._holes[np.minimum(before, len(self._holes) - 1)] == offsets
        return offsets - before, is_hole

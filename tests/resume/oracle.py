"""The brute-force truth of a run's data: sets of (file, group), kept by hand, that the arithmetic is held against.

Written from what the order promises (docs/data-order.md), not from how resume/ keeps it. The oracle never predicts
which group comes next; it is told, and refuses what breaks a promise.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from resume.chain import Fate

Group = tuple[str, int]


class BrokenPromiseError(AssertionError):
    """The order broke a promise."""


@dataclasses.dataclass
class Epoch:
    """What has become of every group of one source in one epoch."""

    unseen: set[Group]
    given_up_before: set[Group]
    """Skipped for good in an earlier epoch."""
    seen: dict[Group, int] = dataclasses.field(default_factory=dict)
    """Positions, as in the next two."""
    skipped: dict[Group, int] = dataclasses.field(default_factory=dict)
    given_up: dict[Group, int] = dataclasses.field(default_factory=dict)
    removed: set[Group] = dataclasses.field(default_factory=set)
    first_position: int | None = None
    joined: dict[str, int] = dataclasses.field(default_factory=dict)
    """Draws of the source when a file was appended."""

    def copy(self) -> "Epoch":
        """A copy that can go its own way."""
        return Epoch(
            *(set(self.unseen), self.given_up_before),
            *(dict(self.seen), dict(self.skipped), dict(self.given_up), set(self.removed)),
            *(self.first_position, dict(self.joined)),
        )

    def fate(self, group: Group) -> Fate:
        """What became of a group so far; those that still wait are to be drawn."""
        if group in self.given_up or group in self.given_up_before:
            return Fate.DROPPED
        if group in self.removed:
            return Fate.REMOVED
        if group in self.skipped:
            return Fate.SKIPPED
        return Fate.DRAWN if group in self.seen or group in self.unseen else Fate.ABSENT

    def return_skipped(self) -> None:
        """What was skipped is to be drawn again."""
        self.unseen |= self.skipped.keys()
        self.skipped.clear()


class SourceTruth:
    """One source: its live files, and its epochs from the first to the present one."""

    def __init__(self, max_epochs: int | None):
        self.max_epochs = max_epochs
        self.files: dict[str, int] = {}
        self.given_up: set[Group] = set()
        self.epochs: list[Epoch] = []
        self.drawn = 0

    def copy(self) -> "SourceTruth":
        """A copy that can go its own way; only the present epoch still changes."""
        other = SourceTruth(self.max_epochs)
        other.files, other.given_up, other.drawn = dict(self.files), set(self.given_up), self.drawn
        other.epochs = [*self.epochs[:-1], *(epoch.copy() for epoch in self.epochs[-1:])]
        return other

    @property
    def live(self) -> set[Group]:
        """Groups of a whole epoch that would begin now."""
        return {(file, i) for file, count in self.files.items() for i in range(count)} - self.given_up

    @property
    def can_draw(self) -> bool:
        """Whether there is anything left to give."""
        if not self.epochs:
            return False
        now = self.epochs[-1]
        may_begin_another = self.max_epochs is None or len(self.epochs) < self.max_epochs
        return bool(now.unseen or now.skipped or (may_begin_another and self.live))

    @property
    def num_waiting(self) -> int:
        """Groups that this epoch still holds, skipped ones included."""
        return sum(len(epoch.unseen) + len(epoch.skipped) for epoch in self.epochs[-1:])

    def can_skip(self, num_groups: int, for_good: bool) -> bool:
        """Whether so many groups can be passed over; skipped ones come back and can be skipped again."""
        if not for_good or not self.can_draw:
            return self.can_draw
        now = self.epochs[-1]
        waiting = now.unseen | now.skipped.keys()
        may_begin_another = self.max_epochs is None or len(self.epochs) < self.max_epochs
        return num_groups <= len(waiting | self.live if may_begin_another else waiting)

    def append(self, files: Mapping[str, int]) -> None:
        """Files join the unseen of the present epoch."""
        self.files.update(files)
        if not self.epochs:
            self.epochs.append(Epoch(set(), set()))
        now = self.epochs[-1]
        now.unseen |= {(file, i) for file, count in files.items() for i in range(count)}
        now.joined |= dict.fromkeys(files, self.drawn)
        now.return_skipped()

    def remove(self, file_ids: Iterable[str]) -> None:
        """Files leave what is unseen or skipped."""
        now = self.epochs[-1]
        now.return_skipped()
        for file in file_ids:
            del self.files[file]
            gone = {group for group in now.unseen if group[0] == file}
            now.unseen -= gone
            if now.joined.get(file) != self.drawn:  # else it never was a part of this epoch
                now.removed |= gone

    def requeue(self) -> None:
        """What was skipped comes back."""
        for epoch in self.epochs[-1:]:
            epoch.return_skipped()

    def draw(self, groups: Sequence[Group], positions: Sequence[int], mark: Fate) -> None:
        """Groups are drawn, skipped or given up, at positions of the whole order."""
        self.drawn += len(groups)
        done = 0
        while done < len(groups):
            now = self._epoch_to_draw_from(groups[done], positions[done])
            count = min(len(now.unseen), len(groups) - done)
            part, places = groups[done : done + count], positions[done : done + count]
            self._refuse_repeats(part, now)
            if now.first_position is None:
                now.first_position = places[0]
            now.unseen.difference_update(part)
            {Fate.DRAWN: now.seen, Fate.SKIPPED: now.skipped, Fate.DROPPED: now.given_up}[mark].update(
                zip(part, places)
            )
            if mark is Fate.DROPPED:
                self.given_up |= set(part)
            done += count

    def _epoch_to_draw_from(self, group: Group, position: int) -> Epoch:
        if not self.can_draw:
            raise BrokenPromiseError(f"position {position} holds {group}, but its source has nothing left to give")
        now = self.epochs[-1]
        if not now.unseen:
            now.return_skipped()
        if not now.unseen:
            self.epochs.append(Epoch(self.live, {group for group in self.given_up if group[0] in self.files}))
        return self.epochs[-1]

    def _refuse_repeats(self, part: Sequence[Group], now: Epoch) -> None:
        chosen = set(part)
        if len(chosen) != len(part):
            raise BrokenPromiseError(
                f"twice in epoch {len(self.epochs) - 1}: {[g for g in chosen if part.count(g) > 1]}"
            )
        if not chosen <= now.unseen:
            raise BrokenPromiseError(
                f"epoch {len(self.epochs) - 1}: "
                + ", ".join(f"{group} is {now.fate(group).name}, not unseen" for group in sorted(chosen - now.unseen))
            )


class Truth:
    """All sources, and the log of the order so far: which group was at which position, and what was done with it."""

    def __init__(self, max_epochs: Mapping[str, int], source_names: Iterable[str]):
        self.max_epochs = dict(max_epochs)
        self.sources: dict[str, SourceTruth] = {}
        self.source_of: dict[str, str] = {}
        self.log: list[Group] = []
        self.marks: list[Fate] = []
        self.weights: list[tuple[int, dict[str, float]]] = []
        """Mixtures, and the positions from which they hold."""
        self.cuts = [0]
        """Positions from which windows are counted: where the data had ended inside one, the next begins there."""
        for name in source_names:
            self._add_source(name)

    def copy(self) -> "Truth":
        """A copy that can go its own way."""
        other = Truth(self.max_epochs, ())
        other.sources = {name: source.copy() for name, source in self.sources.items()}
        other.source_of = dict(self.source_of)
        other.log, other.marks = list(self.log), list(self.marks)
        other.weights, other.cuts = list(self.weights), list(self.cuts)
        return other

    @property
    def live_files(self) -> list[str]:
        """Files that can be removed."""
        return sorted(file for source in self.sources.values() for file in source.files)

    def append(self, files: Mapping[str, Mapping[str, int]]) -> None:
        """Files, with how many groups each holds, join their sources."""
        for name, counts in files.items():
            if name not in self.sources:
                self._add_source(name)
            self.sources[name].append(counts)
            self.source_of.update(dict.fromkeys(counts, name))

    def remove(self, file_ids: Iterable[str]) -> None:
        """Files leave what is unseen, in their sources only."""
        by_source: dict[str, list[str]] = {}
        for file in file_ids:
            by_source.setdefault(self.source_of[file], []).append(file)
        for name, files in by_source.items():
            self.sources[name].remove(files)

    def requeue(self) -> None:
        """What was skipped comes back, in every source."""
        for source in self.sources.values():
            source.requeue()

    def reweight(self, position: int, weights: Mapping[str, float]) -> None:
        """Another mixture from a position on."""
        self.weights.append((position, dict(weights)))
        self.weights.sort(key=lambda entry: entry[0])

    def keep_share(self, position: int, shares: Mapping[str, float]) -> None:
        """Sources that joined at a position keep their shares under the mixtures that are planned for later."""
        rest = 1 - sum(shares.values())
        for at, planned in [entry for entry in self.weights if entry[0] > position]:
            total = sum(planned.values())
            self.reweight(at, {name: rest * weight / total for name, weight in planned.items()} | dict(shares))

    def weights_at(self, position: int) -> dict[str, float]:
        """The mixture that holds at a position, without sources that are not drawn from."""
        if not self.weights:
            return dict.fromkeys(self.sources, 1.0)
        newest = [weights for at, weights in self.weights if at <= position][-1]
        return {name: weight for name, weight in newest.items() if weight > 0}

    def can_skip(self, num_groups: int, for_good: bool) -> bool:
        """Whether the data lasts for a skip; each of several sources must be able to bear it alone."""
        now = len(self.log)
        mixtures = [self.weights_at(at) for at in (now, *(at for at, _ in self.weights if at > now))]
        return all(self.sources[name].can_skip(num_groups, for_good) for mixture in mixtures for name in mixture)

    def takes(self, groups: Sequence[Group], mark: Fate = Fate.DRAWN) -> None:
        """The next positions hold these groups."""
        first = len(self.log)
        self.log.extend(groups)
        self.marks.extend([mark] * len(groups))
        by_source: dict[str, tuple[list[Group], list[int]]] = {}
        for position, group in enumerate(groups, first):
            of_source, positions = by_source.setdefault(self.source_of[group[0]], ([], []))
            of_source.append(group)
            positions.append(position)
        for name, (of_source, positions) in by_source.items():
            self._refuse_weightless(name, positions)
            self.sources[name].draw(of_source, positions, mark)

    def _refuse_weightless(self, name: str, positions: Sequence[int]) -> None:
        without = [p for p in (positions if self.weights else ()) if name not in self.weights_at(p)]
        if without:
            raise BrokenPromiseError(f"position {without[0]} draws from {name}, which has no weight there")

    def _add_source(self, name: str) -> None:
        self.sources[name] = SourceTruth(self.max_epochs.get(name, self.max_epochs.get("")))

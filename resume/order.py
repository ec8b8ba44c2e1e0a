"""Which sample is trained at which position: a pure function of the run's data state, in both directions.

    sample position t --window--> group position --mixture--> source, draw --chain--> file, group --> sample

`Order` replays the state's events, a few array operations each, and then answers for any position, past or to come.
Nothing is materialised; any rank of any world size asks for its own positions of the one global order.
"""

import bisect
import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from resume.chain import Chain, ChainFile, Fate, Ints, hashed_key
from resume.manifest import DataError
from resume.mixture import Mixture, by_value, quotas_of
from resume.permutation import Permutation
from resume.state import Append, Batch, Cut, DataState, Remove, Requeue, Reweight, Skip, cut

_WINDOWS_KEPT = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Happening:
    """Something that follows from the state: an epoch of a source begins, or a source has nothing more to give."""

    position: int
    source: str
    kind: Literal["epoch", "exhausted"]
    epoch: int


@dataclasses.dataclass(frozen=True, slots=True)
class Location:
    """What becomes of groups of one file in one epoch.

    Shapes: fates (P,); positions (P,) in groups, -1 where there is none yet; those below the state's are passed.
    """

    fates: NDArray[np.int8]
    positions: Ints


class Order:
    """The global order of a run whose data state is `state`."""

    def __init__(self, state: DataState):
        """Replays the events.

        Raises:
            DataError: an event cannot be replayed, or all sources are exhausted and the run's policy calls it an error.
        Cost: O(files + events); with several sources a few ms for each event that lies inside a block.
        """
        self.state = state
        self.sequence_length = state.sequence_length
        self.samples_per_group = state.samples_per_group
        self.sources = sorted(state.sources)
        self.happenings: list[Happening] = []
        """In the order of their positions, as far as the order has been asked for."""
        self.end: int | None = None
        """The group position at which the data ends, None if that has not been reached yet."""
        limits = state.max_epochs
        self._chains = [Chain(s, state.seed, limits.get(s, limits.get(""))) for s in self.sources]
        self._mixture = Mixture(self.sources, state.seed)
        self._weights: dict[str, float] = {}
        self._exhausted: set[int] = set()
        self._pending = list(state.events)
        self._position = 0
        self._skip_until, self._skip_mark = 0, Fate.SKIPPED
        self._windows: dict[tuple[int, int], Permutation] = {}
        self._cuts = [0, *(event.at for event in state.events if isinstance(event, Cut))]
        joins = [event.at for event in state.events if isinstance(event, Append)]
        if self.extend(max(state.position, *joins)) < max(joins):
            raise DataError(f"the data ends at group {self.end}, before files appended for group {max(joins)} join")
        if self.extend(state.position) < state.position:
            raise DataError(f"the data ends at group {self.end}, before group {state.position}, where the run would be")
        # All files have joined, so that from here on the order is only continued.
        self._starts_of_files = np.cumsum([0, *(len(chain.files) for chain in self._chains)])
        self.file_ids = [file.file_id for chain in self._chains for file in chain.files]
        """Every file that ever joined, by the index that `resolve` returns."""
        self._file_indices = {file_id: i for i, file_id in enumerate(self.file_ids)}

    def extend(self, to: int) -> int:
        """Continues the order to group position `to`, or to where the data ends; returns how far that is."""
        while self.end is None:
            while self._pending and self._pending[0].at <= self._position:
                self._apply(self._pending.pop(0))
            target = min(to, self._pending[0].at) if self._pending else to
            if self._position < self._skip_until:
                target = min(target, self._skip_until)
            if target <= self._position:
                break
            self._advance(target)
        return to if self.end is None else min(to, self.end)

    def resolve(self, positions: Ints) -> tuple[Ints, Ints]:
        """Maps sample positions (P,) to indices (P,) into `file_ids` and sample indices (P,) in those files.

        A sample behind the end of its file belongs to an incomplete last group and is empty.

        Raises:
            ValueError: a position behind the end of the data.
        Cost: about 0.2 us per position in blocks of 4,096, more with each append that is still mixed in.
        """
        groups, units = self._unshuffle(positions)
        files, groups = self.resolve_groups(groups)
        if self.samples_per_group == 1:
            return files, groups
        return files, groups * self.samples_per_group + units

    def resolve_groups(self, positions: Ints) -> tuple[Ints, Ints]:
        """Maps group positions (P,) to file indices (P,) and groups (P,) in those files."""
        if not len(positions):
            return positions, positions
        last = int(positions.max())
        if self.extend(last + 1) <= last:
            raise ValueError(f"position {last}: the data ends at {self.end}")
        if len(self._chains) == 1:
            return self._chains[0].resolve(positions)
        sources, draws = self._mixture.resolve(positions)
        files, groups = np.empty_like(positions), np.empty_like(positions)
        for index in np.unique(sources).tolist():
            where = np.flatnonzero(sources == index)
            of_chain, groups[where] = self._chains[index].resolve(draws[where])
            files[where] = of_chain + self._starts_of_files[index]
        return files, groups

    def locate(self, file_id: str, groups: Ints, epoch: int) -> Location:
        """What becomes of groups (P,) of a file in an epoch of its source, and where; inverts `resolve_groups`."""
        index, file = self._chain_of(file_id)
        fates, draws = self._chains[index].locate(file, groups, epoch)
        positions = np.full(len(groups), -1, dtype=np.int64)
        # A draw that the order has not been asked for yet has no position yet: the mixture may change before it.
        known = np.flatnonzero((draws >= 0) & (draws < self._chains[index].drawn))
        positions[known] = draws[known] if len(self._chains) == 1 else self._mixture.positions_of(index, draws[known])
        return Location(fates, positions)

    def trained_at(self, positions: Ints, sequence_length: int) -> Ints:
        """The steps, counted from 1, that trained the samples of groups: (P, samples per group), 0 where none has yet.

        Shapes: positions (P,) in groups, not negative, passed in order (not skipped), with samples of sequence_length.
        """
        per_group = self.state.group_tokens // sequence_length
        samples = positions[:, None] * per_group + np.arange(per_group)
        if per_group > 1 and self.state.window_groups > 1:
            for first, where in by_value(self._window_starts(positions)):
                base = first * per_group
                offsets = self._window(first, sequence_length).inverse(samples[where] - base)
                samples[where] = base + offsets.view(np.int64)
        passed = samples // per_group
        spans = _spans(self.state)
        span = np.searchsorted([s.position for s in spans], passed, side="right") - 1
        first = np.array([s.position for s in spans])[span]
        groups_per_step = np.array([s.groups_per_step for s in spans])[span]
        steps = np.array([s.step for s in spans])[span] + (passed - first) // groups_per_step + 1
        return np.where(passed < self.state.position, steps, 0)

    def sequence_lengths_at(self, positions: Ints) -> Ints:
        """The sequence lengths (P,) of the samples at group positions (P,)."""
        changes = [event for event in self.state.events if isinstance(event, Batch)]
        which = np.searchsorted([event.at for event in changes], positions, side="right") - 1
        return np.array([event.sequence_length for event in changes])[which]

    def refuse_losing_length(self, sequence_length: int) -> None:
        """Refuses to go on with samples of another length where that would lose tokens.

        Groups stay together, so another length that divides them is exact wherever no group is partly trained: at any
        step if window_groups is 1, else at the end of a window.

        Raises:
            DataError: says how many tokens would be lost.
        """
        state = self.state
        if state.group_tokens % sequence_length == 0 and state.position == state.next_boundary:
            return
        if state.group_tokens % sequence_length:
            cause = (
                f"the run keeps {state.group_tokens} tokens together, and {sequence_length} does not divide that; "
                "a longer length must be planned with data.group_tokens when the run starts"
            )
        else:
            left = (state.next_boundary - state.position) * state.samples_per_group
            cause = f"the run stands inside a window; it can change {left} samples further on"
        raise DataError(
            f"data.sequence_length {state.sequence_length} -> {sequence_length} would lose "
            f"{self._lost_tokens(sequence_length):,} tokens of this epoch: {cause}"
        )

    def _lost_tokens(self, sequence_length: int) -> int:
        """Untrained targets of the present epochs in those samples of another length that are partly trained."""
        lost = 0
        unit = math.gcd(self.sequence_length, sequence_length)
        for chain in self._chains:
            epoch = self.epoch_at(chain.source, self.state.position)
            for file in chain.files:
                location = self.locate(file.file_id, np.arange(file.num_groups), epoch)
                is_passed = (location.fates == Fate.DRAWN) & (location.positions >= 0)
                trained = np.zeros((file.num_groups, self.samples_per_group), dtype=np.bool_)
                trained[is_passed] = self.trained_at(location.positions[is_passed], self.sequence_length) > 0
                trained[np.isin(location.fates, (Fate.REMOVED, Fate.ABSENT, Fate.DROPPED))] = True
                # Unit by unit, of which both lengths are multiples; the file's last unit may be shorter.
                firsts = np.arange(0, self.state.num_targets(file.file_id), unit)
                sizes = np.minimum(unit, self.state.num_targets(file.file_id) - firsts)
                is_trained = trained.ravel()[firsts // self.sequence_length]
                sample = firsts // sequence_length
                is_partly = np.bincount(sample, is_trained) > 0
                lost += int(sizes[~is_trained & is_partly[sample]].sum())
        return lost

    def is_skipped(self, positions: Ints) -> NDArray[np.bool_]:
        """Whether group positions (P,) were passed over by a skip."""
        skips = [(event.at, event.at + event.num_groups) for event in self.state.events if isinstance(event, Skip)]
        skipped = np.zeros(len(positions), dtype=np.bool_)
        for first, end in skips:
            skipped |= (first <= positions) & (positions < end)
        return skipped

    def source_of(self, file_id: str) -> str:
        """The source of a file."""
        return self.sources[self._chain_of(file_id)[0]]

    def epoch_at(self, source: str, position: int) -> int:
        """The epoch, from 0, that a source is in at a group position (the last epoch that began before it)."""
        begun = [h for h in self.happenings if h.source == source and h.kind == "epoch" and h.position < position]
        return begun[-1].epoch if begun else 0

    def chain(self, source: str) -> Chain:
        """The generations of a source, as far as the order has been asked for."""
        return self._chains[self.sources.index(source)]

    def live_groups(self) -> dict[str, int]:
        """Groups of each source that a new epoch would hold."""
        return {chain.source: chain.num_live for chain in self._chains}

    def drawn_before(self, position: int) -> dict[str, int]:
        """Groups of each source at positions 0..position-1."""
        position = self.extend(position)
        drawn = [position] if len(self._chains) == 1 else self._mixture.drawn_before(position).tolist()
        return dict(zip(self.sources, drawn, strict=True))

    def shares_at(self, position: int) -> dict[str, float]:
        """The share of each source in the order from a group position on."""
        self.extend(position + 1)
        segment = max(0, bisect.bisect_right(self._mixture.starts, position) - 1)
        quotas = self._mixture.quotas[segment]
        return dict(zip(self.sources, (quotas / quotas.sum()).tolist(), strict=True))

    def progress(self, position: int) -> dict[str, float]:
        """Epochs of each source at a group position: whole ones, and the part drawn of the present one's groups."""
        self.extend(position)
        drawn = self.drawn_before(position)
        return {chain.source: _epochs(chain, drawn[chain.source]) for chain in self._chains}

    def _chain_of(self, file_id: str) -> tuple[int, int]:
        file = self._file_indices[file_id]
        index = int(np.searchsorted(self._starts_of_files, file, side="right")) - 1
        return index, file - int(self._starts_of_files[index])

    def _unshuffle(self, positions: Ints) -> tuple[Ints, Ints]:
        """Sample positions (P,) to group positions (P,) and the samples' places (P,) in their groups."""
        per_group = self.samples_per_group
        if per_group == 1:
            return positions, positions
        if self.state.window_groups > 1:
            positions = positions.copy()
            for first, where in by_value(self._window_starts(positions // per_group)):
                base = first * per_group
                window = self._window(first, self.sequence_length)
                positions[where] = base + window(positions[where] - base).view(np.int64)
        groups, units = np.divmod(positions, per_group)
        return groups, units

    def _window_starts(self, positions: Ints) -> Ints:
        """The group positions (P,) at which the windows of group positions (P,) begin."""
        origins = np.array(self._cuts)[np.searchsorted(self._cuts, positions, side="right") - 1]
        return positions - (positions - origins) % self.state.window_groups

    def _window(self, first: int, sequence_length: int) -> Permutation:
        """The shuffle of the samples of the window that begins at group position `first`."""
        if (first, sequence_length) not in self._windows:
            if len(self._windows) >= _WINDOWS_KEPT:
                del self._windows[next(iter(self._windows))]
            last = self.extend(first + self.state.window_groups)  # the last window may be shorter
            last = min([last, *(position for position in self._cuts if position > first)])
            key = hashed_key("window", str(self.state.seed), str(first), str(sequence_length))
            num_samples = (last - first) * (self.state.group_tokens // sequence_length)
            self._windows[first, sequence_length] = Permutation(num_samples, key)
        return self._windows[first, sequence_length]

    def _apply(self, event: object) -> None:
        match event:
            case Append(files=files):
                for source, file_ids in files.items():
                    chain = self._chains[self.sources.index(source)]
                    chain.append([ChainFile(file_id, self.state.num_groups(file_id)) for file_id in file_ids])
            case Remove(file_ids=file_ids):
                for chain in self._chains:
                    if {file.file_id for file in chain.files} & set(file_ids):
                        chain.remove(file_ids)
            case Skip(num_groups=num_groups, for_good=for_good):
                self._skip_until = self._position + num_groups
                self._skip_mark = Fate.DROPPED if for_good else Fate.SKIPPED
            case Requeue():
                for chain in self._chains:
                    chain.requeue()
            case Reweight(weights=weights):
                self._weights = weights
            case Batch() | Cut():
                return
        if not isinstance(event, Skip):
            self._exhausted = set()

    def _advance(self, target: int) -> None:
        """Has the sources draw up to position `target`, or to the first draw that one of them cannot make."""
        if not self._share_out():
            return
        mark = self._skip_mark if self._position < self._skip_until else Fate.DRAWN
        drawn = self._drawn()
        stop, exhausted = target, None
        wanted = self._drawn_before(target)
        for i, chain in enumerate(self._chains):
            remaining = chain.remaining(mark)
            if remaining is not None and wanted[i] - drawn[i] > remaining:
                first_missing = self._position_of(i, int(drawn[i]) + remaining)
                if first_missing < stop or exhausted is None:
                    stop, exhausted = min(stop, first_missing), i
        for i, chain in enumerate(self._chains):
            self._draw(i, chain, int(self._drawn_before(stop)[i] - drawn[i]), mark)
        self._position = stop
        if exhausted is not None:
            self._run_out(exhausted)

    def _draw(self, index: int, chain: Chain, count: int, mark: Fate) -> None:
        """Advances one chain, and notes where its epochs begin."""
        first_new = len(chain.generations)
        epoch, base = chain.epoch, chain.drawn
        chain.advance(count, mark)
        if base == 0 and count:
            self.happenings.append(Happening(self._position_of(index, 0), chain.source, "epoch", 0))
        for generation in chain.generations[first_new:]:
            if generation.epoch > epoch:
                epoch = generation.epoch
                at = self._position_of(index, generation.first_draw)
                self.happenings.append(Happening(at, chain.source, "epoch", epoch))

    def _share_out(self) -> bool:
        """Brings the mixture's quotas up to date; False, and the data ends here, if nobody has anything to give."""
        weights = self._weights or {self.sources[0]: 1.0}  # without a mixture there is one pool
        shared = {s: weights.get(s, 0.0) for i, s in enumerate(self.sources) if i not in self._exhausted}
        if not any(shared.values()):
            self.end = self._position
            return False
        self._mixture.push(self._position, quotas_of(shared, self.sources))
        return True

    def _run_out(self, index: int) -> None:
        chain = self._chains[index]
        self.happenings.append(Happening(self._position, chain.source, "exhausted", chain.epoch))
        self._exhausted.add(index)
        if self.state.when_exhausted != "renormalise":
            self.end = self._position

    def _drawn(self) -> list[int]:
        return [chain.drawn for chain in self._chains]

    def _drawn_before(self, position: int) -> list[int]:
        return self._mixture.drawn_before(position).tolist()

    def _position_of(self, index: int, draw: int) -> int:
        return int(self._mixture.positions_of(index, np.array([draw], dtype=np.int64))[0])


def changeable(state: DataState) -> DataState:
    """The same state, but if the data ends inside the present window that is closed there, so that changes can hold."""
    reach = Order(state).extend(state.next_boundary)
    return cut(state, reach) if reach < state.next_boundary else state


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """Steps from `step` on (the first is step + 1) cover groups_per_step groups each, from `position` on."""

    position: int
    step: int
    groups_per_step: int


def _spans(state: DataState) -> list[_Span]:
    """Where the relation of positions and steps changes: with the batch, and behind each skip."""
    spans: list[_Span] = []
    groups_per_step = 1
    for event in state.events:
        if isinstance(event, Batch):
            groups_per_step = event.batch_sequences * event.sequence_length // state.group_tokens
            spans.append(_Span(event.at, event.step, groups_per_step))
        elif isinstance(event, Skip):
            spans.append(_Span(event.at + event.num_groups, event.step, groups_per_step))
    return spans


def _epochs(chain: Chain, drawn: int) -> float:
    """Epochs of a chain after so many draws."""
    begun = [generation for generation in chain.generations if generation.first_draw <= drawn]
    if not begun:
        return 0.0
    last = begun[-1]
    unseen = last.n - (drawn - last.first_draw) + sum(b - a for a, b in last.skipped)
    live = max(1, chain.num_live)
    return last.epoch + max(0.0, 1.0 - unseen / live)

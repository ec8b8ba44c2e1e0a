"""What must hold of a run's data at any time: everything that the order says, held against the oracle."""

import dataclasses
import json
from typing import Any, NamedTuple

import numpy as np

from data_prep.shards import HEADER_BYTES
from resume import state
from resume.chain import Fate
from resume.order import Order
from resume.state import DataState
from tests.resume.oracle import BrokenPromiseError, Group, Truth

MAX_FUTURE_GROUPS = 2_048
STATE_BYTES_PER_FILE, STATE_BYTES_PER_EVENT, STATE_BYTES = 79, 300, 1_200


class Trained(NamedTuple):
    """One sample that the run has trained, as it saw it."""

    place: int
    """Its position, in samples of `length`."""
    length: int
    file: str
    sample: int
    step: int


@dataclasses.dataclass
class Lived:
    """A run's data state, and what has really become of its data; they go the same way."""

    state: DataState
    truth: Truth
    trained: list[Trained]

    @property
    def settled(self) -> int:
        """The position up to which the order is fixed: the end of the present window, or of the data inside it."""
        return len(self.truth.log)

    def window_of(self, position: int) -> int:
        """Where the window of a position begins."""
        origin = max(cut for cut in self.truth.cuts if cut <= position)
        return position - (position - origin) % self.state.window_groups

    def boundary(self, position: int) -> int:
        """The first boundary of a window that is not before a position."""
        begins = self.window_of(position)
        return position if begins == position else begins + self.state.window_groups

    def num_targets(self, file_id: str) -> int:
        """Targets in a file."""
        return (int(file_id.rsplit("-", 1)[1]) - HEADER_BYTES) // self.state.token_bytes - 1

    def targets_of(self, file_id: str, sample: int, length: int) -> int:
        """Targets in a sample; those at the end of a file have fewer, or none."""
        return min(length, max(0, self.num_targets(file_id) - sample * length))


def expect(found: Any, expected: Any, what: str) -> None:
    """Refuses a difference, and says where it lies."""
    if found == expected:
        return
    if isinstance(found, list) and isinstance(expected, list):
        first = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
        what += f" ({len(found)} against {len(expected)}, from number {first} on)"
        found, expected = found[first : first + 10], expected[first : first + 10]
    raise BrokenPromiseError(f"{what}:\n  found    {str(found)[:1000]}\n  expected {str(expected)[:1000]}")


def groups_at(order: Order, first: int, last: int) -> list[Group]:
    """What the order has at group positions first..last-1."""
    files, groups = order.resolve_groups(np.arange(first, last))
    return list(zip([order.file_ids[i] for i in files.tolist()], groups.tolist()))


def samples_at(order: Order, places: np.ndarray) -> list[tuple[str, int]]:
    """What the order has at sample positions."""
    files, samples = order.resolve(places)
    return list(zip([order.file_ids[i] for i in files.tolist()], samples.tolist()))


def pass_over(truth: Truth, order: Order, to: int, mark: Fate) -> None:
    """Tells the truth what the order has up to a position, and that who is exhausted on the way is so in truth."""
    first = len(truth.log)
    groups = groups_at(order, first, to)
    exhausted = [h for h in order.happenings if h.kind == "exhausted" and first <= h.position <= to]
    for happening in exhausted:
        truth.takes(groups[len(truth.log) - first : happening.position - first], mark)
        if truth.sources[happening.source].can_draw:
            raise BrokenPromiseError(f"{happening}, but it has something left to give")
    truth.takes(groups[len(truth.log) - first :], mark)


def check(lived: Lived, rng: np.random.Generator) -> None:
    """Compares the order before the cursor, the counts and the order to come with the truth; of places a few."""
    order = Order(lived.state)
    expect(order.extend(lived.settled), lived.settled, "how far the order goes")
    expect(groups_at(order, 0, lived.settled), lived.truth.log, "the order before the cursor")
    earlier = int(rng.integers(lived.settled + 1))
    check_counts(lived, order, earlier)
    check_epochs(lived, order, earlier)
    check_size(lived)
    check_samples(lived, order)
    if rng.random() < 0.3:
        check_steps(lived, order)
    files = list(lived.truth.source_of)
    for i in rng.integers(len(files), size=2).tolist():
        epochs = lived.truth.sources[lived.truth.source_of[files[i]]].epochs
        check_location(lived, order, files[i], int(rng.integers(len(epochs))))
    check_future(lived, order, rng)


def check_everywhere(lived: Lived) -> None:
    """Compares every step, and the place of every group in every epoch."""
    order = Order(lived.state)
    order.extend(lived.settled)
    check_steps(lived, order)
    for file, name in lived.truth.source_of.items():
        for epoch in range(len(lived.truth.sources[name].epochs)):
            check_location(lived, order, file, epoch)


def check_counts(lived: Lived, order: Order, earlier: int) -> None:
    """Draws by source, now and at an earlier position; groups skipped, alive; tokens."""
    truth = lived.truth
    drawn = order.drawn_before(lived.settled)
    expect(drawn, {name: source.drawn for name, source in truth.sources.items()}, "draws by source")
    expect(sum(drawn.values()), lived.settled, "draws in all")
    counted = dict.fromkeys(truth.sources, 0)
    for file, _ in truth.log[:earlier]:
        counted[truth.source_of[file]] += 1
    expect(order.drawn_before(earlier), counted, f"draws by source before {earlier}")
    num_skipped = sum(mark is not Fate.DRAWN for mark in truth.marks)
    num_trained = sum(sample.length for sample in lived.trained) // lived.state.group_tokens
    expect(lived.state.num_skipped, num_skipped, "skipped groups")
    expect(lived.state.position, num_skipped + num_trained, "the position against groups skipped and trained")
    num_targets = sum(lived.targets_of(t.file, t.sample, t.length) for t in lived.trained)
    expect(lived.state.tokens_seen, num_targets, "tokens seen")
    expect(order.live_groups(), {name: len(s.live) for name, s in truth.sources.items()}, "live groups")


def check_epochs(lived: Lived, order: Order, earlier: int) -> None:
    """Where the epochs of each source begin."""
    for name, source in lived.truth.sources.items():
        begun = [h.position for h in order.happenings if h.source == name and h.kind == "epoch"]
        expected = [epoch.first_position for epoch in source.epochs if epoch.first_position is not None]
        expect([p for p in begun if p < lived.settled], expected, f"where epochs of {name} begin")
        for position in (lived.settled, earlier, *expected[-1:]):
            begun_before = sum(begins < position for begins in expected)
            expect(order.epoch_at(name, position), max(0, begun_before - 1), f"the epoch of {name} at {position}")


def check_size(lived: Lived) -> None:
    """The state grows with files and events, not with samples."""
    num_files, num_events = len(lived.truth.source_of), len(lived.state.events)
    limit = STATE_BYTES_PER_FILE * num_files + STATE_BYTES_PER_EVENT * num_events + STATE_BYTES
    size = len(json.dumps(lived.state.to_json(), separators=(",", ":")))
    if size > limit:
        raise BrokenPromiseError(f"a state of {num_files} files and {num_events} events has {size} > {limit} bytes")


def check_samples(lived: Lived, order: Order) -> None:
    """Samples trained are still where they were; with what remains of their windows they are these windows' groups."""
    length, per_group = lived.state.sequence_length, lived.state.samples_per_group
    same_length = [t for t in lived.trained if t.length == length]
    places = np.array([t.place for t in same_length], dtype=np.int64)
    expect(samples_at(order, places), [(t.file, t.sample) for t in same_length], "samples trained, at their positions")
    first = lived.window_of(lived.state.position)
    if lived.state.position == lived.settled or set(lived.truth.marks[first:]) != {Fate.DRAWN}:
        return
    trained = [(t.file, t.sample) for t in same_length if t.place >= first * per_group]
    left = samples_at(order, np.arange(lived.state.first_sample, lived.settled * per_group))
    whole = [(file, i * per_group + unit) for file, i in lived.truth.log[first:] for unit in range(per_group)]
    expect(sorted([*trained, *left]), sorted(whole), f"samples of the window at {first}")


def check_steps(lived: Lived, order: Order) -> None:
    """The steps in which samples were trained, from the state alone; samples of a window may change places."""
    positions = np.array([p for p, mark in enumerate(lived.truth.marks) if mark is Fate.DRAWN], dtype=np.int64)
    lengths = order.sequence_lengths_at(positions)
    found: list[tuple[int, str, int, int, int]] = []
    for length in np.unique(lengths).tolist():
        chosen, per_group = positions[lengths == length], lived.state.group_tokens // length
        for position, steps in zip(chosen.tolist(), order.trained_at(chosen, length).tolist(), strict=True):
            file, i = lived.truth.log[position]
            window = lived.window_of(position)
            found += [(window, file, i * per_group + unit, length, step) for unit, step in enumerate(steps)]
    num_waiting = sum(step == 0 for *_, step in found)
    expected_waiting = (lived.settled - lived.state.position) * lived.state.samples_per_group
    expect(num_waiting, expected_waiting, "samples of this window without a step")
    per_groups = {length: lived.state.group_tokens // length for length in {t.length for t in lived.trained}}
    seen = [
        (lived.window_of(t.place // per_groups[t.length]), t.file, t.sample, t.length, t.step) for t in lived.trained
    ]
    expect(sorted(row for row in found if row[-1]), sorted(seen), "(window, file, sample, length, step)")


def check_location(lived: Lived, order: Order, file: str, epoch: int) -> None:
    """What has become of each group of a file in an epoch, and where."""
    truth = lived.truth.sources[lived.truth.source_of[file]].epochs[epoch]
    expect(order.source_of(file), lived.truth.source_of[file], "source of a file")
    found = order.locate(file, np.arange(lived.state.num_groups(file)), epoch)
    for i, (fate, position) in enumerate(zip(found.fates.tolist(), found.positions.tolist())):
        group, what = (file, i), f"({file[:8]}, {i}) in epoch {epoch}: "
        expected, known = truth.fate(group), {**truth.skipped, **truth.given_up, **truth.seen}.get(group)
        returns = expected is Fate.SKIPPED and fate == Fate.DRAWN  # the order was asked further than the run has come
        if returns or (expected is Fate.DRAWN and known is None):
            known = position
            if 0 <= position < lived.settled:
                raise BrokenPromiseError(f"{what} waits at {position}, which the run has passed")
            expected_there = [] if position < 0 else [group]
            expect(groups_at(order, max(0, position), position + 1), expected_there, what + f"waits at {position}")
        expect(Fate(fate).name, Fate.DRAWN.name if returns else expected.name, what + "fate")
        expect(position, -1 if known is None else known, what + "position")


def check_future(lived: Lived, order: Order, rng: np.random.Generator) -> None:
    """The order goes on with exactly the unseen, then with what was skipped, then with a whole epoch."""
    future = lived.truth.copy()
    reach = far_enough(lived, order)
    pass_over(future, order, reach, Fate.DRAWN)
    if order.end == reach:
        check_end(lived, future, order)
    middle = int(rng.integers(lived.settled, reach + 1))
    later = groups_at(order, middle, reach)
    expect([*groups_at(order, lived.settled, middle), *later], future.log[lived.settled :], "the order in pieces")
    if rng.random() < 0.5:
        check_exhaustions(lived, future, order, reach)


def far_enough(lived: Lived, order: Order) -> int:
    """A position by which every source has finished this epoch and begun the next, if it is not too far."""
    to = lived.settled + 32
    while True:
        reach = order.extend(to)
        drawn = order.drawn_before(reach)
        sources = {name: lived.truth.sources[name] for name in lived.truth.weights_at(reach)}
        is_through = all(drawn[name] - source.drawn >= source.num_waiting + 5 for name, source in sources.items())
        if reach < to or is_through or to - lived.settled >= MAX_FUTURE_GROUPS:
            return reach
        to += to - lived.settled


def check_end(lived: Lived, future: Truth, order: Order) -> None:
    """Where the data ends, nobody can draw; or one cannot, if that is to end it."""
    drawn_from = future.weights_at(len(future.log))
    exhausted = {name for name in drawn_from if not future.sources[name].can_draw}
    if lived.state.when_exhausted == "renormalise":
        expect(exhausted, set(drawn_from), f"sources that are exhausted where the data ends, at {order.end}")
        return
    last = order.happenings[-1]
    if last.kind != "exhausted" or last.position != order.end or last.source not in exhausted:
        raise BrokenPromiseError(f"the data ends at {order.end}, where {exhausted} are exhausted, with {last}")


def check_exhaustions(lived: Lived, future: Truth, order: Order, reach: int) -> None:
    """A source is exhausted at just the position that would draw from it, were it not limited."""
    limits = {name: source.max_epochs for name, source in future.sources.items() if source.max_epochs is not None}
    first = {h.source: h.position for h in reversed(order.happenings) if h.kind == "exhausted" and h.position <= reach}
    for name, position in first.items():
        if name not in limits:
            continue
        others = {other: limit for other, limit in limits.items() if other != name}
        unlimited = Order(state.from_json({**lived.state.to_json(), "max_epochs": others}))
        unlimited.extend(position + 1)
        if any(h.kind == "exhausted" and (h.source, h.position) == (name, position) for h in unlimited.happenings):
            continue  # it is not the limit: all its files were removed
        groups = groups_at(unlimited, 0, position + 1)
        expect(groups[:-1], future.log[:position], f"the order before {name} is exhausted")
        expect(future.source_of[groups[-1][0]], name, f"what would be drawn from at {position}")

"""Which samples were trained, in which epoch and at which step: derived from the data state, held against the books."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from tqdm import trange

from resume.chain import Fate, Ints
from resume.ledger import Ledger, sample_hashes
from resume.mixture import BLOCK
from resume.order import Order


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EpochOfFile:
    """What became of a file in one epoch of its source.

    Shapes: first_tokens, lengths, steps, is_applied (S,) of the samples that steps have read, by their places in the
    file; quarantined ones are among them.
    """

    epoch: int
    first_tokens: Ints
    lengths: Ints
    steps: Ints
    is_applied: NDArray[np.bool_]
    """Whether the step was; what the guard leaves out is not trained."""
    num_waiting: int
    """Groups that this epoch still holds."""
    num_skipped: int
    num_dropped: int
    num_removed: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileAudit:
    """A file's samples by the books and by the order, those of steps that were not applied left out.

    They agree unless something is badly wrong.
    """

    file_id: str
    source: str
    num_samples: int
    """Samples of the present length in the file."""
    booked: int
    computed: int
    quarantined: int
    digests_agree: bool

    @property
    def agrees(self) -> bool:
        """Whether the books hold exactly the samples that the order says were trained."""
        return self.booked == self.computed - self.quarantined and self.digests_agree


def epochs_of_file(order: Order, ledger: Ledger, file_id: str) -> Iterator[EpochOfFile]:
    """What became of a file in each epoch of its source that has begun.

    Cost: about 0.3 us for each of its samples and epochs; with a mixture 3 ms for each block of 65,536 positions that
    the file is spread over.
    """
    state = order.state
    groups = np.arange(state.num_groups(file_id), dtype=np.int64)
    settled = order.extend(state.next_boundary)  # in the present window any group may be trained in part
    for epoch in range(order.epoch_at(order.source_of(file_id), settled) + 1):
        location = order.locate(file_id, groups, epoch)
        is_drawn = (location.fates == Fate.DRAWN) & (location.positions >= 0)
        # With windows a group is trained bit by bit: those of the present window may be beyond the cursor.
        first_tokens, lengths, steps = _trained(order, file_id, groups[is_drawn], location.positions[is_drawn])
        waiting = (location.fates == Fate.DRAWN) & ~(is_drawn & (location.positions < state.position))
        yield EpochOfFile(
            epoch=epoch,
            first_tokens=first_tokens,
            lengths=lengths,
            steps=steps,
            is_applied=~np.isin(steps, ledger.not_applied),
            num_waiting=int(waiting.sum()),
            num_skipped=int((location.fates == Fate.SKIPPED).sum()),
            num_dropped=int((location.fates == Fate.DROPPED).sum()),
            num_removed=int((location.fates == Fate.REMOVED).sum()),
        )


def audit_file(order: Order, ledger: Ledger, file_id: str) -> FileAudit:
    """Holds a file's books against the order; `audit_files` is the way for many."""
    count, digest = 0, 0
    for epoch in epochs_of_file(order, ledger, file_id):
        first_tokens, lengths = epoch.first_tokens[epoch.is_applied], epoch.lengths[epoch.is_applied]
        count += len(lengths)
        for length in np.unique(lengths).tolist():
            digest += _digest(first_tokens[lengths == length], length)
    return _compared(order, ledger, file_id, count, digest)


def audit_files(order: Order, ledger: Ledger, show_progress: bool = False) -> list[FileAudit]:
    """Holds the books of all files against the order, which is walked once from its beginning.

    Where `audit_file` asks where a file's samples went, this asks which samples the positions had.

    Cost: below a microsecond for each sample that was trained.
    """
    state, num_files = order.state, len(order.file_ids)
    counts, digests = np.zeros(num_files, dtype=np.int64), np.zeros(num_files, dtype=np.uint64)
    num_targets = np.array([state.num_targets(file_id) for file_id in order.file_ids])
    end = order.extend(state.next_boundary)  # in the present window any group may be trained in part
    hidden = None if show_progress else True
    for first in trange(0, end, BLOCK, desc="audit", unit="block", leave=False, disable=hidden):
        positions = np.arange(first, min(first + BLOCK, end))
        positions = positions[~order.is_skipped(positions)]
        files, groups = order.resolve_groups(positions)
        lengths = order.sequence_lengths_at(positions)
        for length in np.unique(lengths).tolist():
            chosen = lengths == length
            steps = order.trained_at(positions[chosen], length)
            starts = groups[chosen, None] * state.group_tokens + np.arange(steps.shape[1]) * length
            of_file = np.broadcast_to(files[chosen, None], steps.shape)
            is_trained = (steps > 0) & (starts < num_targets[of_file]) & ~np.isin(steps, ledger.not_applied)
            np.add.at(counts, of_file[is_trained], 1)
            np.add.at(digests, of_file[is_trained], sample_hashes(starts[is_trained], length))
    computed = zip(order.file_ids, counts.tolist(), digests.tolist(), strict=True)
    return [_compared(order, ledger, file_id, count, digest) for file_id, count, digest in computed]


def _compared(order: Order, ledger: Ledger, file_id: str, count: int, digest: int) -> FileAudit:
    bad = [e for e in ledger.quarantined if e.file_id == file_id and e.step not in ledger.not_applied]
    for entry in bad:
        digest -= _digest(np.array([entry.first_token]), entry.sequence_length)
    index = ledger.file_ids.index(file_id)
    return FileAudit(
        file_id=file_id,
        source=order.source_of(file_id),
        num_samples=-(-order.state.num_targets(file_id) // order.sequence_length),
        booked=int(ledger.counts[index]),
        computed=count,
        quarantined=len(bad),
        digests_agree=digest % 2**64 == int(ledger.digests[index]),
    )


def trained_bitmap(order: Order, ledger: Ledger, file_id: str) -> NDArray[np.uint8]:
    """How often each sample (S,) of the present length was trained as a whole, over all epochs, at most 255."""
    length, targets = order.sequence_length, order.state.num_targets(file_id)
    epochs = list(epochs_of_file(order, ledger, file_id))
    unit = math.gcd(length, *(int(n) for epoch in epochs for n in np.unique(epoch.lengths)))
    num_units = -(-targets // unit)
    changes = np.zeros(num_units + 1, dtype=np.int64)

    def count(first_tokens: Ints, lengths: Ints, times: int) -> None:
        np.add.at(changes, first_tokens // unit, times)
        np.add.at(changes, np.minimum((first_tokens + lengths) // unit, num_units), -times)

    for epoch in epochs:
        count(epoch.first_tokens[epoch.is_applied], epoch.lengths[epoch.is_applied], 1)
    for entry in ledger.quarantined:
        if entry.file_id == file_id and entry.step not in ledger.not_applied:
            count(np.array([entry.first_token]), np.array([entry.sequence_length]), -1)
    seen = np.minimum.reduceat(np.cumsum(changes)[:-1], np.arange(0, num_units, length // unit))
    return np.minimum(seen, 255).astype(np.uint8)


def _trained(order: Order, file_id: str, groups: Ints, positions: Ints) -> tuple[Ints, Ints, Ints]:
    """First tokens, lengths and steps of the trained samples of groups at positions."""
    parts: list[tuple[Ints, Ints, Ints]] = []
    lengths = order.sequence_lengths_at(positions)
    end = order.state.num_targets(file_id)
    for length in np.unique(lengths).tolist():
        chosen = lengths == length
        steps = order.trained_at(positions[chosen], length)
        starts = groups[chosen, None] * order.state.group_tokens + np.arange(steps.shape[1]) * length
        is_trained = (steps > 0) & (starts < end)
        parts.append((starts[is_trained], np.full(int(is_trained.sum()), length), steps[is_trained]))
    if not parts:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, nothing
    first_tokens, all_lengths, steps = (np.concatenate(column) for column in zip(*parts, strict=True))
    by_place = np.argsort(first_tokens, kind="stable")
    return first_tokens[by_place], all_lengths[by_place], steps[by_place]


def _digest(first_tokens: Ints, length: int) -> int:
    return int(sample_hashes(first_tokens, length).sum(dtype=np.uint64))

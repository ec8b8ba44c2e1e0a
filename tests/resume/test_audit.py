"""What the audit derives from the state is what a walk over the order, sample by sample, has seen."""

import collections
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resume import state as states
from resume.audit import EpochOfFile, FileAudit, audit_file, audit_files, epochs_of_file, trained_bitmap
from resume.chain import Fate
from resume.ledger import Ledger, Quarantined, sample_hashes
from resume.order import Order
from tests.resume.histories import History
from tests.resume.promises import Lived
from tests.resume.tables import computed_once
from tests.resume.walks import Span, Walk, begun, file_of

WEB = [file_of(1, 100), file_of(2, 61), file_of(3, 5)]
CODE = [file_of(4, 83), file_of(5, 40)]
NEW = [file_of(6, 75), file_of(7, 8)]


def pool(**options) -> Walk:
    return Walk(begun({"web": WEB}, **options))


def windows(**options) -> Walk:
    """Samples of 4 tokens in groups of 16, shuffled within four groups; 57 groups an epoch, so windows span two."""
    return Walk(begun({"web": [file_of(1, 200), file_of(2, 699)]}, 4, group_tokens=16, window_groups=4, **options))


def with_length(length: int, batch_sequences: int) -> Callable[[states.DataState], states.DataState]:
    return lambda now: states.set_batch(now, batch_sequences, length)


def appended(source: str, *file_ids: str) -> Callable[[states.DataState], states.DataState]:
    return lambda now: states.append(now, {source: list(file_ids)})


def removed(*file_ids: str) -> Callable[[states.DataState], states.DataState]:
    return lambda now: states.remove(now, file_ids)


def skipped(num_steps: int, for_good: bool = False) -> Callable[[states.DataState], states.DataState]:
    return lambda now: states.skip(now, num_steps, for_good)


MIXTURE = {"mixture": ["web=0.6 code=0.4", "400: web=0.2 code=0.8"], "max_epochs": {"code": 3}}
WALKS: dict[str, Callable[[], Walk]] = {
    "nothing trained": lambda: pool(),
    "no events": lambda: pool().steps(3),
    "append": lambda: pool().steps(3).change(appended("web", *NEW)).steps(4),
    "append in a later epoch": lambda: pool().steps(9).change(appended("web", *NEW)).steps(12),
    "append where an epoch ends": lambda: pool(batch_sequences=11).steps(2).change(appended("web", *NEW)).steps(3),
    "remove": lambda: pool().steps(3).change(removed(WEB[0])).steps(8),
    "append and remove": lambda: pool().steps(2).change(appended("web", *NEW)).change(removed(WEB[1], NEW[0])).steps(9),
    "skip": lambda: pool().steps(2).change(skipped(2)).steps(1),
    "skip until the epoch ends": lambda: pool().steps(2).change(skipped(2)).steps(9),
    "skip for good": lambda: pool().steps(2).change(skipped(1, for_good=True)).steps(11),
    "skip and requeue": lambda: pool().steps(1).change(skipped(3)).steps(1).change(states.requeue).steps(2),
    "several epochs": lambda: pool(batch_sequences=5).steps(17),
    "two sources": lambda: Walk(begun({"web": WEB, "code": CODE}, **MIXTURE)).steps(25),
    "two sources with events": lambda: (
        Walk(begun({"web": WEB, "code": CODE}, **MIXTURE))
        .steps(6)
        .change(appended("code", *NEW))
        .steps(4)
        .change(removed(CODE[0], WEB[1]))
        .change(lambda now: states.reweight(now, {"web": 0.5, "code": 0.5}))
        .steps(9)
    ),
    **{f"windows, {n} steps": lambda n=n: windows(batch_sequences=8).steps(n) for n in (1, 2, 28, 29, 30)},
    "windows and an event": lambda: windows(batch_sequences=12).steps(1).change(appended("web", *NEW)).steps(4),
    "windows and a ragged last step": lambda: (
        windows(batch_sequences=12, max_epochs={"": 1}).steps(99).change(appended("web", *NEW)).steps(2)
    ),
    "another length": lambda: (
        pool(length=4, group_tokens=16).steps(2).change(with_length(16, 3)).steps(1).change(with_length(8, 2)).steps(3)
    ),
    "another length between windows": lambda: windows().steps(3).change(with_length(16, 2)).steps(7),
    "a ragged last step": lambda: pool(max_epochs={"": 1}).steps(99).change(appended("web", *NEW)).steps(2),
    "quarantined samples": lambda: Walk(
        begun({"web": WEB}), is_bad=lambda file_id, first: (file_id, first) in {(WEB[0], 96), (WEB[1], 0), (WEB[1], 8)}
    ).steps(8),
}


def by_epoch(epochs: Sequence[EpochOfFile]) -> dict[int, dict[Span, int]]:
    """Steps by sample of the epochs in which something was trained."""
    found: dict[int, dict[Span, int]] = {}
    for epoch in epochs:
        spans = list(zip(epoch.first_tokens.tolist(), epoch.lengths.tolist(), strict=True))
        assert spans == sorted(set(spans))
        if spans:
            found[epoch.epoch] = dict(zip(spans, epoch.steps.tolist(), strict=True))
    return found


def audits(order: Order, books: Ledger) -> dict[str, FileAudit]:
    """By either way: asking where each file's samples went, and walking over all positions."""
    each = [audit_file(order, books, file_id) for file_id in order.file_ids]
    assert audit_files(order, books) == each
    return {audit.file_id: audit for audit in each}


@pytest.mark.parametrize("walked", WALKS.values(), ids=WALKS.keys())
def test_the_audit_is_what_a_walk_over_every_sample_has_seen(walked: Callable[[], Walk]):
    walk = walked()
    # A new order: whoever audits knows the record alone.
    order, books = Order(walk.state), walk.ledger()
    sources = {file_id: source for source, file_ids in walk.state.sources.items() for file_id in file_ids}
    assert sorted(order.file_ids) == sorted(sources)
    for file_id, audit in audits(order, books).items():
        assert by_epoch(list(epochs_of_file(order, books, file_id))) == walk.trained.get(file_id, {})
        num_trained = sum(map(len, walk.trained[file_id].values()))
        num_bad = sum(entry.file_id == file_id for entry in books.quarantined)
        assert (audit.source, audit.computed, audit.quarantined) == (sources[file_id], num_trained, num_bad)
        assert audit.booked == num_trained - num_bad
        assert audit.num_samples == len(range(0, walk.state.num_targets(file_id), walk.state.sequence_length))
        assert audit.agrees


@pytest.mark.parametrize("walked", WALKS.values(), ids=WALKS.keys())
def test_the_bitmap_counts_how_often_a_sample_was_trained_from_its_first_target_to_its_last(walked: Callable[[], Walk]):
    walk = walked()
    order, books, length = Order(walk.state), walk.ledger(), walk.state.sequence_length
    times: collections.Counter[tuple[str, int]] = collections.Counter()
    for file_id, (first, of_length), _ in walk.samples():
        times.update((file_id, target) for target in range(first, first + of_length))
    for bad in books.quarantined:
        last = bad.first_token + bad.sequence_length
        times.subtract((bad.file_id, target) for target in range(bad.first_token, last))
    for file_id in order.file_ids:
        targets = range(walk.state.num_targets(file_id))
        expected = [min(times[file_id, t] for t in targets[i : i + length]) for i in targets[::length]]
        assert trained_bitmap(order, books, file_id).tolist() == expected


def test_samples_of_steps_that_were_not_applied_are_not_trained():
    walk = Walk(begun([96, 40])).steps(7)
    order, books = Order(walk.state), Ledger(Order(walk.state).file_ids)
    books.not_applied = [2, 6]
    for file_id, (first, length), step in walk.samples():
        if step not in books.not_applied:
            books.add(np.array([books.file_ids.index(file_id)]), np.array([first // length]), length)
    assert all(audit.agrees for audit in audits(order, books).values())
    assert sum(audit.booked for audit in audits(order, books).values()) == 5 * 4
    left_out = [epoch for i in order.file_ids for epoch in epochs_of_file(order, books, i)]
    assert sum(int((~epoch.is_applied).sum()) for epoch in left_out) == 2 * 4
    assert set(np.concatenate([epoch.steps[~epoch.is_applied] for epoch in left_out]).tolist()) == {2, 6}
    assert sum(int(trained_bitmap(order, books, i).sum()) for i in order.file_ids) == 5 * 4
    books.not_applied = [2]
    assert not all(audit.agrees for audit in audits(order, books).values())


def test_a_bad_sample_that_is_drawn_twice_in_a_step_is_left_out_twice():
    walk = Walk(begun([16], batch_sequences=8), lambda file_id, first_token: first_token == 8).steps(3)
    books = walk.ledger()
    assert len(books.quarantined) == 12 > len(set(books.quarantined)) == 3
    assert all(audit.agrees for audit in audits(Order(walk.state), books).values())


def test_the_bitmap_counts_no_further_than_255():
    walk = Walk(begun([16, 8])).steps(200)
    order = Order(walk.state)
    assert trained_bitmap(order, walk.ledger(), file_of(0, 16)).tolist() == [255, 255]


def check_lived(lived: Lived, rng: np.random.Generator) -> None:
    """Holds the audit of all files against what a history has lived through."""
    now, truth, order = lived.state, lived.truth, Order(lived.state)
    found: list[tuple[int, str, int, int, int]] = []
    for file_id, source in truth.source_of.items():
        epochs = list(epochs_of_file(order, Ledger(order.file_ids), file_id))
        assert [epoch.epoch for epoch in epochs] == list(range(len(truth.sources[source].epochs)))
        for epoch, true in zip(epochs, truth.sources[source].epochs, strict=True):
            fates = collections.Counter(true.fate((file_id, group)) for group in range(now.num_groups(file_id)))
            passed = [p for (file, _), p in true.seen.items() if file == file_id and p < now.position]
            assert epoch.num_waiting == fates[Fate.DRAWN] - len(passed)
            assert (epoch.num_skipped, epoch.num_dropped) == (fates[Fate.SKIPPED], fates[Fate.DROPPED])
            assert epoch.num_removed == fates[Fate.REMOVED]
            for (first, length), step in by_epoch([epoch]).get(epoch.epoch, {}).items():
                # Where its window begins is the epoch's mark: samples of a window may change places.
                window = lived.window_of(true.seen[file_id, first // now.group_tokens])
                found.append((window, file_id, first, length, step))
    real = [t for t in lived.trained if lived.targets_of(t.file, t.sample, t.length)]
    windows_of = [lived.window_of(t.place * t.length // now.group_tokens) for t in real]
    assert sorted(found) == sorted((w, t.file, t.sample * t.length, t.length, t.step) for w, t in zip(windows_of, real))
    books = Ledger(order.file_ids)
    for t in real:
        if rng.random() < 0.05:
            books.quarantined.append(Quarantined(t.file, t.sample * t.length, t.length, t.step))
        else:
            books.add(np.array([order.file_ids.index(t.file)]), np.array([t.sample]), t.length)
    assert all(audit.agrees for audit in audits(order, books).values())


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_the_audit_of_random_histories_is_what_they_have_lived_through(first: int):
    for seed in range(first, first + 20):
        with computed_once():
            history = History(seed)
            for _ in range(30):
                history.operate()
                if history.rng.random() < 0.2:
                    check_lived(history.lived, history.rng)


def booked(file_id: str, span: Span, books: Ledger, times: int) -> None:
    """Books a sample once more, or once less."""
    index = books.file_ids.index(file_id)
    books.counts[index] += times
    books.digests[[index]] += np.array([times]).astype(np.uint64) * sample_hashes(np.array([span[0]]), span[1])


@settings(max_examples=60)
@given(st.data())
def test_books_that_were_altered_are_found_and_only_the_files_concerned(data: st.DataObject):
    walk = WALKS[data.draw(st.sampled_from(["append", "several epochs", "two sources", "quarantined samples"]))]()
    order, books = Order(walk.state), walk.ledger()
    bad = {(entry.file_id, (entry.first_token, entry.sequence_length)) for entry in books.quarantined}
    trained = sorted({(file_id, span) for file_id, span, _ in walk.samples()} - bad)
    file_id, span = data.draw(st.sampled_from(trained))
    match data.draw(st.sampled_from(["twice", "missing", "swapped", "moved to another file", "not quarantined"])):
        case "twice":
            booked(file_id, span, books, 1)
            concerned = {file_id}
        case "missing":
            booked(file_id, span, books, -1)
            concerned = {file_id}
        case "swapped":  # the count stays
            other = data.draw(st.integers(0, 99).map(lambda i: (i * span[1], span[1])).filter(lambda o: o != span))
            booked(file_id, span, books, -1)
            booked(file_id, other, books, 1)
            concerned = {file_id}
        case "moved to another file":  # the sum over all files stays
            other = data.draw(st.sampled_from(order.file_ids).filter(lambda o: o != file_id))
            booked(file_id, span, books, -1)
            booked(other, span, books, 1)
            concerned = {file_id, other}
        case _:
            books.quarantined.append(Quarantined(file_id, *span, 1))
            concerned = {file_id}
    assert {name for name, audit in audits(order, books).items() if not audit.agrees} == concerned


def test_books_that_are_a_step_ahead_of_the_cursor_do_not_agree():
    walk = pool().steps(3)
    order = Order(walk.state)
    ahead = walk.steps(1).ledger()
    wrong = {file_id for file_id, audit in audits(order, ahead).items() if not audit.agrees}
    assert wrong == {file_id for file_id, _, step in walk.samples() if step == 4}


@pytest.mark.parametrize(("entered", "agrees"), [((WEB[0], 0, 8), False), ((CODE[0], 0, 8), True)])
def test_a_quarantined_sample_counts_for_its_own_file_alone(entered: tuple[str, int, int], agrees: bool):
    walk = pool().steps(8)
    books = walk.ledger()
    books.quarantined.append(Quarantined(*entered, 1))
    assert audit_file(Order(walk.state), books, WEB[0]).agrees is agrees

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shards import HEADER_BYTES
from resume import state
from resume.chain import Fate
from resume.manifest import DataError
from resume.mixture import BLOCK
from resume.order import Happening, Order, changeable
from resume.state import DataState

token_counts = st.lists(st.integers(2, 200), min_size=1, max_size=8)


def file_of(number: int, num_targets: int) -> str:
    return f"{number:032x}-{number:032x}-{HEADER_BYTES + 2 * (num_targets + 1)}"


def begun(files: dict[str, list[str]] | list[int], length: int = 8, **options) -> DataState:
    """A run over files of so many targets each, in batches of four groups."""
    if isinstance(files, list):
        files = {"web": [file_of(i, count) for i, count in enumerate(files)]}
    per_group = options.get("group_tokens", length) // length
    common = {"seed": 1, "batch_sequences": 4 * per_group, "tokenizer_digest": "abc", "eos_id": 0}
    return state.start(files, sequence_length=length, **{**common, **options})


def trained(moved: DataState, num_groups: int) -> DataState:
    """The state after steps over so many groups."""
    per_step = moved.batch.batch_sequences // moved.samples_per_group
    for left in range(num_groups, 0, -per_step):
        num_samples = min(left, per_step) * moved.samples_per_group
        moved = moved.advance(num_samples, num_samples * moved.sequence_length)
    return moved


def groups(order: Order, first: int, last: int) -> list[tuple[str, int]]:
    files, of_files = order.resolve_groups(np.arange(first, last))
    return [(order.file_ids[i], group) for i, group in zip(files.tolist(), of_files.tolist())]


def sources(order: Order, first: int, last: int) -> str:
    return "".join(order.source_of(file) for file, _ in groups(order, first, last))


@given(counts=token_counts, length=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_every_epoch_visits_every_sample_once(counts: list[int], length: int, seed: int, epoch: int):
    order = Order(begun(counts, length, seed=seed))
    expected = [(f, s) for f, count in enumerate(counts) for s in range(-(-count // length))]
    n = len(expected)
    files, samples = order.resolve(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(zip(files.tolist(), samples.tolist())) == expected


@given(counts=token_counts, cuts=st.lists(st.integers(0, 300), max_size=5))
def test_slicing_positions_does_not_change_the_order(counts: list[int], cuts: list[int]):
    order = Order(begun(counts, 16))
    whole = np.stack(order.resolve(np.arange(300)))
    pieces = [np.stack(order.resolve(piece)) for piece in np.split(np.arange(300), sorted(cuts))]
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)
    backwards = np.stack(Order(order.state).resolve(np.arange(300)[::-1]))
    assert np.array_equal(backwards[:, ::-1], whole)


def test_the_order_depends_on_content_not_on_listing_order_or_the_batch():
    files = [file_of(i, 100 * i) for i in (1, 2, 3)]
    one = Order(begun({"web": files}))
    other = Order(begun({"web": files[::-1]}, batch_sequences=7))
    assert groups(one, 0, 200) == groups(other, 0, 200)
    without_mixture = Order(begun({"web": files[:1], "code": files[1:]}))  # nor on how sources are called
    assert groups(one, 0, 200) == groups(without_mixture, 0, 200)


def test_epochs_and_seeds_give_different_orders():
    order, other = Order(begun([5_000])), Order(begun([5_000], seed=2))
    seen = [groups(order, 0, 625), groups(order, 625, 1_250), groups(other, 0, 625)]
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_the_order_of_a_run_is_the_same_in_every_version_and_on_every_machine():
    """A run that resumes under another version of this code must go on in its own order: change these never."""
    files = {"a": [file_of(1, 100), file_of(2, 60)], "b": [file_of(3, 75)]}
    moved = begun(files, group_tokens=16, window_groups=4, mixture=["a=0.7 b=0.3", "300: a=0.2 b=0.8"])
    moved = state.append(trained(moved, 8), {"b": [file_of(4, 40)]})
    moved = state.skip(trained(moved, 4), 1)
    moved = state.remove(moved, [file_of(2, 60)])
    order = Order(moved)
    files, samples = order.resolve(np.arange(44))
    assert "".join(map(str, files.tolist())) == GOLDEN_FILES
    assert samples.tolist() == GOLDEN_SAMPLES


GOLDEN_FILES = "20101211000220000020202210103311023300203330"
GOLDEN_SAMPLES = [
    0,
    2,
    1,
    3,
    4,
    1,
    0,
    5,
    6,
    7,
    1,
    4,
    5,
    4,
    5,
    0,
    13,
    10,
    3,
    12,
    2,
    11,
    8,
    9,
    6,
    8,
    3,
    9,
    3,
    2,
    2,
    7,
    8,
    7,
    0,
    1,
    9,
    8,
    6,
    9,
    5,
    4,
    3,
    4,
]


@given(count=st.integers(1, 200), window=st.sampled_from([1, 2, 5]), units=st.integers(2, 4))
def test_samples_of_a_group_are_trained_within_its_window(count: int, window: int, units: int):
    order = Order(begun([count, 50], 4, group_tokens=4 * units, window_groups=window))
    num_groups = -(-count // (4 * units)) + -(-50 // (4 * units))
    files, samples = order.resolve(np.arange(-(-num_groups // window) * window * units))
    for first in range(0, num_groups, window):
        there = slice(first * units, (first + window) * units)
        found = sorted(zip(files[there].tolist(), samples[there].tolist()))
        of_files, of_groups = order.resolve_groups(np.arange(first, first + window))
        whole = [(f, g * units + u) for f, g in zip(of_files.tolist(), of_groups.tolist()) for u in range(units)]
        assert found == sorted(whole)


def test_samples_of_a_window_are_shuffled():
    order = Order(begun([8_000], 8, group_tokens=32, window_groups=50))
    _, samples = order.resolve(np.arange(200))
    neighbours = np.count_nonzero(np.diff(samples) == 1)
    assert neighbours < 10  # 150 if groups stayed in one piece
    _, samples = Order(begun([8_000], 8, group_tokens=32)).resolve(np.arange(200))
    assert np.count_nonzero(np.diff(samples) == 1) >= 150


@given(steps=st.integers(0, 8))
def test_another_length_at_the_end_of_a_window_loses_and_repeats_no_token(steps: int):
    moved = trained(begun([400, 199], 4, group_tokens=16, window_groups=4), 4 * steps)
    first = state.set_batch(moved, 3, 16)
    order, longer = Order(moved), Order(first)
    longer.refuse_losing_length(8)
    n = -(-400 // 16) + -(-199 // 16)
    seen = [
        (f, s * 4 + i) for f, s in zip(*(a.tolist() for a in order.resolve(np.arange(16 * steps)))) for i in range(4)
    ]
    rest = longer.resolve(np.arange(4 * steps, n))
    seen += [(f, s * 16 + i) for f, s in zip(*(a.tolist() for a in rest)) for i in range(16)]
    assert sorted(seen) == [(f, t) for f, count in enumerate((400, 208)) for t in range(count)]
    assert longer.sequence_lengths_at(np.arange(n)).tolist() == [4] * 4 * steps + [16] * (n - 4 * steps)


@pytest.mark.parametrize(("length", "groups_trained"), [(8, 6), (32, 8), (48, 5), (12, 4)])
def test_another_length_elsewhere_is_refused_with_the_tokens_it_would_lose(length: int, groups_trained: int):
    moved = trained(begun([480, 960], 4, group_tokens=16, window_groups=4, batch_sequences=4), groups_trained)
    order = Order(moved)
    files, samples = order.resolve(np.arange(moved.first_sample))
    seen = {(f, s * 4 + i) for f, s in zip(files.tolist(), samples.tolist()) for i in range(4)}
    long = int(np.lcm(4, length))
    lost = 0
    for file, count in enumerate((480, 960)):
        for first in range(0, count, long):
            of_sample = {(file, t) for t in range(first, min(first + long, count))}
            lost += len(of_sample - seen) if of_sample & seen else 0
    with pytest.raises(DataError, match=re.escape(f"4 -> {length} would lose {lost:,} tokens of this epoch")):
        order.refuse_losing_length(length)


def mixed(**options) -> DataState:
    files = {"a": [file_of(1, 400)], "b": [file_of(2, 80), file_of(3, 80)]}
    return begun(files, **{"mixture": ["a=0.75 b=0.25"], **options})


def test_a_complete_block_has_exactly_the_shares_of_the_mixture():
    order = Order(mixed())
    assert order.drawn_before(BLOCK) == {"a": BLOCK * 3 // 4, "b": BLOCK // 4}
    assert order.drawn_before(0) == {"a": 0, "b": 0}
    assert order.shares_at(0) == {"a": 0.75, "b": 0.25}
    seen = sources(order, 0, BLOCK)
    assert (seen.count("a"), seen.count("b")) == (BLOCK * 3 // 4, BLOCK // 4)
    assert order.progress(BLOCK)["b"] == pytest.approx(BLOCK / 4 / 20)


def test_a_mixture_changes_at_the_tokens_that_its_schedule_names():
    order = Order(mixed(mixture=["a=1 b=0", "785: a=0 b=1"]))  # 785 tokens end inside the 99th group
    assert sources(order, 0, 120) == "a" * 99 + "b" * 21
    order = Order(state.reweight(mixed(mixture=["a=1 b=0"]), {"a": 0, "b": 1}, from_tokens=80))
    assert sources(order, 0, 20) == "a" * 10 + "b" * 10
    assert order.shares_at(9) == {"a": 1.0, "b": 0.0}
    assert order.shares_at(10) == {"a": 0.0, "b": 1.0}


def test_the_sources_of_a_mixture_are_drawn_independently_of_each_other():
    one, other = Order(mixed()), Order(mixed(mixture=["a=0.25 b=0.75"]))
    for source in "ab":
        drawn = [[g for g in groups(order, 0, 400) if order.source_of(g[0]) == source] for order in (one, other)]
        shorter = min(map(len, drawn))
        assert drawn[0][:shorter] == drawn[1][:shorter]


def test_when_a_source_is_exhausted_the_others_take_over_at_its_first_missing_draw():
    unlimited = Order(mixed())
    limited = Order(mixed(max_epochs={"b": 2}))
    seen = sources(unlimited, 0, 400)
    first_missing = [i for i, source in enumerate(seen) if source == "b"][40]  # two epochs of twenty
    assert sources(limited, 0, first_missing) == seen[:first_missing]
    assert sources(limited, first_missing, 1_000) == "a" * (1_000 - first_missing)
    assert Happening(first_missing, "b", "exhausted", 1) in limited.happenings
    assert limited.end is None
    assert limited.shares_at(first_missing) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("policy", ["stop", "error"])
def test_when_a_source_is_exhausted_the_data_may_end_at_its_first_missing_draw(policy: str):
    seen = sources(Order(mixed()), 0, 400)
    first_missing = [i for i, source in enumerate(seen) if source == "b"][20]
    order = Order(mixed(max_epochs={"": 1, "a": 9}, when_exhausted=policy))
    assert (order.extend(10_000), order.end) == (first_missing, first_missing)
    assert sources(order, 0, first_missing) == seen[:first_missing]
    with pytest.raises(ValueError, match=f"position {first_missing}: the data ends at {first_missing}"):
        order.resolve(np.array([first_missing]))


def test_the_data_ends_when_every_source_is_exhausted():
    order = Order(mixed(max_epochs={"a": 1, "b": 3}))
    assert (order.extend(10**9), order.end) == (50 + 60, 110)
    assert order.drawn_before(110) == {"a": 50, "b": 60}
    assert order.progress(110) == {"a": 1.0, "b": 3.0}
    assert [(h.source, h.kind) for h in order.happenings].count(("b", "epoch")) == 3


def test_a_run_goes_on_where_its_data_had_ended():
    ended = trained(begun([80], max_epochs={"": 1}), 10)
    assert Order(ended).extend(11) == 10
    order = Order(state.append(ended, {"web": [file_of(7, 40)]}))
    assert sorted(groups(order, 10, 15)) == [(file_of(7, 40), i) for i in range(5)]
    assert order.extend(100) == 15
    steps = order.trained_at(np.arange(10), 8)[:, 0].tolist()
    assert steps == [1] * 4 + [2] * 4 + [3] * 2
    further = trained(order.state, 5)
    assert Order(further).trained_at(np.arange(8, 15), 8)[:, 0].tolist() == [3, 3, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("passed", [9, 10])
def test_a_run_goes_on_where_its_data_had_ended_inside_a_window(passed: int):
    options = {"group_tokens": 16, "window_groups": 4, "max_epochs": {"": 1}, "batch_sequences": 2}
    ending = trained(begun([160], **options), passed)  # ten groups, the third window has two
    before = np.stack(Order(ending).resolve(np.arange(20)))
    order = Order(state.append(changeable(ending), {"web": [file_of(7, 100)]}))
    assert np.array_equal(np.stack(order.resolve(np.arange(20))), before)
    assert order.extend(100) == 17
    assert sorted(groups(order, 10, 17)) == [(file_of(7, 100), i) for i in range(7)]


def test_a_schedule_behind_the_end_of_the_data_does_not_matter():
    order = Order(mixed(max_epochs={"": 1}, mixture=["a=1 b=1", "1e9: a=1 b=3"]))
    assert order.extend(10**9) == 70


def test_a_source_without_files_has_nothing_to_give():
    empty = begun({"a": [file_of(1, 80)], "b": []}, mixture=["a=0.5 b=0.5"])
    assert sources(Order(empty), 0, 30) == "a" * 30
    assert Order(begun({"web": []})).extend(5) == 0
    filled = state.append(trained(empty, 8), {"b": [file_of(2, 800)]})
    assert set(sources(Order(filled), 8, 30)) == {"a", "b"}


def test_more_than_there_is_cannot_be_skipped():
    for limits in ({}, {"": 1}, {"": 3}):
        with pytest.raises(DataError, match="the data ends at group 10, before group 12, where the run would be"):
            Order(state.skip(begun([80], max_epochs=limits), 3, for_good=True))
    everything = state.skip(begun([80], max_epochs={"": 1}), 25)  # comes back, so it can be skipped again
    assert Order(everything).extend(1_000) == 110


def test_what_is_skipped_is_found_as_skipped_until_it_returns():
    skipped = state.skip(trained(begun([160]), 4), 2)
    order = Order(skipped)
    there = groups(order, 4, 12)
    found = order.locate(file_of(0, 160), np.array([group for _, group in there]), epoch=0)
    assert found.fates.tolist() == [Fate.SKIPPED] * 8
    assert found.positions.tolist() == list(range(4, 12))
    order = Order(trained(skipped, 16))  # the other eight, then these
    found = order.locate(file_of(0, 160), np.array([group for _, group in there]), epoch=0)
    assert found.fates.tolist() == [Fate.DRAWN] * 8
    assert sorted(found.positions.tolist()) == list(range(20, 28))
    assert order.trained_at(found.positions, 8)[:, 0].tolist() == [1 + (p - 8) // 4 for p in found.positions.tolist()]


def test_steps_are_counted_through_changes_of_the_batch_and_skips():
    moved = trained(begun([8_000]), 8)
    moved = trained(state.set_batch(moved, 6, 8), 12)
    moved = trained(state.skip(moved, 3), 6)
    order = Order(moved)
    passed = np.array([0, 3, 4, 7, 8, 13, 14, 19, 38, 43, 44])
    assert order.trained_at(passed, 8)[:, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0]


def test_happenings_do_not_depend_on_how_far_at_once_the_order_was_asked_for():
    at_once, step_by_step = Order(mixed(max_epochs={"b": 2})), Order(mixed(max_epochs={"b": 2}))
    at_once.extend(300)
    for position in range(301):
        step_by_step.extend(position)
    assert sorted(map(dataclasses.astuple, at_once.happenings)) == sorted(
        map(dataclasses.astuple, step_by_step.happenings)
    )
    begins = {source: sources(at_once, 0, 300).index(source) for source in "ab"}
    epochs = {h.source: h.position for h in at_once.happenings if (h.kind, h.epoch) == ("epoch", 0)}
    assert epochs == begins


def test_every_file_has_its_source_and_its_groups():
    order = Order(mixed())
    assert {file: order.source_of(file) for file in order.file_ids} == {
        file_of(1, 400): "a",
        file_of(2, 80): "b",
        file_of(3, 80): "b",
    }
    assert order.live_groups() == {"a": 50, "b": 20}


@given(at=st.integers(0, 10**9))
@settings(max_examples=10)
def test_any_position_of_a_run_over_a_trillion_tokens_can_be_asked_for(at: int):
    files = {"web": [file_of(i, 420_000_000) for i in range(2_440)]}
    order = Order(begun(files, 2048))
    positions = np.arange(at, at + 100)
    found, samples = order.resolve(positions)
    epoch = at // sum(order.live_groups().values())
    location = order.locate(order.file_ids[int(found[0])], samples[:1], epoch)
    assert location.positions.tolist() == [at]

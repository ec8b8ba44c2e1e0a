import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config_file import ConfigError
from resume.mixture import (
    BLOCK,
    Mixture,
    WeightsFrom,
    parse_max_epochs,
    parse_schedule,
    parse_weights,
    quotas_of,
)
from resume.order import Order
from resume.state import append, start

few_blocks = settings(max_examples=10)  # a block's table takes milliseconds
weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


def weights_of(count: int) -> st.SearchStrategy[list[float]]:
    return st.lists(weight, min_size=count, max_size=count).filter(any)


def quotas(weights: list[float]) -> np.ndarray:
    names = [f"s{i}" for i in range(len(weights))]
    return quotas_of(dict(zip(names, weights)), names)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    """Two to four sources, one to three segments that begin anywhere in a block."""
    num_sources = draw(st.integers(2, 4))
    mixture = Mixture([f"s{i}" for i in range(num_sources)], draw(st.integers(0, 2**32)))
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        mixture.push(start, quotas(draw(weights_of(num_sources))))
        start += draw(st.integers(1, 2 * BLOCK))
    return mixture


@given(weights=st.integers(1, 8).flatmap(weights_of))
@settings(max_examples=200)
def test_quotas_fill_a_block_and_follow_the_weights_as_closely_as_integers_can(weights: list[float]):
    found = quotas(weights)
    exact = np.array(weights) / np.sum(weights) * BLOCK
    assert found.sum() == BLOCK
    assert np.all((found > 0) == (np.array(weights) > 0))
    raised = np.count_nonzero((exact > 0) & (exact < 1))  # tiny weights have 1, the greatest pays for them
    assert np.all(np.abs(found - exact) <= 1 + raised)
    assert np.all(np.delete(np.abs(found - exact), np.argmax(found)) <= 1)


def test_a_weight_below_the_resolution_is_still_drawn_from_once_in_every_block():
    assert quotas([1e-9, 1.0]).tolist() == [1, BLOCK - 1]
    assert quotas([1e-9, 1e-9, 0.0, 1.0]).tolist() == [1, 1, 0, BLOCK - 2]
    assert quotas([1.0, 1.0, 1.0]).tolist() == [21846, 21845, 21845]


@given(weights=weights_of(3), seed=st.integers(0, 2**32), start=st.integers(0, 10**12))
@few_blocks
def test_every_complete_block_has_exactly_the_quotas(weights: list[float], seed: int, start: int):
    mixture = Mixture(["a", "b", "c"], seed)
    mixture.push(start, quotas(weights))
    for block in (0, 1, 1_000_003):
        first = start + block * BLOCK
        sources, draws = mixture.resolve(np.arange(first, first + BLOCK))
        assert np.array_equal(np.bincount(sources, minlength=3), mixture.quotas[0])
        for source in range(3):
            base = block * mixture.quotas[0][source]
            expected = np.arange(base, base + mixture.quotas[0][source])
            assert np.array_equal(draws[sources == source], expected)


@given(weights=weights_of(3), seed=st.integers(0, 2**32))
@few_blocks
def test_any_part_of_a_block_is_off_by_less_than_the_quota_and_no_more_than_chance(weights: list[float], seed: int):
    mixture = Mixture(["a", "b", "c"], seed)
    mixture.push(0, quotas(weights))
    sources, _ = mixture.resolve(np.arange(BLOCK))
    for source, quota in enumerate(mixture.quotas[0].tolist()):
        drawn = np.cumsum(sources == source)
        error = np.abs(drawn - np.arange(1, BLOCK + 1) * (quota / BLOCK))
        assert error.max() < max(quota, 1e-9)
        spread = np.sqrt(quota * (1 - quota / BLOCK)) / 2  # of draws without replacement, halfway
        assert error.max() <= 6 * spread + 1


@given(mixture=mixtures(), data=st.data())
@few_blocks
def test_draws_are_counted_without_gap_across_segments_and_blocks(mixture: Mixture, data: st.DataObject):
    last = mixture.starts[-1] + 2 * BLOCK
    sources, draws = mixture.resolve(np.arange(last))
    for source in range(len(mixture.sources)):
        assert np.array_equal(draws[sources == source], np.arange(np.count_nonzero(sources == source)))
    borders = [*mixture.starts, *(start + BLOCK for start in mixture.starts), last]
    anywhere = data.draw(st.lists(st.integers(0, last), max_size=5))
    for position in [*anywhere, *(p + d for p in borders for d in (-1, 0, 1) if 0 <= p + d <= last)]:
        counted = np.bincount(sources[:position], minlength=len(mixture.sources))
        assert np.array_equal(mixture.drawn_before(position), counted)


@given(mixture=mixtures(), data=st.data())
@few_blocks
def test_the_position_of_a_draw_inverts_the_draw_of_a_position(mixture: Mixture, data: st.DataObject):
    last = mixture.starts[-1] + BLOCK + 1
    positions = np.array(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=300)) + mixture.starts)
    sources, draws = mixture.resolve(positions)
    for source in np.unique(sources).tolist():
        chosen = sources == source
        assert np.array_equal(mixture.positions_of(source, draws[chosen]), positions[chosen])


@given(mixture=mixtures(), data=st.data())
@few_blocks
def test_positions_can_be_asked_for_in_any_pieces(mixture: Mixture, data: st.DataObject):
    positions = np.arange(0, mixture.starts[-1] + BLOCK, 701)
    whole = np.stack(mixture.resolve(positions))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(positions)), max_size=4)))
    pieces = [np.stack(mixture.resolve(piece)) for piece in np.split(positions, cuts)]
    assert np.array_equal(np.concatenate(pieces, axis=1), whole)
    backwards = np.stack(mixture.resolve(positions[::-1]))
    assert np.array_equal(backwards[:, ::-1], whole)


@given(weights=weights_of(2), seed=st.integers(0, 2**32), place=st.integers(0, 2))
@few_blocks
def test_a_source_without_weight_changes_nothing(weights: list[float], seed: int, place: int):
    names = ["b", "d"]
    alone, beside = Mixture(names, seed), Mixture(sorted([*names, "ace"[place]]), seed)
    for mixture in (alone, beside):
        mixture.push(0, quotas_of(dict(zip(names, weights)), mixture.sources))
        mixture.push(777, quotas_of(dict(zip(names, reversed(weights))), mixture.sources))
    positions = np.arange(3_000)
    (one, one_draws), (other, other_draws) = alone.resolve(positions), beside.resolve(positions)
    assert [alone.sources[i] for i in one.tolist()] == [beside.sources[i] for i in other.tolist()]
    assert np.array_equal(one_draws, other_draws)


def test_a_new_segment_leaves_what_lies_before_it_alone():
    mixture = Mixture(["a", "b"], seed=1)
    mixture.push(0, quotas([0.7, 0.3]))
    before = np.stack(mixture.resolve(np.arange(2_000)))
    mixture.push(1_000, quotas([0.1, 0.9]))
    after = np.stack(mixture.resolve(np.arange(2_000)))
    assert np.array_equal(before[:, :1_000], after[:, :1_000])
    assert not np.array_equal(before[:, 1_000:], after[:, 1_000:])
    mixture.push(1_000, quotas([0.7, 0.3]))  # in its place
    mixture.push(1_500, quotas([0.7, 0.3]))  # the same again
    assert mixture.starts == [0, 1_000]


def test_seeds_blocks_and_segments_are_shuffled_differently():
    mixture = Mixture(["a", "b"], seed=1)
    mixture.push(0, quotas([0.5, 0.5]))
    mixture.push(3 * BLOCK, quotas([0.25, 0.75]))
    mixture.push(3 * BLOCK + 1, quotas([0.5, 0.5]))
    other = Mixture(["a", "b"], seed=2)
    other.push(0, quotas([0.5, 0.5]))
    starts = [0, BLOCK, 3 * BLOCK + 1]
    drawn = [tuple(mixture.resolve(np.arange(first, first + 200))[0].tolist()) for first in starts]
    drawn.append(tuple(other.resolve(np.arange(200))[0].tolist()))
    assert len(set(drawn)) == 4


def test_one_source_alone_is_drawn_from_in_order_however_far_away():
    mixture = Mixture(["a", "b"], seed=1)
    mixture.push(0, quotas([0.0, 1.0]))
    positions = np.array([0, 1, BLOCK, 10**13])
    sources, draws = mixture.resolve(positions)
    assert sources.tolist() == [1, 1, 1, 1]
    assert draws.tolist() == positions.tolist()
    assert mixture.drawn_before(10**13).tolist() == [0, 10**13]
    assert mixture.positions_of(1, positions).tolist() == positions.tolist()


def test_before_anything_is_drawn_nobody_has_drawn():
    assert Mixture(["a", "b"], seed=1).drawn_before(0).tolist() == [0, 0]


def test_a_schedule_is_read():
    assert parse_schedule([]) == []
    assert parse_schedule(["web=0.7 code=0.3", "20e9: web=0.4, code=0.6"]) == [
        WeightsFrom(0, {"web": 0.7, "code": 0.3}),
        WeightsFrom(20_000_000_000, {"web": 0.4, "code": 0.6}),
    ]
    assert parse_max_epochs(["4", "web=1"]) == {"": 4, "web": 1}
    assert parse_max_epochs([]) == {}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["web"], "'web' in mixture 'web': expected source=weight"),
        (["web=x"], "'web=x' in mixture"),
        (["=1"], "'=1' in mixture"),
        (["web=-1"], "weights >= 0"),
        (["web=nan"], "'web=nan'"),
        (["web=inf"], "'web=inf'"),
        (["web=1 web=2"], "each source once"),
        (["web=0 code=0"], "no source has a weight above 0"),
        ([""], "no source has a weight above 0"),
        (["1e9: web=1"], r"begins at \[1000000000\] tokens; the first entry must have no token count"),
        (["web=1", "2e9: web=1", "1e9: web=1"], "a larger count than the one before"),
        (["web=1", "web=2"], "a larger count than the one before"),
        (["web=1", "soon: web=2"], "'soon' is no number of tokens"),
        (["web=1", "-5: web=2"], "'-5' is no number of tokens"),
        (["web=1", "1.5: web=2"], "'1.5' is no number of tokens"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(entries: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_schedule(entries)


@pytest.mark.parametrize("entries", [["0"], ["x"], ["web="], ["web=1.5"], ["web=-1"], ["web=1", "web=2"], ["2", "3"]])
def test_limits_of_epochs_that_make_no_sense_are_refused(entries: list[str]):
    with pytest.raises(ConfigError, match="data.max_epochs"):
        parse_max_epochs(entries)


def test_weights_are_read_from_a_command_line():
    assert parse_weights("a=1 b=0,c=2e-3") == {"a": 1.0, "b": 0.0, "c": 0.002}


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=12), st.data())
def test_sources_without_a_weight_change_no_quota_of_the_others(values: list[float], data: st.DataObject):
    weights = {f"s{i:02}": value for i, value in enumerate(values)}
    before = dict(zip(weights, quotas_of(weights, list(weights)).tolist(), strict=True))
    more = data.draw(st.lists(st.sampled_from([f"s{i:02}x" for i in range(12)]), unique=True))
    names = sorted([*weights, *more])
    after = dict(zip(names, quotas_of(weights, names).tolist(), strict=True))
    assert after == {name: before.get(name, 0) for name in names}


def test_a_source_that_joins_among_many_leaves_the_past_as_it_was():
    weights = "b=.2 c=.1 d=.12 e=.02 f=.15 g=.01 h=.12"
    files = {name: [f"{i:032x}-{i:032x}-{4096 + 2 * 8_001}"] for i, name in enumerate("bcdefgh")}
    common = {"seed": 1, "sequence_length": 8, "batch_sequences": 100, "tokenizer_digest": "t", "eos_id": 0}
    state = start(files, mixture=[weights], **common).advance(100_000, 800_000)
    past = np.arange(100_000)
    before = Order(state)
    grown = append(state, {"a": [f"{99:032x}-{99:032x}-{4096 + 2 * 8_001}"]}, {**parse_weights(weights), "a": 0.1})
    after = Order(grown)
    files_before, samples_before = before.resolve(past)
    files_after, samples_after = after.resolve(past)
    assert [before.file_ids[f] for f in files_before] == [after.file_ids[f] for f in files_after]
    assert np.array_equal(samples_before, samples_after)


def test_a_source_that_joins_keeps_its_share_under_the_weights_that_are_planned_for_later():
    files = {name: [f"{i:032x}-{i:032x}-{4096 + 2 * 8_001}"] for i, name in enumerate(["web", "code"])}
    common = {"seed": 1, "sequence_length": 8, "batch_sequences": 100, "tokenizer_digest": "t", "eos_id": 0}
    state = start(files, mixture=["web=0.7 code=0.3", "80e3: web=0.4 code=0.6"], **common).advance(100, 800)
    grown = append(
        state, {"math": ["a" * 32 + "-" + "b" * 32 + f"-{4096 + 2 * 8_001}"]}, {"web": 5, "code": 3, "math": 2}
    )
    order = Order(grown)
    order.extend(20_000)
    assert order.shares_at(101)["math"] == pytest.approx(0.2, abs=1e-4)
    later = order.shares_at(15_000)
    assert [later[name] for name in ("web", "code", "math")] == pytest.approx([0.32, 0.48, 0.2], abs=1e-4)

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume.chain import Chain, ChainFile, Fate, hashed_key

counts_of_files = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def files_of(counts: Sequence[int], first: int = 0) -> list[ChainFile]:
    return [ChainFile(f"{i:04}", count) for i, count in enumerate(counts, first)]


def chain_of(counts: Sequence[int], *, seed: int = 1, source: str = "web", max_epochs: int | None = None) -> Chain:
    chain = Chain(source, seed, max_epochs)
    chain.append(files_of(counts))
    return chain


def drawn(chain: Chain, first: int, last: int) -> list[tuple[str, int]]:
    files, groups = chain.resolve(np.arange(first, last))
    return [(chain.files[i].file_id, group) for i, group in zip(files.tolist(), groups.tolist())]


def all_of(counts: Sequence[int], first: int = 0) -> list[tuple[str, int]]:
    return [(file.file_id, group) for file in files_of(counts, first) for group in range(file.num_groups)]


@given(counts=counts_of_files, seed=st.integers(0, 2**32), epoch=st.integers(0, 3))
def test_every_epoch_draws_every_group_once(counts: list[int], seed: int, epoch: int):
    chain = chain_of(counts, seed=seed)
    n = sum(counts)
    chain.advance((epoch + 1) * n)
    assert sorted(drawn(chain, epoch * n, (epoch + 1) * n)) == all_of(counts)
    assert (chain.epoch, chain.num_unseen, chain.num_live) == (epoch, 0, n)


def test_epochs_seeds_and_sources_are_shuffled_differently():
    orders = [chain_of([500]), chain_of([500], seed=2), chain_of([500], source="code")]
    for chain in orders:
        chain.advance(1_000)
    seen = [tuple(drawn(chain, 0, 500)) for chain in orders] + [tuple(drawn(orders[0], 500, 1_000))]
    assert len(set(seen)) == 4


@given(counts=counts_of_files, new=counts_of_files, data=st.data())
def test_appended_files_join_what_is_unseen_of_the_epoch(counts: list[int], new: list[int], data: st.DataObject):
    chain = chain_of(counts)
    passed = data.draw(st.integers(0, sum(counts)))
    chain.advance(passed)
    before = drawn(chain, 0, passed)
    chain.append(files_of(new, len(counts)))
    last = sum(counts) + sum(new)
    chain.advance(last - passed)
    assert drawn(chain, 0, passed) == before
    assert sorted(drawn(chain, 0, last)) == all_of(counts + new)
    assert chain.epoch == 0


@given(data=st.data())
def test_files_appended_one_by_one_in_any_order_are_one_append(data: st.DataObject):
    new = data.draw(st.permutations(files_of([3, 5, 8, 2], first=2)))
    removed = data.draw(st.sampled_from([None, "0000", "0003"]))
    parts = data.draw(st.integers(1, 3))
    at_once, one_by_one = chain_of([20, 30]), chain_of([20, 30])
    for chain in (at_once, one_by_one):
        chain.advance(17)
    at_once.append(sorted(new, key=lambda file: file.file_id))
    if removed:
        at_once.remove([removed])
    for i in range(parts):
        one_by_one.append(new[i::parts])
        if removed and removed in {file.file_id for file in one_by_one.files} - {
            one_by_one.files[j].file_id for j in one_by_one.removed
        }:
            one_by_one.remove([removed])
    for chain in (at_once, one_by_one):
        chain.advance(80)
    assert drawn(at_once, 0, 97) == drawn(one_by_one, 0, 97)
    assert len(at_once.generations) == len(one_by_one.generations)


def test_new_files_mix_evenly_with_the_unseen():
    chain = chain_of([40_000])
    chain.advance(20_000)
    chain.append(files_of([5_000], first=1))
    chain.advance(25_000)
    is_new = np.array([file == "0001" for file, _ in drawn(chain, 20_000, 45_000)])
    share = is_new.reshape(25, 1_000).mean(axis=1)
    assert abs(share - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / 1_000)


def test_skipped_groups_return_when_the_others_are_exhausted():
    chain = chain_of([6, 4])
    chain.advance(2)
    chain.advance(3, Fate.SKIPPED)
    assert chain.num_unseen == 8
    chain.advance(8)
    assert sorted(drawn(chain, 0, 2) + drawn(chain, 5, 13)) == all_of([6, 4])
    assert sorted(drawn(chain, 10, 13)) == sorted(drawn(chain, 2, 5))
    assert chain.epoch == 0


def test_skipped_groups_can_be_skipped_again_and_for_ever():
    chain = chain_of([5], max_epochs=1)
    assert chain.remaining(Fate.SKIPPED) is None
    chain.advance(5_001, Fate.SKIPPED)
    assert (chain.epoch, chain.num_unseen, chain.remaining()) == (0, 5, 5)
    chain.advance(5)
    assert sorted(drawn(chain, 5_001, 5_006)) == all_of([5])


@pytest.mark.parametrize("event", ["append", "remove", "requeue"])
def test_skipped_groups_return_with_the_next_pool(event: str):
    chain = chain_of([200, 1])
    chain.advance(20, Fate.SKIPPED)
    skipped = set(drawn(chain, 0, 20))
    if event == "append":
        chain.append(files_of([10], first=2))
    elif event == "remove":
        chain.remove(["0001"])
    else:
        chain.requeue()
    rest = chain.generations[-1].n
    chain.advance(rest)
    places = [i for i, group in enumerate(drawn(chain, 20, 20 + rest)) if group in skipped]
    assert len(places) == len(skipped - {("0001", 0)} if event == "remove" else skipped)
    assert min(places) < rest - 20  # among the others, not behind them


def test_a_requeue_of_nothing_changes_nothing():
    chain, other = chain_of([50]), chain_of([50])
    for one in (chain, other):
        one.advance(10)
    chain.requeue()
    for one in (chain, other):
        one.advance(90)
    assert drawn(chain, 0, 100) == drawn(other, 0, 100)


def test_groups_skipped_for_good_never_come_back():
    chain = chain_of([6, 4])
    chain.advance(3)
    chain.advance(3, Fate.DROPPED)
    gone = set(drawn(chain, 3, 6))
    assert (chain.num_live, chain.num_unseen) == (7, 4)
    chain.advance(4 + 7 + 7)
    for first, last in ((10, 17), (17, 24)):
        assert sorted(drawn(chain, first, last)) == sorted(set(all_of([6, 4])) - gone)


def test_each_group_can_be_given_up_once():
    chain = chain_of([6, 4], max_epochs=5)
    chain.advance(3)
    assert chain.remaining() == 47
    assert chain.remaining(Fate.DROPPED) == 10
    chain.advance(10, Fate.DROPPED)
    assert (chain.num_live, chain.remaining(), chain.remaining(Fate.SKIPPED), chain.epoch) == (0, 0, 0, 1)
    assert chain_of([6, 4], max_epochs=1).remaining(Fate.DROPPED) == 10
    unlimited = chain_of([6, 4])
    assert unlimited.remaining() is None
    unlimited.advance(10, Fate.DROPPED)
    assert unlimited.remaining() == 0


def test_a_removed_file_is_drawn_from_no_more():
    chain = chain_of([60, 40, 20])
    chain.advance(30)
    seen = set(drawn(chain, 0, 30))
    chain.remove(["0001"])
    left = {group for group in all_of([60, 40, 20]) if group[0] != "0001"} - seen
    assert (chain.num_unseen, chain.num_live) == (len(left), 80)
    chain.advance(len(left) + 80)
    assert sorted(drawn(chain, 30, 30 + len(left))) == sorted(left)
    assert {file for file, _ in drawn(chain, 30 + len(left), 110 + len(left))} == {"0000", "0002"}


def test_a_file_that_is_removed_at_once_was_never_there():
    chain, other = chain_of([30]), chain_of([30])
    for one in (chain, other):
        one.advance(10)
    chain.append(files_of([5, 7], first=1))
    chain.remove(["0001"])
    other.append(files_of([7], first=2))
    for one in (chain, other):
        one.advance(27)
    assert sorted(drawn(chain, 0, 37)) == sorted(drawn(other, 0, 37))


@given(counts=counts_of_files, data=st.data())
def test_every_draw_is_found_again_through_any_history(counts: list[int], data: st.DataObject):
    chain, num_files = chain_of(counts), len(counts)
    for event in data.draw(
        st.lists(st.sampled_from(["append", "remove", "requeue", "pass", "pass", "skip", "drop"]), max_size=8)
    ):
        live = [file.file_id for i, file in enumerate(chain.files) if i not in chain.removed]
        if event == "append":
            chain.append(files_of(data.draw(counts_of_files), first=num_files))
            num_files = len(chain.files)
        elif event == "remove" and len(live) > 1:
            chain.remove([data.draw(st.sampled_from(live))])
        elif event == "requeue":
            chain.requeue()
        elif event in ("pass", "skip", "drop") and chain.num_unseen > 1:
            mark = {"pass": Fate.DRAWN, "skip": Fate.SKIPPED, "drop": Fate.DROPPED}[event]
            chain.advance(data.draw(st.integers(1, chain.num_unseen - 1)), mark)
    chain.advance(max(0, chain.num_unseen - 1))
    last = chain.drawn
    for index, file in enumerate(chain.files):
        fates, draws = chain.locate(index, np.arange(file.num_groups), epoch=0)
        passed = [(draw, group) for group, draw in enumerate(draws.tolist()) if 0 <= draw < last]
        assert [drawn(chain, draw, draw + 1) for draw, _ in passed] == [[(file.file_id, group)] for _, group in passed]
        assert np.all(draws[fates == Fate.REMOVED] == -1)
        assert set(chain.locate(index, np.arange(file.num_groups), epoch=7)[0].tolist()) == {Fate.ABSENT}


def test_a_chain_of_nothing_has_nothing_to_give():
    chain = Chain("web", 1, None)
    assert (chain.drawn, chain.epoch, chain.num_live, chain.num_unseen, chain.remaining()) == (0, 0, 0, 0, 0)
    chain.append(files_of([5, 3]))
    chain.advance(2)
    chain.remove(["0000", "0001"])
    assert (chain.remaining(), chain.remaining(Fate.SKIPPED), chain.remaining(Fate.DROPPED)) == (0, 0, 0)
    fates, draws = chain.locate(0, np.arange(5), epoch=0)
    assert set(fates.tolist()) <= {Fate.DRAWN, Fate.REMOVED}
    assert np.count_nonzero(draws >= 0) == sum(file == "0000" for file, _ in drawn(chain, 0, 2))
    chain.append(files_of([4], first=2))
    chain.advance(4)
    assert sorted(drawn(chain, 2, 6)) == all_of([4], first=2)


def test_a_thousand_billion_groups_cost_no_more_than_ten():
    chain = chain_of([10**11] * 10)
    chain.advance(7 * 10**11)
    chain.append(files_of([10**11], first=10))
    chain.advance(10**11)
    draws = np.array([0, 1, 3 * 10**11, 7 * 10**11 - 1, 7 * 10**11, 8 * 10**11 - 1])
    files, groups = chain.resolve(draws)
    for draw, file, group in zip(draws.tolist(), files.tolist(), groups.tolist()):
        fates, found = chain.locate(file, np.array([group]), epoch=0)
        assert (fates.tolist(), found.tolist()) == ([Fate.DRAWN], [draw])
    assert len(chain.generations) == 2


def test_keys_of_different_fields_differ():
    keys = [hashed_key("a", "bc"), hashed_key("ab", "c"), hashed_key("abc"), hashed_key("a", "bc", ""), hashed_key()]
    assert len(set(keys)) == 5
    assert all(0 <= key < 2**64 for key in keys)

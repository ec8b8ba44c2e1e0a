import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shards import HEADER_BYTES
from resume import rng, state
from resume.manifest import DataError
from resume.state import Append, Batch, DataState, Reweight


def file_of(number: int, num_targets: int = 800, token_bytes: int = 2) -> str:
    digest = random.Random(number).randbytes(32).hex()
    return f"{digest[:32]}-{digest[32:]}-{HEADER_BYTES + token_bytes * (num_targets + 1)}"


A, B, C, NEW = (file_of(i) for i in range(4))


def begun(files: dict[str, list[str]] | None = None, **options: Any) -> DataState:
    """A run in batches of four samples of eight targets."""
    common = {"seed": 1, "sequence_length": 8, "batch_sequences": 4, "tokenizer_digest": "abc", "eos_id": 0}
    return state.start(files or {"web": [A, B], "code": [C]}, **{**common, **options})


def mixed(**options: Any) -> DataState:
    return begun(**{"mixture": ["web=0.7 code=0.3"], **options})


def stepped(moved: DataState, num_steps: int) -> DataState:
    for _ in range(num_steps):
        num_samples = moved.batch.batch_sequences
        moved = moved.advance(num_samples, num_samples * moved.sequence_length)
    return moved


def test_a_state_survives_json():
    moved = mixed(max_epochs={"web": 2, "": 4}, group_tokens=16, window_groups=2)
    moved = state.append(stepped(moved, 2), {"web": [NEW]})
    moved = state.reweight(state.requeue(state.skip(moved, 1)), {"web": 1.0, "code": 0.0}, from_tokens=10_000)
    moved = state.remove(state.set_batch(moved, 8, 4), [A])
    moved = stepped(dataclasses.replace(moved, requests_taken=3), 1)
    moved = state.cut(moved, moved.position + 1)
    assert len({type(event) for event in moved.events}) == 7
    assert state.from_json(json.loads(json.dumps(moved.to_json()))) == moved


def test_the_state_of_a_trillion_tokens_is_small():
    fresh = begun({"web": [file_of(i, 420_000_000) for i in range(2_440)]})
    size = len(json.dumps(fresh.to_json()))
    assert size < 250_000
    moved = fresh
    for _ in range(100):
        moved = state.requeue(state.skip(stepped(moved, 1), 1))
    num_events = len(moved.events) - len(fresh.events)
    assert (num_events, (len(json.dumps(moved.to_json())) - size) / num_events < 100) == (200, True)
    mixture = stepped(mixed(), 1)
    reweighted = state.reweight(mixture, {"web": 0.7, "code": 0.3})
    assert len(json.dumps(reweighted.to_json())) - len(json.dumps(mixture.to_json())) < 100


def test_other_schemas_and_damaged_states_are_refused():
    record = begun().to_json()
    with pytest.raises(DataError, match="schema 1, permutation 'gfeistel8/24-v1'; this version continues schema 2"):
        state.from_json({**record, "schema": 1})
    with pytest.raises(DataError, match="permutation 'other'"):
        state.from_json({**record, "permutation": "other"})
    with pytest.raises(DataError, match="schema None"):
        state.from_json({})
    for damaged in (
        {name: value for name, value in record.items() if name != "seed"},
        {name: value for name, value in record.items() if name != "events"},
        {**record, "unheard_of": 1},
        {**record, "events": [{"kind": "unheard of"}]},
        {**record, "events": [{"at": 0, "step": 0}]},
        {**record, "events": [{"kind": "requeue", "at": 0}]},
        {**record, "events": [{"kind": "requeue", "at": 0, "step": 0, "unheard_of": 1}]},
    ):
        with pytest.raises(DataError, match="missing or unknown field"):
            state.from_json(damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_digest": "other"}, "tokenizer_digest is other, the checkpoint was trained with abc"),
        ({"eos_id": 5}, "eos_id is 5, the checkpoint was trained with 0"),
    ],
)
def test_data_of_another_tokenizer_is_refused(changes: dict, message: str):
    state.refuse_other_data(begun(), tokenizer_digest="abc", eos_id=0)
    with pytest.raises(DataError, match=message):
        state.refuse_other_data(begun(), **{"tokenizer_digest": "abc", "eos_id": 0, **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture": ["web=1"]}, "the mixture names web, the data's sources are code, web; give each source a weight"),
        ({"mixture": ["web=1 code=1 x=1"]}, "the mixture names code, web, x"),
        ({"mixture": ["web=1 code=1", "1e6: web=1"]}, 'as in "code=0 web=1"'),
        ({"max_epochs": {"x": 1}, "mixture": ["web=1 code=1"]}, "data.max_epochs names x; .* sources are code, web"),
        ({"group_tokens": 12}, "data.sequence_length = 8 does not divide the groups of 12 tokens"),
        ({"group_tokens": 48}, "data.batch_sequences = 4 samples of 8 are not whole groups of 48.* a multiple of 6"),
    ],
)
def test_a_run_that_cannot_be_is_not_begun(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        begun(**options)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name in ("group_tokens", "window_groups", "token_bytes") for value in (0, -1, "8", None)),
        *({name: value} for name in ("position", "step", "tokens_seen", "requests_taken") for value in (-1, "1", 1.5)),
        {"position": 10**15},
        {"seed": "x"},
        {"events": []},
        {"events": [{"kind": "batch", "at": 0, "step": 0, "batch_sequences": 0, "sequence_length": 8}]},
        {"events": [{"kind": "batch", "at": -1, "step": 0, "batch_sequences": 4, "sequence_length": 8}]},
        *(
            {"files": {"all": [name]}}
            for name in ("x", 5, A + "0" * 20, A.rsplit("-", 1)[0] + "-4097", A.rsplit("-", 1)[0] + "-0012", "../" + A)
        ),
    ],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused_and_does_not_end_in_a_bug(change: dict[str, Any]):
    """Its hash may be right: a checkpoint may come from somebody else."""
    table = json.loads(json.dumps(stepped(begun(), 3).to_json()))
    if "files" in change:
        table["events"][-1] |= change
    else:
        table |= change
    with pytest.raises(DataError, match="data state .*; the record is damaged"):
        state.from_json(table)


def test_a_state_that_is_no_table_is_refused():
    for table in (None, [], "x", 5):
        with pytest.raises(DataError, match="data state that is no table; the record is damaged"):
            state.from_json(table)  # pyright: ignore[reportArgumentType]


def test_without_a_mixture_all_files_are_one_source():
    assert begun().sources == {"all": sorted([A, B, C])}
    assert mixed().sources == {"code": [C], "web": sorted([A, B])}
    assert (begun().has_mixture, mixed().has_mixture) == (False, True)


def test_the_cursor_counts_groups_and_the_tokens_trained():
    moved = begun(group_tokens=16).advance(4, 32).advance(4, 27)
    assert (moved.position, moved.step, moved.tokens_seen) == (4, 2, 59)
    assert (moved.first_sample, moved.samples_per_group, moved.sequence_length) == (8, 2, 8)
    with pytest.raises(AssertionError, match="whole groups"):
        moved.advance(3, 24)


@pytest.mark.parametrize(("num_targets", "expected"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
@pytest.mark.parametrize("token_bytes", [2, 4])
def test_the_groups_of_a_file_follow_from_its_identity(num_targets: int, expected: int, token_bytes: int):
    fresh = begun(group_tokens=16, token_bytes=token_bytes)
    assert fresh.num_groups(file_of(9, num_targets, token_bytes)) == expected


def test_an_append_holds_from_the_next_window_on():
    moved = stepped(begun(window_groups=3), 1)
    event = state.append(moved, {"web": [NEW]}).events[-1]
    assert (event.at, event.step) == (6, 1)
    assert isinstance(event, Append)
    assert event.files == {"all": [NEW]}


def test_appends_at_one_position_are_one_event_however_they_are_made():
    moved = stepped(mixed(), 1)
    d, e = file_of(10), file_of(11)
    at_once = state.append(moved, {"web": [NEW, d], "code": [e]})
    for first, second in (({"web": [d]}, {"code": [e], "web": [NEW]}), ({"code": [e]}, {"web": [d, NEW]})):
        assert state.append(state.append(moved, first), second) == at_once
    assert len(at_once.events) == len(moved.events) + 1
    assert len(state.append(stepped(at_once, 1), {"web": [file_of(12)]}).events) == len(moved.events) + 2


def test_what_cannot_be_appended_is_refused():
    moved = state.remove(stepped(mixed(), 1), [B])
    for files, message in (
        ({}, "there is no file to append"),
        ({"web": []}, "there is no file to append"),
        ({"web": [NEW, A]}, rf"file {A} is part of the run already \(source web\)"),
        ({"code": [A]}, "part of the run already"),
        ({"web": [B]}, "was removed from the run; a removed file cannot come back"),
        ({"web": [NEW, NEW]}, "is given twice"),
        ({"web": [NEW], "code": [NEW]}, "is given twice"),
        ({"new": [NEW]}, 'new: no weight in the mixture of code, web; .* --weights "code=0.5 new=0.5 web=0.5"'),
    ):
        with pytest.raises(DataError, match=message):
            state.append(moved, files)
    with pytest.raises(DataError, match="the mixture names new, web, the data's sources are code, new, web"):
        state.append(moved, {"new": [NEW]}, {"web": 1, "new": 1})
    with pytest.raises(DataError, match="it has no mixture to change"):
        state.append(begun(), {"web": [NEW]}, {"web": 1})


def test_a_new_source_brings_its_weight():
    grown = state.append(stepped(mixed(), 1), {"new": [NEW]}, {"web": 0.5, "code": 0.3, "new": 0.2})
    assert grown.sources["new"] == [NEW]
    newest = grown.events[-1]
    assert isinstance(newest, Reweight)
    assert (newest.at, newest.weights) == (4, {"web": 0.5, "code": 0.3, "new": 0.2})


def test_what_cannot_be_removed_is_refused():
    moved = state.remove(begun(), [A])
    assert moved.removed == {A}
    with pytest.raises(DataError, match=f"file {A} is removed already"):
        state.remove(moved, [B, A])
    with pytest.raises(DataError, match="is not part of the run"):
        state.remove(moved, [NEW])


def test_whole_windows_are_skipped_from_their_boundary():
    skipped = state.skip(stepped(begun(), 2), 3)
    assert (skipped.position, skipped.step, skipped.num_skipped, skipped.tokens_seen) == (20, 2, 12, 64)
    windowed = begun(group_tokens=16, window_groups=4)
    assert state.skip(stepped(windowed, 2), 2).position == 8
    for moved, num_steps in ((windowed, 1), (stepped(windowed, 1), 2), (stepped(windowed, 1), 1), (windowed, 0)):
        with pytest.raises(DataError, match="whole windows of 8 samples can be skipped, from the boundary of one"):
            state.skip(moved, num_steps)


def test_weights_hold_from_now_or_from_a_window_that_is_to_come():
    moved = stepped(mixed(window_groups=3), 1)
    weights = {"web": 1.0, "code": 0.0}
    found = [state.reweight(moved, weights, tokens).events for tokens in (None, 48, 49, 72, 73)]
    assert [max(e.at for e in events if isinstance(e, Reweight)) for events in found] == [6, 6, 9, 9, 12]
    with pytest.raises(DataError, match="weights from 40 tokens on: the run is at 48 already"):
        state.reweight(moved, weights, 40)
    with pytest.raises(DataError, match='give each source a weight .* as in "code=0 web=1"'):
        state.reweight(moved, {"web": 1.0})
    with pytest.raises(DataError, match="start it with data.mixture"):
        state.reweight(begun(), weights)


def test_the_batch_may_change_at_any_step_and_its_last_word_counts():
    moved = stepped(begun(), 3)
    changed = state.set_batch(state.set_batch(moved, 2, 8), 6, 8)
    assert [(e.at, e.batch_sequences) for e in changed.events if isinstance(e, Batch)] == [(0, 4), (12, 6)]
    assert stepped(changed, 1).position == 18
    with pytest.raises(DataError, match="data.sequence_length = 16 does not divide the groups of 8 tokens"):
        state.set_batch(moved, 2, 16)


def test_a_change_of_length_keeps_the_cursor():
    moved = stepped(begun(group_tokens=16), 3)
    changed = state.set_batch(moved, 2, 16)
    assert (moved.position, moved.first_sample) == (changed.position, 12)
    assert (changed.first_sample, changed.samples_per_group) == (6, 1)


def test_a_window_is_closed_where_the_data_ended():
    moved = stepped(begun(window_groups=3), 1)
    assert moved.next_boundary == 6
    closed = state.cut(moved, 5)
    assert closed.next_boundary == 5
    assert stepped(closed.advance(1, 8), 1).next_boundary == 11


def test_what_a_step_draws_depends_on_seed_and_step_alone():
    def draws(seed: int, step: int) -> tuple:
        rng.seed_step(seed, step)
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()

    assert draws(1, 7) == draws(1, 7)
    assert len({str(draws(seed, step)) for seed in (1, 2) for step in (0, 1, 2)}) == 6

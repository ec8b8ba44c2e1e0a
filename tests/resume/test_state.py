import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.manifest import read_manifest
from resume import rng, state
from resume.manifest import DataError, open_split
from resume.order import Order
from tests.prepared import write_data


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> state.DataState:
    folder: Path = write_data(tmp_path_factory.mktemp("data") / "data")
    order = Order(open_split(folder, read_manifest(folder), "train"), seed=1, sequence_length=32)
    return state.start(order, tokenizer_digest="abc", eos_id=0)


def test_a_state_survives_json(fresh: state.DataState):
    moved = fresh.advance(12, 380).advance(12, 384)
    assert (moved.position, moved.tokens_seen) == (24, 764)
    assert state.from_json(json.loads(json.dumps(moved.to_json()))) == moved


def test_a_state_is_small(fresh: state.DataState):
    assert len(json.dumps(fresh.to_json())) < 400 + 90 * len(fresh.file_ids)


def test_other_schemas_and_damaged_states_are_refused(fresh: state.DataState):
    with pytest.raises(DataError, match="schema 2"):
        state.from_json({**fresh.to_json(), "schema": 2})
    with pytest.raises(DataError, match="permutation 'other'"):
        state.from_json({**fresh.to_json(), "permutation": "other"})
    damaged = fresh.to_json()
    del damaged["position"]
    with pytest.raises(DataError, match="lacks position"):
        state.from_json(damaged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_ids": ("x",)}, r"shards are gone, 1 are new"),
        ({"tokenizer_digest": "other"}, "tokenizer_digest is other, the checkpoint was trained with abc"),
        ({"seed": 2}, "seed is 2"),
        ({"sequence_length": 64}, "sequence_length is 64"),
        ({"eos_id": 5}, "eos_id is 5"),
    ],
)
def test_data_that_would_not_continue_the_order_is_refused(fresh: state.DataState, changes: dict, message: str):
    with pytest.raises(DataError, match=message):
        state.refuse_other_data(fresh, dataclasses.replace(fresh, **changes))


def test_the_same_data_elsewhere_is_accepted(fresh: state.DataState):
    moved = fresh.advance(5, 5)
    state.refuse_other_data(moved, fresh)
    assert moved != fresh  # the cursor may differ, nothing else


def test_what_a_step_draws_depends_on_seed_and_step_alone():
    def draws(seed: int, step: int) -> tuple:
        rng.seed_step(seed, step)
        return random.random(), float(np.random.rand()), torch.rand(3).tolist()

    assert draws(1, 7) == draws(1, 7)
    assert len({str(draws(seed, step)) for seed in (1, 2) for step in (0, 1, 2)}) == 6

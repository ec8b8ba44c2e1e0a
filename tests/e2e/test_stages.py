"""Runs in stages, and branches, as real processes that are killed at and between the boundaries of stages."""

import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.report import read_metrics
from resume import checkpoint
from tests.lives import finished, lived
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from tests.trained import resume, trained
from train import exits
from train.config import RunConfig, StageSection
from train.resolve import resolved

STEP = 384
"""Tokens per step."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sources, code and web."""
    folder = tmp_path_factory.mktemp("sources")
    code = write_data(folder / "code", texts=texts_about("code", 50), source="code")
    return code, write_data(folder / "web", texts=texts_about("web", 80), source="web")


def staged(sources: tuple[Path, Path], folder: Path, /, stages: Sequence[StageSection], **run: Any) -> RunConfig:
    """A run that trains the same bits on any number of ranks, and writes down what it trains."""
    life = {"num_steps": RunConfig().run.num_steps, "hang_timeout_s": 20.0, "async_save": False, **run}
    data = {"paths": tuple(map(str, sources)), "record_samples": True}
    guard = {"window_steps": 2, "sigma": 1.0}  # it remembers little, and finds much
    config = tiny_run(sources[0], folder, run=life, data=data, parallel={"precision": "exact"}, guard=guard)
    return resolved(dataclasses.replace(config, stage=tuple(stages)))


THREE = (
    StageSection(tokens=2 * STEP, mixture="code=0.5 web=0.5", lr=1e-2),
    StageSection(tokens=3 * STEP, mixture="code=0.1 web=0.9", sequence_length=64, lr_end=1e-3),
    StageSection(tokens=2 * STEP, mixture="code=1 web=0", sequence_length=16, lr_end=0.0, schedule="cosine"),
)
"""Two steps, three, and two."""
ANNEAL = (StageSection(tokens=2 * STEP, mixture="code=1 web=1"), StageSection(tokens=2 * STEP, lr_end=0.0))


@pytest.fixture(scope="module")
def uninterrupted(sources: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    finished(staged(sources, run, THREE, save_every=1))
    return run


def killed_before(config: RunConfig, deaths: Sequence[tuple[int, int, int]]) -> None:
    """Lives of so many ranks, one of which is killed before a step, counted from 1; then one that comes to its end."""
    for num_ranks, rank, step in deaths:
        debug = dataclasses.replace(config.debug, inject=(f"kill:rank={rank},step={step}",))
        life = lived(dataclasses.replace(config, debug=debug), num_ranks)
        assert life.codes[rank] == -signal.SIGKILL, life.out() + life.err(rank)
        assert {code for code in life.codes if code != -signal.SIGKILL} <= {exits.LOST_RANK}
    finished(config, deaths[-1][0])


def same_ends(a: Path, b: Path) -> None:
    """The same bits of weights and moments, the same data state, samples and losses, and books that agree."""
    (one, other) = (checkpoint.open_checkpoint(newest) for newest in map(checkpoint.latest, (a, b)) if newest)
    assert one.record["data"] == other.record["data"]
    assert one.record["guard"]["losses"] == other.record["guard"]["losses"]
    tensors, others = one.read_tensors(""), other.read_tensors("")
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert trained(a) == trained(b)
    kept = ("step", "stage", "loss", "learning_rate")
    logged = [[[r[key] for key in kept] for r in read_metrics(run) if "learning_rate" in r] for run in (a, b)]
    assert logged[0] == logged[1]
    code, output = resume("audit", a)
    assert code == 0, output


@pytest.mark.parametrize(
    ("save_every", "deaths"),
    [
        (1, [(1, 0, 3), (1, 0, 4), (1, 0, 6)]),
        (3, [(1, 0, 3), (1, 0, 6), (1, 0, 7)]),
        (1, [(2, 1, 3), (2, 0, 5), (2, 1, 6)]),
        (2, [(2, 0, 4), (1, 0, 6), (2, 1, 7)]),
    ],
    ids=[
        "one process at boundaries",
        "one process between them",
        "two ranks at boundaries",
        "other ranks between them",
    ],
)
def test_a_run_killed_at_any_place_of_its_stages_ends_like_one_that_was_not(
    sources: tuple[Path, Path], uninterrupted: Path, tmp_path: Path, save_every: int, deaths: list[tuple[int, int, int]]
):
    run = tmp_path / "run"
    killed_before(staged(sources, run, THREE, save_every=save_every), deaths)
    same_ends(run, uninterrupted)
    assert {s.length for s in trained(run)[3]} == {64}


def test_a_branch_killed_before_and_after_its_first_checkpoint_ends_like_one_that_was_not(
    sources: tuple[Path, Path], uninterrupted: Path, tmp_path: Path
):
    base = {"branch_from": str(uninterrupted / "step-4"), "save_every": 3}
    finished(staged(sources, tmp_path / "whole", ANNEAL, **base))
    killed = staged(sources, tmp_path / "killed", ANNEAL, **base, max_failed_saves=9)
    # Its first save fails, so that it branches off anew.
    full = dataclasses.replace(killed.debug, inject=("disk-full:rank=0,step=4", "kill:rank=0,step=5"))
    assert lived(dataclasses.replace(killed, debug=full)).codes == [-signal.SIGKILL]
    assert checkpoint.steps(tmp_path / "killed") == []
    killed_before(killed, [(2, 0, 6), (1, 0, 7), (2, 1, 8)])
    assert checkpoint.steps(tmp_path / "killed")[-1] == 8
    same_ends(tmp_path / "killed", tmp_path / "whole")

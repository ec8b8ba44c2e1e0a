"""Stages of a run and branches of another's: what they are by arithmetic, and what is trained."""

import collections
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config_file import ConfigError, load, parse, to_toml
from evaluation.report import read_metrics
from resume import checkpoint
from resume import state as states
from resume.order import Order
from resume.state import Batch, DataState, Reweight
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from tests.trained import (
    audited,
    file_ids,
    pretrain_in_process,
    resume,
    samples_in,
    total,
    trained,
)
from tests.tuned import metrics, tuning, write_base, write_chat_data
from tests.tuned import trained as tensors_after
from train import stages
from train.assemble import open_data
from train.config import RunConfig, StageSection
from train.exits import BAD_CONFIG, BAD_DATA
from train.feed import fresh_state
from train.recipes import DpoConfig, SftConfig
from train.resolve import resolved
from train.schedule import learning_rate

STEP = 384
"""Tokens per step of a tiny run."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Three sources, code, web and books."""
    folder = tmp_path_factory.mktemp("sources")
    return (
        write_data(folder / "code", texts=texts_about("code", 50), source="code"),
        write_data(folder / "web", texts=texts_about("web", 80), source="web"),
        write_data(folder / "books", texts=texts_about("books", 40), source="books"),
    )


def staged(folders: tuple[Path, ...], run: Path, /, *parts: StageSection, **sections: dict[str, Any]) -> RunConfig:
    """A tiny run that writes down what it trains, as long as its stages unless run.num_steps is given."""
    data = {"paths": tuple(map(str, folders)), "record_samples": True, **sections.pop("data", {})}
    life = {"num_steps": RunConfig().run.num_steps, **sections.pop("run", {})}
    return dataclasses.replace(tiny_run(folders[0], run, run=life, data=data, **sections), stage=parts)


def stage(steps: float | None, **values: Any) -> StageSection:
    return StageSection(tokens=None if steps is None else steps * STEP, **values)


THREE = (
    stage(2, mixture="code=0.5 web=0.5", lr=1e-2),
    stage(3, mixture="code=0.1 web=0.9", sequence_length=64, lr_end=1e-3),
    stage(2, sequence_length=16, lr_end=0.0, schedule="cosine"),
)


def succeeds(config: RunConfig, *flags: object) -> str:
    code, output = pretrain_in_process(config, *flags)
    assert code == 0, output
    return output


def agrees(run: Path) -> None:
    code, output = resume("audit", run)
    assert code == 0, output
    assert "the books and the order agree, file by file" in output


def state_of(run: Path) -> DataState:
    newest = checkpoint.latest(run)
    assert newest is not None
    return states.from_json(checkpoint.read_record(newest)["data"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.open_checkpoint(folder).read_tensors("")


def same_tensors(a: Path, b: Path) -> bool:
    one, other = tensors_of(a), tensors_of(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Keys


def parsed(tmp_path: Path, text: str, *flags: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return parse(RunConfig, [str(path), *flags], prog="pretrain")


SMALL = "[data]\nsequence_length = 64\nbatch_sequences = 32\n"
ONE = SMALL + "[[stage]]\ntokens = 20_480\n"


def test_stages_are_read_written_and_overridden_by_flags(tmp_path: Path):
    config = parsed(tmp_path, ONE + 'mixture = "a=1"\n[[stage]]\nlr_end = 1e-5\n', "--stage.1.lr", "0.5")
    assert config.stage == (StageSection(tokens=20_480.0, mixture="a=1"), StageSection(lr=0.5, lr_end=1e-5))
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load(tmp_path / "again.toml", RunConfig) == config
    assert "stage" not in to_toml(RunConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + "tokns = 3\n", r"unknown key 'stage\.0\.tokns'; did you mean 'stage\.0\.tokens'"),
        ("[stage]\ntokens = 3\n", r"stage = \{.*\}: expected tables, each under a line \[\[stage\]\]"),
        ('[[stage]]\nschedule = "wsd"\n', r"stage\.0\.schedule = 'wsd': expected one of 'constant'"),
        ("[[stage]]\nlr = -1.0\n", r"stage\.0\.lr = -1\.0: must be positive"),
        ("[[stage]]\nlr_end = nan\n", r"stage\.0\.lr_end = nan: must be finite"),
        ('[[stage]]\nschedule = "linear"\n', r"stage\.0\.lr_end = None with schedule = 'linear'"),
        ('[[stage]]\nmixture = "web=-1"\n', r"weights >= 0"),
        (SMALL + "[[stage]]\ntokens = 100\n", r"stage\.0\.tokens = 100: less than one step of 2,048 tokens"),
        ("[[stage]]\n[[stage]]\n", r"stage\.0\.tokens is missing"),
        (ONE + '[[stage]]\nmixture = "a=1"\n', r"stage\.0\.mixture is missing"),
        (ONE.replace("[[", 'mixture = ["a=1"]\n[[') + 'mixture = "a=1"\n', "move that of"),
        (ONE + "lr_end = 0\n[[stage]]\n", r"stage\.1\.lr is missing, and the stage before ends at 0"),
        (ONE + "sequence_length = 4096\n", r"stage\.0\.sequence_length = 4096 exceeds model\.context_length = 2048"),
        (
            ONE + "sequence_length = 48\n",
            r"stage\.0\.sequence_length = 48: lengths must divide data\.group_tokens = 64",
        ),
        (
            ONE.replace("[[", "window_groups = 3\n[[") + "sequence_length = 32\n",
            r"no\s+multiple of data\.window_groups",
        ),
    ],
)
def test_nonsense_is_refused_with_its_key(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parsed(tmp_path, text)


def test_a_flag_that_makes_no_stage_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lr = -1\.0: must be positive"):
        parsed(tmp_path, ONE, "--stage.0.lr", "-1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--run.num-steps", "7"), r"run\.num_steps = 7, but the stages' tokens make 10 steps of 2,048"),
        (("--run.num-epochs", "1"), r"run\.num_epochs = 1\.0, but the stages' tokens make 10 steps"),
        (("--stage.0.tokens", "None", "--run.branch-from", "runs/base"), "name a checkpoint of another run"),
        (("--run.dir", "runs/a", "--run.branch-from", "runs/a/step-5"), r"lies in run\.dir"),
        (("--run.init-from", "x", "--run.branch-from", "runs/a/step-5"), "both given"),
    ],
)
def test_what_disagrees_with_stages_or_a_branch_is_refused(tmp_path: Path, flags: tuple[str, ...], message: str):
    data = write_data(tmp_path / "data")
    with pytest.raises(ConfigError, match=message):
        resolved(parsed(tmp_path, ONE, "--data.paths", str(data), *flags))


def test_the_last_stage_may_have_what_is_left_of_the_run_but_that_must_be_something(tmp_path: Path):
    paths = ("--data.paths", str(write_data(tmp_path / "data")))
    open_end = resolved(parsed(tmp_path, ONE + "[[stage]]\n", *paths, "--run.num-steps", "25"))
    assert [s.num_steps for s in stages.stages_of(open_end)] == [10, 15]
    with pytest.raises(ConfigError, match=r"run\.num_steps = 10 leaves no step for the last stage"):
        resolved(parsed(tmp_path, ONE + "[[stage]]\n", *paths, "--run.num-steps", "10"))


def test_only_pretraining_and_fine_tuning_have_stages(tmp_path: Path):
    chats, pairs = write_chat_data(tmp_path / "chat"), write_chat_data(tmp_path / "pairs", "pairs")
    base = write_base(tmp_path / "base", chats)
    tune = tuning(SftConfig, base, chats, tmp_path / "run")
    with pytest.raises(ConfigError, match="packed in rows of 64 tokens"):
        resolved(dataclasses.replace(tune, stage=(StageSection(sequence_length=32),)))
    dpo = tuning(DpoConfig, base, pairs, tmp_path / "run")
    with pytest.raises(ConfigError, match="not for a DpoConfig"):
        resolved(dataclasses.replace(dpo, stage=(StageSection(),)))


def test_fine_tuning_in_stages_is_as_long_as_they_are(tmp_path: Path):
    chats = write_chat_data(tmp_path / "chat")
    tune = tuning(SftConfig, write_base(tmp_path / "base", chats), chats, tmp_path / "run")
    parts = (StageSection(tokens=2.0 * tune.batch_tokens), StageSection(tokens=1.0 * tune.batch_tokens, lr_end=0.0))
    run = dataclasses.replace(tune.run, num_steps=RunConfig().run.num_steps, num_epochs=SftConfig().run.num_epochs)
    config = resolved(dataclasses.replace(tune, run=run, stage=parts))
    tensors_after(config)
    steps = [record for record in metrics(config) if "learning_rate" in record]
    assert [(record["stage"], record["learning_rate"]) for record in steps] == [(1, 1e-2), (1, 1e-2), (2, 1e-2)]


# Arithmetic


@st.composite
def staged_configs(draw: st.DrawFn) -> RunConfig:
    """Stages with rates of all kinds, whose lengths in steps are known, some of a branch."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        lr_end = draw(st.none() | st.floats(1e-6, 1))
        ways = [None, "constant"] if lr_end is None else [None, "linear", "cosine"]
        parts.append(
            StageSection(
                tokens=float(STEP * draw(st.integers(1, 30))),
                lr=draw(st.none() | st.floats(1e-6, 1)),
                lr_end=lr_end,
                schedule=draw(st.sampled_from(ways)),  # pyright: ignore[reportArgumentType]
            )
        )
    config = staged((Path("nowhere"),), Path("run"), *parts, optim={"warmup_steps": draw(st.integers(0, 20))})
    base = draw(st.none() | st.integers(0, 50))
    run = dataclasses.replace(config.run, branch_from=f"base/step-{base}" if base is not None else None)
    return stages.with_steps(dataclasses.replace(config, run=run))


def rate_by_hand(config: RunConfig, step: int) -> float:
    """The rate of a step, walked to from the beginning."""
    at, rate = stages.begins_at(config), config.optim.peak_lr
    for part in config.stage:
        assert part.tokens is not None
        length = int(part.tokens) // STEP
        first = rate if part.lr is None else part.lr
        last = first if part.lr_end is None else part.lr_end
        if step < at + length:
            share = (step - at) / (length - 1) if length > 1 else 0.0
            bend = (1 - math.cos(math.pi * share)) / 2 if part.schedule == "cosine" else share
            return (first * (1 - bend) + last * bend) * min(1.0, (step + 1) / max(1, config.optim.warmup_steps))
        at, rate = at + length, last
    raise AssertionError("behind the run")


@given(staged_configs())
def test_rates_go_from_stage_to_stage(config: RunConfig):
    first, last = stages.begins_at(config), config.run.num_steps
    assert last - first == sum(part.tokens or 0 for part in config.stage) / STEP
    rates = [stages.rate_at(config, step) for step in range(first, last)]
    if any(part.has_rate for part in config.stage):
        assert rates == pytest.approx([rate_by_hand(config, step) for step in range(first, last)], rel=1e-12)
    else:
        assert rates == [learning_rate(config.optim, step, last) for step in range(first, last)]


@given(staged_configs())
def test_every_step_is_in_the_stage_that_its_tokens_say(config: RunConfig):
    numbers = [n for n, part in enumerate(config.stage, 1) for _ in range(int((part.tokens or 0) // STEP))]
    found = [stages.stage_at(config, step) for step in range(stages.begins_at(config), config.run.num_steps)]
    assert [s.number for s in found if s is not None] == numbers


def test_a_config_without_stages_is_what_it_was():
    config = RunConfig()
    assert stages.stages_of(config) == []
    assert stages.stage_at(config, 5) is None
    assert stages.portions_at(config, 5) == (2_048, 1_024)
    assert stages.rate_at(config, 5) == learning_rate(config.optim, 5, config.run.num_steps)
    assert stages.at_longest(config) is config


def test_micro_batches_of_longer_samples_have_as_many_tokens():
    config = staged((Path("nowhere"),), Path("run"), *THREE)
    assert [config.micro_batch_at(length) for length in (16, 32, 64, 128)] == [4, 2, 1, 1]
    largest = stages.at_longest(config)
    assert (largest.data.sequence_length, largest.data.batch_sequences, largest.data.micro_batch_sequences) == (
        64,
        6,
        1,
    )


def test_mixtures_of_stages_are_the_schedule_of_one_mixture(sources: tuple[Path, Path, Path], tmp_path: Path):
    parts = (stage(2, mixture="code=1 web=2"), stage(3), stage(2, mixture="code=3 web=1"))
    config = staged(sources[:2], tmp_path / "run", *parts)
    same = staged(sources[:2], tmp_path / "run", data={"mixture": ("code=1 web=2", f"{5 * STEP}: code=3 web=1")})
    data = open_data(config)
    assert fresh_state(config, data.manifest, data.training) == fresh_state(same, data.manifest, data.training)


# Runs


def test_a_run_in_stages_has_the_lengths_rates_and_mixtures_of_each(sources: tuple[Path, Path, Path], tmp_path: Path):
    run = tmp_path / "run"
    config = staged(sources[:2], run, *THREE, data={"max_epochs": ("4",)})
    output = succeeds(config)
    assert "stage 2 of 3: steps 3 to 5 (1,152 tokens), 6 samples of 64, learning rate 0.01 to 0.001 (linear)" in output
    steps = trained(run)
    assert [{s.length for s in samples} for samples in steps.values()] == [{32}] * 2 + [{64}] * 3 + [{16}] * 2
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["stage"] for record in records] == [1, 1, 2, 2, 2, 3, 3]
    warm = config.optim.warmup_steps
    assert warm == 2
    expected = [0.5e-2, 1e-2, 1e-2, 5.5e-3, 1e-3, 1e-3, 0.0]
    assert [record["learning_rate"] for record in records] == pytest.approx(expected)
    events = state_of(run).events
    assert [(e.at, e.weights["code"]) for e in events if isinstance(e, Reweight)] == [(0, 0.5), (2 * STEP // 64, 0.1)]
    assert [(e.step, e.sequence_length) for e in events if isinstance(e, Batch)] == [(0, 32), (2, 64), (5, 16)]
    agrees(run)
    assert audited(run, [*file_ids(sources[0]), *file_ids(sources[1])]) == steps


def test_lengths_change_without_losing_or_repeating_a_token(sources: tuple[Path, Path, Path], tmp_path: Path):
    parts = (stage(3, sequence_length=16), stage(2, sequence_length=64), stage(None))
    run = tmp_path / "run"
    config = staged(sources[1:2], run, *parts, run={"num_steps": 50}, data={"max_epochs": ("1",)})
    assert "the data ends after step" in succeeds(config)
    counts = {s.file_id: np.zeros(10_000, dtype=np.int64) for s in samples_in(sources[1])}
    for sample, times in total(trained(run)).items():
        counts[sample.file_id][sample.first : sample.first + sample.length] += times
    of_file = {s.file_id: s.first + s.length for s in sorted(samples_in(sources[1]), key=lambda s: s.first)}
    assert all((count[: of_file[i] - 32] == 1).all() and count.max() == 1 for i, count in counts.items())
    agrees(run)


def test_other_data_is_no_spike(sources: tuple[Path, Path, Path], tmp_path: Path):
    """After a constant history, everything is one: but not at the first step of a stage, nor until it has one anew."""
    parts = (stage(4, lr=1e-9), stage(3))
    run = tmp_path / "run"
    succeeds(staged(sources[:1], run, *parts, guard={"window_steps": 2, "sigma": 1e-9, "on_spike": "note"}))
    spikes = [record["step"] for record in read_metrics(run) if "spike" in record.get("cause", "")]
    assert set(spikes) & {3, 4}
    assert not set(spikes) & {5, 6}


def test_a_run_in_stages_is_planned_stage_by_stage(sources: tuple[Path, Path, Path], tmp_path: Path):
    output = succeeds(staged(sources[:2], tmp_path / "run", *THREE), "--dry-run")
    assert (
        "stage 1 of 3       steps 1 to 2 (768 tokens), 12 samples of 32, learning rate 0.01, code=0.5 web=0.5" in output
    )
    assert "stage 3 of 3       steps 6 to 7" in output
    assert "384 per step, 2,688 in all" in output


def test_a_plan_that_changed_is_not_resumed(sources: tuple[Path, Path, Path], tmp_path: Path):
    config = staged(sources[:2], tmp_path / "run", *THREE)
    succeeds(config)
    code, output = pretrain_in_process(dataclasses.replace(config, stage=THREE[:2]), "--run.allow-changes", "run.seed")
    assert code == BAD_CONFIG
    assert "run.branch_from" in output


def test_runs_without_stages_do_not_log_any(sources: tuple[Path, Path, Path], tmp_path: Path):
    run = tmp_path / "run"
    succeeds(staged(sources[:1], run, run={"num_steps": 1}))
    assert not any("stage" in record for record in read_metrics(run))


# Branches


@pytest.fixture(scope="module")
def base(sources: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of six steps on code and web, with a checkpoint of each."""
    run = tmp_path_factory.mktemp("base") / "run"
    mixture = {"mixture": ("code=0.5 web=0.5", f"{4 * STEP}: code=0.2 web=0.8")}
    config = staged(sources[:2], run, run={"num_steps": 6, "save_every": 1}, data=mixture)
    succeeds(config)
    return config


def branch(base: RunConfig, run: Path, step: int = 3, /, *parts: StageSection, **sections: dict[str, Any]) -> RunConfig:
    """The base's config in another folder, from its checkpoint of a step."""
    replaced = {name: dataclasses.replace(getattr(base, name), **values) for name, values in sections.items()}
    config = dataclasses.replace(base, **replaced, stage=parts)
    life = dataclasses.replace(config.run, dir=str(run), branch_from=f"{base.run.dir}/step-{step}")
    return dataclasses.replace(config, run=life)


def test_a_branch_that_changes_nothing_ends_like_the_run_that_it_leaves(base: RunConfig, tmp_path: Path):
    run, left = tmp_path / "run", Path(base.run.dir)
    before = {path: path.read_bytes() for path in sorted(left.rglob("*")) if path.is_file()}
    output = succeeds(branch(base, run))
    assert f"branching off from {left}/step-3 in {run}" in output
    assert checkpoint.steps(run) == [3, 4, 5, 6]
    for step in (3, 6):
        assert same_tensors(run / f"step-{step}", left / f"step-{step}")
    assert {step: samples for step, samples in trained(left).items() if step > 3} == trained(run)
    assert state_of(run) == state_of(left)
    agrees(run)
    assert {path: path.read_bytes() for path in sorted(left.rglob("*")) if path.is_file()} == before


def test_a_branch_anneals_on_another_mixture_with_new_data_and_needs_the_other_run_no_more(
    base: RunConfig, sources: tuple[Path, Path, Path], tmp_path: Path
):
    """Only books and code from the branch on; of the two data folders of the base, web is not even named."""
    left, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(base.run.dir, left)
    moved = dataclasses.replace(base, run=dataclasses.replace(base.run, dir=str(left)))
    parts = (
        stage(2, mixture="code=0.2 web=0 books=0.8", lr=1e-2, lr_end=5e-3),
        stage(2, mixture="code=1 web=0 books=0", sequence_length=16, lr_end=0.0),
    )
    paths = (str(sources[2]), str(sources[0]))
    default = RunConfig().run.num_steps
    config = branch(moved, run, 3, *parts, run={"num_steps": default}, data={"paths": paths, "mixture": ()})
    output = succeeds(config, "--dry-run")
    assert "stage 2 of 2       steps 6 to 7" in output
    assert "from step 3 to 7; at the end" in output
    assert "384 per step, 1,536 in all" in output
    succeeds(config)
    drawn = {step: {source_of(s.file_id, sources) for s in samples} for step, samples in trained(run).items()}
    assert drawn == {4: {"code", "books"}, 5: {"code", "books"}, 6: {"code"}, 7: {"code"}}
    rates = [record["learning_rate"] for record in read_metrics(run) if "loss" in record]
    assert rates == pytest.approx([1e-2, 5e-3, 5e-3, 0.0])
    assert {s.length for s in trained(run)[7]} == {16}
    agrees(run)
    shutil.rmtree(left)
    assert "already at step 7 of 7" in succeeds(config)


def source_of(file_id: str, sources: tuple[Path, ...]) -> str:
    return next(folder.name for folder in sources if file_id in file_ids(folder))


def test_a_branch_with_another_mixture_leaves_the_order_before_it_as_it_was(base: RunConfig, tmp_path: Path):
    """What was planned for later is replaced."""
    run = tmp_path / "run"
    succeeds(branch(base, run, 5, data={"mixture": ("code=1 web=0",)}, run={"num_steps": 7}))
    old, new = Order(state_of(Path(base.run.dir))), Order(state_of(run))
    positions = np.arange(5 * 12)
    assert all(np.array_equal(a, b) for a, b in zip(old.resolve(positions), new.resolve(positions), strict=True))
    weights = [(e.at, e.weights) for e in new.state.events if isinstance(e, Reweight)]
    assert weights[-1] == (5 * 12, {"code": 1.0, "web": 0.0})
    early = tmp_path / "early"
    succeeds(branch(base, early, 2, data={"mixture": ("code=1 web=0", f"{3 * STEP}: code=0 web=1")}))
    weights = [(e.at, e.weights["code"]) for e in state_of(early).events if isinstance(e, Reweight)]
    assert weights == [(0, 0.5), (2 * 12, 1.0), (3 * 12, 0.0)]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": {"hidden_size": 48}}, BAD_CONFIG, "model.hidden_size = 48, the checkpoint has 24"),
        ({"run": {"seed": 1}}, BAD_CONFIG, "run.seed = 1, the checkpoint has 3407"),
        ({"run": {"num_steps": 3}}, BAD_CONFIG, "run.num_steps = 3 leaves no step for the branch"),
        ({"data": {"mixture": ()}}, BAD_DATA, "weighs its sources, so the branch has to as well"),
        ({"data": {"mixture": ("code=1",)}}, BAD_DATA, "the mixture names code, the data's sources are code, web"),
        ({"data": {"sequence_length": 64, "batch_sequences": 6}}, BAD_DATA, "would lose"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_branch_that_does_not_fit_is_refused(
    base: RunConfig, tmp_path: Path, change: dict[str, dict[str, Any]], code: int, message: str
):
    found, output = pretrain_in_process(branch(base, tmp_path / "run", **change))
    assert found == code
    assert message in output
    assert checkpoint.steps(tmp_path / "run") == []


def test_a_checkpoint_that_is_not_there_is_named_with_those_that_are(base: RunConfig, tmp_path: Path):
    code, output = pretrain_in_process(branch(base, tmp_path / "run", 2, run={"num_steps": 100}), "--run.branch-from",
                                       f"{base.run.dir}/step-77")  # fmt: skip
    assert code == BAD_CONFIG
    assert "step-77' is not there" in output
    assert "step-1 step-2 step-3" in output


def test_a_new_source_without_a_weight_is_refused(base: RunConfig, sources: tuple[Path, Path, Path], tmp_path: Path):
    code, output = pretrain_in_process(branch(base, tmp_path / "run", data={"paths": tuple(map(str, sources))}))
    assert code == BAD_DATA
    assert "the mixture names code, web, the data's sources are books, code, web" in output


def test_a_branch_may_have_other_steps(base: RunConfig, tmp_path: Path):
    """Half as many samples; the mixture that its second stage has begins with that stage all the same."""
    halves = {"batch_sequences": 6, "mixture": ()}
    parts = tuple(
        StageSection(tokens=STEP, mixture=mixture) for mixture in ("code=1 web=0", "code=0 web=1")
    )  # two steps each
    config = branch(base, tmp_path / "run", 3, *parts, run={"num_steps": RunConfig().run.num_steps}, data=halves)
    assert "from step 3 to 7; at the end" in succeeds(config, "--dry-run")
    succeeds(config)
    counts = {step: sum(samples.values()) for step, samples in trained(tmp_path / "run").items()}
    assert counts == {4: 6, 5: 6, 6: 6, 7: 6}
    web = [e.at for e in state_of(tmp_path / "run").events if isinstance(e, Reweight) and e.weights["web"] == 1]
    assert web == [3 * 12 + 2 * 6]
    agrees(tmp_path / "run")


def test_fine_tuning_branches_from_fine_tuning(tmp_path: Path):
    chats = write_chat_data(tmp_path / "chat")
    tune = tuning(SftConfig, write_base(tmp_path / "base", chats), chats, tmp_path / "run")
    tensors_after(tune)
    life = {"dir": str(tmp_path / "branch"), "branch_from": f"{tmp_path}/run/step-3", "init_from": None}
    again = resolved(dataclasses.replace(tune, run=dataclasses.replace(tune.run, **life)))
    tensors_after(again)
    assert same_tensors(tmp_path / "branch" / "step-6", tmp_path / "run" / "step-6")


def test_new_files_join_a_run_that_draws_from_one_pool(sources: tuple[Path, Path, Path], tmp_path: Path):
    one = staged(sources[:1], tmp_path / "base", run={"num_steps": 3}, data={"max_epochs": ("1",)})
    succeeds(one)
    both = {"paths": tuple(map(str, sources[:2])), "max_epochs": ("1",)}
    run = tmp_path / "run"
    succeeds(branch(one, run, 3, run={"num_steps": 100}, data=both))
    everything = collections.Counter(total(trained(tmp_path / "base"))) + total(trained(run))
    assert everything == collections.Counter(samples_in(sources[0]) | samples_in(sources[1]))
    agrees(run)

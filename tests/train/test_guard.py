"""The guard: what it judges, that a refused step leaves no trace, and that a run goes back by itself, but not for ever.

By unit against a restatement of its rules, then through whole runs on one and two ranks.
"""

import collections
import json
import math
import random
import signal
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from evaluation.report import read_metrics
from model.balance import RoutingLog
from model.batch import Batch
from resume import checkpoint, requests
from tests.lives import Life, finished, lived
from tests.prepared import write_data
from tests.processes import run_ranks
from tests.runs import opened, tiny_run
from tests.trained import audited, file_ids, resume, trained
from train import exits, loop, pretrain
from train.config import GuardSection, RunConfig, with_values
from train.guard import Guard, Verdict
from train.objectives import Outcome, next_token_loss
from train.optim import state_tensors

Step = tuple[float, float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


# By unit


def actions(guard: Guard, steps: Sequence[Step]) -> list[str]:
    return [guard.judge(*step).action for step in steps]


def restated(config: GuardSection, steps: Sequence[Step]) -> list[str]:
    """The rules again, from the whole past each time, without a running window."""
    given: list[str] = []
    for number, step in enumerate(steps):
        applied = [past for past, action in zip(steps[:number], given, strict=True) if action == "apply"]
        window = applied[-config.window_steps :]
        finite = all(not math.isnan(value) and abs(value) != math.inf for value in step)
        is_spike = False
        if finite and len(window) == config.window_steps:
            for value, past in zip(step, zip(*window, strict=True), strict=True):
                mean = statistics.fmean(past)
                deviation = math.sqrt(statistics.fmean([(x - mean) ** 2 for x in past]))
                is_spike |= value > mean + config.sigma * max(deviation, 0.01 * abs(mean))
        if finite and not (is_spike and config.on_spike not in ("off", "note")):
            given.append("apply")
            continue
        policy = config.on_spike if finite else config.on_nonfinite
        refused = list(reversed(given)).index("apply") if "apply" in given else len(given)
        given.append("rollback" if policy == "skip" and refused + 1 >= config.max_in_a_row else policy)
    return given


usual = st.floats(0.5, 4.0)
odd = st.sampled_from([math.nan, math.inf, -math.inf, 1e3, 1e30, 0.0])
histories = st.lists(st.tuples(st.one_of(usual, usual, usual, odd), st.one_of(usual, usual, usual, odd)), max_size=60)
configs = st.builds(
    GuardSection,
    on_nonfinite=st.sampled_from(["skip", "rollback", "stop"]),
    on_spike=st.sampled_from(["off", "note", "skip", "rollback", "stop"]),
    sigma=st.sampled_from([1.0, 3.0, 6.0]),
    window_steps=st.integers(2, 8),
    max_in_a_row=st.integers(1, 4),
)


@given(configs, histories)
def test_the_guard_decides_as_its_rules_say(config: GuardSection, steps: list[Step]):
    assert actions(Guard(config), steps) == restated(config, steps)


@given(configs, histories, st.integers(0, 60))
def test_a_guard_that_was_saved_decides_as_one_that_went_on(config: GuardSection, steps: list[Step], at: int):
    whole, before = Guard(config), Guard(config)
    expected = [whole.judge(*step) for step in steps]
    told = [before.judge(*step) for step in steps[:at]]
    stored = json.loads(json.dumps(before.to_json(), allow_nan=False))
    after = Guard(config, stored)
    assert after.to_json() == before.to_json()
    assert told + [after.judge(*step) for step in steps[at:]] == expected
    assert after.to_json() == whole.to_json()


@given(configs, histories)
def test_what_is_not_finite_or_not_applied_never_enters_the_history(config: GuardSection, steps: list[Step]):
    guard = Guard(config)
    applied = [step for step in steps if guard.judge(*step).action == "apply"]
    assert all(math.isfinite(value) for step in applied for value in step)
    record = guard.to_json()
    assert list(zip(record["losses"], record["grad_norms"], strict=True)) == applied[-config.window_steps :]


def test_one_nan_among_steady_steps_is_skipped_and_all_the_others_are_applied():
    """OLMo-core's rule, replayed, skips 129 steps after one NaN: with it in the history no comparison is true."""
    chance = random.Random(1)
    steps = [(2 + chance.random() / 10, 1 + chance.random() / 10) for _ in range(500)]
    steps[200] = (math.nan, math.nan)
    decided = actions(Guard(GuardSection(on_spike="skip")), steps)
    assert [number for number, action in enumerate(decided) if action != "apply"] == [200]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad_norm", [1.0, math.nan, math.inf])
def test_whatever_is_not_finite_is_named(loss: float, grad_norm: float):
    for values in ((loss, grad_norm), (grad_norm, loss)):
        verdict = Guard(GuardSection()).judge(*values)
        assert verdict == Verdict("skip", f"not finite: loss {values[0]}, gradient norm {values[1]}")


@pytest.mark.parametrize("on_spike", ["off", "note", "skip", "rollback", "stop"])
@pytest.mark.parametrize("which", ["loss", "gradient norm"])
def test_a_spike_is_treated_as_the_policy_says(on_spike: Any, which: str):
    guard = Guard(GuardSection(on_spike=on_spike, window_steps=10))
    assert set(actions(guard, [(2.0, 1.0 + i / 100) for i in range(10)])) == {"apply"}
    verdict = guard.judge(2000.0, 1.0) if which == "loss" else guard.judge(2.0, 1000.0)
    assert verdict.action == ("apply" if on_spike in ("off", "note") else on_spike)
    if on_spike == "off":
        assert verdict.cause is None
    else:
        assert verdict.cause is not None
        assert verdict.cause.startswith(f"spike: {which} {'2000' if which == 'loss' else '1000'}, limit ")


def test_nothing_is_a_spike_before_the_window_is_full():
    guard = Guard(GuardSection(on_spike="skip", window_steps=5))
    assert actions(guard, [(1.0, 1.0)] * 4 + [(1e9, 1e9)]) == ["apply"] * 5


def test_rounding_in_a_history_that_does_not_vary_is_no_spike():
    guard = Guard(GuardSection(on_spike="skip", window_steps=5))
    assert actions(guard, [(2.0, 1.0)] * 5 + [(2.1, 1.05)]) == ["apply"] * 6
    guard = Guard(GuardSection(on_spike="skip", window_steps=5))
    assert actions(guard, [(2.0, 1.0)] * 5 + [(2.13, 1.0)]) == ["apply"] * 5 + ["skip"]


def test_a_low_loss_is_no_spike():
    guard = Guard(GuardSection(on_spike="stop", window_steps=5))
    assert actions(guard, [(2.0 + i / 10, 1.0) for i in range(5)] + [(0.0, 0.0)]) == ["apply"] * 6


def test_several_skips_in_a_row_become_a_rollback_and_an_applied_step_begins_anew():
    guard = Guard(GuardSection(max_in_a_row=3))
    bad, good = (math.nan, 1.0), (2.0, 1.0)
    assert actions(guard, [bad, bad, good, bad, bad, bad]) == ["skip", "skip", "apply", "skip", "skip", "rollback"]
    assert "; step 1 in a row that could not" in str(Guard(GuardSection(max_in_a_row=1)).judge(*bad).cause)


# Through the loop

SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("nan", 4, 4), ("spike", 5, 5))]


def recording(data_folder: Path, run_folder: Path, **sections: Any) -> RunConfig:
    """A tiny run of several ranks' worth that writes down what it trains, the same bits on any number of ranks."""
    data = {"record_samples": True, **sections.pop("data", {})}
    parallel = {"precision": "exact", **sections.pop("parallel", {})}
    return tiny_run(data_folder, run_folder, data=data, parallel=parallel, **sections)


def tensors_of(run: Path) -> dict[str, Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return checkpoint.open_checkpoint(newest).read_tensors("")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(run: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["event"]) for record in read_metrics(run) if "event" in record]


def losses(run: Path) -> dict[int, float | None]:
    return {record["step"]: record["loss"] for record in read_metrics(run) if "loss" in record}


def leave_out(*steps: int) -> Callable[[int], None]:
    """Has the guard refuse steps that nothing is wrong with."""

    def before(rank: int) -> None:
        numbers, judge = iter(range(1, 10**6)), Guard.judge

        def judged(self: Guard, loss: float, grad_norm: float) -> Verdict:
            return Verdict("skip") if next(numbers) in steps else judge(self, loss, grad_norm)

        Guard.judge = judged

    return before


@pytest.fixture(scope="module")
def without_step(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run folder of an uninterrupted run on one rank that never applied a step, nor computed anything odd in it."""
    runs: dict[int, Path] = {}

    def made(step: int) -> Path:
        if step not in runs:
            runs[step] = tmp_path_factory.mktemp("without") / "run"
            finished(recording(data, runs[step]), before=leave_out(step))
        return runs[step]

    return made


CASES = [("nan", 1, 0), ("nan", 2, 1), ("spike", 2, 0)]
MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in (("nan", 2, 0), ("spike", 1, 0), ("spike", 2, 1))]
SPIKES = {"on_spike": "skip", "window_steps": 2, "sigma": 30.0}


@pytest.mark.parametrize(("kind", "num_ranks", "rank"), CASES + MORE)
def test_a_poisoned_step_is_as_if_it_had_never_been_applied(
    data: Path, tmp_path: Path, without_step: Callable[[int], Path], kind: str, num_ranks: int, rank: int
):
    step = random.Random(f"{kind}{num_ranks}{rank}").randint(3, 6)
    run, reference = tmp_path / "run", without_step(step)
    config = recording(data, run, guard=SPIKES, debug={"inject": (f"{kind}:rank={rank},step={step}",)})
    finished(config, num_ranks)
    assert same(tensors_of(run), tensors_of(reference))
    assert events(run) == [(step, "skip")]
    found, expected = losses(run), losses(reference)
    assert {s: loss for s, loss in found.items() if s != step} == pytest.approx(
        {s: loss for s, loss in expected.items() if s != step}, rel=1e-12
    )
    loss = found[step]
    assert loss is None if kind == "nan" else loss is not None and loss > 100
    assert [r["skipped"] for r in read_metrics(run) if "loss" in r] == [s == step for s in range(1, 7)]
    # Its data is not trained.
    assert trained(run) == trained(reference) == audited(run, file_ids(data))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_poisoned_step_changes_no_bit_of_weights_and_moments_and_all_ranks_agree(
    data: Path, tmp_path: Path, num_ranks: int
):
    """Seen from inside every rank, before and after each step."""
    step, rank = random.Random(num_ranks).randint(2, 6), num_ranks - 1
    config = tiny_run(data, tmp_path / "run", debug={"inject": (f"nan:rank={rank},step={step}",)})

    def changed_at(rank: int) -> list[Any]:
        found, verdicts, do = [], [], loop.train_step

        def watched(trainer: loop.Trainer, *rest: Any) -> loop.StepOutcome:
            tensors = state_tensors(trainer.model, trainer.optimizer)
            before = {name: loop_part(value).clone() for name, value in tensors.items()}
            outcome = do(trainer, *rest)
            after = state_tensors(trainer.model, trainer.optimizer)
            assert all(bool(torch.isfinite(loop_part(value)).all()) for value in after.values())
            if not all(torch.equal(before[name], loop_part(after[name])) for name in before):
                found.append(rest[-1])
            verdicts.append(outcome.verdict.action)
            return outcome

        loop.train_step = watched
        assert pretrain.pretrain(config) == 0
        return [found, verdicts]

    def loop_part(tensor: Tensor) -> Tensor:
        from resume.regions import local_part

        return local_part(tensor)

    told = run_ranks(changed_at, num_ranks, tmp_path)
    assert told == [told[0]] * num_ranks
    assert told[0][0] == [number for number in range(1, 7) if number != step]
    assert told[0][1] == ["skip" if number == step else "apply" for number in range(1, 7)]


@pytest.mark.parametrize(("kind", "stop", "step"), [("nan", 3, 5), ("spike", 4, 6), *SLOW])
def test_a_run_resumed_around_a_poisoned_step_decides_as_the_uninterrupted_one(
    data: Path, tmp_path: Path, without_step: Callable[[int], Path], kind: str, stop: int, step: int
):
    """A spike after the resume is known by the history from before it, on another number of ranks."""
    run = tmp_path / "run"
    faults = (f"{kind}:rank=0,step={step}", f"terminate:rank=0,step={stop}")
    config = recording(data, run, guard=SPIKES, debug={"inject": faults})
    assert lived(config, 2).codes == [exits.STOPPED] * 2
    assert checkpoint.steps(run)[-1] == stop
    finished(config, 1)
    assert same(tensors_of(run), tensors_of(without_step(step)))
    assert events(run) == [(step, "skip")]


@pytest.mark.parametrize("kind", ["nan", "spike"])
def test_a_policy_to_stop_ends_the_run_with_its_own_code(data: Path, tmp_path: Path, kind: str):
    run = tmp_path / "run"
    guard = {**SPIKES, "on_spike": "stop", "on_nonfinite": "stop"}
    config = tiny_run(data, run, guard=guard, debug={"inject": (f"{kind}:rank=1,step=5",)})
    life = lived(config, 2)
    assert life.codes == [exits.NOT_FINITE] * 2
    end = exits.read_end(run)
    assert (end["code"], end["step"]) == (exits.NOT_FINITE, 5)
    assert "; samples 48 to 59 of the data order. The guard is told to stop" in end["cause"]
    assert events(run) == [(5, "stop")]
    assert checkpoint.steps(run) == [3]


def test_a_noted_spike_is_applied_and_written_down(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    guard = {**SPIKES, "on_spike": "note"}
    life = finished(tiny_run(data, run, guard=guard, debug={"inject": ("spike:rank=0,step=5",)}))
    assert events(run) == [(5, "apply")]
    assert "GUARD: apply, step 5: spike: loss " in life.out()
    assert not any(record["skipped"] for record in read_metrics(run) if "loss" in record)


# Going back

BACK = {"on_nonfinite": "rollback"}


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(recording(data, run, run={"num_steps": 8}))
    return run


def nans(*steps: int) -> dict[str, Any]:
    return {"inject": tuple(f"nan:rank=0,step={step}" for step in steps)}


def agrees(run: Path, data: Path) -> None:
    code, output = resume("audit", run)
    assert code == 0, output
    assert "the books and the order agree, file by file" in output
    assert audited(run, file_ids(data)) == trained(run)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rollback_goes_back_to_the_newest_checkpoint_and_trains_other_data(
    data: Path, tmp_path: Path, undisturbed: Path, num_ranks: int
):
    run = tmp_path / "run"
    life = finished(recording(data, run, guard=BACK, debug=nans(5)), num_ranks)
    assert (
        "ROLLBACK to step 3, request 1: skip of 2 steps (rolled back from step 5 to 3, step 5: not finite" in life.out()
    )
    assert "; samples 48 to 59 of the data order)\n" in life.out()
    ((number, request),) = requests.pending(run, 0)
    assert (number, request["kind"], request["num_steps"], request["for_good"]) == (1, "skip", 2, False)
    assert request["because"].startswith("rolled back from step 5 to 3, step 5: not finite: loss nan")
    assert "request 1 taken up at step 3" in life.out()
    found, usual = trained(run), trained(undisturbed)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert found == {step: usual[step if step <= 3 else step + 2] for step in range(1, 7)}
    agrees(run, data)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert None not in losses(run).values()
    assert events(run) == [(5, "rollback")]
    # What came before is as it was: the weights at step 3, and the losses up to there.
    before = [checkpoint.open_checkpoint(folder / "step-3").read_tensors("") for folder in (run, undisturbed)]
    assert same(*before) or num_ranks > 1
    assert [losses(run)[s] for s in (1, 2, 3)] == pytest.approx([losses(undisturbed)[s] for s in (1, 2, 3)], rel=0.05)


def test_a_run_that_went_back_ends_as_one_that_was_told_to_skip(data: Path, tmp_path: Path):
    """A rollback is no more than a resume from the checkpoint and a skip, which a person can ask for."""
    config = recording(data, tmp_path / "back", guard=BACK, debug=nans(5))
    finished(config)
    asked = recording(data, tmp_path / "asked", run={"async_save": False}, debug={"inject": ("kill:rank=0,step=5",)})
    with Life(asked) as life:
        assert life.end() == [-signal.SIGKILL]
    assert checkpoint.steps(tmp_path / "asked") == [3]
    skip = {"kind": "skip", "num_steps": 2, "for_good": False}
    assert requests.queue(tmp_path / "asked", skip) == 1
    finished(asked)
    assert same(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "asked"))
    assert trained(tmp_path / "back") == trained(tmp_path / "asked")


def test_a_rollback_before_the_first_checkpoint_begins_anew_behind_the_bad_data(
    data: Path, tmp_path: Path, undisturbed: Path
):
    run = tmp_path / "run"
    life = finished(recording(data, run, guard=BACK, debug=nans(2)), 2)
    assert "ROLLBACK to step 0" in life.out()
    usual = trained(undisturbed)
    assert trained(run) == {step: usual[step + 2] for step in range(1, 7)}
    agrees(run, data)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]
    assert events(run) == [(2, "rollback")]


@pytest.mark.parametrize(("bad", "redone"), [(2, 1), (5, 4)])
def test_a_rollback_survives_a_kill_right_after_it(
    data: Path, tmp_path: Path, undisturbed: Path, bad: int, redone: int
):
    """Killed in the first step after it, before another checkpoint: the next life takes the request up again."""
    run, usual = tmp_path / "run", trained(undisturbed)
    config = recording(data, run, guard=BACK, debug=nans(bad))

    both = with_values(config, debug={"inject": (*config.debug.inject, f"kill:rank=1,step={redone}")})
    # The step is passed once before the rollback: the fault has to wait until then.
    life = lived(both, 2, before=lambda rank: only_after_a_rollback(run))
    assert life.codes[1] == -signal.SIGKILL, life.out()
    assert "ROLLBACK" in life.out()
    again = finished(both, 2)
    assert "ROLLBACK" not in again.out()
    assert len(requests.pending(run, 0)) == 1
    first = 3 if bad > 3 else 0
    assert trained(run) == {step: usual[step if step <= first else step + bad - first] for step in range(1, 7)}
    agrees(run, data)


def only_after_a_rollback(run: Path) -> None:
    """Holds the faults that kill back until the run has gone back."""
    from train.faults import Fault, Faults

    due = Faults._due

    def held_back(self: Faults, step: int, *kinds: str) -> list[Fault]:
        return due(self, step, *kinds) if "kill" not in kinds or requests.num_rollbacks(run) else []

    Faults._due = held_back


def test_going_back_is_bounded_and_then_ends_the_run(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    guard = {**BACK, "max_rollbacks": 2}
    config = recording(data, run, guard=guard, debug=nans(4, 5, 6))
    life = lived(config, 2)
    assert life.codes == [exits.NOT_FINITE] * 2
    assert "The run has rolled back 2 times (guard.max_rollbacks)" in life.err()
    assert life.out().count("ROLLBACK") == 2
    assert requests.num_rollbacks(run) == 2
    assert events(run) == [(4, "rollback"), (5, "rollback"), (6, "rollback")]
    assert exits.read_end(run)["code"] == exits.NOT_FINITE
    # What it counts is in the folder: a new life has no new patience, but a person may give it some.
    more = with_values(config, guard={"max_rollbacks": 9})
    finished(more, 1)
    agrees(run, data)


def test_a_run_that_goes_back_asks_under_a_number_that_was_never_given(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    finished(recording(data, run, run={"num_steps": 3}))
    assert resume("skip", run, "--steps", 1)[0] == 0
    finished(recording(data, run))
    (run / "requests" / "0001.json").unlink()
    life = finished(recording(data, run, run={"num_steps": 9}, guard=BACK, debug=nans(8)))
    assert "ROLLBACK to step 6, request 2: skip of 2 steps" in life.out()
    assert "request 2 taken up at step 6" in life.out()
    agrees(run, data)


def test_a_run_without_patience_never_goes_back(data: Path, tmp_path: Path):
    config = recording(data, tmp_path / "run", guard={**BACK, "max_rollbacks": 0}, debug=nans(5))
    life = lived(config)
    assert life.codes == [exits.NOT_FINITE]
    assert "has rolled back 0 times" in life.err()
    assert requests.pending(tmp_path / "run", 0) == []


def test_skips_in_a_row_end_in_a_rollback_over_all_of_them(data: Path, tmp_path: Path, undisturbed: Path):
    run, usual = tmp_path / "run", trained(undisturbed)
    finished(recording(data, run, guard={"max_in_a_row": 2}, debug=nans(4, 5)))
    assert events(run) == [(5, "rollback")]
    assert trained(run) == {step: usual[step if step <= 3 else step + 2] for step in range(1, 7)}
    agrees(run, data)


def test_losses_that_never_recover_end_the_run_and_not_the_disk(data: Path, tmp_path: Path):
    """Every step from the fourth on is NaN: back, and back again, until patience ends."""
    run = tmp_path / "run"
    config = recording(data, run, guard={**BACK, "max_rollbacks": 3})

    def poison(rank: int) -> None:
        from train import setups

        def objective(model: nn.Module, batch: Batch, routing: RoutingLog | None, **options: float) -> Outcome:
            steps = collections.Counter(path.name for path in run.glob("step-3"))
            outcome = next_token_loss(model, batch, routing, **options)
            return Outcome(outcome.loss_sum * (torch.nan if steps else 1.0))

        setups.next_token_loss = objective

    life = lived(config, 2, before=poison)
    assert life.codes == [exits.NOT_FINITE] * 2
    assert life.out().count("ROLLBACK") == 3
    assert checkpoint.steps(run) == [3]


def test_a_rollback_waits_for_a_checkpoint_that_is_still_being_written(data: Path, tmp_path: Path):
    """The bad step comes while the save of the step before it is under way: that is the newest checkpoint."""
    run = tmp_path / "run"

    def slow(rank: int) -> None:
        import time

        from resume import tensor_file

        write = tensor_file.write

        def slowly(*rest: Any) -> Any:
            time.sleep(0.5)
            return write(*rest)

        tensor_file.write = slowly

    life = finished(recording(data, run, guard=BACK, debug=nans(4)), 2, before=slow)
    assert "ROLLBACK to step 3" in life.out()
    assert "skip of 1 steps" in life.out()


def test_a_life_in_this_process_says_what_it_found(data: Path, tmp_path: Path):
    with opened(tiny_run(data, tmp_path / "run", guard=BACK, debug=nans(5))) as (trainer, progress):
        with pytest.raises(loop.RollBackError, match="step 5: not finite") as caught:
            loop.train(trainer, progress)
        assert caught.value.step == 5


def test_lives_end_when_a_test_does(data: Path, tmp_path: Path):
    with Life(tiny_run(data, tmp_path / "run", run={"num_steps": 10_000}), 2) as life:
        life.until_step(2)
    assert life.codes == [-signal.SIGKILL] * 2

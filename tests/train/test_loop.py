"""The loop itself, in this process: skipping, stopping, logging."""

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.report import read_metrics, write_report
from model.balance import RoutingLog
from model.batch import Batch
from resume import checkpoint, requests, state
from resume.manifest import DataError
from resume.order import Order
from tests.prepared import write_data
from tests.runs import opened, tiny_run
from train import assemble, feed, pretrain
from train.assemble import open_data
from train.config import RunConfig
from train.loop import NotFiniteError, Progress, train
from train.objectives import Outcome, next_token_loss
from train.optim import state_tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def poisoned(steps: set[int], num_micro_batches: int):
    """next_token_loss, but the second micro-batch of the given steps (from 0) is NaN."""
    calls = iter(range(10**9))

    def objective(model: nn.Module, batch: Batch, _: RoutingLog | None) -> Outcome:
        step, micro_batch = divmod(next(calls), num_micro_batches)
        loss = next_token_loss(model, batch)
        return Outcome(loss.loss_sum * torch.nan) if step in steps and micro_batch == 1 else loss

    return objective


def run_with(config: RunConfig, objective) -> tuple[Progress, dict[str, Tensor]]:
    with opened(config) as (trainer, progress):
        trainer.objective_at = lambda _: objective
        progress = train(trainer, progress)
        after = state_tensors(trainer.model, trainer.optimizer)
        return progress, {name: value.clone() for name, value in after.items()}


def test_a_step_that_is_not_finite_changes_nothing_but_the_cursor(data: Path, tmp_path: Path):
    config = tiny_run(data, tmp_path / "run", run={"num_steps": 1})
    with opened(config) as (trainer, progress):
        poison = poisoned({0}, 6)
        trainer.objective_at = lambda _: poison
        before = {name: value.clone() for name, value in state_tensors(trainer.model, trainer.optimizer).items()}
        progress = train(trainer, progress)
        after = state_tensors(trainer.model, trainer.optimizer)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (progress.step, progress.data.position, progress.data.tokens_seen) == (1, 12, 0)
    record = next(r for r in read_metrics(tmp_path / "run") if r["step"] == 1 and "loss" in r)
    assert record["skipped"]
    assert record["loss"] is None


def test_a_report_counts_the_skipped_steps(data: Path, tmp_path: Path):
    run_with(tiny_run(data, tmp_path / "run"), poisoned({2}, 6))
    assert "6 of 6, 1 skipped by the guard" in write_report(tmp_path / "run").read_text()


def test_a_run_killed_before_its_first_checkpoint_starts_its_log_anew(data: Path, tmp_path: Path):
    config = tiny_run(data, tmp_path / "run")
    assert pretrain.pretrain(config) == 0
    for step in checkpoint.steps(tmp_path / "run"):
        (tmp_path / "run" / f"step-{step}").rename(tmp_path / f"lost-{step}")
    assert pretrain.pretrain(config) == 0
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "validation_loss" in r] == [0, 3, 6]


def test_a_step_that_is_not_applied_is_written_down_with_what_was_in_it(data: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    run_with(tiny_run(data, run, data={"record_samples": True}), poisoned({3}, 6))
    (event,) = [record for record in read_metrics(run) if "event" in record]
    assert (event["step"], event["first_sample"], event["last_sample"]) == (4, 36, 47)
    assert "GUARD: skip, step 4: not finite: " in (said := capsys.readouterr().out)
    assert "; samples 36 to 47 of the data order\n" in said
    lines = [json.loads(line) for line in (run / "samples" / "rank-00000.jsonl").read_text().splitlines()]
    assert [line["applied"] for line in lines] == [True, True, True, False, True, True]
    state_then = state.from_json(checkpoint.read_record(run / "step-6")["data"])
    order = Order(state_then)
    files, samples = order.resolve(np.arange(36, 48))
    expected = {(order.file_ids[f], s) for f, s in zip(files.tolist(), samples.tolist(), strict=True)}
    assert {(i, s) for i, found in lines[3]["samples"].items() for s in found} <= expected
    assert sum(map(len, lines[3]["samples"].values())) > 6


def test_what_is_trained_is_saved_if_the_run_cannot_read_on_after_a_request(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A request is taken up beside a file whose checksums, say, are damaged by now."""
    run = tmp_path / "run"
    with opened(tiny_run(data, run)) as (trainer, progress):
        requests.queue(run, {"kind": "skip", "num_steps": 1, "for_good": False})

        def fail(*_: object, **__: object) -> None:
            raise DataError("checksums that are none")

        monkeypatch.setattr(feed, "SampleReader", fail)
        with pytest.raises(DataError, match="checksums that are none"):
            train(trainer, progress)
    assert checkpoint.steps(run) == [3]
    monkeypatch.undo()
    with opened(tiny_run(data, run)) as (trainer, progress):
        assert (progress.step, progress.data.requests_taken) == (3, 1)
        assert train(trainer, progress).step == 6


def test_a_rollback_lets_go_of_the_model_before_it_makes_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two of them would not fit on a device that one of them fills."""
    made, build = [], assemble.build_model

    def build_watched(*arguments: Any) -> nn.Module:
        assert [model() for model in made] == [None] * len(made)
        made.append(weakref.ref(model := build(*arguments)))
        return model

    monkeypatch.setattr(assemble, "build_model", build_watched)
    inject = {"inject": ("nan:rank=0,step=5",)}
    config = tiny_run(data, tmp_path / "run", guard={"on_nonfinite": "rollback"}, debug=inject)
    assert pretrain.pretrain(config) == 0
    assert len(made) == 2


def test_a_run_goes_on_after_a_bad_step_and_stops_after_several_in_a_row(data: Path, tmp_path: Path):
    progress, _ = run_with(tiny_run(data, tmp_path / "one"), poisoned({2}, 6))
    assert progress.step == 6
    config = tiny_run(data, tmp_path / "many", guard={"max_in_a_row": 2, "max_rollbacks": 0})
    with pytest.raises(NotFiniteError, match="step 5: not finite.*step 2 in a row.*rolled back 0 times"):
        run_with(config, poisoned({3, 4}, 6))


def test_the_loss_falls_and_everything_a_person_looks_for_is_there(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = tiny_run(data, run, run={"num_steps": 40, "validate_every": 20}, optim={"max_grad_norm": 1.0})
    assert pretrain.pretrain(config) == 0
    records = read_metrics(run)
    steps = [record for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert [record["step"] for record in validations] == [0, 20, 40]
    assert validations[-1]["validation_loss"] < validations[0]["validation_loss"] - 1.5
    assert validations[-1]["validation_bits_per_byte"] < validations[0]["validation_bits_per_byte"]
    assert steps[-1]["tokens_seen"] == sum(12 * 32 for _ in steps) - short_targets(data, config, 40 * 12)
    report = (run / "report.html").read_text()
    assert "40 of 40, 0 skipped" in report
    assert "<svg" in report
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "tokenizer.json").is_file()


def short_targets(data: Path, config: RunConfig, num_positions: int) -> int:
    """Targets that the short last samples of shards lack among the first positions of the order."""
    import numpy as np

    from resume.order import Order

    newest = checkpoint.latest(Path(config.run.dir))
    assert newest is not None
    order = Order(state.from_json(checkpoint.read_record(newest)["data"]))
    files, samples = order.resolve(np.arange(num_positions))
    num_targets = {file.file_id: file.num_targets for file in open_data(config).training}
    ids = [order.file_ids[f] for f in files]
    return sum(32 - min(32, num_targets[i] - 32 * s) for i, s in zip(ids, samples.tolist(), strict=True))


def test_tensorboard_has_the_documented_tags(data: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert pretrain.pretrain(tiny_run(data, tmp_path / "run")) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "optim/learning_rate", "optim/grad_norm", "validation/bits_per_byte"} <= scalars
    assert "perf/mfu" not in scalars  # unknown on a CPU, so absent rather than guessed
    assert "run/config/text_summary" in events.Tags()["tensors"]


def test_resuming_drops_what_was_logged_after_the_checkpoint(data: Path, tmp_path: Path):
    config = tiny_run(data, tmp_path / "run")
    assert pretrain.pretrain(config) == 0
    whole = [record for record in read_metrics(tmp_path / "run") if "save_s" not in record]
    (tmp_path / "run" / "step-6").rename(tmp_path / "lost")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off by a kill
    assert pretrain.pretrain(config) == 0
    again = [record for record in read_metrics(tmp_path / "run") if "save_s" not in record]
    assert [record["step"] for record in again] == [record["step"] for record in whole]
    assert [r.get("loss") for r in again] == [r.get("loss") for r in whole]


def test_a_finished_run_started_again_has_nothing_to_do(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tiny_run(data, tmp_path / "run")
    assert pretrain.pretrain(config) == 0
    before = (tmp_path / "run" / "step-6" / "record.json").read_bytes()
    assert pretrain.pretrain(config) == 0
    assert (tmp_path / "run" / "step-6" / "record.json").read_bytes() == before
    assert "already at step 6 of 6" in capsys.readouterr().out


def test_old_checkpoints_are_deleted_beyond_those_to_keep(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert pretrain.pretrain(tiny_run(data, run, run={"save_every": 1, "keep_checkpoints": 2})) == 0
    assert checkpoint.steps(run) == [5, 6]
    assert not list(run.glob("*.del"))
    assert not list(run.glob("*.tmp"))


def test_isolated_documents_and_bf16_train_too(data: Path, tmp_path: Path):
    config = tiny_run(
        data, tmp_path / "run", run={"num_steps": 2}, data={"isolate_documents": True}, parallel={"precision": "bf16"}
    )
    assert pretrain.pretrain(config) == 0
    state = checkpoint.open_checkpoint(tmp_path / "run" / "step-2").read_tensors("")
    assert {value.dtype for value in state.values()} == {torch.float32}  # master weights and moments


def test_a_report_of_a_run_without_steps_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation_loss": 1.0}) + "\n")
    with pytest.raises(ValueError, match="no trained step"):
        write_report(tmp_path)

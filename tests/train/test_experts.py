"""Mixtures of experts in the loop: on ranks, under accumulation and recomputation, over stops, in the records."""

import dataclasses
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from evaluation.report import read_metrics, write_report
from model.balance import apply_counts, set_load
from model.config import ModelConfig
from model.convert import write_hugging_face
from model.moe_config import MoEConfig
from model.transformer import Transformer
from model.upcycle import UpcycleError
from resume import checkpoint
from tests.lives import lived
from tests.prepared import write_data
from tests.processes import run_ranks
from tests.runs import TINY, opened, tiny_run
from train import loop, pretrain
from train.config import RunConfig, with_values
from train.exits import BAD_CONFIG, DONE
from train.experts import StepRouting
from train.objectives import Outcome

MIXTURE = MoEConfig(num_experts=8, num_picked=2, expert_size=16, balance_weight=0.5, z_loss=0.1, bias_rate=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def mixture_run(folder: Path, run_folder: Path, moe: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    model: ModelConfig = dataclasses.replace(TINY, moe=dataclasses.replace(MIXTURE, **moe))
    return with_values(dataclasses.replace(tiny_run(folder, run_folder), model=model), **sections)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def first_gradients(config: RunConfig) -> dict[str, Tensor]:
    """What the first step computes on all ranks together: gradients, sums, and what becomes of the buffers."""
    with opened(config) as (trainer, _):
        shape = (len(config.model.expert_layers), config.model.moe.chain_length, config.model.moe.num_experts)
        set_load(trainer.model, torch.arange(shape[0] * shape[1] * shape[2]).view(shape) % 7)
        micro_batches = trainer.feed.next_step()
        routing = StepRouting.none(config.model, trainer.ranks.device)
        if config.model.moe.balance == "switch":
            loop._count_picks(trainer, micro_batches, step=1)
        loop.accumulate_gradients(trainer, micro_batches, loop.Counts(*[config.batch_tokens] * 3), 1, routing)
        total = routing.from_numbers(trainer.ranks.sum_all(routing.tensors()))
        found = {name: whole(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}
        assert found.keys() == dict(trainer.model.named_parameters()).keys()
        apply_counts(trainer.model, total.counts)
        found |= {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
        return found | {"counts": total.counts, "penalty": total.penalty_sum, "my counts": routing.counts}


def assert_equal_to(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        if name == "my counts":
            continue
        scale = value.abs().max().clamp(min=1e-30) if value.is_floating_point() else 1
        error = (found[name] - value).abs().max() / scale
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
@pytest.mark.parametrize(
    ("balance", "bias"), [("sequence", "sign"), ("switch", "proportional"), ("global", "none")], ids=str
)
def test_two_ranks_with_two_micro_batches_compute_what_one_process_does_at_once(
    data: Path, tmp_path: Path, balance: str, bias: str, recompute: Literal["nothing", "blocks"]
):
    moe = {"balance": balance, "bias": bias}
    alone = mixture_run(
        data, tmp_path / "alone", moe, parallel={"precision": "fp64"}, data={"micro_batch_sequences": 12}
    )
    expected = first_gradients(alone)
    assert expected["penalty"] > 0
    shared = with_values(
        alone,
        run={"dir": str(tmp_path / "shared")},
        parallel={"recompute": recompute},
        data={"micro_batch_sequences": 3},
    )
    for found in run_ranks(lambda _: first_gradients(shared), 2, tmp_path):
        assert torch.equal(found["counts"], expected["counts"])
        assert_equal_to(found, expected, 1e-12)


@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_that_are_empty_on_some_rank_hang_nothing_and_have_exact_gradients(
    data: Path, tmp_path: Path, world_size: int
):
    moe = {"num_experts": 64, "num_picked": 1, "balance": "sequence"}
    config = mixture_run(
        data, tmp_path / "run", moe, parallel={"precision": "fp64"}, data={"micro_batch_sequences": 12 // world_size}
    )
    expected = first_gradients(with_values(config, run={"dir": str(tmp_path / "alone")}))
    results = run_ranks(lambda _: first_gradients(config), world_size, tmp_path, timeout_s=60)
    picked = torch.stack([result["my counts"] > 0 for result in results])
    assert (picked.any(dim=0) & ~picked.all(dim=0)).any(), "each expert has tokens on all ranks or on none"
    assert not picked.any(dim=0).all(), "no expert is empty everywhere"
    for found in results:
        assert_equal_to(found, expected, 1e-12)


def test_more_ranks_than_experts_cut_inside_the_experts(data: Path, tmp_path: Path):
    moe = {"num_experts": 2, "num_picked": 1, "balance": "sequence"}
    config = mixture_run(data, tmp_path / "run", moe, parallel={"precision": "fp64"}, data={"micro_batch_sequences": 3})
    expected = first_gradients(with_values(config, run={"dir": str(tmp_path / "alone")}))

    def is_cut_inside(_: int) -> bool:
        with opened(config) as (trainer, _):
            parameters = dict(trainer.model.named_parameters())
            stacks = [parameters[f"blocks.0.moe.experts.{name}"] for name in ("gate_up", "down")]
            return all(isinstance(stack, DTensor) and stack.placements == (Shard(1),) for stack in stacks)

    assert all(run_ranks(is_cut_inside, 4, tmp_path))
    for found in run_ranks(lambda _: first_gradients(config), 4, tmp_path):
        assert_equal_to(found, expected, 1e-12)


@pytest.mark.parametrize(
    "moe",
    [
        {"kind": "chunk_soft", "chunk_size": 8, "z_loss": 0.0, "shared_size": 8},
        {"chain_length": 2, "chain_residual": "inner", "balance": "sequence", "first_dense_layers": 1},
        {"chain_length": 2, "balance": "switch", "sampling": True, "num_groups": 4, "num_picked_groups": 2},
    ],
    ids=str,
)
def test_every_kind_of_mixture_trains(data: Path, tmp_path: Path, moe: dict[str, Any]):
    config = mixture_run(data, tmp_path / "run", moe, parallel={"recompute": "blocks"}, optim={"max_grad_norm": 1.0})
    assert pretrain.pretrain(config) == 0
    losses = [r["validation_loss"] for r in read_metrics(tmp_path / "run") if "validation_loss" in r]
    assert losses[-1] < losses[0] - 0.1
    layers = [r["experts"]["layers"] for r in read_metrics(tmp_path / "run") if "experts" in r]
    assert layers == ([] if config.model.moe.kind == "chunk_soft" else [list(config.model.expert_layers)] * 6)


def tensors_of(run: Path) -> dict[str, Tensor]:
    newest = checkpoint.newest_valid(run, print)
    assert newest is not None
    return {**newest.read_tensors("model."), **newest.read_tensors("optim.")}


@pytest.mark.parametrize("balance", ["global", pytest.param("switch", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_went_on_has_the_bits_of_one_that_was_not(data: Path, tmp_path: Path, balance: str):
    moe = {"balance": balance, "bias": "sign", "sampling": True}
    straight = mixture_run(data, tmp_path / "straight", moe)
    assert lived(straight, 2).codes == [DONE] * 2
    killed = with_values(straight, run={"dir": str(tmp_path / "killed")})
    assert lived(with_values(killed, debug={"inject": ("kill:rank=1,step=5",)}), 2).codes[1] == -signal.SIGKILL
    assert checkpoint.steps(tmp_path / "killed") == [3]
    assert lived(killed, 2).codes == [DONE] * 2
    expected, found = tensors_of(tmp_path / "straight"), tensors_of(tmp_path / "killed")
    assert expected["blocks.1.moe.routers.0.bias"].abs().max() > 0
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_exact_runs_have_the_same_bits_on_one_rank_and_on_two(data: Path, tmp_path: Path):
    moe = {"balance": "switch", "bias": "proportional", "sampling": True, "shared_size": 8}
    config = mixture_run(data, tmp_path / "one", moe, parallel={"precision": "exact"})
    run_ranks(lambda _: pretrain.pretrain(config), 1, tmp_path)
    two = with_values(config, run={"dir": str(tmp_path / "two")})
    assert run_ranks(lambda _: pretrain.pretrain(two), 2, tmp_path) == [0, 0]
    expected, found = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_step_that_is_not_applied_moves_no_bias_and_no_load(data: Path, tmp_path: Path):
    config = mixture_run(data, tmp_path / "run", {"balance": "global", "bias": "sign"}, run={"num_steps": 1})
    with opened(config) as (trainer, progress):
        objective = trainer.objective_at(0)
        trainer.objective_at = lambda _: lambda *arguments: Outcome(objective(*arguments).loss_sum * torch.nan)
        before = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
        loop.train(trainer, progress)
        assert before
        assert all(torch.equal(buffer, before[name]) for name, buffer in trainer.model.named_buffers())


def test_what_the_experts_do_is_logged_and_reported(data: Path, tmp_path: Path):
    config = mixture_run(data, tmp_path / "run", {"balance": "sequence", "bias": "sign"})
    assert pretrain.pretrain(config) == 0
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    first, last = records[0]["experts"], records[-1]["experts"]
    assert all(len(first[name]) == 2 for name in ("max_violation", "dead", "would_drop", "entropy", "z"))
    assert first["penalty"] > 0
    assert first["bias_range"] != last["bias_range"]
    for shares in first["load"]:
        assert len(shares) == 8
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        busiest = max(shares) * 8 - 1
        assert first["max_violation"][first["load"].index(shares)] == pytest.approx(busiest, abs=1e-3)
    text = write_report(tmp_path / "run").read_text()
    assert " active" in text
    assert "<h2>Experts</h2>" in text
    assert "layer 1" in text


def test_the_logged_loss_is_without_the_penalty(data: Path, tmp_path: Path):
    losses = []
    for name, weight in (("with", 5.0), ("without", 0.0)):
        moe = {"balance": "sequence", "balance_weight": weight, "z_loss": 0.0}
        assert pretrain.pretrain(mixture_run(data, tmp_path / name, moe, run={"num_steps": 1})) == 0
        losses.append(next(r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r))
    assert losses[0] == losses[1]


def dense_folder(data: Path, folder: Path) -> tuple[Path, float]:
    """A trained dense model as others keep it, and its loss on the held-out text."""
    config = tiny_run(data, folder / "dense", run={"num_steps": 3})
    assert pretrain.pretrain(config) == 0
    losses = [r["validation_loss"] for r in read_metrics(folder / "dense") if "validation_loss" in r]
    newest = checkpoint.newest_valid(folder / "dense", print)
    assert newest is not None
    write_hugging_face(folder / "exported", config.model, newest.read_tensors("model."), eos_id=None, dtype="fp32")
    return folder / "exported", losses[-1]


def test_a_dense_model_goes_on_as_a_mixture_from_the_loss_that_it_had(data: Path, tmp_path: Path):
    folder, dense_loss = dense_folder(data, tmp_path)
    moe = {"num_experts": 4, "expert_size": 40, "balance": "global"}
    start = {"init_from": str(folder), "num_steps": 6}
    assert pretrain.pretrain(mixture_run(data, tmp_path / "mixture", moe, run=start)) == 0
    losses = [r["validation_loss"] for r in read_metrics(tmp_path / "mixture") if "validation_loss" in r]
    assert losses[0] == pytest.approx(dense_loss, rel=1e-6)
    assert losses[-1] < losses[0]


def test_a_mixture_that_cannot_start_as_the_dense_model_is_refused(data: Path, tmp_path: Path, capsys):
    folder, _ = dense_folder(data, tmp_path)
    config = mixture_run(data, tmp_path / "mixture", {"expert_size": 24}, run={"init_from": str(folder)})
    with pytest.raises(UpcycleError, match=r"model\.moe\.expert_size"):
        pretrain.pretrain(config)
    assert pretrain.exit_code(UpcycleError("")) == BAD_CONFIG


def test_a_dense_run_logs_nothing_of_experts(data: Path, tmp_path: Path):
    assert pretrain.pretrain(tiny_run(data, tmp_path / "run", run={"num_steps": 1})) == 0
    assert all("experts" not in record for record in read_metrics(tmp_path / "run"))
    assert "<h2>Experts</h2>" not in write_report(tmp_path / "run").read_text()


def test_under_bf16_routers_compute_with_fp32_weights(data: Path, tmp_path: Path):
    """What FSDP gathers for them; a bf16 router picks other experts."""

    def dtypes(_: int) -> dict[str, bool]:
        config = mixture_run(data, tmp_path / "run", {}, parallel={"precision": "bf16"})
        seen: dict[str, bool] = {}
        with opened(config) as (trainer, _):
            assert isinstance(trainer.model, Transformer)
            moe = trainer.model.blocks[0].moe  # pyright: ignore[reportAttributeAccessIssue]
            moe.routers[0].register_forward_hook(  # pyright: ignore[reportIndexIssue]
                lambda module, *_: seen.update(router=module.weight.dtype == torch.float32)
            )
            moe.experts.register_forward_hook(  # pyright: ignore[reportCallIssue]
                lambda module, *_: seen.update(experts=module.gate_up.dtype == torch.bfloat16)
            )
            trainer.model(torch.zeros(1, 4, dtype=torch.int64))
        return seen

    assert run_ranks(dtypes, 1, tmp_path) == [{"router": True, "experts": True}]

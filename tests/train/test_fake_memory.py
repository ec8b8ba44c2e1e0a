"""The memory that fake tensors say a step takes, beside what torch allocates, and beside the arithmetic."""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig
from model.lora_config import LoraConfig
from model.moe_config import MoEConfig
from model.transformer import Transformer
from tests.models import MOE_VARIANTS, VARIANTS
from train import fake_memory, plan
from train.config import DataSection, RunConfig, with_values
from train.fake_memory import StorageTracker, step_memory
from train.recipes import SftConfig

SMALL = ModelConfig(
    vocab_size=1_000, hidden_size=128, num_layers=4, num_heads=8, num_kv_heads=2, head_size=16, ffn_size=352
)


def run_of(model: ModelConfig = SMALL, length: int = 128, sequences: int = 4, **sections: dict[str, Any]) -> RunConfig:
    """Steps of two micro-batches on one device."""
    data = {"sequence_length": length, "micro_batch_sequences": sequences, "batch_sequences": 2 * sequences}
    return with_values(RunConfig(model=model, data=DataSection(**data)), **sections)


def allocated_bytes(function: Callable[[], object]) -> int:
    """The most that torch's allocator had given out at once, of what it gave inside the function."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        function()
    held, peak = 0, 0
    kineto = profiled.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted(kineto.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def real_step(config: RunConfig, tracker: StorageTracker) -> None:
    """A step of a model that is there."""
    model = Transformer(config.model)
    fake_memory.run_step(config, model, tracker, num_micro_batches=2)


@pytest.mark.parametrize(
    "model",
    [SMALL, VARIANTS["gemma2"], VARIANTS["llama tied"], ModelConfig.preset("smoke")],
    ids=["dense", "soft caps and windows", "tied", "smoke"],
)
def test_fake_tensors_say_what_torch_allocates(model: ModelConfig):
    config = run_of(model, length=64 if model.context_length < 128 else 128)
    said = sum(step_memory(config, "cpu", 1).values())
    assert said == pytest.approx(allocated_bytes(lambda: real_step(config, StorageTracker())), rel=0.03)


def test_the_tracker_counts_real_tensors_as_the_allocator_does():
    config = run_of()
    tracker = StorageTracker()
    with tracker:
        allocated = allocated_bytes(lambda: real_step(config, tracker))
    # What operators allocate and free inside is not seen: here the logits of the loss, and their log-probabilities.
    inside = 4 * 128 * 1_000 * (4 + 4)
    assert tracker.peak_bytes + inside == pytest.approx(allocated, rel=0.03)


def test_a_peak_is_told_by_what_its_storages_became():
    tracker = StorageTracker(lambda op, arguments: 10_000 if op.overloadpacket.__name__ == "neg" else 0)
    with tracker:
        weight = torch.zeros(100)
        tracker.name_living("weights")
        view = weight[:50]
        result = torch.neg(weight)
        tracker.name_living("activations")
        assert view.numel() == 50
        del result
        torch.zeros(200)
    assert tracker.peak_bytes == 400 + 400 + 10_000
    assert {kind: n for kind, n in tracker.peak_by_kind().items() if n} == {
        "weights": 400,
        "activations": 400,
        "temporary": 10_000,
    }
    assert tracker.alive_bytes == 400


def test_storages_that_were_made_empty_take_nothing():
    tracker = StorageTracker()
    with tracker:
        gathered = torch.zeros(1_000)
        gathered.untyped_storage().resize_(0)
        torch.zeros(10)
    assert (tracker.peak_bytes, tracker.alive_bytes) == (4_000, 0)


@pytest.mark.parametrize(
    ("config", "device_type", "world_size"),
    [
        (run_of(), "cpu", 1),
        (run_of(ModelConfig.preset("smoke"), 256, 8), "cuda", 8),
        (run_of(ModelConfig.preset("smoke"), 256, 8, parallel={"recompute": "cheap"}), "cuda", 2),
    ],
    ids=["one CPU", "eight GPUs", "recomputation"],
)
def test_the_arithmetic_and_fake_tensors_agree_within_a_sixth(config: RunConfig, device_type: str, world_size: int):
    estimate = plan.estimate_memory(config, device_type, world_size).total
    assert sum(step_memory(config, device_type, world_size).values()) == pytest.approx(estimate, rel=0.16)


def test_a_billion_parameters_are_planned_in_seconds_and_within_a_twentieth_of_the_arithmetic():
    config = with_values(RunConfig(), data={"micro_batch_sequences": 4})
    started_s = time.process_time()
    memory = step_memory(config, "cuda", 8)
    assert time.process_time() - started_s < 30
    estimate = plan.estimate_memory(config, "cuda", 8)
    assert sum(memory.values()) == pytest.approx(estimate.total, rel=0.05)
    assert memory["weights"] == pytest.approx(estimate.master_weights, rel=0.01)
    assert memory["moments"] == pytest.approx(estimate.moments, rel=0.01)
    assert memory["gathered weights"] == pytest.approx(estimate.gathered_weights, rel=0.01)
    assert memory["activations"] == pytest.approx(estimate.activations, rel=0.05)


def test_devices_share_weights_and_moments_but_not_activations():
    config = run_of(ModelConfig.preset("smoke"), 256, 8)
    one, eight = (step_memory(config, "cuda", n) for n in (1, 8))
    for kind in ("weights", "moments"):
        assert one[kind] == pytest.approx(8 * eight[kind], rel=0.02)
    assert eight["activations"] == pytest.approx(one["activations"], rel=0.05)


def test_gathered_weights_that_are_freed_again_are_not_at_the_peak():
    config = run_of(ModelConfig.preset("smoke"), 256, 8)
    kept, freed = (
        step_memory(with_values(config, parallel={"reshard_after_forward": choice}), "cuda", 2)
        for choice in ("off", "on")
    )
    assert freed["gathered weights"] < kept["gathered weights"]


def test_what_is_computed_again_is_not_kept():
    config = run_of(ModelConfig.preset("smoke"), 256, 8)
    nothing, cheap, blocks = (
        step_memory(with_values(config, parallel={"recompute": choice}), "cuda", 1)["activations"]
        for choice in ("nothing", "cheap", "blocks")
    )
    assert blocks < cheap < nothing


@pytest.mark.parametrize("name", ["deepseek-v3", "chunk soft", "chain both", "gemma2"])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_kind_of_model_can_be_planned(name: str, device_type: str):
    config = run_of((VARIANTS | MOE_VARIANTS)[name], 64)
    memory = step_memory(config, device_type, 2)
    assert memory["weights"] > 0
    assert memory["activations"] > 0


def test_no_scores_are_held_for_a_gpu_whatever_the_mask_and_widths():
    latent = VARIANTS["latent"]
    short, long = (sum(step_memory(run_of(latent, length, 64 // length), "cuda", 1).values()) for length in (16, 64))
    assert long == pytest.approx(short, rel=0.02)  # of as many tokens


def test_rows_of_experts_are_counted_inside_their_operator():
    moe = MoEConfig(num_experts=4, expert_size=256, num_picked=2)
    config = run_of(ModelConfig.preset("smoke"), 128, 4)
    wide = with_values(config, model={"moe": moe})
    assert step_memory(wide, "cuda", 1)["temporary"] > 2 * 512 * (2 * 256 + 256) * 2


def test_adapters_alone_have_moments_and_gradients():
    data = {"sequence_length": 128, "micro_batch_sequences": 4, "batch_sequences": 8}
    whole = with_values(SftConfig(model=SMALL), data=data)
    adapted = with_values(whole, lora={"rank": 4})
    assert isinstance(adapted.lora, LoraConfig)
    assert step_memory(adapted, "cpu", 1)["moments"] < 0.1 * step_memory(whole, "cpu", 1)["moments"]


def test_a_plan_leaves_the_process_as_it_was():
    from kernels import launch

    interpreted = launch.INTERPRETED
    step_memory(run_of(), "cuda", 2)
    assert not torch.distributed.is_initialized()
    assert (launch.INTERPRETED, launch.chosen("moe")) == (interpreted, "auto")

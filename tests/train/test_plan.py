import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from data_prep.config_file import ConfigError
from kernels.cross_entropy import cross_entropy_sum
from model.config import LatentConfig, ModelConfig
from model.moe_config import MoEConfig
from model.transformer import Transformer, logits
from tests.runs import tiny_run
from train import plan, pretrain
from train.config import ParallelSection, RunConfig, with_values
from train.sharding import reshards_after_forward


def saved_bytes(model: Transformer, batch: int, length: int) -> int:
    """Bytes of distinct memory that a forward keeps for its backward, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, model.config.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, readout=lambda hidden, head: cross_entropy_sum(logits(hidden, head), tokens))
    del loss
    return sum(kept.values())


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_the_estimate_of_activations_is_what_autograd_keeps(qk_norm: Literal["none", "head"]):
    config = ModelConfig(
        vocab_size=500, hidden_size=128, num_layers=4, num_heads=8, num_kv_heads=2, head_size=16, ffn_size=352,
        qk_norm=qk_norm,
    )  # fmt: skip
    batch, length = 2, 64
    found = saved_bytes(Transformer(config), batch, length)
    run = with_values(
        RunConfig(model=config),
        data={"sequence_length": length, "micro_batch_sequences": batch, "batch_sequences": batch},
    )
    memory = plan.estimate_memory(run, "cpu", 1)
    log_softmax = batch * length * 500 * 4
    assert found == pytest.approx(memory.activations + log_softmax, rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": MoEConfig(num_experts=8, num_picked=2, expert_size=96, shared_size=64)},
        {"attention_softcap": 30.0},
        {"num_kv_heads": 8, "latent": LatentConfig(kv_rank=64, query_rank=48, rope_size=8, value_size=16)},
    ],
    ids=str,
)
def test_the_estimate_is_close_for_other_kinds_of_layers(changes: dict[str, Any]):
    config = ModelConfig(
        vocab_size=500, hidden_size=128, num_layers=4, num_heads=8, num_kv_heads=2, head_size=16, ffn_size=352,
    )  # fmt: skip
    config = dataclasses.replace(config, **changes)
    batch, length = 2, 128
    run = with_values(
        RunConfig(model=config),
        data={"sequence_length": length, "micro_batch_sequences": batch, "batch_sequences": batch},
    )
    found = saved_bytes(Transformer(config), batch, length)
    estimate = plan.estimate_memory(run, "cpu", 1).activations + batch * length * 500 * 4
    assert found == pytest.approx(estimate, rel=0.1)


def test_memory_per_device_falls_with_the_number_of_devices():
    config = RunConfig()
    one, eight = (plan.estimate_memory(config, "cuda", n) for n in (1, 8))
    assert eight.moments * 8 == pytest.approx(one.moments, rel=1e-6)
    assert one.moments == 8 * 1_100_048_384
    recomputed = with_values(config, parallel={"recompute": "blocks"})
    assert plan.estimate_memory(recomputed, "cuda", 8).activations < eight.activations / 8


def test_what_is_recomputed_leaves_less_to_keep():
    config = RunConfig()
    nothing, cheap, blocks = (
        plan.estimate_memory(with_values(config, parallel={"recompute": choice}), "cuda", 8).activations
        for choice in ("nothing", "cheap", "blocks")
    )
    assert blocks < cheap < nothing
    # Of 29,696 numbers a token stay the stream, q, k, v, attention's result and its projection, gate and up: 19,968;
    # and of the block that is being run again, all.
    assert cheap / nothing == pytest.approx((22 * 19_968 + 29_696) / (22 * 29_696), rel=0.01)


def test_whole_logits_take_more_than_chunks_of_them():
    chunked, whole = (
        plan.estimate_memory(with_values(RunConfig(), kernels={"linear_cross_entropy": choice}), "cuda", 8).loss
        for choice in ("chunked", "whole")
    )
    assert whole - chunked == pytest.approx(0.75 * 16 * 2_048 * 32_000 * 2)  # a chunk is a quarter of the rows


@pytest.mark.parametrize(
    ("choice", "num_layers", "device_bytes", "expected"),
    [
        ("auto", 22, 80e9, False),  # 2.2 GB of bf16 weights
        ("auto", 220, 80e9, True),  # 20 GB
        ("auto", 220, None, False),
        ("on", 22, 80e9, True),
        ("off", 220, 80e9, False),
    ],
)
def test_gathered_weights_are_freed_where_they_would_fill_the_device(choice, num_layers, device_bytes, expected):
    model = dataclasses.replace(ModelConfig(), num_layers=num_layers)
    parallel = ParallelSection(reshard_after_forward=choice)
    assert reshards_after_forward(model, parallel, torch.bfloat16, device_bytes) is expected


def test_a_checkpoint_has_the_size_the_plan_says(tmp_path: Path):
    from tests.prepared import write_data

    config = tiny_run(write_data(tmp_path / "data"), tmp_path / "run", run={"num_steps": 1})
    assert pretrain.pretrain(config) == 0
    size = (tmp_path / "run" / "step-1" / "rank-00000.safetensors").stat().st_size
    expected = plan.checkpoint_bytes(config.model, torch.float32)
    assert size == pytest.approx(expected, rel=0.15)  # the header's share shrinks with the model


def test_what_is_probably_not_meant_is_noted(tmp_path: Path):
    from data_prep.manifest import read_manifest
    from tests.prepared import write_data

    manifest = read_manifest(write_data(tmp_path / "data"))
    config = tiny_run(tmp_path / "data", tmp_path / "run", optim={"warmup_steps": 6}, run={"num_steps": 6})
    wide = with_values(config, model={"vocab_size": 1000}, run={"num_steps": 2000})
    assert plan.notes(with_values(config, optim={"warmup_steps": 2}), manifest, 1) == []
    assert "never reaches its peak" in plan.notes(config, manifest, 1)[0]
    assert [note.split(" ")[0] for note in plan.notes(wide, manifest, 1)] == ["model.vocab_size", "the"]


def test_what_cannot_fit_is_said_before_anything_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_run(tmp_path / "nowhere", tmp_path / "run")
    monkeypatch.setattr(plan, "device_memory_bytes", lambda *_: 100_000)
    with pytest.raises(ConfigError, match=r"needs about .* lower --data\.micro-batch-sequences \(now 2\)"):
        plan.refuse_impossible(config, "cpu", 1, 1)


@pytest.mark.parametrize(
    ("num_held", "num_to_come"),
    [(0, 4), (2, 2), (3, 1), (7, 1)],
    ids=["none yet", "two", "as many as are kept", "some of them for ever"],
)
def test_a_disk_too_small_for_the_checkpoints_to_come_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_held: int, num_to_come: int
):
    run = {"num_steps": 90, "save_every": 9, "keep_checkpoints": 3}
    config = tiny_run(tmp_path / "nowhere", tmp_path / "run", run=run)
    for number in range(num_held):
        (tmp_path / "run" / f"step-{9 * number + 9}").mkdir(parents=True)
    needed = num_to_come * plan.checkpoint_bytes(config.model, torch.float32)

    def refuse(free: int) -> None:
        usage = shutil._ntuple_diskusage(free, 0, free)  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        plan.refuse_impossible(config, "cpu", 1, 1)

    refuse(needed)
    with pytest.raises(ConfigError, match=f"free, the {num_to_come} checkpoints to come need"):
        refuse(needed - 1)

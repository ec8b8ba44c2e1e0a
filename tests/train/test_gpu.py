"""What only a GPU can show of a run: bf16 beside fp32 masters, compiled blocks, the Triton kernels inside them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.step import make_trainer
from evaluation.report import read_metrics
from model.balance import apply_counts
from model.batch import collate
from model.config import LatentConfig, ModelConfig
from model.moe_config import MoEConfig
from resume import checkpoint
from tests.prepared import write_data
from tests.runs import TINY, tiny_run
from train import pretrain, ranks
from train.config import RunConfig
from train.experts import StepRouting, keeps_books
from train.loop import Counts, accumulate_gradients

pytestmark = pytest.mark.gpu

MODEL = dataclasses.replace(TINY, hidden_size=128, head_size=32, ffn_size=256)


MIXTURE = dataclasses.replace(
    MODEL, moe=MoEConfig(num_experts=8, num_picked=2, expert_size=64, balance="sequence", bias="sign", z_loss=1e-3)
)
LATENT = dataclasses.replace(
    MIXTURE,
    num_kv_heads=4,
    latent=LatentConfig(kv_rank=64, query_rank=64, rope_size=16, value_size=32),
    moe=dataclasses.replace(MIXTURE.moe, scores="sigmoid", shared_size=64, first_dense_layers=1, balance="global"),
)


def gpu_run(data: Path, run: Path, **sections) -> RunConfig:
    config = tiny_run(data, run, run={"num_steps": 40}, optim={"max_grad_norm": 1.0}, parallel={"device": "cuda"})
    sections["parallel"] = {"device": "cuda", **sections.get("parallel", {})}
    config = dataclasses.replace(config, model=sections.pop("model", MODEL))
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"parallel": {"compile": "off"}},
        {"data": {"isolate_documents": True}},
        {"parallel": {"recompute": "cheap"}},
        {"model": MIXTURE},
        {"model": MIXTURE, "parallel": {"recompute": "blocks"}},
        {"model": LATENT, "parallel": {"recompute": "cheap"}},
    ],
    ids=str,
)
def test_a_run_on_a_gpu_learns_and_keeps_fp32_masters(tmp_path: Path, sections: dict):
    data = write_data(tmp_path / "data")
    torch._dynamo.reset()
    counters.clear()
    assert pretrain.pretrain(gpu_run(data, tmp_path / "run", **sections)) == 0
    assert not counters["graph_break"]
    # The first block, which has nothing to add, and the others, each in training and in validation; dense and with
    # experts.
    assert counters["stats"]["unique_graphs"] <= 6
    validations = [r["validation_loss"] for r in read_metrics(tmp_path / "run") if "validation_loss" in r]
    assert validations[-1] < validations[0] - 1.5
    state = checkpoint.open_checkpoint(tmp_path / "run" / "step-40").read_tensors("")
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.filterwarnings("default")
def test_a_run_on_a_gpu_resumes_where_it_was(tmp_path: Path):
    data = write_data(tmp_path / "data")
    config = gpu_run(data, tmp_path / "run", run={"num_steps": 8, "save_every": 4})
    assert pretrain.pretrain(config) == 0
    whole = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    (tmp_path / "run" / "step-8").rename(tmp_path / "lost")
    assert pretrain.pretrain(config) == 0
    again = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert len(again) == len(whole) == 8
    torch.testing.assert_close(torch.tensor(again), torch.tensor(whole), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model", [MODEL, MIXTURE, LATENT], ids=["dense", "mixture", "latent mixture"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_a_micro_step_never_waits_for_the_device(tmp_path: Path, compile: str, model: ModelConfig):
    config = gpu_run(tmp_path / "nowhere", tmp_path / "run", model=model, parallel={"compile": compile})
    # Two samples, one of them short, so that its padding has to be told apart on the device.
    rows = collate([torch.arange(33).numpy(), torch.arange(20).numpy()], 32, eos_id=0)
    rows = dataclasses.replace(rows, tokens=rows.tokens.pin_memory())
    trainer = make_trainer(config, ranks.start("cuda"))
    try:
        routing = StepRouting.none(model, trainer.ranks.device) if keeps_books(model) else None
        for _ in range(2):  # compiles, allocates, gathers
            accumulate_gradients(trainer, [rows, rows], Counts(100, 100, 100), step=1, routing=routing)
        counts = routing.counts.cpu() if routing is not None else None
        torch.cuda.set_sync_debug_mode("error")
        outcome = accumulate_gradients(trainer, [rows, rows], Counts(100, 100, 100), step=1, routing=routing)
        if counts is not None:
            apply_counts(trainer.model, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        ranks.stop()
    assert outcome.loss_sum.item() > 0

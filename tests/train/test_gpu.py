"""What only a GPU can show of a run: bf16 beside fp32 masters, compiled blocks, the Triton kernels inside them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.step import make_trainer
from evaluation.report import read_metrics
from model.batch import collate
from resume import checkpoint
from tests.prepared import write_data
from tests.runs import TINY, tiny_run
from train import pretrain, ranks
from train.config import RunConfig
from train.loop import accumulate_gradients

pytestmark = pytest.mark.gpu

MODEL = dataclasses.replace(TINY, hidden_size=128, head_size=32, ffn_size=256)


def gpu_run(data: Path, run: Path, **sections) -> RunConfig:
    config = tiny_run(data, run, run={"num_steps": 40}, optim={"max_grad_norm": 1.0}, parallel={"device": "cuda"})
    sections["parallel"] = {"device": "cuda", **sections.get("parallel", {})}
    config = dataclasses.replace(config, model=MODEL)
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
    ],
    ids=str,
)
def test_a_run_on_a_gpu_learns_and_keeps_fp32_masters(tmp_path: Path, sections: dict):
    data = write_data(tmp_path / "data")
    torch._dynamo.reset()
    counters.clear()
    assert pretrain.pretrain(gpu_run(data, tmp_path / "run", **sections)) == 0
    assert not counters["graph_break"]
    # The first block, which has nothing to add, and the others, each in training and in validation.
    assert counters["stats"]["unique_graphs"] <= 4
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
@pytest.mark.parametrize("compile", ["on", "off"])
def test_a_micro_step_never_waits_for_the_device(tmp_path: Path, compile: str):
    config = gpu_run(tmp_path / "nowhere", tmp_path / "run", parallel={"compile": compile})
    # Two samples, one of them short, so that its padding has to be told apart on the device.
    rows = collate([torch.arange(33).numpy(), torch.arange(20).numpy()], 32, eos_id=0)
    rows = dataclasses.replace(rows, tokens=rows.tokens.pin_memory())
    trainer = make_trainer(config, ranks.start("cuda"))
    try:
        for _ in range(2):  # compiles, allocates, gathers
            accumulate_gradients(trainer, [rows, rows], divisor=100, step=1)
        torch.cuda.set_sync_debug_mode("error")
        loss_sum = accumulate_gradients(trainer, [rows, rows], divisor=100, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        ranks.stop()
    assert loss_sum.item() > 0

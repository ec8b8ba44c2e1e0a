"""Our kernels in the real loop: interpreted, they train what torch's operators train."""

from pathlib import Path

import pytest
import torch

from evaluation.report import read_metrics
from kernels import launch
from resume import checkpoint
from tests.conftest import INTERPRETER_IS_THERE
from tests.prepared import write_data
from tests.runs import tiny_run
from train import pretrain
from train.config import RunConfig, with_values

OPS = ("rms_norm", "rope", "swiglu", "cross_entropy")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("kernels") / "data")


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETER_IS_THERE:
        pytest.skip("kernels are compiled, CPU tensors need them interpreted")
    monkeypatch.setattr(launch, "INTERPRETED", True)


def trained(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run, and its last weights."""
    assert pretrain.pretrain(config) == 0
    run = Path(config.run.dir)
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record]
    return losses, dict(checkpoint.open_checkpoint(run / f"step-{config.run.num_steps}").read_tensors("model."))


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(
    "model",
    [pytest.param({}, marks=pytest.mark.slow), {"qk_norm": "head", "qkv_bias": True, "tie_embeddings": True}],
    ids=str,
)
def test_a_run_with_kernels_is_the_run_without_them_to_fp32_rounding(data: Path, tmp_path: Path, model: dict):
    short = {"num_steps": 4, "save_every": 4, "validate_every": 4}
    small = {"batch_sequences": 3, "micro_batch_sequences": 2, "validation_sequences": 2}
    ours = with_values(tiny_run(data, tmp_path / "kernels", run=short, data=small), model=model)
    theirs = with_values(ours, run={"dir": str(tmp_path / "torch")}, kernels=dict.fromkeys(OPS, "torch"))
    (found_losses, found), (expected_losses, expected) = trained(ours), trained(theirs)
    assert found_losses == pytest.approx(expected_losses, rel=2e-6)
    assert any(not torch.equal(found[name], value) for name, value in expected.items())  # else nothing was tried
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_kernel_that_cannot_run_here_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = with_values(tiny_run(data, tmp_path / "run"), kernels={"swiglu": "triton"})
    with pytest.raises(launch.KernelError, match='kernels.swiglu = "triton", but the tensors are on the cpu') as caught:
        pretrain.pretrain(config)
    assert pretrain.exit_code(caught.value) == 78


@pytest.mark.filterwarnings("default")  # torchao's own
def test_a_float8_run_learns_and_its_checkpoint_is_an_ordinary_one(data: Path, tmp_path: Path):
    sizes = {"hidden_size": 32, "head_size": 16, "ffn_size": 64}
    plain = with_values(tiny_run(data, tmp_path / "fp32", run={"num_steps": 12}), model=sizes)
    float8 = with_values(plain, run={"dir": str(tmp_path / "float8")}, parallel={"float8": True})
    (found_losses, found), (expected_losses, expected) = trained(float8), trained(plain)
    assert found_losses[-1] < found_losses[0] - 0.3
    assert found_losses == pytest.approx(expected_losses, rel=0.02)
    assert found_losses != expected_losses
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }


def test_sizes_that_float8_cannot_multiply_are_refused(data: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"blocks.0.attention.qkv is \(48, 24\); float8 products want multiples of 16"):
        pretrain.pretrain(tiny_run(data, tmp_path / "run", parallel={"float8": True}))

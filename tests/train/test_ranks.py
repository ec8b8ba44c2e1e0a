"""Several real processes train to the weights of one; accumulation and resuming do not change them either."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.report import read_metrics
from resume import checkpoint, tensor_file
from tests.prepared import write_data
from tests.processes import run_ranks
from tests.records import save
from tests.runs import tiny_run
from train import pretrain
from train.config import RunConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def config(data_folder: Path, run_folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """With exact sums of gradients, so that the bits do not depend on the number of ranks; for twelve steps."""
    sections["run"] = {"num_steps": 12, "save_every": 6, "validate_every": 100, **sections.get("run", {})}
    sections["parallel"] = {"precision": "exact", **sections.get("parallel", {})}
    return tiny_run(data_folder, run_folder, **sections)


def trained(config: RunConfig, world_size: int, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after a run on real processes."""
    folder.mkdir(exist_ok=True)
    codes = run_ranks(lambda rank: pretrain.pretrain(config), world_size, folder)
    assert codes == [0] * world_size
    newest = checkpoint.latest(Path(config.run.dir))
    assert newest is not None
    assert newest.name == f"step-{config.run.num_steps}"
    return checkpoint.open_checkpoint(newest).read_tensors("model.")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


Alone = Callable[[int], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The weights of one rank after so many steps."""

    @functools.cache
    def after(num_steps: int) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("alone")
        return trained(config(data, folder / "run", run={"num_steps": num_steps}), 1, folder)

    return after


@pytest.mark.parametrize("num_steps", [12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (6, {}),
        (2, {"parallel": {"reshard_after_forward": "on", "recompute": "blocks"}}),
        (2, {"parallel": {"replicas": 2}}),
        (4, {"parallel": {"replicas": 2}}),
    ],
    ids=[
        "two",
        "three, uneven shards",
        "four",
        "six",
        "two, resharding and recomputing",
        "two replicas",
        "two replicas of two shards",
    ],
)
def test_several_ranks_train_to_the_weights_of_one_bit_for_bit(
    data: Path, alone: Alone, tmp_path: Path, world_size: int, sections: dict[str, Any], num_steps: int
):
    several = config(data, tmp_path / "run", run={"num_steps": num_steps}, **sections)
    assert largest_difference(trained(several, world_size, tmp_path), alone(num_steps)) == 0


@pytest.mark.parametrize("num_steps", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_losses_in_bf16_hardly_depend_on_the_number_of_ranks(data: Path, tmp_path: Path, num_steps: int):
    """Products are rounded to bf16, sums over ranks to fp32."""

    def losses(world_size: int, replicas: int = 1) -> list[float]:
        folder = tmp_path / f"{world_size}-{replicas}"
        in_bf16 = {"precision": "bf16", "replicas": replicas}
        trained(config(data, folder / "run", run={"num_steps": num_steps}, parallel=in_bf16), world_size, folder)
        return [record["loss"] for record in read_metrics(folder / "run") if "loss" in record]

    one, two, replicated = losses(1), losses(2), losses(2, replicas=2)
    assert len(one) == num_steps
    assert two == pytest.approx(one, abs=1e-5)
    assert replicated == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_another_split_into_micro_batches_gives_the_same_weights(data: Path, tmp_path: Path, micro_batch: int):
    """In fp64: products of matrices of another shape are rounded otherwise."""

    def run_with(num_sequences: int) -> dict[str, torch.Tensor]:
        sections = {"data": {"micro_batch_sequences": num_sequences}, "parallel": {"precision": "fp64"}}
        folder = tmp_path / str(num_sequences)
        return trained(tiny_run(data, folder / "run", **sections), 1, folder)

    assert largest_difference(run_with(micro_batch), run_with(2)) < 1e-12


@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 2)])
def test_a_run_resumed_on_another_number_of_ranks_ends_at_the_same_weights(
    data: Path, alone: Alone, tmp_path: Path, before: int, after: int
):
    whole = config(data, tmp_path / "run")
    trained(whole, before, tmp_path)
    # As if the first life had been killed after its checkpoint at step 6.
    (tmp_path / "run" / "step-12").rename(tmp_path / "lost")
    resumed = trained(whole, after, tmp_path / "again")
    assert largest_difference(resumed, alone(12)) == 0


def test_a_run_resumed_on_as_many_ranks_equals_the_uninterrupted_one_bit_for_bit(data: Path, tmp_path: Path):
    whole = tiny_run(data, tmp_path / "run")
    before = trained(whole, 2, tmp_path)
    (tmp_path / "run" / "step-6").rename(tmp_path / "lost")
    after = trained(whole, 2, tmp_path / "again")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "other", [{"optim": {"beta2": 0.5}}, {"data": {"paths": ("elsewhere",)}}], ids=["flags", "data"]
)
def test_ranks_that_were_told_different_things_refuse_to_train(data: Path, tmp_path: Path, other: dict):
    elsewhere = write_data(tmp_path / "elsewhere", num_held_out=20)
    if "data" in other:
        other = {"data": {"paths": (str(elsewhere),)}}
    configs = [config(data, tmp_path / "run"), config(data, tmp_path / "run", **other)]

    def refused(rank: int) -> str:
        try:
            pretrain.pretrain(configs[rank])
        except ValueError as error:
            return str(error)
        return "trained"

    assert all("the 2 processes disagree" in message for message in run_ranks(refused, 2, tmp_path))


def test_a_rank_that_fails_to_write_makes_all_fail_and_publishes_nothing(data: Path, tmp_path: Path):
    def fail_on_rank_one(rank: int) -> str:
        from train import ranks

        this = ranks.start("cpu")
        real = tensor_file.write
        if this.rank == 1:
            tensor_file.write = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        tensors = {"a": torch.nn.Parameter(torch.ones(4, 2))}
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        tensors = {"a": distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])}
        try:
            save(tmp_path / "run", 1, tensors, {}, "", keep=1)
        except checkpoint.CheckpointError as error:
            return str(error)
        finally:
            tensor_file.write = real
        return "no error"

    messages = run_ranks(fail_on_rank_one, 2, tmp_path)
    assert all("No space left on device" in message and "(rank 1)" in message for message in messages)
    assert checkpoint.latest(tmp_path / "run") is None

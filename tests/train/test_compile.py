"""torch.compile of the blocks: the same training, one compilation, whole graphs."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from evaluation.report import read_metrics
from tests.prepared import write_data
from tests.processes import run_ranks
from tests.runs import tiny_run
from train import pretrain
from train.config import with_values


def compiled_run(config) -> tuple[int, int]:
    """Graphs compiled and breaks met by a whole run."""
    counters.clear()
    assert pretrain.pretrain(config) == 0
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("recompute", ["nothing", "cheap", "blocks"])
def test_compiled_blocks_train_alike_with_few_graphs_and_no_breaks(tmp_path: Path, world_size: int, recompute: str):
    data = write_data(tmp_path / "data")
    sections = {"data": {"isolate_documents": recompute == "blocks"}, "parallel": {"recompute": recompute}}
    eager = tiny_run(data, tmp_path / "eager", **sections)
    compiled = with_values(tiny_run(data, tmp_path / "compiled", **sections), parallel={"compile": "on"})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run_ranks(lambda rank: pretrain.pretrain(eager), world_size, tmp_path / "a")
    counts = run_ranks(lambda rank: compiled_run(compiled), world_size, tmp_path / "b", timeout_s=280)
    losses = [[r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("eager", "compiled")]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=1e-5)
    for num_graphs, num_breaks in counts:
        assert num_breaks == 0
        # The first block, which has nothing to add, and the others, each in training and in validation.
        assert num_graphs <= 4

from pathlib import Path

import pytest

from data_prep.config_file import load
from train import demo
from train.config import RunConfig


@pytest.mark.parametrize("num_gpus", range(10))
def test_the_demo_s_batch_splits_over_however_many_gpus_there_are(num_gpus: int):
    command = demo.train_command("train/pretrain.py", demo.CONFIG, num_gpus)
    config = load(Path(demo.CONFIG), RunConfig)
    launched = [part for part in command if part.startswith("--nproc_per_node=")]
    num_ranks = int(launched[0].split("=")[1]) if launched else 1
    assert num_ranks <= max(1, num_gpus)
    micro_batch = int(command[-1]) if launched else config.data.micro_batch_sequences
    assert config.data.batch_sequences % (num_ranks * micro_batch) == 0

"""Trains a model that scores answers, from pairs of a chosen and a rejected one.

    python -m data_prep prepare-chat pairs.jsonl --kind pairs --output data/pairs --tokenizer runs/sft
    torchrun --nproc_per_node=8 train/reward.py [configs/reward.toml] --run.init-from runs/sft [--section.key value ...]

The head of the model becomes a single score. All else is as in train/sft.py.
"""

import faulthandler
import sys

from train.pretrain import main
from train.recipes import RewardConfig

if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(None, RewardConfig, "train/reward.py", __doc__))

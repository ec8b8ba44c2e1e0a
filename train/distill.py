"""Trains a model on what a larger one predicts, on text or on conversations.

    torchrun --nproc_per_node=8 train/distill.py [CONFIG.toml] --run.init-from runs/small --distill.teacher runs/1b

The teacher has the same vocabulary; `python -m train.teacher_cache` writes what it says beside the shards once, for
--distill.cached. All else is as in train/sft.py.
"""

import faulthandler
import sys

from train.pretrain import main
from train.recipes import DistillConfig

if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(None, DistillConfig, "train/distill.py", __doc__))

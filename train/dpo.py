"""Trains a model to prefer the chosen of two answers (DPO, IPO).

    python -m data_prep prepare-chat pairs.jsonl --kind pairs --output data/pairs --tokenizer runs/sft
    torchrun --nproc_per_node=8 train/dpo.py [configs/dpo.toml] --run.init-from runs/sft [--section.key value ...]

What the model thinks of the answers before it is trained is computed once, and kept beside the shards: one model is in
memory. That the likelihood of chosen answers falls is normal while the margin grows; stop when answers get longer.
All else is as in train/sft.py.
"""

import faulthandler
import sys

from train.pretrain import main
from train.recipes import DpoConfig

if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(None, DpoConfig, "train/dpo.py", __doc__))

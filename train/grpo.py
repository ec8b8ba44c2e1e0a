"""Trains a model on its own answers, with a reward function in Python (GRPO).

    python -m data_prep prepare-chat prompts.jsonl --kind prompts --output data/prompts --tokenizer runs/sft
    torchrun --nproc_per_node=8 train/grpo.py [CONFIG.toml] --run.init-from runs/sft --grpo.reward reward.py:reward

reward(prompt, text, row) -> float gets the prompt's and the answer's text and the line of the input file that the
prompt comes from. All else is as in train/sft.py.
"""

import faulthandler
import sys

from train.pretrain import main
from train.recipes import GrpoConfig

if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(None, GrpoConfig, "train/grpo.py", __doc__))

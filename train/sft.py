"""Fine-tunes a model on conversations: only what the assistant says is trained.

    python -m data_prep prepare-chat chat.jsonl --output data/chat --tokenizer runs/1b
    torchrun --nproc_per_node=8 train/sft.py [configs/sft.toml] --run.init-from runs/1b [--section.key value ...]

The model's shape is that of run.init_from, data.sequence_length that of the prepared rows. All else is as in
train/pretrain.py: checkpoints, resume, appended data, exit codes.
"""

import faulthandler
import sys

from train.pretrain import main
from train.recipes import SftConfig

if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main(None, SftConfig, "train/sft.py", __doc__))

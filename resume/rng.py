"""Randomness without state: every step seeds the generators from the run's seed and the step's number.

What a step draws then depends on nothing that a checkpoint would have to carry per rank, so a run may be resumed at any
step and on any number of ranks. The order of samples has its own keys (resume/order.py), initial weights theirs
(model/init.py).
"""

import hashlib
import random
from typing import Any

import numpy as np
import torch

SCHEME = "blake2b-step-v1"


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for everything drawn inside one optimizer step."""
    digest = hashlib.blake2b(f"step|{seed}|{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_step(seed: int, step: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (all devices) for one optimizer step."""
    value = step_seed(seed, step)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)


def record(seed: int) -> dict[str, Any]:
    """What a checkpoint stores of the generators."""
    return {"scheme": SCHEME, "seed": seed}

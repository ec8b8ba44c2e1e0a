"""Initial weights. Each parameter's values depend on the seed and its own name alone: not on the order of
construction, the device, or the number of ranks that hold a piece of it.

gpt2       N(0, std); the matrices that write to the residual stream (attention.out, mlp.down) N(0, std / sqrt(2 L)).
           Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
tinyllama  N(0, sqrt(2 / (5 D))); residual matrices N(0, 1 / (sqrt(D) L)).
           Source: Zhang et al., "TinyLlama", 2024 (GPT-NeoX's small init and wang init; lit_gpt/model.py).
"""

import hashlib
import math

import torch
from torch import Tensor

from model.config import ModelConfig

_RESIDUAL_MATRICES = ("attention.out.weight", "mlp.down.weight")


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole initial fp32 tensor of one parameter, on the CPU: ones for norms, zeros for biases, else normal."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"init|{seed}|{name}".encode(), digest_size=8).digest()
    # 63 bits: torch.Generator takes a signed seed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * standard_deviation(config, name)


def standard_deviation(config: ModelConfig, name: str) -> float:
    """Of the normal distribution that the matrix `name` is drawn from."""
    is_residual = name.endswith(_RESIDUAL_MATRICES)
    if config.init == "gpt2":
        return config.init_std / math.sqrt(2 * config.num_layers) if is_residual else config.init_std
    if is_residual:
        return 1 / (math.sqrt(config.hidden_size) * config.num_layers)
    return math.sqrt(2 / (5 * config.hidden_size))

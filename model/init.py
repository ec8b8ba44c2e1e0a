"""Initial weights. Each parameter's values depend on the seed and its own name alone: not on the order of
construction, the device, or the number of ranks that hold a piece of it.

gpt2       N(0, std); the matrices that write to the residual stream (attention.out and the last of each feed-forward
           network, every expert's included) N(0, std / sqrt(2 L)).
           Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
tinyllama  N(0, sqrt(2 / (5 D))); residual matrices N(0, 1 / (sqrt(D) L)).
           Source: Zhang et al., "TinyLlama", 2024 (GPT-NeoX's small init and wang init; lit_gpt/model.py).

With config.norms = "deepnorm", the matrices of attention and of feed-forward networks are N(0, g sqrt(2 / (in + out)))
instead, each of those that are packed into one by itself: g = (8 L)^(-1/4), but 1 for queries and keys.
           Source: Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022, figure 2 and table 1.
"""

import hashlib
import math

import torch
from torch import Tensor

from model.config import ModelConfig

_RESIDUAL_MATRICES = (
    "attention.out.weight",
    "mlp.down.weight",
    "mlp.gate_down.weight",
    "moe.experts.down",
    "moe.shared.down.weight",
    "moe.shared.gate_down.weight",
)
_PACKED_PAIRS = ("gate_up.weight", "gate_down.weight", "experts.gate_up")
_LATENT_MATRICES = ("query.weight", "query_down.weight", "query_up.weight", "kv_down.weight")
_NOT_DEEPNORM = ("embedding.weight", "head.weight", "routers", "soft.logits", "shared_gate.weight")


def initial_value(config: ModelConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole initial fp32 tensor of one parameter or buffer, on the CPU: of norms what leaves their input's scale
    alone, zeros for biases and the null slot, equal loads, else normal."""
    constant = _constant(config, name)
    if constant is not None:
        return torch.full(shape, constant)
    digest = hashlib.blake2b(f"init|{seed}|{name}".encode(), digest_size=8).digest()
    # 63 bits: torch.Generator takes a signed seed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.randn(shape, generator=generator)
    if config.norms == "deepnorm" and not any(part in name for part in _NOT_DEEPNORM):
        return values * _deepnorm_deviations(config, name, shape)[:, None]
    return values * standard_deviation(config, name)


def standard_deviation(config: ModelConfig, name: str) -> float:
    """Of the normal distribution that the config's scheme draws the matrix `name` from."""
    is_residual = name.endswith(_RESIDUAL_MATRICES)
    if config.init == "gpt2":
        return config.init_std / math.sqrt(2 * config.num_layers) if is_residual else config.init_std
    if is_residual:
        return 1 / (math.sqrt(config.hidden_size) * config.num_layers)
    return math.sqrt(2 / (5 * config.hidden_size))


def _constant(config: ModelConfig, name: str) -> float | None:
    """The value of all elements of a parameter that is not random."""
    if name.endswith("norm.weight"):
        return 0.0 if config.norm_offset else 1.0
    if name.endswith("load"):
        return 1 / config.moe.num_experts
    return 0.0 if name.endswith(("bias", "null_key", "null_value")) else None


def _deepnorm_deviations(config: ModelConfig, name: str, shape: torch.Size) -> Tensor:
    """The standard deviation of each row, (rows,), of a matrix or of those in a stack."""
    rows, columns = shape[-2:]
    beta = (8 * config.num_layers) ** -0.25

    def packed(*parts: tuple[float, int]) -> Tensor:
        return torch.cat([torch.full((size,), gain * math.sqrt(2 / (columns + size))) for gain, size in parts])

    if name.endswith("attention.qkv.weight"):
        return packed((1.0, config.query_size), (1.0, config.kv_size), (beta, config.kv_size))
    if name.endswith("attention.kv_up.weight"):
        # All keys are one matrix and all values another, dealt out to the heads in turn.
        sizes = config.num_heads * config.head_size, config.num_heads * config.latent.value_size
        keys, values = packed((1.0, sizes[0]), (beta, sizes[1])).split(sizes)
        return torch.cat(
            [part for head in zip(keys.chunk(config.num_heads), values.chunk(config.num_heads)) for part in head]
        )
    if name.endswith(_PACKED_PAIRS):
        return packed((beta, rows // 2), (beta, rows // 2))
    return packed((1.0 if name.endswith(_LATENT_MATRICES) else beta, rows))

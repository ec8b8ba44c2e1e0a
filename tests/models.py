"""Small models for tests: every combination of features, and weights that make each of them matter."""

import dataclasses

import torch

from model.config import ModelConfig
from model.init import initial_value
from model.transformer import Transformer

LLAMA = ModelConfig(
    vocab_size=131,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    ffn_size=48,
    context_length=64,
    init_std=0.2,
)

VARIANTS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tie_embeddings=True),
    "llama one kv head": dataclasses.replace(LLAMA, num_kv_heads=1, rope_base=500_000.0),
    "llama wide heads": dataclasses.replace(LLAMA, head_size=12, num_kv_heads=4),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
    "qwen2 tied": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, head_size=16),
    "qwen3 tied": dataclasses.replace(LLAMA, qk_norm=True, tie_embeddings=True),
    "qwen2 interleaved": dataclasses.replace(LLAMA, qkv_bias=True, rope_interleaved=True),
    "qwen3 interleaved": dataclasses.replace(LLAMA, qk_norm=True, head_size=12, rope_interleaved=True),
}


def make_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose norms and biases are random too: at their initial ones and zeros, mistakes would not show."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device="cpu")
    model.tie()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(config, name, parameter.shape, seed))
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(config: ModelConfig, batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (B, T), any of the vocabulary."""
    return torch.randint(config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))

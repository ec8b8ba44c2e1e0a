"""Small models for tests: every feature, and weights that make each of them matter."""

import dataclasses
from typing import Any

import torch

from model.config import LatentConfig, ModelConfig
from model.init import initial_value
from model.moe_config import MoEConfig
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
    "qwen3": dataclasses.replace(LLAMA, qk_norm="head", head_size=16),
    "qwen3 tied": dataclasses.replace(LLAMA, qk_norm="head", tie_embeddings=True),
    "qwen2 interleaved": dataclasses.replace(LLAMA, qkv_bias=True, rope_interleaved=True),
    "qwen3 interleaved": dataclasses.replace(LLAMA, qk_norm="head", head_size=12, rope_interleaved=True),
    "mistral": dataclasses.replace(LLAMA, sliding_window=5),
    "alternating windows": dataclasses.replace(LLAMA, sliding_window=6, window_pattern="LS", qkv_bias=True),
    "gemma2": dataclasses.replace(
        LLAMA,
        ffn="geglu",
        norms="sandwich",
        norm_offset=True,
        embedding_scale=32**0.5,
        attention_scale=0.3,
        attention_softcap=2.0,
        logit_softcap=3.0,
        sliding_window=7,
        window_pattern="SL",
        tie_embeddings=True,
    ),
    "olmo2": dataclasses.replace(LLAMA, norms="output", qk_norm="full"),
    "deepnorm": dataclasses.replace(LLAMA, norms="deepnorm"),
    "senet": dataclasses.replace(LLAMA, ffn="senet"),
    "latent": dataclasses.replace(
        LLAMA, num_kv_heads=4, latent=LatentConfig(kv_rank=12, rope_size=4, value_size=6), rope_interleaved=True
    ),
    "latent query": dataclasses.replace(
        LLAMA, num_kv_heads=4, latent=LatentConfig(kv_rank=12, query_rank=10, rope_size=6, value_size=20)
    ),
    "latent windowed": dataclasses.replace(
        LLAMA,
        num_kv_heads=4,
        latent=LatentConfig(kv_rank=12, rope_size=4, value_size=8),
        sliding_window=6,
        attention_softcap=2.0,
    ),
}


def _with_experts(**settings: Any) -> ModelConfig:
    of_moe = {field.name for field in dataclasses.fields(MoEConfig)}
    moe = {"num_experts": 4, "expert_size": 16} | {key: settings.pop(key) for key in of_moe & settings.keys()}
    return dataclasses.replace(LLAMA, moe=MoEConfig(**moe), **settings)


MOE_VARIANTS: dict[str, ModelConfig] = {
    "mixtral": _with_experts(balance="switch"),
    "qwen2-moe": _with_experts(
        renormalise=False, shared_size=24, shared_gate=True, qkv_bias=True, layer_every=2, balance="global"
    ),
    "qwen3-moe": _with_experts(qk_norm="head", num_experts=8, num_picked=3, balance="sequence", z_loss=1e-2),
    "olmoe": _with_experts(renormalise=False, qk_norm="full", balance="global", z_loss=1e-2),
    "deepseek-v3": _with_experts(
        num_experts=8,
        num_picked=3,
        scores="sigmoid",
        bias="sign",
        route_scale=2.5,
        num_groups=4,
        num_picked_groups=2,
        shared_size=24,
        first_dense_layers=1,
        balance="sequence",
        num_kv_heads=4,
        latent=LatentConfig(kv_rank=12, query_rank=10, rope_size=4, value_size=6),
    ),
    "softmax with bias": _with_experts(bias="proportional", num_groups=2, group_score="max"),
    "sampling": _with_experts(sampling=True, temperature=0.7),
    "chain outer": _with_experts(chain_length=2, balance="switch"),
    "chain inner": _with_experts(chain_length=2, chain_residual="inner", bias="sign"),
    "chain both": _with_experts(chain_length=2, chain_residual="both", shared_size=16),
    "chunk soft": _with_experts(kind="chunk_soft", chunk_size=4, num_slots=2),
    "chunk soft shared": _with_experts(kind="chunk_soft", chunk_size=5, shared_size=16, first_dense_layers=1),
    "experts between norms": _with_experts(norms="sandwich", norm_offset=True, sliding_window=6),
    "experts under deepnorm": _with_experts(norms="deepnorm"),
}


def make_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose norms, biases and loads are random too: at their initial values mistakes would not show."""
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
        for name, buffer in model.named_buffers():
            drawn = torch.randn(buffer.shape, generator=generator)
            buffer.copy_(drawn.softmax(dim=0) if name.endswith("load") else 0.1 * drawn)
    return model


def random_tokens(config: ModelConfig, batch_size: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (B, T), any of the vocabulary."""
    return torch.randint(config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))

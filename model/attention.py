"""Grouped-query self-attention with rotary positions."""

from collections.abc import Callable
from typing import TypedDict

from torch import Tensor, nn

from kernels.attention import DocumentBoundaries, attention
from kernels.rope import rope, rope_packed
from model.cache import KVCache
from model.config import ModelConfig
from model.norm import RMSNorm


class AttentionLimits(TypedDict):
    """The options of `kernels.attention.attention` that a layer always passes."""

    window: int | None
    scale: float | None
    soft_cap: float | None


def attention_limits(config: ModelConfig, layer: int) -> AttentionLimits:
    """Which keys a layer's queries see, and how their scores are bounded."""
    return AttentionLimits(window=config.window(layer), scale=config.attention_scale, soft_cap=config.attention_softcap)


def by_positions(
    rotate: Callable[..., tuple[Tensor, ...]], cos_TK: Tensor, sin_TK: Tensor, *parts_BT: Tensor
) -> tuple[Tensor, ...]:
    """rotate(*parts, cos, sin), which takes one table for all rows; padded rows, each with positions of its own, have
    tables of B * T rows, and are one long row to it."""
    batch_size, length = parts_BT[0].shape[:2]
    if len(cos_TK) == length:
        return rotate(*parts_BT, cos_TK, sin_TK)
    rotated = rotate(*(part_BT.flatten(0, 1)[None] for part_BT in parts_BT), cos_TK, sin_TK)
    return tuple(part.view(batch_size, length, *part.shape[2:]) for part in rotated)


class Attention(nn.Module):
    """Projects, rotates, attends, projects back. Query, key and value weights are one packed matrix: one GEMM."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        self.rope_interleaved = config.rope_interleaved
        self.limits = attention_limits(config, layer)
        self.split_sizes = (config.query_size, config.kv_size, config.kv_size)
        self.qkv = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=config.qkv_bias)
        self.out = nn.Linear(config.query_size, config.hidden_size, bias=False)
        self.norms_heads = config.qk_norm == "head"
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            q_size, k_size = (config.head_size,) * 2 if self.norms_heads else (config.query_size, config.kv_size)
            self.q_norm = RMSNorm(q_size, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(k_size, config.norm_eps, config.norm_offset)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Mixes each token with the earlier ones that it may see; (B, T, D) -> (B, T, D)."""
        q_BTHK, k_BTGK, v_BTGK = by_positions(self._split, cos_TK, sin_TK, self.qkv(x_BTD))
        visible_BS = None
        if cache is not None:
            k_BTGK, v_BTGK = cache.extend(self.layer, k_BTGK, v_BTGK)
            visible_BS = cache.visible(k_BTGK.shape[1], x_BTD.shape[1])
        o_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, boundaries, visible_BS=visible_BS, **self.limits)
        return self.out(o_BTHK.flatten(2))

    def _split(self, qkv_BTN: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values."""
        if self.q_norm is None or self.k_norm is None:
            return rope_packed(qkv_BTN, cos_TK, sin_TK, self.num_heads, self.num_kv_heads, self.rope_interleaved)
        q_BTN, k_BTN, v_BTN = qkv_BTN.split(self.split_sizes, dim=-1)
        if self.norms_heads:
            q_BTHK, k_BTGK = self.q_norm(self._heads(q_BTN)), self.k_norm(self._heads(k_BTN))
        else:
            q_BTHK, k_BTGK = self._heads(self.q_norm(q_BTN)), self._heads(self.k_norm(k_BTN))
        return *rope(q_BTHK, k_BTGK, cos_TK, sin_TK, self.rope_interleaved), self._heads(v_BTN)

    def _heads(self, x_BTN: Tensor) -> Tensor:
        return x_BTN.unflatten(-1, (-1, self.head_size))

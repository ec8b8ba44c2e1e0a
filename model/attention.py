"""Grouped-query self-attention with rotary positions."""

from torch import Tensor, nn

from kernels.attention import DocumentBoundaries, attention
from kernels.rope import rope, rope_packed
from model.cache import KVCache
from model.config import ModelConfig
from model.norm import RMSNorm


class Attention(nn.Module):
    """Projects, rotates, attends, projects back. Query, key and value weights are one packed matrix: one GEMM."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_size = config.num_heads, config.num_kv_heads, config.head_size
        self.rope_interleaved = config.rope_interleaved
        self.split_sizes = (config.query_size, config.kv_size, config.kv_size)
        self.qkv = nn.Linear(config.hidden_size, sum(self.split_sizes), bias=config.qkv_bias)
        self.out = nn.Linear(config.query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_size, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Mixes each token with the earlier ones that it may see; (B, T, D) -> (B, T, D)."""
        q_BTHK, k_BTGK, v_BTGK = self._project(x_BTD, cos_TK, sin_TK)
        if cache is not None:
            k_BTGK, v_BTGK = cache.extend(self.layer, k_BTGK, v_BTGK)
        return self.out(attention(q_BTHK, k_BTGK, v_BTGK, boundaries).flatten(2))

    def _project(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values."""
        qkv_BTN = self.qkv(x_BTD)
        if self.q_norm is None or self.k_norm is None:
            return rope_packed(qkv_BTN, cos_TK, sin_TK, self.num_heads, self.num_kv_heads, self.rope_interleaved)
        q_BTHK, k_BTGK, v_BTGK = (
            part.unflatten(-1, (-1, self.head_size)) for part in qkv_BTN.split(self.split_sizes, dim=-1)
        )
        rotated = rope(self.q_norm(q_BTHK), self.k_norm(k_BTGK), cos_TK, sin_TK, self.rope_interleaved)
        return *rotated, v_BTGK

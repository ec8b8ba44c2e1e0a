"""Grouped-query self-attention with rotary positions."""

from torch import Tensor, nn

from kernels.attention import DocumentBoundaries, attention
from kernels.rope import rope
from model.cache import KVCache
from model.config import ModelConfig
from model.norm import RMSNorm


class Attention(nn.Module):
    """Projects, rotates, attends, projects back. Query, key and value weights are one packed matrix: one GEMM."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
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
        q_BTHK, k_BTGK, v_BTGK = (
            part.unflatten(-1, (-1, self.head_size)) for part in self.qkv(x_BTD).split(self.split_sizes, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        q_BTHK, k_BTGK = rope(q_BTHK, k_BTGK, cos_TK, sin_TK)
        if cache is not None:
            k_BTGK, v_BTGK = cache.extend(self.layer, k_BTGK, v_BTGK)
        return self.out(attention(q_BTHK, k_BTGK, v_BTGK, boundaries).flatten(2))

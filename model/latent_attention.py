"""Multi-head latent attention: keys and values of all heads are made of one narrow vector per token.

    c = N(W_c x)                    kR = rope(W_r x)          what is cached: kv_rank + R numbers per token
    [k_h, v_h] = W_h c              key of head h = [k_h, kR], the rotated part common to all heads
    q_h = [q_h, rope(qR_h)]         made of x, or of N(W_q x) with a query rank

RoPE depends on the position, so that W_h could not be moved past it; hence the part of its own that it rotates.

Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; "DeepSeek-V3", 2024, section 2.1.1.
Shapes: C = kv_rank, R = rope_size, K = head_size, V = value_size of a head.
"""

import torch
from torch import Tensor, nn

from kernels.attention import DocumentBoundaries, attention
from kernels.rope import rope
from model.attention import attention_limits, by_positions
from model.cache import KVCache
from model.config import ModelConfig
from model.norm import RMSNorm


class LatentAttention(nn.Module):
    """Attention whose cache holds the compressed pair alone; keys and values are made of it anew when they are read."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        latent, num_heads, width = config.latent, config.num_heads, config.hidden_size
        self.layer, self.num_heads, self.rope_interleaved = layer, num_heads, config.rope_interleaved
        self.limits = attention_limits(config, layer)
        self.query_sizes = (config.head_size, latent.rope_size)
        self.kv_sizes = (config.head_size, latent.value_size)
        self.down_sizes = (latent.kv_rank, latent.rope_size)
        query_size = num_heads * sum(self.query_sizes)
        self.has_query_rank = latent.query_rank > 0
        if self.has_query_rank:
            self.query_down = nn.Linear(width, latent.query_rank, bias=False)
            self.query_norm = RMSNorm(latent.query_rank, latent.norm_eps, config.norm_offset)
            self.query_up = nn.Linear(latent.query_rank, query_size, bias=False)
        else:
            self.query = nn.Linear(width, query_size, bias=False)
        self.kv_down = nn.Linear(width, sum(self.down_sizes), bias=False)
        self.kv_norm = RMSNorm(latent.kv_rank, latent.norm_eps, config.norm_offset)
        self.kv_up = nn.Linear(latent.kv_rank, num_heads * sum(self.kv_sizes), bias=False)
        self.out = nn.Linear(num_heads * latent.value_size, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TR: Tensor,
        sin_TR: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Mixes each token with the earlier ones that it may see; (B, T, D) -> (B, T, D)."""
        q_BTHK, rotated_q_BTHR = self._queries(x_BTD).split(self.query_sizes, dim=-1)
        c_BTC, shared_k_BTR = self.kv_down(x_BTD).split(self.down_sizes, dim=-1)
        rotated_q_BTHR, rotated_k_BT1R = by_positions(
            self._rotate, cos_TR, sin_TR, rotated_q_BTHR, shared_k_BTR[:, :, None]
        )
        c_BTC, shared_k_BTR = self.kv_norm(c_BTC), rotated_k_BT1R[:, :, 0]
        visible_BS = None
        if cache is not None:
            c_BTC, shared_k_BTR = cache.extend(self.layer, c_BTC, shared_k_BTR)
            visible_BS = cache.visible(c_BTC.shape[1], x_BTD.shape[1])
        k_BSHK, v_BSHV = self._keys_and_values(c_BTC, shared_k_BTR)
        q_BTHK = torch.cat((q_BTHK, rotated_q_BTHR), dim=-1)
        o_BTHV = attention(q_BTHK, k_BSHK, v_BSHV, boundaries, visible_BS=visible_BS, **self.limits)
        return self.out(o_BTHV.flatten(2))

    def _rotate(self, q_BTHR: Tensor, k_BT1R: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q_BTHR, k_BT1R, cos_TR, sin_TR, self.rope_interleaved)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        """(B, T, H, K + R), the last R of a head still to be rotated."""
        q_BTN = self.query_up(self.query_norm(self.query_down(x_BTD))) if self.has_query_rank else self.query(x_BTD)
        return q_BTN.unflatten(-1, (self.num_heads, -1))

    def _keys_and_values(self, c_BSC: Tensor, shared_k_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, H, K + R) and values (B, S, H, V) of all heads."""
        k_BSHK, v_BSHV = self.kv_up(c_BSC).unflatten(-1, (self.num_heads, -1)).split(self.kv_sizes, dim=-1)
        shared_k_BSHR = shared_k_BSR[:, :, None].expand(-1, -1, self.num_heads, -1)
        return torch.cat((k_BSHK, shared_k_BSHR), dim=-1), v_BSHV

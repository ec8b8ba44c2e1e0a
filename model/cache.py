"""Keys and values of the tokens a model has already read, for decoding one token at a time."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Fixed memory for `capacity` tokens of keys and values in every layer; `length` of them are filled.

    Shapes: keys, values (L, B, capacity, G, K), after RoPE, as attention wants them.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, batch_size, capacity, config.num_kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Writes one layer's new keys and values behind the cached ones and returns all of them (B, S, G, K).

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + k_BTGK.shape[1]
        if end > self.capacity:
            raise ValueError(f"KVCache: {end} tokens for a capacity of {self.capacity}; make the cache larger")
        self.keys[layer, :, self.length : end] = k_BTGK
        self.values[layer, :, self.length : end] = v_BTGK
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that every layer has just written."""
        self.length += num_tokens

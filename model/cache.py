"""What a model keeps of the tokens it has already read, for decoding one token at a time."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Fixed memory for `capacity` tokens in every layer; `length` of them have been read.

    A layer keeps what its attention needs of a token: a key and a value per head after RoPE, or latent attention's
    compressed pair. A windowed layer keeps its window alone, as a ring: token p is in row p mod window.
    `state` is for layers that keep something else, by layer: tensors (B, ...).

    Shapes: parts (B, capacity or window, ...), two of each layer.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device):
        if config.is_latent:
            widths = (config.latent.kv_rank,), (config.latent.rope_size,)
        else:
            widths = ((config.num_kv_heads, config.head_size),) * 2
        rooms = [min(config.window(layer) or capacity, capacity) for layer in range(config.num_layers)]
        self.parts = [
            tuple(torch.zeros(batch_size, room, *width, dtype=dtype, device=device) for width in widths)
            for room in rooms
        ]
        self.state: dict[int, tuple[Tensor, ...]] = {}
        self.batch_size, self.capacity = batch_size, capacity
        self.length = 0

    def extend(self, layer: int, *new_BT: Tensor) -> tuple[Tensor, ...]:
        """Writes both parts of one layer's new tokens behind the cached ones and returns those that the new ones see,
        (B, S, ...): all so far or, of a windowed layer, the new ones and a window before them.

        They are in order; only a single new token, which sees every one of them, may get them rotated.

        Raises:
            ValueError: the cache is full.
        """
        end = self.length + new_BT[0].shape[1]
        if end > self.capacity:
            raise ValueError(f"KVCache: {end} tokens for a capacity of {self.capacity}; make the cache larger")
        parts, room = self.parts[layer], self.parts[layer][0].shape[1]
        if end <= room:
            for part, new in zip(parts, new_BT, strict=True):
                part[:, self.length : end] = new
            return tuple(part[:, :end] for part in parts)
        if end == self.length + 1:
            for part, new in zip(parts, new_BT, strict=True):
                part[:, self.length % room] = new[:, 0]
            return parts
        return tuple(self._extend_ring(part, new) for part, new in zip(parts, new_BT, strict=True))

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that every layer has just written."""
        self.length += num_tokens

    def copy_row(self, row: "KVCache") -> None:
        """Makes every row of this cache the only row of another one, whose capacity is not larger."""
        for parts, row_parts in zip(self.parts, row.parts, strict=True):
            for part, row_part in zip(parts, row_parts, strict=True):
                part[:, : row_part.shape[1]] = row_part
        for layer, state in row.state.items():
            self.state[layer] = tuple(part.repeat(self.batch_size, *[1] * (part.ndim - 1)) for part in state)
        self.length = row.length

    def _extend_ring(self, part: Tensor, new_BT: Tensor) -> Tensor:
        """What the ring held of the window before the new tokens, and these; the ring then holds the last of both."""
        room, end = part.shape[1], self.length + new_BT.shape[1]
        before = torch.arange(max(0, self.length - room + 1), self.length, device=part.device) % room
        seen = torch.cat((part[:, before], new_BT), dim=1)
        kept = torch.arange(max(self.length, end - room), end, device=part.device) % room
        part[:, kept] = new_BT[:, -len(kept) :]
        return seen

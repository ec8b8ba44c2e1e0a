"""What a model keeps of the tokens it has already read, for decoding one token at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import DocumentBoundaries, boundaries_from_starts
from model.config import ModelConfig


class KVCache:
    """Fixed memory for `capacity` tokens in every layer; `length` of them have been read.

    A layer keeps what its attention needs of a token: a key and a value per head after RoPE, or latent attention's
    compressed pair. A windowed layer keeps its window alone, as a ring: token p is in row p mod room.
    `state` is for layers that keep something else, by layer: tensors (B, ...), replaced and never written to.

    Prompts of different lengths are read together with `padding`: row b begins with padding[b] tokens of any kind,
    which no other token sees and which its positions do not count. So all rows end in the same column, and all that is
    written there is written alike.

    With `num_recallable`, that many of the last tokens can be forgotten again; see `truncate`.

    Shapes: parts (B, room, ...), two of each layer.
    Raises:
        ValueError: padding for chunk_soft experts, whose chunks would begin elsewhere in every row.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        padding: Sequence[int] = (),
        num_recallable: int = 0,
    ):
        if any(padding) and config.expert_layers and config.moe.kind == "chunk_soft":
            raise ValueError("KVCache: chunk_soft experts read rows of equal length together, without padding")
        if config.is_latent:
            widths = (config.latent.kv_rank,), (config.latent.rope_size,)
        else:
            widths = ((config.num_kv_heads, config.head_size),) * 2
        # What is written over the oldest of a ring must not be needed again when the newest are forgotten.
        self.windows = [config.window(layer) or capacity for layer in range(config.num_layers)]
        self.parts = [
            tuple(
                torch.zeros(batch_size, min(window + num_recallable, capacity), *width, dtype=dtype, device=device)
                for width in widths
            )
            for window in self.windows
        ]
        self.state: dict[int, tuple[Tensor, ...]] = {}
        self.batch_size, self.capacity, self.device = batch_size, capacity, device
        self.length = self._furthest = 0
        self.num_recallable = num_recallable
        self._states: list[tuple[int, dict[int, tuple[Tensor, ...]]]] = [(0, {})]
        self.padding_B = torch.tensor(padding, device=device) if any(padding) else None
        self._longest_padding = max(padding, default=0)
        self._visible: dict[int, Tensor] = {}

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
        if end == self.length + 1 and room == self.windows[layer]:
            for part, new in zip(parts, new_BT, strict=True):
                part[:, self.length % room] = new[:, 0]
            return parts
        before = min(self.windows[layer] - 1, self.length)
        return tuple(self._extend_ring(part, new, before) for part, new in zip(parts, new_BT, strict=True))

    def positions(self, num_new: int) -> Tensor:
        """Positions of the next tokens in their rows: (T,), or (B * T,) row by row where rows are padded."""
        columns_T = torch.arange(self.length, self.length + num_new, device=self.device)
        if self.padding_B is None:
            return columns_T
        return (columns_T - self.padding_B[:, None]).clamp(min=0).flatten()

    def boundaries(self, num_new: int) -> DocumentBoundaries | None:
        """Of the first tokens: padding is a document of its own. None where no row is padded, and for later tokens."""
        if self.padding_B is None or self.length:
            return None
        assert num_new > self._longest_padding, "every row has a token among the first"
        starts_BT = torch.zeros(self.batch_size, num_new, dtype=torch.bool, device=self.device)
        starts_BT[:, 0] = True
        return boundaries_from_starts(starts_BT.scatter_(1, self.padding_B[:, None], True))

    def visible(self, num_keys: int, num_new: int) -> Tensor | None:
        """Which of the keys that `extend` returns for new tokens are not padding, (B, S); None: all of them, or those
        that `boundaries` tells."""
        end = self.length + num_new
        if self.padding_B is None or self.length == 0 or self._longest_padding <= end - num_keys:
            return None
        if num_keys not in self._visible:
            columns_S = torch.arange(end - num_keys, end, device=self.device)
            if num_new == 1 and not self.num_recallable:
                columns_S = columns_S.roll(end % num_keys)  # as a full ring is; by none, if these are all keys so far
            self._visible[num_keys] = columns_S >= self.padding_B[:, None]
        return self._visible[num_keys]

    def advance(self, num_tokens: int) -> None:
        """Counts the tokens that every layer has just written."""
        self.length += num_tokens
        self._furthest = max(self._furthest, self.length)
        self._visible.clear()
        if self.num_recallable and self.state:
            self._states.append((self.length, dict(self.state)))
            while len(self._states) > 1 and self._states[1][0] <= self._furthest - self.num_recallable:
                self._states.pop(0)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on; where layers have a state, also those before that were read at once with
        one of them, as there is no state in between: see `length` afterwards.

        Raises:
            ValueError: more than the last num_recallable tokens that were ever read.
        """
        if not self._furthest - self.num_recallable <= length <= self.length:
            raise ValueError(
                f"KVCache: cannot go back from {self._furthest} tokens to {length}; it was made to forget "
                f"{self.num_recallable}"
            )
        if self.state and length < self.length:
            self._states = [(end, state) for end, state in self._states if end <= length]
            length, state = self._states[-1]
            self.state = dict(state)
        self.length = length

    def select(self, rows: Sequence[int]) -> None:
        """Makes row rows[i] the row i: rows may be left out, repeated and ordered anew."""
        index = torch.tensor(rows, device=self.device)
        self.parts = [tuple(part[index] for part in parts) for parts in self.parts]
        self.state = {layer: tuple(part[index] for part in state) for layer, state in self.state.items()}
        self._states = [(0, {}), (self.length, dict(self.state))]
        self.batch_size = len(rows)
        if self.padding_B is not None:
            self.padding_B = self.padding_B[index]

    def copy_row(self, row: "KVCache") -> None:
        """Makes every row of this cache the only row of another one, whose capacity is not larger."""
        for parts, row_parts in zip(self.parts, row.parts, strict=True):
            for part, row_part in zip(parts, row_parts, strict=True):
                part[:, : row_part.shape[1]] = row_part
        for layer, state in row.state.items():
            self.state[layer] = tuple(part.repeat(self.batch_size, *[1] * (part.ndim - 1)) for part in state)
        self.length = self._furthest = row.length
        self._states = [(0, {}), (self.length, dict(self.state))]

    def _extend_ring(self, part: Tensor, new_BT: Tensor, num_before: int) -> Tensor:
        """What the ring held of the window before the new tokens, and these; the ring then holds the last of both."""
        room, end = part.shape[1], self.length + new_BT.shape[1]
        before = torch.arange(self.length - num_before, self.length, device=part.device) % room
        seen = torch.cat((part[:, before], new_BT), dim=1)
        kept = torch.arange(max(self.length, end - room), end, device=part.device) % room
        part[:, kept] = new_BT[:, -len(kept) :]
        return seen

"""The decoder: embedding, pre-norm blocks, final norm, output head."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import DocumentBoundaries
from kernels.rope import rope_tables
from model.attention import Attention
from model.cache import KVCache
from model.config import ModelConfig
from model.mlp import MLP
from model.norm import RMSNorm

Readout = Callable[[Tensor, Tensor], Tensor]
"""(hidden_BTD, head_VD) -> what the caller wants of the last hidden states: logits, a loss sum, log-probabilities."""


def logits(hidden_BTD: Tensor, head_VD: Tensor) -> Tensor:
    """The readout of a language model: scores of every next token (B, T, V)."""
    return F.linear(hidden_BTD, head_VD)


# Matrix products and attention: what costs time to compute again. All else in a block moves few bytes.
_DEAR = frozenset({"mm", "addmm", "bmm", "_scaled_mm", "_varlen_attn"})


def _keep_what_is_dear(_context, op, *_arguments, **_options) -> CheckpointPolicy:
    name = op.overloadpacket.__name__
    is_dear = name in _DEAR or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Attention, then the MLP, each on the norm of the residual stream, each added to it.

    What the last layer has to add is handed on beside the stream, so that addition and norm are one pass over memory:
    `stream + addend` is normed and is the stream of the next one. `recompute` trades a second forward for activations.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.recompute: Literal["nothing", "cheap", "blocks"] = "nothing"

    def forward(
        self,
        stream_BTD: Tensor,
        addend_BTD: Tensor | None,
        cos_TK: Tensor,
        sin_TK: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(stream, addend) of the layers before, no addend at first, to those after this block; each (B, T, D)."""
        if self.recompute != "nothing" and addend_BTD is not None:
            stream_BTD, addend_BTD = stream_BTD + addend_BTD, None  # one tensor to keep instead of two
        if self.recompute == "blocks" and torch.is_grad_enabled():
            # Inside the module, so that FSDP gathers once around both runs, and parameter names stay as they are.
            inputs = (stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache)
            return checkpoint(self._body, *inputs, use_reentrant=False)
        return self._body(stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache)

    def compile_body(self) -> None:
        """Compiles what forward does, inside FSDP's hooks and inside recomputation, which stay eager."""
        self._body = torch.compile(self._body, dynamic=False)

    def _body(self, *inputs) -> tuple[Tensor, Tensor]:
        if self.recompute == "cheap" and torch.is_grad_enabled():
            # Inside what is compiled, because it goes by operators.
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
            return checkpoint(self._mix, *inputs, use_reentrant=False, context_fn=contexts)
        return self._mix(*inputs)

    def _mix(self, stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache) -> tuple[Tensor, Tensor]:
        normed_BTD, stream_BTD = self.attention_norm.add(addend_BTD, stream_BTD)
        attended_BTD = self.attention(normed_BTD, cos_TK, sin_TK, boundaries, cache)
        normed_BTD, stream_BTD = self.mlp_norm.add(attended_BTD, stream_BTD)
        return stream_BTD, self.mlp(normed_BTD)


class Transformer(nn.Module):
    """A Llama-family language model.

    The head's weight is applied by a readout inside forward, so that a loss can be computed without keeping whole
    logits, and while a sharded head is gathered.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes head and embedding one parameter where the config says so; again after `to_empty` has parted them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BT: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
        readout: Readout = logits,
    ) -> Tensor:
        """Reads tokens, after the cached ones if there is a cache, and returns `readout(hidden_BTD, head_VD)`.

        Shapes: tokens (B, T) int64, T <= any length: positions are computed, not looked up.
        """
        stream_BTD, addend_BTD = self.embedding(tokens_BT), None
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
        # fp32 tables also under bf16: a bf16 cosine is off by 2**-9. fp64 models get fp64 tables.
        table_dtype = torch.float64 if stream_BTD.dtype == torch.float64 else torch.float32
        cos_TK, sin_TK = rope_tables(positions_T, self.config.head_size, self.config.rope_base, table_dtype)
        for block in self.blocks:
            stream_BTD, addend_BTD = block(stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache)
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        hidden_BTD, _ = self.norm.add(addend_BTD, stream_BTD)
        return readout(hidden_BTD, self.head.weight)

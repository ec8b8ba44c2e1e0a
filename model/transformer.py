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
    """x + attention(norm(x)), then + mlp(norm(.)); `recompute` trades a second forward for the block's activations."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.recompute: Literal["nothing", "cheap", "blocks"] = "nothing"

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if self.recompute == "blocks" and torch.is_grad_enabled():
            # Inside the module, so that FSDP gathers once around both runs, and parameter names stay as they are.
            return checkpoint(self._body, x_BTD, cos_TK, sin_TK, boundaries, cache, use_reentrant=False)
        return self._body(x_BTD, cos_TK, sin_TK, boundaries, cache)

    def compile_body(self) -> None:
        """Compiles what forward does, inside FSDP's hooks and inside recomputation, which stay eager."""
        self._body = torch.compile(self._body, dynamic=False)

    def _body(self, *inputs) -> Tensor:
        if self.recompute == "cheap" and torch.is_grad_enabled():
            # Inside what is compiled, because it goes by operators.
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
            return checkpoint(self._mix, *inputs, use_reentrant=False, context_fn=contexts)
        return self._mix(*inputs)

    def _mix(self, x_BTD, cos_TK, sin_TK, boundaries, cache) -> Tensor:
        attended_BTD = self.attention(self.attention_norm(x_BTD), cos_TK, sin_TK, boundaries, cache)
        normed_BTD, x_BTD = self.mlp_norm.add(attended_BTD, x_BTD)
        return x_BTD + self.mlp(normed_BTD)


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
        x_BTD = self.embedding(tokens_BT)
        start = cache.length if cache is not None else 0
        positions_T = torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)
        # fp32 tables also under bf16: a bf16 cosine is off by 2**-9. fp64 models get fp64 tables.
        table_dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        cos_TK, sin_TK = rope_tables(positions_T, self.config.head_size, self.config.rope_base, table_dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TK, sin_TK, boundaries, cache)
        if cache is not None:
            cache.advance(tokens_BT.shape[1])
        return readout(self.norm(x_BTD), self.head.weight)

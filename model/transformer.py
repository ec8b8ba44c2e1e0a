"""The decoder: embedding, blocks, final norm, output head."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import DocumentBoundaries
from kernels.launch import sum_dtype
from kernels.rope import rope_tables
from model.attention import Attention
from model.balance import RoutingLog
from model.cache import KVCache
from model.config import ModelConfig
from model.latent_attention import LatentAttention
from model.mlp import MLP
from model.moe import MoE
from model.norm import RMSNorm
from model.router import RouterStats, RoutingInputs

Readout = Callable[[Tensor, Tensor], Tensor]
"""(hidden_BTD, head_VD) -> what the caller wants of the last hidden states: logits, a loss sum, log-probabilities."""


def logits(hidden_BTD: Tensor, head_VD: Tensor, soft_cap: float | None = None) -> Tensor:
    """The readout of a language model: scores of every next token (B, T, V)."""
    return soft_capped(F.linear(hidden_BTD, head_VD), soft_cap)


def soft_capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """c tanh(z / c) of logits z, computed in fp32 at least; the logits themselves without a soft cap."""
    if soft_cap is None:
        return logits
    return (soft_cap * torch.tanh(logits.to(sum_dtype(logits)) / soft_cap)).to(logits.dtype)


# Matrix products and attention: what costs time to compute again. All else in a block moves few bytes.
_DEAR = frozenset({"mm", "addmm", "bmm", "_scaled_mm", "_varlen_attn"})


def _keep_what_is_dear(_context, op, *_arguments, **_options) -> CheckpointPolicy:
    name = op.overloadpacket.__name__
    is_dear = name in _DEAR or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if is_dear else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Attention, then the MLP or experts, each normed and added to the residual stream as the config's `norms` says.

    What the last layer has to add is handed on beside the stream, so that addition and norm are one pass over memory:
    `stream + addend` is normed and is the stream of the next one. `recompute` trades a second forward for activations;
    of a block with experts it leaves out the routing, which must be the same in the backward as in the forward.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.is_deepnorm = config.norms == "deepnorm"
        self.stream_scale = (2 * config.num_layers) ** 0.25 if self.is_deepnorm else 1.0

        def norm(is_used: bool) -> RMSNorm | None:
            return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset) if is_used else None

        norms_inputs, norms_outputs = config.norms != "output", config.norms in ("sandwich", "output")
        self.attention_norm = norm(norms_inputs)
        self.attention = LatentAttention(config, layer) if config.is_latent else Attention(config, layer)
        self.attention_out_norm = norm(norms_outputs)
        self.mlp_norm = norm(norms_inputs)
        self.mlp = None if config.has_experts(layer) else MLP(config)
        self.moe = MoE(config, layer) if config.has_experts(layer) else None
        self.mlp_out_norm = norm(norms_outputs)
        self.recompute: Literal["nothing", "cheap", "blocks"] = "nothing"

    def forward(
        self,
        stream_BTD: Tensor,
        addend_BTD: Tensor | None,
        cos_TK: Tensor,
        sin_TK: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
        inputs: RoutingInputs | None = None,
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        """(stream, addend) of the layers before, no addend at first, to those after this block; each (B, T, D)."""
        if self.recompute != "nothing" and addend_BTD is not None:
            stream_BTD, addend_BTD = stream_BTD + addend_BTD, None  # one tensor to keep instead of two
        arguments = (stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache)
        if self.recompute == "blocks" and torch.is_grad_enabled():
            # Inside the module, so that FSDP gathers once around both runs, and parameter names stay as they are.
            stream_BTD, addend_BTD = checkpoint(self._body, *arguments, use_reentrant=False)
        else:
            stream_BTD, addend_BTD = self._body(*arguments)
        if self.moe is None:
            return stream_BTD, addend_BTD, None
        assert addend_BTD is not None  # here it is what the experts read
        return self._add_experts(self.moe, stream_BTD, addend_BTD, inputs, cache, boundaries)

    def compile_body(self) -> None:
        """Compiles what forward does, inside FSDP's hooks and inside recomputation, which stay eager."""
        self._body = torch.compile(self._body, dynamic=False)

    def _body(self, *arguments) -> tuple[Tensor, Tensor | None]:
        if self.recompute == "cheap" and torch.is_grad_enabled():
            # Inside what is compiled, because it goes by operators.
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_what_is_dear)
            return checkpoint(self._mix, *arguments, use_reentrant=False, context_fn=contexts)
        return self._mix(*arguments)

    def _mix(self, stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache) -> tuple[Tensor, Tensor | None]:
        """(stream, addend) after the block; with experts, (stream, what they read) before them."""
        stream_BTD, x_BTD = self._enter(self.attention_norm, stream_BTD, addend_BTD)
        attended_BTD = self.attention(x_BTD, cos_TK, sin_TK, boundaries, cache)
        stream_BTD, addend_BTD = self._leave(self.attention_norm, self.attention_out_norm, stream_BTD, attended_BTD)
        stream_BTD, x_BTD = self._enter(self.mlp_norm, stream_BTD, addend_BTD)
        if self.mlp is None:
            return stream_BTD, x_BTD
        return self._leave(self.mlp_norm, self.mlp_out_norm, stream_BTD, self.mlp(x_BTD))

    def _add_experts(
        self,
        moe: MoE,
        stream_BTD: Tensor,
        x_BTD: Tensor,
        inputs: RoutingInputs | None,
        cache: KVCache | None,
        boundaries: DocumentBoundaries | None,
    ) -> tuple[Tensor, Tensor | None, RouterStats | None]:
        moe.recompute = self.recompute == "blocks"
        y_BTD, stats = moe(x_BTD, inputs, cache, boundaries)
        if moe.replaces_stream:
            return y_BTD, None, stats
        return *self._leave(self.mlp_norm, self.mlp_out_norm, stream_BTD, y_BTD), stats

    def _enter(self, norm: RMSNorm | None, stream_BTD: Tensor, addend_BTD: Tensor | None) -> tuple[Tensor, Tensor]:
        """The whole stream, and what a layer reads of it."""
        if norm is not None and not self.is_deepnorm:
            x_BTD, stream_BTD = norm.add(addend_BTD, stream_BTD)
            return stream_BTD, x_BTD
        stream_BTD = stream_BTD if addend_BTD is None else stream_BTD + addend_BTD
        return stream_BTD, stream_BTD

    def _leave(
        self, norm: RMSNorm | None, out_norm: RMSNorm | None, stream_BTD: Tensor, y_BTD: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(stream, addend) after a layer that has made y of what it read."""
        if norm is not None and self.is_deepnorm:
            stream_BTD, _ = norm.add(y_BTD, self.stream_scale * stream_BTD)
            return stream_BTD, None
        return stream_BTD, y_BTD if out_norm is None else out_norm(y_BTD)


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
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.head = nn.Linear(config.hidden_size, config.head_rows, bias=False)
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
        readout: Readout | None = None,
        routing: RoutingLog | None = None,
    ) -> Tensor:
        """Reads tokens, after the cached ones if there is a cache, and returns `readout(hidden_BTD, head_VD)`, by
        default the logits. What the layers with experts count is added to `routing`.

        Shapes: tokens (B, T) int64, T <= any length: positions are computed, not looked up.
        """
        stream_BTD, addend_BTD = self._embed(tokens_BT), None
        num_tokens = tokens_BT.shape[1]
        if cache is None:
            positions = torch.arange(num_tokens, device=tokens_BT.device)
        else:
            positions, boundaries = cache.positions(num_tokens), boundaries or cache.boundaries(num_tokens)
        cos_TK, sin_TK = self._rope_tables(positions, stream_BTD.dtype)
        inputs = RoutingInputs(routing.counted_BT, routing.noise_seed, tokens_BT) if routing is not None else None
        for block in self.blocks:
            stream_BTD, addend_BTD, stats = block(stream_BTD, addend_BTD, cos_TK, sin_TK, boundaries, cache, inputs)
            if routing is not None and stats is not None:
                routing.layers.append(stats)
        if cache is not None:
            cache.advance(num_tokens)
        hidden_BTD, _ = self.norm.add(addend_BTD, stream_BTD)
        if readout is None:
            return logits(hidden_BTD, self.head.weight, self.config.logit_softcap)
        return readout(hidden_BTD, self.head.weight)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        embedded_BTD = self.embedding(tokens_BT)
        scale = self.config.embedding_scale
        return embedded_BTD if scale == 1.0 else scale * embedded_BTD

    def _rope_tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of tokens' positions, for the part of a head that is rotated."""
        rotated_size = self.config.latent.rope_size if self.config.is_latent else self.config.head_size
        # fp32 tables also under bf16: a bf16 cosine is off by 2**-9. fp64 models get fp64 tables.
        table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return rope_tables(positions_T, rotated_size, self.config.rope_base, table_dtype)

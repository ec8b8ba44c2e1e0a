"""Chunk-causal soft mixture of experts: experts read averages of the earlier chunks instead of single tokens.

Soft MoE averages all tokens of a sequence into slots, so a token sees later ones: its decoder is not the model that was
trained. Here the slots of chunk c are made of the tokens of chunks before c only. With slot logits l[t, s] = w_s . x_t:

    slot[c, s] = sum_{t < c * chunk_size} softmax_t(l[t, s]) x_t
    y[t]       = sum_s p[t, s] expert(slot[c(t), s]) + p[t, null] null_value,   p = softmax over slots and the null slot

The null slot, of logit null_key . x_t, is what the first chunk has, and what a token takes that needs no other one.
A packed document has the chunks of its row; its tokens in the chunk where it starts see the null slot alone.

An average over all earlier chunks is merged from each chunk's average and the logsumexp of its logits, by a softmax of
these: no exponential of a large number is ever taken.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", 2023, equations 1 to 3, made causal; the use in a
decoder: Gu et al., "Steel-LLM", 2025.
Shapes: C chunks, P = chunk_size tokens in one, S = num_experts * num_slots slots in the order of experts, S1 = S + 1
with the null slot last.
Dtypes: logits and averages in fp32 (fp64 for fp64), experts in x's.
Cost: the experts read B * C * S rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import DocumentBoundaries
from kernels.swiglu import swiglu
from model.cache import KVCache
from model.config import ModelConfig


class SoftState(NamedTuple):
    """What decoding keeps of the tokens that a layer has read, batch first.

    With each average goes the logsumexp of its logits, -inf for an average of nothing.
    """

    past_lse_BS: Tensor
    past_BSD: Tensor
    """Averages over the chunks that are complete."""
    current_lse_BS: Tensor
    current_BSD: Tensor
    """Averages over the tokens of the chunk that is not."""
    outputs_BSD: Tensor
    """What the experts make of the past."""


class ChunkSoft(nn.Module):
    """Mixes, for each token, what the experts make of averages of the earlier chunks."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.chunk_size = config.moe.chunk_size
        num_slots = config.moe.num_experts * config.moe.num_slots
        self.logits = nn.Parameter(torch.empty(num_slots, config.hidden_size))
        self.null_key = nn.Parameter(torch.empty(config.hidden_size))
        self.null_value = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self,
        x_BTD: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        boundaries: DocumentBoundaries | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); with a cache, x continues what was read before."""
        dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        weights_S1D = torch.cat((self.logits, self.null_key[None])).to(dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            exact_BTD = x_BTD.to(dtype)
            logits_BTS1 = F.linear(exact_BTD, weights_S1D)
            if cache is None:
                y_BTD = self._read_at_once(exact_BTD, logits_BTS1, gate_up_E2FD, down_EDF, boundaries)
            else:
                y_BTD = self._read_on(exact_BTD, logits_BTS1, gate_up_E2FD, down_EDF, cache)
        return y_BTD.to(x_BTD.dtype)

    def _read_at_once(
        self,
        x_BTD: Tensor,
        logits_BTS1: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        boundaries: DocumentBoundaries | None,
    ) -> Tensor:
        length, size = x_BTD.shape[1], self.chunk_size
        padding = -length % size
        ids_BT = torch.zeros_like(x_BTD[..., 0], dtype=torch.int32) if boundaries is None else boundaries.ids_BT
        ids_BCP = F.pad(ids_BT, (0, padding), value=-1).unflatten(1, (-1, size))
        logits_BCPS1 = F.pad(logits_BTS1, (0, 0, 0, padding)).unflatten(1, (-1, size))
        x_BCPD = F.pad(x_BTD, (0, 0, 0, padding)).unflatten(1, (-1, size))
        # Of the last chunk, which may be padded, nothing is averaged: no chunk follows it.
        slots_BCSD = _slots(x_BCPD[:, :-1], logits_BCPS1[:, :-1, :, :-1], ids_BCP)
        outputs_BCSD = F.pad(experts_on_slots(slots_BCSD, gate_up_E2FD, down_EDF), (0, 0, 0, 0, 1, 0))
        y_BCPD = self._combine(logits_BCPS1, outputs_BCSD, _has_past(ids_BCP))
        return y_BCPD.flatten(1, 2)[:, :length].clone()  # not a view: FSDP warns of modules that return one

    def _combine(self, logits_BCPS1: Tensor, outputs_BCSD: Tensor, has_past_BCP: Tensor) -> Tensor:
        slots_BCPS, null_BCP1 = logits_BCPS1[..., :-1], logits_BCPS1[..., -1:]
        slots_BCPS = slots_BCPS.masked_fill(~has_past_BCP[..., None], -torch.inf)
        shares_BCPS1 = torch.cat((slots_BCPS, null_BCP1), dim=-1).softmax(dim=-1)
        null_D = self.null_value.to(outputs_BCSD.dtype)
        return shares_BCPS1[..., :-1] @ outputs_BCSD + shares_BCPS1[..., -1:] * null_D

    def _read_on(
        self, x_BTD: Tensor, logits_BTS1: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, cache: KVCache
    ) -> Tensor:
        state, end, pieces = self._state(x_BTD, cache), cache.length, []
        while x_BTD.shape[1]:
            # Up to the end of the chunk, or of what there is.
            rest = self.chunk_size - end % self.chunk_size
            piece_BPD, x_BTD = x_BTD[:, :rest], x_BTD[:, rest:]
            piece_BPS1, logits_BTS1 = logits_BTS1[:, :rest], logits_BTS1[:, rest:]
            has_past_BCP = torch.full_like(piece_BPS1[:, None, :, 0], end >= self.chunk_size, dtype=torch.bool)
            pieces.append(self._combine(piece_BPS1[:, None], state.outputs_BSD[:, None], has_past_BCP)[:, 0])
            state = _with_piece(state, piece_BPD, piece_BPS1[..., :-1])
            end += piece_BPD.shape[1]
            if end % self.chunk_size == 0:
                state = _with_chunk_closed(state, gate_up_E2FD, down_EDF)
        cache.state[self.layer] = state
        return torch.cat(pieces, dim=1) if pieces else x_BTD

    def _state(self, x_BTD: Tensor, cache: KVCache) -> SoftState:
        if self.layer in cache.state:
            return SoftState(*cache.state[self.layer])
        zeros_BSD = x_BTD.new_zeros(x_BTD.shape[0], *self.logits.shape)
        nothing_BS = zeros_BSD[..., 0] - torch.inf
        return SoftState(nothing_BS, zeros_BSD, nothing_BS, zeros_BSD, zeros_BSD)


def experts_on_slots(slots_BCSD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Each expert's SwiGLU network on its own slots; (B, C, S, D) -> (B, C, S, D)."""
    num_experts = gate_up_E2FD.shape[0]
    grouped_EBCID = slots_BCSD.to(gate_up_E2FD.dtype).unflatten(2, (num_experts, -1)).movedim(2, 0)
    h_ERF = torch.bmm(grouped_EBCID.flatten(1, 3), gate_up_E2FD.mT)
    y_ERD = torch.bmm(swiglu(h_ERF), down_EDF.mT)
    return y_ERD.view(grouped_EBCID.shape).movedim(0, 2).flatten(2, 3).to(slots_BCSD.dtype)


def _slots(x_BCPD: Tensor, logits_BCPS: Tensor, ids_BCP: Tensor) -> Tensor:
    """The slots of each chunk but the first, from the chunks before it; ids are those of all chunks."""
    num_chunks = x_BCPD.shape[1]
    first_BC, last_BC = ids_BCP[:, 1:, 0], ids_BCP[:, :-1, -1]
    # Of a chunk, only the document that goes on behind it is read later on.
    is_old_BCP = ids_BCP[:, :-1] != last_BC[..., None]
    logits_BCPS = logits_BCPS.masked_fill(is_old_BCP[..., None], -torch.inf)
    averages_BCSD = logits_BCPS.softmax(dim=2).mT @ x_BCPD
    lse_BSC = logits_BCPS.logsumexp(dim=2).mT
    order_C = torch.arange(num_chunks, device=x_BCPD.device)
    is_other_BCC = (order_C > order_C[:, None]) | (first_BC[:, :, None] != last_BC[:, None, :])
    # A chunk that starts a document reads the one before it, and no token of it uses that: sums of nothing are NaN.
    is_other_BCC = is_other_BCC & (order_C != order_C[:, None])
    shares_BSCC = lse_BSC[:, :, None, :].masked_fill(is_other_BCC[:, None], -torch.inf).softmax(dim=-1)
    return (shares_BSCC @ averages_BCSD.transpose(1, 2)).transpose(1, 2)


def _has_past(ids_BCP: Tensor) -> Tensor:
    """Whether a token's document began in an earlier chunk."""
    before_BC1 = F.pad(ids_BCP[:, :-1, -1], (1, 0), value=-1)[..., None]
    return ids_BCP == before_BC1


def _with_piece(state: SoftState, x_BPD: Tensor, logits_BPS: Tensor) -> SoftState:
    """The state after more tokens of the current chunk."""
    average_BSD = logits_BPS.softmax(dim=1).mT @ x_BPD
    merged = _merged(state.current_lse_BS, state.current_BSD, logits_BPS.logsumexp(dim=1), average_BSD)
    return SoftState(state.past_lse_BS, state.past_BSD, *merged, state.outputs_BSD)


def _with_chunk_closed(state: SoftState, gate_up_E2FD: Tensor, down_EDF: Tensor) -> SoftState:
    """The state when the current chunk has become one of the past."""
    past = _merged(state.past_lse_BS, state.past_BSD, state.current_lse_BS, state.current_BSD)
    outputs_BSD = experts_on_slots(past[1][:, None], gate_up_E2FD, down_EDF)[:, 0]
    nothing_BS = torch.full_like(past[0], -torch.inf)
    return SoftState(*past, nothing_BS, torch.zeros_like(past[1]), outputs_BSD)


def _merged(lse_BS: Tensor, a_BSD: Tensor, other_lse_BS: Tensor, b_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """The average over two sets of tokens, and the logsumexp of all their logits; the second set is not empty."""
    both_BS = torch.logaddexp(lse_BS, other_lse_BS)
    share_BS, other_share_BS = (lse_BS - both_BS).exp(), (other_lse_BS - both_BS).exp()
    return both_BS, share_BS[..., None] * a_BSD + other_share_BS[..., None] * b_BSD

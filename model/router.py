"""Which experts a token is sent to, and with what weights.

    logits = W x / temperature                       scores s = softmax(logits), or sigmoid(logits)
    picks  = the num_picked largest s + bias, of the best groups only
    weights = s[picks] (/ their sum) * route_scale

The bias only picks. Logits and scores are fp32 whatever the model's dtype (fp64 for fp64): in bf16 near ties fall
otherwise than in the run that trained the experts.

Source: Shazeer et al. 2017 (top-k); DeepSeek-AI, "DeepSeek-V3", 2024, equations 13 to 16 (sigmoid, bias) and
"DeepSeek-V2", 2024, section 2.2.2 (groups); Kool et al., "Stochastic Beams and Where to Find Them", 2019 (sampling).
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.moe_config import MoEConfig


class Routing(NamedTuple):
    """What a router decides about each token.

    Shapes: picks (M, J) int64, of each token J experts, the best one first; weights (M, J), scores and logits (M, E),
    of one dtype.
    """

    picks_MJ: Tensor
    weights_MJ: Tensor
    scores_ME: Tensor
    logits_ME: Tensor


@dataclass(frozen=True, slots=True)
class RoutingInputs:
    """What routing in training needs beside the hidden states."""

    counted_BT: Tensor | None
    """Tokens that count for load, losses and statistics: those with a target. None: all."""
    noise_seed: int | None
    """Key of the noise that sampling picks with: of the run and the step. None: nothing is sampled."""
    tokens_BT: Tensor
    """The token ids; noise is keyed by them, so that it is the same on any rank and in any micro-batch."""


class RouterStats(NamedTuple):
    """What one layer's routers say about a batch; sums over counted tokens, and over the C links of a chain."""

    penalty_sum: Tensor
    """Balance loss and z-loss, weighted; a scalar to differentiate."""
    counts_CE: Tensor
    """Picks of each expert, int64."""
    entropy_sum: Tensor
    """Entropy of the normalised scores."""
    z_sum: Tensor
    """Square of logsumexp(logits)."""


class Router(nn.Module):
    """Scores all experts for each token and picks some.

    `bias` (E,) is what balancing without a loss moves; `load` (E,) the share of all picks that each expert got, which
    the auxiliary losses of whole steps read. Both stay fp32 whatever the model is cast to: a bf16 bias of 1 does not
    feel a step of 0.001.
    """

    weight: Tensor
    bias: Tensor | None
    load: Tensor | None

    def __init__(self, moe: MoEConfig, hidden_size: int):
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        has_bias, has_load = moe.bias != "none", moe.balance in ("switch", "global")
        self.register_buffer("bias", torch.zeros(moe.num_experts, dtype=torch.float32) if has_bias else None)
        load_E = torch.full((moe.num_experts,), 1 / moe.num_experts, dtype=torch.float32)
        self.register_buffer("load", load_E if has_load else None)

    def forward(self, x_MD: Tensor, noise_ME: Tensor | None = None) -> Routing:
        """Routes tokens; with Gumbel noise, samples picks with the odds of their biased scores."""
        dtype = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_MD.device.type, enabled=False):
            logits_ME = _exact_product(x_MD, self.weight, dtype) / self.moe.temperature
            scores_ME = logits_ME.sigmoid() if self.moe.scores == "sigmoid" else logits_ME.softmax(dim=-1)
            picks_MJ = self._pick(scores_ME.detach(), noise_ME)
            weights_MJ = scores_ME.gather(1, picks_MJ)
            if self.moe.renormalise:
                # Sigmoids may all be zero. The constant is DeepSeek's; no sum of a softmax feels it.
                weights_MJ = weights_MJ / (weights_MJ.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(picks_MJ, weights_MJ * self.moe.route_scale, scores_ME, logits_ME)

    @torch.no_grad()
    def _pick(self, scores_ME: Tensor, noise_ME: Tensor | None) -> Tensor:
        if self.bias is not None:
            scores_ME = scores_ME + self.bias
        is_closed_ME = self._closed(scores_ME) if self.moe.num_groups > 1 else None
        if noise_ME is not None:
            # Of the biased scores, so that sampling follows the order that inference picks by. The bias may push a
            # score below zero; the floor is lower than any noise lifts.
            scores_ME = scores_ME.clamp(min=1e-20).log() + noise_ME
        if is_closed_ME is not None:
            scores_ME = scores_ME.masked_fill(is_closed_ME, -torch.inf)
        return _best(scores_ME, self.moe.num_picked)

    def _closed(self, scores_ME: Tensor) -> Tensor:
        """Whether an expert's group is not among the token's best ones."""
        grouped_MNE = scores_ME.unflatten(-1, (self.moe.num_groups, -1))
        num_judges = 2 if self.moe.group_score == "top2" else 1
        group_scores_MN = grouped_MNE.topk(num_judges, dim=-1).values.sum(dim=-1)
        is_closed_MN = torch.ones_like(group_scores_MN, dtype=torch.bool)
        is_closed_MN.scatter_(1, _best(group_scores_MN, self.moe.num_picked_groups), False)
        return is_closed_MN[..., None].expand_as(grouped_MNE).flatten(1)

    @torch.no_grad()
    def set_load(self, counts_E: Tensor) -> None:
        """Sets each expert's share of the picks; without picks it stays as it is."""
        if self.load is not None:
            share_E = (counts_E.double() / counts_E.sum().clamp(min=1)).float()
            self.load.copy_(torch.where(counts_E.sum() > 0, share_E, self.load))

    @torch.no_grad()
    def move_bias(self, counts_E: Tensor) -> None:
        """Moves the bias of overloaded experts down and of the others up, its mean staying where it is.

        sign: by bias_rate. Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", 2024, algorithm 1.
        proportional: by bias_rate * (mean - count) / mean. Source: ibid., section 4.3.
        """
        if self.bias is None:
            return
        total = counts_E.sum()
        error_E = total - counts_E * counts_E.numel()  # E times mean - count, exact
        delta_E = error_E.sign().double() if self.moe.bias == "sign" else error_E.double() / total.clamp(min=1)
        self.bias.add_((self.moe.bias_rate * (delta_E - delta_E.mean())).float())

    def _apply(self, fn, recurse: bool = True):
        """Moves buffers, but never casts them."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def _best(scores: Tensor, num_picked: int) -> Tensor:
    """Indices of the largest scores along the last axis, the best one first, the lower index first among equals.

    A stable sort, because topk breaks ties as the shape of its input has it. NaN counts as largest: the picks are
    experts that exist, and the loss says that something is wrong.
    """
    # Contiguous, or autograd would keep the order of all experts for the sake of the picks.
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :num_picked].contiguous()


class _ExactProduct(torch.autograd.Function):
    """x W^T in another dtype, which keeps x as it is for the backward: the experts keep the same tensor."""

    @staticmethod
    def forward(ctx, x_MD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_MD, weight_ED)
        return F.linear(x_MD.to(dtype), weight_ED.to(dtype))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient_ME,), (x_MD, weight_ED) = gradients, ctx.saved_tensors
        dx_MD = gradient_ME @ weight_ED.to(gradient_ME.dtype)
        dweight_ED = gradient_ME.mT @ x_MD.to(gradient_ME.dtype)
        return dx_MD.to(x_MD.dtype), dweight_ED.to(weight_ED.dtype), None


def _exact_product(x_MD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T in fp32, or fp64; typed."""
    product_ME = _ExactProduct.apply(x_MD, weight_ED, dtype)
    assert isinstance(product_ME, Tensor)
    return product_ME


# --- Noise for sampling. Integers modulo 2**64, which int64 products and sums keep on every device.

_GAMMA, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def routing_noise(tokens_BT: Tensor, num_experts: int, seed: int, layer: int, link: int) -> Tensor:
    """Standard Gumbel noise (M, E) in fp32, a function of the seed, the place in the model, and the tokens of the row
    up to each: the same wherever the row is computed, and blind to what comes later."""
    digest = hashlib.blake2b(f"noise|{seed}|{layer}|{link}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    experts_E = torch.arange(num_experts, device=tokens_BT.device)
    # A sum over (token, position) pairs, each well mixed, says which tokens stood where.
    prefix_BT = _mix(_mix(tokens_BT) + positions_T * _GAMMA).cumsum(dim=1)
    bits_BTE = _mix(_mix(prefix_BT ^ key)[..., None] + experts_E * _GAMMA)
    # The upper 23 bits and a half: strictly between 0 and 1, and exact in fp32.
    uniform_BTE = (_shifted(bits_BTE, 41).float() + 0.5) * 2.0**-23
    return -(-uniform_BTE.log()).log().flatten(0, 1)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 64-bit integers whose every output bit depends on every input bit.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014 (SplitMix64, Stafford's variant 13).
    """
    x = x + _GAMMA
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from above, as of an unsigned integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)

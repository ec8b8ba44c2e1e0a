"""Keeping experts equally loaded: auxiliary losses, the z-loss, the bias that needs no loss, and figures of load.

With E experts, J picks of each of n counted tokens, and scores s normalised to a sum of 1 over experts:

    sequence        sum_rows n_b sum_i f_bi P_bi,  f_bi = E / (J n_b) * picks of i in row b,  P_bi = mean s_i in row b
    switch, global  sum_i E load_i * sum_tokens s_i
    z               sum_tokens logsumexp(logits)^2

All are sums over counted tokens. The trainer divides them, with the cross-entropy, by the number of targets in the
whole step, so that they do not depend on how the step was cut into ranks and micro-batches. The load is a buffer of
whole steps: of this one (switch, which makes it exactly the Switch loss of the step) or of the one before (global).
Hugging Face's `load_balancing_loss_func` is J times the Switch loss.

Source: Fedus et al., "Switch Transformers", 2021, equations 4 to 6; DeepSeek-AI, "DeepSeek-V3", 2024, equations 17
to 20 (sequence); Qiu et al., "Demons in the Detail", 2025 (global); Zoph et al., "ST-MoE", 2022, equation 5 (z).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.moe_config import MoEConfig
from model.router import Router, RouterStats, Routing


class RoutingLog:
    """What the routers of one forward pass are told, and what they say: Transformer.forward appends layer by layer."""

    def __init__(self, counted_BT: Tensor | None = None, noise_seed: int | None = None):
        self.counted_BT = counted_BT
        self.noise_seed = noise_seed
        self.layers: list[RouterStats] = []

    @property
    def penalty_sum(self) -> Tensor:
        """The weighted auxiliary losses of all layers, to add to a sum of losses over targets."""
        penalties = [stats.penalty_sum for stats in self.layers]
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    @property
    def counts_LCE(self) -> Tensor:  # noqa: N802 - shape suffix
        """Picks of each expert by layer and link, int64; empty without routers."""
        counts = [stats.counts_CE for stats in self.layers]
        return torch.stack(counts) if counts else torch.zeros((0, 0, 0), dtype=torch.int64)


def router_stats(
    moe: MoEConfig, routing: Routing, load_E: Tensor | None, batch_size: int, counted_BT: Tensor | None
) -> RouterStats:
    """Penalties, counts (1, E) and statistics of one router for a batch of `batch_size` rows."""
    scores_BTE = routing.scores_ME.unflatten(0, (batch_size, -1))
    if moe.scores == "sigmoid":
        scores_BTE = scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)
    is_picked_BTE = torch.zeros_like(routing.scores_ME, dtype=torch.bool).scatter_(1, routing.picks_MJ, True)
    is_picked_BTE = is_picked_BTE.view(scores_BTE.shape)
    squares_BT = routing.logits_ME.logsumexp(dim=-1).square().unflatten(0, (batch_size, -1))
    if counted_BT is not None:
        scores_BTE = torch.where(counted_BT[..., None], scores_BTE, 0.0)
        squares_BT = torch.where(counted_BT, squares_BT, 0.0)
        is_picked_BTE = is_picked_BTE & counted_BT[..., None]
    counts_BE, score_sums_BE, z_sum = is_picked_BTE.sum(dim=1), scores_BTE.sum(dim=1), squares_BT.sum()
    balance_sum = _balance_sum(moe, counts_BE, score_sums_BE, load_E)
    return RouterStats(
        penalty_sum=moe.balance_weight * balance_sum + moe.z_loss * z_sum,
        counts_CE=counts_BE.sum(dim=0, keepdim=True),
        entropy_sum=torch.special.entr(scores_BTE.detach()).sum(),
        z_sum=z_sum.detach(),
    )


def _balance_sum(moe: MoEConfig, counts_BE: Tensor, score_sums_BE: Tensor, load_E: Tensor | None) -> Tensor:
    if moe.balance == "sequence":
        num_picks_B1 = counts_BE.sum(dim=1, keepdim=True).clamp(min=1)  # J n_b
        return moe.num_experts * (counts_BE * score_sums_BE / num_picks_B1).sum()
    if load_E is not None:
        return moe.num_experts * (load_E.to(score_sums_BE.dtype) * score_sums_BE).sum()
    return score_sums_BE.new_zeros(())


def stats_of_links(links: list[RouterStats]) -> RouterStats:
    """The statistics of the links of a chain as those of one layer."""
    penalties, counts, entropies, squares = zip(*links)
    return RouterStats(
        torch.stack(penalties).sum(), torch.cat(counts), torch.stack(entropies).sum(), torch.stack(squares).sum()
    )


def apply_counts(model: nn.Module, counts_LCE: Tensor) -> None:
    """After an optimizer step, moves every bias by the step's picks, and keeps them as the load of the next step.

    The counts are those of all ranks and micro-batches, so that every rank does the same.
    """
    for router, counts_E in _routers_with(model, counts_LCE):
        router.move_bias(counts_E)
        if router.moe.balance == "global":
            router.set_load(counts_E)


def set_load(model: nn.Module, counts_LCE: Tensor) -> None:
    """Before a step's forward passes, tells the Switch loss the load of that step."""
    for router, counts_E in _routers_with(model, counts_LCE):
        router.set_load(counts_E)


def _routers_with(model: nn.Module, counts_LCE: Tensor) -> list[tuple[Router, Tensor]]:
    """The routers that go by counts, each with its own."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    counts = counts_LCE.flatten(0, 1)
    assert len(routers) == len(counts), f"{len(routers)} routers, counts of {tuple(counts_LCE.shape)}"
    if all(router.bias is None and router.load is None for router in routers):
        return []
    device = routers[0].weight.device
    if device.type == "cuda" and not counts.is_cuda:
        counts = counts.pin_memory()  # a copy from other memory would wait for all that the device has to do
    return list(zip(routers, counts.to(device, non_blocking=True)))


# --- Figures of load.


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """How equally the experts of one layer are loaded; all zero without picks."""

    max_violation: float
    """The most loaded expert's picks over the mean, less one; of the worst link of a chain."""
    dead: int
    """Experts that no link picked."""
    would_drop: float
    """Share of the picks beyond a capacity of 1.25 times the mean, which a trainer with fixed capacities would drop."""


def load_statistics(counts_LCE: Tensor) -> list[LayerLoad]:
    """The load of each layer with experts, from the picks of a step."""
    return [_layer_load(counts_CE) for counts_CE in counts_LCE.tolist()]


def _layer_load(counts_CE: list[list[int]], capacity_factor: float = 1.25) -> LayerLoad:
    totals = [sum(counts_E) for counts_E in zip(*counts_CE)]
    num_picks = sum(totals)
    if not num_picks:
        return LayerLoad(0.0, 0, 0.0)
    violations, num_dropped = [0.0], 0
    for counts_E in counts_CE:
        mean = sum(counts_E) / len(counts_E)
        if mean:
            violations.append(max(counts_E) / mean - 1)
        num_dropped += sum(max(0, count - math.ceil(capacity_factor * mean)) for count in counts_E)
    return LayerLoad(
        max_violation=max(violations),
        dead=totals.count(0),
        would_drop=num_dropped / num_picks,
    )

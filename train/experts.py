"""A mixture's experts in training: what the routers did in a step, summed over ranks, and what is written of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.balance import RoutingLog, load_statistics
from model.config import ModelConfig
from model.router import Router


@dataclasses.dataclass(frozen=True, slots=True)
class StepRouting:
    """What the routers of all expert layers did in a step, as sums over counted tokens.

    Shapes: counts (L, C, E), entropy_sums (L,), z_sums (L,), L layers with experts, C passes of a chain.
    Dtypes: counts int64, the others fp64.
    """

    counts: Tensor
    penalty_sum: Tensor
    entropy_sums: Tensor
    z_sums: Tensor

    @classmethod
    def none(cls, config: ModelConfig, device: torch.device) -> "StepRouting":
        """Of no token."""
        num_layers, moe = len(config.expert_layers), config.moe
        counts = torch.zeros(num_layers, moe.chain_length, moe.num_experts, dtype=torch.int64, device=device)
        sums = torch.zeros(num_layers, dtype=torch.float64, device=device)
        return cls(counts, torch.zeros((), dtype=torch.float64, device=device), sums, sums.clone())

    def add_(self, log: RoutingLog) -> None:
        """Adds what was logged in the forward of a micro-batch."""
        self.counts.add_(log.counts_LCE)
        self.penalty_sum.add_(log.penalty_sum.detach())
        self.entropy_sums.add_(torch.stack([layer.entropy_sum for layer in log.layers]))
        self.z_sums.add_(torch.stack([layer.z_sum for layer in log.layers]))

    def tensors(self) -> tuple[Tensor, ...]:
        """All sums, in the order that `from_numbers` reads."""
        return self.counts, self.penalty_sum, self.entropy_sums, self.z_sums

    def from_numbers(self, numbers: Sequence[float]) -> "StepRouting":
        """Sums of these shapes, on the CPU, from all their elements in one row."""
        parts = torch.tensor(numbers, dtype=torch.float64).split([tensor.numel() for tensor in self.tensors()])
        counts, *others = (part.view_as(mine) for part, mine in zip(parts, self.tensors(), strict=True))
        return StepRouting(counts.to(torch.int64), *others)


def keeps_books(config: ModelConfig) -> bool:
    """Whether the model has routers whose picks are counted."""
    return bool(config.expert_layers) and config.moe.kind == "picked"


def expert_record(model: nn.Module, config: ModelConfig, routing: StepRouting, *, with_loads: bool) -> dict[str, Any]:
    """What metrics.jsonl says of the experts in a step, each list by layer with experts.

    layers: which those are. penalty: what balance and z-loss add to the loss. max_violation: the busiest expert's load
    over the mean, less one. dead: experts without a token. would_drop: share of picks beyond 1.25 times the mean load,
    which a layer of fixed capacity would drop. entropy: of the router's scores, in nats. z: mean of
    logsumexp(logits)^2. And, `with_loads`, bias_range: lowest and highest balancing bias; load: each expert's share of
    the layer's picks.
    """
    moe = config.moe
    num_tokens = max(1, int(routing.counts[0, 0].sum()) // moe.num_picked)
    loads = load_statistics(routing.counts)
    record: dict[str, Any] = {
        "layers": list(config.expert_layers),
        "penalty": routing.penalty_sum.item() / num_tokens,
        "max_violation": [round(load.max_violation, 4) for load in loads],
        "dead": [load.dead for load in loads],
        "would_drop": [round(load.would_drop, 4) for load in loads],
        "entropy": _rounded(routing.entropy_sums / (num_tokens * moe.chain_length)),
        "z": _rounded(routing.z_sums / (num_tokens * moe.chain_length)),
    }
    if with_loads:
        counts_LE = routing.counts.sum(dim=1)
        record["load"] = [_rounded(shares) for shares in counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)]
        if moe.bias != "none":  # on the device, which this waits for
            routers = [module for module in model.modules() if isinstance(module, Router)]
            biases = torch.stack([router.bias for router in routers if router.bias is not None])
            biases = biases.unflatten(0, (-1, moe.chain_length)).flatten(1)
            record["bias_range"] = [_rounded(ends) for ends in torch.stack(biases.aminmax(dim=1), dim=1)]
    return record


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]

"""The mixture of experts that takes the place of a block's MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import DocumentBoundaries
from kernels.moe import moe_experts
from kernels.moe_route import Dispatch, moe_route
from model.balance import router_stats, stats_of_links
from model.cache import KVCache
from model.config import ModelConfig
from model.mlp import MLP
from model.router import Router, RouterStats, Routing, RoutingInputs, routing_noise
from model.soft_moe import ChunkSoft


class GroupedExperts(nn.Module):
    """The routed experts' SwiGLU networks, stacked: one parameter has all of them, so that sharding and the order of
    collectives never depend on which experts have tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        num_experts, size = config.moe.num_experts, config.moe.expert_size
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * size, config.hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, config.hidden_size, size))

    def forward(self, x_MD: Tensor, weights_MJ: Tensor, dispatch: Dispatch) -> Tensor:
        """The weighted sum of what its experts make of each token; (M, D) -> (M, D)."""
        return moe_experts(x_MD, weights_MJ, dispatch, self.gate_up, self.down)


class MoE(nn.Module):
    """Routed experts, shared ones beside them, and chains of both.

    A chain passes a token through the same experts several times, with a router for each link; see
    MoEConfig.chain_residual. Source: Wang et al., "Chain-of-Experts", 2025 (residuals: its reference implementation).

    `recompute` runs the experts again in the backward instead of keeping what is inside them. Routing is never run
    again: a second run of a router may pick otherwise, and then gradients belong to no function.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        moe = config.moe
        self.config, self.layer = moe, layer
        self.recompute = False
        self.replaces_stream = moe.kind == "picked" and moe.chain_residual == "inner"
        self.experts = GroupedExperts(config)
        is_soft = moe.kind == "chunk_soft"
        num_routers = 0 if is_soft else moe.chain_length
        self.routers = nn.ModuleList(Router(moe, config.hidden_size) for _ in range(num_routers))
        self.soft = ChunkSoft(config, layer) if is_soft else None
        self.shared = MLP(config, moe.shared_size) if moe.shared_size else None
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if moe.shared_gate else None

    def forward(
        self,
        x_BTD: Tensor,
        inputs: RoutingInputs | None = None,
        cache: KVCache | None = None,
        boundaries: DocumentBoundaries | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        """(B, T, D) -> (B, T, D), and what the routers say about it: None without inputs, or without routers.

        The cache and the boundaries are for `chunk_soft`: routed experts look at one token at a time.
        """
        if self.soft is not None:
            return self._maybe_recomputed(self._read_chunks, self.soft, x_BTD, boundaries, cache), None
        links: list[RouterStats] = []
        for link in range(self.config.chain_length):
            y_BTD, stats = self._link(link, x_BTD, inputs)
            x_BTD = y_BTD if self.config.chain_residual == "outer" else x_BTD + y_BTD
            links += [stats] if stats is not None else []
        return x_BTD, stats_of_links(links) if links else None

    def _link(self, link: int, x_BTD: Tensor, inputs: RoutingInputs | None) -> tuple[Tensor, RouterStats | None]:
        """One pass of tokens through router, experts and shared experts."""
        routing = self._route(link, x_BTD, inputs)
        dispatch = moe_route(routing.picks_MJ, self.config.num_experts)
        y_BTD = self._maybe_recomputed(self._mix, x_BTD, routing.weights_MJ, dispatch)
        if inputs is None:
            return y_BTD, None
        router = self.routers[link]
        assert isinstance(router, Router)
        return y_BTD, router_stats(self.config, routing, router.load, len(x_BTD), inputs.counted_BT)

    def _route(self, link: int, x_BTD: Tensor, inputs: RoutingInputs | None) -> Routing:
        noise_ME = None
        if self.config.sampling and inputs is not None and inputs.noise_seed is not None:
            seed, num_experts = inputs.noise_seed, self.config.num_experts
            noise_ME = routing_noise(inputs.tokens_BT, num_experts, seed, self.layer, link)
        return self.routers[link](x_BTD.flatten(0, 1), noise_ME)

    def _mix(self, x_BTD: Tensor, weights_MJ: Tensor, dispatch: Dispatch) -> Tensor:
        y_MD = self.experts(x_BTD.flatten(0, 1), weights_MJ, dispatch)
        # A view in all but name: FSDP warns of modules that return views, as their gradients' hooks may get lost.
        return self._with_shared(x_BTD, torch.ops.aten._unsafe_view(y_MD, x_BTD.shape))

    def _read_chunks(
        self, soft: ChunkSoft, x_BTD: Tensor, boundaries: DocumentBoundaries | None, cache: KVCache | None
    ) -> Tensor:
        y_BTD = soft(x_BTD, self.experts.gate_up, self.experts.down, boundaries, cache)
        return self._with_shared(x_BTD, y_BTD)

    def _with_shared(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        if self.shared is None:
            return y_BTD
        shared_BTD = self.shared(x_BTD)
        if self.shared_gate is not None:
            shared_BTD = F.sigmoid(self.shared_gate(x_BTD)) * shared_BTD
        return y_BTD + shared_BTD

    def _maybe_recomputed(self, function, *inputs) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # No random number is drawn inside.
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)

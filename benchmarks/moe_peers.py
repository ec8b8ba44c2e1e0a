"""Other projects' ways through a mixture of experts, if they are installed, and torch's. None is a dependency.

As in kernel_peers.py: a loader imports, and returns a function of the operator's tensors. A layer's are x (M, D),
weights (M, J), gate_up (E, 2F, D), down (E, D, F) and picks (M, J); each finds the order of rows from the picks itself.
Only layers that drop no token are here. Weights are given as our layer keeps them: what needs another layout, or its
own modules around its weights, would be timed with a copy that its own users do not make.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_peers import Function


def hf_loop() -> Function:
    """What transformers' mixtures compute without an optimised back-end: one expert after the other, added by index."""

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        is_picked_EJM = F.one_hot(picks, len(down)).permute(2, 1, 0)
        for expert in is_picked_EJM.sum(dim=(1, 2)).nonzero()[:, 0]:
            pick, token = torch.where(is_picked_EJM[expert])
            rows = F.linear(_swiglu(F.linear(x[token], gate_up[expert])), down[expert])
            y.index_add_(0, token, (rows * weights[token, pick, None]).to(y.dtype))
        return y

    return layer


def torch_grouped_mm() -> Function:
    """torch's grouped product between a gather by index and a scatter that adds, as torchtitan has it."""

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        experts, slots = picks.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(len(down), device=x.device), right=True, out_int32=True)
        tokens = slots // picks.shape[1]
        a = _swiglu(F.grouped_mm(x[tokens], gate_up.transpose(1, 2), offs=ends))
        o = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add(0, tokens, (o * weights.reshape(-1)[slots, None]).to(x.dtype))

    return layer


def liger_layer() -> Function:
    """Triton kernels that gather in the first product; the gradient of the weights by atomics."""
    from liger_kernel.ops import LigerFusedMoEFunction  # pyright: ignore[reportMissingImports]

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up, down, picks.to(torch.int32), weights)

    return layer


def scatter_layer() -> Function:
    """ScatterMoE's two products, gather and scatter inside of them."""
    from scattermoe.parallel_experts import (  # pyright: ignore[reportMissingImports]
        flatten_sort_count,
        parallel_linear,
    )

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        order = flatten_sort_count(picks, num_experts=len(down))
        h = parallel_linear(x, gate_up.permute(0, 2, 1), picks.shape[1], *order, grouped_out=True)
        return parallel_linear(_swiglu(h), down.permute(0, 2, 1), 1, *order, grouped_in=True, gates=weights.to(x.dtype))

    return layer


def sonic_layer() -> Function:
    """SonicMoE's CuTe kernels for Hopper."""
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]
    from sonicmoe.functional import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        tokens = torch.arange(len(x), device=x.device, dtype=torch.int32).repeat_interleave(picks.shape[1])
        y, _ = moe_general_routing_inputs(
            x, weights.reshape(-1), tokens, picks.reshape(-1).to(torch.int32), gate_up.permute(1, 2, 0), None,
            down.permute(1, 2, 0), None, len(down), torch.cuda.current_stream().cuda_stream, ActivationType.SWIGLU,
            is_concatenated_gate_up=True,
        )  # fmt: skip
        return y

    return layer


def megablocks_layer() -> Function:
    """MegaBlocks' grouped experts: its sort, gather and scatter around grouped_gemm's products."""
    from megablocks import grouped_gemm_util, ops  # pyright: ignore[reportMissingImports]

    grouped_gemm_util.assert_grouped_gemm_is_available()
    gmm = grouped_gemm_util.ops.gmm

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor) -> Tensor:
        experts, num_picked = picks.reshape(-1).int(), picks.shape[1]
        order, slots = ops.sort(experts, max(1, (len(down) - 1).bit_length()))
        counts = ops.histogram(experts, len(down))
        ends = ops.inclusive_cumsum(counts, 0)
        sizes = counts.cpu().long()
        h = gmm(ops.gather(x, slots, order, ends, num_picked), gate_up, sizes, trans_b=True)
        o = gmm(_swiglu(h), down, sizes, trans_b=True)
        return ops.scatter(o, slots, order, weights.reshape(-1).to(x.dtype), ends, num_picked)

    return layer


# --- Parts of a layer.


def liger_route() -> Function:
    """Slots by row, rows by slot, and where experts begin; its other results are not compared."""
    from liger_kernel.ops.fused_moe import compute_routing_metadata  # pyright: ignore[reportMissingImports]

    def route(picks: Tensor, one_per_expert: Tensor) -> tuple[Tensor, ...]:
        _, offsets, _, slots, rows, *_ = compute_routing_metadata(picks.to(torch.int32), len(one_per_expert))
        return slots, rows.view(picks.shape), offsets

    return route


def megablocks_permute() -> Function:
    """A gather whose programs take one row each, and for the gradient one token each."""
    from megablocks import ops  # pyright: ignore[reportMissingImports]

    def permute(x: Tensor, slots: Tensor, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return ops.gather(x, slots, experts, ends, rows.shape[1])

    return permute


def liger_combine() -> Function:
    """A program for each token."""
    from liger_kernel.ops.fused_moe import _token_aggregation  # pyright: ignore[reportMissingImports]

    def combine(o: Tensor, rows: Tensor, weights: Tensor, *_order: Tensor) -> Tensor:
        return _token_aggregation(o, weights.reshape(-1), rows.reshape(-1), *rows.shape, o.shape[1])

    return combine


def megablocks_combine() -> Function:
    """A scatter whose programs take one row each, then a sum over a token's rows."""
    from megablocks import ops  # pyright: ignore[reportMissingImports]

    def combine(o: Tensor, rows: Tensor, weights: Tensor, slots: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        return ops.scatter(o, slots, experts, weights.reshape(-1).to(o.dtype), ends, rows.shape[1])

    return combine


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up

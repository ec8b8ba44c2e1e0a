"""The operators of a mixture of experts: building the index, moving rows, and the whole layer.

A layer is timed with its index, because others cannot be timed without theirs. Its FLOPs are those of the products,
6 M J d F forward and twice that backward. What the parts must move: the index reads a pick of 8 bytes and writes slot
and row; a permutation and its inverse read or write each token once and each row once.
"""

from collections.abc import Mapping
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import moe_peers as peers
from benchmarks.kernel_operator import (
    BACKWARD,
    BOTH,
    FORWARD,
    Draw,
    Inputs,
    Operator,
    Phase,
    Shape,
    Sizes,
    Yardstick,
    sum_of,
)
from benchmarks.kernel_peers import Function
from kernels import launch
from kernels.moe import moe_experts, moe_experts_reference
from kernels.moe_combine import moe_combine, moe_combine_reference
from kernels.moe_gemm import Tile
from kernels.moe_route import Dispatch, moe_route, moe_route_reference
from kernels.swiglu import swiglu

_OLMOE = {"M": 16_384, "d": 2_048, "F": 1_024, "E": 64, "J": 8}
_MIXTRAL_LIKE = {"M": 16_384, "d": 2_048, "F": 5_632, "E": 8, "J": 2}
_QWEN3 = {"M": 32_768, "d": 2_048, "F": 768, "E": 128, "J": 8}
_ODD = {"M": 4_097, "d": 2_056, "F": 1_030, "E": 7, "J": 3}

GROUPED_MM = "ours, grouped_mm"
DENSE = "dense FFN"
MOVES = "index and combine alone"


def _shape(shape: Shape, *keys: str) -> Shape:
    return {key: shape[key] for key in keys}


def _dispatch(draw: Draw, shape: Shape) -> tuple[Dispatch, Tensor]:
    picks, weights = draw.picks(shape["M"], shape["J"], shape["E"])
    return moe_route_reference(picks, shape["E"]), weights


# --- The index: of the dispatch, what others have as well.


def route(picks_MJ: Tensor, one_per_expert_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots by row, rows by slot, and where experts begin."""
    return moe_route(picks_MJ, len(one_per_expert_E))[:3]


def route_reference(picks_MJ: Tensor, one_per_expert_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a sort."""
    return moe_route_reference(picks_MJ, len(one_per_expert_E))[:3]


def _draw_route(draw: Draw, shape: Shape) -> Inputs:
    picks, _ = draw.picks(shape["M"], shape["J"], shape["E"])
    # The number of experts as a tensor: a peer is given tensors alone.
    return Inputs((), (picks, picks.new_empty(shape["E"])))


ROUTE = Operator(
    name="moe_route",
    leaves=(),
    outputs=("slots", "rows", "offsets"),
    draw=_draw_route,
    ours="benchmarks.moe_cases:route",
    reference="benchmarks.moe_cases:route_reference",
    elements=lambda shape: {FORWARD: 8 * shape["M"] * shape["J"]},  # of 2 bytes each
    peers={"Liger": peers.liger_route},
    tiny=({"M": 9, "J": 2, "E": 5}, {"M": 30, "J": 3, "E": 40}),
    sizes=(
        Sizes({"M": 32_768, "J": 8, "E": 256}, (FORWARD,)),
        Sizes(_shape(_OLMOE, "M", "J", "E"), (FORWARD,)),
        Sizes(_shape(_MIXTRAL_LIKE, "M", "J", "E"), (FORWARD,)),
    ),
    full=(Sizes(_shape(_QWEN3, "M", "J", "E"), (FORWARD,)), Sizes({"M": 131_072, "J": 8, "E": 64}, (FORWARD,))),
    knobs={"kernels.moe_route:_ONE_HOT_ELEMENTS": (4_096, 8_192, 16_384, 32_768)},
)

# --- Rows of tokens, sorted by expert. The layer gathers in its first product; this is what that saves, and what the
# grouped_mm back-end does.


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD: Tensor, slots: Tensor, rows_MJ: Tensor) -> Tensor:
        ctx.save_for_backward(rows_MJ)
        return x_MD.index_select(0, slots // rows_MJ.shape[1])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return moe_combine(grads[0], *ctx.saved_tensors), None, None


def permute(x_MD: Tensor, slots: Tensor, rows_MJ: Tensor, *_order: Tensor) -> Tensor:
    """x by row; its gradient by our combine, without weights."""
    y_RD: Tensor = _Permute.apply(x_MD, slots, rows_MJ)  # pyright: ignore[reportAssignmentType]
    return y_RD


def permute_reference(x_MD: Tensor, slots: Tensor, rows_MJ: Tensor, *_order: Tensor) -> Tensor:
    """The same in plain torch."""
    return x_MD[slots // rows_MJ.shape[1]]


def _order(dispatch: Dispatch) -> tuple[Tensor, Tensor]:
    """The expert of each row, and where experts end: the form in which others know an order."""
    counts_E = dispatch.offsets.diff()
    experts_E = torch.arange(len(counts_E), dtype=torch.int32, device=counts_E.device)
    return experts_E.repeat_interleave(counts_E), dispatch.offsets[1:].contiguous()


def _draw_permute(draw: Draw, shape: Shape) -> Inputs:
    dispatch, _ = _dispatch(draw, shape)
    return Inputs((draw.normal(shape["M"], shape["d"]),), (dispatch.slots, dispatch.rows, *_order(dispatch)))


def _moved(shape: Shape) -> int:
    return (1 + shape["J"]) * shape["M"] * shape["d"]


_MOVES_TINY: tuple[Shape, ...] = (
    {"M": 9, "d": 40, "E": 4, "J": 2},
    {"M": 5, "d": 33, "E": 3, "J": 3},
)
_MOVES_SIZES = tuple(_shape(shape, "M", "d", "E", "J") for shape in (_OLMOE, _QWEN3, _MIXTRAL_LIKE))

PERMUTE = Operator(
    name="moe_permute",
    leaves=("x",),
    outputs=("rows of x",),
    draw=_draw_permute,
    ours="benchmarks.moe_cases:permute",
    reference="benchmarks.moe_cases:permute_reference",
    elements=lambda shape: sum_of(_moved(shape), _moved(shape)),
    intermediate=lambda shape: shape["J"] * shape["M"] * shape["d"],
    peers={"MegaBlocks": peers.megablocks_permute},
    tiny=_MOVES_TINY,
    sizes=tuple(Sizes(shape, (FORWARD, BACKWARD)) for shape in _MOVES_SIZES),
)

# --- The weighted sum of a token's rows, which is outside autograd.


def combine(o_RD: Tensor, rows_MJ: Tensor, weights_MJ: Tensor, *_order: Tensor) -> Tensor:
    """Our kernel."""
    return moe_combine(o_RD, rows_MJ, weights_MJ)


def combine_reference(o_RD: Tensor, rows_MJ: Tensor, weights_MJ: Tensor, *_order: Tensor) -> Tensor:
    """The same in plain torch."""
    return moe_combine_reference(o_RD, rows_MJ, weights_MJ)


def _draw_combine(draw: Draw, shape: Shape) -> Inputs:
    dispatch, weights = _dispatch(draw, shape)
    o_RD = draw.normal(shape["M"] * shape["J"], shape["d"])
    return Inputs((), (o_RD, dispatch.rows, weights, dispatch.slots, *_order(dispatch)))


COMBINE = Operator(
    name="moe_combine",
    leaves=(),
    outputs=("y",),
    draw=_draw_combine,
    ours="benchmarks.moe_cases:combine",
    reference="benchmarks.moe_cases:combine_reference",
    elements=lambda shape: {FORWARD: _moved(shape)},
    peers={"Liger": peers.liger_combine, "MegaBlocks": peers.megablocks_combine},
    peer_factor=4.0,
    tiny=_MOVES_TINY,
    sizes=tuple(Sizes(shape, (FORWARD,)) for shape in (*_MOVES_SIZES, _shape(_ODD, "M", "d", "E", "J"))),
    knobs={
        "kernels.moe_combine:_TILE_ELEMENTS": (1_024, 2_048, 4_096, 8_192),
        "kernels.moe_combine:_TILE_COLUMNS": (512, 1_024, 2_048),
    },
)

# --- The layer.


def experts(x_MD: Tensor, weights_MJ: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, picks_MJ: Tensor) -> Tensor:
    """The layer behind a router's picks, by the back-end that is chosen: on a GPU, our kernels."""
    return moe_experts(x_MD, weights_MJ, moe_route(picks_MJ, len(down_EDF)), gate_up_E2FD, down_EDF)


def experts_reference(
    x_MD: Tensor, weights_MJ: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, picks_MJ: Tensor
) -> Tensor:
    """The same in plain torch, one expert after the other: the back-end `loop`."""
    dispatch = moe_route_reference(picks_MJ, len(down_EDF))
    return moe_experts_reference(x_MD, weights_MJ, dispatch, gate_up_E2FD, down_EDF)


def _by_grouped_mm() -> Function:
    """The back-end `grouped_mm`: torch's products, our index and combine."""

    def layer(*tensors: Tensor) -> Tensor:
        with mock.patch.dict(launch._chosen, {"moe": "grouped_mm"}):
            return experts(*tensors)

    return layer


def _draw_experts(draw: Draw, shape: Shape) -> Inputs:
    tokens, hidden, width, num_experts = (shape[key] for key in ("M", "d", "F", "E"))
    picks, weights = draw.picks(tokens, shape["J"], num_experts)
    gate_up = draw.normal(num_experts, 2 * width, hidden).mul_(hidden**-0.5)
    down = draw.normal(num_experts, hidden, width).mul_(width**-0.5)
    return Inputs((draw.normal(tokens, hidden), weights, gate_up, down), (picks,))


def _experts_flops(shape: Shape) -> Mapping[Phase, int]:
    forward = 6 * shape["M"] * shape["J"] * shape["d"] * shape["F"]
    return sum_of(forward, 2 * forward)


def _dense() -> Function:
    """A feed-forward network as wide as a token's experts together, by cuBLAS and our SwiGLU."""
    return lambda x, gate_up, down: F.linear(swiglu(F.linear(x, gate_up)), down)


def _dense_inputs(inputs: Inputs) -> Inputs:
    """Its weights are the memory of the first experts, read as two matrices of another shape."""
    x, weights, gate_up, down = (leaf.detach() for leaf in inputs.leaves)
    hidden, width = x.shape[1], weights.shape[1] * down.shape[2]
    matrices = (
        gate_up.view(-1)[: 2 * width * hidden].view(2 * width, hidden),
        down.view(-1)[: hidden * width].view(hidden, width),
    )
    return Inputs(tuple(tensor.requires_grad_() for tensor in (x, *matrices)))


class _Moves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o_RD: Tensor, weights_MJ: Tensor, picks_MJ: Tensor, one_per_expert_E: Tensor) -> Tensor:
        rows_MJ = moe_route(picks_MJ, len(one_per_expert_E)).rows
        ctx.save_for_backward(o_RD, rows_MJ)
        return moe_combine(o_RD, rows_MJ, weights_MJ)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        o_RD, rows_MJ = ctx.saved_tensors
        moe_combine(o_RD, rows_MJ)  # as of the gradients of x by row, which are as large
        return o_RD, None, None, None


def _moves_inputs(inputs: Inputs) -> Inputs:
    (x, weights, _, down), (picks,) = (tuple(t.detach() for t in of_one) for of_one in (inputs.leaves, inputs.others))
    o_RD = x.repeat_interleave(picks.shape[1], dim=0).requires_grad_()
    return Inputs((o_RD,), (weights, picks, picks.new_empty(len(down))))


def _moves() -> Function:
    """What a layer does beside its products: the index and the combine, and for its gradients another combine."""
    return _Moves.apply  # pyright: ignore[reportReturnType]


_TILES = {
    "kernels.moe_gemm:_UP": (
        {(2, 128): Tile(columns=128, depth=64, warps=8, stages=3)},
        {(2, 128): Tile(columns=128, depth=32, warps=8, stages=4)},
        {(2, 128): Tile(columns=64, depth=64, warps=4, stages=4)},
        {(2, 128): Tile(columns=64, depth=64, warps=8, stages=4)},
    ),
    "kernels.moe_gemm:_ROWS": (
        {(2, 128): Tile(columns=256, depth=64, warps=8, stages=3)},
        {(2, 128): Tile(columns=256, depth=32, warps=8, stages=4)},
        {(2, 128): Tile(columns=128, depth=64, warps=8, stages=4)},
        {(2, 128): Tile(columns=128, depth=64, warps=4, stages=4)},
    ),
    "kernels.moe_gemm:_HIDDEN": (
        {(2, 128): Tile(columns=128, depth=64, warps=8, stages=4)},
        {(2, 128): Tile(columns=128, depth=64, warps=8, stages=3)},
        {(2, 128): Tile(columns=64, depth=64, warps=4, stages=4)},
    ),
    "kernels.moe_gemm:_WEIGHTS": (
        {2: Tile(rows=128, columns=256, depth=64, warps=8, stages=5)},
        {2: Tile(rows=128, columns=256, depth=64, warps=8, stages=4)},
        {2: Tile(rows=128, columns=128, depth=64, warps=8, stages=5)},
        {2: Tile(rows=128, columns=128, depth=64, warps=4, stages=4)},
    ),
    "kernels.moe_gemm:_GROUP": (4, 8, 16, 32),
}

EXPERTS = Operator(
    name="moe_experts",
    leaves=("x", "weights", "gate_up", "down"),
    outputs=("y",),
    draw=_draw_experts,
    ours="benchmarks.moe_cases:experts",
    reference="benchmarks.moe_cases:experts_reference",
    flops=_experts_flops,
    # The reference has two tensors of this size at least at a time, more than the judge reckons with.
    intermediate=lambda shape: 2 * shape["M"] * shape["J"] * max(shape["d"], 2 * shape["F"]),
    compiles_reference=False,
    peers={
        GROUPED_MM: _by_grouped_mm,
        "torchtitan": peers.torch_grouped_mm,
        "HF loop": peers.hf_loop,
        "Liger": peers.liger_layer,
        "ScatterMoE": peers.scatter_layer,
        "SonicMoE": peers.sonic_layer,
        "MegaBlocks": peers.megablocks_layer,
    },
    peer_factor=4.0,
    yardsticks={
        DENSE: Yardstick(_dense, _dense_inputs, is_equal_work=True),
        MOVES: Yardstick(_moves, _moves_inputs, is_equal_work=False),
    },
    tiny=({"M": 12, "d": 32, "F": 16, "E": 4, "J": 2}, {"M": 7, "d": 24, "F": 20, "E": 5, "J": 3}),
    sizes=(
        Sizes(_OLMOE),
        Sizes(_MIXTRAL_LIKE),
        Sizes(_QWEN3, (FORWARD, BOTH)),
        Sizes(_ODD, with_peers=False),
    ),
    full=(Sizes({**_OLMOE, "M": 65_536}, (FORWARD, BOTH)), Sizes({**_QWEN3, "M": 4_096}, (FORWARD, BOTH))),
    knobs=_TILES,
)

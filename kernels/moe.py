"""A mixture of SwiGLU experts: each token through the experts that were picked for it, weighted and added up.

    y[m] = sum_j weights[m, j] * down[e] (silu(gate[e] x[m]) * up[e] x[m]),  e = picks[m, j]

gate[e] is the first half of the rows of gate_up[e], up[e] the second. Three back-ends: `triton`, the kernels of
moe_gemm.py and moe_combine.py; `grouped_mm`, torch's grouped product between gathers; `loop`, plain torch one expert
after the other, the specification. No token is dropped, no expert has a limit, and one without tokens gets a gradient
of zeros. Routing is an input, made once by moe_route.py: what is computed again under recomputation uses the same.

Source: Shazeer et al., "Outrageously Large Neural Networks", 2017, equation 1; Gale et al., "MegaBlocks", 2022.
Shapes: x (M, D), weights (M, J), gate_up (E, 2F, D), down (E, D, F), y (M, D).
Dtypes: x, gate_up and down bf16, fp16, fp32 or fp64 alike, y too; weights and all sums fp32 (fp64 for fp64).
Memory kept for the backward, by triton and grouped_mm: D + 2 J F elements and J weights a token.
Cost: 6 M J D F FLOPs forward, 12 M J D F backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import moe_gemm
from kernels.launch import KernelError, chosen, runs_triton, sum_dtype
from kernels.moe_combine import launch_combine, moe_combine
from kernels.moe_gemm import rows_per_expert
from kernels.moe_route import Dispatch
from kernels.swiglu import swiglu, swiglu_reference

_SHAPES = "(M, D), (M, J), (E, 2F, D), (E, D, F)"


def moe_experts(x_MD: Tensor, weights_MJ: Tensor, dispatch: Dispatch, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Sends each row of x through its experts, as `dispatch` of moe_route says, and adds up what they answer.

    Raises:
        ValueError: shapes or dtypes do not agree.
        KernelError: the back-end that was chosen cannot run these tensors.
    """
    _check(x_MD, weights_MJ, dispatch, gate_up_E2FD, down_EDF)
    back_end = _back_end(x_MD, down_EDF)
    if back_end == "loop":
        return moe_experts_reference(x_MD, weights_MJ, dispatch, gate_up_E2FD, down_EDF)
    if back_end == "grouped_mm":
        y_MD: Tensor = _GroupedExperts.apply(x_MD, weights_MJ, gate_up_E2FD, down_EDF, *dispatch)  # pyright: ignore[reportAssignmentType]
        return y_MD
    operands = (x_MD, weights_MJ, gate_up_E2FD, down_EDF)
    keep_h = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    y_MD, _ = torch.ops.bessemer.moe_experts(*operands, *dispatch, keep_h)
    return y_MD


def moe_experts_reference(
    x_MD: Tensor, weights_MJ: Tensor, dispatch: Dispatch, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same function in plain torch, an expert at a time: the specification.

    Every expert is computed, on no rows if it has none: its gradient is zero then, where None would be an error under
    FSDP, which reduces the gradients of all ranks.
    """
    x_RD = x_MD[dispatch.slots // weights_MJ.shape[1]]
    o_RD = torch.cat(
        [
            F.linear(swiglu_reference(F.linear(rows, gate_up)), down)
            for rows, gate_up, down in zip(x_RD.split(rows_per_expert(dispatch)), gate_up_E2FD, down_EDF, strict=True)
        ]
    )
    return (weights_MJ[:, :, None] * o_RD[dispatch.rows]).sum(dim=1).to(x_MD.dtype)


def _check(x_MD: Tensor, weights_MJ: Tensor, dispatch: Dispatch, gate_up_E2FD: Tensor, down_EDF: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (x_MD, weights_MJ, gate_up_E2FD, down_EDF)]
    if [len(shape) for shape in shapes] != [2, 2, 3, 3]:
        raise ValueError(f"moe_experts: x, weights, gate_up, down {shapes}; expected {_SHAPES}")
    num_experts, hidden, width = down_EDF.shape
    if x_MD.shape[1] != hidden or gate_up_E2FD.shape != (num_experts, 2 * width, hidden):
        raise ValueError(f"moe_experts: x, weights, gate_up, down {shapes}; expected {_SHAPES}")
    if weights_MJ.shape[0] != x_MD.shape[0] or dispatch.rows.shape != weights_MJ.shape:
        raise ValueError(
            f"moe_experts: x {shapes[0]}, weights {shapes[1]}, routed picks {tuple(dispatch.rows.shape)}; expected "
            "(M, D), (M, J), (M, J)"
        )
    if dispatch.offsets.numel() != num_experts + 1:
        raise ValueError(
            f"moe_experts: {num_experts} experts, but tokens were routed to {dispatch.offsets.numel() - 1}; give "
            "moe_route the same number"
        )
    if not x_MD.dtype == gate_up_E2FD.dtype == down_EDF.dtype or weights_MJ.dtype != sum_dtype(x_MD):
        raise ValueError(
            f"moe_experts: x is {x_MD.dtype}, gate_up {gate_up_E2FD.dtype}, down {down_EDF.dtype}, weights "
            f"{weights_MJ.dtype}; expected one dtype, and weights in {sum_dtype(x_MD)}"
        )


def _back_end(x_MD: Tensor, down_EDF: Tensor) -> str:
    choice = chosen("moe")
    if choice == "auto":
        # On a CPU the loop takes less time than the grouped product: 47 ms a step against 52 for 8 experts, 209 against
        # 236 for 64 (2,048 tokens, D 192, F 256, fp32, one thread).
        return "triton" if x_MD.dtype != torch.float64 and runs_triton("moe", x_MD) else "loop"
    if choice == "triton":
        runs_triton("moe", x_MD)  # raises its error where it cannot
    if choice == "grouped_mm":
        _check_grouped_mm(x_MD, down_EDF)
    return choice


def _check_grouped_mm(x_MD: Tensor, down_EDF: Tensor) -> None:
    if x_MD.dtype == torch.float64:
        raise KernelError('kernels.moe = "grouped_mm": torch has no grouped product of fp64; choose "loop" or "auto"')
    if width := _odd_width(x_MD, down_EDF):
        raise KernelError(
            f'kernels.moe = "grouped_mm": rows of {width} elements of {x_MD.dtype}; torch wants multiples of 16 bytes. '
            'Change the model\'s sizes, or choose "triton", "loop" or "auto"'
        )


def _odd_width(x_MD: Tensor, down_EDF: Tensor) -> int | None:
    """Of the widths D and F, the first whose rows are no multiple of 16 bytes."""
    return next((width for width in down_EDF.shape[1:] if width * x_MD.element_size() % 16), None)


# --- Triton: custom ops and autograd. Opaque ones keep torch.compile's graph whole and its choice of kernel ours.


@torch.library.custom_op("bessemer::moe_experts", mutates_args=())
def _forward_op(
    x_MD: Tensor, weights_MJ: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor,
    slots: Tensor, rows: Tensor, offsets: Tensor, tile_experts: Tensor, tile_rows: Tensor, keep_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h): h, the rows before SwiGLU, is what the backward needs beside the inputs; empty if it is not kept."""
    dispatch = Dispatch(slots, rows, offsets, tile_experts, tile_rows)
    h_R2F, a_RF = moe_gemm.gather_up(x_MD, gate_up_E2FD, dispatch, keep_h)
    o_RD = moe_gemm.rows_product(a_RF, down_EDF, dispatch)
    return launch_combine(o_RD, rows, weights_MJ), h_R2F


@_forward_op.register_fake
def _(x_MD, weights_MJ, gate_up_E2FD, down_EDF, slots, rows, offsets, tile_experts, tile_rows, keep_h):
    return x_MD.new_empty(x_MD.shape), x_MD.new_empty(rows.numel() if keep_h else 0, gate_up_E2FD.shape[1])


@torch.library.custom_op("bessemer::moe_experts_backward", mutates_args=())
def _backward_op(
    dy_MD: Tensor, x_MD: Tensor, weights_MJ: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, h_R2F: Tensor,
    slots: Tensor, rows: Tensor, offsets: Tensor, tile_experts: Tensor, tile_rows: Tensor,
    x_gradient: bool, gate_up_gradient: bool, down_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweights, d gate_up, d down); one that is not asked for is empty."""
    dispatch = Dispatch(slots, rows, offsets, tile_experts, tile_rows)
    dh_R2F, wa_RF, dweights_MJ = moe_gemm.hidden_gradient(dy_MD, weights_MJ, h_R2F, down_EDF, dispatch)
    dx_MD, d_gate_up, d_down = (x_MD.new_empty(0) for _ in range(3))
    if down_gradient:
        d_down = moe_gemm.weight_gradient(dy_MD, wa_RF, dispatch, gathers_left=True)
    del wa_RF  # before the next large tensors come
    if gate_up_gradient:
        d_gate_up = moe_gemm.weight_gradient(dh_R2F, x_MD, dispatch)
    if x_gradient:
        dx_RD = moe_gemm.rows_product(dh_R2F, gate_up_E2FD, dispatch, transposed=True)
        dx_MD = launch_combine(dx_RD, rows, None)
    return dx_MD, dweights_MJ, d_gate_up, d_down


@_backward_op.register_fake
def _(
    dy_MD, x_MD, weights_MJ, gate_up_E2FD, down_EDF, h_R2F, slots, rows, offsets, tile_experts, tile_rows,
    x_gradient, gate_up_gradient, down_gradient,
):  # fmt: skip
    asked = ((x_MD, x_gradient), (gate_up_E2FD, gate_up_gradient), (down_EDF, down_gradient))
    dx_MD, d_gate_up, d_down = (x_MD.new_empty(t.shape if is_asked else 0) for t, is_asked in asked)
    return dx_MD, weights_MJ.new_empty(weights_MJ.shape), d_gate_up, d_down


def _save_for_backward(ctx, inputs, output) -> None:
    x_MD, weights_MJ, gate_up_E2FD, down_EDF, *dispatch, _ = inputs
    _, h_R2F = output
    ctx.mark_non_differentiable(h_R2F)
    ctx.set_materialize_grads(False)  # else backward gets zeros for the gradient of h, as large as h
    ctx.save_for_backward(x_MD, weights_MJ, gate_up_E2FD, down_EDF, h_R2F, *dispatch)


def _backward(ctx, dy_MD: Tensor | None, _dh: Tensor | None):
    if dy_MD is None:
        return (None,) * 10
    x_gradient, _, gate_up_gradient, down_gradient, *_ = ctx.needs_input_grad
    dx_MD, dweights_MJ, d_gate_up, d_down = torch.ops.bessemer.moe_experts_backward(
        dy_MD, *ctx.saved_tensors, x_gradient, gate_up_gradient, down_gradient
    )
    return dx_MD, dweights_MJ, d_gate_up, d_down, *(None,) * 6  # autograd drops what no input wants


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.bessemer.moe_experts)
def _flops(x_shape, weights_shape, gate_up_shape, down_shape, *_, out_shape=None, **__) -> int:
    (num_tokens, picks), (_, hidden, width) = weights_shape, down_shape
    return 6 * num_tokens * picks * hidden * width


@register_flop_formula(torch.ops.bessemer.moe_experts_backward)
def _backward_flops(dy_shape, x_shape, weights_shape, gate_up_shape, down_shape, *rest, out_shape=None, **_) -> int:
    (num_tokens, picks), (_, hidden, width) = weights_shape, down_shape
    x_gradient, gate_up_gradient, down_gradient = rest[-3:]
    products = 1 + 2 * x_gradient + 2 * gate_up_gradient + down_gradient
    return 2 * products * num_tokens * picks * hidden * width


# --- torch's grouped product. Its results on no rows are not to be relied on, and rows are gathered, never scattered:
# a scatter of gradients has no order.


class _GroupedExperts(torch.autograd.Function):
    """Keeps what the Triton kernels keep, and like them gathers the gradient of x by row."""

    @staticmethod
    def forward(
        ctx, x_MD: Tensor, weights_MJ: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, *parts: Tensor
    ) -> Tensor:
        dispatch = Dispatch(*parts)
        x_RD = x_MD.index_select(0, _tokens(dispatch))
        h_R2F = _grouped_mm(x_RD, gate_up_E2FD.transpose(1, 2), dispatch)
        o_RD = _grouped_mm(swiglu(h_R2F), down_EDF.transpose(1, 2), dispatch)
        ctx.save_for_backward(x_MD, weights_MJ, gate_up_E2FD, down_EDF, h_R2F, *parts)
        return moe_combine(o_RD, dispatch.rows, weights_MJ)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weights_MJ, gate_up_E2FD, down_EDF, h_R2F, *parts = ctx.saved_tensors
        dispatch = Dispatch(*parts)
        tokens_R = _tokens(dispatch)
        x_gradient, weights_gradient, gate_up_gradient, down_gradient, *_ = ctx.needs_input_grad
        dy_RD = grads[0].index_select(0, tokens_R)
        t_RF = _grouped_mm(dy_RD, down_EDF, dispatch)
        weights_R1 = weights_MJ.reshape(-1).index_select(0, dispatch.slots)[:, None]
        with torch.enable_grad():
            h_R2F = h_R2F.detach().requires_grad_()
            a_RF = swiglu(h_R2F)
        (dh_R2F,) = torch.autograd.grad(a_RF, h_R2F, (weights_R1 * t_RF).to(a_RF.dtype))
        a_RF = a_RF.detach()
        dx_MD = dweights_MJ = d_gate_up = d_down = None
        if weights_gradient:
            dweights_R = (t_RF.to(weights_MJ.dtype) * a_RF).sum(dim=1)
            dweights_MJ = dweights_R.index_select(0, dispatch.rows.view(-1)).view_as(weights_MJ)
        if down_gradient:
            d_down = _grouped_sums(dy_RD, (weights_R1 * a_RF).to(a_RF.dtype), dispatch)
        if gate_up_gradient:
            d_gate_up = _grouped_sums(dh_R2F, x_MD.index_select(0, tokens_R), dispatch)
        if x_gradient:
            dx_MD = moe_combine(_grouped_mm(dh_R2F, gate_up_E2FD, dispatch), dispatch.rows)
        return dx_MD, dweights_MJ, d_gate_up, d_down, *(None,) * len(parts)


def _tokens(dispatch: Dispatch) -> Tensor:
    return dispatch.slots // dispatch.rows.shape[1]


def _grouped_mm(rows_RK: Tensor, matrix_EKN: Tensor, dispatch: Dispatch) -> Tensor:
    return F.grouped_mm(rows_RK, matrix_EKN, offs=dispatch.offsets[1:])


def _grouped_sums(left_RP: Tensor, right_RQ: Tensor, dispatch: Dispatch) -> Tensor:
    """sum over the rows r of each expert of left[r] right[r]^T, (E, P, Q)."""
    sums_EPQ = F.grouped_mm(left_RP.T, right_RQ, offs=dispatch.offsets[1:])
    return torch.where(dispatch.offsets.diff()[:, None, None] > 0, sums_EPQ, 0.0)

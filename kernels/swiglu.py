"""SwiGLU product on packed gate and up projections, forward and backward.

    y = silu(gate) * up,  silu(z) = z * sigmoid(z),  gate = x[..., :F], up = x[..., F:]

With s = sigmoid(gate):  dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * gate * s.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.
Shapes: x (..., 2F) -> y (..., F). Any number of rows, any F.
Dtypes: bf16, fp16, fp32 (fp64 under the interpreter); computed in fp32 (fp64 for fp64), y in x's dtype.
Bytes, elements per row: forward reads 2F, writes F; backward reads 3F, writes 2F. The backward computes silu again, so
that of the forward only its input is kept.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import num_warps, rows_of, runs_triton

# Elements of one tile and of its widest row: 16 bytes an access from every thread, and little of the last tile of a row
# idle (5632 columns are five and a half of them).
_TILE_ELEMENTS = 2_048
_TILE_COLUMNS = 1_024


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiplies SiLU of the first half of the last axis by the second half.

    Raises:
        ValueError: the last axis is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: last axis of {tuple(gate_up.shape)} is odd; gate and up have equal widths")
    if not runs_triton("swiglu", gate_up):
        return swiglu_reference(gate_up)
    return torch.ops.bessemer.swiglu(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The same function in plain torch: the specification."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# --- Autograd registration. An opaque custom op keeps torch.compile's graph whole and its choice of kernel ours.


@torch.library.custom_op("bessemer::swiglu", mutates_args=())
def _forward_op(gate_up: Tensor) -> Tensor:
    y = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    if y.numel():
        gate_up_MF = rows_of(gate_up)
        num_rows, width = gate_up_MF.shape[0], y.shape[-1]
        grid, column_tiles, rows, columns = _tiles(num_rows, width)
        _forward_kernel[grid](
            gate_up_MF, gate_up_MF.stride(0), y, num_rows, width=width, IN_FP64=y.dtype == torch.float64,
            COLUMN_TILES=column_tiles, ROWS=rows, BLOCK=columns, num_warps=num_warps(_TILE_ELEMENTS),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return y


@_forward_op.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("bessemer::swiglu_backward", mutates_args=())
def _backward_op(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The packed gradient of gate_up."""
    gradient = gate_up.new_empty(gate_up.shape)
    if gradient.numel():
        dy_MF, gate_up_MF = rows_of(dy), rows_of(gate_up)
        num_rows, width = dy_MF.shape
        grid, column_tiles, rows, columns = _tiles(num_rows, width)
        _backward_kernel[grid](
            dy_MF, dy_MF.stride(0), gate_up_MF, gate_up_MF.stride(0), gradient, num_rows, width=width,
            IN_FP64=gate_up.dtype == torch.float64,
            COLUMN_TILES=column_tiles, ROWS=rows, BLOCK=columns, num_warps=num_warps(_TILE_ELEMENTS),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return gradient


@_backward_op.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    return torch.ops.bessemer.swiglu_backward(dy, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _tiles(num_rows: int, width: int) -> tuple[tuple[int], int, int, int]:
    """(grid, tiles side by side, rows of a tile, columns of a tile)."""
    columns = min(_TILE_COLUMNS, 1 << (width - 1).bit_length())  # tl.arange wants a power of two
    rows = _TILE_ELEMENTS // columns
    column_tiles = -(-width // columns)
    return (-(-num_rows // rows) * column_tiles,), column_tiles, rows, columns


# --- Kernels.


@triton.jit
def _sigmoid(z):
    # Of -|z|, because exp(-z) overflows for z far below zero.
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _forward_kernel(
    gate_up_ptr, gate_up_stride, y_ptr, num_rows,
    width: tl.constexpr, IN_FP64: tl.constexpr, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    # int64 before any stride: row * stride passes 2**31 at 200k rows of 2 * 5632.
    row = (tl.program_id(0) // COLUMN_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % COLUMN_TILES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < width)
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(SUM)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(SUM)
    y = gate * _sigmoid(gate) * up
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr, dy_stride, gate_up_ptr, gate_up_stride, gradient_ptr, num_rows,
    width: tl.constexpr, IN_FP64: tl.constexpr, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    row = (tl.program_id(0) // COLUMN_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % COLUMN_TILES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < width)
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(SUM)
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(SUM)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(SUM)
    sigmoid = _sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = dy * gate * sigmoid
    dgate_ptr = gradient_ptr + row * (2 * width) + column
    tl.store(dgate_ptr, dgate.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(dgate_ptr + width, dup.to(gradient_ptr.dtype.element_ty), mask=mask)

"""RMSNorm, alone or fused with the residual addition before it, forward and backward.

    h = x + residual                      (h = x without a residual)
    y = h / sqrt(mean(h^2) + eps) * w     over the last axis

With n = h * rstd and g = dy * w:  dx = dresidual = rstd * (g - n * mean(g * n)) + dh,  dw = sum over rows of dy * n.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equations 3 and 4.
Shapes: x, residual (..., N); w (N,). Any number of rows, N up to MAX_WIDTH.
Dtypes: bf16, fp16, fp32 (fp64 under the interpreter); sums in fp32 (fp64 for fp64); y and h in x's dtype.
Bytes, elements per row: forward reads x [residual], writes y [h]; backward reads dy, h [dh], writes dx. w, dw and the
fp32 partial sums of dw (one row per program) are small beside them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import num_persistent_programs, num_warps, rows_of, runs_triton, sum_dtype

# One row lives in the registers of one program.
MAX_WIDTH = 65_536
# Elements of one tile: narrow rows share a program so that its loads stay wide.
_TILE_ELEMENTS = 4_096


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalises the last axis of x (..., N) by its root mean square and scales it by w (N,).

    Raises:
        ValueError: w does not match x, or the row is wider than MAX_WIDTH.
    """
    _check(x, None, w)
    if not runs_triton("rms_norm", x):
        return rms_norm_reference(x, w, eps)
    y, _, _ = torch.ops.bessemer.rms_norm(x, None, w, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(x + residual), x + residual) in one pass over memory.

    Raises:
        ValueError: shapes or dtypes of x, residual and w do not agree, or the row is wider than MAX_WIDTH.
    """
    _check(x, residual, w)
    if not runs_triton("rms_norm", x):
        return add_rms_norm_reference(x, residual, w, eps)
    y, h, _ = torch.ops.bessemer.rms_norm(x, residual, w, eps)
    return y, h


def rms_norm_reference(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """The same function in plain torch: the specification."""
    return F.rms_norm(x, w.shape, w, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, w: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    h = x + residual
    return rms_norm_reference(h, w, eps), h


def _check(x: Tensor, residual: Tensor | None, w: Tensor) -> None:
    if w.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: w has shape {tuple(w.shape)}, x's last axis is {x.shape[-1]}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rms_norm: rows of {x.shape[-1]} elements; at most {MAX_WIDTH} fit one program")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"add_rms_norm: residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}"
        )


# --- Autograd registration. An opaque custom op keeps torch.compile's graph whole and its choice of kernel ours.


@torch.library.custom_op("bessemer::rms_norm", mutates_args=())
def _forward_op(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, rstd); h is empty without a residual, because a custom op may not return its input."""
    x_MN = rows_of(x)
    residual_MN = rows_of(residual) if residual is not None else x_MN
    num_rows, width = x_MN.shape
    y_MN = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    h_MN = torch.empty_like(y_MN) if residual is not None else y_MN
    rstd_M = torch.empty(num_rows, dtype=sum_dtype(x), device=x.device)
    block_width, rows_per_tile = _tile(width)
    if num_rows:
        _forward_kernel[(-(-num_rows // rows_per_tile),)](
            x_MN, x_MN.stride(0), residual_MN, residual_MN.stride(0), w.contiguous(), y_MN, h_MN, rstd_M, num_rows,
            eps=eps, width=width, HAS_RESIDUAL=residual is not None, IN_FP64=x.dtype == torch.float64,
            ROWS=rows_per_tile, BLOCK=block_width, num_warps=num_warps(block_width * rows_per_tile),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    h = h_MN.view(x.shape) if residual is not None else x.new_empty(0)
    return y_MN.view(x.shape), h, rstd_M


@_forward_op.register_fake
def _(x: Tensor, residual: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y) if residual is not None else x.new_empty(0)
    return y, h, x.new_empty(x.numel() // max(1, x.shape[-1]), dtype=sum_dtype(x))


@torch.library.custom_op("bessemer::rms_norm_backward", mutates_args=())
def _backward_op(dy: Tensor, dh: Tensor | None, h: Tensor, w: Tensor, rstd_M: Tensor) -> tuple[Tensor, Tensor]:
    dy_MN, h_MN = rows_of(dy), rows_of(h)
    dh_MN = rows_of(dh) if dh is not None else dy_MN
    num_rows, width = h_MN.shape
    dx_MN = torch.empty((num_rows, width), dtype=h.dtype, device=h.device)
    block_width, rows_per_tile = _tile(width)
    num_tiles = -(-num_rows // rows_per_tile)
    num_programs = num_persistent_programs(h, num_tiles)
    # Every program writes its row, also when it got no tile, so nothing here is read unwritten.
    partial_dw_PN = torch.empty((num_programs, width), dtype=sum_dtype(h), device=h.device)
    _backward_kernel[(num_programs,)](
        dy_MN, dy_MN.stride(0), dh_MN, dh_MN.stride(0), h_MN, h_MN.stride(0), w.contiguous(), rstd_M, dx_MN,
        partial_dw_PN, num_rows, width=width, HAS_DH=dh is not None, IN_FP64=h.dtype == torch.float64,
        TILES=-(-num_tiles // num_programs),
        ROWS=rows_per_tile, BLOCK=block_width, num_warps=num_warps(block_width * rows_per_tile),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return dx_MN.view(h.shape), partial_dw_PN.sum(dim=0).to(w.dtype)


@_backward_op.register_fake
def _(dy: Tensor, dh: Tensor | None, h: Tensor, w: Tensor, rstd_M: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(h.shape, dtype=h.dtype, device=h.device), torch.empty_like(w)


def _save_for_backward(ctx, inputs, output) -> None:
    x, residual, w, _ = inputs
    _, h, rstd_M = output
    ctx.mark_non_differentiable(rstd_M)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(h if ctx.has_residual else x, w, rstd_M)


def _backward(ctx, dy: Tensor | None, dh: Tensor | None, _drstd: Tensor | None):
    h, w, rstd_M = ctx.saved_tensors
    dh = dh if ctx.has_residual else None
    if dy is None:
        return dh, dh, None, None
    dx, dw = torch.ops.bessemer.rms_norm_backward(dy, dh, h, w, rstd_M)
    return dx, dx if ctx.has_residual else None, dw, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _tile(width: int) -> tuple[int, int]:
    """(columns, rows) of one tile: a whole row, and as many rows as keep the tile near _TILE_ELEMENTS."""
    block_width = 1 << (width - 1).bit_length()  # tl.arange wants a power of two
    return block_width, max(1, _TILE_ELEMENTS // block_width)


# --- Kernels. eps and width are constexpr: a Python float argument would become fp64 under Inductor.


@triton.jit
def _forward_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, w_ptr, y_ptr, h_ptr, rstd_ptr, num_rows,
    eps: tl.constexpr, width: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IN_FP64: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    # int64 before any stride: row * stride passes 2**31 at 1M rows of 2048.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < num_rows) & (column < width)
    h = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(SUM)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(SUM)
        # Normalise what is stored, so that the backward, which reads h, sees the same numbers.
        h_stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * width + column, h_stored, mask=mask)
        h = h_stored.to(SUM)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, axis=1) / width + eps)
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(SUM)
    y = h * rstd[:, None] * w
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)
    row_M = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(rstd_ptr + row_M, rstd, mask=row_M < num_rows)


@triton.jit
def _backward_kernel(
    dy_ptr, dy_stride, dh_ptr, dh_stride, h_ptr, h_stride, w_ptr, rstd_ptr, dx_ptr, partial_dw_ptr, num_rows,
    width: tl.constexpr, HAS_DH: tl.constexpr, IN_FP64: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(SUM)
    dw = tl.zeros((1, BLOCK), dtype=SUM)
    # A fixed count, the last tiles of some programs being empty: triton 3.6's interpreter wants a Python number here.
    for i in range(TILES):
        tile = tl.program_id(0).to(tl.int64) + i * tl.num_programs(0)
        row_M = tile * ROWS + tl.arange(0, ROWS)
        row = row_M[:, None]
        mask = (row < num_rows) & (column < width)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0.0).to(SUM)
        h = tl.load(h_ptr + row * h_stride + column, mask=mask, other=0.0).to(SUM)
        rstd = tl.load(rstd_ptr + row_M, mask=row_M < num_rows, other=0.0)[:, None]
        n = h * rstd
        g = dy * w
        dx = rstd * (g - n * (tl.sum(g * n, axis=1)[:, None] / width))
        if HAS_DH:
            dx += tl.load(dh_ptr + row * dh_stride + column, mask=mask, other=0.0).to(SUM)
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += tl.sum(dy * n, axis=0)[None, :]
    program = tl.program_id(0).to(tl.int64)
    tl.store(partial_dw_ptr + program * width + column, dw, mask=column < width)

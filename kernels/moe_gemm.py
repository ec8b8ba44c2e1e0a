"""Products of rows that are sorted by expert with their expert's matrix, forward and backward.

    gather_up         h[r] = gate_up[e] x[token]            a[r] = silu(gate) * up, gate and up the halves of h[r]
    rows_product      o[r] = down[e] a[r],                  dx[r] = gate_up[e]^T dh[r]
    hidden_gradient   t = down[e]^T dy[token]               da = weight * t, from it and h: dh[r]
                      dweight[r] = t . a[r]                 wa[r] = weight * a[r]
    weight_gradient   d gate_up[e] = sum_r dh[r] x[token]^T,  d down[e] = sum_r dy[token] wa[r]^T

with e the expert of row r, token = slots[r] // J its token and weight = weights[slots[r]], of y = sum weight * o. The
gathers of x and dy are the first thing a program does and SwiGLU the last, so neither has a tensor of its own.
dweight is <dy, o[r]> because o = down a: o need not be kept or computed again. Each tile of columns has its own sum of
dweight, and all are added up in order afterwards; a program loops over all rows of its expert for a tile of a weight's
gradient, which is zero where the expert has none. So nothing is added by atomics and all is the same every time.

A program finds its expert and rows in the tile table of moe_route.py; one whose tile does not exist returns. Groups of
row tiles take turns at the columns, so that what programs read at the same time, a few tiles of rows and a few of
columns, fits in the GPU's level-2 cache.

Source: Gale et al., "MegaBlocks", 2022 (dropless experts as grouped products); the form of dweight is in Guo et al.,
"SonicMoE", 2025.
Shapes: x, dy (M, D), R = M J rows, h, dh (R, 2F), a, wa (R, F), gate_up (E, 2F, D), down (E, D, F), weights (M, J).
Dtypes: bf16, fp16, fp32 (fp64 under the interpreter), all matrices alike; weights and sums in fp32 (fp64 for fp64).
Cost: 4 R D F FLOPs gather_up, 2 R D F rows_product of a and hidden_gradient, 4 R D F rows_product of dh, 6 R D F both
weight gradients: 18 R D F of a step.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import launch
from kernels.launch import rows_of, sum_dtype
from kernels.moe_route import Dispatch, tile_height


class Tile(NamedTuple):
    """What a program computes, and how."""

    columns: int
    depth: int
    """Of the sum, of one step of its loop."""
    warps: int
    stages: int
    """Steps of the loop whose loads are under way at once."""
    rows: int = 0
    """Of a tile of a weight's gradient; elsewhere the table says."""


# By bytes of an element and rows of a tile. Tall ones in 16 bits have 128 sums a thread (64 where SwiGLU is
# differentiated, which needs registers) and 128 to 144 KiB of operands under way: one program on a multiprocessor.
# Of the low ones, two or more.
_UP = {
    (2, 128): Tile(columns=128, depth=64, warps=8, stages=3),
    (2, 64): Tile(columns=64, depth=64, warps=4, stages=3),
    (4, 128): Tile(columns=32, depth=32, warps=8, stages=2),
    (4, 64): Tile(columns=32, depth=32, warps=4, stages=3),
    (8, 128): Tile(columns=32, depth=32, warps=8, stages=2),
    (8, 64): Tile(columns=32, depth=32, warps=4, stages=2),
}
_ROWS = {
    (2, 128): Tile(columns=256, depth=64, warps=8, stages=3),
    (2, 64): Tile(columns=128, depth=64, warps=4, stages=3),
    (4, 128): Tile(columns=64, depth=32, warps=8, stages=2),
    (4, 64): Tile(columns=64, depth=32, warps=4, stages=2),
    (8, 128): Tile(columns=64, depth=32, warps=8, stages=2),
    (8, 64): Tile(columns=64, depth=32, warps=4, stages=2),
}
_HIDDEN = {
    (2, 128): Tile(columns=128, depth=64, warps=8, stages=4),
    (2, 64): Tile(columns=64, depth=64, warps=4, stages=3),
    (4, 128): Tile(columns=32, depth=32, warps=8, stages=2),
    (4, 64): Tile(columns=32, depth=32, warps=4, stages=2),
    (8, 128): Tile(columns=32, depth=32, warps=8, stages=2),
    (8, 64): Tile(columns=32, depth=32, warps=4, stages=2),
}
# Two stages more for three steps, because slots have to be there before the rows that they name.
_WEIGHTS = {
    2: Tile(rows=128, columns=256, depth=64, warps=8, stages=5),
    4: Tile(rows=64, columns=64, depth=32, warps=4, stages=2),
    8: Tile(rows=64, columns=64, depth=32, warps=4, stages=2),
}
# Row tiles that take turns at the columns.
_GROUP = 8


def gather_up(x_MD: Tensor, gate_up_E2FD: Tensor, dispatch: Dispatch, keep_h: bool = True) -> tuple[Tensor, Tensor]:
    """(h, a) of every row; h is empty unless it is kept for the backward."""
    x_MD, gate_up_E2FD = rows_of(x_MD), gate_up_E2FD.contiguous()
    num_rows, width, depth = dispatch.slots.numel(), gate_up_E2FD.shape[1] // 2, x_MD.shape[1]
    h_R2F = x_MD.new_empty(num_rows if keep_h else 0, 2 * width)
    a_RF = x_MD.new_empty(num_rows, width)
    grid, constants = _row_tiles(x_MD, dispatch, _UP, width, depth)
    _up_kernel[grid](
        x_MD, x_MD.stride(0), gate_up_E2FD, *_places(dispatch), h_R2F, a_RF,
        KEEPS_H=keep_h, PICKS=dispatch.rows.shape[1], **constants,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return h_R2F, a_RF


def rows_product(rows_RK: Tensor, matrix_ENK: Tensor, dispatch: Dispatch, *, transposed: bool = False) -> Tensor:
    """Each row by its expert's matrix (E, N, K), or with `transposed` (E, K, N), as (R, N)."""
    rows_RK, matrix_ENK = rows_of(rows_RK), matrix_ENK.contiguous()
    num_rows, depth = rows_RK.shape
    width = matrix_ENK.shape[2 if transposed else 1]
    out_RN = rows_RK.new_empty(num_rows, width)
    grid, constants = _row_tiles(rows_RK, dispatch, _ROWS, width, depth)
    _rows_kernel[grid](
        rows_RK, rows_RK.stride(0), matrix_ENK, *_places(dispatch), out_RN,
        IS_TRANSPOSED=transposed, **constants,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return out_RN


def hidden_gradient(
    dy_MD: Tensor, weights_MJ: Tensor, h_R2F: Tensor, down_EDF: Tensor, dispatch: Dispatch
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh, wa, dweights (M, J)) from the gradient of y."""
    dy_MD, down_EDF, weights_MJ = rows_of(dy_MD), down_EDF.contiguous(), weights_MJ.contiguous()
    _, depth, width = down_EDF.shape
    num_rows = h_R2F.shape[0]
    dh_R2F, wa_RF = torch.empty_like(h_R2F), h_R2F.new_empty(num_rows, width)
    grid, constants = _row_tiles(dy_MD, dispatch, _HIDDEN, width, depth)
    num_partial = constants["COLUMN_TILES"]
    partial_PR = h_R2F.new_empty(num_partial, num_rows, dtype=sum_dtype(dy_MD))
    _hidden_kernel[grid](
        dy_MD, dy_MD.stride(0), weights_MJ, h_R2F, down_EDF, *_places(dispatch), dh_R2F, wa_RF, partial_PR, num_rows,
        PICKS=weights_MJ.shape[1], **constants,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    dweights_R = partial_PR.sum(dim=0)
    return dh_R2F, wa_RF, dweights_R.index_select(0, dispatch.rows.view(-1)).view_as(weights_MJ)


def weight_gradient(left: Tensor, right: Tensor, dispatch: Dispatch, *, gathers_left: bool = False) -> Tensor:
    """sum over an expert's rows r of left[r] right[r]^T as (E, P, Q); one side is (R, P or Q), the other, right or with
    `gathers_left` left, (M, Q or P): its row is that of r's token."""
    left, right = rows_of(left), rows_of(right)
    num_experts, (height, width) = dispatch.offsets.numel() - 1, (left.shape[1], right.shape[1])
    gradient = left.new_empty(num_experts, height, width)
    tile = _WEIGHTS[left.element_size()]
    rows, columns = _fit(tile.rows, height), _fit(_widest(tile, left), width)
    row_tiles, column_tiles = -(-height // rows), -(-width // columns)
    _weights_kernel[(num_experts * row_tiles * column_tiles,)](
        left, left.stride(0), right, right.stride(0), dispatch.slots, dispatch.offsets, gradient,
        MOST_ROWS=max(rows_per_expert(dispatch)) if launch.INTERPRETED else -1,
        GATHERS_LEFT=gathers_left, PICKS=dispatch.rows.shape[1], HEIGHT=height, WIDTH=width, ROW_TILES=row_tiles,
        COLUMN_TILES=column_tiles, ROWS=rows, COLUMNS=columns, BLOCK_K=tile.depth, GROUP=_GROUP, **_arithmetic(left),
        num_warps=tile.warps, num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return gradient


# --- References, an expert at a time.


def gather_up_reference(x_MD: Tensor, gate_up_E2FD: Tensor, dispatch: Dispatch) -> tuple[Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    h_R2F = rows_product_reference(x_MD[_tokens(dispatch)], gate_up_E2FD, dispatch)
    gate_RF, up_RF = h_R2F.chunk(2, dim=1)
    return h_R2F, F.silu(gate_RF) * up_RF


def rows_product_reference(
    rows_RK: Tensor, matrix_ENK: Tensor, dispatch: Dispatch, *, transposed: bool = False
) -> Tensor:
    """The same function in plain torch: the specification."""
    parts = rows_RK.split(rows_per_expert(dispatch))
    return torch.cat([part @ (matrix if transposed else matrix.T) for part, matrix in zip(parts, matrix_ENK)])


def hidden_gradient_reference(
    dy_MD: Tensor, weights_MJ: Tensor, h_R2F: Tensor, down_EDF: Tensor, dispatch: Dispatch
) -> tuple[Tensor, Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    weights_R1 = weights_MJ.reshape(-1)[dispatch.slots, None]
    t_RF = rows_product_reference(dy_MD[_tokens(dispatch)], down_EDF, dispatch, transposed=True)
    with torch.enable_grad():
        h_R2F = h_R2F.detach().requires_grad_()
        gate_RF, up_RF = h_R2F.chunk(2, dim=1)
        a_RF = F.silu(gate_RF) * up_RF
        (dh_R2F,) = torch.autograd.grad(a_RF, h_R2F, (weights_R1 * t_RF).to(a_RF.dtype))
    a_RF = a_RF.detach().to(weights_MJ.dtype)
    return dh_R2F, (weights_R1 * a_RF).to(h_R2F.dtype), (t_RF * a_RF).sum(dim=1)[dispatch.rows]


def weight_gradient_reference(left: Tensor, right: Tensor, dispatch: Dispatch, *, gathers_left: bool = False) -> Tensor:
    """The same function in plain torch: the specification."""
    tokens_R = _tokens(dispatch)
    left, right = (left[tokens_R], right) if gathers_left else (left, right[tokens_R])
    sizes = rows_per_expert(dispatch)
    return torch.stack([a.T @ b for a, b in zip(left.split(sizes), right.split(sizes))])


def rows_per_expert(dispatch: Dispatch) -> list[int]:
    """How many rows each expert has, on the host: the device is waited for."""
    return dispatch.offsets.diff().tolist()


def _tokens(dispatch: Dispatch) -> Tensor:
    return dispatch.slots // dispatch.rows.shape[1]


# --- Launch parameters.


def _row_tiles(
    x: Tensor, dispatch: Dispatch, tiles: dict[tuple[int, int], Tile], width: int, depth: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants of a kernel whose programs take one tile of rows each."""
    num_rows, num_experts = dispatch.slots.numel(), dispatch.offsets.numel() - 1
    height = tile_height(num_rows, num_experts)
    tile = tiles[x.element_size(), height]
    columns = _fit(_widest(tile, x), width)
    column_tiles = -(-width // columns)
    constants = {
        "DEPTH": depth, "WIDTH": width, "COLUMN_TILES": column_tiles, "ROWS": height, "COLUMNS": columns,
        "BLOCK_K": _fit(tile.depth, depth), "GROUP": _GROUP, **_arithmetic(x),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return (dispatch.tile_experts.numel() * column_tiles,), constants


def _fit(block: int, size: int) -> int:
    """The block, or half of it where that alone divides the size or neither does: masks and what they hide cost time.

    A small matrix gets no more than it needs, a power of two that tensor cores can multiply.
    """
    block = block if size % block == 0 else max(16, block // 2)
    return min(block, max(16, 1 << (size - 1).bit_length()))


def _widest(tile: Tile, x: Tensor) -> int:
    """Before Hopper, the operands of a product are in registers too: half as wide a tile leaves room for them."""
    return tile.columns // 2 if x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0) else tile.columns


def _places(dispatch: Dispatch) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return dispatch.slots, dispatch.offsets, dispatch.tile_experts, dispatch.tile_rows, dispatch.tile_experts.numel()


def _arithmetic(x: Tensor) -> dict[str, Any]:
    """Triton's interpreter multiplies the bits of bf16 as if they were integers; fp32 is rounded only if torch's is."""
    return {
        "IN_FP64": x.dtype == torch.float64,
        "WIDENS": launch.INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }


# --- Kernels.


@triton.jit
def _place(slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles,
           COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """(expert, tile of columns, rows, which of them are the expert's, their slots, columns) of this program.

    A row that is not the expert's is the tile's first instead: it is loaded, and nothing is stored for it.
    """
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(  # pyright: ignore[reportGeneralTypeIssues]
        program // COLUMN_TILES, program % COLUMN_TILES, num_tiles, COLUMN_TILES, GROUP
    )
    expert = tl.load(experts_ptr + row_tile)
    first = tl.load(rows_ptr + row_tile)
    row = first + tl.arange(0, ROWS)
    is_ours = row < tl.load(offsets_ptr + 1 + expert)
    slot = tl.load(slots_ptr + row, mask=is_ours, other=0)
    row = tl.where(is_ours, row, first).to(tl.int64)
    return expert.to(tl.int64), column_tile, row, is_ours, slot, column_tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _load(ptr, mask, IS_WHOLE: tl.constexpr):
    # Without a mask where none is needed: it costs a predicate for every 16 bytes.
    return tl.load(ptr) if IS_WHOLE else tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _dot(a, b, sums, WIDENS: tl.constexpr, PRECISION: tl.constexpr):
    if WIDENS:
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision=PRECISION)
    else:
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit
def _rounded(value, ptr, WIDENS: tl.constexpr):
    """A value as it is stored at ptr."""
    if WIDENS:
        # The interpreter cuts off the bits that bf16 does not have: rounded to the nearest first, there are none.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -0x10000).to(tl.float32, bitcast=True)
    return value.to(ptr.dtype.element_ty)


@triton.jit
def _product(
    a_ptr, matrix_ptr, column, sums, DEPTH: tl.constexpr, WIDTH: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + the rows at a_ptr times the expert's matrix: (WIDTH, DEPTH) or, transposed, (DEPTH, WIDTH)."""
    K_STRIDE: tl.constexpr = WIDTH if IS_TRANSPOSED else 1  # pyright: ignore[reportAssignmentType]
    N_STRIDE: tl.constexpr = 1 if IS_TRANSPOSED else DEPTH  # pyright: ignore[reportAssignmentType]
    k = tl.arange(0, BLOCK_K)
    a_ptr += k[None, :]
    matrix_ptr += k[:, None] * K_STRIDE + column[None, :] * N_STRIDE
    for start in range(0, DEPTH, BLOCK_K):
        is_inside = start + k < DEPTH
        a = _load(a_ptr, is_inside[None, :], DEPTH % BLOCK_K == 0)
        mask = is_inside[:, None] & (column < WIDTH)[None, :]
        matrix = _load(matrix_ptr, mask, DEPTH % BLOCK_K == 0 and WIDTH % COLUMNS == 0)
        sums = _dot(a, matrix, sums, WIDENS, PRECISION)
        a_ptr += BLOCK_K
        matrix_ptr += BLOCK_K * K_STRIDE
    return sums


@triton.jit
def _sigmoid(z):
    # Of -|z|, because exp(-z) overflows for z far below zero.
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _up_kernel(
    x_ptr, x_stride, gate_up_ptr, slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles, h_ptr, a_ptr,
    KEEPS_H: tl.constexpr, PICKS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, IN_FP64: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    expert, _, row, is_ours, slot, column = _place(  # pyright: ignore[reportGeneralTypeIssues]
        slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles, COLUMN_TILES, ROWS, COLUMNS, GROUP
    )
    if expert < 0:
        return
    k = tl.arange(0, BLOCK_K)
    token = (slot // PICKS).to(tl.int64)
    is_column = column < WIDTH
    x_ptr += token[:, None] * x_stride + k[None, :]
    gate_ptr = gate_up_ptr + expert * (2 * WIDTH * DEPTH) + column[None, :] * DEPTH + k[:, None]
    # The gate and up of the same columns, so that their product needs no other program's.
    gate = tl.zeros((ROWS, COLUMNS), dtype=SUM)
    up = tl.zeros((ROWS, COLUMNS), dtype=SUM)
    IS_WHOLE: tl.constexpr = DEPTH % BLOCK_K == 0 and WIDTH % COLUMNS == 0  # pyright: ignore[reportAssignmentType]
    for start in range(0, DEPTH, BLOCK_K):
        is_inside = start + k < DEPTH
        x = _load(x_ptr, is_inside[None, :], DEPTH % BLOCK_K == 0)
        mask = is_inside[:, None] & is_column[None, :]
        gate = _dot(x, _load(gate_ptr, mask, IS_WHOLE), gate, WIDENS, PRECISION)
        up = _dot(x, _load(gate_ptr + WIDTH * DEPTH, mask, IS_WHOLE), up, WIDENS, PRECISION)
        x_ptr += BLOCK_K
        gate_ptr += BLOCK_K
    mask = is_ours[:, None] & is_column[None, :]
    # The product of what is stored, so that the backward, which reads h, sees the same numbers.
    gate_stored = _rounded(gate, h_ptr, WIDENS)
    up_stored = _rounded(up, h_ptr, WIDENS)
    if KEEPS_H:
        gate_out_ptr = h_ptr + row[:, None] * (2 * WIDTH) + column[None, :]
        tl.store(gate_out_ptr, gate_stored, mask=mask)
        tl.store(gate_out_ptr + WIDTH, up_stored, mask=mask)
    gate = gate_stored.to(SUM)
    a = gate * _sigmoid(gate) * up_stored.to(SUM)
    tl.store(a_ptr + row[:, None] * WIDTH + column[None, :], _rounded(a, a_ptr, WIDENS), mask=mask)


@triton.jit
def _rows_kernel(
    a_ptr, a_stride, matrix_ptr, slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles, out_ptr,
    IS_TRANSPOSED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, IN_FP64: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    expert, _, row, is_ours, _, column = _place(  # pyright: ignore[reportGeneralTypeIssues]
        slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles, COLUMN_TILES, ROWS, COLUMNS, GROUP
    )
    if expert < 0:
        return
    a_ptr += row[:, None] * a_stride
    matrix_ptr += expert * (WIDTH * DEPTH)
    out = _product(
        a_ptr, matrix_ptr, column, tl.zeros((ROWS, COLUMNS), dtype=SUM),
        DEPTH, WIDTH, IS_TRANSPOSED, COLUMNS, BLOCK_K, WIDENS, PRECISION,
    )  # fmt: skip
    mask = is_ours[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], _rounded(out, out_ptr, WIDENS), mask=mask)


@triton.jit
def _hidden_kernel(
    dy_ptr, dy_stride, weights_ptr, h_ptr, down_ptr, slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles,
    dh_ptr, wa_ptr, partial_ptr, num_rows,
    PICKS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, IN_FP64: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    expert, column_tile, row, is_ours, slot, column = _place(  # pyright: ignore[reportGeneralTypeIssues]
        slots_ptr, offsets_ptr, experts_ptr, rows_ptr, num_tiles, COLUMN_TILES, ROWS, COLUMNS, GROUP
    )
    if expert < 0:
        return
    dy_ptr += (slot // PICKS).to(tl.int64)[:, None] * dy_stride
    down_ptr += expert * (WIDTH * DEPTH)
    da = _product(
        dy_ptr, down_ptr, column, tl.zeros((ROWS, COLUMNS), dtype=SUM),
        DEPTH, WIDTH, True, COLUMNS, BLOCK_K, WIDENS, PRECISION,
    )  # fmt: skip
    weight = tl.load(weights_ptr + slot, mask=is_ours, other=0.0)[:, None]
    # In two halves of columns, each with half the registers.
    left, right = tl.split(tl.permute(tl.reshape(da, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS // 2)
    dweight = _hidden_half(left, weight, h_ptr, dh_ptr, wa_ptr, row, column, is_ours, WIDTH, WIDENS)
    dweight += _hidden_half(right, weight, h_ptr, dh_ptr, wa_ptr, row, column + COLUMNS // 2, is_ours, WIDTH, WIDENS)
    tl.store(partial_ptr + column_tile.to(tl.int64) * num_rows + row, dweight, mask=is_ours)


@triton.jit
def _hidden_half(da, weight, h_ptr, dh_ptr, wa_ptr, row, column, is_ours, WIDTH: tl.constexpr, WIDENS: tl.constexpr):
    """Stores dh and wa of some columns, and returns what they add to the gradient of the rows' weights."""
    mask = is_ours[:, None] & (column < WIDTH)[None, :]
    gate_offset = row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(h_ptr + gate_offset, mask=mask, other=0.0).to(da.dtype)
    up = tl.load(h_ptr + gate_offset + WIDTH, mask=mask, other=0.0).to(da.dtype)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    a = silu * up
    tl.store(wa_ptr + row[:, None] * WIDTH + column[None, :], _rounded(weight * a, wa_ptr, WIDENS), mask=mask)
    dgate = weight * da * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dh_ptr + gate_offset, _rounded(dgate, dh_ptr, WIDENS), mask=mask)
    tl.store(dh_ptr + gate_offset + WIDTH, _rounded(weight * da * silu, dh_ptr, WIDENS), mask=mask)
    return tl.sum(da * a, axis=1)


@triton.jit
def _weights_kernel(
    left_ptr, left_stride, right_ptr, right_stride, slots_ptr, offsets_ptr, gradient_ptr,
    MOST_ROWS: tl.constexpr, GATHERS_LEFT: tl.constexpr, PICKS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ROW_TILES: tl.constexpr, COLUMN_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, IN_FP64: tl.constexpr, WIDENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    expert = tl.program_id(0) // (ROW_TILES * COLUMN_TILES)
    tile = tl.program_id(0) % (ROW_TILES * COLUMN_TILES)
    row_tile, column_tile = tl.swizzle2d(  # pyright: ignore[reportGeneralTypeIssues]
        tile // COLUMN_TILES, tile % COLUMN_TILES, ROW_TILES, COLUMN_TILES, GROUP
    )
    p = row_tile * ROWS + tl.arange(0, ROWS)
    q = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    sums = tl.zeros((ROWS, COLUMNS), dtype=SUM)
    # The interpreter of triton 3.6 wants a Python number here.
    for start in range(0, end - begin if MOST_ROWS < 0 else MOST_ROWS, BLOCK_K):
        row = begin + start + tl.arange(0, BLOCK_K)
        is_ours = row < end
        token = tl.load(slots_ptr + row, mask=is_ours, other=0) // PICKS
        left_row = (token if GATHERS_LEFT else row).to(tl.int64)[:, None]
        right_row = (row if GATHERS_LEFT else token).to(tl.int64)[:, None]
        left_mask = is_ours[:, None] & (p < HEIGHT)[None, :]
        left = tl.load(left_ptr + left_row * left_stride + p[None, :], mask=left_mask, other=0.0)
        right_mask = is_ours[:, None] & (q < WIDTH)[None, :]
        right = tl.load(right_ptr + right_row * right_stride + q[None, :], mask=right_mask, other=0.0)
        sums = _dot(tl.trans(left), right, sums, WIDENS, PRECISION)
    mask = (p < HEIGHT)[:, None] & (q < WIDTH)[None, :]
    gradient_ptr += expert.to(tl.int64) * (HEIGHT * WIDTH)
    offset = p.to(tl.int64)[:, None] * WIDTH + q[None, :]
    tl.store(gradient_ptr + offset, _rounded(sums, gradient_ptr, WIDENS), mask=mask)

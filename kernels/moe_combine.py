"""The outputs of a token's experts, gathered and added up in the order of its slots.

    y[m] = sum_j weights[m, j] * o[rows[m, j]]        (all weights 1 without weights)

A gather, where a scatter of the rows would need atomics: the order of the sum is the same every time, and with two
picks it does not matter which is called the first.

Shapes: o (R, D), rows (M, J) int32 from moe_route.py, weights (M, J) -> y (M, D).
Dtypes: o bf16, fp16, fp32 (fp64 under the interpreter); products and sums in fp32 (fp64 for fp64), y in o's dtype.
Bytes, elements per token: reads J D, writes D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import chosen, num_warps, rows_of, runs_triton, sum_dtype

# Elements of one tile of y and of its widest row. A thread has 8 of them, and loads of several picks under way.
_TILE_ELEMENTS = 1_024
_TILE_COLUMNS = 1_024


def moe_combine(o_RD: Tensor, rows_MJ: Tensor, weights_MJ: Tensor | None = None) -> Tensor:
    """Adds up J rows of o for each token, weighted; outside autograd.

    Raises:
        ValueError: weights do not match rows.
    """
    if weights_MJ is not None and weights_MJ.shape != rows_MJ.shape:
        raise ValueError(f"moe_combine: weights {tuple(weights_MJ.shape)} for rows {tuple(rows_MJ.shape)}")
    if chosen("moe") == "loop" or not runs_triton("moe", o_RD):
        return moe_combine_reference(o_RD, rows_MJ, weights_MJ)
    return launch_combine(o_RD, rows_MJ, weights_MJ)


def moe_combine_reference(o_RD: Tensor, rows_MJ: Tensor, weights_MJ: Tensor | None = None) -> Tensor:
    """The same function in plain torch: the specification."""
    y_MD = o_RD.new_zeros((rows_MJ.shape[0], o_RD.shape[1]), dtype=sum_dtype(o_RD))
    for pick, rows_M in enumerate(rows_MJ.unbind(1)):
        picked_MD = o_RD[rows_M].to(y_MD.dtype)
        y_MD = y_MD + (picked_MD if weights_MJ is None else weights_MJ[:, pick, None] * picked_MD)
    return y_MD.to(o_RD.dtype)


def launch_combine(o_RD: Tensor, rows_MJ: Tensor, weights_MJ: Tensor | None) -> Tensor:
    """The Triton kernel, whatever back-end was chosen."""
    o_RD, rows_MJ = rows_of(o_RD), rows_MJ.contiguous()
    (num_tokens, picks), width = rows_MJ.shape, o_RD.shape[1]
    y_MD = o_RD.new_empty(num_tokens, width)
    weights = rows_MJ if weights_MJ is None else weights_MJ.contiguous()  # a pointer that is not read
    columns = min(_TILE_COLUMNS, 1 << (width - 1).bit_length())
    tokens = _TILE_ELEMENTS // columns
    column_tiles = -(-width // columns)
    if num_tokens:
        _combine_kernel[(-(-num_tokens // tokens) * column_tiles,)](
            o_RD, o_RD.stride(0), rows_MJ, weights, y_MD, num_tokens, width=width, PICKS=picks,
            HAS_WEIGHTS=weights_MJ is not None, IN_FP64=o_RD.dtype == torch.float64, COLUMN_TILES=column_tiles,
            TOKENS=tokens, BLOCK=columns, num_warps=num_warps(_TILE_ELEMENTS),  # pyright: ignore[reportCallIssue]
            # With a fused multiplication and addition only one of two products is rounded: which one was first shows.
            enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return y_MD


@triton.jit
def _combine_kernel(
    o_ptr, o_stride, rows_ptr, weights_ptr, y_ptr, num_tokens,
    width: tl.constexpr, PICKS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, IN_FP64: tl.constexpr,
    COLUMN_TILES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    token = (tl.program_id(0) // COLUMN_TILES).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) % COLUMN_TILES) * BLOCK + tl.arange(0, BLOCK)[None, :]
    is_token = token < num_tokens
    mask = is_token[:, None] & (column < width)
    y = tl.zeros((TOKENS, BLOCK), dtype=SUM)
    for pick in tl.static_range(PICKS):
        row = tl.load(rows_ptr + token * PICKS + pick, mask=is_token, other=0).to(tl.int64)
        o = tl.load(o_ptr + row[:, None] * o_stride + column, mask=mask, other=0.0).to(SUM)
        if HAS_WEIGHTS:
            o *= tl.load(weights_ptr + token * PICKS + pick, mask=is_token, other=0.0)[:, None]
        y += o
    tl.store(y_ptr + token[:, None] * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)

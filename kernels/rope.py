"""Rotary position embedding of queries and keys, alone or while the packed projection is split, forward and backward.

    angle(p, i) = p * base^(-2 i / K)          i = 0 .. K/2 - 1
    (a, b) -> (a cos - b sin, b cos + a sin)   with the cosine and sine of angle(p, i)

The pair (a, b) is (x[i], x[i + K/2]) in the half-split layout (NeoX, Hugging Face), and (x[2i], x[2i + 1]) in the
interleaved one (the paper, Meta's Llama). The gradient is rotated by the opposite angle.

`rope_packed` writes to new memory, although a rotation could be done in place. In place, autograd would still
concatenate the three gradients afterwards, a whole pass more, and v as a view would keep the packed projection alive
beside k and q. Splitting while rotating costs two moves of each element per direction, all in one launch, and the
packed projection can go.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 34.
Shapes: q (B, T, H, K), k and v (B, T, G, K), packed (B, T, (H + 2G) K), cos and sin (T, K/2); K even.
Dtypes: bf16, fp16, fp32 (fp64 under the interpreter); tables fp32, or fp64 for fp64. The rotation is computed in the
wider of x's and the tables' dtype, at least in fp32 by the kernel, and returned in x's.
Bytes, elements per token, forward or backward: `rope` reads and writes (H + G) K, `rope_packed` (H + 2G) K. The tables
are small beside them.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import num_warps, rows_of, runs_triton

# Query elements of one tile: enough loads in flight, and narrow tokens share a program.
_TILE_ELEMENTS = 4_096


def rope(
    q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions, rows of the tables from `rope_tables`, which get no gradient.

    Raises:
        ValueError: q and k differ in more than their heads, or the tables are not (T, K/2) of them.
    """
    _check(q_BTHK, k_BTGK, cos_TK, sin_TK)
    if not runs_triton("rope", q_BTHK):
        return rope_reference(q_BTHK, k_BTGK, cos_TK, sin_TK, interleaved)
    return torch.ops.bessemer.rope(q_BTHK, k_BTGK, cos_TK, sin_TK, interleaved, False)


def rope_packed(
    qkv_BTN: Tensor, cos_TK: Tensor, sin_TK: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits packed projections into q, k and v, with q and k rotated as `rope` does, in one pass over memory.

    Raises:
        ValueError: the tables are not (T, K/2), or the last axis is not num_heads + 2 num_kv_heads heads of K.
    """
    _check_packed(qkv_BTN, cos_TK, sin_TK, num_heads, num_kv_heads)
    if not runs_triton("rope", qkv_BTN):
        return rope_packed_reference(qkv_BTN, cos_TK, sin_TK, num_heads, num_kv_heads, interleaved)
    return torch.ops.bessemer.rope_packed(qkv_BTN, cos_TK, sin_TK, num_heads, num_kv_heads, interleaved)


def rope_reference(
    q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    return _rotate(q_BTHK, cos_TK, sin_TK, interleaved), _rotate(k_BTGK, cos_TK, sin_TK, interleaved)


def rope_packed_reference(
    qkv_BTN: Tensor, cos_TK: Tensor, sin_TK: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    heads_BTHK = qkv_BTN.unflatten(-1, (-1, 2 * cos_TK.shape[-1]))
    q_BTHK, k_BTGK, v_BTGK = heads_BTHK.split((num_heads, num_kv_heads, num_kv_heads), dim=-2)
    return *rope_reference(q_BTHK, k_BTGK, cos_TK, sin_TK, interleaved), v_BTGK


def rope_tables(
    positions_T: Tensor, head_size: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, K/2) of the angles of the given positions.

    Dtypes: angles in fp32 as every Llama checkpoint was trained with, in fp64 when asked for fp64 tables.
    """
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponent_K = torch.arange(0, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size
    angles_TK = positions_T.to(angle_dtype)[:, None] * (1.0 / base**exponent_K)
    return angles_TK.cos().to(dtype), angles_TK.sin().to(dtype)


def _rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    a, b = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x_BTHK.chunk(2, dim=-1)
    rotated = a * cos - b * sin, b * cos + a * sin
    y_BTHK = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return y_BTHK.to(x_BTHK.dtype)


def _check(q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> None:
    batch_size, length, _, head_size = q_BTHK.shape
    expected = (length, head_size // 2)
    if cos_TK.shape != expected or sin_TK.shape != expected or k_BTGK.shape[1] != length or head_size % 2:
        raise ValueError(
            f"rope: tables {tuple(cos_TK.shape)}, {tuple(sin_TK.shape)} for q {tuple(q_BTHK.shape)}, "
            f"k {tuple(k_BTGK.shape)}; expected K even, and tables (T, K/2) = {expected}"
        )
    if k_BTGK.shape[0] != batch_size or k_BTGK.shape[-1] != head_size or k_BTGK.dtype != q_BTHK.dtype:
        raise ValueError(
            f"rope: q is {tuple(q_BTHK.shape)} {q_BTHK.dtype}, k is {tuple(k_BTGK.shape)} {k_BTGK.dtype}; "
            "expected them to differ in their number of heads alone"
        )


def _check_packed(qkv_BTN: Tensor, cos_TK: Tensor, sin_TK: Tensor, num_heads: int, num_kv_heads: int) -> None:
    _, length, width = qkv_BTN.shape
    head_size = width // (num_heads + 2 * num_kv_heads)
    expected = (length, head_size // 2)
    is_whole = width == (num_heads + 2 * num_kv_heads) * head_size and head_size % 2 == 0
    if cos_TK.shape != expected or sin_TK.shape != expected or not is_whole:
        raise ValueError(
            f"rope_packed: tables {tuple(cos_TK.shape)}, {tuple(sin_TK.shape)} for {tuple(qkv_BTN.shape)}; expected "
            f"{num_heads} + 2 * {num_kv_heads} heads of an even K, and tables (T, K/2) = {expected}"
        )


# --- Autograd registration. An opaque custom op keeps torch.compile's graph whole and its choice of kernel ours.


@torch.library.custom_op("bessemer::rope", mutates_args=())
def _rope_op(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    rotated = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(_rows(q, k), _rows(*rotated), cos, sin, interleaved, inverse)
    return rotated


@_rope_op.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_tables(ctx, inputs, output) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, dq: Tensor, dk: Tensor):
    dq, dk = torch.ops.bessemer.rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dq, dk, None, None, None, None


_rope_op.register_autograd(_rope_backward, setup_context=_save_tables)


@torch.library.custom_op("bessemer::rope_packed", mutates_args=())
def _packed_op(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _unpacked_like(qkv, cos, num_heads, num_kv_heads)
    parts = rows_of(qkv).split([x.shape[2] * x.shape[3] for x in (q, k, v)], dim=1)
    _launch(parts, _rows(q, k, v), cos, sin, interleaved, inverse=False)
    return q, k, v


@_packed_op.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _unpacked_like(qkv, cos, num_heads, num_kv_heads)


@torch.library.custom_op("bessemer::rope_packed_backward", mutates_args=())
def _packed_backward_op(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    sources = _rows(dq, dk, dv)
    dqkv = _packed_like(dq, dk, dv)
    _launch(sources, rows_of(dqkv).split([x.shape[1] for x in sources], dim=1), cos, sin, interleaved, inverse=True)
    return dqkv


@_packed_backward_op.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _packed_like(dq, dk, dv)


def _save_tables_of_packed(ctx, inputs, output) -> None:
    _, cos, sin, _, _, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _packed_backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    dqkv = torch.ops.bessemer.rope_packed_backward(dq, dk, dv, *ctx.saved_tensors, ctx.interleaved)
    return dqkv, None, None, None, None, None


_packed_op.register_autograd(_packed_backward, setup_context=_save_tables_of_packed)


def _unpacked_like(qkv: Tensor, cos: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        qkv.new_empty((*qkv.shape[:2], heads, 2 * cos.shape[1])) for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


def _packed_like(*parts: Tensor) -> Tensor:
    return parts[0].new_empty((*parts[0].shape[:2], sum(x.shape[2] * x.shape[3] for x in parts)))


def _rows(*heads: Tensor) -> list[Tensor]:
    """Each x (B, T, H, K) as (B T, H K)."""
    return [rows_of(x.flatten(2)) for x in heads]


def _launch(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    cos_TK: Tensor,
    sin_TK: Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotates the rows of q and k from sources to targets, and copies those of v where there is a third."""
    q_MN, k_MN, v_MN = sources[0], sources[1], sources[-1]
    q_out_MN, k_out_MN, v_out_MN = targets[0], targets[1], targets[-1]
    length, half = cos_TK.shape
    num_heads, num_kv_heads = q_MN.shape[1] // (2 * half), k_MN.shape[1] // (2 * half)
    block_half, block_heads, block_kv_heads = (_power_of_two(n) for n in (half, num_heads, num_kv_heads))
    tile_row = 2 * block_half * block_heads
    positions_per_tile = max(1, _TILE_ELEMENTS // tile_row)
    num_tiles = q_MN.shape[0] // length * -(-length // positions_per_tile) if length else 0
    if num_tiles:
        _rope_kernel[(num_tiles,)](
            q_MN, q_MN.stride(0), k_MN, k_MN.stride(0), v_MN, v_MN.stride(0),
            q_out_MN, q_out_MN.stride(0), k_out_MN, k_out_MN.stride(0), v_out_MN, v_out_MN.stride(0),
            cos_TK.contiguous(), sin_TK.contiguous(), length,
            HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=half, HAS_V=len(sources) == 3,
            INTERLEAVED=interleaved, INVERSE=inverse, IN_FP64=torch.float64 in (q_MN.dtype, cos_TK.dtype),
            POSITIONS=positions_per_tile, BLOCK_HEADS=block_heads, BLOCK_KV_HEADS=block_kv_heads,
            BLOCK_HALF=block_half, num_warps=num_warps(positions_per_tile * tile_row),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


def _power_of_two(n: int) -> int:
    """The smallest one that holds n: tl.arange wants it."""
    return 1 << (n - 1).bit_length()


# --- Kernels. A program holds all heads of a few neighbouring positions of one sequence, so that cosines and sines are
# read once per token. Everything is read before anything is written: one wait for memory instead of three.


@triton.jit
def _rope_kernel(
    q_ptr, q_stride, k_ptr, k_stride, v_ptr, v_stride,
    q_out_ptr, q_out_stride, k_out_ptr, k_out_stride, v_out_ptr, v_out_stride,
    cos_ptr, sin_ptr, length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, HAS_V: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_FP64: tl.constexpr,
    POSITIONS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    tiles_per_sequence = tl.cdiv(length, POSITIONS)
    sequence = tl.program_id(0) // tiles_per_sequence
    position = tl.program_id(0) % tiles_per_sequence * POSITIONS + tl.arange(0, POSITIONS)[:, None, None]
    # int64 before any stride: row * stride passes 2**31 at 1M rows of 2048.
    row = sequence.to(tl.int64) * length + position
    in_sequence = position < length
    q_a, q_b = _load_pairs(q_ptr + row * q_stride, in_sequence, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED, SUM)
    k_a, k_b = _load_pairs(
        k_ptr + row * k_stride, in_sequence, KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF, INTERLEAVED, SUM
    )
    half = tl.arange(0, BLOCK_HALF)[None, None, :]
    table = position.to(tl.int64) * HALF + half
    cos = tl.load(cos_ptr + table, mask=in_sequence & (half < HALF), other=0.0).to(SUM)
    sin = tl.load(sin_ptr + table, mask=in_sequence & (half < HALF), other=0.0).to(SUM)
    if INVERSE:
        sin = -sin
    if HAS_V:
        head = tl.arange(0, BLOCK_KV_HEADS)[None, :, None]
        column = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        v_mask = in_sequence & (head < KV_HEADS) & (column < 2 * HALF)
        v_offset = head * (2 * HALF) + column
        v = tl.load(v_ptr + row * v_stride + v_offset, mask=v_mask, other=0.0)
        tl.store(v_out_ptr + row * v_out_stride + v_offset, v, mask=v_mask)
    _store_pairs(
        q_out_ptr + row * q_out_stride, q_a * cos - q_b * sin, q_b * cos + q_a * sin, in_sequence,
        HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED,
    )  # fmt: skip
    _store_pairs(
        k_out_ptr + row * k_out_stride, k_a * cos - k_b * sin, k_b * cos + k_a * sin, in_sequence,
        KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF, INTERLEAVED,
    )  # fmt: skip


@triton.jit
def _load_pairs(
    row_ptr, in_sequence, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """First and second elements of every pair."""
    head = tl.arange(0, BLOCK_HEADS)[None, :, None]
    half = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = in_sequence & (head < HEADS)
    head_ptr = row_ptr + head * (2 * HALF)
    if INTERLEAVED:
        # Neighbours are read together and parted in registers: every other element would be one narrow load each.
        column = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        x = tl.load(head_ptr + column, mask=mask & (column < 2 * HALF), other=0.0).to(SUM)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_HEADS, BLOCK_HALF, 2)))
    else:
        a = tl.load(head_ptr + half, mask=mask & (half < HALF), other=0.0).to(SUM)
        b = tl.load(head_ptr + half + HALF, mask=mask & (half < HALF), other=0.0).to(SUM)
    return a, b


@triton.jit
def _store_pairs(
    row_ptr, a, b, in_sequence, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK_HEADS)[None, :, None]
    half = tl.arange(0, BLOCK_HALF)[None, None, :]
    mask = in_sequence & (head < HEADS)
    head_ptr = row_ptr + head * (2 * HALF)
    a, b = a.to(row_ptr.dtype.element_ty), b.to(row_ptr.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        y = tl.reshape(tl.join(a, b), (a.shape[0], BLOCK_HEADS, 2 * BLOCK_HALF))
        tl.store(head_ptr + column, y, mask=mask & (column < 2 * HALF))
    else:
        tl.store(head_ptr + half, a, mask=mask & (half < HALF))
        tl.store(head_ptr + half + HALF, b, mask=mask & (half < HALF))

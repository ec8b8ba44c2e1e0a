"""Where each token goes in a mixture of experts: the picks of all tokens sorted by expert, without a sort.

    counts[b, e] = picks of expert e in block b of slots
    base[b, e]   = sum of counts[:, e'] over e' < e  +  sum of counts[b', e] over b' < b
    row(slot)    = base[b, e] + picks of e before the slot in its block b

Slot token * J + pick lands in the row that a stable sort by expert gives it. A block of slots counts its picks as a sum
of one-hot rows and ranks them by that sum's running value, so there are no atomics, the order is the same every time,
and no number comes back to the host: all shapes follow from M, J and E, so that a CUDA graph can hold it.

The grouped products of moe_gemm.py read the rows of an expert in tiles of tile_height() rows. How many tiles an expert
has is known on the device only; the table has an entry for every tile there might be, ceil(M J / height) + E, and the
surplus says so.

Source: the stable counting sort of Knuth, "The Art of Computer Programming", volume 3, 5.2, algorithm D.
Shapes: picks (M, J) int64, numbers of experts below E; the results as Dispatch says.
Bytes: picks are read twice, 16 M J; slots and rows are written once, 8 M J; the counts are E / BLOCK of that.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import chosen, num_warps, runs_triton

# Elements of a block's one-hot matrix, and its most rows and columns: 32 integers a thread. If there are more experts
# than columns, they go through in chunks, each of which reads all picks and places its own.
_ONE_HOT_ELEMENTS = 16_384
_ONE_HOT_ROWS = 1_024
_ONE_HOT_EXPERTS = 128
# Elements of tiles * experts that one program of the tile table compares.
_TABLE_ELEMENTS = 8_192
# Rows of a tile, where experts have many rows and where they have few.
_TALL, _LOW = 128, 64


class Dispatch(NamedTuple):
    """Rows sorted by expert, and back. Of a token's picks, number token * J + pick is its slot."""

    slots: Tensor
    """(M * J,) int32: row r holds slot slots[r]; rows are sorted by expert, and by slot within one."""
    rows: Tensor
    """(M, J) int32: the row of each slot."""
    offsets: Tensor
    """(E + 1,) int32: the rows of expert e are offsets[e]:offsets[e + 1]."""
    tile_experts: Tensor
    """(tiles,) int32: the expert of each tile, -1 where there is no such tile."""
    tile_rows: Tensor
    """(tiles,) int32: the first row of each tile, M * J where there is no such tile."""


def moe_route(picks_MJ: Tensor, num_experts: int) -> Dispatch:
    """Sorts the picks of all tokens by expert, stably.

    The picks must be numbers of experts: a Triton kernel cannot raise an error for one that is not.

    Raises:
        ValueError: picks is not an int64 matrix, there are no experts, or rows do not fit 32 bits.
    """
    if picks_MJ.ndim != 2 or picks_MJ.dtype != torch.int64:
        raise ValueError(f"moe_route: picks {tuple(picks_MJ.shape)} {picks_MJ.dtype}; expected (M, J) int64")
    if num_experts < 1:
        raise ValueError(f"moe_route: num_experts = {num_experts}; expected at least one")
    if picks_MJ.numel() >= 2**31:
        raise ValueError(
            f"moe_route: {picks_MJ.numel()} picks at once; rows are 32-bit numbers, so make micro-batches smaller"
        )
    if chosen("moe") == "loop" or not runs_triton("moe", picks_MJ):
        return moe_route_reference(picks_MJ, num_experts)
    return Dispatch(*torch.ops.bessemer.moe_route(picks_MJ, num_experts))


def moe_route_reference(picks_MJ: Tensor, num_experts: int) -> Dispatch:
    """The same function in plain torch, by a sort: the specification."""
    experts_R, slots_R = torch.sort(picks_MJ.reshape(-1), stable=True)
    rows_MJ = torch.empty_like(slots_R).scatter_(0, slots_R, torch.arange(slots_R.numel(), device=slots_R.device))
    experts_E1 = torch.arange(num_experts + 1, device=picks_MJ.device)
    offsets_E1 = torch.searchsorted(experts_R, experts_E1)
    height = tile_height(slots_R.numel(), num_experts)
    tile_ends_E = (offsets_E1.diff() + height - 1).div(height, rounding_mode="floor").cumsum(0)
    tiles = torch.arange(num_tiles(slots_R.numel(), num_experts), device=picks_MJ.device)
    experts = torch.searchsorted(tile_ends_E, tiles, right=True)
    is_tile = experts < num_experts
    first_tiles_E1 = F.pad(tile_ends_E, (1, 0))
    starts = offsets_E1[experts] + (tiles - first_tiles_E1[experts]) * height
    found = (
        slots_R,
        rows_MJ.view(picks_MJ.shape),
        offsets_E1,
        torch.where(is_tile, experts, -1),
        torch.where(is_tile, starts, slots_R.numel()),
    )
    return Dispatch(*(t.to(torch.int32) for t in found))


def tile_height(num_rows: int, num_experts: int) -> int:
    """Rows of a tile of the grouped products: a tall one is faster, but an expert's last tile is half empty."""
    return _TALL if num_rows >= _LOW * num_experts else _LOW


def num_tiles(num_rows: int, num_experts: int) -> int:
    """Entries of the tile table: every expert may have one tile that is not full."""
    return -(-num_rows // tile_height(num_rows, num_experts)) + num_experts


# --- Custom op. The picks have no gradient.


@torch.library.custom_op("bessemer::moe_route", mutates_args=())
def _route_op(picks_MJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    picks = picks_MJ.contiguous()
    outputs = _empty_dispatch(picks, num_experts)
    slots, rows, offsets, tile_experts, tile_rows = outputs
    block, experts = _one_hot_shape(num_experts)
    num_blocks, num_chunks = max(1, -(-picks.numel() // block)), -(-num_experts // experts)
    counts_PE = torch.empty((num_blocks, num_experts), dtype=torch.int32, device=picks.device)
    constants: dict[str, Any] = {
        "EXPERTS": num_experts,
        "BLOCK": block,
        "CHUNK": experts,
        "num_warps": num_warps(block * experts // 2),
    }
    _count_kernel[(num_blocks, num_chunks)](picks, counts_PE, picks.numel(), **constants)  # pyright: ignore[reportIndexIssue]
    until_PE = counts_PE.cumsum(0, dtype=torch.int32)
    ends_E = until_PE[-1].cumsum(0, dtype=torch.int32)
    offsets[:1].zero_()
    offsets[1:].copy_(ends_E)
    base_PE = (until_PE - counts_PE).add_(ends_E - until_PE[-1])
    _place_kernel[(num_blocks, num_chunks)](picks, base_PE, slots, rows, picks.numel(), **constants)  # pyright: ignore[reportIndexIssue]
    _launch_table(offsets, tile_experts, tile_rows, picks.numel(), num_experts)
    return outputs


@_route_op.register_fake
def _(picks_MJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_dispatch(picks_MJ, num_experts)


def _empty_dispatch(picks_MJ: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tiles = num_tiles(picks_MJ.numel(), num_experts)
    shapes = ((picks_MJ.numel(),), tuple(picks_MJ.shape), (num_experts + 1,), (tiles,), (tiles,))
    slots, rows, offsets, tile_experts, tile_rows = (picks_MJ.new_empty(s, dtype=torch.int32) for s in shapes)
    return slots, rows, offsets, tile_experts, tile_rows


def _one_hot_shape(num_experts: int) -> tuple[int, int]:
    """(slots, experts) of a program's one-hot matrix, both powers of two."""
    experts = min(_ONE_HOT_EXPERTS, 1 << (num_experts - 1).bit_length())
    return min(_ONE_HOT_ROWS, _ONE_HOT_ELEMENTS // experts), experts


def _launch_table(offsets: Tensor, tile_experts: Tensor, tile_rows: Tensor, num_rows: int, num_experts: int) -> None:
    experts = 1 << (num_experts - 1).bit_length()
    block = max(1, min(128, _TABLE_ELEMENTS // experts))
    _table_kernel[(-(-tile_experts.numel() // block),)](
        offsets, tile_experts, tile_rows, tile_experts.numel(), num_rows, EXPERTS=num_experts,
        HEIGHT=tile_height(num_rows, num_experts), BLOCK=block, CHUNK=experts, num_warps=num_warps(block * experts),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


# --- Kernels.


@triton.jit
def _one_hot(picks_ptr, num_slots, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """This program's slots, the experts of its chunk, and which slot picked which, as 0 and 1."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    pick = tl.load(picks_ptr + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    return slot, expert, (pick[:, None] == expert[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(
    picks_ptr, counts_ptr, num_slots, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    _, expert, is_picked = _one_hot(picks_ptr, num_slots, BLOCK, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    block = tl.program_id(0).to(tl.int64)
    tl.store(counts_ptr + block * EXPERTS + expert, tl.sum(is_picked, axis=0), mask=expert < EXPERTS)


@triton.jit
def _place_kernel(
    picks_ptr, base_ptr, slots_ptr, rows_ptr, num_slots,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    slot, expert, is_picked = _one_hot(picks_ptr, num_slots, BLOCK, CHUNK)  # pyright: ignore[reportGeneralTypeIssues]
    block = tl.program_id(0).to(tl.int64)
    base = tl.load(base_ptr + block * EXPERTS + expert, mask=expert < EXPERTS, other=0)
    # The running count includes the slot itself.
    row = tl.sum(is_picked * (base[None, :] + tl.cumsum(is_picked, axis=0) - 1), axis=1)
    is_ours = tl.sum(is_picked, axis=1) > 0
    tl.store(rows_ptr + slot, row, mask=is_ours)
    tl.store(slots_ptr + row, slot, mask=is_ours)


@triton.jit
def _table_kernel(
    offsets_ptr, tile_experts_ptr, tile_rows_ptr, num_tiles, num_rows,
    EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, CHUNK)
    start = tl.load(offsets_ptr + expert, mask=expert < EXPERTS, other=0)
    end = tl.load(offsets_ptr + 1 + expert, mask=expert < EXPERTS, other=0)
    tiles = (end - start + (HEIGHT - 1)) // HEIGHT
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The experts whose last tile is before this one: their number is this tile's expert, or all experts.
    is_before = (tl.cumsum(tiles, axis=0)[None, :] <= tile[:, None]).to(tl.int32)
    owner = tl.sum(is_before, axis=1)
    row = tl.sum(is_before * ((end - start) - tiles * HEIGHT)[None, :], axis=1) + tile * HEIGHT
    is_tile = owner < EXPERTS
    is_inside = tile < num_tiles
    tl.store(tile_experts_ptr + tile, tl.where(is_tile, owner, -1), mask=is_inside)
    tl.store(tile_rows_ptr + tile, tl.where(is_tile, row, num_rows), mask=is_inside)

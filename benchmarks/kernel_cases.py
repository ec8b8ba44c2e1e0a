"""What `make bench-kernels` measures: operators, shapes, and who computes them.

An operator is one entry of OPERATORS; those of mixtures of experts are in moe_cases.py.

Bytes are the least that a forward or backward can move: every input that is needed read once, every output written
once. Vectors beside matrices, such as weights of norms, tables of angles or targets, are not counted.
"""

import math
import pkgutil

import torch
from torch import Tensor

from benchmarks import kernel_peers as peers
from benchmarks import moe_cases
from benchmarks.kernel_operator import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Draw,
    Inputs,
    Operator,
    Phase,
    Shape,
    Sizes,
    sum_of,
)

_ROPE_BASE = 10_000.0
_TIMED_APART: tuple[Phase, ...] = (FORWARD, BACKWARD)
_ROWS = (4_096, 16_384, 32_768, 65_536)
_WIDTHS = (768, 1_024, 2_048, 4_096)
_FFNS = (2_048, 5_632, 11_008, 14_336)
_HEADS = ((32, 4, 64), (16, 4, 128), (32, 8, 128))
_LENGTHS = (2_048, 4_096, 8_192)
_VOCABULARIES = (32_000, 50_304, 128_256, 151_936)

# --- RMSNorm: forward r x, w y; backward r dy, r x, w dx. With a sum before it also r residual, w h, and r dh.


def _draw_norm(draw: Draw, shape: Shape) -> Inputs:
    return Inputs((draw.normal(shape["M"], shape["d"]), 1 + 0.3 * draw.normal(shape["d"])))


def _draw_add_norm(draw: Draw, shape: Shape) -> Inputs:
    x, w = _draw_norm(draw, shape).leaves
    return Inputs((x, draw.normal(*x.shape), w))


_NORM_SIZES = (
    Sizes({"M": 16_384, "d": 2_048}),
    Sizes({"M": 65_536, "d": 2_048}, _TIMED_APART),
    Sizes({"M": 4_097, "d": 2_056}, _TIMED_APART, with_peers=False),
    Sizes({"M": 16_384, "d": 4_096}, _TIMED_APART, autotuned=True),
)
_NORM_GRID = tuple(Sizes({"M": m, "d": d}, autotuned=m == 16_384) for m in _ROWS for d in _WIDTHS)
_NORM_TINY = ({"M": 7, "d": 96}, {"M": 5, "d": 33})
_NORM_KNOBS = {"kernels.rms_norm:_TILE_ELEMENTS": (2_048, 4_096, 8_192, 16_384)}

RMS_NORM = Operator(
    name="rms_norm",
    leaves=("x", "w"),
    outputs=("y",),
    draw=_draw_norm,
    ours="kernels.rms_norm:rms_norm",
    reference="kernels.rms_norm:rms_norm_reference",
    elements=lambda shape: sum_of(2 * shape["M"] * shape["d"], 3 * shape["M"] * shape["d"]),
    peers={
        "HF eager": peers.hf_rms_norm,
        "Liger": peers.liger_rms_norm,
        "quack": peers.quack_rms_norm,
        "flash-attn": peers.flash_rms_norm,
    },
    tiny=_NORM_TINY,
    sizes=_NORM_SIZES,
    full=_NORM_GRID,
    knobs=_NORM_KNOBS,
)

ADD_RMS_NORM = Operator(
    name="add_rms_norm",
    leaves=("x", "residual", "w"),
    outputs=("y", "h"),
    draw=_draw_add_norm,
    ours="kernels.rms_norm:add_rms_norm",
    reference="kernels.rms_norm:add_rms_norm_reference",
    elements=lambda shape: sum_of(4 * shape["M"] * shape["d"], 4 * shape["M"] * shape["d"]),
    peers={
        "Liger": peers.liger_add_rms_norm,
        "quack": peers.quack_add_rms_norm,
        "flash-attn": peers.flash_add_rms_norm,
    },
    tiny=_NORM_TINY,
    sizes=_NORM_SIZES,
    full=_NORM_GRID,
    knobs=_NORM_KNOBS,
)

# --- RoPE: forward r q, k, w q, k; backward the same of their gradients. Packed: r qkv, w q, k, v, and back.


def _draw_rope(draw: Draw, shape: Shape) -> Inputs:
    batch, length, heads, kv_heads, size = _rope_sizes(shape)
    q, k = draw.normal(batch, length, heads, size), draw.normal(batch, length, kv_heads, size)
    return Inputs((q, k), _tables(draw, length, size))


def _draw_rope_packed(draw: Draw, shape: Shape) -> Inputs:
    batch, length, heads, kv_heads, size = _rope_sizes(shape)
    return Inputs((draw.normal(batch, length, (heads + 2 * kv_heads) * size),), _tables(draw, length, size))


def _rope_sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    return shape["M"] // shape["T"], shape["T"], shape["H"], shape["G"], shape["K"]


def _tables(draw: Draw, length: int, size: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(length, device=draw.device)
    return pkgutil.resolve_name("kernels.rope:rope_tables")(positions, size, _ROPE_BASE)


def _rope_elements(shape: Shape, copies_of_kv: int) -> dict[Phase, int]:
    elements = 2 * shape["M"] * (shape["H"] + copies_of_kv * shape["G"]) * shape["K"]
    return sum_of(elements, elements)


_ROPE_SIZES = (
    Sizes({"M": 16_384, "T": 2_048, "H": 32, "G": 4, "K": 64}),
    Sizes({"M": 65_536, "T": 2_048, "H": 32, "G": 4, "K": 64}, _TIMED_APART),
    Sizes({"M": 4_097, "T": 4_097, "H": 16, "G": 4, "K": 128}, _TIMED_APART, with_peers=False),
)
_ROPE_GRID = tuple(
    Sizes({"M": m, "T": t, "H": heads, "G": kv_heads, "K": size})
    for m in (16_384, 65_536)
    for t in _LENGTHS
    for heads, kv_heads, size in _HEADS
)
_ROPE_TINY = ({"M": 6, "T": 3, "H": 4, "G": 2, "K": 8}, {"M": 5, "T": 5, "H": 3, "G": 1, "K": 6})
_ROPE_KNOBS = {"kernels.rope:_TILE_ELEMENTS": (1_024, 2_048, 4_096, 8_192)}

ROPE = Operator(
    name="rope",
    leaves=("q", "k"),
    outputs=("q'", "k'"),
    draw=_draw_rope,
    ours="kernels.rope:rope",
    reference="kernels.rope:rope_reference",
    elements=lambda shape: _rope_elements(shape, 1),
    peers={"HF eager": peers.hf_rope, "Liger": peers.liger_rope, "flash-attn": peers.flash_rope},
    tiny=_ROPE_TINY,
    sizes=_ROPE_SIZES,
    full=_ROPE_GRID,
    knobs=_ROPE_KNOBS,
)

ROPE_PACKED = Operator(
    name="rope_packed",
    leaves=("qkv",),
    outputs=("q'", "k'", "v"),
    draw=_draw_rope_packed,
    ours="kernels.rope:rope_packed",
    reference="kernels.rope:rope_packed_reference",
    elements=lambda shape: _rope_elements(shape, 2),
    options=lambda shape: {"num_heads": shape["H"], "num_kv_heads": shape["G"]},
    tiny=_ROPE_TINY,
    sizes=_ROPE_SIZES,
    full=_ROPE_GRID,
    knobs=_ROPE_KNOBS,
)

# --- SwiGLU: forward r gate, up, w y; backward r dy, gate, up, w dgate, dup.

SWIGLU = Operator(
    name="swiglu",
    leaves=("gate_up",),
    outputs=("y",),
    draw=lambda draw, shape: Inputs((draw.normal(shape["M"], 2 * shape["F"]),)),
    ours="kernels.swiglu:swiglu",
    reference="kernels.swiglu:swiglu_reference",
    elements=lambda shape: sum_of(3 * shape["M"] * shape["F"], 5 * shape["M"] * shape["F"]),
    peers={"Liger": peers.liger_swiglu, "flash-attn": peers.flash_swiglu},
    tiny=({"M": 5, "F": 48}, {"M": 3, "F": 37}),
    sizes=(
        Sizes({"M": 16_384, "F": 5_632}),
        Sizes({"M": 65_536, "F": 5_632}, _TIMED_APART),
        Sizes({"M": 4_097, "F": 5_641}, _TIMED_APART, with_peers=False),
    ),
    full=tuple(Sizes({"M": m, "F": f}, autotuned=m == 16_384) for m in _ROWS for f in _FFNS),
    knobs={
        "kernels.swiglu:_TILE_ELEMENTS": (1_024, 2_048, 4_096, 8_192),
        "kernels.swiglu:_TILE_COLUMNS": (512, 1_024, 2_048),
    },
)

# --- Cross-entropy: forward r logits; forward and backward r logits, w gradient.

_LOSS_PHASES: tuple[Phase, ...] = (BOTH, FORWARD)


def _draw_logits(draw: Draw, shape: Shape) -> Inputs:
    return Inputs((draw.normal(shape["M"], shape["V"]),), (draw.targets(shape["M"], shape["V"]),))


def _apart_from_targets(results: dict[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The gradient at the target is about 1, and a thousandth of that elsewhere."""
    gradient_MV, (targets_M,) = results["dlogits"], inputs.others
    index_M1 = targets_M.clamp(min=0)[:, None]
    at_targets_M1 = gradient_MV.gather(1, index_M1)
    return {**results, "dlogits": gradient_MV.scatter_(1, index_M1, 0.0), "dlogits at targets": at_targets_M1}


CROSS_ENTROPY = Operator(
    name="cross_entropy",
    leaves=("logits",),
    outputs=("loss",),
    draw=_draw_logits,
    ours="kernels.cross_entropy:cross_entropy_sum",
    step="kernels.cross_entropy:cross_entropy_gradient_",
    reference="kernels.cross_entropy:cross_entropy_sum_reference",
    elements=lambda shape: {FORWARD: shape["M"] * shape["V"], BOTH: 2 * shape["M"] * shape["V"]},
    parts=_apart_from_targets,
    exponent=lambda shape: 1 + math.log(shape["V"]),  # of the softmax's denominator, as a backward reads it
    gradient_is_one=True,
    is_in_place=True,
    peers={
        "Liger": peers.liger_cross_entropy,
        "quack": peers.quack_cross_entropy,
        "flash-attn": peers.flash_cross_entropy,
    },
    tiny=({"M": 9, "V": 70}, {"M": 4, "V": 129}),
    sizes=(
        Sizes({"M": 16_384, "V": 32_000}, _LOSS_PHASES),
        Sizes({"M": 16_896, "V": 128_256}, (BOTH,)),  # 2.17e9 logits: past 2**31
        Sizes({"M": 4_097, "V": 32_003}, _LOSS_PHASES, with_peers=False),
    ),
    full=tuple(Sizes({"M": m, "V": v}, _LOSS_PHASES) for v in _VOCABULARIES for m in (4_096, 16_384)),
    knobs={
        "kernels.cross_entropy:_ONE_BLOCK": (16_384, 32_768),
        "kernels.cross_entropy:_BLOCK": (4_096, 8_192, 16_384, 32_768),
    },
)

# --- Linear and cross-entropy: three matrix products of 2 M V d FLOPs. Bytes do not bound it.


def _draw_hidden(draw: Draw, shape: Shape) -> Inputs:
    head_VD = draw.normal(shape["V"], shape["d"]) * shape["d"] ** -0.5
    return Inputs((draw.normal(shape["M"], shape["d"]), head_VD), (draw.targets(shape["M"], shape["V"]),))


LINEAR_CROSS_ENTROPY = Operator(
    name="linear_cross_entropy",
    leaves=("hidden", "head"),
    outputs=("loss",),
    draw=_draw_hidden,
    ours="kernels.linear_cross_entropy:linear_cross_entropy_sum",
    reference="kernels.linear_cross_entropy:linear_cross_entropy_sum_reference",
    intermediate=lambda shape: shape["M"] * shape["V"],
    flops=lambda shape: {BOTH: 6 * shape["M"] * shape["V"] * shape["d"]},
    gradient_is_one=True,
    peers={
        "torch fused": peers.torch_linear_cross_entropy,
        "Liger": peers.liger_linear_cross_entropy,
        "quack": peers.quack_linear_cross_entropy,
        "cut-cross-entropy": peers.cut_cross_entropy,
    },
    tiny=({"M": 9, "V": 70, "d": 32}, {"M": 5, "V": 37, "d": 24}),
    sizes=(
        Sizes({"M": 16_384, "V": 32_000, "d": 2_048}, (BOTH,)),
        Sizes({"M": 16_384, "V": 128_256, "d": 2_048}, (BOTH,)),
        Sizes({"M": 4_097, "V": 32_003, "d": 2_056}, (BOTH,), with_peers=False),
    ),
    full=tuple(
        Sizes({"M": m, "V": v, "d": d}, (BOTH,)) for v in _VOCABULARIES for m in (4_096, 16_384) for d in (2_048, 4_096)
    ),
    knobs={
        "kernels.linear_cross_entropy:_GPU_CHUNK_ROWS": (
            (2_048, 2_048),
            (4_096, 4_096),
            (4_096, 8_192),
            (8_192, 8_192),
            (16_384, 16_384),
        ),
    },
)


OPERATORS: tuple[Operator, ...] = (
    ADD_RMS_NORM,
    CROSS_ENTROPY,
    moe_cases.EXPERTS,
    LINEAR_CROSS_ENTROPY,
    SWIGLU,
    ROPE_PACKED,
    ROPE,
    RMS_NORM,
    moe_cases.ROUTE,
    moe_cases.COMBINE,
    moe_cases.PERMUTE,
)


def default_cases() -> list[Case]:
    """In order of importance: the first shape of every operator, then the second of each, and so on."""
    return _in_rounds([operator.sizes for operator in OPERATORS])


def full_cases() -> list[Case]:
    """The default ones, then the full grid."""
    return default_cases() + _in_rounds([operator.full for operator in OPERATORS])


def _in_rounds(sizes: list[tuple[Sizes, ...]]) -> list[Case]:
    rounds = max(map(len, sizes))
    return [
        Case(operator, sizes_of_one[number])
        for number in range(rounds)
        for operator, sizes_of_one in zip(OPERATORS, sizes, strict=True)
        if number < len(sizes_of_one)
    ]

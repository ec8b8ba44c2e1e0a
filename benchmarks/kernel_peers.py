"""Other projects' kernels for the same operators, if they are installed. None is a dependency.

A loader takes no arguments, imports, and returns a function of the operator's tensors. ModuleNotFoundError means that
it is absent. What a version lacks is reported as an error: no other implementation stands in under its name.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Loader = Callable[[], Function]

EPS = 1e-6
IGNORE = -100

_DISTRIBUTIONS = (
    "transformers", "liger-kernel", "quack-kernels", "flash-attn", "cut-cross-entropy", "scattermoe", "sonic-moe",
    "megablocks",
)  # fmt: skip


def versions() -> Mapping[str, str]:
    """Version of each peer's distribution, or "absent"."""
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


# --- RMSNorm.


def hf_rms_norm() -> Function:
    """What transformers' Llama computes, operator by operator."""

    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        return w * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)

    return norm


def liger_rms_norm() -> Function:
    """Llama's casts; not in place, because gradients are reused here."""
    from liger_kernel.ops import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def quack_rms_norm() -> Function:
    """CuTe DSL kernels."""
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    return lambda x, w: rmsnorm(x, w, eps=EPS)


def flash_rms_norm() -> Function:
    """Triton kernels of flash-attn."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn  # pyright: ignore[reportMissingImports]

    return lambda x, w: rms_norm_fn(x, w, None, eps=EPS)


def liger_add_rms_norm() -> Function:
    """Sum and norm in one kernel."""
    from liger_kernel.ops import LigerFusedAddRMSNormFunction  # pyright: ignore[reportMissingImports]

    return lambda x, residual, w: LigerFusedAddRMSNormFunction.apply(x, residual, w, EPS, 0.0, "llama", False)


def quack_add_rms_norm() -> Function:
    """The same entry with a residual, which it returns in the residual's dtype."""
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    return lambda x, residual, w: rmsnorm(x, w, residual=residual, eps=EPS, prenorm=True)


def flash_add_rms_norm() -> Function:
    """The same entry with a residual."""
    from flash_attn.ops.triton.layer_norm import rms_norm_fn  # pyright: ignore[reportMissingImports]

    return lambda x, residual, w: rms_norm_fn(x, w, None, residual=residual, eps=EPS, prenorm=True)


# --- RoPE. Their tables have both halves, in the dtype of q; ours come as (T, K/2).


def hf_rope() -> Function:
    """transformers' function on transposed views, as its attention calls it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return _on_transposed(apply_rotary_pos_emb)


def liger_rope() -> Function:
    """In place: q and k are rotated again and again, which leaves them as random as they were."""
    from liger_kernel.ops import LigerRopeFunction  # pyright: ignore[reportMissingImports]

    return _on_transposed(LigerRopeFunction.apply)


def flash_rope() -> Function:
    """Two launches, one for q and one for k."""
    from flash_attn.layers.rotary import apply_rotary_emb  # pyright: ignore[reportMissingImports]

    def rotate(q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_emb(q_BTHK, cos_TK, sin_TK), apply_rotary_emb(k_BTGK, cos_TK, sin_TK)

    return rotate


def _on_transposed(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Function:
    tables: list[Tensor] = []  # made once, as a model makes them once for all its layers

    def on_rows(q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
        if not tables:
            tables.extend(torch.cat((table, table), dim=-1).to(q_BTHK.dtype)[None] for table in (cos_TK, sin_TK))
        q, k = rotate(q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), *tables)
        return q.transpose(1, 2), k.transpose(1, 2)

    return on_rows


# --- SwiGLU.


def liger_swiglu() -> Function:
    """On packed projections like ours; before 0.8 it had separate ones alone."""
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction  # pyright: ignore[reportMissingImports]

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up)


def flash_swiglu() -> Function:
    """A jiterator kernel on the two halves."""
    from flash_attn.ops.activations import swiglu  # pyright: ignore[reportMissingImports]

    return lambda gate_up: swiglu(*gate_up.chunk(2, dim=-1))


# --- Cross-entropy, summed.


def liger_cross_entropy() -> Function:
    """Writes the gradient over the logits in its forward."""
    from liger_kernel.ops import LigerCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    def loss_sum(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(logits_MV, targets_M, None, IGNORE, 0.0, 0.0, "sum")[0]

    return loss_sum


def quack_cross_entropy() -> Function:
    """With its backward in place."""
    from quack.cross_entropy import cross_entropy  # pyright: ignore[reportMissingImports]

    def loss_sum(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        return cross_entropy(logits_MV, targets_M, ignore_index=IGNORE, reduction="sum", inplace_backward=True)

    return loss_sum


def flash_cross_entropy() -> Function:
    """Triton kernels of flash-attn, with their backward in place."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # pyright: ignore[reportMissingImports]

    def loss_sum(logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        return cross_entropy_loss(logits_MV, targets_M, ignore_index=IGNORE, inplace_backward=True)[0].sum()

    return loss_sum


# --- Linear and cross-entropy, summed.


def torch_linear_cross_entropy() -> Function:
    """torch's own, in chunks; new in 2.13."""
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise ModuleNotFoundError("this torch has no F.linear_cross_entropy")

    def loss_sum(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        return function(hidden_MD, head_VD, targets_M, reduction="sum", ignore_index=IGNORE, options=options())

    return loss_sum


def liger_linear_cross_entropy() -> Function:
    """FLCE, as it is called by default: dW accumulates in the weight's dtype."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    def loss_sum(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        apply = LigerFusedLinearCrossEntropyFunction.apply
        return apply(hidden_MD, head_VD, targets_M, None, None, IGNORE, 0.0, 0.0, "sum")[0]

    return loss_sum


def quack_linear_cross_entropy() -> Function:
    """In chunks, on quack's own matrix products."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def loss_sum(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden_MD, head_VD, targets_M, ignore_index=IGNORE, reduction="sum")

    return loss_sum


def cut_cross_entropy() -> Function:
    """Logits never reach memory; computed again in the backward, with nothing filtered from the gradients."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def loss_sum(hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden_MD, head_VD, targets_M, ignore_index=IGNORE, reduction="sum", filter_eps=None
        )

    return loss_sum

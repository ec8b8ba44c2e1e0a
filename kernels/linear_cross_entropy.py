"""Cross-entropy of a linear readout, summed over targets, without ever holding all logits.

    loss_sum = sum over rows of  cross_entropy(hidden @ head.T, targets)

The rows go through in chunks. Of each: its logits, their gradient written over them (`cross_entropy_gradient_`), and
from that the chunk's share of both results, so that when the forward returns it has computed the gradients too:

    d hidden[chunk] = d logits @ head        d head += d logits.T @ hidden[chunk]

d head is added up in fp32 whatever the operands' dtype: rounded to bf16 after each chunk, it makes training diverge.

Shapes: hidden (..., D), head (V, D), targets (...) int64.
Dtypes: bf16, fp16, fp32, fp64, hidden and head alike; loss in fp32 (fp64 for fp64), gradients in the operands' dtype.
Cost: 6 M V D FLOPs with both gradients, all in the forward: the backward scales what that saved.

Rows of a chunk. Let m be the rows of one chunk, of M in all. On a GPU a chunk costs 6 m V D FLOPs, and beside them a
reading and a writing of d head in fp32, 8 V D bytes, and the cross-entropy's 4 m V bytes in bf16: at 790 TFLOP/s and
4.3 TB/s, 245 / m and 122 / D of the time of the products. With D = 2048 that makes 30 % for m = 1024, 12 % for 4096 and
9 % for 8192. Fewer than 4096 rows cost speed, more than 8192 nothing but memory; between them a chunk is a quarter of
the rows. In bytes for each of the M V logits, bf16, M = 16384, V = 32000, D = 2048: a chunk 0.5, d head 4 D / M = 0.5,
d hidden 2 D / V = 0.13, together 1.13, where torch on whole logits holds 12 (fp32: log-probabilities, the gradients of
these and of the logits). A CPU is as fast with 1024 rows, which stay nearer to its caches, as with all of them.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import (
    LossOptions,
    check_options,
    cross_entropy_gradient_,
    cross_entropy_rows,
    cross_entropy_sum,
    cross_entropy_sum_reference,
)
from kernels.launch import chosen, sum_dtype

# Fewest and most rows of a chunk, where there are as many; between them there are four chunks.
_GPU_CHUNK_ROWS = (4_096, 8_192)
_CPU_CHUNK_ROWS = (1_024, 1_024)
_ROW_MULTIPLE = 256  # of the tiles of matrix products


def linear_cross_entropy_sum(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sums the losses of targets under logits hidden @ head.T; positions whose target is IGNORE add nothing.

    Its backward can run once: a second one through a retained graph is an error of autograd's.

    Raises:
        ValueError: shapes or dtypes do not agree, chunk_rows is not positive, or an option is out of its range.
    """
    _check(hidden, head_VD, targets, chunk_rows)
    check_options("linear_cross_entropy_sum", z_loss, soft_cap, label_smoothing)
    if chosen("linear_cross_entropy") == "whole":
        options = LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)
        return cross_entropy_sum(F.linear(hidden, head_VD), targets, **options)
    hidden_MD, targets_M = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(hidden_MD.shape[0], hidden.device.type)
    with_gradients = [torch.is_grad_enabled() and operand.requires_grad for operand in (hidden, head_VD)]
    loss_sum, _, _ = torch.ops.bessemer.linear_cross_entropy(
        hidden_MD, head_VD, targets_M, chunk_rows, *with_gradients, z_loss, soft_cap, label_smoothing
    )
    return loss_sum


def linear_cross_entropy_sum_reference(
    hidden: Tensor, head_VD: Tensor, targets: Tensor, **options: Unpack[LossOptions]
) -> Tensor:
    """The same function in plain torch, on whole logits: the specification."""
    return cross_entropy_sum_reference(F.linear(hidden, head_VD), targets, **options)


def default_chunk_rows(num_rows: int, device_type: str) -> int:
    """Rows of a chunk when the caller names no number: chunks of nearly equal size, as the module's text derives."""
    fewest, most = _GPU_CHUNK_ROWS if device_type == "cuda" else _CPU_CHUNK_ROWS
    num_chunks = max(1, min(4, num_rows // fewest), -(-num_rows // most))
    return -(-num_rows // (num_chunks * _ROW_MULTIPLE)) * _ROW_MULTIPLE or _ROW_MULTIPLE


def _check(hidden: Tensor, head_VD: Tensor, targets: Tensor, chunk_rows: int | None) -> None:
    if head_VD.ndim != 2 or hidden.shape[-1] != head_VD.shape[1] or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy_sum: hidden {tuple(hidden.shape)}, head {tuple(head_VD.shape)}, targets "
            f"{tuple(targets.shape)}; expected (..., D), (V, D) and (...)"
        )
    if hidden.dtype != head_VD.dtype:
        raise ValueError(f"linear_cross_entropy_sum: hidden is {hidden.dtype}, head {head_VD.dtype}; cast one to other")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_cross_entropy_sum: chunk_rows = {chunk_rows}; expected at least one row")


# --- Autograd registration.


@torch.library.custom_op("bessemer::linear_cross_entropy", mutates_args=())
def _forward_op(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets_M: Tensor,
    chunk_rows: int,
    hidden_gradient: bool,
    head_gradient: bool,
    z_loss: float,
    soft_cap: float | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum, d_hidden_MD, d_head_VD in the dtype of sums); a gradient that is not asked for is empty."""
    options = LossOptions(z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing)
    (num_rows, _), (vocab_size, _) = hidden_MD.shape, head_VD.shape
    loss_M = hidden_MD.new_empty(num_rows, dtype=sum_dtype(hidden_MD))
    d_hidden_MD, d_head_VD = empty_gradients(hidden_MD, head_VD, hidden_gradient, head_gradient)
    if not num_rows:
        d_head_VD.zero_()
    buffer_CV = hidden_MD.new_empty(min(chunk_rows, num_rows), vocab_size)
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        logits_CV = torch.mm(hidden_MD[rows], head_VD.T, out=buffer_CV[: rows.stop - start])
        if not (hidden_gradient or head_gradient):
            loss_M[rows] = cross_entropy_rows(logits_CV, targets_M[rows], **options)
            continue
        loss_M[rows] = cross_entropy_gradient_(logits_CV, targets_M[rows], **options)
        if hidden_gradient:
            torch.mm(logits_CV, head_VD, out=d_hidden_MD[rows])
        if head_gradient:
            add_product_(d_head_VD, logits_CV.T, hidden_MD[rows], is_first=start == 0)
    return loss_M.sum(), d_hidden_MD, d_head_VD


@_forward_op.register_fake
def _(hidden_MD, head_VD, targets_M, chunk_rows, hidden_gradient, head_gradient, z_loss, soft_cap, label_smoothing):
    loss_sum = hidden_MD.new_empty((), dtype=sum_dtype(hidden_MD))
    return loss_sum, *empty_gradients(hidden_MD, head_VD, hidden_gradient, head_gradient)


def _save_for_backward(ctx, inputs, output) -> None:
    _, d_hidden_MD, d_head_VD = output
    ctx.mark_non_differentiable(d_hidden_MD, d_head_VD)
    ctx.set_materialize_grads(False)  # else backward gets zeros for the gradient of d head, as large as d head
    _, _, _, _, ctx.hidden_gradient, ctx.head_gradient, *_ = inputs
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(d_hidden_MD, d_head_VD)


def _backward(ctx, dloss: Tensor | None, _d_hidden: Tensor | None, _d_head: Tensor | None):
    if dloss is None:
        return (None,) * 9
    d_hidden_MD, d_head_VD = ctx.saved_tensors
    d_hidden = scaled(d_hidden_MD, dloss) if ctx.hidden_gradient else None
    d_head = scaled(d_head_VD, dloss).to(ctx.dtype) if ctx.head_gradient else None
    return d_hidden, d_head, *(None,) * 7


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.bessemer.linear_cross_entropy)
def _flops(
    hidden_shape, head_shape, targets_shape, chunk_rows, hidden_gradient, head_gradient, *options, out_shape=None, **_
) -> int:
    (num_rows, width), (vocab_size, _) = hidden_shape, head_shape
    return 2 * num_rows * width * vocab_size * (1 + hidden_gradient + head_gradient)


def empty_gradients(
    hidden_MD: Tensor, head_VD: Tensor, hidden_gradient: bool, head_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Room for d hidden and, in the dtype of sums, d head; empty for one that is not asked for."""
    d_hidden_MD = hidden_MD.new_empty(hidden_MD.shape if hidden_gradient else 0)
    d_head_VD = head_VD.new_empty(head_VD.shape if head_gradient else 0, dtype=sum_dtype(head_VD))
    return d_hidden_MD, d_head_VD


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """A saved gradient times its upstream one."""
    # In place, because a second d head in fp32 would be the peak of memory. A compiler, known by the types of its
    # stand-ins for tensors, decides that itself.
    return saved.mul_(factor) if type(saved) is Tensor else saved * factor


def add_product_(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a @ b in total's dtype; the first time total = a @ b, whatever was in it."""
    beta = 0 if is_first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)  # pyright: ignore[reportCallIssue]
    else:
        # A CPU has no product of bf16 matrices with an fp32 result.
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)

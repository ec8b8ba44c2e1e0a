"""How far a student's next-token distributions are from a teacher's, summed over targets, without whole logits.

With p the teacher's softmax and q the student's, both of logits divided by the temperature t:

    forward          D = KL(p || q)                                                d D / d z_j = q_j - p_j
    reverse          D = KL(q || p)                                                            = q_j (r_j - D)
    jensen_shannon   D = b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q               = (1 - b) q_j (r_j - R)

z are the student's logits over t; r_j = log q_j - log p_j, in the last row log q_j - log m_j, and R = sum_j q_j r_j.
The sum is of t^2 D, whose gradient keeps its size whatever t is. Positions whose target is IGNORE add nothing.

A teacher may also be its k likeliest tokens and, as one more outcome, all others together (`linear_top_log_probs` makes
that). D is then over k + 1 outcomes, never more than the whole one; each of the other tokens gets the last outcome's
gradient by its share of q among them.

The rows go through in chunks, and the forward computes the gradients too; see `kernels.linear_cross_entropy`, but a
chunk has a quarter as many rows, because here it holds six fp32 numbers for each logit. All of it is torch.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (t^2); Gu et al., "MiniLLM", 2024 (reverse);
Agarwal et al., "On-Policy Distillation of Language Models", 2024, equation 1 (b is their beta).
Shapes: hidden (..., D), head (V, D), teacher's hidden (..., E) and head (V, E), targets (...) int64.
Dtypes: bf16, fp16, fp32, fp64; hidden and head alike, the teacher's two alike; the sum in fp32 (fp64 for fp64).
Cost: 6 M V D + 2 M V E FLOPs with both gradients.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import IGNORE
from kernels.launch import sum_dtype
from kernels.linear_cross_entropy import add_product_, default_chunk_rows, empty_gradients, scaled

Divergence = Literal["forward", "reverse", "jensen_shannon"]
DivergenceOfRows = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(the student's log-probabilities (C, V), to write over, which rows) -> (divergence (C,), its gradient (C, V))."""


def linear_divergence_sum(
    hidden: Tensor,
    head_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_head_VE: Tensor,
    targets: Tensor,
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sums temperature^2 times the divergence between teacher and student; no gradient goes to the teacher.

    beta is Jensen-Shannon's alone. Its backward can run once: a second one is an error of autograd's.

    Raises:
        ValueError: shapes or dtypes do not agree, or an option is out of its range.
    """
    _check("linear_divergence_sum", hidden, head_VD, targets, kind, temperature, beta, chunk_rows)
    if teacher_hidden.shape[:-1] != targets.shape or teacher_head_VE.shape != (len(head_VD), teacher_hidden.shape[-1]):
        raise ValueError(
            f"linear_divergence_sum: teacher_hidden {tuple(teacher_hidden.shape)}, teacher_head "
            f"{tuple(teacher_head_VE.shape)}; expected {(*targets.shape, 'E')} and {(len(head_VD), 'E')}"
        )
    teacher = teacher_hidden.detach().flatten(0, -2), teacher_head_VE.detach()
    caps = soft_cap, teacher_soft_cap
    return _sum(hidden, head_VD, targets, *teacher, False, kind, temperature, beta, *caps, chunk_rows)


def linear_divergence_topk_sum(
    hidden: Tensor,
    head_VD: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    targets: Tensor,
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`linear_divergence_sum` of a teacher that is known by its J likeliest tokens, over those and all others as one.

    Shapes: teacher_ids (..., J), distinct; teacher_log_probs (..., J + 1), the others' last, at the same temperature.
    What rounding has added to the teacher's sum of probabilities is taken off again.
    Raises:
        ValueError: shapes or dtypes do not agree, no token is left for the others, or an option is out of its range.
    """
    _check("linear_divergence_topk_sum", hidden, head_VD, targets, kind, temperature, beta, chunk_rows)
    num_kept = teacher_ids.shape[-1]
    if teacher_ids.shape[:-1] != targets.shape or teacher_log_probs.shape != (*targets.shape, num_kept + 1):
        raise ValueError(
            f"linear_divergence_topk_sum: teacher_ids {tuple(teacher_ids.shape)}, teacher_log_probs "
            f"{tuple(teacher_log_probs.shape)}; expected {(*targets.shape, 'J')} and {(*targets.shape, 'J + 1')}"
        )
    _check_kept("linear_divergence_topk_sum", num_kept, len(head_VD))
    teacher = teacher_ids.flatten(0, -2), teacher_log_probs.detach().flatten(0, -2)
    return _sum(hidden, head_VD, targets, *teacher, True, kind, temperature, beta, soft_cap, None, chunk_rows)


@torch.no_grad()
def linear_top_log_probs(
    hidden: Tensor,
    head_VD: Tensor,
    num_kept: int,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids (..., J), log-probabilities (..., J + 1)) of the J = num_kept likeliest tokens, and of all others together.

    Raises:
        ValueError: num_kept leaves no token for the others.
    """
    _check_kept("linear_top_log_probs", num_kept, len(head_VD))
    hidden_MD = hidden.reshape(-1, hidden.shape[-1])
    ids_MJ = hidden_MD.new_empty((len(hidden_MD), num_kept), dtype=torch.int64)
    log_probs_MJ = hidden_MD.new_empty((len(hidden_MD), num_kept + 1), dtype=sum_dtype(hidden_MD))
    for rows in _chunks(hidden_MD, chunk_rows):
        log_p_CV = _log_probs(hidden_MD[rows] @ head_VD.T, soft_cap, temperature)
        log_probs_MJ[rows, :-1], ids_MJ[rows] = log_p_CV.topk(num_kept)
        log_probs_MJ[rows, -1] = log_p_CV.scatter_(1, ids_MJ[rows], -math.inf).logsumexp(1)
    return ids_MJ.unflatten(0, hidden.shape[:-1]), log_probs_MJ.unflatten(0, hidden.shape[:-1])


def linear_divergence_sum_reference(
    hidden: Tensor,
    head_VD: Tensor,
    teacher_hidden: Tensor,
    teacher_head_VE: Tensor,
    targets: Tensor,
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
) -> Tensor:
    """The same function in plain torch, on whole logits: the specification."""
    log_q = _log_probs(F.linear(hidden, head_VD), soft_cap, temperature)
    log_p = _log_probs(F.linear(teacher_hidden, teacher_head_VE), teacher_soft_cap, temperature).to(log_q.dtype)
    return temperature**2 * _divergence_reference(log_q, log_p.detach(), kind, beta)[targets != IGNORE].sum()


def linear_divergence_topk_sum_reference(
    hidden: Tensor,
    head_VD: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    targets: Tensor,
    *,
    kind: Divergence = "forward",
    temperature: float = 1.0,
    beta: float = 0.5,
    soft_cap: float | None = None,
) -> Tensor:
    """`linear_divergence_topk_sum` in plain torch, on whole logits: the specification."""
    log_q = _log_probs(F.linear(hidden, head_VD), soft_cap, temperature)
    others = log_q.scatter(-1, teacher_ids, -math.inf).logsumexp(-1, keepdim=True)
    outcomes = torch.cat([log_q.gather(-1, teacher_ids), others], -1)
    log_p = teacher_log_probs.to(log_q.dtype).log_softmax(-1).detach()
    return temperature**2 * _divergence_reference(outcomes, log_p, kind, beta)[targets != IGNORE].sum()


def _divergence_reference(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> Tensor:
    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def _check(
    name: str, hidden: Tensor, head_VD: Tensor, targets: Tensor, kind: str, temperature: float, beta: float,
    chunk_rows: int | None,
) -> None:  # fmt: skip
    if head_VD.ndim != 2 or hidden.shape[-1] != head_VD.shape[1] or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)}, head {tuple(head_VD.shape)}, targets {tuple(targets.shape)}; "
            "expected (..., D), (V, D) and (...)"
        )
    if hidden.dtype != head_VD.dtype:
        raise ValueError(f"{name}: hidden is {hidden.dtype}, head {head_VD.dtype}; cast one to other")
    if kind not in ("forward", "reverse", "jensen_shannon"):
        raise ValueError(f"{name}: kind = {kind!r}; expected forward, reverse or jensen_shannon")
    if temperature <= 0:
        raise ValueError(f"{name}: temperature = {temperature}; expected a positive number")
    if not 0 < beta < 1:
        raise ValueError(f"{name}: beta = {beta}; expected between 0 and 1, whose limits are forward and reverse")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows = {chunk_rows}; expected at least one row")


def _check_kept(name: str, num_kept: int, vocab_size: int) -> None:
    if not 0 < num_kept < vocab_size:
        raise ValueError(f"{name}: {num_kept} tokens of a vocabulary of {vocab_size}; expected some, but not all")


def _chunks(hidden_MD: Tensor, chunk_rows: int | None) -> Iterator[slice]:
    num_rows = len(hidden_MD)
    step = chunk_rows or default_chunk_rows(num_rows, hidden_MD.device.type) // 4
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def _log_probs(logits: Tensor, soft_cap: float | None, temperature: float) -> Tensor:
    logits = logits.to(sum_dtype(logits))
    capped = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
    return (capped / temperature).log_softmax(-1)


def _cap_slope(logits: Tensor, soft_cap: float | None) -> Tensor | float:
    """d capped / d logits."""
    return 1.0 if soft_cap is None else 1 - torch.tanh(logits.to(sum_dtype(logits)) / soft_cap).square_()


def _divergence(log_q_CN: Tensor, log_p_CN: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """(divergence of each row, its gradient for the student's logits) over N outcomes; writes over log_q."""
    q_CN = log_q_CN.exp()
    if kind == "forward":
        p_CN = log_p_CN.exp()
        return log_q_CN.sub_(log_p_CN).mul_(p_CN).sum(1).neg_(), q_CN.sub_(p_CN)
    if kind == "reverse":
        ratio_CN = log_q_CN.sub_(log_p_CN)
        kl_C1 = (q_CN * ratio_CN).sum(1, keepdim=True)
        return kl_C1[:, 0], ratio_CN.sub_(kl_C1).mul_(q_CN)
    log_m_CN = torch.logaddexp(log_p_CN + math.log(beta), log_q_CN + math.log1p(-beta))
    teacher_kl_C = (log_p_CN - log_m_CN).mul_(log_p_CN.exp()).sum(1)
    ratio_CN = log_q_CN.sub_(log_m_CN)
    kl_C1 = (q_CN * ratio_CN).sum(1, keepdim=True)
    divergence_C = beta * teacher_kl_C + (1 - beta) * kl_C1[:, 0]
    return divergence_C, ratio_CN.sub_(kl_C1).mul_(q_CN).mul_(1 - beta)


def _from_whole_teacher(
    teacher_hidden_ME: Tensor, teacher_head_VE: Tensor, kind: str, temperature: float, beta: float,
    soft_cap: float | None,
) -> DivergenceOfRows:  # fmt: skip
    def divergence_of_rows(log_q_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_p_CV = _log_probs(teacher_hidden_ME[rows] @ teacher_head_VE.T, soft_cap, temperature)
        return _divergence(log_q_CV, log_p_CV.to(log_q_CV.dtype), kind, beta)

    return divergence_of_rows


def _from_top_tokens(ids_MJ: Tensor, log_probs_MJ: Tensor, kind: str, beta: float) -> DivergenceOfRows:
    def divergence_of_rows(log_q_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids_CJ, log_p_CJ = ids_MJ[rows].long(), log_probs_MJ[rows].to(log_q_CV.dtype).log_softmax(1)
        top_CJ = log_q_CV.gather(1, ids_CJ)
        others_C1 = log_q_CV.scatter_(1, ids_CJ, -math.inf).logsumexp(1, keepdim=True)
        divergence_C, gradient_CJ = _divergence(torch.cat([top_CJ, others_C1], 1), log_p_CJ, kind, beta)
        gradient_CV = log_q_CV.sub_(others_C1).exp_().mul_(gradient_CJ[:, -1:])
        return divergence_C, gradient_CV.scatter_(1, ids_CJ, gradient_CJ[:, :-1])

    return divergence_of_rows


# --- Autograd registration.


def _sum(
    hidden: Tensor, head_VD: Tensor, targets: Tensor, teacher_1: Tensor, teacher_2: Tensor, is_topk: bool,
    kind: str, temperature: float, beta: float, soft_cap: float | None, teacher_soft_cap: float | None,
    chunk_rows: int | None,
) -> Tensor:  # fmt: skip
    with_gradients = [torch.is_grad_enabled() and operand.requires_grad for operand in (hidden, head_VD)]
    divergence_sum, _, _ = torch.ops.bessemer.linear_divergence(
        hidden.reshape(-1, hidden.shape[-1]), head_VD, targets.reshape(-1), teacher_1, teacher_2, is_topk,
        kind, temperature, beta, soft_cap, teacher_soft_cap, chunk_rows, *with_gradients,
    )  # fmt: skip
    return divergence_sum


@torch.library.custom_op("bessemer::linear_divergence", mutates_args=())
def _forward_op(
    hidden_MD: Tensor, head_VD: Tensor, targets_M: Tensor, teacher_1: Tensor, teacher_2: Tensor, is_topk: bool,
    kind: str, temperature: float, beta: float, soft_cap: float | None, teacher_soft_cap: float | None,
    chunk_rows: int | None, hidden_gradient: bool, head_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(divergence_sum, d_hidden_MD, d_head_VD in the dtype of sums); a gradient that is not asked for is empty.

    The teacher's two tensors are hidden states and head, or ids and log-probabilities.
    """
    if is_topk:
        divergence_of_rows = _from_top_tokens(teacher_1, teacher_2, kind, beta)
    else:
        divergence_of_rows = _from_whole_teacher(teacher_1, teacher_2, kind, temperature, beta, teacher_soft_cap)
    divergence_sum = hidden_MD.new_zeros((), dtype=sum_dtype(hidden_MD))
    d_hidden_MD, d_head_VD = empty_gradients(hidden_MD, head_VD, hidden_gradient, head_gradient)
    if not len(hidden_MD):
        d_head_VD.zero_()
    for rows in _chunks(hidden_MD, chunk_rows):
        logits_CV = hidden_MD[rows] @ head_VD.T
        log_q_CV = _log_probs(logits_CV, soft_cap, temperature)
        slope_CV = _cap_slope(logits_CV, soft_cap)
        del logits_CV
        is_ignored_C = targets_M[rows] == IGNORE
        divergence_C, gradient_CV = divergence_of_rows(log_q_CV, rows)
        divergence_sum += temperature**2 * divergence_C.masked_fill_(is_ignored_C, 0.0).sum()
        gradient_CV.mul_(temperature * slope_CV).masked_fill_(is_ignored_C[:, None], 0.0)
        gradient_CV = gradient_CV.to(head_VD.dtype)
        if hidden_gradient:
            torch.mm(gradient_CV, head_VD, out=d_hidden_MD[rows])
        if head_gradient:
            add_product_(d_head_VD, gradient_CV.T, hidden_MD[rows], is_first=rows.start == 0)
        del gradient_CV  # else it would be there beside the next chunk's
    return divergence_sum, d_hidden_MD, d_head_VD


@_forward_op.register_fake
def _(hidden_MD, head_VD, *arguments):
    divergence_sum = hidden_MD.new_empty((), dtype=sum_dtype(hidden_MD))
    return divergence_sum, *empty_gradients(hidden_MD, head_VD, *arguments[-2:])


def _save_for_backward(ctx, inputs, output) -> None:
    _, d_hidden_MD, d_head_VD = output
    ctx.mark_non_differentiable(d_hidden_MD, d_head_VD)
    ctx.set_materialize_grads(False)  # else backward gets zeros for the gradient of d head, as large as d head
    *_, ctx.hidden_gradient, ctx.head_gradient = inputs
    ctx.dtype, ctx.num_others = inputs[0].dtype, len(inputs) - 2
    ctx.save_for_backward(d_hidden_MD, d_head_VD)


def _backward(ctx, dsum: Tensor | None, _d_hidden: Tensor | None, _d_head: Tensor | None):
    others = (None,) * ctx.num_others
    if dsum is None:
        return None, None, *others
    d_hidden_MD, d_head_VD = ctx.saved_tensors
    d_hidden = scaled(d_hidden_MD, dsum) if ctx.hidden_gradient else None
    d_head = scaled(d_head_VD, dsum).to(ctx.dtype) if ctx.head_gradient else None
    return d_hidden, d_head, *others


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.bessemer.linear_divergence)
def _flops(hidden_shape, head_shape, targets_shape, teacher_shape, _, is_topk, *options, out_shape=None, **__) -> int:
    (num_rows, width), (vocab_size, _) = hidden_shape, head_shape
    teacher_width = 0 if is_topk else teacher_shape[1]
    return 2 * num_rows * vocab_size * (width * (1 + sum(options[-2:])) + teacher_width)

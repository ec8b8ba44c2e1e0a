"""Log-probabilities of given tokens under a linear readout, without ever holding all logits.

    log_prob = c_t - log sum_j exp(c_j)        c = cap(hidden @ head.T) / temperature, t: the target

with cap(z) = soft_cap * tanh(z / soft_cap), or z without a soft cap. For objectives that weigh each token by what the
others came to: of preference and of policy gradients. Where all weigh the same, `linear_cross_entropy_sum` is cheaper.

The rows go through in chunks. The forward keeps two numbers of each row: its largest logit, and the sum of exponentials
of how far all are below it. The backward, which alone knows each row's upstream gradient u, computes a chunk's logits
again and writes their gradient over them:

    d c_j = u ([j = t] - exp(c_j) / sum)     d hidden[chunk] = d logits @ head     d head += d logits.T @ hidden[chunk]

d head is added up in fp32 whatever the operands' dtype, as in kernels/linear_cross_entropy.py, which also says how many
rows a chunk should have.

Shapes: hidden (..., D), head (V, D), targets (...) int64 -> (...).
Dtypes: bf16, fp16, fp32, fp64, hidden and head alike; results in fp32 (fp64 for fp64), gradients as the operands.
Cost: 2 M V D FLOPs in the forward, 2 M V D in the backward and 2 M V D more for each gradient that is wanted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy import IGNORE, check_options
from kernels.launch import runs_triton, sum_dtype
from kernels.linear_cross_entropy import add_product_, default_chunk_rows

# Rows of which the entropy is computed at once: it wants temporaries in fp32 as large as their logits.
_ENTROPY_ROWS = 256


def linear_log_probs(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """log p(target) at each position under logits hidden @ head.T, 0 where the target is IGNORE.

    Raises:
        ValueError: shapes or dtypes do not agree, or an option is out of its range.
    """
    return _log_probs(hidden, head_VD, targets, soft_cap, temperature, chunk_rows, with_entropy=False)[0]


def linear_log_probs_and_entropy(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same, and beside it the entropy of each position's distribution in nats, IGNORE or not, without a gradient.

    Raises:
        ValueError: as `linear_log_probs`.
    """
    return _log_probs(hidden, head_VD, targets, soft_cap, temperature, chunk_rows, with_entropy=True)


def linear_log_probs_reference(
    hidden: Tensor, head_VD: Tensor, targets: Tensor, *, soft_cap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """The same function in plain torch, on whole logits: the specification."""
    logits = F.linear(hidden, head_VD)
    c = logits.to(sum_dtype(logits))
    c = c if soft_cap is None else soft_cap * torch.tanh(c / soft_cap)
    log_p = torch.log_softmax(c / temperature, dim=-1)
    return -F.nll_loss(log_p.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="none").view_as(targets)


def _log_probs(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    soft_cap: float | None,
    temperature: float,
    chunk_rows: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    _check(hidden, head_VD, targets, soft_cap, temperature, chunk_rows)
    hidden_MD = hidden.reshape(-1, hidden.shape[-1])
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(hidden_MD.shape[0], hidden.device.type)
    log_probs, _, entropy = torch.ops.bessemer.linear_log_probs(
        hidden_MD, head_VD, targets, chunk_rows, soft_cap, temperature, with_entropy
    )
    return log_probs, entropy


def _check(
    hidden: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    soft_cap: float | None,
    temperature: float,
    chunk_rows: int | None,
) -> None:
    if head_VD.ndim != 2 or hidden.shape[-1] != head_VD.shape[1] or targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_log_probs: hidden {tuple(hidden.shape)}, head {tuple(head_VD.shape)}, targets "
            f"{tuple(targets.shape)}; expected (..., D), (V, D) and (...)"
        )
    if hidden.dtype != head_VD.dtype:
        raise ValueError(f"linear_log_probs: hidden is {hidden.dtype}, head {head_VD.dtype}; cast one to other")
    check_options("linear_log_probs", 0.0, soft_cap, 0.0)
    if temperature <= 0:
        raise ValueError(f"linear_log_probs: temperature = {temperature}; expected more than 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"linear_log_probs: chunk_rows = {chunk_rows}; expected at least one row")


# --- Autograd registration. The temperature is a factor of the product that makes the logits, and of the soft cap.


@torch.library.custom_op("bessemer::linear_log_probs", mutates_args=())
def _forward_op(
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    chunk_rows: int,
    soft_cap: float | None,
    temperature: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, softmax, entropies): softmax has the two numbers of each row that the module's text names.

    The others are shaped as targets here and not by a view outside, of which FSDP would warn: its hooks hang on what a
    model returns.
    """
    log_probs, softmax_M2, entropy = _empty_results(hidden_MD, targets, with_entropy)
    log_probs_M, entropy_M, targets_M = log_probs.view(-1), entropy.view(-1), targets.reshape(-1)
    cap = None if soft_cap is None else soft_cap / temperature
    for rows, logits_CV in _chunks_of_logits(hidden_MD, head_VD, chunk_rows, temperature):
        log_probs_M[rows], softmax_M2[rows] = _softmax_rows(logits_CV, targets_M[rows], cap)
        if with_entropy:
            parts = zip(logits_CV.split(_ENTROPY_ROWS), softmax_M2[rows].split(_ENTROPY_ROWS), strict=True)
            entropy_M[rows] = torch.cat([_entropy(*part, cap) for part in parts])
    return log_probs, softmax_M2, entropy


@_forward_op.register_fake
def _(hidden_MD, head_VD, targets, chunk_rows, soft_cap, temperature, with_entropy):
    return _empty_results(hidden_MD, targets, with_entropy)


@torch.library.custom_op("bessemer::linear_log_probs_backward", mutates_args=())
def _backward_op(
    upstream: Tensor,
    hidden_MD: Tensor,
    head_VD: Tensor,
    targets: Tensor,
    softmax_M2: Tensor,
    chunk_rows: int,
    soft_cap: float | None,
    temperature: float,
    hidden_gradient: bool,
    head_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(d_hidden_MD, d_head_VD); one that is not asked for is empty."""
    cap = None if soft_cap is None else soft_cap / temperature
    targets_M = targets.reshape(-1)
    d_loss_M = torch.where(targets_M == IGNORE, 0.0, upstream.reshape(-1)) / -temperature
    d_hidden_MD = hidden_MD.new_empty(hidden_MD.shape if hidden_gradient else 0)
    d_head_VD = head_VD.new_zeros(head_VD.shape if head_gradient else 0, dtype=sum_dtype(head_VD))
    for rows, logits_CV in _chunks_of_logits(hidden_MD, head_VD, chunk_rows, temperature):
        _gradient_(d_loss_M[rows], logits_CV, targets_M[rows], softmax_M2[rows], cap)
        if hidden_gradient:
            torch.mm(logits_CV, head_VD, out=d_hidden_MD[rows])
        if head_gradient:
            add_product_(d_head_VD, logits_CV.T, hidden_MD[rows], is_first=rows.start == 0)
    return d_hidden_MD, d_head_VD.to(head_VD.dtype)


@_backward_op.register_fake
def _(
    upstream, hidden_MD, head_VD, targets, softmax_M2,
    chunk_rows, soft_cap, temperature, hidden_gradient, head_gradient,
):  # fmt: skip
    d_hidden_MD = hidden_MD.new_empty(hidden_MD.shape if hidden_gradient else 0)
    return d_hidden_MD, head_VD.new_empty(head_VD.shape if head_gradient else 0)


def _save_for_backward(ctx, inputs, output) -> None:
    hidden_MD, head_VD, targets, *ctx.options, _ = inputs
    _, softmax_M2, entropy = output
    ctx.mark_non_differentiable(softmax_M2, entropy)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_MD, head_VD, targets, softmax_M2)


def _backward(ctx, upstream: Tensor | None, _softmax: Tensor | None, _entropy: Tensor | None):
    if upstream is None:
        return (None,) * 7
    wanted = ctx.needs_input_grad[:2]
    found = torch.ops.bessemer.linear_log_probs_backward(upstream, *ctx.saved_tensors, *ctx.options, *wanted)
    return *(gradient if is_wanted else None for gradient, is_wanted in zip(found, wanted, strict=True)), *(None,) * 5


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.bessemer.linear_log_probs)
def _forward_flops(hidden_shape, head_shape, *_, out_shape=None, **__) -> int:
    return 2 * hidden_shape[0] * hidden_shape[1] * head_shape[0]


@register_flop_formula(torch.ops.bessemer.linear_log_probs_backward)
def _backward_flops(upstream_shape, hidden_shape, head_shape, *arguments, out_shape=None, **_) -> int:
    *_, hidden_gradient, head_gradient = arguments
    return 2 * hidden_shape[0] * hidden_shape[1] * head_shape[0] * (1 + hidden_gradient + head_gradient)


def _empty_results(hidden_MD: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    shapes = targets.shape, (targets.numel(), 2), targets.shape if with_entropy else (0,)
    log_probs, softmax_M2, entropy = (hidden_MD.new_empty(shape, dtype=sum_dtype(hidden_MD)) for shape in shapes)
    return log_probs, softmax_M2, entropy


def _chunks_of_logits(hidden_MD: Tensor, head_VD: Tensor, chunk_rows: int, temperature: float):
    """Each chunk's rows, and their logits over the temperature in memory that the next chunk uses again."""
    num_rows = hidden_MD.shape[0]
    buffer_CV = hidden_MD.new_empty(min(chunk_rows, num_rows), head_VD.shape[0])
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        logits_CV = buffer_CV[: rows.stop - start]
        # alpha scales before the result is rounded; beta = 0 does not read what was there.
        yield rows, torch.addmm(logits_CV, hidden_MD[rows], head_VD.T, beta=0, alpha=1 / temperature, out=logits_CV)


# --- The rows of a chunk: by the kernels of the cross-entropy, or in plain torch.


def _softmax_rows(logits_CV: Tensor, targets_C: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    if runs_triton("cross_entropy", logits_CV):
        loss_C, softmax_C2 = torch.ops.bessemer.cross_entropy(logits_CV, targets_C, 0.0, soft_cap, 0.0)
        return -loss_C, softmax_C2
    c_CV = _capped(logits_CV, soft_cap)
    is_target_C = targets_C != IGNORE
    shift_C1 = c_CV.amax(dim=-1, keepdim=True)
    total_C1 = (c_CV - shift_C1).exp_().sum(dim=-1, keepdim=True)
    log_probs_C1 = c_CV.gather(1, torch.where(is_target_C, targets_C, 0)[:, None]) - shift_C1 - total_C1.log()
    return torch.where(is_target_C, log_probs_C1[:, 0], 0.0), torch.cat((shift_C1, total_C1), dim=1)


def _entropy(logits_CV: Tensor, softmax_C2: Tensor, soft_cap: float | None) -> Tensor:
    shift_C1, total_C1 = softmax_C2.split(1, dim=1)
    below_CV = _capped(logits_CV, soft_cap) - shift_C1
    return total_C1[:, 0].log() - (below_CV.exp() * below_CV).sum(dim=-1) / total_C1[:, 0]


def _gradient_(
    d_loss_C: Tensor, logits_CV: Tensor, targets_C: Tensor, softmax_C2: Tensor, soft_cap: float | None
) -> None:
    """Overwrites logits with the gradient of the negative log-probabilities, of which d_loss is each row's upstream."""
    if runs_triton("cross_entropy", logits_CV):
        arguments = d_loss_C, logits_CV, targets_C, softmax_C2, 0.0, soft_cap, 0.0
        torch.ops.bessemer.cross_entropy_backward_(*arguments)
        return
    c_CV = _capped(logits_CV, soft_cap)  # the logits' own memory, where they are in the dtype of sums and have no cap
    slope_CV = None if soft_cap is None else 1 - (c_CV / soft_cap).square_()
    shift_C1, total_C1 = softmax_C2.split(1, dim=1)
    gradient_CV = c_CV.sub_(shift_C1).exp_().div_(total_C1)
    target_C1 = torch.where(targets_C != IGNORE, targets_C, 0)[:, None]
    gradient_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1, dtype=gradient_CV.dtype))
    if slope_CV is not None:
        gradient_CV.mul_(slope_CV)
    logits_CV.copy_(gradient_CV.mul_(d_loss_C[:, None]))


def _capped(logits_CV: Tensor, soft_cap: float | None) -> Tensor:
    c_CV = logits_CV.to(sum_dtype(logits_CV))
    return c_CV if soft_cap is None else soft_cap * torch.tanh(c_CV / soft_cap)

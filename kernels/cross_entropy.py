"""Cross-entropy of next-token logits, as sums over targets: the loop divides once, by the global count.

    c    = soft_cap * tanh(logits / soft_cap)                                  (c = logits without a soft cap)
    lse  = log sum_j exp(c_j)
    loss = (1 - e) * (lse - c_t) + e * (lse - mean_j c_j) + z_loss * lse^2     t: the target, e: label_smoothing

    d loss / d logits_j = (exp(c_j - lse) * (1 + 2 z_loss lse) - (1 - e) [j = t] - e / V) * (1 - (c_j / soft_cap)^2)

Loss and gradient of a row whose target is IGNORE are 0.

Source: z-loss: Chowdhery et al., "PaLM", 2022, section 5. Soft cap: Gemma Team, "Gemma 2", 2024, section 2.
Label smoothing: Szegedy et al., "Rethinking the Inception Architecture", 2016, section 7.
Shapes: logits (..., V), targets (...) int64. Any number of rows, any V, more than 2^31 logits.
Dtypes: bf16, fp16, fp32 (fp64 under the interpreter); losses and all sums in fp32 (fp64 for fp64), gradients in the
logits' dtype.
Bytes, elements per row: loss and gradient in one pass read V and write V; apart, the loss reads V and its backward
reads V and writes V. One pass over rows wider than one block reads them twice, the second time from the cache.
"""

from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import num_warps, rows_of, runs_triton, sum_dtype

IGNORE = -100

# The widest row that one program keeps in registers: 32 fp32 numbers in each of 1024 threads of 64 registers. Half of
# that with a soft cap, where logits and exponentials are both needed to the end, and where rows do not start at
# multiples of 16 elements, so that every number has an address of its own.
_ONE_BLOCK = 32_768
_ONE_BLOCK_CROWDED = 16_384
# Columns at a time of wider rows. Such a block fills a multiprocessor with one program, so that few rows are under way
# at once and their second reading finds them in the cache: 132 rows of 128k bf16 logits are 34 MB, an H100's L2 50.
_BLOCK = 16_384
# Columns of one program of the backward, which has no sums to wait for.
_BACKWARD_BLOCK = 4_096


class LossOptions(TypedDict, total=False):
    """What may be added to the negative log-likelihood; without a value, nothing is."""

    z_loss: float
    """Times the square of the logarithm of the softmax's denominator."""
    soft_cap: float | None
    """Bounds the logits smoothly by plus and minus this."""
    label_smoothing: float
    """The share of each target's weight that is spread over the whole vocabulary."""


def cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of each target, 0 where the target is IGNORE.

    The backward may write the gradient over the logits, unless they are a leaf of autograd's graph: it can run once,
    and logits that are wanted after it have to be copied before it. Another operator that saved them gets autograd's
    error, not wrong numbers.

    A target outside the vocabulary is an error in torch. A Triton kernel cannot raise one: loss and gradient of the row
    are NaN.

    Raises:
        ValueError: shapes do not agree, or an option is out of its range.
    """
    _check("cross_entropy_rows", logits, targets, z_loss, soft_cap, label_smoothing)
    if runs_triton("cross_entropy", logits):
        loss_M, _ = torch.ops.bessemer.cross_entropy(
            _rows_apart(logits), targets.reshape(-1), z_loss, soft_cap, label_smoothing
        )
        return loss_M.view(targets.shape)
    if z_loss or soft_cap is not None or label_smoothing:
        return cross_entropy_rows_reference(
            logits, targets, z_loss=z_loss, soft_cap=soft_cap, label_smoothing=label_smoothing
        )
    loss_M: Tensor = _CrossEntropyRows.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))  # pyright: ignore[reportAssignmentType]
    return loss_M.view(targets.shape)


def cross_entropy_sum(logits: Tensor, targets: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    """Sums the losses of targets; positions whose target is IGNORE add nothing.

    Its backward can run once, as that of `cross_entropy_rows`.

    Raises:
        ValueError: shapes do not agree, or an option is out of its range.
    """
    return cross_entropy_rows(logits, targets, **options).sum()


def cross_entropy_gradient_(
    logits_MV: Tensor,
    targets_M: Tensor,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Overwrites logits with the gradient of the sum of their losses, in one pass, and returns the loss of each row.

    Outside autograd: for operators that compute gradients in their forward.

    Raises:
        ValueError: shapes do not agree, an option is out of its range, or logits is not a matrix of contiguous rows.
    """
    _check("cross_entropy_gradient_", logits_MV, targets_M, z_loss, soft_cap, label_smoothing)
    if logits_MV.ndim != 2 or not _are_rows_apart(logits_MV):
        raise ValueError(
            f"cross_entropy_gradient_: logits of shape {tuple(logits_MV.shape)} and strides {logits_MV.stride()}; "
            "expected a matrix of contiguous rows that do not overlap, to write over"
        )
    if runs_triton("cross_entropy", logits_MV):
        return torch.ops.bessemer.cross_entropy_gradient_(logits_MV, targets_M, z_loss, soft_cap, label_smoothing)
    return _gradient_by_torch_(logits_MV, targets_M, z_loss, soft_cap, label_smoothing)


def cross_entropy_rows_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The same function in plain torch: the specification."""
    c_MV = logits.reshape(-1, logits.shape[-1]).to(sum_dtype(logits))
    targets_M = targets.reshape(-1)
    if soft_cap is not None:
        c_MV = soft_cap * torch.tanh(c_MV / soft_cap)
    loss_M = F.cross_entropy(c_MV, targets_M, ignore_index=IGNORE, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        loss_M = loss_M + z_loss * torch.where(targets_M != IGNORE, c_MV.logsumexp(dim=-1).square(), 0.0)
    return loss_M.view(targets.shape)


def cross_entropy_sum_reference(logits: Tensor, targets: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    """The same function in plain torch: the specification."""
    return cross_entropy_rows_reference(logits, targets, **options).sum()


def cross_entropy_gradient_reference(
    logits_MV: Tensor, targets_M: Tensor, **options: Unpack[LossOptions]
) -> tuple[Tensor, Tensor]:
    """(losses, gradient) by autograd in plain torch: the specification of cross_entropy_gradient_."""
    with torch.enable_grad():
        logits_MV = logits_MV.detach().requires_grad_()
        loss_M = cross_entropy_rows_reference(logits_MV, targets_M, **options)
        (gradient_MV,) = torch.autograd.grad(loss_M.sum(), logits_MV)
    return loss_M.detach(), gradient_MV


def _check(
    name: str, logits: Tensor, targets: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float
) -> None:
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"{name}: targets {tuple(targets.shape)} for logits {tuple(logits.shape)}")
    check_options(name, z_loss, soft_cap, label_smoothing)


def check_options(name: str, z_loss: float, soft_cap: float | None, label_smoothing: float) -> None:
    """Refuses options out of their range, in the name of the operator that they were given to.

    Raises:
        ValueError: z_loss is negative, soft_cap not positive, or label_smoothing outside [0, 1].
    """
    if z_loss < 0 or (soft_cap is not None and soft_cap <= 0) or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"{name}: z_loss = {z_loss}, soft_cap = {soft_cap}, label_smoothing = {label_smoothing}; expected "
            "z_loss >= 0, soft_cap > 0 or None, and label_smoothing between 0 and 1"
        )


def _are_rows_apart(logits_MV: Tensor) -> bool:
    """Whether every row is contiguous and no element belongs to two rows."""
    num_rows, width = logits_MV.shape
    return (width <= 1 or logits_MV.stride(1) == 1) and (num_rows <= 1 or logits_MV.stride(0) >= width)


def _rows_apart(logits: Tensor) -> Tensor:
    """View logits (..., V) as rows that can be written over, copying only where no such view exists."""
    logits_MV = rows_of(logits)
    return logits_MV if _are_rows_apart(logits_MV) else logits_MV.contiguous()


# --- Plain torch where there is no Triton, with fewer tensors of M * V than the reference keeps.


class _CrossEntropyRows(torch.autograd.Function):
    """The loss without options, its backward written over the log-probabilities that the forward kept.

    Of the largest tensors of a step, (M, V), one exists in fp32 instead of three.
    """

    @staticmethod
    def forward(ctx, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        log_p_MV = torch.log_softmax(logits_MV, dim=-1, dtype=sum_dtype(logits_MV))
        is_target_M = targets_M != IGNORE
        index_M1 = torch.where(is_target_M, targets_M, 0)[:, None]
        ctx.save_for_backward(log_p_MV, index_M1, is_target_M)
        ctx.logits_dtype = logits_MV.dtype
        return torch.where(is_target_M, -log_p_MV.gather(1, index_M1)[:, 0], 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        log_p_MV, index_M1, is_target_M = ctx.saved_tensors
        gradient_MV = log_p_MV.exp_()
        gradient_MV.scatter_add_(1, index_M1, torch.full_like(index_M1, -1, dtype=gradient_MV.dtype))
        gradient_MV.mul_((is_target_M * grads[0])[:, None])
        return gradient_MV.to(ctx.logits_dtype), None


def _gradient_by_torch_(
    logits_MV: Tensor, targets_M: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float
) -> Tensor:
    dtype, width = sum_dtype(logits_MV), logits_MV.shape[1]
    c_MV = logits_MV if soft_cap is None else soft_cap * torch.tanh(logits_MV.to(dtype) / soft_cap)
    log_p_MV = torch.log_softmax(c_MV, dim=-1, dtype=dtype)
    is_ignored_M = targets_M == IGNORE
    index_M1 = torch.where(is_ignored_M, 0, targets_M)[:, None]
    loss_M = -log_p_MV.gather(1, index_M1)[:, 0]
    if label_smoothing:
        loss_M = (1 - label_smoothing) * loss_M - label_smoothing * log_p_MV.mean(dim=-1)
    lse_M = (c_MV.amax(dim=-1) - log_p_MV.amax(dim=-1)) if z_loss else torch.zeros_like(loss_M)
    loss_M = torch.where(is_ignored_M, 0.0, loss_M + z_loss * lse_M.square())

    # From here on c_MV is needed only where it is not logits_MV itself.
    gradient_MV = torch.exp(log_p_MV, out=logits_MV if logits_MV.dtype == dtype else log_p_MV)
    if z_loss:
        gradient_MV.mul_((1 + 2 * z_loss * lse_M)[:, None])
    if label_smoothing:
        gradient_MV.sub_(label_smoothing / width)
    gradient_MV.scatter_add_(1, index_M1, torch.full_like(index_M1, label_smoothing - 1, dtype=dtype))
    if soft_cap is not None:
        gradient_MV.mul_(1 - (c_MV / soft_cap).square())
    gradient_MV.masked_fill_(is_ignored_M[:, None], 0.0)
    if gradient_MV is not logits_MV:
        logits_MV.copy_(gradient_MV)
    return loss_M


# --- Autograd registration. An opaque custom op keeps torch.compile's graph whole and its choice of kernel ours.


@torch.library.custom_op("bessemer::cross_entropy", mutates_args=())
def _forward_op(
    logits_MV: Tensor, targets_M: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """(losses, softmax): of each row the largest logit, and the sum of exponentials of how far all are below it.

    Both, because their one logarithm, lse, would be rounded by its own size where a probability needs a difference.
    """
    softmax_M2 = torch.empty((logits_MV.shape[0], 2), dtype=sum_dtype(logits_MV), device=logits_MV.device)
    loss_M = _launch_rows(rows_of(logits_MV), targets_M, softmax_M2, z_loss, soft_cap, label_smoothing)
    return loss_M, softmax_M2


@_forward_op.register_fake
def _(logits_MV: Tensor, targets_M: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float):
    softmax_M2 = torch.empty((logits_MV.shape[0], 2), dtype=sum_dtype(logits_MV), device=logits_MV.device)
    return torch.empty_like(softmax_M2[:, 0]), softmax_M2


@torch.library.custom_op("bessemer::cross_entropy_gradient_", mutates_args=("logits_MV",))
def _gradient_op(
    logits_MV: Tensor, targets_M: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float
) -> Tensor:
    return _launch_rows(logits_MV, targets_M, None, z_loss, soft_cap, label_smoothing)


@_gradient_op.register_fake
def _(logits_MV: Tensor, targets_M: Tensor, z_loss: float, soft_cap: float | None, label_smoothing: float):
    return torch.empty(logits_MV.shape[0], dtype=sum_dtype(logits_MV), device=logits_MV.device)


@torch.library.custom_op("bessemer::cross_entropy_backward", mutates_args=())
def _backward_op(
    dloss_M: Tensor, logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> Tensor:  # fmt: skip
    gradient_MV = torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)
    logits_MV = rows_of(logits_MV)
    _launch_backward(dloss_M, logits_MV, targets_M, softmax_M2, gradient_MV, z_loss, soft_cap, label_smoothing)
    return gradient_MV


@_backward_op.register_fake
def _(
    dloss_M: Tensor, logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> Tensor:  # fmt: skip
    return torch.empty(logits_MV.shape, dtype=logits_MV.dtype, device=logits_MV.device)


@torch.library.custom_op("bessemer::cross_entropy_backward_", mutates_args=("logits_MV",))
def _backward_op_(
    dloss_M: Tensor, logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> None:  # fmt: skip
    _launch_backward(dloss_M, logits_MV, targets_M, softmax_M2, logits_MV, z_loss, soft_cap, label_smoothing)


@_backward_op_.register_fake
def _(
    dloss_M: Tensor, logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> None:  # fmt: skip
    return None


def _save_for_backward(ctx, inputs, output) -> None:
    logits_MV, targets_M, *ctx.options = inputs
    _, softmax_M2 = output
    ctx.mark_non_differentiable(softmax_M2)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits_MV, targets_M, softmax_M2)
    # A leaf is somebody's parameter, or an input under test, and outlives its gradient. A compiler's stand-in for a
    # tensor, in place, would become a copy and then the same kernel.
    owner = logits_MV if logits_MV._base is None else logits_MV._base
    ctx.writes_over_logits = type(logits_MV) is Tensor and not owner.is_leaf


def _backward(ctx, dloss_M: Tensor | None, _dsoftmax: Tensor | None):
    if dloss_M is None:
        return None, None, None, None, None
    logits_MV, targets_M, softmax_M2 = ctx.saved_tensors
    arguments = (dloss_M, logits_MV, targets_M, softmax_M2, *ctx.options)
    if ctx.writes_over_logits:
        torch.ops.bessemer.cross_entropy_backward_(*arguments)
        gradient_MV = logits_MV
    else:
        gradient_MV = torch.ops.bessemer.cross_entropy_backward(*arguments)
    return gradient_MV, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def _launch_rows(
    logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor | None,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> Tensor:  # fmt: skip
    """Returns losses; writes what the backward needs where that is wanted, else the gradient over the logits."""
    num_rows, width = logits_MV.shape
    loss_M = torch.empty(num_rows, dtype=sum_dtype(logits_MV), device=logits_MV.device)
    block_width = 1 << (width - 1).bit_length()  # tl.arange wants a power of two
    is_crowded = soft_cap is not None or logits_MV.stride(0) % 16 != 0
    if block_width > (_ONE_BLOCK_CROWDED if is_crowded else _ONE_BLOCK):
        block_width = _BLOCK
    if num_rows:
        _rows_kernel[(num_rows,)](
            logits_MV, logits_MV.stride(0), targets_M.contiguous(), loss_M,
            loss_M if softmax_M2 is None else softmax_M2,
            width=width, ignore=IGNORE, z_loss=z_loss, soft_cap=soft_cap or 0.0, label_smoothing=label_smoothing,
            WRITES_GRADIENT=softmax_M2 is None, IN_FP64=logits_MV.dtype == torch.float64,
            BLOCKS=-(-width // block_width), BLOCK=block_width, num_warps=num_warps(block_width),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return loss_M


def _launch_backward(
    dloss_M: Tensor, logits_MV: Tensor, targets_M: Tensor, softmax_M2: Tensor, gradient_MV: Tensor,
    z_loss: float, soft_cap: float | None, label_smoothing: float,
) -> None:  # fmt: skip
    num_rows, width = logits_MV.shape
    block_width = min(_BACKWARD_BLOCK, 1 << (width - 1).bit_length())
    num_blocks = -(-width // block_width)
    if num_rows:
        _backward_kernel[(num_rows * num_blocks,)](
            dloss_M, dloss_M.stride(0), logits_MV, logits_MV.stride(0), targets_M.contiguous(), softmax_M2,
            gradient_MV, gradient_MV.stride(0),
            width=width, ignore=IGNORE, z_loss=z_loss, soft_cap=soft_cap or 0.0, label_smoothing=label_smoothing,
            IN_FP64=logits_MV.dtype == torch.float64,
            BLOCKS=num_blocks, BLOCK=block_width, num_warps=num_warps(block_width),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip


# --- Kernels. The options are constexpr: a Python float argument would become fp64 under Inductor.


@triton.jit
def _tanh(y, IN_FP64: tl.constexpr):
    e = tl.exp(-2.0 * tl.abs(y))
    magnitude = (1.0 - e) / (1.0 + e)
    tanh = tl.where(y < 0, -magnitude, magnitude)
    if not IN_FP64:
        # Near zero 1 - e cancels; the series is exact to fp32 there.
        near = tl.minimum(tl.abs(y), 0.25)
        y2 = near * near
        series = 62.0 / 2835.0 - y2 * (1382.0 / 155925.0)
        series = 1.0 + y2 * (-1.0 / 3.0 + y2 * (2.0 / 15.0 + y2 * (-17.0 / 315.0 + y2 * series)))
        tanh = tl.where(near < 0.25, y * series, tanh)
    return tanh


@triton.jit
def _capped(logits, soft_cap: tl.constexpr, IN_FP64: tl.constexpr):
    """The logits in the dtype of sums, capped if there is a cap."""
    c = logits.to(tl.float64 if IN_FP64 else tl.float32)
    if soft_cap > 0:
        c = soft_cap * _tanh(c / soft_cap, IN_FP64)
    return c


@triton.jit
def _gradient(p, c, is_target, is_ignored, width: tl.constexpr, soft_cap: tl.constexpr, label_smoothing: tl.constexpr):
    """The gradient of one row's loss; p: its probabilities, already times what the z-loss adds."""
    gradient = tl.where(is_target, p - (1.0 - label_smoothing), p)
    if label_smoothing > 0:
        gradient -= label_smoothing / width
    if soft_cap > 0:
        tanh = c / soft_cap
        gradient *= 1.0 - tanh * tanh
    return tl.where(is_ignored, 0.0, gradient)


@triton.jit
def _rows_kernel(
    logits_ptr, logits_stride, targets_ptr, loss_ptr, softmax_ptr,
    width: tl.constexpr, ignore: tl.constexpr, z_loss: tl.constexpr, soft_cap: tl.constexpr,
    label_smoothing: tl.constexpr, WRITES_GRADIENT: tl.constexpr, IN_FP64: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    SUM: tl.constexpr = tl.float64 if IN_FP64 else tl.float32  # pyright: ignore[reportAssignmentType]
    # int64 before any stride: row * stride passes 2**31 at 67k rows of 32k logits.
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    column = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row).to(tl.int64)
    is_ignored = target == ignore
    is_inside = (target >= 0) & (target < width)
    target_logit = _capped(tl.load(row_ptr + target, mask=is_inside, other=0.0), soft_cap, IN_FP64)

    if BLOCKS == 1:
        mask = column < width
        logits = tl.load(row_ptr + column, mask=mask, other=float("-inf"))
        c = tl.where(mask, _capped(logits, soft_cap, IN_FP64), float("-inf"))
        shift = tl.max(c, axis=0)
        e = tl.exp(c - shift)
        total = tl.sum(e, axis=0)
        logit_sum = tl.sum(tl.where(mask, c, 0.0), axis=0) if label_smoothing > 0 else 0.0
    else:
        largest = tl.full([], float("-inf"), SUM)
        shift = tl.full([], 0.0, SUM)
        logit_sum = tl.full([], 0.0, SUM)
        totals = tl.zeros([BLOCK], dtype=SUM)
        logits = tl.load(row_ptr + column, mask=column < width, other=float("-inf"))
        for i in range(BLOCKS):
            mask = i * BLOCK + column < width
            c = tl.where(mask, _capped(logits, soft_cap, IN_FP64), float("-inf"))
            # The next block is on its way while this one is summed; past the last one nothing is read.
            following = (i + 1) * BLOCK + column
            logits = tl.load(row_ptr + following, mask=following < width, other=float("-inf"))
            before = largest
            largest = tl.maximum(largest, tl.max(c, axis=0))
            # By 0 while there are only -inf, because -inf less -inf is NaN.
            shift = tl.where(largest == float("-inf"), 0.0, largest)
            totals = totals * tl.exp(before - shift) + tl.exp(c - shift)
            if label_smoothing > 0:
                logit_sum += tl.sum(tl.where(mask, c, 0.0), axis=0)
        total = tl.sum(totals, axis=0)

    # A target that is no token: NaN in everything that follows.
    total = tl.where(is_inside | is_ignored, total, float("nan"))
    log_total = tl.log(total)
    lse = shift + log_total
    loss = (1.0 - label_smoothing) * (shift - target_logit + log_total)
    if label_smoothing > 0:
        loss += label_smoothing * (shift - logit_sum / width + log_total)
    loss += z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(is_ignored, 0.0, loss))
    if not WRITES_GRADIENT:
        tl.store(softmax_ptr + 2 * row, shift)
        tl.store(softmax_ptr + 2 * row + 1, total)
    else:
        # Every thread has read the target's logit before one writes over it.
        tl.debug_barrier()
        scale = (1.0 + 2.0 * z_loss * lse) / total
        if BLOCKS == 1:
            c = tl.where(mask, c, 0.0)
            gradient = _gradient(e * scale, c, column == target, is_ignored, width, soft_cap, label_smoothing)
            tl.store(row_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
        else:
            # Backwards, so that what was read last, and is surely in the cache, is read first.
            for i in range(BLOCKS):
                block = (BLOCKS - 1 - i) * BLOCK + column
                mask = block < width
                c = _capped(tl.load(row_ptr + block, mask=mask, other=0.0), soft_cap, IN_FP64)
                p = tl.exp(c - shift) * scale
                gradient = _gradient(p, c, block == target, is_ignored, width, soft_cap, label_smoothing)
                tl.store(row_ptr + block, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dloss_ptr, dloss_stride, logits_ptr, logits_stride, targets_ptr, softmax_ptr, gradient_ptr, gradient_stride,
    width: tl.constexpr, ignore: tl.constexpr, z_loss: tl.constexpr, soft_cap: tl.constexpr,
    label_smoothing: tl.constexpr, IN_FP64: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    target = tl.load(targets_ptr + row).to(tl.int64)
    shift = tl.load(softmax_ptr + 2 * row)
    total = tl.load(softmax_ptr + 2 * row + 1)
    dloss = tl.load(dloss_ptr + row * dloss_stride)
    c = _capped(tl.load(logits_ptr + row * logits_stride + column, mask=mask, other=0.0), soft_cap, IN_FP64)
    p = tl.exp(c - shift) * ((1.0 + 2.0 * z_loss * (shift + tl.log(total))) / total)
    gradient = dloss * _gradient(p, c, column == target, target == ignore, width, soft_cap, label_smoothing)
    tl.store(gradient_ptr + row * gradient_stride + column, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)

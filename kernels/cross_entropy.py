"""Cross-entropy of next-token logits, as one sum over targets: the loop divides once, by the global count.

    loss_sum  = sum over rows with target != IGNORE of  logsumexp(logits) - logits[target]
    d logits  = softmax(logits) - onehot(target),  0 in ignored rows

The backward is written over the log-probabilities that the forward kept, so that of the largest tensors of a step,
(M, V), one exists in fp32 instead of three.

Shapes: logits (..., V), targets (...) int64.
Dtypes: computed in fp32 (fp64 for fp64 logits), also when the logits are bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums the negative log-likelihoods of targets; positions whose target is IGNORE add nothing.

    Its backward can run once: a second one through a retained graph is an error of autograd's.

    Raises:
        ValueError: shapes do not agree.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy_sum: targets {tuple(targets.shape)} for logits {tuple(logits.shape)}")
    return _CrossEntropySum.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))  # pyright: ignore[reportReturnType]


def cross_entropy_sum_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The same function in plain torch: the specification."""
    logits_MV = logits.reshape(-1, logits.shape[-1]).to(_sum_dtype(logits))
    return F.cross_entropy(logits_MV, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        log_p_MV = torch.log_softmax(logits_MV, dim=-1, dtype=_sum_dtype(logits_MV))
        is_target_M = targets_M != IGNORE
        index_M1 = torch.where(is_target_M, targets_M, 0)[:, None]
        ctx.save_for_backward(log_p_MV, index_M1, is_target_M)
        ctx.logits_dtype = logits_MV.dtype
        return -torch.where(is_target_M, log_p_MV.gather(1, index_M1)[:, 0], 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        log_p_MV, index_M1, is_target_M = ctx.saved_tensors
        gradient_MV = log_p_MV.exp_()
        gradient_MV.scatter_add_(1, index_M1, torch.full_like(index_M1, -1, dtype=gradient_MV.dtype))
        gradient_MV.mul_((is_target_M * grads[0])[:, None])
        return gradient_MV.to(ctx.logits_dtype), None

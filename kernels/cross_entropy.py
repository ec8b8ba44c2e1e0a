"""Cross-entropy of next-token logits, as one sum over targets: the loop divides once, by the global count.

    loss_sum = sum over rows with target != IGNORE of  logsumexp(logits) - logits[target]

Shapes: logits (..., V), targets (...) int64.
Dtypes: computed in fp32 (fp64 for fp64 logits), also when the logits are bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums the negative log-likelihoods of targets; positions whose target is IGNORE add nothing.

    Raises:
        ValueError: shapes do not agree.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"cross_entropy_sum: targets {tuple(targets.shape)} for logits {tuple(logits.shape)}")
    return cross_entropy_sum_reference(logits, targets)


def cross_entropy_sum_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The same function in plain torch: the specification."""
    logits_MV = logits.reshape(-1, logits.shape[-1])
    if logits_MV.dtype in (torch.bfloat16, torch.float16):
        logits_MV = logits_MV.float()
    return F.cross_entropy(logits_MV, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")

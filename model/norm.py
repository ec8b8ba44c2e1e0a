"""The learned weight around `kernels.rms_norm`."""

import torch
from torch import Tensor, nn

from kernels.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with one learned scale per channel: the weight itself, or
    1 + weight with an offset."""

    def __init__(self, size: int, eps: float, offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if offset else torch.ones(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (..., size)."""
        return rms_norm(x, self._scale(), self.eps)

    def add(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the norm of x + residual, and x + residual itself, in one pass; without x, of the residual."""
        if x is None:
            return self(residual), residual
        return add_rms_norm(x, residual, self._scale(), self.eps)

    def _scale(self) -> Tensor:
        return 1 + self.weight if self.offset else self.weight

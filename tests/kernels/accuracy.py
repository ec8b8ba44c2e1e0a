"""How kernels are judged: against fp64, with the error of eager torch in the same dtype as the measure."""

import os

import pytest
import torch
from torch import Tensor

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled, CPU tensors need them interpreted"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
"""Where the same test body runs: interpreted on the CPU, compiled on CUDA."""


def assert_as_accurate(found: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0, terms: float = 0.0) -> None:
    """The largest error of `found` is at most `factor` times eager's, plus one unit in the last place of the scale.

    The unit is for eager results that happen to be exact, and because the interpreter truncates when it stores bf16.
    The scale is that of the truth, or of the terms that nearly cancel in it, where that is larger.
    """
    assert found.dtype == eager.dtype
    assert found.shape == truth.shape
    if not truth.numel():
        return
    scale = max(truth.abs().max().item(), terms)
    budget = factor * (eager.double() - truth).abs().max().item() + torch.finfo(found.dtype).eps * scale
    error = (found.double() - truth).abs().max().item()
    assert error <= budget, f"error {error:.3g}, budget {budget:.3g} at scale {scale:.3g}"


def gradients(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Gradients of the inputs for one random direction of all outputs together, the same in every dtype."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # unlike any input's
    directions = [
        torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype) for output in outputs
    ]
    return torch.autograd.grad(outputs, inputs, directions)

"""Which implementation runs, and how large its grid is: the questions every kernel's door asks."""

import os

import torch
from torch import Tensor

# Read once: triton itself decides at decoration time whether its kernels are compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Programs of a persistent kernel when there is no GPU to ask: enough to exercise the loop over rows, few enough to be
# quick under the interpreter.
_INTERPRETED_PROGRAMS = 3


def runs_triton(x: Tensor) -> bool:
    """Whether a door hands x to its Triton kernel; elsewhere it runs the reference, which is what makes CPU fast."""
    return x.is_cuda or INTERPRETED


def num_persistent_programs(x: Tensor, num_tiles: int) -> int:
    """Grid size of a kernel whose programs loop over tiles: two per SM, never more than there are tiles."""
    if not x.is_cuda:
        return max(1, min(_INTERPRETED_PROGRAMS, num_tiles))
    return max(1, min(2 * torch.cuda.get_device_properties(x.device).multi_processor_count, num_tiles))


def rows_of(x: Tensor) -> Tensor:
    """View x (..., N) as (M, N) with unit stride along N, copying only where no such view exists."""
    x_MN = x.reshape(-1, x.shape[-1])
    return x_MN if x_MN.stride(-1) == 1 else x_MN.contiguous()

"""Which implementation runs, and how large its grid is: the questions every kernel's door asks."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

# Read once: triton itself decides at decoration time whether its kernels are compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Programs of a persistent kernel when there is no GPU to ask: enough to exercise the loop over rows, few enough to be
# quick under the interpreter.
_INTERPRETED_PROGRAMS = 3

# What a run has chosen by its config's section `kernels`; an operator that is not here chooses by itself.
_chosen: dict[str, str] = {}


class KernelError(ValueError):
    """An implementation was asked for that cannot run here; the message names the key and the remedy."""


def choose(choices: Mapping[str, str]) -> None:
    """Sets for this process which implementation each named operator runs: "auto", or a name of its own.

    Replaces what was chosen before. Compiled code is compiled anew for what it had not seen.
    """
    _chosen.clear()
    _chosen.update(choices)


def chosen(op: str) -> str:
    """What was chosen for an operator; "auto" if nothing was."""
    return _chosen.get(op, "auto")


def runs_triton(op: str, x: Tensor) -> bool:
    """Whether a door hands x to its Triton kernel; elsewhere it runs the reference, which is what makes CPU fast.

    Raises:
        KernelError: Triton was chosen for this operator, and can run x neither compiled nor interpreted.
    """
    can_run = x.is_cuda or INTERPRETED
    choice = chosen(op)
    if choice == "triton" and not can_run:
        raise KernelError(
            f'kernels.{op} = "triton", but the tensors are on the {x.device.type}: use a CUDA device, set '
            "TRITON_INTERPRET=1 in the environment (slow, for tests), or leave the key out"
        )
    return can_run and choice != "torch"


def num_persistent_programs(x: Tensor, num_tiles: int) -> int:
    """Grid size of a kernel whose programs loop over tiles: two per SM, never more than there are tiles."""
    if not x.is_cuda:
        return max(1, min(_INTERPRETED_PROGRAMS, num_tiles))
    return max(1, min(2 * torch.cuda.get_device_properties(x.device).multi_processor_count, num_tiles))


def rows_of(x: Tensor) -> Tensor:
    """View x (..., N) as (M, N) with unit stride along N, copying only where no such view exists."""
    x_MN = x.reshape(-1, x.shape[-1])
    return x_MN if x_MN.stride(-1) == 1 else x_MN.contiguous()


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a kernel sums over x: fp32, or fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def num_warps(tile_elements: int) -> int:
    """Warps of a program that holds so many elements: 16 a thread, between 4 and 32 warps."""
    return max(4, min(32, tile_elements // 512))

"""The processes of a run and what they say to each other. One process is a run of one rank, by the same code."""

import ctypes
import dataclasses
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data_prep.config_file import ConfigError

Value = TypeVar("Value")


class ElsewhereError(Exception):
    """The cause of an error that this rank raises because another one met it."""

    def __init__(self, rank: int):
        super().__init__(f"met by rank {rank}, raised by all")


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, logs and writes what is written once."""
        return self.rank == 0

    def sum_ints(self, *values: int) -> list[int]:
        """The sums over all ranks; a CPU collective, so that no GPU work is waited for."""
        totals = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(totals)
        return totals.tolist()

    def agree_on(self, value: int) -> bool:
        """Whether all ranks have the same 63-bit value."""
        extremes = torch.tensor([value, -value], dtype=torch.int64)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def sum_arrays(self, arrays: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """Element-wise sums over all ranks, of CPU arrays of equal shapes on every rank; they wrap, as int64 does."""
        totals = [torch.from_numpy(array.copy()) for array in arrays]
        for total in totals:
            dist.all_reduce(total)
        return [total.numpy() for total in totals]

    def gather(self, value: Value) -> list[Value]:
        """What every rank has, by rank; for small things, now and then."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], Value]) -> Value:
        """Does something on every rank that may fail on some; if it does, all raise the error of the first of them."""
        error: Exception | None = None
        result: Value | None = None
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
        self.raise_first(error)
        return cast(Value, result)

    def raise_first(self, error: Exception | None) -> None:
        """Raises on every rank the error of the first that has one."""
        for rank, failure in enumerate(self.gather(error)):
            if failure is not None:
                raise failure from (None if rank == self.rank else ElsewhereError(rank))

    def from_first(self, action: Callable[[], Value]) -> Value:
        """What an action returns on the first rank, the only one to do it."""
        return self.gather(self.together(lambda: action() if self.is_first else None))[0]  # pyright: ignore[reportReturnType]

    def sum_all(self, values: Sequence[torch.Tensor | float]) -> list[float]:
        """The sums over all ranks of scalars, and of tensors' elements, in fp64 (exact for counts up to 2**53), by one
        collective and one wait for the device."""
        parts = [torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(-1) for value in values]
        total = torch.cat(parts)
        dist.all_reduce(total)
        return total.tolist()


def device_name(device: torch.device) -> str:
    """The vendor's exact name of a device, as the table of peaks spells it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: a GPU is demanded and there is none, or not one for every process of the node.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "parallel.device = 'cuda', but torch finds no CUDA device; install a CUDA build of torch and check "
            "nvidia-smi, or set --parallel.device cpu"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} visible; lower "
            "--nproc_per_node or raise CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", local_rank)


def start(wanted_device: str) -> Ranks:
    """Joins the process group that torchrun described in the environment, or makes one of a single rank.

    CPU tensors travel by gloo and CUDA tensors by NCCL, so counts and error flags never wait for the GPU.

    Raises:
        ConfigError: see `choose_device`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        _stop_with_the_launcher()
    device = choose_device(wanted_device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Where cuBLAS splits a sum over rows between programs, their parts are added in fp32, not rounded to bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if "WORLD_SIZE" in os.environ and "RANK" not in os.environ:
        raise ConfigError(
            "WORLD_SIZE is set but RANK is not; start several processes with torchrun, and set WORLD_SIZE by hand for "
            "--dry-run only"
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    local = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, *local)


def _stop_with_the_launcher() -> None:
    """Has the kernel send SIGTERM when torchrun dies: orphans would train on, unseen, beside the run's next life."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() == 1:  # it died before the kernel knew of the wish
        sys.exit("error: the launcher is gone")


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error, or its cause, looks like that of a collective whose peer is gone; torch has many for it."""
    is_from_torch = re.search("gloo|NCCL|closed by peer|ProcessGroup", str(error)) is not None
    is_one = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and is_from_torch)
    return is_one or (error.__cause__ is not None and is_lost_connection(error.__cause__))


def stop() -> None:
    """Leaves the process group."""
    dist.destroy_process_group()

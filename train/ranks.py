"""The processes of a run and what they say to each other. One process is a run of one rank, by the same code."""

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from data_prep.config_file import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, logs and writes what is written once."""
        return self.rank == 0

    def sum_int(self, value: int) -> int:
        """The sum over all ranks; a CPU collective, so that no GPU work is waited for."""
        total = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(total)
        return int(total)

    def agree_on(self, value: int) -> bool:
        """Whether all ranks have the same 63-bit value."""
        extremes = torch.tensor([value, -value], dtype=torch.int64)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def sum_all(self, values: Sequence[torch.Tensor | float]) -> list[float]:
        """The sums over all ranks of several scalars, in fp64, by one collective and one wait for the device."""
        parts = [torch.as_tensor(value, dtype=torch.float64, device=self.device).reshape(()) for value in values]
        total = torch.stack(parts)
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
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _stop_with_the_launcher() -> None:
    """Has the kernel send SIGTERM when torchrun dies: orphans would train on, unseen, beside the run's next life."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def stop() -> None:
    """Leaves the process group."""
    dist.destroy_process_group()

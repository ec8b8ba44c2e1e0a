"""Runs a function on several ranks as real processes that talk over gloo."""

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(function: Callable[[int], Any], world_size: int, folder: Path, timeout_s: float = 120) -> list[Any]:
    """Forks world_size ranks with torchrun's environment, runs function(rank) in each, returns what they returned.

    Forking takes 0.2 s where spawning imports torch anew; the child must set its threads first or it may hang.
    """
    port = free_port()
    children: dict[int, int] = {}
    for rank in range(world_size):
        sys.stdout.flush()
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            _child(function, rank, world_size, port, folder)
        children[pid] = rank
    failed = _wait(children, time.monotonic() + timeout_s)
    errors = [
        (folder / f"rank-{rank}.error").read_text() for rank in failed if (folder / f"rank-{rank}.error").exists()
    ]
    if failed:
        raise AssertionError(f"ranks {failed} failed or hung:\n" + "\n".join(errors))
    return [torch.load(folder / f"rank-{rank}.result", weights_only=True) for rank in range(world_size)]


def _child(function: Callable[[int], Any], rank: int, world_size: int, port: int, folder: Path) -> None:
    code = 1
    gc.freeze()  # what the parent left behind is not for the child to collect: a group's end waits for its threads
    try:
        torch.set_num_threads(1)
        os.environ.update(rank_environment(rank, world_size, port))
        torch.save(function(rank), folder / f"rank-{rank}.result")
        code = 0
    except BaseException:
        (folder / f"rank-{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _wait(children: dict[int, int], deadline: float) -> list[int]:
    """Ranks that exited non-zero, or were killed because they, or a peer of a failed rank, did not end in time."""
    failed = []
    while children and time.monotonic() < deadline:
        for pid, rank in list(children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del children[pid]
                if status:
                    failed.append(rank)
                    deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.01)
    for pid, rank in children.items():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        failed.append(rank)
    return sorted(failed)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

"""The clock of a CUDA device: calls captured in a graph and replayed, measured by events on the device.

Everything runs on one stream of its own, also forwards whose backward is captured later: autograd launches a backward
on the stream of its forward, and a capture fails if that is another one.
"""

import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch

from benchmarks.timing import Call, Ceiling, DeviceLostError, Timed

_DEVICE = "cuda"
# A replay lasts about so long: events and the launch of the graph weigh nothing beside it.
_REPLAY_S = 4e-3
_MAX_CALLS = 400
_LAUNCHED_CALLS = 20
_LAUNCHED_REPEATS = 3
# Cycles for which the device is kept busy while Python queues what is timed; 0.5 ms.
_HEAD_START_CYCLES = 1_000_000

_MIB = 1 << 20
_COPY_MIB = (64, 128, 256, 512, 1_024, 2_048, 4_096)
_COPY_ROUNDS = 9
_MATMUL_SETS = 3


class CudaClock:
    """Times calls on the current device."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._stream = torch.cuda.Stream()
        self._pool: _Pool | None = None
        self.cache_bytes: int = torch.cuda.get_device_properties(self._device).L2_cache_size

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Everything that is measured happens inside, on this clock's stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        with suppress(RuntimeError):  # a device that is lost has been reported
            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Memory of the device that torch does not use, what torch holds in reserve included."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
        """Calls in a CUDA graph, several times in turn; without `restore` as often as fills _REPLAY_S."""
        for call in (calls[0], *calls):  # compiles, loads modules, allocates workspaces: none of it works in a capture
            call()
        sweeps = 1 if restore else _sweeps(calls, _REPLAY_S, _MAX_CALLS)
        if not _waits_for_the_device(calls[0]):
            graph = self._captured(calls, sweeps)
            if graph is not None:
                return _Timed("graph", graph.replay, sweeps * len(calls), restore, keep=calls)
        return _Timed("events", lambda: _in_turn(calls, sweeps), sweeps * len(calls), restore)

    def seconds_with_launches(self, calls: Sequence[Call], restore: Call | None) -> float:
        """Mean duration of calls from Python, one after the other: the launches of short ones take longer than they."""
        sweeps = 1 if restore else _sweeps(calls, _REPLAY_S, _LAUNCHED_CALLS)
        timed = _Timed("events", lambda: _in_turn(calls, sweeps), sweeps * len(calls), restore, head_start=False)
        return statistics.median(timed.seconds() for _ in range(_LAUNCHED_REPEATS))

    def peak_bytes(self, call: Call) -> int | None:
        """By the allocator's own count."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before

    def num_launches(self, call: Call) -> int | None:
        """Nodes of a graph of one call, counted by the driver."""
        if _waits_for_the_device(call):
            return None
        try:
            graph = torch.cuda.CUDAGraph(keep_graph=True)
        except TypeError:  # an older torch
            return None
        if not self._capture_into(graph, [call], 1):
            return None
        count = ctypes.c_size_t(0)
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
        except (OSError, AttributeError, RuntimeError):
            return None
        return count.value if status == 0 else None

    def release(self) -> None:
        """Collects cycles, such as exceptions hold, and empties torch's reserve and the pool of the graphs."""
        self._pool = None
        gc.collect()
        torch.cuda.empty_cache()

    def check(self) -> None:
        """Waits for everything that was launched.

        Raises:
            DeviceLostError: an earlier kernel has failed; CUDA then refuses everything in this process.
        """
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(str(error).splitlines()[0]) from error

    def _captured(self, calls: Sequence[Call], sweeps: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        return graph if self._capture_into(graph, calls, sweeps) else None

    def _capture_into(self, graph: torch.cuda.CUDAGraph, calls: Sequence[Call], sweeps: int) -> bool:
        """Whether the calls could be captured.

        All graphs share one pool of memory: no result outlives its capture, and graphs run one at a time.
        """
        if self._pool is None:
            self._pool = _Pool(self._stream)
        try:
            with torch.cuda.graph(graph, pool=self._pool.handle, stream=self._stream):
                _in_turn(calls, sweeps)
        except Exception as error:
            self._pool.abandon(self._device)
            self._pool = None
            self.check()
            if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
                raise
            return False
        return True


class _Pool:
    """Memory that graphs share, and a small graph that keeps it open while none of them lives."""

    def __init__(self, stream: torch.cuda.Stream):
        self.handle = torch.cuda.graph_pool_handle()
        number = torch.zeros(1, device=_DEVICE).add_(1)  # once outside: a kernel cannot be loaded in a capture
        self._keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._keeper, pool=self.handle, stream=stream):
            number.add_(1)

    def abandon(self, device: int) -> None:
        """After a capture that failed, the allocator may believe that it goes on; without this it defers its frees."""
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)  # not part of torch's promises
        if end is not None:
            with suppress(RuntimeError):  # where the capture did end
                end(device, self.handle)


class _Timed:
    """A run of calls between two events.

    A graph does not keep alive what it reads: `keep` does, such as calls whose closures hold inputs and saved tensors.
    """

    def __init__(
        self, how: str, run: Call, num_calls: int, restore: Call | None, head_start: bool = True, keep: object = None
    ):
        self.how = how
        self._run, self._num_calls, self._restore, self._head_start = run, num_calls, restore, head_start
        self._keep = keep

    def seconds(self) -> float:
        if self._restore is not None:
            self._restore()
        return _seconds(self._run, self._head_start) / self._num_calls


def _sweeps(calls: Sequence[Call], seconds: float, max_calls: int) -> int:
    """How often all calls have to run to last so long, within so many calls."""
    sweep_s = _seconds(lambda: _in_turn(calls, 1))
    return max(1, min(round(seconds / sweep_s), max_calls // len(calls)))


def _in_turn(calls: Sequence[Call], sweeps: int) -> None:
    """Runs the calls in turn, keeping each one's results until its next call.

    Small results, written to the same place again and again, would not leave the cache. Where two sets of inputs
    exceed it several times over, so do their results, and are not kept: they may be a large part of the memory.
    """
    kept: list[object] = [None] * len(calls)
    keeps = len(calls) > 2
    for _ in range(sweeps):
        for i, call in enumerate(calls):
            kept[i] = None
            result = call()
            kept[i] = result if keeps else None
            del result


def _seconds(run: Call, head_start: bool = True) -> float:
    """Duration on the device. With a head start, Python has queued the work before the device begins with it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end), 1e-6) / 1e3


def _waits_for_the_device(call: Call) -> bool:
    """Whether the host waits somewhere inside: such a call cannot be captured, and trying may break later captures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not find everything
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return False


# --- Ceilings.


def copy_ceiling(clock: CudaClock) -> Ceiling:
    """Bandwidth of tensor copies, the better of captured and launched ones at each size."""
    points = []
    for size_mib in _COPY_MIB:
        moved = size_mib * _MIB
        if _num_copies(clock, moved) * moved > 0.8 * clock.free_bytes():
            break
        points.append((moved, moved / _copy_seconds(clock, moved)))
        clock.release()
    return Ceiling(tuple(points))


def _copy_seconds(clock: CudaClock, moved: int) -> float:
    pairs = [(_random(moved // 4), _random(moved // 4)) for _ in range(_num_copies(clock, moved))]  # 2 bytes each
    calls = [partial(target.copy_, source) for source, target in pairs]
    timed = clock.prepare(calls, None)
    captured = statistics.median(timed.seconds() for _ in range(_COPY_ROUNDS))
    return min(captured, clock.seconds_with_launches(calls, None))


def _num_copies(clock: CudaClock, moved: int) -> int:
    """So many pairs of tensors exceed the cache."""
    return max(2, -(-3 * clock.cache_bytes // moved))


def matmul_ceiling(clock: CudaClock, m: int, n: int, k: int, seconds: float) -> float:
    """FLOP/s of bf16 matrix products (m, k) x (k, n) of random numbers, sustained for so long.

    n and k are those of a linear layer's weight (n, k), which is read as it lies.
    """
    flops = 2 * m * n * k / _matmul_seconds(m, n, k, seconds)
    clock.release()
    return flops


def _matmul_seconds(m: int, n: int, k: int, seconds: float) -> float:
    sets = [(_random(m, k), _random(n, k).T, _random(m, n)) for _ in range(_MATMUL_SETS)]
    calls = [partial(torch.mm, a, b, out=out) for a, b, out in sets]
    sweep_s = _seconds(lambda: _in_turn(calls, 3)) / 3
    sweeps = max(1, round(seconds / 4 / sweep_s))
    # The first part warms up: under load the clock falls to what it can hold.
    parts_s = [_seconds(lambda: _in_turn(calls, sweeps)) for _ in range(4)]
    return sum(parts_s[1:]) / (3 * sweeps * len(calls))


def launch_seconds() -> float:
    """What one small operator costs from Python, when the device has nothing else to do."""
    x = torch.zeros(1, device=_DEVICE)
    calls = 1_000
    for _ in range(50):
        x.add_(1)
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(calls):
        x.add_(1)
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / calls


def _random(*shape: int) -> torch.Tensor:
    # A generator of its own: the default one keeps the state of a capture that failed.
    generator = torch.Generator(_DEVICE).manual_seed(0)
    return torch.randn(shape, device=_DEVICE, generator=generator, dtype=torch.bfloat16)

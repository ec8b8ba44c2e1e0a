"""The logic of the CUDA clock, on a device that is made up: what only a GPU can show is left to a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cuda_clock
from benchmarks.cuda_clock import CudaClock, copy_ceiling, launch_seconds, matmul_ceiling
from benchmarks.timing import DeviceLostError


class Device:
    """A device whose every call takes a given time, and which writes down what happens to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now_s = 0.0
        self.log: list[str] = []
        self.is_capturing = self.refuses_syncs = self.fails_captures = self.is_lost = False
        self.pools = 0
        fakes: dict[str, object] = {
            "Stream": lambda: SimpleNamespace(wait_stream=lambda _other: None),
            "current_stream": lambda: "default",
            "stream": self._stream,
            "current_device": lambda: 0,
            "get_device_properties": lambda _device: SimpleNamespace(L2_cache_size=1_000),
            "mem_get_info": lambda: (40_000, 80_000),
            "memory_reserved": lambda: 5_000,
            "memory_allocated": lambda: 3_000,
            "max_memory_allocated": lambda: 7_000,
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": lambda: self.log.append("empty_cache"),
            "synchronize": self._synchronize,
            "graph_pool_handle": self._pool,
            "CUDAGraph": lambda keep_graph=False: Graph(self),
            "graph": self._graph,
            "Event": lambda enable_timing: Event(self),
            "set_sync_debug_mode": lambda mode: setattr(self, "refuses_syncs", mode == "error"),
            "_sleep": lambda _cycles: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: self.log.append("abandoned"), raising=False)
        monkeypatch.setattr(cuda_clock, "_DEVICE", "cpu")

    def work(self, seconds: float) -> Callable[[], None]:
        """A call that takes so long."""

        def call() -> None:
            if self.is_capturing:
                self.captured.calls.append(seconds)
            else:
                self.now_s += seconds
            self.log.append("call")

        return call

    def waiting(self) -> None:
        """A call in which the host waits."""
        if self.refuses_syncs:
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not self.is_capturing
        self.now_s += 1e-3

    @contextmanager
    def _stream(self, _stream: object) -> Iterator[None]:
        yield

    def _synchronize(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def _pool(self) -> int:
        self.pools += 1
        return self.pools

    @contextmanager
    def _graph(self, graph: "Graph", pool: int, stream: object) -> Iterator[None]:
        assert stream is not None
        graph.pool_handle, self.captured, self.is_capturing = pool, graph, True
        try:
            yield
        finally:
            self.is_capturing = False
        if self.fails_captures and graph.calls:
            raise RuntimeError("operation failed due to a previous error during capture")


class Graph:
    def __init__(self, device: Device):
        self.device, self.calls, self.pool_handle = device, [], 0

    def replay(self) -> None:
        self.device.log.append("replay")
        self.device.now_s += sum(self.calls)

    def raw_cuda_graph(self) -> int:
        return 0


class Event:
    def __init__(self, device: Device):
        self.device, self.at_s = device, 0.0

    def record(self) -> None:
        self.at_s = self.device.now_s

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at_s - self.at_s)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_calls_are_captured_as_often_as_fills_a_replay_and_their_mean_is_taken(device: Device):
    clock = CudaClock()
    with clock.in_use():
        timed = clock.prepare([device.work(1e-4), device.work(3e-4)], None)
        assert timed.how == "graph"
        device.log.clear()
        assert timed.seconds() == pytest.approx(2e-4)
    assert device.log == ["replay"]
    assert len(device.captured.calls) == 2 * round(4e-3 / 4e-4)


def test_calls_that_overwrite_their_inputs_run_once_per_input_after_a_restore(device: Device):
    restored: list[str] = device.log
    timed = CudaClock().prepare([device.work(1e-4)] * 3, lambda: restored.append("restore"))
    device.log.clear()
    assert timed.seconds() == pytest.approx(1e-4)
    assert device.log == ["restore", "replay"]
    assert len(device.captured.calls) == 3


def test_very_short_calls_do_not_make_endless_graphs(device: Device):
    CudaClock().prepare([device.work(1e-8)] * 2, None)
    assert len(device.captured.calls) == 400


def test_a_call_in_which_the_host_waits_is_never_captured(device: Device):
    clock = CudaClock()
    timed = clock.prepare([device.waiting], None)
    assert timed.how == "events"
    assert timed.seconds() == pytest.approx(1e-3)
    assert device.pools == 0
    assert clock.num_launches(device.waiting) is None
    assert not device.refuses_syncs


def test_other_errors_of_a_call_are_not_taken_for_waiting(device: Device):
    def broken() -> None:
        if device.refuses_syncs:
            raise RuntimeError("CUDA error: invalid argument")

    with pytest.raises(RuntimeError, match="invalid argument"):
        CudaClock().prepare([broken], None)
    assert not device.refuses_syncs


def test_after_a_capture_that_failed_events_take_over_and_the_pool_is_another(device: Device):
    clock = CudaClock()
    device.fails_captures = True
    timed = clock.prepare([device.work(1e-4)], None)
    assert timed.how == "events"
    assert timed.seconds() == pytest.approx(1e-4)
    assert "abandoned" in device.log
    device.fails_captures = False
    assert clock.prepare([device.work(1e-4)], None).how == "graph"
    assert device.pools == 2


def test_graphs_share_one_pool_until_memory_is_released(device: Device):
    clock = CudaClock()
    pools = []
    for _ in range(2):
        clock.prepare([device.work(1e-4)], None)
        pools.append(device.captured.pool_handle)
    clock.release()
    clock.prepare([device.work(1e-4)], None)
    assert [*pools, device.captured.pool_handle] == [1, 1, 2]


def test_memory_is_what_torch_does_not_use(device: Device):
    clock = CudaClock()
    assert clock.cache_bytes == 1_000
    assert clock.free_bytes() == 42_000
    assert clock.peak_bytes(device.work(1.0)) == 4_000


def test_a_device_that_answers_no_more_is_lost(device: Device):
    clock = CudaClock()
    device.is_lost = True
    with pytest.raises(DeviceLostError, match="illegal memory access was encountered$"):
        clock.check()


def test_launches_from_python_are_part_of_the_other_time(device: Device):
    clock = CudaClock()
    assert clock.seconds_with_launches([device.work(1e-4), device.work(2e-4)], None) == pytest.approx(1.5e-4)


def test_ceilings_are_measured_by_the_same_clock(device: Device, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_clock, "_MIB", 16)
    copy = torch.Tensor.copy_
    product = torch.mm

    def slow_copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        device.work(target.nbytes / 1e3)()
        return copy(target, source)

    def slow_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        device.work(0.01)()
        return product(a, b, out=out)

    monkeypatch.setattr(torch.Tensor, "copy_", slow_copy)
    monkeypatch.setattr(torch, "mm", slow_product)
    clock = CudaClock()
    ceiling = copy_ceiling(clock)
    assert [size for size, _ in ceiling.points] == [
        16 * 64,
        16 * 128,
        16 * 256,
        16 * 512,
        16 * 1_024,
    ]  # then it is full
    assert [speed for _, speed in ceiling.points] == pytest.approx([2e3] * 5)
    assert matmul_ceiling(clock, 8, 4, 2, seconds=0.5) == pytest.approx(2 * 8 * 4 * 2 / 0.01)
    assert launch_seconds() > 0

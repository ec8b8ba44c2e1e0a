"""A clock for a machine without a GPU: it drives the whole benchmark, and no figure of it is ever printed by one."""

import time
from collections.abc import Sequence

from benchmarks.timing import Call, Timed


class HostClock:
    """Measures by time.perf_counter, and counts what is asked of it."""

    def __init__(self, cache_bytes: int = 1 << 12, free: int = 1 << 30):
        self.cache_bytes = cache_bytes
        self.num_prepared = 0
        self.num_released = 0
        self._free = free

    def free_bytes(self) -> int:
        return self._free

    def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
        self.num_prepared += 1
        return _Timed(calls, restore)

    def seconds_with_launches(self, calls: Sequence[Call], restore: Call | None) -> float:
        return _Timed(calls, restore).seconds()

    def peak_bytes(self, call: Call) -> int | None:
        call()
        return 1 << 20

    def num_launches(self, call: Call) -> int | None:
        return 1

    def release(self) -> None:
        self.num_released += 1

    def check(self) -> None:
        pass


class _Timed:
    how = "graph"

    def __init__(self, calls: Sequence[Call], restore: Call | None):
        self._calls, self._restore = calls, restore

    def seconds(self) -> float:
        if self._restore is not None:
            self._restore()
        started_s = time.perf_counter()
        for call in self._calls:
            call()
        return (time.perf_counter() - started_s) / len(self._calls)

"""How durations become figures: rounds, ratios of neighbours, ceilings, and the time that is left.

Nothing here touches a device. `Clock` says what a device must be able to measure; benchmarks/cuda_clock.py is the one
whose figures are printed.
"""

import math
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# One name against itself: further apart than this and the machine, not the kernel, makes the difference.
AGAINST_ITSELF = 0.01

# Several input sets, together beyond the cache: a call then finds nothing of its inputs there.
_CACHE_SIZES = 3
_MIN_SETS, _MAX_SETS = 2, 16
# Of the free memory, at most this much for input sets: outputs and what a backward needs come on top.
_SHARE_OF_MEMORY = 0.2

Call = Callable[[], object]


class DeviceLostError(RuntimeError):
    """The device answers no more, as after an illegal memory access: nothing can be measured from here on."""


class Timed(Protocol):
    """Prepared calls, measured once per round."""

    @property
    def how(self) -> str:
        """Either "graph", or "events" where the calls could not be captured."""
        ...

    def seconds(self) -> float:
        """Mean duration of the calls, run now."""
        ...


class Clock(Protocol):
    """What a device can tell of a call."""

    @property
    def cache_bytes(self) -> int:
        """Size of the last cache before memory."""
        ...

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
        """Warms the calls up and makes them ready to be timed in turn; `restore` runs untimed before each round."""
        ...

    def seconds_with_launches(self, calls: Sequence[Call], restore: Call | None) -> float:
        """Mean duration of the calls when each is launched from Python."""
        ...

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that a call holds beside what was held before it, its results included."""
        ...

    def num_launches(self, call: Call) -> int | None:
        """Kernels, copies and fills that a call puts on the device; None if the device does not tell."""
        ...

    def release(self) -> None:
        """Gives memory that nothing uses back to the device."""
        ...

    def check(self) -> None:
        """Waits for the device.

        Raises:
            DeviceLostError: it answers no more.
        """
        ...


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as long one side took, over rounds in which both ran."""

    median: float
    p20: float
    p80: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p20:.2f}-{self.p80:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median of theirs/ours round by round, so that a slow moment of the machine hits both sides."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    fifth = len(ratios) // 5
    return Ratio(statistics.median(ratios), ratios[fifth], ratios[-1 - fifth])


def is_noisy(against_itself: Ratio) -> bool:
    """Whether two runs of the same kernel differ by more than AGAINST_ITSELF."""
    return abs(against_itself.median - 1) > AGAINST_ITSELF


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Copy bandwidth as measured at some sizes: (bytes read and written, bytes per second), by size."""

    points: tuple[tuple[int, float], ...]

    def at(self, num_bytes: float) -> float:
        """Bandwidth of a copy that moves so many bytes, interpolated over the logarithm of the size.

        Outside of what was measured it is that of the nearest size.
        """
        sizes = [size for size, _ in self.points]
        index = bisect_left(sizes, num_bytes)
        if index in (0, len(sizes)):
            return self.points[min(index, len(sizes) - 1)][1]
        (size_0, speed_0), (size_1, speed_1) = self.points[index - 1 : index + 1]
        share = math.log(num_bytes / size_0) / math.log(size_1 / size_0)
        return speed_0 + share * (speed_1 - speed_0)


class Budget:
    """How much of a run's time is left; nothing that has begun is cut short."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._end_s = now() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until the end, negative after it."""
        return self._end_s - self._now()

    @property
    def is_spent(self) -> bool:
        """Whether nothing new should begin."""
        return self.left_s <= 0


def num_sets(set_bytes: int, clock: Clock, at_least: int = _MIN_SETS) -> int:
    """Input sets to rotate over: several times the cache, no fewer than asked for, within a share of the memory."""
    affordable = int(_SHARE_OF_MEMORY * clock.free_bytes()) // max(1, set_bytes)
    wanted = max(at_least, -(-_CACHE_SIZES * clock.cache_bytes // max(1, set_bytes)))
    return max(1, min(wanted, affordable, max(_MAX_SETS, at_least)))


def warm_up(timed: Mapping[str, Timed], seconds: float) -> float:
    """Runs all in turn for so long, so that clocks and caches are where they will stay; seconds of the last turn."""
    end_s = time.monotonic() + seconds
    turn_s = 0.0
    while timed and time.monotonic() < end_s:
        started_s = time.monotonic()
        for one in timed.values():
            one.seconds()
        turn_s = time.monotonic() - started_s
    return turn_s


def interleave(timed: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each round; every other round runs backwards, so that none always follows the same other."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(timed[name].seconds())
    return seconds

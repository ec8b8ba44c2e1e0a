"""A polite stop: the signal sets a flag, the loop saves at the next step boundary, the process ends with code 75."""

import signal
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was told to stop; nothing else happens inside the handler.

    As a context manager it listens to SIGTERM (schedulers), SIGINT (Ctrl-C), SIGUSR1 (Slurm's early warning) and SIGHUP
    (the terminal was closed), the last unless the process was started with nohup.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        has_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heard = _SIGNALS if has_nohup else (*_SIGNALS, signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means it: do not wait for the step
        self.is_set = True

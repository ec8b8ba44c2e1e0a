"""A polite stop: the signal sets a flag, the loop saves at the next step boundary, the process ends with code 75."""

import signal
from types import FrameType

# EX_TEMPFAIL of sysexits.h, "try again": what a scheduler's wrapper tests for to requeue the job.
STOPPED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was told to stop; nothing else happens inside the handler."""

    def __init__(self) -> None:
        self.is_set = False

    def install(self) -> None:
        """Listens to SIGTERM (schedulers), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning before the end)."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means it: do not wait for the step
        self.is_set = True

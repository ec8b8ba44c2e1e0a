"""One run at a time in a run folder."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import Self

from data_prep import publish

_FILE = "lock"


class LockedError(ValueError):
    """Another process trains in the run folder."""


class RunLock:
    """Holds a run folder while the process lives; the kernel lets go of it when the process dies, however that is."""

    def __init__(self, run: Path):
        """Takes the folder.

        Raises:
            LockedError: names the process that holds it.
        """
        publish.make_folder(run)
        path = run / _FILE
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf-8").strip() or "an unknown process"
            os.close(self._descriptor)
            raise LockedError(
                f"{run} is in use by {holder}; wait for that run, or stop it, or choose another --run.dir"
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise LockedError(
                f"{path}: cannot be locked ({error.strerror}), so nothing would keep a second run out; mount the file "
                "system with locks (Lustre: -o flock), or choose another --run.dir"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {since}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

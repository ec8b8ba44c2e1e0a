"""The work area: results of units, kept until the data folder is published, so that a killed preparation goes on.

<output>.work/lock                 held by the running preparation
              units/ab/ab12...     finished units, named by what shapes them (`unit_step`)
              tokenizer-<key>/     a tokenizer trained on this input
              stage-<key>/         the data folder, or what is added to it, while it is being cut
"""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep import publish


class WorkAreaError(ValueError):
    """The work area is in use; the message says by whom."""


@dataclass(frozen=True, slots=True)
class WorkArea:
    """A folder for results between the steps."""

    folder: Path

    def unit(self, key: str) -> Path:
        """The folder of a unit's result."""
        return self.folder / "units" / key[:2] / key

    def tokenizer(self, key: str) -> Path:
        """The folder of a tokenizer trained on an input."""
        return self.folder / f"tokenizer-{key}"

    def stage(self, key: str) -> Path:
        """The folder in which a data folder, or what is added to one, is put together."""
        return self.folder / f"stage-{key}"


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[WorkArea]:
    """The work area for one preparation at a time.

    Leftovers of dead workers are deleted; everything finished stays. After a success call `remove`.

    Raises:
        WorkAreaError: another preparation works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The lock goes with the process, however that ends.
    with (folder / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown process"
            raise WorkAreaError(
                f"{folder}: another preparation of this output is running ({holder}); "
                "wait for it, or choose another --output.folder"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        for place in [folder, *(folder / "units").glob("*")]:
            publish.remove_leftovers(place)
        # Under the lock nobody writes there; what a killed run left, on whatever machine, must not be published.
        for leftover in folder.glob("stage-*/**/*.tmp-*"):
            leftover.unlink()
        yield WorkArea(folder)


def remove(area: WorkArea) -> None:
    """Deletes the work area, the lock last."""
    for path in area.folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (area.folder / "lock").unlink()
    with contextlib.suppress(OSError):  # another preparation may have begun to work there
        area.folder.rmdir()

"""The work area: results of units, kept until the data folder is published, so that a killed preparation goes on.

<output>.work/lock                 held by the running preparation
              units/ab/ab12...     finished units, named by what shapes them (`unit_step`); elsewhere if asked for
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
    """A folder beside the output for results between the steps; those of units may lie on another disk."""

    folder: Path
    units: Path

    def unit(self, key: str) -> Path:
        """The folder of a unit's result."""
        return self.units / key[:2] / key

    def tokenizer(self, key: str) -> Path:
        """The folder of a tokenizer trained on an input."""
        return self.folder / f"tokenizer-{key}"

    def stage(self, key: str) -> Path:
        """The folder in which a data folder, or what is added to one, is put together."""
        return self.folder / f"stage-{key}"

    def clear(self) -> None:
        """Deletes all results; what else lies in folders that the user named stays."""
        shutil.rmtree(self.units, ignore_errors=True)
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def opened(output: Path, units_below: str | None = None) -> Iterator[WorkArea]:
    """The work area of an output, for one preparation at a time; it goes with the block if nothing is in it.

    Leftovers of dead processes are deleted, also those of the output itself; everything finished stays.

    Raises:
        WorkAreaError: another preparation of the output is running.
    """
    folder = output.with_name(f"{output.name}.work")
    units = folder / "units" if units_below is None else Path(units_below).resolve() / f"{output.name}.work" / "units"
    publish.make_folder(folder)
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
        publish.remove_leftovers(output.parent, output.name)
        for place in (folder, *units.glob("*")):
            publish.remove_leftovers(place)
        # Under the lock nobody writes there; what a killed run left, on whatever machine, must not be published.
        for leftover in folder.glob("stage-*/**/*.tmp-*"):
            leftover.unlink()
        try:
            yield WorkArea(folder, units)
        finally:
            with contextlib.suppress(OSError):  # something is kept for the next run
                if units_below is not None:
                    units.parent.rmdir()
            if [path.name for path in folder.iterdir()] == ["lock"]:
                shutil.rmtree(folder)

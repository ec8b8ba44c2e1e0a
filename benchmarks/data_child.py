"""One way to prepare data, run as a program of its own: time, CPU and memory of its whole process tree, and its tokens.

A way is a function of a job in one of the modules `data_peers` and `data_ours`. It is started as
`python -m MODULE WAY JOB`, and says on its last line where its tokens are, and how long it took from the end of its
imports on.
"""

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

TOKENS = np.dtype("<u2")
_SAMPLE_S = 0.05
_ORPHANS_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a way is to do."""

    files: tuple[str, ...]
    """JSON lines with a "text"."""
    tokenizer: str
    """A tokenizer.json."""
    eos_id: int
    pad_id: int
    """Fills what a way leaves empty; in no text."""
    vocab_size: int
    folder: str
    """Empty, for the output."""
    num_workers: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stream:
    """A file of tokens, from an offset to its end, little-endian uint16."""

    path: str
    offset_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """What a way made."""

    streams: Sequence[Stream]
    order: Sequence[int]
    """The input files, by index, in the order in which their documents lie in the streams."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    elapsed_s: float | None = None
    cpu_s: float | None = None
    """What it timed itself, where not all that it did counts."""


Way = Callable[[Job], Finished]


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of a way."""

    elapsed_s: float
    """From the end of its imports to its end."""
    cpu_s: float
    """User and system time of all its processes, imports included."""
    peak_bytes: int | None
    """Most memory of all its processes together; None if it was not sampled."""
    order: tuple[int, ...]
    digest: str
    num_tokens: int
    facts: dict[str, Any]


class ChildError(RuntimeError):
    """A way ended with an error."""


class AbsentError(Exception):
    """A library that a way needs is not installed."""


def serve(ways: Mapping[str, Way], arguments: Sequence[str]) -> int:
    """What the program of a way does: run it, time it, say what it made."""
    name, job = arguments
    table = json.loads(job)
    started_s = time.perf_counter()
    try:
        finished = ways[name](Job(**{**table, "files": tuple(table["files"])}))
    except ImportError as error:
        print(json.dumps({"absent": error.name or str(error)}))
        return 0
    elapsed_s = time.perf_counter() - started_s if finished.elapsed_s is None else finished.elapsed_s
    print(json.dumps(asdict(finished) | {"elapsed_s": elapsed_s}))
    return 0


def run(module: str, way: str, job: Job, with_memory: bool = False) -> Measured:
    """Runs a way in a new process.

    Raises:
        AbsentError: it is not installed.
        ChildError: it failed; the message ends with what it printed.
    """
    command = [sys.executable, "-m", module, way, json.dumps(asdict(job))]
    answer, cpu_s, peak_bytes = measure(command, with_memory)
    finished = json.loads(answer.splitlines()[-1])
    if "absent" in finished:
        raise AbsentError(finished["absent"])
    ids = tokens_of([Stream(**stream) for stream in finished["streams"]], job.eos_id, job.pad_id)
    return Measured(
        finished["elapsed_s"],
        cpu_s if finished["cpu_s"] is None else finished["cpu_s"],
        peak_bytes,
        tuple(finished["order"]),
        digest(ids),
        int(ids.size),
        finished["facts"],
    )


def measure(command: Sequence[str], with_memory: bool = False) -> tuple[str, float, int | None]:
    """What a command prints, its CPU seconds, and the most memory that its processes hold together.

    Raises:
        ChildError: it failed.
    """
    with _adopting_orphans(), tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        # A session of its own, by which all its processes are found, whoever started them.
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", start_new_session=True
        )
        assert child.stdout is not None
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=_sample_memory, args=(child.pid, peak, ended))
        if with_memory:
            sampler.start()
        with child.stdout:
            printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        if with_memory:
            sampler.join()
        cpu_s = usage.ru_utime + usage.ru_stime + _orphans_cpu_s(child.pid)
        if child.returncode != 0 or not printed.strip():
            errors.seek(0)
            raise ChildError(f"{' '.join(command[:5])} ended with {child.returncode}:\n{errors.read()[-2_000:]}")
    return printed, cpu_s, peak[0] if with_memory else None


@contextlib.contextmanager
def _adopting_orphans() -> Iterator[None]:
    """Processes that a child leaves behind (fork servers) become children of this one, so that their time is known."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _orphans_cpu_s(session: int) -> float:
    """Waits for the processes that a command left behind; their CPU seconds."""
    cpu_s, waited_s = 0.0, 0.0
    while (members := _members(session)) and waited_s < _ORPHANS_S:
        for process in members:
            with contextlib.suppress(ChildProcessError):  # the child of another orphan, which will wait for it
                ended, _, usage = os.wait4(int(process), os.WNOHANG)
                cpu_s += usage.ru_utime + usage.ru_stime if ended else 0.0
        time.sleep(0.01)
        waited_s += 0.01
    return cpu_s


def tokens_of(streams: Iterable[Stream], eos_id: int, pad_id: int) -> np.ndarray:
    """All documents with one EOS between two of them, none before the first or behind the last.

    So tokens are comparable whether a way writes EOS before documents or behind them, and however it fills its files.
    """
    parts = [np.fromfile(stream.path, TOKENS, offset=stream.offset_bytes) for stream in streams]
    ids = np.concatenate([np.zeros(0, TOKENS), *parts])
    return one_between(ids[ids != pad_id], eos_id)


def one_between(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Ids without empty documents, and without EOS at both ends."""
    is_eos = ids == eos_id
    before = np.concatenate([[True], is_eos[:-1]])
    ids = ids[~(is_eos & before)]
    return ids[:-1] if ids.size and ids[-1] == eos_id else ids


def digest(ids: np.ndarray) -> str:
    """Stands for a stream of tokens."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids.astype(TOKENS)).tobytes())


def _sample_memory(session: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(_SAMPLE_S):
        peak[0] = max(peak[0], sum(map(_memory_bytes, _members(session))))


def _members(session: int) -> list[str]:
    found: list[str] = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                fields = (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[3]) == session:
                found.append(process.name)
    return found


def _memory_bytes(process: str) -> int:
    """Of pages that processes share, each has its part."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0  # it has ended
    return int(found[1]) * 1024 if found else 0

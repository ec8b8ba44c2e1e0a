"""The reduce at scale: which of ten million documents repeat an older one, from their sketches on disk.

    python -m benchmarks.dedup [--documents 10000000] [--folder FOLDER]

The documents are synthetic: the smallest hash of each of the 112 bins is drawn, so that a near-duplicate of Jaccard
similarity J agrees with its original in each bin with probability J. One in ten is an exact copy, one in five a
near-duplicate of J between 0.4 and 1, of originals of which some are copied thousands of times; one in a hundred
shares a boilerplate band with all others of its kind. Writing them is not timed. The reduce runs in a process of its
own, whose peak memory is what the system says.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.duplicates import minhash
from data_prep.duplicates.dedup import EXACT, KEPT, NEAR, SketchFiles, find_duplicates

COMMAND = "python -m benchmarks.dedup"
UNIT_DOCUMENTS = 20_000
THRESHOLD = 0.7
ORIGINAL, EXACT_COPY, NEAR_COPY = 0, 1, 2
_SALT = np.uint64(0xD1B54A32D192ED03)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the documents, runs the reduce on them, prints its time, memory and what it found."""
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where to write 2.4 GB for a while; default: the temporary folder")
    parser.add_argument("--reduce", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.reduce is not None:
        print(json.dumps(reduce(options.reduce, options.documents)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bessemer-dedup-", dir=options.folder) as folder:
        print(f"writing {options.documents:,} documents to {folder}")
        write_documents(Path(folder), options.documents)
        for name, value in measure(Path(folder), options.documents).items():
            print(f"{name:24} {value:>14,}" if isinstance(value, int) else f"{name:24} {value:>14.4f}")
    return 0


def measure(folder: Path, num_documents: int) -> dict[str, Any]:
    """Runs the reduce in a new process and returns what it printed."""
    command = [sys.executable, "-m", "benchmarks.dedup", "--reduce", str(folder), "--documents", str(num_documents)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def reduce(folder: Path, num_documents: int) -> dict[str, Any]:
    """Time, memory and quality of `find_duplicates` on the documents of a folder."""
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    units = range(-(-num_documents // UNIT_DOCUMENTS))
    hashes = np.concatenate([np.load(_path(folder, unit, "hashes")) for unit in units])
    files = SketchFiles(
        (_path(folder, unit, "bands"), _path(folder, unit, "sketch"), len(rows))
        for unit, rows in enumerate(_units(num_documents))
    )
    verdicts = find_duplicates(hashes, files.bands, files.sketches, threshold=THRESHOLD, near=True)
    measured = {
        "wall_s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    return {**measured, **quality(verdicts.kind, num_documents)}


def _peak_rss_bytes() -> int:
    """Of this program: getrusage would also count what its parent held when it was started."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def quality(kind: NDArray[np.uint8], num_documents: int) -> dict[str, Any]:
    """Counts of the verdicts, and how many of the planted copies were found."""
    drawn, _, jaccard = _plan(np.arange(num_documents))
    found = kind != KEPT
    near = drawn == NEAR_COPY
    return {
        "documents": num_documents,
        "exact": int((kind == EXACT).sum()),
        "near": int((kind == NEAR).sum()),
        "exact_copies_missed": int((~found & (drawn == EXACT_COPY)).sum()),
        "originals_lost": int((found & (drawn == ORIGINAL)).sum()),
        "found_above_0.9": float(found[near & (jaccard >= 0.9)].mean()),
        "found_0.8_to_0.9": float(found[near & (jaccard >= 0.8) & (jaccard < 0.9)].mean()),
        "found_below_0.5": float(found[near & (jaccard < 0.5)].mean()),
    }


def write_documents(folder: Path, num_documents: int) -> None:
    """Writes hashes, band keys and sketches as one file each per unit."""
    for unit, rows in enumerate(_units(num_documents)):
        drawn, originals, jaccard = _plan(rows)
        minima = _minima(rows, drawn, originals, jaccard)
        bands, sketch = minhash.sketch_of_minima(minima)
        np.save(_path(folder, unit, "bands"), bands)
        np.save(_path(folder, unit, "sketch"), sketch)
        same = np.where(drawn == EXACT_COPY, originals, rows)
        np.save(_path(folder, unit, "hashes"), np.stack([_draw(same, 1), _draw(same, 2)], axis=1))


def _plan(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """What each row is, the original that it copies, and their similarity."""
    # Only odd rows copy, and only even ones: a copy of a copy would have another similarity.
    share = np.where(rows % 2 == 1, _uniform(rows, 3), 1.0)
    drawn = np.where(share < 0.2, EXACT_COPY, np.where(share < 0.6, NEAR_COPY, ORIGINAL))
    originals = (rows // 2 * _uniform(rows, 4) ** 2).astype(np.int64) * 2
    return drawn, originals, 0.4 + 0.6 * _uniform(rows, 5)


def _minima(
    rows: NDArray[np.int64], drawn: NDArray[np.int64], originals: NDArray[np.int64], jaccard: NDArray[np.float64]
) -> NDArray[np.uint64]:
    bins = np.arange(minhash.NUM_BINS)
    own = rows[:, None] * minhash.NUM_BINS + bins
    theirs = originals[:, None] * minhash.NUM_BINS + bins
    agree = np.where(drawn == EXACT_COPY, 1.0, np.where(drawn == NEAR_COPY, jaccard, 0.0))
    minima = _draw(np.where(_uniform(own, 6) < agree[:, None], theirs, own), 7)
    boilerplate = _uniform(np.where(drawn == EXACT_COPY, originals, rows), 8) < 0.01
    minima[boilerplate, : minhash.ROWS_PER_BAND] = 1
    return minima


def _draw(numbers: NDArray[np.int64], stream: int) -> NDArray[np.uint64]:
    return minhash.mix((numbers.astype(np.uint64) + np.uint64(1)) * _SALT + np.uint64(stream << 56))


def _uniform(numbers: NDArray[np.int64], stream: int) -> NDArray[np.float64]:
    return (_draw(numbers, stream) >> np.uint64(11)) / 2.0**53


def _units(num_documents: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, num_documents, UNIT_DOCUMENTS):
        yield np.arange(start, min(start + UNIT_DOCUMENTS, num_documents))


def _path(folder: Path, unit: int, name: str) -> Path:
    return folder / f"{unit:06}-{name}.npy"


if __name__ == "__main__":
    raise SystemExit(main())

"""Everything that only a GPU can show, in two commands of ten minutes.

    python -m benchmarks.gpu [--out FOLDER]                 (make gpu OUT=FOLDER)
    python -m benchmarks.gpu --set tuning [--out FOLDER]    (make gpu-tuning OUT=FOLDER)

The GPU tests, kernel speeds, the step's speed and MFU, and a small run in several configurations; then fine-tuning
beside pretraining, and generation. Each part has a time limit and does not need those before it. FOLDER gets each
part's JSON and PNG, and gpu.log with all that was printed; what to keep belongs into benchmarks/results/. No .venv is
needed, only the packages below.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.environment import RESULTS, describe

_ROOT = Path(__file__).parent.parent
_PACKAGES = (
    "torch", "triton", "numpy", "tokenizers", "sentencepiece", "pyarrow", "zstandard", "xxhash", "safetensors",
    "tensorboard", "matplotlib", "tqdm", "tyro", "transformers", "pytest", "hypothesis",
)  # fmt: skip
_TESTS = (
    "tests/kernels", "tests/evaluation/test_engine.py", "tests/evaluation/test_batched.py", "tests/model/test_batch.py",
    "tests/train/test_gpu.py",
)  # fmt: skip
PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "tests": (("-m", "pytest", "-q", "-m", "gpu", "--durations=10", *_TESTS), 110),
    "kernels": (("-m", "benchmarks.kernels", "--no-step", "--seconds", "120", "--out", "{out}"), 155),
    "step": (("-m", "benchmarks.step", "--seconds", "170", "--out", "{out}"), 205),
    "training": (("-m", "benchmarks.training_check", "--out", "{out}"), 65),
}
"""Arguments of Python, and seconds after which a part is stopped; together nine minutes."""
TUNING_PARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "tuning": (("-m", "benchmarks.tuning", "--out", "{out}"), 360),
    "generation": (("-m", "benchmarks.generation", "--out", "{out}"), 180),
}
"""Likewise, of the second command."""


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts; the exit code is that of the first that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of all results")
    parser.add_argument("--set", choices=("speed", "tuning"), default="speed", help="which parts")
    options = parser.parse_args(arguments)
    out, parts = options.out.absolute(), PARTS if options.set == "speed" else TUNING_PARTS
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: not installed: {' '.join(missing)}; see requirements.txt and requirements-dev.txt")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    ends = {}
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        for name, (command, limit_s) in parts.items():
            ends[name] = run_part(name, [part.format(out=out) for part in command], limit_s, log)
            # After each part: what is there is not lost if the machine is.
            summary = {"environment": describe(), "parts": ends}
            (out / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name, end in ends.items():
        print(f"{name:10} {end['ended']:12} {end['seconds']:6.1f} s")
    return next((end["code"] for end in ends.values() if end["code"]), 0)


def run_part(name: str, command: list[str], limit_s: float, log) -> dict:
    """Runs Python with these arguments, its output shown and logged; ends it and all that it started at the limit."""
    started_s = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    }
    print(f"--- {name}: python {' '.join(command)}", flush=True)
    with subprocess.Popen(
        [sys.executable, "-u", *command], cwd=_ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        alarm = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(f"{name}: {line}")
            code = process.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
    ended = "ok" if code == 0 else "out of time" if code == -signal.SIGKILL else f"code {code}"
    return {"ended": ended, "code": abs(code), "seconds": time.perf_counter() - started_s}


if __name__ == "__main__":
    sys.exit(main())

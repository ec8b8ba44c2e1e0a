"""Our kernels beside this device's ceilings, plain torch, torch.compile and other projects' kernels.

    python -m benchmarks.kernels [--seconds N] [--full] [--only OPERATOR ...] [--out FOLDER] [--sweep] [--no-step]

One process. The ceilings come first: what a copy moves, what a matrix product computes, what a launch costs. Then every
operator at every shape, the most telling first, until the time is spent. Each implementation is checked before it is
timed, and one that is wrong gets no speed. Times are those of calls captured in a CUDA graph, which rotate over inputs
that exceed the cache; all implementations run in turn in every round, and ratios are medians over rounds. At the end,
the step benchmark runs as well.

Without CUDA our kernels run under Triton's interpreter, and only their errors are shown.
"""

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# Triton decides when a kernel is decorated whether it is interpreted, so this comes before any import of ours.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from benchmarks.environment import describe, device_name, result_path, write_result
from benchmarks.kernel_cases import OPERATORS, default_cases, full_cases
from benchmarks.kernel_goals import Ceilings, goals_table, of_copy, of_matmul, seconds
from benchmarks.kernel_operator import Case, Sizes
from benchmarks.kernel_peers import versions
from benchmarks.kernel_report import correctness_table, draw, errors, operator_tables, records
from benchmarks.kernel_rows import NO_TIME, OURS, Cell, Effort, Row, checked, explain, measure_case
from benchmarks.kernel_sweep import sweep
from benchmarks.table import Table
from benchmarks.timing import Budget, Clock, DeviceLostError

if TYPE_CHECKING:
    from benchmarks.cuda_clock import CudaClock

COMMAND = "python -m benchmarks.kernels"
_SECONDS = 240.0
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MATMUL_S = 2.0
_MODEL_MATMUL_S = 0.3
# Rows, outputs and inputs: a large product, and TinyLlama's linear layers on 8 sequences of 2048 tokens.
_LARGE_MATMUL = (8_192, 8_192, 8_192)
_MODEL_MATMULS = {
    "qkv": (16_384, 2_560, 2_048),
    "attention output": (16_384, 2_048, 2_048),
    "gate and up": (16_384, 11_264, 2_048),
    "down": (16_384, 2_048, 5_632),
    "readout": (16_384, 32_000, 2_048),
}
_STATE = ("clocks.sm", "clocks.max.sm", "power.draw", "temperature.gpu")
LOST = "not measured: the device answers no more"
_THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the new name, and that of older drivers


@dataclass(slots=True)
class Run:
    """What was measured, and what is still to be measured."""

    left: list[Case]
    rows: list[Row] = field(default_factory=list)
    why_left: str = NO_TIME
    states: list[dict[str, str]] = field(default_factory=list)
    """The GPU's clocks, power and temperature at some moments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the device allows; 1 if a kernel of ours is wrong."""
    options = _options(argv)
    if not torch.cuda.is_available() or os.environ["TRITON_INTERPRET"] == "1":
        return check_only(options.only)
    from benchmarks.cuda_clock import CudaClock

    run = Run(_chosen(full_cases() if options.full else default_cases(), options.only))
    budget = Budget(options.seconds)
    clock = CudaClock()
    with clock.in_use():
        if options.sweep:
            sweep(run.left, clock, "cuda", budget, Effort()).print()
            return 0
        run.states.append(gpu_state("before"))
        ceilings, facts = measure_ceilings(clock)
        run.states.append(gpu_state("after the ceilings"))
        measure(run, clock, ceilings, "cuda", budget, Effort())
        run.states.append(gpu_state("after"))
    failed = report(run, ceilings, facts, _command(options), options.out)
    if options.step and run.why_left != LOST:
        clock.release()
        failed |= _step(options.out) != 0
    return int(failed)


def check_only(only: Sequence[str]) -> int:
    """Prints the errors of our kernels at small shapes; 1 if one is wrong."""
    print(f"{device_name()}  torch {describe()['torch']}  triton {describe()['triton']}, interpreted")
    cases = [Case(operator, Sizes(shape)) for operator in OPERATORS for shape in operator.tiny]
    cells = [
        (case, name, checked(case, "cpu", dtype)) for case in _chosen(cases, only) for name, dtype in _DTYPES.items()
    ]
    correctness_table(cells).print()
    print(f"\n{'TRITON_INTERPRET=1' if torch.cuda.is_available() else 'no GPU'}: speeds not measured")
    return int(any(cell.note for _, _, cell in cells))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=_SECONDS, help="time for the kernels; the rest is not measured"
    )
    parser.add_argument("--full", action="store_true", help="all shapes, not only the most telling ones")
    names = [operator.name for operator in OPERATORS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="OPERATOR", help=", ".join(names))
    parser.add_argument(
        "--out", type=Path, default=None, help="where to write JSON and PNG; default: benchmarks/results"
    )
    parser.add_argument("--sweep", action="store_true", help="time launch parameters of our kernels, and nothing else")
    parser.add_argument("--no-step", dest="step", action="store_false", help="without the step benchmark at the end")
    return parser.parse_args(argv)


def _chosen(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    return [case for case in cases if case.operator.name in only]


def _command(options: argparse.Namespace) -> str:
    return f"{COMMAND} --seconds {options.seconds:g}{' --full' if options.full else ''}"


def measure(run: Run, clock: Clock, ceilings: Ceilings, device: str, budget: Budget, effort: Effort) -> None:
    """Measures case after case until none is left, the time is spent or the device is lost."""
    started_s = time.monotonic()
    while run.left and not budget.is_spent:
        case = run.left[0]
        phases = list(case.sizes.phases)
        try:
            for row in measure_case(case, clock, budget, device, effort):
                phases.remove(row.phase)
                run.rows.append(row)
                print(f"{time.monotonic() - started_s:5.0f} s  {_line(row, ceilings)}", flush=True)
        except DeviceLostError as error:
            run.why_left = LOST
            print(f"{case.name}: {error}", flush=True)
            return
        except Exception as error:  # a case for which there is too little memory, say, must not end the run
            run.rows += [Row(case, phase, {OURS: Cell(explain(error))}) for phase in phases]
            print(f"{case.name}: {explain(error)}", flush=True)
        clock.release()
        run.left.pop(0)


def _line(row: Row, ceilings: Ceilings) -> str:
    cell = row.cells.get(OURS, Cell())
    duration_s = seconds(cell)
    name = f"{row.case.name} {row.phase}"
    if duration_s is None:
        return f"{name}: {cell.note}"
    shares = {"of copy": of_copy(row, ceilings), "of matmul": of_matmul(row, ceilings)}
    shown = ", ".join(f"{share:.1%} {text}" for text, share in shares.items() if share is not None)
    return f"{name}: {1e6 * duration_s:.1f} us, {shown}"


def report(run: Run, ceilings: Ceilings, facts: dict[str, Any], command: str, out: Path | None) -> bool:
    """Prints all tables, writes JSON and PNG; whether a kernel of ours is wrong or did not run."""
    environment = describe()
    print(f"\n{device_name()}  torch {environment['torch']}  triton {environment['triton']}")
    print("peers: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    for table in (*_ceiling_tables(ceilings, facts, run.states), *operator_tables(run.rows, ceilings)):
        table.print()
    goals = goals_table(run.rows, ceilings)
    goals.print()
    for line in (*errors(run.rows), *(f"{case.name}: {run.why_left}" for case in run.left)):
        print(line)
    path = write_result(
        "kernels",
        command,
        records(run.rows, ceilings),
        folder=out,
        ceilings={"copy": ceilings.copy.points, "matmul_flops_per_s": ceilings.matmul_flops, **facts},
        gpu=run.states,
        peers=dict(versions()),
        goals=goals.records(),
        not_measured={case.name: run.why_left for case in run.left},
    )
    picture = result_path("kernels", "png", out)
    draw(run.rows, ceilings, device_name(), picture)
    print(f"\nwrote {path} and {picture.name}")
    return any(cell.is_broken for row in run.rows for name, cell in row.cells.items() if name.startswith(OURS))


def measure_ceilings(clock: "CudaClock") -> tuple[Ceilings, dict[str, Any]]:
    """What the device can do: copies, matrix products, launches."""
    from benchmarks.cuda_clock import copy_ceiling, launch_seconds, matmul_ceiling

    large = matmul_ceiling(clock, *_LARGE_MATMUL, _MATMUL_S)
    models = {name: matmul_ceiling(clock, *sizes, _MODEL_MATMUL_S) for name, sizes in _MODEL_MATMULS.items()}
    ceilings = Ceilings(copy_ceiling(clock), large)
    return ceilings, {"model_matmul_flops_per_s": models, "launch_us": 1e6 * launch_seconds()}


def _ceiling_tables(ceilings: Ceilings, facts: dict[str, Any], states: Sequence[dict[str, str]]) -> list[Table]:
    copies = [[f"{size / 2**20:,.0f} MiB", speed / 1e12] for size, speed in ceilings.copy.points]
    products = {f"{'x'.join(map(str, _LARGE_MATMUL))}": ceilings.matmul_flops, **facts["model_matmul_flops_per_s"]}
    matmuls = [[name, flops / 1e12] for name, flops in products.items()]
    launch = f"a small operator launched from Python: {facts['launch_us']:.1f} us"
    columns = list(dict.fromkeys(key for state in states for key in state))
    return [
        Table("Copies, read and written", ["moved", "TB/s"], copies),
        Table("Matrix products, bf16, random numbers, sustained", ["shape", "TFLOP/s"], matmuls, launch),
        Table("The GPU", columns, [[state.get(column, "") for column in columns] for state in states]),
    ]


def gpu_state(when: str) -> dict[str, str]:
    """Clock, power, temperature and why the clock is held down, as nvidia-smi tells; nothing is set."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for selected, throttle in itertools.product((f"--id=GPU-{uuid}", "--id=0"), _THROTTLE):
        command = ["nvidia-smi", selected, f"--query-gpu={','.join((*_STATE, throttle))}", "--format=csv,noheader"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            continue
        return {"when": when, **dict(zip((*_STATE, "throttle reasons"), result.stdout.strip().split(", ")))}
    return {"when": when, "nvidia-smi": "absent"}


def _step(out: Path | None) -> int:
    from benchmarks import step

    print("\nThe training step: python -m benchmarks.step")
    return step.main([] if out is None else ["--out", str(out)])


if __name__ == "__main__":
    sys.exit(main())

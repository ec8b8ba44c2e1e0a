"""Every kernel compiles to machine code for the GPUs we name, on a machine without any, and spills no register."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compile_ahead import MOST_SHARED_BYTES

# In a process of its own, because the interpreter replaces kernels when they are decorated.
PROGRAM = """
import sys
import torch
from benchmarks.compile_ahead import launches, resources

capability = int(sys.argv[1])
for shapes, recorded in launches(getattr(torch, sys.argv[2]), capability):
    for kernel, arguments in recorded:
        warps, registers, spilled, shared = resources(kernel, arguments, capability)
        print(kernel.fn.__module__, kernel.fn.__name__, spilled, shared, shapes, sep="|")
"""
KERNELS = {
    ("kernels.rms_norm", "_forward_kernel"),
    ("kernels.rms_norm", "_backward_kernel"),
    ("kernels.rope", "_rope_kernel"),
    ("kernels.swiglu", "_forward_kernel"),
    ("kernels.swiglu", "_backward_kernel"),
    ("kernels.cross_entropy", "_rows_kernel"),
    ("kernels.cross_entropy", "_backward_kernel"),
    ("kernels.moe_route", "_count_kernel"),
    ("kernels.moe_route", "_place_kernel"),
    ("kernels.moe_route", "_table_kernel"),
    ("kernels.moe_gemm", "_up_kernel"),
    ("kernels.moe_gemm", "_rows_kernel"),
    ("kernels.moe_gemm", "_hidden_kernel"),
    ("kernels.moe_gemm", "_weights_kernel"),
    ("kernels.moe_combine", "_combine_kernel"),
}
# What a program gets everywhere, without asking; those that have more at a time ask for what the GPU has.
SMALL_SHARED_BYTES = 48 * 1024
LARGE = {"kernels.moe_route", "kernels.moe_gemm"}


@pytest.mark.parametrize(
    ("capability", "dtype", "most_spilled"),
    [
        (90, "bfloat16", 0),
        pytest.param(80, "float16", 0, marks=pytest.mark.slow),
        # Rows of fp32 logits with all options of the loss: twelve registers, once a row.
        pytest.param(90, "float32", 48, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_and_keeps_to_its_registers(
    tmp_path: Path, capability: int, dtype: str, most_spilled: int
):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(capability), dtype]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split("|") for line in result.stdout.splitlines()]
    assert {(module, kernel) for module, kernel, *_ in lines} == KERNELS
    assert [line for line in lines if float(line[2]) > most_spilled] == []
    most_shared = {
        module: MOST_SHARED_BYTES[capability] if module in LARGE else SMALL_SHARED_BYTES for module, _ in KERNELS
    }
    assert [line for line in lines if float(line[3]) > most_shared[line[0]]] == []

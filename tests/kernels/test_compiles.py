"""Every kernel compiles to machine code for the GPUs we name, on a machine without any: ptxas comes with triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, because the interpreter replaces kernels when they are decorated.
PROGRAM = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import rms_norm
from kernels.launch import num_warps

capability, dtype, width = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
block_width, rows = rms_norm._tile(width)
sizes = {"eps": 1e-6, "width": width, "IN_FP64": dtype == "fp64", "TILES": 7, "ROWS": rows, "BLOCK": block_width}
sums = {"rstd_ptr", "partial_dw_ptr"}
for kernel, flag in ((rms_norm._forward_kernel, "HAS_RESIDUAL"), (rms_norm._backward_kernel, "HAS_DH")):
    for fused in (False, True):
        constants = {name: value for name, value in {**sizes, flag: fused}.items() if name in kernel.arg_names}
        sum_dtype = "fp64" if dtype == "fp64" else "fp32"
        signature = {
            name: "constexpr" if name in constants
            else f"*{sum_dtype if name in sums else dtype}" if name.endswith("ptr")
            else "i32"
            for name in kernel.arg_names
        }
        indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        options = {"num_warps": num_warps(block_width * rows)}
        source = ASTSource(fn=kernel, signature=signature, constexprs=indices)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.fn.__name__, fused, len(compiled.asm["cubin"]))
"""


@pytest.mark.parametrize(("capability", "dtype", "width"), [(80, "fp16", 2_056), (90, "bf16", 2_048), (90, "fp32", 64)])
def test_rms_norm_compiles_for_the_gpu(tmp_path: Path, capability: int, dtype: str, width: int):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(capability), dtype, str(width)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["_forward_kernel", "False"],
        ["_forward_kernel", "True"],
        ["_backward_kernel", "False"],
        ["_backward_kernel", "True"],
    ]

"""Compiles every kernel for GPUs that need not be there, and shows what each program takes of a multiprocessor.

    python -m benchmarks.compile_ahead

Each operator is called as in a training step, on a CPU, with its kernels replaced by recorders: what is compiled has
the very constants, tile sizes and warps of a real launch. ptxas comes with triton. Registers are per thread, of 255;
spilled bytes go to memory, and should be none.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton import compiler
from triton.backends.compiler import GPUTarget

from benchmarks.table import Table
from kernels import cross_entropy, rms_norm, rope, swiglu

CAPABILITIES = (80, 90)
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
Launch = tuple[Any, dict[str, Any]]
"""A kernel, and the arguments of one launch by name, options of the compiler included."""


def main() -> int:
    """Prints the table."""
    columns = ("kernel", "shapes", "sm", "warps", "registers", "spilled B", "shared B")
    rows = [
        (
            f"{kernel.fn.__module__}.{kernel.fn.__name__}",
            shapes,
            str(capability),
            *resources(kernel, arguments, capability),
        )
        for shapes, recorded in launches(torch.bfloat16)
        for kernel, arguments in recorded
        for capability in CAPABILITIES
    ]
    Table(f"kernels compiled by triton {triton.__version__}, bf16", columns, rows).print()
    return 0


def launches(dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    """What is launched by each operator, forward and backward, at the sizes of TinyLlama and at odd ones."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ops: Any = torch.ops.bessemer
    for width in (2_048, 2_056):
        x, w, rstd = random(64, width), torch.ones(width, dtype=dtype), torch.ones(64)
        for other in (None, x):
            name = f"width {width}" + (", with the residual" if other is not None else "")
            yield name, _recorded(rms_norm, ops.rms_norm, x, other, w, 1e-5)
            yield name, _recorded(rms_norm, ops.rms_norm_backward, x, other, x, w, rstd)
    for heads, kv_heads, size in ((32, 4, 64), (5, 1, 56)):
        tables = torch.ones(16, size // 2), torch.ones(16, size // 2)
        qkv = random(2, 16, (heads + 2 * kv_heads) * size)
        parts = [random(2, 16, n, size) for n in (heads, kv_heads, kv_heads)]
        for interleaved in (False, True):
            name = f"{heads}/{kv_heads} heads of {size}" + (", interleaved" if interleaved else "")
            yield name, _recorded(rope, ops.rope_packed, qkv, *tables, heads, kv_heads, interleaved)
            yield name, _recorded(rope, ops.rope_packed_backward, *parts, *tables, interleaved)
    for width in (5_632, 2_057):
        x, dy = random(16, 2 * width), random(16, width)
        yield f"width {width}", _recorded(swiglu, ops.swiglu, x)
        yield f"width {width}", _recorded(swiglu, ops.swiglu_backward, dy, x)
    for vocab_size in (8_000, 32_000, 128_256):
        scores, targets = random(4, vocab_size), torch.tensor([1, 2, cross_entropy.IGNORE, 3])
        rows = torch.ones(4)
        for name, options in ((f"vocabulary {vocab_size}", (0.0, None, 0.0)), ("all options", (1e-4, 30.0, 0.1))):
            yield name, _recorded(cross_entropy, ops.cross_entropy_gradient_, scores, targets, *options)
            yield name, _recorded(cross_entropy, ops.cross_entropy_backward_, rows, scores, targets, rows, *options)


def resources(kernel: Any, arguments: dict[str, Any], capability: int) -> tuple[float, float, float, float]:
    """Warps, registers of a thread, spilled bytes and bytes of shared memory of one program."""
    names = kernel.arg_names
    constants = {(i,): arguments[name] for i, name in enumerate(names) if kernel.params[i].is_constexpr}
    # Triton compiles for what it may assume of the arguments: here, that they are multiples of 16 where they are.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (i,) not in constants and (isinstance(arguments[name], Tensor) or arguments[name] % 16 == 0)
    }
    signature = {name: "constexpr" if (i,) in constants else _type_of(arguments[name]) for i, name in enumerate(names)}
    options = {name: value for name, value in arguments.items() if name not in names}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    text = _ptxas(compiled.asm["ptx"])
    registers, spilled = (re.findall(pattern, text) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill"))
    metadata: Any = compiled.metadata
    return float(metadata.num_warps), float(registers[-1]), float(sum(map(int, spilled))), float(metadata.shared)


class _Recorder:
    """Takes a kernel's place and remembers what it would have been launched with."""

    def __init__(self, kernel: Any, recorded: list[Launch]):
        self._kernel, self._recorded = kernel, recorded

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*positional: Any, **named: Any) -> None:
            self._recorded.append((self._kernel, {**dict(zip(self._kernel.arg_names, positional)), **named}))

        return launch


def _name(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def _recorded(module: ModuleType, op: Callable[..., Any], *arguments: Any) -> list[Launch]:
    recorded: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, recorded))
        op(*arguments)
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return recorded


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype]
    return "i64" if argument >= 2**31 else "i32"


def _ptxas(ptx: str) -> str:
    """What ptxas says of a program."""
    from triton.knobs import nvidia

    target = re.findall(r"\.target (\w+)", ptx)[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        command = [nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(path), "-o", f"{folder}/kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    sys.exit(main())

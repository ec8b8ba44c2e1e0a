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
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import compiler
from triton.backends.compiler import GPUTarget

from benchmarks.table import Table
from kernels import cross_entropy, moe, moe_combine, moe_gemm, moe_route, rms_norm, rope, swiglu
from kernels.moe_route import moe_route_reference, tile_height

CAPABILITIES = (80, 90)
MOST_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program can have at most, by capability."""
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
        for capability in CAPABILITIES
        for shapes, recorded in launches(torch.bfloat16, capability)
        for kernel, arguments in recorded
    ]
    Table(f"kernels compiled by triton {triton.__version__}, bf16", columns, rows).print()
    return 0


def launches(dtype: torch.dtype, capability: int) -> Iterator[tuple[str, list[Launch]]]:
    """What is launched by each operator, forward and backward, on a GPU of this capability.

    At the sizes of TinyLlama, OLMoE and Qwen3's mixtures, and at odd ones.
    """
    yield from _launches_of_rows(dtype)
    with _as_on(capability):
        yield from _launches_of_mixtures(dtype)


def _launches_of_rows(dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ops: Any = torch.ops.bessemer
    for width in (2_048, 2_056):
        x, w, rstd = random(64, width), torch.ones(width, dtype=dtype), torch.ones(64)
        for other in (None, x):
            name = f"width {width}" + (", with the residual" if other is not None else "")
            yield name, _recorded((rms_norm,), ops.rms_norm, x, other, w, 1e-5)
            yield name, _recorded((rms_norm,), ops.rms_norm_backward, x, other, x, w, rstd)
    for heads, kv_heads, size in ((32, 4, 64), (5, 1, 56)):
        tables = torch.ones(16, size // 2), torch.ones(16, size // 2)
        qkv = random(2, 16, (heads + 2 * kv_heads) * size)
        parts = [random(2, 16, n, size) for n in (heads, kv_heads, kv_heads)]
        for interleaved in (False, True):
            name = f"{heads}/{kv_heads} heads of {size}" + (", interleaved" if interleaved else "")
            yield name, _recorded((rope,), ops.rope_packed, qkv, *tables, heads, kv_heads, interleaved)
            yield name, _recorded((rope,), ops.rope_packed_backward, *parts, *tables, interleaved)
    for width in (5_632, 2_057):
        x, dy = random(16, 2 * width), random(16, width)
        yield f"width {width}", _recorded((swiglu,), ops.swiglu, x)
        yield f"width {width}", _recorded((swiglu,), ops.swiglu_backward, dy, x)
    for vocab_size in (8_000, 32_000, 128_256):
        scores, targets = random(4, vocab_size), torch.tensor([1, 2, cross_entropy.IGNORE, 3])
        rows = torch.ones(4)
        for name, options in ((f"vocabulary {vocab_size}", (0.0, None, 0.0)), ("all options", (1e-4, 30.0, 0.1))):
            yield name, _recorded((cross_entropy,), ops.cross_entropy_gradient_, scores, targets, *options)
            yield name, _recorded((cross_entropy,), ops.cross_entropy_backward_, rows, scores, targets, rows, *options)


def _launches_of_mixtures(dtype: torch.dtype) -> Iterator[tuple[str, list[Launch]]]:
    ops: Any = torch.ops.bessemer
    for num_experts in (8, 64, 128, 256):
        picks = torch.arange(1_024).remainder(num_experts).view(128, 8)
        yield f"{num_experts} experts", _recorded((moe_route,), ops.moe_route, picks, num_experts)
    # How tall tiles are follows from the rows of an expert: many, or few.
    for hidden, width, num_experts in ((2_048, 1_024, 2), (2_048, 1_024, 16), (2_048, 768, 2), (2_056, 1_030, 2)):
        x, gate_up = torch.zeros(64, hidden, dtype=dtype), torch.zeros(num_experts, 2 * width, hidden, dtype=dtype)
        down, h = torch.zeros(num_experts, hidden, width, dtype=dtype), torch.zeros(512, 2 * width, dtype=dtype)
        picks = torch.arange(512).remainder(num_experts).view(64, 8)
        operands = (x, torch.ones(64, 8), gate_up, down)
        dispatch = moe_route_reference(picks, num_experts)
        name = f"{hidden} x {width}, tiles of {tile_height(512, num_experts)} rows"
        modules = (moe, moe_gemm, moe_combine)
        yield name, _recorded(modules, ops.moe_experts, *operands, *dispatch, True)
        yield name, _recorded(modules, ops.moe_experts_backward, x, *operands, h, *dispatch, True, True, True)


@contextmanager
def _as_on(capability: int) -> Iterator[None]:
    """The grouped products ask the tensors' device how wide their tiles may be: here it says what such a GPU would."""
    widest = moe_gemm._widest
    on_gpu: Any = SimpleNamespace(is_cuda=True, device="cuda")
    with (
        mock.patch.object(moe_gemm, "_widest", lambda tile, _x: widest(tile, on_gpu)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)),
    ):
        yield


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


def _recorded(modules: Sequence[ModuleType], op: Callable[..., Any], *arguments: Any) -> list[Launch]:
    recorded: list[Launch] = []
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
    ]
    try:
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, recorded))
        op(*arguments)
    finally:
        for module, name, kernel in kernels:
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

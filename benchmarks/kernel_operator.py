"""What an operator of `make bench-kernels` is: how its inputs are drawn, what it needs at least, who computes it.

Its functions take their differentiable tensors first, the others after them, and are named as "module:attribute", so
that one that cannot be imported is an error of its own row.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from benchmarks.kernel_peers import IGNORE, Function, Loader

Phase = Literal["fwd", "bwd", "fwd+bwd"]
FORWARD: Phase = "fwd"
BACKWARD: Phase = "bwd"
BOTH: Phase = "fwd+bwd"
PHASES: tuple[Phase, ...] = (FORWARD, BACKWARD, BOTH)

Shape = Mapping[str, int]

# One target in so many is ignored: enough to be computed wrongly, too few to save bytes.
_IGNORED = 128


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one call: those that get a gradient, and the others."""

    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Memory of all of them."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.leaves, *self.others))


class Draw:
    """Random tensors on a device, equal for equal seeds.

    The generator is its own: after a failed capture of a graph, the device's default one refuses to draw.
    """

    def __init__(self, device: str, dtype: torch.dtype, seed: int):
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=self.dtype)

    def targets(self, num_rows: int, vocab_size: int) -> Tensor:
        """Classes, a few of them IGNORE, the first among these."""
        targets = torch.randint(vocab_size, (num_rows,), generator=self._generator, device=self.device)
        targets[::_IGNORED] = IGNORE
        return targets

    def picks(self, num_rows: int, num_picked: int, num_experts: int) -> tuple[Tensor, Tensor]:
        """Distinct experts of each row, all equally likely, and their weights, which add up to 1, in fp32."""
        scores = torch.randn((num_rows, num_experts), generator=self._generator, device=self.device)
        chosen, picks = scores.topk(num_picked)
        return picks, chosen.softmax(dim=1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """A shape, the phases measured at it, and whether the slow compilers and the peers take part."""

    shape: Shape
    phases: tuple[Phase, ...] = PHASES
    with_peers: bool = True
    autotuned: bool = False


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Another function, timed in the same rounds as an operator; its results are nobody's to compare."""

    load: Loader
    inputs: Callable[[Inputs], Inputs]
    """Its tensors, made of the operator's. What it returns has the shape of the operator's outputs."""
    is_equal_work: bool
    """Whether it computes as much as the operator, else a part of what the operator does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One operator: how its inputs are drawn, what it must move or compute, and its implementations."""

    name: str
    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    draw: Callable[[Draw, Shape], Inputs]
    ours: str
    reference: str
    elements: Callable[[Shape], Mapping[Phase, int]] = lambda _shape: {}
    """Elements moved per phase; none for an operator that its matrix products bound."""
    flops: Callable[[Shape], Mapping[Phase, int]] = lambda _shape: {}
    intermediate: Callable[[Shape], int] = lambda _shape: 0
    """Elements of the largest tensor that the reference makes, where that is larger than its inputs."""
    options: Callable[[Shape], dict[str, int]] = lambda _shape: {}
    """Keyword arguments of ours and of the reference."""
    step: str | None = None
    """Our forward and backward in one call, which leaves the gradient in its only leaf and returns the rows' losses."""
    peers: Mapping[str, Loader] = field(default_factory=dict)
    peer_factor: float | None = None
    """How many times eager torch's error a peer may make, where that is more than ours may."""
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)
    compiles_reference: bool = True
    """Whether the reference is a candidate for torch.compile: a loop over sizes that the device knows is not."""
    parts: Callable[[dict[str, Tensor], Inputs], dict[str, Tensor]] = lambda results, _inputs: results
    """Takes results apart whose elements differ so much in size that one scale would hide errors of the small ones."""
    exponent: Callable[[Shape], float] = lambda _shape: 0.0
    """Size of fp32 numbers that are exponentiated: a unit in their last place is so many units of what comes out."""
    gradient_is_one: bool = False
    """Whether the output is a loss, whose gradient is 1; else gradients are random."""
    is_in_place: bool = False
    """Whether implementations overwrite their inputs, which then have to be restored."""
    tiny: tuple[Shape, ...]
    """Shapes for the interpreter."""
    sizes: tuple[Sizes, ...]
    """Shapes of the default run, the most telling first."""
    full: tuple[Sizes, ...] = ()
    """Further shapes of `--full`."""
    knobs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Launch parameters, constants of the kernel's module, and the values that `--sweep` tries; of a dict, entries."""


@dataclass(frozen=True, slots=True)
class Case:
    """An operator at a shape."""

    operator: Operator
    sizes: Sizes

    @property
    def name(self) -> str:
        """Operator and shape, for a reader."""
        return f"{self.operator.name} {label(self.sizes.shape)}"


def label(shape: Shape) -> str:
    """M=16384 d=2048"""
    return " ".join(f"{key}={value}" for key, value in shape.items())


def ours(operator: Operator, shape: Shape) -> Function:
    """Our public function, with the operator's options."""
    return _with_options(pkgutil.resolve_name(operator.ours), operator.options(shape))


def reference(operator: Operator, shape: Shape) -> Function:
    """The specification in plain torch, with the operator's options."""
    return _with_options(pkgutil.resolve_name(operator.reference), operator.options(shape))


def step(operator: Operator) -> Callable[..., Tensor] | None:
    """Our forward and backward in one call: the sum of its losses; the gradient lies in the leaf."""
    if operator.step is None:
        return None
    rows: Callable[..., Tensor] = pkgutil.resolve_name(operator.step)

    def loss_sum(*tensors: Tensor) -> Tensor:
        return rows(*tensors).sum()

    return loss_sum


def _with_options(function: Function, options: dict[str, int]) -> Function:
    if not options:
        return function

    def bound(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return function(*tensors, **options)

    return bound


def sum_of(forward: int, backward: int) -> dict[Phase, int]:
    """What each phase needs, both together what they need apart."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}

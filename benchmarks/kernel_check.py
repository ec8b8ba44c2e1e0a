"""Whether an implementation is right: its errors against a wide reference, with those of eager torch as the measure.

A speed is printed only for an implementation whose every result, output or gradient, errs at most 1.5 times as much as
eager torch in the same dtype on the same inputs, plus one unit in the last place. Integers have to be the true ones.
An operator may allow others more, where they round what eager torch does not.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernel_operator import Case, Draw, Inputs, Operator, reference
from benchmarks.kernel_peers import Function

FACTOR = 1.5
# A wide reference and its gradients hold about so many copies of the inputs at a time.
_WIDE_COPIES = 6
# Large results are compared in pieces: their difference in fp64 would not fit beside them.
_PIECE = 1 << 26
_TINY = torch.finfo(torch.float32).tiny

Results = Mapping[str, Tensor]
"""Outputs by name, and gradients by the name of their leaf, "d" before it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Largest errors per result, relative to the largest true value, and whether they are within the budget."""

    errors: Mapping[str, float]
    eager: Mapping[str, float]
    worst: str
    """The result whose error is the largest part of its budget."""
    is_right: bool

    @property
    def error(self) -> float:
        """Error of the worst result."""
        return self.errors[self.worst]

    @property
    def eager_error(self) -> float:
        """Eager torch's error of the same result."""
        return self.eager[self.worst]


class Judge:
    """Knows a case's true results, and those of eager torch."""

    def __init__(self, case: Case, draw: Draw, free_bytes: float = math.inf):
        self._operator = case.operator
        self._exponent = case.operator.exponent(case.sizes.shape)
        function = reference(case.operator, case.sizes.shape)
        self.inputs = case.operator.draw(draw, case.sizes.shape)
        self.directions = gradient_directions(case.operator, function, self.inputs, draw)
        tensors = (*self.inputs.leaves, *self.inputs.others)
        elements = max(case.operator.intermediate(case.sizes.shape), *(x.numel() for x in tensors))
        wide = torch.float64 if 8 * _WIDE_COPIES * elements < free_bytes else torch.float32
        self._truth = results(
            function, self._operator, _cast(self.inputs, wide), tuple(d.to(wide) for d in self.directions)
        )
        self._eager = self._errors(results(function, self._operator, self.inputs, self.directions))

    def judge(self, found: Results, factor: float = FACTOR) -> Verdict:
        """Compares results of the same inputs and directions."""
        errors = self._errors(found)
        budgets = {
            name: factor * self._eager[name] + _unit(found[name], self.inputs.leaves, self._exponent)
            for name in self._truth
        }
        shares = {name: errors[name] and errors[name] / max(budgets[name], _TINY) for name in errors}
        worst = max(shares, key=lambda name: shares[name])
        return Verdict(errors, self._eager, worst, is_right=shares[worst] <= 1)

    def _errors(self, found: Results) -> dict[str, float]:
        return {name: relative_error(found[name], truth) for name, truth in self._truth.items()}


def results(function: Function, operator: Operator, inputs: Inputs, directions: Sequence[Tensor]) -> Results:
    """Outputs and gradients of one call on a copy of the inputs."""
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in inputs.leaves)
    outputs = as_tuple(function(*leaves, *inputs.others))
    # In-place implementations may overwrite what a view of theirs shows: copies are taken first.
    values = tuple(output.detach().clone() for output in outputs)
    gradients = torch.autograd.grad(outputs, leaves, fitting(directions, outputs)) if leaves else ()
    return _named(operator, inputs, values, [gradient.detach() for gradient in gradients])


def step_results(step: Callable[..., Tensor], operator: Operator, inputs: Inputs) -> Results:
    """Output and gradient of a forward and backward in one call, which leaves the gradient in the leaf."""
    (leaf,) = (leaf.detach().clone() for leaf in inputs.leaves)
    with torch.no_grad():
        loss = step(leaf, *inputs.others)
    return _named(operator, inputs, (loss,), (leaf,))


def gradient_directions(operator: Operator, function: Function, inputs: Inputs, draw: Draw) -> tuple[Tensor, ...]:
    """One gradient per output, in the output's dtype: 1 for a loss, else random; none where nothing gets a gradient."""
    if not operator.leaves:
        return ()
    if operator.gradient_is_one:
        return (torch.ones((), device=draw.device),)
    with torch.no_grad():
        outputs = as_tuple(function(*inputs.leaves, *inputs.others))
    return tuple(draw.normal(*output.shape) for output in outputs)


def fitting(directions: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The directions in the outputs' dtypes: implementations differ in that of a loss."""
    return [direction.to(output.dtype) for direction, output in zip(directions, outputs, strict=True)]


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output is a tuple of one."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value; infinite where something is missing or not a number."""
    if found.shape != truth.shape:
        return math.inf
    if not truth.numel():
        return 0.0
    pairs = zip(found.reshape(-1).split(_PIECE), truth.reshape(-1).split(_PIECE), strict=True)
    errors, scales = zip(*((_largest_difference(f, t), t.abs().max()) for f, t in pairs), strict=True)
    error = torch.stack(errors).max().item() / max(torch.stack(scales).max().item(), _TINY)
    return error if math.isfinite(error) else math.inf


def equal_bits(runs: Iterator[Results]) -> bool:
    """Whether all runs give the same bits."""
    first = next(runs)
    return all(torch.equal(run[name], value) for run in runs for name, value in first.items())


@contextlib.contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Fills memory that torch.empty returns with NaN, so that an element that nobody writes is seen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Only warnings: torch would refuse matrix products for want of a setting that does not matter here.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)


def _named(operator: Operator, inputs: Inputs, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Results:
    named = dict(zip(operator.outputs, outputs, strict=True))
    named.update((f"d{name}", value) for name, value in zip(operator.leaves, gradients, strict=True))
    with torch.no_grad():
        return operator.parts(named, inputs)


def _largest_difference(found: Tensor, truth: Tensor) -> Tensor:
    return (found.double() - truth.double()).abs().max()


def _unit(found: Tensor, leaves: Sequence[Tensor], exponent: float) -> float:
    """One unit in the last place; for a sum of many rounded terms, whose errors are one sample, that of their sum."""
    if not found.is_floating_point():
        return 0.0
    if found.numel() > 1:
        return torch.finfo(found.dtype).eps + exponent * torch.finfo(torch.float32).eps
    return torch.finfo(leaves[0].dtype).eps * leaves[0].shape[0] ** -0.5


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    others = tuple(other.to(dtype) if other.is_floating_point() else other for other in inputs.others)
    return Inputs(tuple(leaf.to(dtype) for leaf in inputs.leaves), others)

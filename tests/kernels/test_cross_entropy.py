import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic
from torch.utils.checkpoint import checkpoint

from kernels import cross_entropy as module
from kernels import launch
from kernels.cross_entropy import (
    IGNORE,
    cross_entropy_gradient_,
    cross_entropy_gradient_reference,
    cross_entropy_rows,
    cross_entropy_rows_reference,
    cross_entropy_sum,
    cross_entropy_sum_reference,
)
from tests.kernels.accuracy import DEVICES, assert_as_accurate, gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALL_OPTIONS: dict[str, Any] = {"z_loss": 1e-2, "soft_cap": 7.0, "label_smoothing": 0.15}
OPTIONS: list[dict[str, Any]] = [{}, *({name: value} for name, value in ALL_OPTIONS.items()), ALL_OPTIONS]
TERMS = 4.0
"""Size of upstream gradients, and so of both terms of a gradient, which nearly cancel where a target is certain."""

OPERATORS = torch.ops.bessemer

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
by_each_implementation = pytest.mark.parametrize("implementation", ["triton", "torch"])


def formula(
    logits: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The losses, row by row."""
    losses = []
    for row, target in zip(logits.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target == IGNORE:
            losses.append(0.0 * row[0])
            continue
        c = row if soft_cap is None else soft_cap * torch.tanh(row / soft_cap)
        lse = torch.log(torch.exp(c - c.max().detach()).sum()) + c.max().detach()
        smooth = label_smoothing * (lse - c).mean() if label_smoothing else 0.0
        losses.append((1 - label_smoothing) * (lse - c[target]) + smooth + z_loss * lse**2)
    return torch.stack(losses).view(targets.shape) if losses else logits.sum(dim=-1)


def random_case(
    shape: tuple[int, ...], vocab_size: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits that require gradients, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    return logits.to(device, dtype).requires_grad_(), targets.to(device)


@contextlib.contextmanager
def implemented_by(implementation: str) -> Iterator[None]:
    launch.choose({"cross_entropy": implementation})
    try:
        yield
    finally:
        launch.choose({})


@contextlib.contextmanager
def blocks_of(width: int) -> Iterator[None]:
    """Rows wider than this are read in several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_ONE_BLOCK", "_ONE_BLOCK_CROWDED", "_BLOCK", "_BACKWARD_BLOCK"):
            patch.setattr(module, name, width)
        yield


def check_against_fp64(logits: Tensor, targets: Tensor, **options) -> None:
    """Losses and gradients, over the logits and beside them, and both in one pass."""
    true_logits = logits.detach().cpu().double().requires_grad_()
    truth, eager = (
        formula(true_logits, targets.cpu(), **options),
        cross_entropy_rows_reference(logits, targets, **options),
    )
    (true_gradient,), (eager_gradient,) = gradients((truth,), (true_logits,)), gradients((eager,), (logits,))
    for given_logits in (logits, logits * 1):
        found = cross_entropy_rows(given_logits, targets, **options)
        assert_as_accurate(found.cpu(), eager.cpu(), truth)
        (gradient,) = gradients((found,), (given_logits,))
        assert_as_accurate(gradient.cpu(), eager_gradient.cpu(), true_gradient, factor=4, terms=TERMS)
    over_logits = logits.detach().flatten(0, -2).clone()
    losses = cross_entropy_gradient_(over_logits, targets.flatten(), **options)
    _, eager_gradient = cross_entropy_gradient_reference(logits.flatten(0, -2), targets.flatten(), **options)
    (true_gradient,) = torch.autograd.grad(formula(true_logits, targets.cpu(), **options).sum(), true_logits)
    assert_as_accurate(losses.view(targets.shape).cpu(), eager.cpu(), truth)
    assert_as_accurate(over_logits.cpu(), eager_gradient.cpu(), true_gradient.flatten(0, -2), factor=4, terms=1.0)


@on_each_device
@by_each_implementation
@in_each_dtype
@with_each_option
def test_losses_and_gradients_are_as_accurate_as_eager_torch(options, dtype, implementation, device):
    with implemented_by(implementation):
        check_against_fp64(*random_case((2, 3), 77, dtype, device), **options)


@on_each_device
@with_each_option
def test_rows_of_several_blocks_are_as_accurate_as_eager_torch(options, device):
    with blocks_of(16):
        check_against_fp64(*random_case((5,), 77, torch.float32, device), **options)
        check_against_fp64(*random_case((5,), 64, torch.bfloat16, device), **options)


@on_each_device
@given(
    num_rows=st.integers(0, 6),
    vocab_size=st.integers(1, 70),
    block=st.sampled_from([4, 16, 64]),
    options=st.sampled_from(OPTIONS),
    implementation=st.sampled_from(["triton", "torch"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_as_accurate_as_eager_torch(device, num_rows, vocab_size, block, options, implementation, seed):
    with blocks_of(block), implemented_by(implementation):
        check_against_fp64(*random_case((num_rows,), vocab_size, torch.float32, device, seed), **options)


@on_each_device
@pytest.mark.parametrize("vocab_size", [16_383, 16_384, 16_385, 32_768, 32_769, 40_000])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_vocabularies_at_the_limits_of_a_block_are_as_accurate_as_eager_torch(options, vocab_size, device):
    logits, targets = random_case((3,), vocab_size, torch.float32, device)
    targets[:] = torch.tensor([vocab_size - 1, IGNORE, 0])
    check_against_fp64(logits, targets, **options)


@on_each_device
@by_each_implementation
@with_each_option
def test_gradients_are_right(options, implementation, device):
    logits, targets = random_case((3,), 5, torch.float64, device)

    def losses(logits: Tensor) -> Tensor:
        # A backward can run once; checkpoint computes the losses again before each.
        once = checkpoint(lambda x: cross_entropy_rows(x * 1, targets, **options), logits, use_reentrant=False)
        assert isinstance(once, Tensor)
        return once

    with implemented_by(implementation), blocks_of(4):
        assert torch.autograd.gradcheck(losses, (logits,), fast_mode=True)


@on_each_device
@by_each_implementation
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_the_mean_over_targets_is_torchs_own(label_smoothing, implementation, device):
    logits, targets = random_case((4, 6), 31, torch.float32, device)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)
    with implemented_by(implementation):
        found = cross_entropy_sum(logits, targets, label_smoothing=label_smoothing) / (targets != IGNORE).sum()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


@on_each_device
@given(split=st.integers(1, 5), seed=st.integers(0, 1000))
def test_sums_of_parts_add_up_to_the_sum_of_the_whole(device, split, seed):
    logits, targets = random_case((1, 6), 20, torch.float64, device, seed)
    parts = [cross_entropy_sum(logits[:, s], targets[:, s]) for s in (slice(0, split), slice(split, 6))]
    whole = cross_entropy_sum(logits, targets)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, cross_entropy_sum_reference(logits, targets), rtol=1e-12, atol=1e-12)


@on_each_device
@by_each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_logits_are_summed_in_fp32(dtype, implementation, device):
    logits, targets = random_case((2, 20), 300, dtype, device)
    with implemented_by(implementation):
        found = cross_entropy_sum(logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(formula(logits.double(), targets).sum().item(), rel=1e-6)


@on_each_device
@by_each_implementation
def test_equal_logits_cost_the_logarithm_of_the_vocabulary(implementation, device):
    with implemented_by(implementation):
        loss_sum = cross_entropy_sum(torch.zeros(5, 32_000, device=device), torch.arange(5, device=device))
    assert loss_sum.item() == pytest.approx(5 * math.log(32_000), rel=1e-6)


@on_each_device
@by_each_implementation
@with_each_option
def test_all_targets_ignored_give_zero_and_no_gradient(options, implementation, device):
    logits, _ = random_case((2, 3), 7, torch.float32, device)
    with implemented_by(implementation):
        loss_sum = cross_entropy_sum(logits, torch.full((2, 3), IGNORE, device=device), **options)
    loss_sum.backward()
    assert loss_sum.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@on_each_device
@by_each_implementation
@pytest.mark.parametrize("block", [4, 64])
def test_whatever_stands_in_ignored_rows_is_ignored(block, implementation, device):
    logits = torch.randn(3, 7, device=device)
    logits[1, ::3] = math.nan
    targets = torch.tensor([2, IGNORE, 4], device=device)
    with implemented_by(implementation), blocks_of(block):
        losses = cross_entropy_gradient_(logits, targets)
    assert losses[1] == 0.0
    assert not logits[1].any()
    assert losses.isfinite().all()


@on_each_device
@by_each_implementation
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}, {"soft_cap": 7.0}], ids=["plain", "z_loss", "soft_cap"])
def test_logits_of_minus_infinity_give_no_nan(options, block, implementation, device):
    logits = torch.full((2, 12), -math.inf, device=device)
    logits[0, 9:11] = 1.0
    logits[1, 0] = 2.0
    targets = torch.tensor([9, 0], device=device)
    expected, expected_gradient = cross_entropy_gradient_reference(logits, targets, **options)
    leaf = logits.clone().requires_grad_()
    with implemented_by(implementation), blocks_of(block):
        losses = cross_entropy_rows(leaf, targets, **options)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        in_one_pass = cross_entropy_gradient_(logits, targets, **options)
    torch.testing.assert_close((losses, in_one_pass), (expected, expected))
    torch.testing.assert_close((gradient, logits), (expected_gradient, expected_gradient))


@on_each_device
@by_each_implementation
def test_large_logits_do_not_overflow(implementation, device):
    logits = torch.tensor([[3e4, 1e4, -3e4], [-3e4, -3e4, -3e4]], device=device)
    with implemented_by(implementation):
        losses = cross_entropy_rows(logits, torch.tensor([1, 2], device=device))
    torch.testing.assert_close(losses.cpu(), torch.tensor([2e4, math.log(3)]))


@on_each_device
def test_a_soft_cap_is_exact_near_zero(device):
    logits = torch.linspace(-1, 1, 97, device=device)[:, None] * torch.tensor([0.0, 1.0], device=device)
    targets = torch.ones(97, dtype=torch.int64, device=device)
    found = cross_entropy_rows(logits, targets, soft_cap=30.0)
    eager = cross_entropy_rows_reference(logits, targets, soft_cap=30.0)
    assert_as_accurate(found.cpu(), eager.cpu(), formula(logits.double(), targets, soft_cap=30.0).cpu())


@pytest.mark.parametrize("target", [-1, 7])
def test_targets_outside_the_vocabulary_are_an_error_in_torch(target: int):
    with implemented_by("torch"), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy_sum(torch.zeros(1, 7), torch.tensor([target]))


@on_each_device
@pytest.mark.parametrize("target", [-1, 7, -(2**40), 2**40])
@pytest.mark.parametrize("block", [4, 64])
def test_targets_outside_the_vocabulary_are_nan_in_triton(block, target, device):
    logits, _ = random_case((3,), 7, torch.float32, device)
    targets = torch.tensor([1, target, 5], device=device)
    valid = torch.tensor([True, False, True], device=device)
    over_logits = logits.detach().clone()
    with blocks_of(block):
        losses = cross_entropy_rows(logits, targets)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        in_one_pass = cross_entropy_gradient_(over_logits, targets)
    assert losses[1].isnan()
    assert in_one_pass[1].isnan()
    assert gradient[1].isnan().all()
    assert over_logits[1].isnan().all()
    torch.testing.assert_close(losses[valid], cross_entropy_rows_reference(logits[valid], targets[valid]))


@on_each_device
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :10],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x.view(4, 2, 24).transpose(0, 1),
        lambda x: x.view(4, 2, 24)[:, :1],
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:, 1],
        lambda x: x[:1],
    ],
    ids=[
        *("narrowed", "every other row", "transposed", "permuted", "shifted", "one row repeated", "one column"),
        "one row",
    ],
)
def test_rows_may_lie_anywhere_in_memory(view, device):
    x, _ = random_case((8,), 24, torch.float32, device)
    logits = view(x)
    targets = (torch.arange(logits[..., 0].numel(), device=device) % 7).view(logits.shape[:-1])
    expected = gradients((cross_entropy_rows(view(x).contiguous(), targets),), (x,))
    for given_logits in (logits, view(x * 1)):
        losses = cross_entropy_rows(given_logits, targets)
        torch.testing.assert_close(losses, cross_entropy_rows_reference(logits, targets))
        assert torch.equal(gradients((losses,), (x,))[0], expected[0])


@on_each_device
def test_what_lies_between_rows_is_not_written(device):
    padded = torch.randn(4, 12, device=device)
    before = padded.clone()
    with blocks_of(4):
        cross_entropy_gradient_(padded[::2, :7], torch.tensor([3, 6], device=device))
    assert torch.equal(padded[1::2], before[1::2])
    assert torch.equal(padded[:, 7:], before[:, 7:])
    assert not (padded[::2, :7] == before[::2, :7]).any()


@on_each_device
def test_targets_and_upstream_gradients_may_be_strided(device):
    logits, _ = random_case((6,), 9, torch.float32, device)
    targets = torch.arange(12, device=device)[::2] % 9
    losses = cross_entropy_rows(logits, targets)
    direction = torch.randn(12, device=device)[::2]
    (found,) = torch.autograd.grad(losses, logits, direction)
    (expected,) = torch.autograd.grad(cross_entropy_rows(logits, targets.clone()), logits, direction.clone())
    assert torch.equal(found, expected)


@on_each_device
def test_the_gradient_is_written_over_the_logits(device):
    hidden = torch.randn(5, 4, device=device, requires_grad=True)
    logits = hidden @ torch.randn(4, 9, device=device)
    loss_sum = cross_entropy_sum(logits, torch.arange(5, device=device))
    (gradient,) = torch.autograd.grad(loss_sum, logits)
    assert gradient.data_ptr() == logits.data_ptr()


@on_each_device
def test_logits_that_are_a_leaf_outlive_their_gradient(device):
    logits, targets = random_case((5,), 9, torch.float32, device)
    before = logits.detach().clone()
    cross_entropy_sum(logits, targets).backward()
    assert logits.grad is not None
    assert torch.equal(logits, before)
    assert logits.grad.data_ptr() != logits.data_ptr()


@on_each_device
@by_each_implementation
def test_a_second_backward_is_an_error_and_not_a_wrong_gradient(implementation, device):
    logits, targets = random_case((1, 5), 9, torch.float32, device)
    with implemented_by(implementation):
        loss_sum = cross_entropy_sum(logits * 1, targets)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


@on_each_device
def test_another_operator_that_kept_the_logits_gets_an_error_and_not_a_wrong_gradient(device):
    x, targets = random_case((5,), 9, torch.float32, device)
    logits = x * 1
    also_needs_them = logits.square().sum()
    cross_entropy_sum(logits, targets).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        also_needs_them.backward()


@on_each_device
def test_gradients_of_two_uses_of_the_same_logits_add_up(device):
    x, targets = random_case((5,), 9, torch.float32, device)
    logits = x * 1
    (found,) = torch.autograd.grad(cross_entropy_sum(logits, targets) + logits.square().sum(), x)
    (expected,) = torch.autograd.grad(cross_entropy_sum_reference(x, targets) + x.square().sum(), x)
    torch.testing.assert_close(found, expected)


@on_each_device
def test_zero_rows_cost_nothing(device):
    logits = torch.empty(0, 3, 7, device=device, requires_grad=True)
    targets = torch.empty(0, 3, dtype=torch.int64, device=device)
    loss_sum = cross_entropy_sum(logits, targets)
    loss_sum.backward()
    assert loss_sum.item() == 0.0
    assert cross_entropy_gradient_(logits.detach().flatten(0, 1), targets.flatten()).shape == (0,)


@on_each_device
def test_every_output_element_is_written(device):
    logits, targets = random_case((6,), 33, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        losses = cross_entropy_rows(logits, targets)
        (gradient,) = gradients((losses,), (logits,))
        in_one_pass = cross_entropy_gradient_(logits.detach().clone(), targets)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in (losses, gradient, in_one_pass))


@on_each_device
def test_equal_inputs_give_equal_bits(device):
    logits, targets = random_case((11,), 65, torch.bfloat16, device)

    def run() -> tuple[Tensor, ...]:
        losses, over_logits = cross_entropy_rows(logits, targets), logits.detach().clone()
        return losses, *gradients((losses,), (logits,)), cross_entropy_gradient_(over_logits, targets), over_logits

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@on_each_device
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_the_operators_keep_torchs_contract(options, device):
    logits, targets = random_case((3,), 10, torch.float32, device)
    values = (options.get("z_loss", 0.0), options.get("soft_cap"), options.get("label_smoothing", 0.0))
    torch.library.opcheck(OPERATORS.cross_entropy.default, (logits, targets, *values))
    logits = logits.detach()
    torch.library.opcheck(OPERATORS.cross_entropy_gradient_.default, (logits.clone(), targets, *values))
    _, softmax = OPERATORS.cross_entropy(logits, targets, *values)
    arguments = (torch.rand(3, device=device), logits, targets, softmax, *values)
    torch.library.opcheck(OPERATORS.cross_entropy_backward.default, arguments)
    torch.library.opcheck(OPERATORS.cross_entropy_backward_.default, arguments)


def check_compiled(backend: str, device: str) -> None:
    logits, targets = random_case((4,), 9, torch.float32, device)

    def of_given(logits: Tensor) -> Tensor:
        return cross_entropy_sum(logits, targets)

    def of_computed(logits: Tensor) -> Tensor:
        return cross_entropy_rows(logits * 2, targets, **ALL_OPTIONS) / 3

    for function in (of_given, of_computed):
        found, expected = torch.compile(function, fullgraph=True, backend=backend)(logits), function(logits)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients((found,), (logits,)), gradients((expected,), (logits,)))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # what Dynamo does itself
@on_each_device
@by_each_implementation
def test_torch_compile_sees_one_graph_and_the_same_numbers(implementation, device):
    torch.compiler.reset()
    with implemented_by(implementation):
        check_compiled("aot_eager", device)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, when torch imports Inductor
@on_each_device
def test_inductor_compiles_the_same_numbers(device, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # a cached graph knows nothing of an operator's changes
    torch.compiler.reset()
    check_compiled("inductor", device)


@on_each_device
def test_a_compiled_gradient_is_written_over_the_logits_too(device):
    logits, targets = random_case((4,), 9, torch.float32, device)
    compiled = torch.compile(cross_entropy_gradient_, fullgraph=True, backend="aot_eager")
    eager_logits, compiled_logits = logits.detach().clone(), logits.detach().clone()
    assert torch.equal(compiled(compiled_logits, targets), cross_entropy_gradient_(eager_logits, targets))
    assert torch.equal(compiled_logits, eager_logits)


@pytest.mark.gpu
def test_logits_beyond_two_to_the_31_are_addressed():
    vocab_size = 32_000
    num_rows = 2**31 // vocab_size + 3
    logits = torch.randn(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    targets = torch.randint(vocab_size, (num_rows,), device="cuda")
    expected, expected_gradient = cross_entropy_gradient_reference(logits[-4:], targets[-4:])
    losses = cross_entropy_rows(logits, targets)
    torch.testing.assert_close(losses[-4:], expected)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy_sum(leaf, targets), leaf)
    torch.testing.assert_close(gradient[-4:], expected_gradient)
    del gradient
    torch.testing.assert_close(cross_entropy_gradient_(logits.detach(), targets)[-4:], expected)
    torch.testing.assert_close(logits.detach()[-4:], expected_gradient)


def test_without_cuda_or_interpreter_the_doors_run_torch(monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    logits, targets = random_case((3,), 7, torch.float32)
    expected, expected_gradient = cross_entropy_gradient_reference(logits, targets)
    over_logits = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_rows(logits, targets), expected)
    torch.testing.assert_close(cross_entropy_gradient_(over_logits, targets), expected)
    torch.testing.assert_close(over_logits, expected_gradient)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"cross_entropy_rows: targets \(2, 4\) for logits \(2, 3, 7\)"):
        cross_entropy_sum(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    "options", [{"z_loss": -1e-4}, {"soft_cap": 0.0}, {"label_smoothing": 1.1}, {"label_smoothing": -0.1}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} = {next(iter(options.values()))}.*; expected"):
        cross_entropy_rows(torch.zeros(1, 7), torch.zeros(1, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(7, 3).T, torch.zeros(1, 7).expand(3, -1), torch.zeros(3, 1, 7)],
    ids=["strided columns", "overlapping rows", "three axes"],
)
def test_logits_that_cannot_be_written_over_are_refused(logits):
    with pytest.raises(ValueError, match="expected a matrix of contiguous rows that do not overlap"):
        cross_entropy_gradient_(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64))

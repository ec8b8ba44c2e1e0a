import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils import deterministic
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch
from kernels.cross_entropy import IGNORE, cross_entropy_sum
from kernels.linear_cross_entropy import (
    default_chunk_rows,
    linear_cross_entropy_sum,
    linear_cross_entropy_sum_reference,
)
from tests.kernels.accuracy import DEVICES, assert_as_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_OPTIONS: dict[str, Any] = {"z_loss": 1e-2, "soft_cap": 7.0, "label_smoothing": 0.15}
OPTIONS: list[dict[str, Any]] = [{}, *({name: value} for name, value in ALL_OPTIONS.items()), ALL_OPTIONS]

on_each_device = pytest.mark.parametrize("device", DEVICES)
with_each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")


def random_case(
    num_rows: int, vocab_size: int, width: int, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head that require gradients, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    head = 3 * torch.randn(vocab_size, width, generator=generator, dtype=torch.float64) / width**0.5
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    targets[torch.rand(num_rows, generator=generator) < 0.3] = IGNORE
    hidden, head = (operand.to(device, dtype).requires_grad_() for operand in (hidden, head))
    return hidden, head, targets.to(device)


def doubled(*operands: Tensor) -> list[Tensor]:
    return [operand.detach().cpu().double().requires_grad_() for operand in operands]


@contextlib.contextmanager
def chosen(**choices: str) -> Iterator[None]:
    launch.choose(choices)
    try:
        yield
    finally:
        launch.choose({})


def check_against_fp64(hidden: Tensor, head: Tensor, targets: Tensor, chunk_rows: int | None, **options) -> None:
    """The sum, and both gradients of a seventh of it."""
    true_operands = doubled(hidden, head)
    truth = linear_cross_entropy_sum_reference(*true_operands, targets.cpu(), **options)
    eager = linear_cross_entropy_sum_reference(hidden, head, targets, **options)
    found = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=chunk_rows, **options)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)
    all_gradients = [
        torch.autograd.grad(loss_sum / 7, operands)
        for loss_sum, operands in ((found, (hidden, head)), (eager, (hidden, head)), (truth, true_operands))
    ]
    for results in zip(*all_gradients, strict=True):
        assert_as_accurate(*(result.cpu() for result in results), factor=4)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_each_option
def test_the_sum_and_its_gradients_are_as_accurate_as_eager_torch(options, dtype, device):
    check_against_fp64(*random_case(11, 40, 24, dtype, device), chunk_rows=4, **options)


@on_each_device
@given(
    num_rows=st.integers(0, 9),
    vocab_size=st.integers(1, 40),
    width=st.integers(1, 20),
    chunk_rows=st.one_of(st.none(), st.integers(1, 12)),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_chunks_equals_whole_logits(device, num_rows, vocab_size, width, chunk_rows, options, seed):
    hidden, head, targets = random_case(num_rows, vocab_size, width, torch.float64, device, seed)
    found = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=chunk_rows, **options)
    expected = linear_cross_entropy_sum_reference(hidden, head, targets, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    found_gradients = torch.autograd.grad(found, (hidden, head))
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=1e-11, atol=1e-12)


@on_each_device
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_a_vocabulary_of_several_blocks_is_as_accurate_as_eager_torch(options, device):
    hidden, head, targets = random_case(3, 40_000, 4, torch.float32, device)
    targets[:] = torch.tensor([39_999, IGNORE, 0])
    check_against_fp64(hidden, head, targets, chunk_rows=2, **options)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_chunks_add_no_error_to_the_gradient_of_the_head(dtype, device):
    hidden, head, targets = random_case(512, 64, 16, dtype, device)
    true_operands = doubled(hidden, head)
    (truth,) = torch.autograd.grad(linear_cross_entropy_sum_reference(*true_operands, targets.cpu()), true_operands[1])

    def error(gradient: Tensor) -> float:
        return (gradient.cpu().double() - truth).norm().item()

    with chosen(cross_entropy="auto" if device == "cuda" else "torch"):  # the interpreter truncates bf16
        (whole,) = torch.autograd.grad(linear_cross_entropy_sum_reference(hidden, head, targets), head)
        (found,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, head, targets, chunk_rows=4), head)
        parts = torch.zeros_like(head)
        for some_hidden, some_targets in zip(hidden.split(4), targets.split(4), strict=True):
            parts += torch.autograd.grad(linear_cross_entropy_sum(some_hidden, head, some_targets), head)[0]
    assert error(found) <= 1.02 * error(whole)
    assert error(parts) > 1.5 * error(whole)  # what adding up in the head's own dtype would have cost


@on_each_device
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_operand_gets_no_gradient_and_costs_none(frozen, device):
    hidden, head, targets = random_case(7, 11, 8, torch.float64, device)
    expected = linear_cross_entropy_sum_reference(hidden, head, targets)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    trained = head if frozen == "hidden" else hidden
    (expected_gradient,) = torch.autograd.grad(linear_cross_entropy_sum_reference(hidden, head, targets), trained)
    with FlopCounterMode(display=False) as counter:
        loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=3)
        (gradient,) = torch.autograd.grad(loss_sum, trained)
    torch.testing.assert_close(loss_sum, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert counter.get_total_flops() == 4 * 7 * 11 * 8


@on_each_device
def test_without_gradients_only_the_loss_is_computed(device):
    hidden, head, targets = random_case(7, 11, 8, torch.float64, device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=3)
    assert not loss_sum.requires_grad
    assert counter.get_total_flops() == 2 * 7 * 11 * 8
    torch.testing.assert_close(loss_sum, linear_cross_entropy_sum_reference(hidden, head, targets).detach())


@on_each_device
def test_flops_of_a_step_are_those_of_whole_logits(device):
    hidden, head, targets = random_case(13, 11, 8, torch.float32, device)
    flops = []
    for function in (linear_cross_entropy_sum, linear_cross_entropy_sum_reference):
        with FlopCounterMode(display=False) as counter:
            function(hidden * 2, head, targets).backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 6 * 13 * 11 * 8


@on_each_device
@with_each_option
def test_gradients_are_right(options, device):
    hidden, head, targets = random_case(4, 5, 3, torch.float64, device)

    def loss_sum(hidden: Tensor, head: Tensor) -> Tensor:
        # A backward can run once; checkpoint computes the forward again before each.
        once = checkpoint(
            lambda *operands: linear_cross_entropy_sum(*operands, targets, chunk_rows=2, **options),
            hidden,
            head,
            use_reentrant=False,
        )
        assert isinstance(once, Tensor)
        return once

    assert torch.autograd.gradcheck(loss_sum, (hidden, head), fast_mode=True)


@on_each_device
def test_batches_and_strides_do_not_matter(device):
    hidden, head, targets = random_case(12, 9, 8, torch.float64, device)
    expected = linear_cross_entropy_sum(hidden, head, targets)
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    strided_hidden = hidden.T.contiguous().T.view(3, 4, 8)
    strided_head = head.T.contiguous().T
    found = linear_cross_entropy_sum(strided_hidden, strided_head, targets.view(3, 4), chunk_rows=5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, head)), expected_gradients)


@on_each_device
def test_chunks_of_which_all_targets_are_ignored_add_nothing(device):
    hidden, head, targets = random_case(8, 9, 5, torch.float64, device)
    targets[:4] = IGNORE
    loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=2)
    expected = linear_cross_entropy_sum(hidden[4:], head, targets[4:])
    torch.testing.assert_close(loss_sum, expected)
    d_hidden, d_head = torch.autograd.grad(loss_sum, (hidden, head))
    assert not d_hidden[:4].any()
    torch.testing.assert_close(d_head, torch.autograd.grad(expected, head)[0])


@on_each_device
def test_zero_rows_give_zero_and_a_zero_gradient_of_the_head(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products refuse to be deterministic
    hidden, head, targets = random_case(0, 9, 5, torch.float32, device)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN now
    try:
        loss_sum = linear_cross_entropy_sum(hidden, head, targets)
        d_hidden, d_head = torch.autograd.grad(loss_sum, (hidden, head))
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss_sum.item() == 0.0
    assert d_hidden.shape == (0, 5)
    assert torch.equal(d_head, torch.zeros_like(head))


@on_each_device
def test_a_second_backward_is_an_error_and_not_a_wrong_gradient(device):
    hidden, head, targets = random_case(5, 9, 4, torch.float32, device)
    loss_sum = linear_cross_entropy_sum(hidden, head, targets)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


@on_each_device
def test_every_output_element_is_written(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products refuse to be deterministic
    hidden, head, targets = random_case(7, 9, 5, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=3)
        results = loss_sum, *torch.autograd.grad(loss_sum, (hidden, head))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


@on_each_device
def test_equal_inputs_give_equal_bits(device):
    hidden, head, targets = random_case(17, 33, 16, torch.bfloat16, device)

    def run() -> tuple[Tensor, ...]:
        loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=5)
        return loss_sum, *torch.autograd.grad(loss_sum, (hidden, head))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@on_each_device
@pytest.mark.parametrize("with_gradients", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_the_operator_keeps_torchs_contract(with_gradients, device):
    hidden, head, targets = random_case(5, 9, 4, torch.float32, device)
    for operand, is_trained in zip((hidden, head), with_gradients, strict=True):
        operand.requires_grad_(is_trained)
    arguments = (hidden, head, targets, 2, *with_gradients, 0.01, None, 0.0)
    torch.library.opcheck(torch.ops.bessemer.linear_cross_entropy.default, arguments)


def check_compiled(backend: str, device: str) -> None:
    hidden, head, targets = random_case(5, 9, 4, torch.float32, device)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy_sum(hidden * 2, head, targets, chunk_rows=2, **ALL_OPTIONS) / 7

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    found, expected = compiled(hidden, head), loss(hidden, head)
    torch.testing.assert_close(found, expected)
    expected_gradients = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, head)), expected_gradients)
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, head), expected.detach())


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    torch.compiler.reset()
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
def test_whole_logits_can_be_chosen(device, monkeypatch):
    hidden, head, targets = random_case(6, 9, 4, torch.float64, device)
    chunked = linear_cross_entropy_sum(hidden, head, targets, **ALL_OPTIONS)
    seen: list[torch.Size] = []

    def spy(logits: Tensor, targets: Tensor, **options) -> Tensor:
        seen.append(logits.shape)
        return cross_entropy_sum(logits, targets, **options)

    monkeypatch.setattr("kernels.linear_cross_entropy.cross_entropy_sum", spy)
    with chosen(linear_cross_entropy="whole"):
        whole = linear_cross_entropy_sum(hidden, head, targets, **ALL_OPTIONS)
    assert seen == [(6, 9)]
    torch.testing.assert_close(whole, chunked)
    operands = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(whole, operands), torch.autograd.grad(chunked, operands))


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that torch held at once, on the CPU, of what it allocated inside the function."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        function()
    held, peak = 0, 0
    kineto = profiled.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    for event in sorted(kineto.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("chunk_rows", [4, 16])
def test_no_more_is_held_than_a_chunk_of_logits_and_the_gradients(chunk_rows, implementation):
    if implementation == "triton" and not launch.INTERPRETED:
        pytest.skip("kernels are compiled")
    num_rows, vocab_size, width = 64, 3_000, 4
    hidden, head, targets = random_case(num_rows, vocab_size, width, torch.float32)

    def step() -> None:
        loss_sum = linear_cross_entropy_sum(hidden, head, targets, chunk_rows=chunk_rows)
        torch.autograd.grad(loss_sum / 7, (hidden, head))

    # In torch, the chunk's log-probabilities beside its logits. Then small change, like one loss a row.
    logits_of_a_chunk = (1 if implementation == "triton" else 2) * chunk_rows * vocab_size
    bound = 4 * (logits_of_a_chunk + hidden.numel() + head.numel()) + 4_096
    with chosen(cross_entropy=implementation):
        assert peak_bytes(step) <= bound
    with chosen(cross_entropy=implementation, linear_cross_entropy="whole"):
        assert peak_bytes(step) > max(bound, 4 * num_rows * vocab_size)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [32_000, 128_256])
def test_on_a_gpu_an_eighth_of_the_memory_of_whole_logits_is_plenty(vocab_size):
    hidden, head, targets = random_case(16_384, vocab_size, 1_024, torch.bfloat16, "cuda")

    def peak(function) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(hidden, head, targets), (hidden, head))
        return torch.cuda.max_memory_allocated() - before

    assert peak(linear_cross_entropy_sum) <= 0.12 * peak(linear_cross_entropy_sum_reference)


@given(num_rows=st.integers(0, 300_000), device_type=st.sampled_from(["cpu", "cuda"]))
def test_default_chunks_are_even_and_within_bounds(num_rows, device_type):
    rows = default_chunk_rows(num_rows, device_type)
    fewest, most = {"cpu": (1_024, 1_024), "cuda": (4_096, 8_192)}[device_type]
    num_chunks = -(-num_rows // rows)
    assert rows % 256 == 0
    assert 0 < rows <= most
    assert num_chunks * rows - num_rows < num_chunks * 256 + 256
    if num_rows > 2 * most:
        assert rows >= fewest // 2


def test_default_chunks_are_a_quarter_of_the_rows_of_a_usual_batch():
    assert [default_chunk_rows(num_rows, "cuda") for num_rows in (16_384, 24_576, 32_768)] == [4_096, 6_144, 8_192]
    assert default_chunk_rows(2_048, "cpu") == 1_024


@pytest.mark.parametrize(
    ("hidden", "head", "targets"),
    [((2, 3, 4), (5, 6), (2, 3)), ((2, 4), (5, 4), (3,)), ((2, 4), (4,), (2,))],
    ids=["widths", "targets", "a vector"],
)
def test_shapes_that_do_not_fit_are_refused(hidden, head, targets):
    with pytest.raises(ValueError, match=r"expected \(..., D\), \(V, D\) and \(...\)"):
        linear_cross_entropy_sum(torch.ones(hidden), torch.ones(head), torch.zeros(targets, dtype=torch.int64))


def test_operands_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="hidden is torch.float32, head torch.bfloat16"):
        linear_cross_entropy_sum(torch.ones(2, 4), torch.ones(3, 4).bfloat16(), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("chunk_rows", [0, -1])
def test_chunks_without_rows_are_refused(chunk_rows):
    operands = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"chunk_rows = {chunk_rows}; expected at least one row"):
        linear_cross_entropy_sum(*operands, chunk_rows=chunk_rows)


def test_options_out_of_range_are_refused():
    operands = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="linear_cross_entropy_sum: z_loss = -1.0"):
        linear_cross_entropy_sum(*operands, z_loss=-1.0)

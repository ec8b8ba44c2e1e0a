from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch
from kernels.cross_entropy import IGNORE
from kernels.linear_log_probs import linear_log_probs, linear_log_probs_and_entropy, linear_log_probs_reference
from tests.kernels.accuracy import DEVICES, assert_as_accurate, gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [{}, {"soft_cap": 3.0}, {"temperature": 0.7}, {"soft_cap": 3.0, "temperature": 1.3}]

on_each_device = pytest.mark.parametrize("device", DEVICES)
with_each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")


@pytest.fixture(params=["triton", "torch"], autouse=True)
def _implementation(request: pytest.FixtureRequest):
    launch.choose({"cross_entropy": request.param})
    yield
    launch.choose({})


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


def formula(hidden: Tensor, head: Tensor, targets: Tensor, soft_cap: float | None = None, temperature: float = 1.0):
    """Log-probabilities and entropies, row by row."""
    rows = []
    for h, target in zip(hidden, targets.tolist(), strict=True):
        c = (soft_cap * torch.tanh(head @ h / soft_cap) if soft_cap else head @ h) / temperature
        p = torch.exp(c) / torch.exp(c).sum()
        rows.append((0.0 * p.sum() if target == IGNORE else torch.log(p[target]), -(p * torch.log(p)).sum()))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@with_each_option
def test_the_reference_is_the_formula(options):
    operands = random_case(9, 7, 5)
    torch.testing.assert_close(linear_log_probs_reference(*operands, **options), formula(*operands, **options)[0])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@with_each_option
def test_log_probabilities_and_their_gradients_are_as_accurate_as_eager_torch(options, dtype, device):
    hidden, head, targets = random_case(11, 40, 24, dtype, device)
    truths = hidden.detach().cpu().double().requires_grad_(), head.detach().cpu().double().requires_grad_()
    truth = linear_log_probs_reference(*truths, targets.cpu(), **options)
    eager = linear_log_probs_reference(hidden, head, targets, **options)
    found = linear_log_probs(hidden, head, targets, chunk_rows=4, **options)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)
    all_gradients = [
        gradients((log_probs,), operands)
        for log_probs, operands in ((found, (hidden, head)), (eager, (hidden, head)), (truth, truths))
    ]
    for results in zip(*all_gradients, strict=True):
        assert_as_accurate(*(result.cpu() for result in results), factor=4)


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
    found = linear_log_probs(hidden, head, targets, chunk_rows=chunk_rows, **options)
    expected = linear_log_probs_reference(hidden, head, targets, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    results = [gradients((log_probs,), (hidden, head)) for log_probs in (found, expected)]
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@on_each_device
@with_each_option
def test_gradients_are_right(options, device):
    hidden, head, targets = random_case(4, 5, 3, torch.float64, device)

    def log_probs(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_log_probs(hidden, head, targets, chunk_rows=3, **options)

    assert (targets == IGNORE).any()
    assert torch.autograd.gradcheck(log_probs, (hidden, head))


@on_each_device
@with_each_option
def test_entropies_are_those_of_the_whole_distributions(options, device, monkeypatch):
    monkeypatch.setattr("kernels.linear_log_probs._ENTROPY_ROWS", 2)
    hidden, head, targets = random_case(8, 11, 5, device=device)
    log_probs, entropies = linear_log_probs_and_entropy(hidden, head, targets, chunk_rows=5, **options)
    torch.testing.assert_close((log_probs, entropies), formula(hidden, head, targets, **options))
    assert not entropies.requires_grad
    assert torch.equal(log_probs, linear_log_probs(hidden, head, targets, chunk_rows=5, **options))


@on_each_device
def test_what_comes_from_above_at_ignored_rows_does_not_matter(device):
    hidden, head, targets = random_case(8, 9, 5, torch.float64, device)
    is_ignored = targets == IGNORE
    assert 0 < is_ignored.sum() < 8
    upstream = torch.ones(8, dtype=torch.float64, device=device)
    log_probs = linear_log_probs(hidden, head, targets, chunk_rows=3)
    expected = torch.autograd.grad(log_probs, (hidden, head), upstream, retain_graph=True)
    found = torch.autograd.grad(log_probs, (hidden, head), upstream.masked_fill(is_ignored, torch.nan))
    assert not log_probs[is_ignored].any()
    assert not found[0][is_ignored].any()
    torch.testing.assert_close(found, expected)


@on_each_device
def test_logits_far_from_zero_neither_overflow_nor_lose_the_difference(device):
    hidden, targets = torch.tensor([[1.0]], device=device), torch.tensor([1], device=device)
    head = torch.tensor([[2.0e4], [2.0e4 - 1.0], [-2.0e4]], device=device, requires_grad=True)
    log_prob, entropy = linear_log_probs_and_entropy(hidden, head, targets)
    p = torch.tensor([1.0, -1.0]).sigmoid()
    torch.testing.assert_close((log_prob.cpu(), entropy.cpu()), (p[1:].log(), -(p * p.log()).sum()[None]))
    expected = torch.stack((-p[0], p[0], torch.tensor(0.0)))[:, None]
    torch.testing.assert_close(torch.autograd.grad(log_prob, head)[0].cpu(), expected)


@on_each_device
def test_a_vocabulary_of_several_blocks_equals_whole_logits(device):
    hidden, head, _ = random_case(3, 40_000, 4, torch.float64, device)
    targets = torch.tensor([39_999, IGNORE, 0], device=device)
    found = linear_log_probs(hidden, head, targets, chunk_rows=2)
    expected = linear_log_probs_reference(hidden, head, targets)
    torch.testing.assert_close(found, expected)
    results = [gradients((log_probs,), (hidden, head)) for log_probs in (found, expected)]
    torch.testing.assert_close(*results)


@on_each_device
def test_many_chunks_add_no_error_to_the_gradient_of_the_head(device):
    hidden, head, targets = random_case(512, 64, 16, torch.bfloat16, device)
    truths = hidden.detach().cpu().double(), head.detach().cpu().double().requires_grad_()

    def error(log_probs: Tensor, operand: Tensor = head) -> float:
        return (torch.autograd.grad(log_probs.sum(), operand)[0].cpu().double() - truth).norm().item()

    (truth,) = torch.autograd.grad(linear_log_probs_reference(*truths, targets.cpu()).sum(), truths[1])
    whole = error(linear_log_probs_reference(hidden, head, targets))
    launch.choose({"cross_entropy": "auto" if device == "cuda" else "torch"})  # the interpreter truncates bf16
    assert error(linear_log_probs(hidden, head, targets, chunk_rows=4)) <= 1.05 * whole


@on_each_device
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_operand_gets_no_gradient_and_costs_none(frozen, device):
    hidden, head, targets = random_case(7, 11, 8, torch.float64, device)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    trained = head if frozen == "hidden" else hidden
    expected = gradients((linear_log_probs_reference(hidden, head, targets),), (trained,))
    with FlopCounterMode(display=False) as counter:
        log_probs = linear_log_probs(hidden, head, targets, chunk_rows=3)
        forward_flops = counter.get_total_flops()
        found = gradients((log_probs,), (trained,))
    torch.testing.assert_close(found, expected)
    assert (forward_flops, counter.get_total_flops()) == (2 * 7 * 11 * 8, 6 * 7 * 11 * 8)


@on_each_device
def test_batches_and_strides_do_not_matter(device):
    hidden, head, targets = random_case(12, 9, 8, torch.float64, device)
    expected = linear_log_probs(hidden, head, targets)
    strided = hidden.T.contiguous().T.view(3, 4, 8), head.T.contiguous().T, targets.view(3, 4)
    found = linear_log_probs(*strided, chunk_rows=5)
    assert not found._is_view()  # FSDP would warn
    torch.testing.assert_close(found.flatten(), expected)
    results = [gradients((log_probs.flatten(),), (hidden, head)) for log_probs in (found, expected)]
    torch.testing.assert_close(*results)


@on_each_device
def test_every_output_element_is_written_and_equal_inputs_give_equal_bits(device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products refuse to be deterministic
    hidden, head, targets = random_case(7, 9, 5, torch.float32, device)

    def run() -> tuple[Tensor, ...]:
        results = linear_log_probs_and_entropy(hidden, head, targets, chunk_rows=3)
        return *results, *gradients(results[:1], (hidden, head))

    first = run()
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN now
    try:
        second = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*results) for results in zip(first, second, strict=True))


@on_each_device
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_the_operators_keep_torchs_contract(wanted, device):
    hidden, head, targets = random_case(5, 9, 4, torch.float32, device)
    for operand, is_trained in zip((hidden, head), wanted, strict=True):
        operand.requires_grad_(is_trained)
    arguments = (hidden, head, targets, 2, None, 1.0, wanted[0])
    torch.library.opcheck(torch.ops.bessemer.linear_log_probs.default, arguments)
    hidden, head = hidden.detach(), head.detach()
    softmax = torch.ops.bessemer.linear_log_probs(hidden, head, targets, 2, None, 1.0, False)[1]
    arguments = (torch.ones(5, device=device), hidden, head, targets, softmax, 2, None, 1.0, *wanted)
    torch.library.opcheck(torch.ops.bessemer.linear_log_probs_backward.default, arguments)


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    torch.compiler.reset()
    hidden, head, targets = random_case(5, 9, 4, torch.float32, device)

    def objective(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_log_probs(hidden * 2, head, targets, soft_cap=5.0, temperature=0.8, chunk_rows=2).square().sum()

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    found, expected = compiled(hidden, head), objective(hidden, head)
    torch.testing.assert_close(found, expected)
    operands = (hidden, head)
    torch.testing.assert_close(torch.autograd.grad(found, operands), torch.autograd.grad(expected, operands))


@pytest.mark.gpu
def test_on_a_gpu_an_eighth_of_the_memory_of_whole_logits_is_plenty():
    hidden, head, targets = random_case(16_384, 32_000, 1_024, torch.bfloat16, "cuda")

    def peak(function) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(hidden, head, targets).square().sum(), (hidden, head))
        return torch.cuda.max_memory_allocated() - before

    launch.choose({})
    assert peak(linear_log_probs) <= 0.12 * peak(linear_log_probs_reference)


@pytest.mark.parametrize(
    ("hidden", "head", "targets"),
    [((2, 3, 4), (5, 6), (2, 3)), ((2, 4), (5, 4), (3,)), ((2, 4), (4,), (2,))],
    ids=["widths", "targets", "a vector"],
)
def test_shapes_that_do_not_fit_are_refused(hidden, head, targets):
    with pytest.raises(ValueError, match=r"expected \(..., D\), \(V, D\) and \(...\)"):
        linear_log_probs(torch.ones(hidden), torch.ones(head), torch.zeros(targets, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature = 0.0; expected more than 0"),
        ({"soft_cap": -1.0}, "soft_cap = -1.0"),
        ({"chunk_rows": 0}, "chunk_rows = 0; expected at least one row"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(options, message):
    operands = torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_log_probs(*operands, **options)


def test_operands_of_two_dtypes_are_refused():
    with pytest.raises(ValueError, match="hidden is torch.float32, head torch.bfloat16"):
        linear_log_probs(torch.ones(2, 4), torch.ones(3, 4).bfloat16(), torch.zeros(2, dtype=torch.int64))

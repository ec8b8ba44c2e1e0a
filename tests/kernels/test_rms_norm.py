import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from kernels.rms_norm import MAX_WIDTH, add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.accuracy import DEVICES, assert_as_accurate, gradients

EPS = 1e-5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def formula(x: Tensor, w: Tensor) -> Tensor:
    """Equation 3 of the paper, in fp64."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * w


def random_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=generator) for _ in range(2))
    w = 1 + 0.3 * torch.randn(shape[-1:], generator=generator)
    return tuple(t.to(device, dtype).requires_grad_() for t in (x, residual, w))


def gradient_terms(h: Tensor) -> float:
    """Size of the two terms of dx: of very narrow rows, dx is a small difference of large numbers."""
    return (2 / torch.sqrt((h * h).mean(dim=-1) + EPS)).max().item() if h.numel() else 0.0


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().cpu().double().requires_grad_() for t in tensors)


def check_against_fp64(x: Tensor, w: Tensor) -> None:
    truth_inputs = doubled(x, w)
    truth = formula(*truth_inputs)
    found, eager = rms_norm(x, w, EPS), rms_norm_reference(x, w, EPS)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)
    all_gradients = (
        gradients((found,), (x, w)),
        gradients((eager,), (x, w)),
        gradients((truth,), truth_inputs),
    )
    for results in zip(*all_gradients, strict=True):
        assert_as_accurate(*(result.cpu() for result in results), factor=4, terms=gradient_terms(truth_inputs[0]))


def check_fused_against_fp64(x: Tensor, residual: Tensor, w: Tensor) -> None:
    truth_inputs = doubled(x, residual, w)
    true_h = truth_inputs[0] + truth_inputs[1]
    truth = (formula(true_h, truth_inputs[2]), true_h)
    found, eager = add_rms_norm(x, residual, w, EPS), add_rms_norm_reference(x, residual, w, EPS)
    inputs = (x, residual, w)
    for results in zip(found, eager, truth, strict=True):
        assert_as_accurate(*(result.cpu() for result in results))
    all_gradients = gradients(found, inputs), gradients(eager, inputs), gradients(truth, truth_inputs)
    for results in zip(*all_gradients, strict=True):
        assert_as_accurate(*(result.cpu() for result in results), factor=4, terms=gradient_terms(true_h))


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 33), (1, 1000), (300, 5), (37, 300), (1, 1)], ids=str)
def test_output_and_gradients_are_as_accurate_as_eager_torch(shape, dtype, device):
    x, _, w = random_inputs(shape, dtype, device)
    check_against_fp64(x, w)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 33), (1, 1000), (300, 5), (37, 300)], ids=str)
def test_fused_addition_is_as_accurate_as_eager_torch(shape, dtype, device):
    check_fused_against_fp64(*random_inputs(shape, dtype, device))


@on_each_device
@given(num_rows=st.integers(0, 40), width=st.integers(1, 300), seed=st.integers(0, 1000), fused=st.booleans())
def test_any_shape_is_as_accurate_as_eager_torch(device, num_rows, width, seed, fused):
    x, residual, w = random_inputs((num_rows, width), torch.float32, device, seed)
    if fused:
        check_fused_against_fp64(x, residual, w)
    else:
        check_against_fp64(x, w)


@on_each_device
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :10],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x.view(4, 2, 24).transpose(0, 1),
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:, 1],
    ],
    ids=["narrowed", "every other row", "transposed", "permuted", "one row repeated", "one column"],
)
def test_rows_may_lie_anywhere_in_memory(view, device):
    x, residual, _ = random_inputs((8, 24), torch.float32, device)
    x, residual = view(x), view(residual)
    w = torch.linspace(0.5, 1.5, x.shape[-1], device=device)
    assert torch.equal(rms_norm(x, w), rms_norm(x.contiguous(), w))
    for strided, packed in zip(
        add_rms_norm(x, residual, w), add_rms_norm(x.contiguous(), residual.contiguous(), w), strict=True
    ):
        assert torch.equal(strided, packed)
    expected = gradients((rms_norm(x.contiguous(), w),), (x,))
    assert torch.equal(gradients((rms_norm(x, w),), (x,))[0], expected[0])


@on_each_device
def test_a_strided_weight_and_gradient_are_read_where_they_lie(device):
    x, residual, _ = random_inputs((6, 16), torch.float32, device)
    w = torch.linspace(0.5, 1.5, 32, device=device)[::2]
    y = rms_norm(x, w)
    assert torch.equal(y, rms_norm(x, w.contiguous()))
    strided = residual.detach().T.contiguous().T
    (found,) = torch.autograd.grad(y, x, strided, retain_graph=True)
    (expected,) = torch.autograd.grad(y, x, strided.contiguous())
    assert torch.equal(found, expected)


def padded(x: Tensor, num_columns: int) -> Tensor:
    """x with so many elements between its rows."""
    return F.pad(x, (0, num_columns), value=1e3)[:, : x.shape[1]]


@on_each_device
def test_each_operand_and_gradient_has_a_stride_of_its_own(device):
    inputs = x, residual, w = random_inputs((6, 16), torch.float32, device)
    dy, dh = (torch.randn(6, 16, device=device) for _ in range(2))
    expected = add_rms_norm(x, residual, w)
    found = add_rms_norm(padded(x, 1), padded(residual, 2), w)
    expected_gradients = torch.autograd.grad(expected, inputs, (dy, dh))
    found_gradients = torch.autograd.grad(found, inputs, (padded(dy, 3), padded(dh, 4)))
    for one_found, one_expected in zip((*found, *found_gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one_found, one_expected)


@on_each_device
@pytest.mark.parametrize("used", ["the norm", "the sum"])
def test_a_gradient_of_one_of_two_outputs_is_enough(used, device):
    inputs = random_inputs((5, 12), torch.float64, device)
    index = 0 if used == "the norm" else 1
    found = torch.autograd.grad(add_rms_norm(*inputs)[index].square().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(add_rms_norm_reference(*inputs)[index].square().sum(), inputs, allow_unused=True)
    for one_found, one_expected in zip(found, expected, strict=True):
        if one_expected is None:
            assert one_found is None or not one_found.any()
        else:
            torch.testing.assert_close(one_found, one_expected, rtol=1e-6, atol=1e-6)


@on_each_device
def test_the_fused_norm_is_that_of_the_sum_as_stored(device):
    x, residual, w = random_inputs((40, 32), torch.bfloat16, device)
    y, h = add_rms_norm(x, residual, w)
    assert torch.equal(y, rms_norm(h, w))


@on_each_device
def test_squares_beyond_the_range_of_fp16_do_not_overflow(device):
    x, _, w = random_inputs((5, 40), torch.float16, device)
    torch.testing.assert_close(rms_norm(1024 * x, w), rms_norm(x, w), rtol=2e-3, atol=1e-4)


@on_each_device
def test_zero_rows_give_zero_rows_and_a_zero_weight_gradient(device):
    x, residual, w = random_inputs((0, 8), torch.float32, device)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN now
    try:
        y, h = add_rms_norm(x, residual, w)
        dx, dresidual, dw = torch.autograd.grad(y.sum() + h.sum(), (x, residual, w))
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.shape == h.shape == (0, 8)
    assert dx.shape == dresidual.shape == (0, 8)
    assert torch.equal(dw, torch.zeros_like(w))


@on_each_device
def test_a_row_of_zeros_gives_zeros_and_finite_gradients(device):
    x = torch.zeros(2, 16, device=device, requires_grad=True)
    w = torch.ones(16, device=device, requires_grad=True)
    y = rms_norm(x, w)
    assert not y.any()
    assert all(gradient.isfinite().all() for gradient in gradients((y,), (x, w)))


@on_each_device
def test_every_output_element_is_written(device):
    x, residual, w = random_inputs((37, 300), torch.float32, device)  # padded rows, a partial last tile
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        outputs = add_rms_norm(x, residual, w)
        results = (*outputs, *gradients(outputs, (x, residual, w)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


@on_each_device
def test_equal_inputs_give_equal_bits(device):
    x, residual, w = random_inputs((37, 65), torch.float32, device)

    def run() -> tuple[Tensor, ...]:
        outputs = add_rms_norm(x, residual, w)
        return (*outputs, *gradients(outputs, (x, residual, w)))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_residual", [False, True])
def test_the_forward_operator_keeps_torchs_contract(has_residual, dtype, device):
    x, residual, w = random_inputs((3, 10), dtype, device)
    torch.library.opcheck(torch.ops.bessemer.rms_norm.default, (x, residual if has_residual else None, w, EPS))


@on_each_device
@pytest.mark.parametrize("has_dh", [False, True])
def test_the_backward_operator_keeps_torchs_contract(has_dh, device):
    dy, dh, h = (torch.randn(3, 10, device=device) for _ in range(3))
    rstd = torch.rand(3, device=device) + 0.5
    arguments = (dy, dh if has_dh else None, h, torch.ones(10, device=device), rstd)
    torch.library.opcheck(torch.ops.bessemer.rms_norm_backward.default, arguments)


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    inputs = random_inputs((4, 24), torch.float32, device)

    def block(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y, h = add_rms_norm(x * 2, residual, w)
        return rms_norm(y, w) + 1, h

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), block(*inputs), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(gradients(compiled(*inputs), inputs), gradients(block(*inputs), inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_without_cuda_or_interpreter_the_door_runs_the_reference(monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    x, residual, w = random_inputs((3, 7), torch.float32, "cpu")
    assert torch.equal(rms_norm(x, w), rms_norm_reference(x, w))
    assert torch.equal(add_rms_norm(x, residual, w)[0], add_rms_norm_reference(x, residual, w)[0])


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"w has shape \(4,\), x's last axis is 5"):
        rms_norm(torch.ones(2, 5), torch.ones(4))


def test_rows_too_wide_for_one_program_are_refused():
    width = MAX_WIDTH + 1
    with pytest.raises(ValueError, match=f"rows of {width} elements; at most {MAX_WIDTH}"):
        rms_norm(torch.ones(1, width), torch.ones(width))


@pytest.mark.parametrize("residual", [torch.ones(2, 4), torch.ones(2, 5, dtype=torch.float64)], ids=["shape", "dtype"])
def test_a_residual_unlike_x_is_refused(residual):
    with pytest.raises(ValueError, match="residual is"):
        add_rms_norm(torch.ones(2, 5), residual, torch.ones(5))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from kernels.swiglu import swiglu, swiglu_reference
from tests.kernels.accuracy import DEVICES, assert_as_accurate, gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def formula(x: Tensor) -> Tensor:
    gate, up = x.tensor_split(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def random_input(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).requires_grad_()


def check_against_fp64(x: Tensor) -> None:
    true_x = x.detach().cpu().double().requires_grad_()
    found, eager, truth = swiglu(x), swiglu_reference(x), formula(true_x)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)
    results = gradients((found,), (x,)), gradients((eager,), (x,)), gradients((truth,), (true_x,))
    assert_as_accurate(*(result[0].cpu() for result in results))


def test_the_reference_is_the_formula():
    x = random_input((3, 10), torch.float64, "cpu")
    torch.testing.assert_close(swiglu_reference(x), formula(x))


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("shape", [(7, 96), (2, 3, 66), (1, 2_500), (300, 6), (1, 2), (2,)], ids=str)
def test_output_and_gradient_are_as_accurate_as_eager_torch(shape, dtype, device):
    check_against_fp64(random_input(shape, dtype, device))


@on_each_device
@given(
    shape=st.lists(st.integers(0, 5), max_size=2),
    width=st.one_of(st.integers(0, 70), st.integers(1_000, 1_100)),
    seed=st.integers(0, 99),
)
def test_any_shape_is_as_accurate_as_eager_torch(device, shape, width, seed):
    x = random_input((*shape, 2 * width), torch.float32, device, seed)
    assert swiglu(x).shape == (*shape, width)
    check_against_fp64(x)


@on_each_device
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :10],
        lambda x: x[::2],
        lambda x: x.T,
        lambda x: x.view(4, 2, 24).transpose(0, 1),
        lambda x: x[:1].expand(5, -1),
        lambda x: x[:, ::2],
    ],
    ids=["narrowed", "every other row", "transposed", "permuted", "one row repeated", "every other column"],
)
def test_rows_may_lie_anywhere_in_memory(view, device):
    x = random_input((8, 24), torch.float32, device)
    strided = view(x)
    assert torch.equal(swiglu(strided), swiglu(strided.contiguous()))
    (expected,) = gradients((swiglu(strided.contiguous()),), (x,))
    assert torch.equal(gradients((swiglu(strided),), (x,))[0], expected)


@on_each_device
def test_a_strided_gradient_is_read_where_it_lies(device):
    x = random_input((6, 32), torch.float32, device)
    y = swiglu(x)
    for direction in (torch.randn(16, 6, device=device).T, torch.randn(6, 20, device=device)[:, :16]):
        (found,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        (expected,) = torch.autograd.grad(y, x, direction.contiguous(), retain_graph=True)
        assert torch.equal(found, expected)


@on_each_device
def test_gradients_are_right(device):
    x = torch.randn(3, 10, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))


@on_each_device
def test_the_gate_is_the_first_half(device):
    def product(gate: float, up: float) -> float:
        return swiglu(torch.tensor([gate, up], device=device)).item()

    assert product(0.0, 5.0) == 0.0
    assert product(5.0, 0.0) == 0.0
    assert product(50.0, 3.0) == pytest.approx(150.0)
    assert product(-50.0, 3.0) == pytest.approx(0.0, abs=1e-15)


@on_each_device
@pytest.mark.parametrize("gate", [-1e4, -200.0, 200.0, 1e4])
def test_a_gate_far_from_zero_is_open_or_closed(gate, device):
    x = torch.tensor([gate, 3.0], device=device, requires_grad=True)
    y = swiglu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    opened = float(gate > 0)
    torch.testing.assert_close(y.cpu(), torch.tensor([3.0 * gate * opened]))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([3.0 * opened, gate * opened]))


@on_each_device
def test_every_output_element_is_written(device):
    x = random_input((5, 2_200), torch.float32, device)  # partial tiles at both ends
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        y = swiglu(x)
        (gradient,) = gradients((y,), (x,))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not y.isnan().any()
    assert not gradient.isnan().any()


@on_each_device
def test_equal_inputs_give_equal_bits(device):
    x = random_input((37, 66), torch.bfloat16, device)
    assert torch.equal(swiglu(x), swiglu(x))
    assert torch.equal(gradients((swiglu(x),), (x,))[0], gradients((swiglu(x),), (x,))[0])


@on_each_device
def test_the_operators_keep_torchs_contract(device):
    x = random_input((3, 10), torch.float32, device)
    torch.library.opcheck(torch.ops.bessemer.swiglu.default, (x,))
    torch.library.opcheck(torch.ops.bessemer.swiglu_backward.default, (x.detach()[:, :5], x.detach()))


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    x = random_input((4, 24), torch.float32, device)

    def block(x: Tensor) -> Tensor:
        return swiglu(x * 2) + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))
    torch.testing.assert_close(gradients((compiled(x),), (x,)), gradients((block(x),), (x,)))


def test_without_cuda_or_interpreter_the_door_runs_the_reference(monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    x = random_input((3, 8), torch.bfloat16, "cpu")
    assert torch.equal(swiglu(x), swiglu_reference(x))


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"last axis of \(2, 5\) is odd"):
        swiglu(torch.ones(2, 5))

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.swiglu import swiglu
from tests.kernels.accuracy import assert_as_accurate


def formula(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.tensor_split(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@given(shape=st.lists(st.integers(0, 5), max_size=2), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_output_is_the_formula(shape, width, seed):
    x = torch.randn(*shape, 2 * width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = swiglu(x)
    assert y.shape == (*shape, width)
    torch.testing.assert_close(y, formula(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_loses_no_more_than_its_own_rounding(dtype):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = formula(x.double())
    assert_as_accurate(swiglu(x), truth.to(dtype), truth, factor=4)


def test_gradients_are_right():
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_the_gate_is_the_first_half():
    assert swiglu(torch.tensor([0.0, 5.0])).item() == 0.0
    assert swiglu(torch.tensor([5.0, 0.0])).item() == 0.0
    assert swiglu(torch.tensor([50.0, 3.0])).item() == pytest.approx(150.0)
    assert swiglu(torch.tensor([-50.0, 3.0])).item() == pytest.approx(0.0, abs=1e-15)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"last axis of \(2, 5\) is odd"):
        swiglu(torch.ones(2, 5))

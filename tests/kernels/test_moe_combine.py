import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from kernels import launch
from kernels.moe_combine import launch_combine, moe_combine, moe_combine_reference
from tests.kernels.accuracy import DEVICES, assert_as_accurate

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_case(
    num_tokens: int, picks: int, width: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, rows, weights); the rows of all slots are all rows of o."""
    generator = torch.Generator().manual_seed(seed)
    o = torch.randn(num_tokens * picks, width, generator=generator)
    rows = torch.randperm(num_tokens * picks, generator=generator).view(num_tokens, picks)
    weights = torch.rand(num_tokens, picks, generator=generator)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return o.to(device, dtype), rows.to(device, torch.int32), weights.to(device, sum_dtype)


def check(o: Tensor, rows: Tensor, weights: Tensor | None) -> None:
    true_weights = torch.ones(rows.shape, dtype=torch.float64) if weights is None else weights.cpu().double()
    truth = torch.einsum("mj,mjd->md", true_weights, o.cpu().double()[rows.cpu()])
    found, eager = moe_combine(o, rows, weights), moe_combine_reference(o, rows, weights)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)


def test_the_reference_is_the_formula_summed_in_at_least_fp32():
    for dtype in (torch.float64, torch.bfloat16):
        o, rows, weights = random_case(30, 6, 20, dtype, "cpu")
        truth = torch.einsum("mj,mjd->md", weights.double(), o.double()[rows])
        torch.testing.assert_close(moe_combine_reference(o, rows, weights), truth.to(dtype), rtol=0, atol=1e-14)
        truth = o.double()[rows].sum(dim=1)
        torch.testing.assert_close(moe_combine_reference(o, rows), truth.to(dtype), rtol=0, atol=1e-14)


@on_each_device
@in_each_dtype
@pytest.mark.parametrize("is_weighted", [True, False])
@pytest.mark.parametrize("shape", [(7, 2, 96), (1, 8, 33), (50, 1, 5), (3, 3, 1_100), (90, 4, 24)], ids=str)
def test_it_is_as_accurate_as_eager_torch(shape, is_weighted, dtype, device):
    o, rows, weights = random_case(*shape, dtype, device)
    check(o, rows, weights if is_weighted else None)


@on_each_device
@given(
    num_tokens=st.integers(0, 9), picks=st.integers(1, 5), width=st.integers(1, 70), is_weighted=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_is_as_accurate_as_eager_torch(device, num_tokens, picks, width, is_weighted, seed):
    o, rows, weights = random_case(num_tokens, picks, width, torch.float32, device, seed)
    assert moe_combine(o, rows).shape == (num_tokens, width)
    check(o, rows, weights if is_weighted else None)


@on_each_device
def test_slots_are_added_in_their_order_each_product_rounded(device):
    o, rows, weights = random_case(40, 5, 24, torch.float32, device)
    expected = torch.zeros(40, 24, device=device)
    for pick in range(5):
        expected = expected + weights[:, pick, None] * o[rows[:, pick]]
    assert torch.equal(moe_combine(o, rows, weights), expected)


@on_each_device
@in_each_dtype
def test_which_of_two_picks_is_the_first_does_not_matter(dtype, device):
    o, rows, weights = random_case(60, 2, 40, dtype, device)
    assert torch.equal(moe_combine(o, rows, weights), moe_combine(o, rows.flip(1), weights.flip(1)))
    assert torch.equal(moe_combine(o, rows), moe_combine(o, rows.flip(1)))


@on_each_device
def test_rows_may_lie_anywhere_in_memory(device):
    o, rows, weights = random_case(6, 2, 24, torch.float32, device)
    for strided in (o[:, :10], o.T.contiguous().T, o[:, ::2], o[:1].expand(12, -1)):
        assert torch.equal(moe_combine(strided, rows, weights), moe_combine(strided.contiguous(), rows, weights))
    expected = moe_combine(o, rows, weights)
    assert torch.equal(moe_combine(o, rows.T.contiguous().T, weights.T.contiguous().T), expected)


@on_each_device
def test_every_element_is_written(device):
    o, rows, weights = random_case(5, 3, 1_100, torch.float32, device)  # partial tiles at both ends
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        y = moe_combine(o, rows, weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not y.isnan().any()


def test_without_cuda_or_interpreter_the_door_runs_the_reference(monkeypatch):
    o, rows, weights = random_case(5, 3, 8, torch.bfloat16, "cpu")
    monkeypatch.setattr("kernels.moe_combine.moe_combine_reference", lambda *_: "the reference")
    assert torch.is_tensor(moe_combine(o, rows, weights))
    monkeypatch.setitem(launch._chosen, "moe", "loop")
    assert moe_combine(o, rows, weights) == "the reference"
    assert torch.is_tensor(launch_combine(o, rows, weights))
    monkeypatch.setitem(launch._chosen, "moe", "auto")
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    assert moe_combine(o, rows, weights) == "the reference"


def test_weights_of_other_picks_are_refused():
    o, rows, weights = random_case(5, 3, 8, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"weights \(5, 2\) for rows \(5, 3\)"):
        moe_combine(o, rows, weights[:, :2])

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from kernels import moe_gemm
from kernels.moe_gemm import (
    gather_up,
    gather_up_reference,
    hidden_gradient,
    hidden_gradient_reference,
    rows_product,
    rows_product_reference,
    weight_gradient,
    weight_gradient_reference,
)
from kernels.moe_route import Dispatch, moe_route_reference, tile_height
from tests.kernels.accuracy import DEVICES, assert_as_accurate

HALVES = [torch.bfloat16, torch.float16]

on_each_device = pytest.mark.parametrize("device", DEVICES)


class Shape(NamedTuple):
    tokens: int
    picks: int
    experts: int
    hidden: int
    width: int


class Case(NamedTuple):
    """Operands of every product; those that are indexed by row are in the order of rows."""

    x: Tensor
    dy: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    h: Tensor
    a: Tensor
    dispatch: Dispatch


SHAPES = [
    Shape(tokens=40, picks=2, experts=5, hidden=24, width=16),  # low tiles
    Shape(tokens=1, picks=1, experts=3, hidden=16, width=8),
    Shape(tokens=150, picks=1, experts=2, hidden=20, width=13),  # tall tiles, and no size a multiple of a block
    Shape(tokens=7, picks=4, experts=4, hidden=70, width=45),  # several tiles of columns and steps of the sum
    Shape(tokens=130, picks=1, experts=1, hidden=17, width=33),
]
in_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def random_case(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    tokens, picks, experts, hidden, width = shape
    # Expert 1, if there is one that is not needed, gets no token.
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 1:2] -= 2.0 * (experts > picks)
    dispatch = Dispatch(*(t.to(device) for t in moe_route_reference(scores.topk(picks).indices, experts)))
    weights = torch.rand(tokens, picks, generator=generator)
    return Case(
        x=random(tokens, hidden),
        dy=random(tokens, hidden),
        weights=weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
        gate_up=random(experts, 2 * width, hidden),
        down=random(experts, hidden, width),
        h=2 * random(tokens * picks, 2 * width),
        a=random(tokens * picks, width),
        dispatch=dispatch,
    )


def products(case: Case) -> tuple[Tensor, ...]:
    """All that the kernels compute, each product from operands of its own."""
    x, dy, weights, gate_up, down, h, a, dispatch = case
    return (
        *gather_up(x, gate_up, dispatch),
        rows_product(a, down, dispatch),
        rows_product(h, gate_up, dispatch, transposed=True),
        *hidden_gradient(dy, weights, h, down, dispatch),
        weight_gradient(h, x, dispatch),
        weight_gradient(dy, a, dispatch, gathers_left=True),
    )


def reference_products(case: Case) -> tuple[Tensor, ...]:
    x, dy, weights, gate_up, down, h, a, dispatch = case
    return (
        *gather_up_reference(x, gate_up, dispatch),
        rows_product_reference(a, down, dispatch),
        rows_product_reference(h, gate_up, dispatch, transposed=True),
        *hidden_gradient_reference(dy, weights, h, down, dispatch),
        weight_gradient_reference(h, x, dispatch),
        weight_gradient_reference(dy, a, dispatch, gathers_left=True),
    )


def on_cpu_in_fp64(case: Case) -> Case:
    *operands, dispatch = case
    return Case(*(t.cpu().double() for t in operands), Dispatch(*(t.cpu() for t in dispatch)))


def test_the_references_are_the_formulas():
    """Each row by its expert's matrix, one row at a time."""
    case = random_case(SHAPES[0], torch.float64, "cpu")
    x, dy, weights, gate_up, down, h, a, dispatch = case
    h_found, a_found, o_found, dx_found, dh_found, wa_found, dweights_found, d_gate_up, d_down = reference_products(
        case
    )
    expected_gate_up, expected_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert in range(5):
        for row in range(int(dispatch.offsets[expert]), int(dispatch.offsets[expert + 1])):
            token, pick = divmod(int(dispatch.slots[row]), 2)
            torch.testing.assert_close(h_found[row], gate_up[expert] @ x[token])
            gate, up = h_found[row].chunk(2)
            torch.testing.assert_close(a_found[row], gate * up / (1 + torch.exp(-gate)))
            torch.testing.assert_close(o_found[row], down[expert] @ a[row])
            torch.testing.assert_close(dx_found[row], gate_up[expert].T @ h[row])
            gate, up = h[row].detach().requires_grad_().chunk(2)
            product = gate * up / (1 + torch.exp(-gate))
            torch.testing.assert_close(wa_found[row], weights[token, pick] * product)
            da = down[expert].T @ dy[token]
            torch.testing.assert_close(dweights_found[token, pick], da @ product)
            dh = torch.autograd.grad(product, (gate, up), weights[token, pick] * da)
            torch.testing.assert_close(dh_found[row], torch.cat(dh))
            expected_gate_up[expert] += torch.outer(h[row], x[token])
            expected_down[expert] += torch.outer(dy[token], a[row])
    torch.testing.assert_close((d_gate_up, d_down), (expected_gate_up, expected_down))


@on_each_device
@in_each_shape
def test_every_product_is_the_references_in_fp64(shape, device):
    case = random_case(shape, torch.float64, device)
    for found, expected in zip(products(case), reference_products(on_cpu_in_fp64(case)), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=["low", "tall", "several"])
def test_every_product_is_as_accurate_as_eager_torch(shape, dtype, device):
    case = random_case(shape, dtype, device)
    results = products(case), reference_products(case), reference_products(on_cpu_in_fp64(case))
    for found, eager, truth in zip(*results, strict=True):
        assert_as_accurate(found.cpu(), eager.cpu(), truth)


# Compiled, each shape would be kernels of its own.
@pytest.mark.parametrize("device", DEVICES[:1])
@given(
    tokens=st.integers(0, 20), experts=st.integers(1, 4), picks=st.integers(1, 2), hidden=st.integers(1, 40),
    width=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_product_of_any_shape_is_the_references(device, tokens, experts, picks, hidden, width, seed):
    case = random_case(Shape(tokens, min(picks, experts), experts, hidden, width), torch.float64, device, seed)
    for found, expected in zip(products(case), reference_products(on_cpu_in_fp64(case)), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


@on_each_device
def test_the_activation_is_that_of_what_is_stored(device):
    case = random_case(SHAPES[0], torch.bfloat16, device)
    h, a = gather_up(case.x, case.gate_up, case.dispatch)
    gate, up = h.double().chunk(2, dim=1)
    truth = gate * gate.sigmoid() * up
    # Rounded once: half a unit in the last place, and what fp32 adds to it.
    assert ((a.double() - truth).abs() <= 1.01 * 2**-8 * truth.abs()).all()


@on_each_device
def test_without_a_backward_only_the_activation_is_stored(device):
    case = random_case(SHAPES[0], torch.float32, device)
    h, a = gather_up(case.x, case.gate_up, case.dispatch, keep_h=False)
    assert h.shape == (0, 32)
    assert torch.equal(a, gather_up(case.x, case.gate_up, case.dispatch)[1])


@on_each_device
def test_rows_may_lie_anywhere_in_memory(device):
    case = random_case(SHAPES[0], torch.float32, device)

    def inside_of_a_wider(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, device=device, dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    def transposed_in_memory(t: Tensor) -> Tensor:
        return t.mT.contiguous().mT

    # h of the backward is what gather_up made: contiguous.
    names = ("x", "dy", "weights", "gate_up", "down", "a")
    for view in (inside_of_a_wider, transposed_in_memory):
        strided = case._replace(**{name: view(getattr(case, name)) for name in names})
        for found, expected in zip(products(strided), products(case), strict=True):
            assert torch.equal(found, expected)
    for found, expected in (
        (weight_gradient(inside_of_a_wider(case.h), case.x, case.dispatch), products(case)[7]),
        (rows_product(inside_of_a_wider(case.h), case.gate_up, case.dispatch, transposed=True), products(case)[3]),
    ):
        assert torch.equal(found, expected)


@on_each_device
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["low", "tall"])
def test_every_element_is_written_and_an_expert_without_rows_has_a_gradient_of_zeros(shape, device):
    case = random_case(shape, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        results = products(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)
    assert case.dispatch.offsets.diff()[1] == 0
    assert not results[-1][1].any()
    assert not results[-2][1].any()
    assert results[-1][0].any()


@on_each_device
def test_what_a_token_is_does_not_leak_into_other_rows(device):
    """Rows past an expert's last one are read with its tile."""
    case = random_case(SHAPES[0], torch.float32, device)
    poisoned = case._replace(x=case.x.clone(), dy=case.dy.clone(), a=case.a.clone(), h=case.h.clone())
    poisoned.x[7] = poisoned.dy[7] = torch.nan
    rows = case.dispatch.rows[7].long()
    poisoned.a[rows], poisoned.h[rows] = torch.nan, torch.nan
    others = torch.ones(80, dtype=torch.bool, device=device).index_fill(0, rows, False)
    for found, expected in zip(products(poisoned)[:6], products(case)[:6], strict=True):
        assert found[rows].isnan().all()
        assert torch.equal(found[others], expected[others])
    spared = [
        e for e in range(5) if not any(case.dispatch.offsets[e] <= r < case.dispatch.offsets[e + 1] for r in rows)
    ]
    for found, expected in zip(products(poisoned)[7:], products(case)[7:], strict=True):
        assert torch.equal(found[spared], expected[spared])


@given(size=st.integers(1, 5_000), block=st.sampled_from([16, 32, 64, 128, 256]))
def test_a_block_fits_its_matrix(size, block):
    fitted = moe_gemm._fit(block, size)
    assert fitted in (16, 32, 64, 128, 256)
    assert fitted <= block
    if size % block == 0:
        assert fitted == block
    elif size > block:
        assert fitted == max(16, block // 2)
    else:
        assert fitted == 16 or fitted < 2 * size


def test_the_shapes_have_tall_and_low_tiles():
    heights = {tile_height(shape.tokens * shape.picks, shape.experts) for shape in SHAPES}
    assert heights == {64, 128}

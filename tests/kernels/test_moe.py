from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch, moe_gemm
from kernels.moe import moe_experts, moe_experts_reference
from kernels.moe_route import moe_route, moe_route_reference
from kernels.swiglu import swiglu_reference
from tests.kernels.accuracy import DEVICES, assert_as_accurate

HALVES = [torch.bfloat16, torch.float16]

on_each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _triton_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "triton")


def choose(monkeypatch: pytest.MonkeyPatch, back_end: str) -> None:
    monkeypatch.setitem(launch._chosen, "moe", back_end)


class Case(NamedTuple):
    x: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    picks: Tensor
    dy: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self[:4]

    def to(self, dtype: torch.dtype, device: str) -> "Case":
        x, weights, gate_up, down, picks, dy = self
        sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [t.detach().to(device, dtype).requires_grad_() for t in (x, gate_up, down)]
        weights = weights.detach().to(device, sum_dtype).requires_grad_()
        return Case(inputs[0], weights, *inputs[1:], picks.to(device), dy.to(device, dtype))


def random_case(
    tokens: int, hidden: int, width: int, experts: int, num_picked: int, *, skew: float = 1.0, seed: int = 0
) -> Case:
    """Of numbers that all dtypes have, weights that sum to one; the larger the skew, the fewer experts are picked."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16().double()

    scores = torch.randn(tokens, experts, generator=generator) + skew * torch.arange(experts)
    chosen, picks = scores.topk(num_picked)
    return Case(
        x=random(tokens, hidden),
        weights=chosen.double().softmax(dim=1),
        gate_up=random(experts, 2 * width, hidden) / hidden**0.5,
        down=random(experts, hidden, width) / width**0.5,
        picks=picks,
        dy=random(tokens, hidden),
    )


def outputs(case: Case) -> tuple[Tensor, ...]:
    """y and the gradients of all inputs, by the back-end that was chosen."""
    y = moe_experts(case.x, case.weights, moe_route(case.picks, len(case.down)), case.gate_up, case.down)
    return y, *torch.autograd.grad(y, case.inputs, case.dy)


def dense_outputs(case: Case) -> tuple[Tensor, ...]:
    """The same from every token through every expert, in fp64 on the CPU: most of the weights are zero."""
    x, weights, gate_up, down, picks, dy = case.to(torch.float64, "cpu")
    weights_ME = torch.einsum("mj,mje->me", weights, F.one_hot(picks, len(down)).double())
    gate, up = torch.einsum("md,efd->mef", x, gate_up).chunk(2, dim=-1)
    y = torch.einsum("me,mef,edf->md", weights_ME, gate / (1 + torch.exp(-gate)) * up, down)
    return y, *torch.autograd.grad(y, (x, weights, gate_up, down), dy)


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other.cpu().double(), rtol=0, atol=tolerance)


def assert_all_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(expected)


CASES = {
    "an ordinary layer": random_case(90, 32, 24, 6, 2),
    "empty experts": random_case(40, 24, 16, 8, 2, skew=3.0),
    "all tokens to the same experts": random_case(70, 16, 16, 5, 2, skew=100.0),
    "one token": random_case(1, 20, 12, 6, 3),
    "every token to every expert": random_case(33, 24, 8, 4, 4),
    "sizes that no block divides": random_case(45, 37, 51, 3, 2),
    "one expert": random_case(140, 24, 16, 1, 1),
    "several tiles of everything": random_case(150, 70, 72, 2, 1),
    "no tokens": random_case(0, 16, 16, 3, 2),
    "more experts than picks there are": random_case(9, 16, 8, 40, 2, skew=0.0),
}
in_each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@on_each_device
@in_each_case
@pytest.mark.parametrize("back_end", ["triton", "loop"])
def test_output_and_gradients_are_those_of_the_dense_sum_in_fp64(back_end, case, device, monkeypatch):
    choose(monkeypatch, back_end)
    assert_all_close(outputs(case.to(torch.float64, device)), dense_outputs(case))


@on_each_device
def test_a_larger_layer_is_the_dense_sum_in_fp64(device):
    case = random_case(256, 48, 40, 8, 2, skew=0.3)
    assert_all_close(outputs(case.to(torch.float64, device)), dense_outputs(case))


# Compiled, each shape would be kernels of its own.
@pytest.mark.parametrize("device", DEVICES[:1])
@given(
    tokens=st.integers(0, 20), hidden=st.integers(1, 40), width=st.integers(1, 40), experts=st.integers(1, 4),
    num_picked=st.integers(1, 3), skew=st.floats(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_layer_is_the_dense_sum_in_fp64(device, tokens, hidden, width, experts, num_picked, skew, seed):
    case = random_case(tokens, hidden, width, experts, min(num_picked, experts), skew=skew, seed=seed)
    assert_all_close(outputs(case.to(torch.float64, device)), dense_outputs(case))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["an ordinary layer", "sizes that no block divides", "one expert"])
def test_output_and_gradients_are_as_accurate_as_eager_torch(name, dtype, device, monkeypatch):
    case = CASES[name].to(dtype, device)
    found = outputs(case)
    choose(monkeypatch, "loop")
    for results in zip(found, outputs(case), dense_outputs(case), strict=True):
        assert_as_accurate(*(result.cpu() for result in results))


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "case",
    [random_case(90, 32, 24, 6, 2), random_case(40, 24, 16, 8, 2, skew=3.0), random_case(0, 16, 16, 3, 2)],
    ids=["an ordinary layer", "empty experts", "no tokens"],
)
def test_torchs_grouped_product_is_as_accurate_as_eager_torch(case, dtype, device, monkeypatch):
    case = case.to(dtype, device)
    choose(monkeypatch, "grouped_mm")
    found = outputs(case)
    choose(monkeypatch, "loop")
    for results in zip(found, outputs(case), dense_outputs(case), strict=True):
        assert_as_accurate(*(result.cpu() for result in results))


@on_each_device
def test_gradients_are_right(device):
    case = random_case(2, 3, 2, 2, 2).to(torch.float64, device)
    dispatch = moe_route(case.picks, 2)
    assert torch.autograd.gradcheck(lambda x, w, gate_up, down: moe_experts(x, w, dispatch, gate_up, down), case.inputs)


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm", "loop"])
def test_experts_have_no_order(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["an ordinary layer"].to(torch.float32, device)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1)).to(device)
    relabelled = case._replace(
        gate_up=case.gate_up.detach()[order].requires_grad_(),
        down=case.down.detach()[order].requires_grad_(),
        picks=order.argsort()[case.picks],
    )
    y, dx, dweights, d_gate_up, d_down = outputs(case)
    assert_all_equal(outputs(relabelled), (y, dx, dweights, d_gate_up[order], d_down[order]))


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm"])
def test_a_token_is_the_same_wherever_it_stands(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["an ordinary layer"].to(torch.float32, device)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1)).to(device)
    moved = Case(
        case.x.detach()[order].requires_grad_(), case.weights.detach()[order].requires_grad_(), case.gate_up,
        case.down, case.picks[order], case.dy[order],
    )  # fmt: skip
    y, dx, dweights, d_gate_up, d_down = outputs(case)
    found = outputs(moved)
    assert_all_equal(found[:3], (y[order], dx[order], dweights[order]))
    assert_all_close(found[3:], (d_gate_up, d_down), 1e-4)  # sums in another order


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm", "loop"])
def test_which_of_two_picks_is_the_first_does_not_matter(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["an ordinary layer"].to(torch.float32, device)
    swapped = case._replace(picks=case.picks.flip(1), weights=case.weights.detach().flip(1).requires_grad_())
    y, dx, dweights, d_gate_up, d_down = outputs(case)
    assert_all_equal(outputs(swapped), (y, dx, dweights.flip(1), d_gate_up, d_down))


@on_each_device
def test_identical_experts_are_one_feed_forward_network(device):
    case = random_case(50, 24, 16, 4, 3).to(torch.float64, device)
    same = case._replace(gate_up=case.gate_up[:1].expand(4, -1, -1), down=case.down[:1].expand(4, -1, -1))
    y, dx, _, d_gate_up, d_down = outputs(same)
    x, gate_up, down = (t.detach().requires_grad_() for t in (case.x, case.gate_up[0], case.down[0]))
    dense = F.linear(swiglu_reference(F.linear(x, gate_up)), down)
    expected = torch.autograd.grad(dense, (x, gate_up, down), case.dy)
    assert_all_close((y, dx, d_gate_up.sum(0), d_down.sum(0)), (dense, *expected))


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm"])
def test_equal_inputs_give_equal_bits(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["an ordinary layer"].to(torch.bfloat16, device)
    assert_all_equal(outputs(case), outputs(case))


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm", "loop"])
def test_an_expert_without_tokens_has_a_gradient_of_zeros(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["empty experts"].to(torch.float32, device)
    is_empty = torch.bincount(case.picks.flatten(), minlength=8) == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        results = outputs(case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)
    assert is_empty.any()
    for gradient in results[3:]:
        assert torch.equal(gradient.flatten(1).abs().amax(dim=1) == 0, is_empty)


def test_what_torchs_grouped_product_leaves_of_an_empty_group_is_not_used(monkeypatch):
    grouped_mm = F.grouped_mm

    def untidy(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        out = grouped_mm(left, right, offs=offs)
        if right.ndim == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    case = CASES["empty experts"].to(torch.float32, "cpu")
    choose(monkeypatch, "grouped_mm")
    expected = outputs(case)
    monkeypatch.setattr("kernels.moe.F.grouped_mm", untidy)
    assert_all_equal(outputs(case), expected)


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm"])
@pytest.mark.parametrize("asked", [0, 1, 2, 3])
def test_a_gradient_alone_is_the_same(asked, back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["empty experts"].to(torch.float32, device)
    expected = outputs(case)[1 + asked]
    inputs = [t.detach().requires_grad_(i == asked) for i, t in enumerate(case.inputs)]
    y = moe_experts(*inputs[:2], moe_route(case.picks, 8), *inputs[2:])
    y.backward(case.dy)
    assert [t.grad is not None for t in inputs] == [i == asked for i in range(4)]
    assert torch.equal(inputs[asked].grad, expected)


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm"])
def test_inputs_and_gradients_may_lie_anywhere_in_memory(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["empty experts"].to(torch.float32, device)

    def strided(t: Tensor) -> Tensor:
        return t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad)

    elsewhere = Case(*(strided(t) for t in case))
    assert_all_equal(outputs(elsewhere), outputs(case))
    y = moe_experts(*case.inputs[:2], moe_route(case.picks, 8), *case.inputs[2:])
    ones = case._replace(dy=torch.ones_like(case.dy))
    assert_all_equal(torch.autograd.grad(y.sum(), case.inputs), outputs(ones)[1:])  # one element, repeated


@on_each_device
@pytest.mark.parametrize("back_end", ["triton", "grouped_mm"])
def test_of_a_layer_its_input_and_the_rows_before_swiglu_are_kept(back_end, device, monkeypatch):
    choose(monkeypatch, back_end)
    case = CASES["an ordinary layer"].to(torch.bfloat16, device)
    dispatch = moe_route(case.picks, 6)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        moe_experts(*case.inputs[:2], dispatch, *case.inputs[2:])
    given = {t.data_ptr() for t in (case.gate_up, case.down, *dispatch)}
    sizes = [t.numel() for pointer, t in kept.items() if pointer not in given]
    assert sorted(sizes) == sorted([90 * 32, 90 * 2, 90 * 2 * 48])


@on_each_device
def test_without_gradients_nothing_is_kept_and_the_output_is_the_same(device, monkeypatch):
    case = CASES["an ordinary layer"].to(torch.float32, device)
    operands = (*case.inputs[:2], moe_route(case.picks, 6), *case.inputs[2:])
    with torch.no_grad():
        assert torch.equal(moe_experts(*operands), moe_experts(*operands).detach())
        _, h = torch.ops.bessemer.moe_experts(*case.inputs, *moe_route(case.picks, 6), False)
    assert h.shape == (0, 48)
    asked: list[bool] = []
    gather_up = moe_gemm.gather_up
    monkeypatch.setattr(moe_gemm, "gather_up", lambda *inputs: (asked.append(inputs[3]), gather_up(*inputs))[1])
    with torch.no_grad():
        moe_experts(*operands)
    moe_experts(*operands)
    assert asked == [False, True]
    assert torch.equal(moe_experts(*operands).detach(), outputs(case)[0].detach())


@on_each_device
def test_the_operators_keep_torchs_contract(device):
    case = random_case(9, 16, 8, 3, 2).to(torch.float32, device)
    dispatch = moe_route(case.picks, 3)
    forward, backward = torch.ops.bessemer.moe_experts, torch.ops.bessemer.moe_experts_backward
    torch.library.opcheck(forward.default, (*case.inputs, *dispatch, True))
    assert not forward(*case.inputs, *dispatch, True)[1].requires_grad
    detached = [t.detach() for t in case.inputs]
    torch.library.opcheck(forward.default, (*detached, *dispatch, False))
    _, h = forward(*detached, *dispatch, True)
    for asked in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward.default, (case.dy, *detached, h, *dispatch, *asked))


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    case = random_case(20, 16, 8, 3, 2).to(torch.float32, device)

    def layer(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return moe_experts(x * 2, weights, moe_route(case.picks, 3), gate_up, down) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*case.inputs), layer(*case.inputs)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, case.inputs, case.dy) for y in (found, expected)]
    assert_all_close(*gradients, 1e-6)


@on_each_device
def test_flops_of_a_step_are_counted(device):
    case = random_case(20, 16, 8, 3, 2).to(torch.float32, device)
    dispatch = moe_route(case.picks, 3)
    with FlopCounterMode(display=False) as counter:
        y = moe_experts(*case.inputs[:2], dispatch, *case.inputs[2:])
        assert counter.get_total_flops() == 6 * 40 * 16 * 8
        torch.autograd.grad(y, case.inputs, case.dy, retain_graph=True)
        assert counter.get_total_flops() == 18 * 40 * 16 * 8
        torch.autograd.grad(y, case.inputs[:1], case.dy)
        assert counter.get_total_flops() <= (18 + 12) * 40 * 16 * 8


def run_back_end(monkeypatch: pytest.MonkeyPatch, case: Case) -> str:
    """Which of the three a door calls, each replaced by its name."""
    monkeypatch.setattr("kernels.moe.moe_experts_reference", lambda *_: "loop")
    monkeypatch.setattr("kernels.moe._GroupedExperts.apply", lambda *_: "grouped_mm")
    monkeypatch.setattr("torch.ops.bessemer.moe_experts", lambda *_: ("triton", None))
    return moe_experts(*case.inputs[:2], moe_route_reference(case.picks, len(case.down)), *case.inputs[2:])


@pytest.mark.parametrize(
    ("choice", "is_interpreted", "dtype", "expected"),
    [
        ("auto", True, torch.float32, "triton"),
        ("auto", True, torch.bfloat16, "triton"),
        ("auto", True, torch.float64, "loop"),
        ("auto", False, torch.float32, "loop"),
        ("auto", False, torch.bfloat16, "loop"),
        ("auto", False, torch.float64, "loop"),
        ("loop", True, torch.float32, "loop"),
        ("grouped_mm", True, torch.bfloat16, "grouped_mm"),
        ("triton", True, torch.float64, "triton"),
    ],
)
def test_the_back_end_is_chosen_by_config_device_and_dtype(choice, is_interpreted, dtype, expected, monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", is_interpreted)
    choose(monkeypatch, choice)
    assert run_back_end(monkeypatch, random_case(5, 16, 8, 3, 2).to(dtype, "cpu")) == expected


@pytest.mark.parametrize(
    ("choice", "dtype", "width", "message"),
    [
        ("triton", torch.float32, 8, 'kernels.moe = "triton"'),
        ("grouped_mm", torch.float64, 8, 'kernels.moe = "grouped_mm": torch has no grouped product of fp64; choose'),
        ("grouped_mm", torch.bfloat16, 12, "rows of 12 elements of torch.bfloat16; torch wants multiples of 16 bytes"),
    ],
)
def test_a_back_end_that_cannot_run_is_refused(choice, dtype, width, message, monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    choose(monkeypatch, choice)
    with pytest.raises(launch.KernelError, match=message):
        run_back_end(monkeypatch, random_case(5, 16, width, 3, 2).to(dtype, "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5, 2, 8)}, r"\(5, 2, 8\).*expected \(M, D\), \(M, J\), \(E, 2F, D\), \(E, D, F\)"),
        ({"x": torch.zeros(5, 12)}, r"\(5, 12\).*expected \(M, D\)"),
        ({"gate_up": torch.zeros(3, 8, 16)}, r"\(3, 8, 16\).*expected"),
        ({"gate_up": torch.zeros(4, 16, 16)}, r"\(4, 16, 16\).*expected"),
        ({"x": torch.zeros(6, 16)}, r"x \(6, 16\), weights \(5, 2\), routed picks \(5, 2\)"),
        ({"weights": torch.zeros(5, 1)}, r"weights \(5, 1\), routed picks \(5, 2\)"),
        ({"gate_up": torch.zeros(4, 16, 16), "down": torch.zeros(4, 16, 8)}, "4 experts, but tokens were routed to 3"),
        (
            {"down": torch.zeros(3, 16, 8, dtype=torch.bfloat16)},
            "x is torch.float32, gate_up torch.float32, down torch.b",
        ),
        ({"weights": torch.zeros(5, 2, dtype=torch.bfloat16)}, "weights torch.bfloat16; expected .*torch.float32"),
    ],
    ids=["axes", "hidden", "width", "experts", "tokens", "picks", "routing", "dtype", "dtype of weights"],
)
def test_operands_that_do_not_agree_are_refused(change, message):
    case = random_case(5, 16, 8, 3, 2).to(torch.float32, "cpu")
    changed = case._replace(**change)
    with pytest.raises(ValueError, match=message):
        moe_experts(*changed.inputs[:2], moe_route_reference(case.picks, 3), *changed.inputs[2:])


def test_the_reference_is_the_loops_back_end(monkeypatch):
    choose(monkeypatch, "loop")
    case = CASES["an ordinary layer"].to(torch.float32, "cpu")
    operands = (*case.inputs[:2], moe_route(case.picks, 6), *case.inputs[2:])
    assert torch.equal(moe_experts(*operands), moe_experts_reference(*operands))


@pytest.mark.gpu
def test_the_host_never_waits_and_a_hundred_runs_are_equal():
    case = random_case(4_000, 256, 128, 16, 4, skew=0.1).to(torch.bfloat16, "cuda")
    first = outputs(case)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [outputs(case) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for result in results:
        assert_all_equal(result, first)

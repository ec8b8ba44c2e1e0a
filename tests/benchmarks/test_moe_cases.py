import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import moe_cases, moe_peers
from benchmarks.kernel_cases import OPERATORS
from benchmarks.kernel_check import Judge, results
from benchmarks.kernel_goals import MISSED, NOT_MEASURED, PASS, Ceilings, goals_table
from benchmarks.kernel_operator import BACKWARD, BOTH, FORWARD, Case, Draw, Sizes
from benchmarks.kernel_rows import OURS, Cell, Row
from benchmarks.moe_cases import COMBINE, DENSE, EXPERTS, GROUPED_MM, MOVES, PERMUTE, ROUTE
from benchmarks.timing import Ceiling
from kernels import launch

CEILINGS = Ceilings(Ceiling(((1 << 20, 1e12), (1 << 30, 3e12))), matmul_flops=7e14)
SHAPE = {"M": 96, "d": 32, "F": 16, "E": 8, "J": 2}
OLMOE = {"M": 16_384, "d": 2_048, "F": 1_024, "E": 64, "J": 8}
PEERS_OF_TORCH = ("torchtitan", "HF loop", GROUPED_MM)


def judge_of_experts() -> Judge:
    return Judge(Case(EXPERTS, Sizes(SHAPE)), Draw("cpu", torch.bfloat16, 0))


@pytest.mark.parametrize("name", PEERS_OF_TORCH)
def test_layers_of_torch_compute_what_ours_does(name: str):
    judge = judge_of_experts()
    found = results(EXPERTS.peers[name](), EXPERTS, judge.inputs, judge.directions)
    assert judge.judge(found).is_right


def test_the_grouped_back_end_is_chosen_for_its_own_calls_alone(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []
    monkeypatch.setattr(moe_cases, "experts", lambda *_: seen.append(launch.chosen("moe")))
    EXPERTS.peers[GROUPED_MM]()()
    assert (seen, launch.chosen("moe")) == (["grouped_mm"], "auto")


def test_picks_are_distinct_experts_and_their_weights_add_up_to_one():
    picks, weights = Draw("cpu", torch.bfloat16, 0).picks(200, 3, 5)
    assert picks.sort(dim=1).values.diff(dim=1).min() > 0
    assert set(picks.unique().tolist()) == set(range(5))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(200))


def test_the_dense_network_takes_the_operations_of_the_experts():
    yardstick = EXPERTS.yardsticks[DENSE]
    inputs = yardstick.inputs(judge_of_experts().inputs)
    with FlopCounterMode(display=False) as counter:
        y = yardstick.load()(*inputs.leaves)
        assert counter.get_total_flops() == EXPERTS.flops(SHAPE)[FORWARD]
        torch.autograd.grad(y, inputs.leaves, torch.ones_like(y))
    assert counter.get_total_flops() == EXPERTS.flops(SHAPE)[BOTH]


def test_the_moves_alone_build_the_index_and_combine_in_both_directions(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def recorded(name: str):
        function = getattr(moe_cases, name)

        def record(*tensors):
            calls.append(f"{name} {len(tensors)}")
            return function(*tensors)

        monkeypatch.setattr(moe_cases, name, record)

    recorded("moe_route")
    recorded("moe_combine")
    yardstick = EXPERTS.yardsticks[MOVES]
    inputs = yardstick.inputs(judge_of_experts().inputs)
    y = yardstick.load()(*inputs.leaves, *inputs.others)
    assert y.shape == (96, 32)
    assert calls == ["moe_route 2", "moe_combine 3"]
    torch.autograd.grad(y, inputs.leaves, torch.ones_like(y))
    assert calls[2:] == ["moe_combine 2"]


def test_bytes_are_a_pick_and_two_numbers_each_or_every_token_and_row_once():
    def moved(operator, phase) -> int | None:
        return Row(Case(operator, operator.sizes[0]), phase, {}).moved_bytes

    assert moved(ROUTE, FORWARD) == (8 + 4 + 4) * 32_768 * 8
    assert moved(COMBINE, FORWARD) == 2 * (16_384 + 16_384 * 8) * 2_048
    assert moved(PERMUTE, FORWARD) == moved(PERMUTE, BACKWARD) == moved(COMBINE, FORWARD)
    assert moved(EXPERTS, BOTH) is None


def test_the_order_that_others_are_given_is_that_of_the_rows():
    inputs = COMBINE.draw(Draw("cpu", torch.bfloat16, 0), SHAPE)
    _, rows, _, slots, experts, ends = inputs.others
    counts = torch.bincount(experts, minlength=8)
    assert torch.equal(ends, counts.cumsum(0, dtype=torch.int32))
    assert torch.equal(experts.sort().values, experts)
    assert torch.equal(rows.view(-1)[slots.long()], torch.arange(192, dtype=torch.int32))


# --- Peers that are not installed here: what they are called with.


@pytest.fixture
def fake_module(monkeypatch: pytest.MonkeyPatch):
    def make(name: str, **attributes: object) -> None:
        for end in range(1, len(parts := name.split(".")) + 1):
            parent = ".".join(parts[:end])
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for attribute, value in attributes.items():
            monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)

    return make


def test_absent_peers_say_so():
    for name in set(EXPERTS.peers) - set(PEERS_OF_TORCH):
        with pytest.raises(ModuleNotFoundError):
            EXPERTS.peers[name]()


def test_liger_is_given_its_own_order_of_arguments(fake_module):
    class Fused:
        @staticmethod
        def apply(x: Tensor, gate_up: Tensor, down: Tensor, picks: Tensor, weights: Tensor) -> Tensor:
            assert picks.dtype == torch.int32
            return moe_cases.experts_reference(x, weights, gate_up, down, picks.long())

    fake_module("liger_kernel.ops", LigerFusedMoEFunction=Fused)
    judge = judge_of_experts()
    found = results(moe_peers.liger_layer(), EXPERTS, judge.inputs, judge.directions)
    assert judge.judge(found).is_right


def test_scattermoes_products_are_put_together_to_a_layer(fake_module):
    """With its two functions as their documentation describes them."""

    def flatten_sort_count(picks: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        experts, slots = picks.flatten().sort()
        return experts, slots, experts.bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(x, matrix, fan_out, experts, slots, ends, gates=None, grouped_in=False, grouped_out=False):
        rows = x if grouped_in else x[slots // fan_out]
        out = torch.stack([row @ matrix[expert] for row, expert in zip(rows, experts)])
        if grouped_out:
            return out
        out = torch.zeros_like(out).index_copy(0, slots, out)
        return (gates[:, None] @ out.view(*gates.shape, -1))[:, 0]

    fake_module("scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    judge = judge_of_experts()
    found = results(moe_peers.scatter_layer(), EXPERTS, judge.inputs, judge.directions)
    assert judge.judge(found, factor=4.0).is_right


def test_megablocks_and_grouped_gemm_are_put_together_to_a_layer(fake_module):
    def gather(x: Tensor, slots: Tensor, experts: Tensor, ends: Tensor, num_picked: int) -> Tensor:
        return x[slots // num_picked]

    def scatter(o: Tensor, slots: Tensor, experts: Tensor, weights: Tensor, ends: Tensor, num_picked: int) -> Tensor:
        rows = torch.zeros_like(o).index_copy(0, slots.long(), o) * weights[:, None]
        return rows.view(-1, num_picked, o.shape[1]).sum(dim=1)

    def gmm(rows: Tensor, matrices: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
        assert trans_b
        return torch.cat([part @ matrix.T for part, matrix in zip(rows.split(sizes.tolist()), matrices)])

    ops = SimpleNamespace(
        gather=gather,
        scatter=scatter,
        sort=lambda experts, _bits: experts.sort(),
        histogram=lambda experts, num: experts.bincount(minlength=num).int(),
        inclusive_cumsum=lambda counts, axis: counts.cumsum(axis),
    )
    products = SimpleNamespace(ops=SimpleNamespace(gmm=gmm), assert_grouped_gemm_is_available=lambda: None)
    fake_module("megablocks", ops=ops, grouped_gemm_util=products)
    judge = judge_of_experts()
    found = results(moe_peers.megablocks_layer(), EXPERTS, judge.inputs, judge.directions)
    assert judge.judge(found, factor=4.0).is_right


# --- Goals.


def row_of(phase, shape: dict[str, int], **durations_s: float) -> Row:
    cells = {name.replace("_", " "): Cell(seconds=[value] * 3) for name, value in durations_s.items()}
    return Row(Case(EXPERTS, Sizes(shape)), phase, cells)


def line_of(rows: list[Row], what: str) -> dict:
    (line,) = [line for line in goals_table(rows, CEILINGS).records() if line["what"] == what]
    return line


def test_a_goal_of_one_shape_does_not_see_the_others():
    what = "64 experts, TFLOP/s of a dense FFN's"
    coarse = {**OLMOE, "E": 8, "J": 2}
    row = row_of(BOTH, OLMOE, ours=1.0, **{DENSE: 0.8})
    rows = [row, row_of(BOTH, coarse, ours=1.0, **{DENSE: 0.1})]
    assert (line_of(rows, what)["measured"], line_of(rows, what)["verdict"]) == (pytest.approx(0.8), PASS)
    assert line_of(rows, "8 experts, TFLOP/s of a dense FFN's")["verdict"] == MISSED
    assert line_of(rows[1:], what)["verdict"] == NOT_MEASURED


def test_index_and_combine_are_a_share_of_the_layers_time():
    row = row_of(BOTH, OLMOE, ours=1.0, **{MOVES: 0.11})
    line = line_of([row], "experts, share of index and combine")
    assert (line["measured"], line["verdict"]) == (pytest.approx(0.11), PASS)


def test_what_a_layer_keeps_is_judged_with_its_input():
    row = row_of(FORWARD, OLMOE, ours=1.0, ScatterMoE=1.0)
    elements = 2 * 8 * 1_024
    row.cells[OURS].kept_bytes = 2 * 16_384 * elements
    row.cells["ScatterMoE"].kept_bytes = 3 * 2 * 16_384 * elements
    of_needed = line_of([row], "experts, kept activations of d + 2 J F")
    assert (of_needed["measured"], of_needed["verdict"]) == (1.0, PASS)
    of_scatter = line_of([row], "64 experts, kept activations of ScatterMoE's")
    assert of_scatter["measured"] == pytest.approx((elements + 2_048) / (3 * elements + 2_048))


def test_a_layer_that_cannot_be_captured_waits_for_the_device():
    what = "experts: the host never waits (1 = yes)"
    for how, verdict in (("graph", PASS), ("events", MISSED)):
        row = row_of(FORWARD, OLMOE, ours=1.0)
        row.cells[OURS].how = how
        assert line_of([row], what)["verdict"] == verdict


def test_speeds_are_judged_in_operations_per_second_and_the_index_in_microseconds():
    shape = {"M": 32_768, "d": 2_048, "F": 768, "E": 128, "J": 8}
    row = row_of(FORWARD, shape, ours=6 * 32_768 * 8 * 2_048 * 768 / 400e12)
    line = line_of([row], "128 experts, TFLOP/s; Liger says 337")
    assert (line["measured"], line["verdict"]) == (pytest.approx(400), PASS)
    index = Row(Case(ROUTE, ROUTE.sizes[0]), FORWARD, {OURS: Cell(seconds=[24e-6] * 3)})
    assert line_of([index], "rows of experts: index build, us")["measured"] == pytest.approx(24)


def test_every_operator_of_a_mixture_is_among_those_that_are_measured():
    assert all(operator in OPERATORS for operator in (ROUTE, PERMUTE, COMBINE, EXPERTS))

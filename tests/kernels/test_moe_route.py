import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic

from kernels import launch
from kernels.moe_route import Dispatch, moe_route, moe_route_reference, num_tiles, tile_height
from tests.kernels.accuracy import DEVICES

on_each_device = pytest.mark.parametrize("device", DEVICES)


def random_picks(num_tokens: int, num_picked: int, num_experts: int, device: str, seed: int = 0) -> Tensor:
    """Distinct experts of each token, some experts far more often than others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator) * torch.linspace(0.2, 1, num_experts)
    return scores.topk(num_picked).indices.to(device)


def check(dispatch: Dispatch, picks: Tensor, num_experts: int) -> None:
    """What the fields of a dispatch say, from Python's sort of the picks."""
    flat = picks.reshape(-1).tolist()
    slots = sorted(range(len(flat)), key=lambda slot: flat[slot])
    assert dispatch.slots.tolist() == slots
    assert [slots[row] for row in dispatch.rows.reshape(-1).tolist()] == list(range(len(flat)))
    assert dispatch.rows.shape == picks.shape
    offsets = [sum(pick < expert for pick in flat) for expert in range(num_experts + 1)]
    assert dispatch.offsets.tolist() == offsets
    check_tiles(dispatch, offsets)
    assert {t.dtype for t in dispatch} == {torch.int32}


def check_tiles(dispatch: Dispatch, offsets: list[int]) -> None:
    """The tiles in their order are those of all experts; then come those that do not exist."""
    height = tile_height(offsets[-1], len(offsets) - 1)
    expected = [
        (expert, row)
        for expert, (start, end) in enumerate(itertools.pairwise(offsets))
        for row in range(start, end, height)
    ]
    surplus = num_tiles(offsets[-1], len(offsets) - 1) - len(expected)
    assert surplus >= 0
    expected += [(-1, offsets[-1])] * surplus
    assert list(zip(dispatch.tile_experts.tolist(), dispatch.tile_rows.tolist())) == expected


@on_each_device
@given(
    num_tokens=st.integers(0, 90), num_experts=st.integers(1, 40), picked_share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_any_picks_are_sorted_by_expert_and_then_by_slot(device, num_tokens, num_experts, picked_share, seed):
    num_picked = 1 + int(picked_share * min(7, num_experts - 1))
    picks = random_picks(num_tokens, num_picked, num_experts, device, seed)
    check(moe_route(picks, num_experts), picks, num_experts)
    check(moe_route_reference(picks, num_experts), picks, num_experts)


@on_each_device
@pytest.mark.parametrize(
    ("num_tokens", "num_picked", "num_experts"),
    [(1_500, 2, 5), (400, 3, 16), (120, 4, 128), (90, 8, 129), (70, 8, 300), (300, 1, 1), (2_000, 1, 2)],
    ids=str,
)
def test_more_slots_than_a_block_and_more_experts_than_a_chunk(num_tokens, num_picked, num_experts, device):
    picks = random_picks(num_tokens, num_picked, num_experts, device)
    check(moe_route(picks, num_experts), picks, num_experts)


@on_each_device
@pytest.mark.parametrize("favourite", [0, 3, 6])
def test_all_tokens_may_go_to_one_expert(favourite, device):
    picks = torch.full((200, 1), favourite, device=device)
    check(moe_route(picks, 7), picks, 7)


@on_each_device
def test_a_token_may_pick_an_expert_twice(device):
    picks = torch.tensor([[1, 1], [0, 1], [2, 2]], device=device)
    check(moe_route(picks, 4), picks, 4)


@on_each_device
def test_picks_may_lie_anywhere_in_memory(device):
    picks = random_picks(6, 3, 5, device)
    for strided in (picks.T.contiguous().T, picks[:, ::2], picks[1::2], picks[:1].expand(4, -1)):
        check(moe_route(strided, 5), strided, 5)


@on_each_device
def test_every_element_is_written(device):
    picks = random_picks(90, 2, 9, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is the largest number now
        dispatch = moe_route(picks, 9)
    finally:
        torch.use_deterministic_algorithms(False)
    check(dispatch, picks, 9)


@on_each_device
def test_the_operator_keeps_torchs_contract(device):
    torch.library.opcheck(torch.ops.bessemer.moe_route.default, (random_picks(9, 2, 5, device), 5))


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    def routed(scores: Tensor) -> tuple[Tensor, ...]:
        return tuple(moe_route(scores.topk(2).indices, 6))

    scores = torch.rand(40, 6, device=device)
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(scores), routed(scores), strict=True):
        assert torch.equal(found, expected)


def test_tiles_are_low_where_experts_have_few_rows():
    heights = [
        tile_height(rows, experts) for rows, experts in ((0, 1), (63, 1), (64, 1), (319, 5), (320, 5), (9_000, 5))
    ]
    assert heights == [64, 64, 128, 64, 128, 128]


@pytest.mark.parametrize("choice", ["auto", "loop"])
def test_where_no_kernel_runs_or_the_loop_was_chosen_the_door_runs_the_reference(choice, monkeypatch):
    if choice == "auto":
        monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setitem(launch._chosen, "moe", choice)
    monkeypatch.setattr("kernels.moe_route._route_op", None)
    monkeypatch.setattr("kernels.moe_route.moe_route_reference", lambda *_: "the reference")
    assert moe_route(torch.zeros(2, 1, dtype=torch.int64), 1) == "the reference"


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setitem(launch._chosen, "moe", "triton")
    with pytest.raises(launch.KernelError, match="kernels.moe = .triton."):
        moe_route(torch.zeros(2, 1, dtype=torch.int64), 1)


@pytest.mark.parametrize(
    ("picks", "num_experts", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, r"picks \(4,\) torch.int64; expected \(M, J\) int64"),
        (torch.zeros(4, 2, dtype=torch.int32), 2, "torch.int32; expected"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, "num_experts = 0; expected at least one"),
        (torch.zeros(1, 1, dtype=torch.int64).expand(2**30, 2), 2, "2147483648 picks at once"),
    ],
    ids=["one axis", "32 bits", "no experts", "too many"],
)
def test_what_cannot_be_routed_is_refused(picks, num_experts, message):
    with pytest.raises(ValueError, match=message):
        moe_route(picks, num_experts)

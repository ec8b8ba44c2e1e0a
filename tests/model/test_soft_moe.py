import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import DocumentBoundaries, document_boundaries
from model.cache import KVCache
from model.config import ModelConfig
from model.init import initial_value
from model.moe import MoE
from model.moe_config import MoEConfig

HIDDEN = 8


def make_moe(dtype: torch.dtype = torch.float64, **settings) -> MoE:
    moe = MoEConfig(
        **{"kind": "chunk_soft", "num_experts": 3, "num_slots": 2, "expert_size": 6, "chunk_size": 4, **settings}
    )
    config = ModelConfig(hidden_size=HIDDEN, num_layers=2, num_heads=2, num_kv_heads=2, head_size=4, moe=moe)
    module = MoE(config, 1).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return module


def hidden(length: int, batch_size: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, length, HIDDEN, generator=generator, dtype=torch.float64)


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    total = sum(math.exp(v - largest) for v in values)
    return [math.exp(v - largest) / total for v in values]


def by_hand(moe: MoE, x_TD: Tensor, document: list[int]) -> Tensor:
    """Token by token, slot by slot, from all earlier tokens anew."""
    soft, config = moe.soft, moe.config
    rows = []
    for t, x in enumerate(x_TD):
        begin = t // config.chunk_size * config.chunk_size
        past = [u for u in range(begin) if document[u] == document[t]]
        slots = range(len(soft.logits)) if past else []
        shares = softmax([float(soft.logits[s] @ x) for s in slots] + [float(soft.null_key @ x)])
        y = shares[-1] * soft.null_value
        for s in slots:
            weights = softmax([float(soft.logits[s] @ x_TD[u]) for u in past])
            slot = sum(w * x_TD[u] for w, u in zip(weights, past))
            gate, up = (moe.experts.gate_up[s // config.num_slots] @ slot).chunk(2)
            y = y + shares[s] * (moe.experts.down[s // config.num_slots] @ (gate * gate.sigmoid() * up))
        rows.append(y)
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 14])
def test_slots_are_averages_over_the_chunks_before(length):
    moe, x = make_moe(), hidden(length)
    expected = torch.stack([by_hand(moe, row, [0] * length) for row in x])
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-12, atol=1e-13)


def boundaries_at(starts: list[int], length: int) -> DocumentBoundaries:
    tokens = torch.ones(1, length, dtype=torch.int64)
    for start in starts:
        tokens[0, start - 1] = 0
    return document_boundaries(tokens, eos_id=0)


@torch.no_grad()
@given(starts=st.sets(st.integers(1, 17)))
def test_documents_of_a_row_see_nothing_of_each_other(starts):
    moe, x = make_moe(), hidden(18, batch_size=1)
    boundaries = boundaries_at(sorted(starts), 18)
    found = moe(x, boundaries=boundaries)[0]
    expected = by_hand(moe, x[0], boundaries.ids_BT[0].tolist())[None]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@torch.no_grad()
@given(position=st.integers(0, 17), starts=st.sets(st.integers(1, 17), max_size=3))
def test_a_token_changes_no_bit_before_the_next_chunk_but_its_own(position, starts):
    moe, x = make_moe(), hidden(18, batch_size=1)
    boundaries = boundaries_at(sorted(starts), 18) if starts else None
    changed = x.clone()
    changed[:, position] *= -3.0
    expected, found = moe(x, boundaries=boundaries)[0], moe(changed, boundaries=boundaries)[0]
    next_chunk = (position // 4 + 1) * 4
    same = [t for t in range(next_chunk) if t != position and t < 18]
    assert torch.equal(found[:, same], expected[:, same])
    if not starts and position >= 4:  # in the first chunk all tokens get the null slot
        assert not torch.equal(found[:, position], expected[:, position])
    if not starts and next_chunk < 18:
        assert not (found[:, next_chunk:] == expected[:, next_chunk:]).all(dim=-1).any()


@torch.no_grad()
@given(cuts=st.sets(st.integers(1, 17)), chunk_size=st.sampled_from([1, 3, 4, 20]))
def test_reading_in_any_pieces_with_a_cache_equals_reading_at_once(cuts, chunk_size):
    moe, x = make_moe(chunk_size=chunk_size), hidden(18)
    config = ModelConfig(hidden_size=HIDDEN, num_layers=2, num_heads=2, num_kv_heads=2, head_size=4)
    cache = KVCache(config, 2, 18, torch.float64, torch.device("cpu"))
    pieces = []
    for start, end in itertools.pairwise([0, *sorted(cuts), 18]):
        pieces.append(moe(x[:, start:end], cache=cache)[0])
        cache.advance(end - start)
        assert all(part.shape[0] == 2 for part in cache.state[1])
        cache.state[1] = tuple(cache.state[1])  # what a cache that copies rows makes of it
    assert 0 not in cache.state
    torch.testing.assert_close(torch.cat(pieces, dim=1), moe(x)[0], rtol=1e-12, atol=1e-13)


def test_logits_far_apart_neither_overflow_nor_lose_the_past():
    moe = make_moe()
    with torch.no_grad():
        moe.soft.logits.mul_(1e4)
        moe.soft.null_key.mul_(1e4)
    x = hidden(14).requires_grad_()
    y = moe(x)[0]
    assert y.isfinite().all()
    with torch.no_grad():
        expected = torch.stack([by_hand(moe, row, [0] * 14) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [x, *moe.parameters()]))


@pytest.mark.parametrize("starts", [[], [4], [2, 7, 8]], ids=str)
def test_gradients_are_right(starts):
    moe = make_moe()
    boundaries = boundaries_at(starts, 10)
    x = hidden(10, batch_size=1).requires_grad_()
    names = [name for name, _ in moe.named_parameters()]

    def layer(x: Tensor, *parameters: Tensor) -> Tensor:
        inputs, keywords = (x,), {"boundaries": boundaries}
        return torch.func.functional_call(moe, dict(zip(names, parameters)), inputs, keywords)[0]

    assert torch.autograd.gradcheck(layer, (x, *moe.parameters()), fast_mode=True)


def test_a_single_chunk_gives_every_parameter_a_gradient():
    # Else ranks that reduce gradients together would wait for each other.
    moe = make_moe(shared_size=4)
    moe(hidden(3))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())
    assert torch.equal(moe.experts.down.grad, torch.zeros_like(moe.experts.down))
    assert moe.soft.null_value.grad.abs().max() > 0


@torch.no_grad()
def test_the_first_chunk_has_the_null_slot_and_the_shared_expert():
    moe = make_moe(shared_size=4)
    x = hidden(4)
    torch.testing.assert_close(moe(x)[0], moe.soft.null_value.expand_as(x) + moe.shared(x), rtol=1e-13, atol=1e-13)


@torch.no_grad()
def test_bf16_is_close_to_exact():
    moe, x = make_moe(), hidden(14)
    expected = moe(x)[0]
    found = moe.bfloat16()(x.bfloat16())[0]
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_it_starts_as_nothing_in_the_first_chunk():
    config = ModelConfig(hidden_size=HIDDEN, num_layers=2, moe=make_moe().config)
    module = MoE(config, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(config, f"blocks.0.moe.{name}", parameter.shape, seed=0))
        y = module(hidden(9).float())[0]
    assert torch.equal(y[:, :4], torch.zeros_like(y[:, :4]))
    assert y[:, 4:].abs().max() > 0

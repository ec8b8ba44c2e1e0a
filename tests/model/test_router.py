import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, Qwen2MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from model.moe_config import MoEConfig
from model.router import Router, Routing, routing_noise

HIDDEN = 16


def make_router(seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> Router:
    router = Router(MoEConfig(**{"num_experts": 8, "num_picked": 3, **settings}), HIDDEN).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(0.5 * torch.randn(router.weight.shape, generator=generator))
        if router.bias is not None:
            router.bias.copy_(0.2 * torch.randn(router.bias.shape, generator=generator))
    return router


def hidden(num_tokens: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def route_by_hand(router: Router, x: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Token by token, in Python's own numbers."""
    moe, picks, weights = router.moe, [], []
    for logits in (x @ router.weight.detach().T / moe.temperature).tolist():
        if moe.scores == "softmax":
            largest = max(logits)
            scores = [math.exp(z - largest) / sum(math.exp(z - largest) for z in logits) for z in logits]
        else:
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        biased = [s + (router.bias[e].item() if router.bias is not None else 0.0) for e, s in enumerate(scores)]
        size = moe.num_experts // moe.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(moe.num_groups)]
        num_judges = 2 if moe.group_score == "top2" and moe.num_groups > 1 else 1
        judged = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:num_judges]))
        open_experts = [e for group in judged[: moe.num_picked_groups] for e in group]
        picked = sorted(open_experts, key=lambda e: -biased[e])[: moe.num_picked]
        total = sum(scores[e] for e in picked) if moe.renormalise else 1.0
        picks.append(picked)
        weights.append([moe.route_scale * scores[e] / total for e in picked])
    return picks, weights


@given(
    scores=st.sampled_from(["softmax", "sigmoid"]),
    renormalise=st.booleans(),
    bias=st.sampled_from(["none", "sign"]),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (4, 4)]),
    group_score=st.sampled_from(["top2", "max"]),
    temperature=st.sampled_from([1.0, 0.5]),
    route_scale=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 1_000),
)
def test_picks_and_weights_are_those_of_a_router_written_token_by_token(groups, seed, **settings):
    router = make_router(seed, num_groups=groups[0], num_picked_groups=groups[1], **settings)
    x = hidden(6, seed)
    routing = router(x)
    picks, weights = route_by_hand(router, x)
    assert routing.picks_MJ.tolist() == picks
    torch.testing.assert_close(routing.weights_MJ, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def assert_same_routing(ours: Routing, their_weights: Tensor, their_picks: Tensor) -> None:
    """Whatever the order of the picks."""
    dense = torch.zeros_like(ours.scores_ME)
    found = dense.scatter(1, ours.picks_MJ, ours.weights_MJ)
    torch.testing.assert_close(found, dense.scatter(1, their_picks, their_weights.to(dense.dtype)), rtol=0, atol=1e-6)
    assert torch.equal(found == 0, dense.scatter(1, their_picks, 1.0) == 0)


def test_softmax_routers_are_those_of_transformers():
    x = hidden(50, dtype=torch.float32)
    mixtral = MixtralTopKRouter(
        MixtralConfig(hidden_size=HIDDEN, num_attention_heads=2, num_local_experts=8, num_experts_per_tok=3)
    )
    ours = make_router(dtype=torch.float32)
    qwen_config = Qwen2MoeConfig(
        hidden_size=HIDDEN, num_attention_heads=2, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False
    )
    qwen, ours_plain = Qwen2MoeTopKRouter(qwen_config), make_router(dtype=torch.float32, renormalise=False)
    with torch.no_grad():
        mixtral.weight.copy_(ours.weight)
        qwen.weight.copy_(ours.weight)
    assert_same_routing(ours(x), *mixtral(x)[1:])
    assert_same_routing(ours_plain(x), *qwen(x)[1:])


def test_the_sigmoid_router_with_groups_and_bias_is_that_of_transformers():
    x = hidden(50, dtype=torch.float32)
    config = DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    ours = make_router(
        dtype=torch.float32, scores="sigmoid", bias="sign", num_groups=4, num_picked_groups=2, route_scale=2.5
    )
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.bias)
    assert_same_routing(ours(x), *theirs(x)[1:])


def test_a_bias_picks_but_does_not_weigh():
    plain, biased = make_router(), make_router(bias="sign")
    with torch.no_grad():
        biased.bias.copy_(torch.tensor([5.0, 4.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    x = hidden(9)
    routing = biased(x)
    assert routing.picks_MJ.sort().values.tolist() == [[0, 1, 2]] * 9
    scores = plain(x).scores_ME.gather(1, routing.picks_MJ)
    torch.testing.assert_close(routing.weights_MJ, scores / scores.sum(dim=-1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_among_equals_the_first_experts_are_picked_in_any_batch(device, num_tokens, groups):
    router = make_router(num_groups=groups[0], num_picked_groups=groups[1]).to(device)
    x = torch.zeros(num_tokens, HIDDEN, dtype=torch.float64, device=device)
    assert router(x).picks_MJ.tolist() == [[0, 1, 2]] * num_tokens


@pytest.mark.parametrize("settings", [{}, {"num_groups": 4, "num_picked_groups": 2}, {"scores": "sigmoid"}], ids=str)
def test_hidden_states_that_are_not_numbers_still_pick_experts_that_exist(settings):
    x = hidden(5)
    x[1] = math.nan
    x[2] = math.inf
    x[3, 0] = -math.inf
    noise = torch.zeros(5, 8)
    for routing in (make_router(**settings)(x), make_router(**settings)(x, noise)):
        assert ((routing.picks_MJ >= 0) & (routing.picks_MJ < 8)).all()
        assert all(len(set(picks)) == 3 for picks in routing.picks_MJ.tolist())
        assert routing.weights_MJ[1].isnan().all()
        assert routing.weights_MJ[0].isfinite().all()


def test_a_model_in_bf16_is_routed_in_fp32():
    router = make_router(dtype=torch.bfloat16)
    x = hidden(200, dtype=torch.bfloat16)
    routing = router(x)
    assert {t.dtype for t in (routing.weights_MJ, routing.scores_ME, routing.logits_ME)} == {torch.float32}
    exact = x.float() @ router.weight.float().T
    torch.testing.assert_close(routing.logits_ME, exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x)
    assert torch.equal(under_autocast.logits_ME, routing.logits_ME)
    # The weight of a sharded router stays fp32 when the hidden states are bf16.
    assert make_router(dtype=torch.float32)(x).logits_ME.dtype == torch.float32


def test_what_a_router_keeps_for_the_backward_is_in_the_models_dtype_or_as_wide_as_the_experts():
    router = make_router(dtype=torch.float32)
    x = hidden(200, dtype=torch.bfloat16).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing = router(x)
    (of_tokens,) = [tensor for tensor in kept if tensor.shape == x.shape]
    assert of_tokens.data_ptr() == x.data_ptr()
    assert all(tensor.untyped_storage().nbytes() <= 200 * 8 * 4 for tensor in kept if tensor is not of_tokens)
    direction = torch.randn(routing.weights_MJ.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(routing.weights_MJ, (x, router.weight), direction)
    scores = torch.softmax(x.float() @ router.weight.T, dim=-1).gather(1, routing.picks_MJ)
    expected = torch.autograd.grad(scores / scores.sum(dim=-1, keepdim=True), (x, router.weight), direction)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


def test_buffers_stay_fp32_whatever_the_model_is_cast_to():
    router = make_router(dtype=torch.float32, bias="sign", balance="global")
    with torch.no_grad():
        router.bias.fill_(1 / 3)
        router.load.fill_(1 / 7)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        router.to(dtype)
        assert router.weight.dtype == dtype
        assert router.bias.dtype == router.load.dtype == torch.float32
        assert torch.equal(router.bias, torch.full((8,), 1 / 3))
        assert torch.equal(router.load, torch.full((8,), 1 / 7))
    assert set(router.state_dict()) == {"weight", "bias", "load"}
    router.to("meta", torch.float32)
    assert router.bias.is_meta
    assert router.to_empty(device="cpu").bias.dtype == torch.float32


def test_there_are_no_buffers_that_nothing_needs():
    assert set(make_router().state_dict()) == {"weight"}
    assert set(make_router(balance="sequence").state_dict()) == {"weight"}
    assert set(make_router(balance="switch").state_dict()) == {"weight", "load"}


# --- Noise.

TOKENS = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(0))


def noise_of(tokens: Tensor, seed: int = 1, layer: int = 0, link: int = 0, num_experts: int = 8) -> Tensor:
    return routing_noise(tokens, num_experts, seed, layer, link).unflatten(0, tokens.shape)


def test_a_token_has_the_same_noise_in_any_cut_and_order_of_rows():
    whole = noise_of(TOKENS)
    assert torch.equal(torch.cat([noise_of(row[None]) for row in TOKENS]), whole)
    assert torch.equal(noise_of(TOKENS.flip(0)).flip(0), whole)


@given(position=st.integers(0, 19), length=st.integers(1, 20))
def test_noise_does_not_know_later_tokens(position, length):
    whole = noise_of(TOKENS)
    assert torch.equal(noise_of(TOKENS[:, :length]), whole[:, :length])
    changed = TOKENS.clone()
    changed[1, position] += 1
    found = noise_of(changed)
    assert torch.equal(found[1, :position], whole[1, :position])
    assert not (found[1, position:] == whole[1, position:]).any()


def test_noise_differs_by_seed_layer_link_expert_position_and_token():
    whole = noise_of(TOKENS)
    assert len(whole.unique()) == whole.numel()
    for other in (noise_of(TOKENS, seed=2), noise_of(TOKENS, layer=1), noise_of(TOKENS, link=1)):
        assert not torch.isin(other, whole).any()
    swapped = TOKENS.clone()
    swapped[0, :2] = swapped[0, :2].flip(0)
    assert TOKENS[0, 0] != TOKENS[0, 1]
    assert not (noise_of(swapped)[0, 1:] == whole[0, 1:]).any()  # the order of the prefix matters


def test_noise_is_gumbel_and_neighbours_are_independent():
    tokens = torch.randint(4_000, (20, 500), generator=torch.Generator().manual_seed(0))
    noise = noise_of(tokens, num_experts=16).double()
    uniform = torch.exp(-torch.exp(-noise))
    counts = torch.histc(uniform.flatten(), bins=64, min=0.0, max=1.0)
    expected = noise.numel() / 64
    # Chi-square with 63 degrees of freedom: 63 +- 11.2.
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * 11.2
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    centred = uniform - 0.5
    for dim in (0, 1, 2):
        pairs = centred.narrow(dim, 1, centred.shape[dim] - 1) * centred.narrow(dim, 0, centred.shape[dim] - 1)
        # Of n independent pairs the mean has a deviation of 1 / (12 sqrt(n)).
        assert abs(pairs.mean().item()) < 4 / (12 * math.sqrt(pairs.numel()))


def test_sampling_picks_with_the_odds_of_the_scores():
    router = make_router(num_experts=4, num_picked=1, renormalise=False)
    x = hidden(1).expand(20_000, -1)
    noise = routing_noise(torch.arange(20_000)[:, None], 4, seed=3, layer=0, link=0)
    routing = router(x, noise)
    share = torch.bincount(routing.picks_MJ.flatten(), minlength=4) / 20_000
    torch.testing.assert_close(share, routing.scores_ME[0].float().detach(), rtol=0, atol=0.015)
    # The weights are the scores themselves, whatever noise made of the picks.
    assert torch.equal(routing.weights_MJ, routing.scores_ME.gather(1, routing.picks_MJ))


def test_sampling_follows_the_bias():
    router = make_router(num_experts=4, num_picked=1, bias="sign")
    with torch.no_grad():
        router.bias.copy_(torch.tensor([-2.0, 0.0, 0.0, 0.0]))
    x = hidden(1).expand(2_000, -1)
    noise = routing_noise(torch.arange(2_000)[:, None], 4, seed=3, layer=0, link=0)
    assert torch.bincount(router(x, noise).picks_MJ.flatten(), minlength=4)[0] == 0


# --- What a step leaves behind.


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sign", [-1.0, 0.0, 1.0, 1.0]),
        ("proportional", [-6 / 4, 0.0, 3 / 4, 3 / 4]),
    ],
)
def test_the_bias_moves_against_the_load_and_keeps_its_mean(kind, expected):
    router = make_router(num_experts=4, num_picked=1, bias=kind, bias_rate=0.01)
    before = router.bias.clone()
    router.move_bias(torch.tensor([10, 4, 1, 1]))
    delta = torch.tensor(expected)
    torch.testing.assert_close(router.bias - before, 0.01 * (delta - delta.mean()), rtol=1e-4, atol=1e-8)
    assert router.bias.dtype == torch.float32


@pytest.mark.parametrize("kind", ["sign", "proportional"])
def test_without_picks_nothing_moves(kind):
    router = make_router(bias=kind, balance="global")
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    router.move_bias(torch.zeros(8, dtype=torch.int64))
    router.set_load(torch.zeros(8, dtype=torch.int64))
    assert all(torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())


def test_counts_beyond_fp32_are_compared_exactly():
    router = make_router(num_experts=2, num_picked=1, bias="sign", bias_rate=0.5)
    with torch.no_grad():
        router.bias.zero_()
    router.move_bias(torch.tensor([2**30 + 1, 2**30]))
    assert router.bias.tolist() == [-0.5, 0.5]

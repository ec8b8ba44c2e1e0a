import dataclasses

import pytest
import torch
from torch import Tensor, nn

from kernels.swiglu import swiglu_reference
from model.config import ModelConfig
from model.init import initial_value
from model.mlp import MLP
from model.moe import MoE
from model.moe_config import MoEConfig
from model.router import RoutingInputs

HIDDEN, EXPERTS, SIZE = 16, 6, 10
TOKENS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))


def make_moe(dtype: torch.dtype = torch.float64, seed: int = 0, layer: int = 0, **settings) -> MoE:
    moe = MoEConfig(**{"num_experts": EXPERTS, "num_picked": 2, "expert_size": SIZE, **settings})
    config = ModelConfig(hidden_size=HIDDEN, ffn_size=20, init="gpt2", init_std=0.4, moe=moe)
    module = MoE(config, layer).to(dtype)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.copy_(initial_value(config, f"blocks.{layer}.moe.{name}", tensor.shape, seed))
        for name, buffer in module.named_buffers():
            drawn = torch.randn(buffer.shape, generator=torch.Generator().manual_seed(seed))
            buffer.copy_(drawn.softmax(dim=0) if name.endswith("load") else 0.05 * drawn)
    return module


def hidden(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


INPUTS = RoutingInputs(counted_BT=None, noise_seed=None, tokens_BT=TOKENS)


def by_all_experts(moe: MoE, x: Tensor, link: int = 0) -> Tensor:
    """Every token through every expert, weighted by zero where it was not sent."""
    routing = moe.routers[link](x.flatten(0, 1))
    weights = torch.zeros_like(routing.scores_ME).scatter(1, routing.picks_MJ, routing.weights_MJ)
    h = torch.einsum("md,efd->mef", x.flatten(0, 1), moe.experts.gate_up)
    y = torch.einsum("mef,edf,me->md", swiglu_reference(h), moe.experts.down, weights).view(x.shape)
    if moe.shared is not None:
        shared = moe.shared(x)
        y = y + (torch.sigmoid(moe.shared_gate(x)) * shared if moe.shared_gate is not None else shared)
    return y


def gradients(module: nn.Module, y: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    found = torch.autograd.grad(y, list(module.parameters()), direction)
    return {name: gradient for (name, _), gradient in zip(module.named_parameters(), found)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"renormalise": False},
        {"scores": "sigmoid", "bias": "sign", "route_scale": 2.5, "num_groups": 3, "num_picked_groups": 2},
        {"shared_size": 12},
        {"shared_size": 12, "shared_gate": True, "temperature": 0.5},
        {"num_picked": EXPERTS},
        {"num_picked": 1},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_all_experts_weighted(settings):
    moe = make_moe(**settings)
    x = hidden().requires_grad_()
    found, _ = moe(x)
    expected = by_all_experts(moe, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients(moe, found), gradients(moe, expected), rtol=1e-11, atol=1e-12)
    direction = torch.ones_like(found)
    ours, theirs = (torch.autograd.grad(y, x, direction)[0] for y in (moe(x)[0], by_all_experts(moe, x)))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("residual", ["outer", "inner", "both"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_chain_adds_where_its_residual_says(residual, length):
    moe = make_moe(chain_length=length, chain_residual=residual, shared_size=8)
    x = hidden()
    expected = x
    for link in range(length):
        made = by_all_experts(moe, expected, link)
        expected = made if residual == "outer" else expected + made
    torch.testing.assert_close(moe(x)[0], expected, rtol=1e-12, atol=1e-12)
    assert moe.replaces_stream == (residual == "inner")


def test_a_chain_of_one_is_a_plain_layer():
    plain = make_moe(balance="sequence")
    chain = make_moe(balance="sequence", chain_length=1, chain_residual="outer")
    (found, stats), (expected, expected_stats) = chain(hidden(), INPUTS), plain(hidden(), INPUTS)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, stats, expected_stats))
    assert dict(chain.named_parameters()).keys() == dict(plain.named_parameters()).keys()


def test_each_link_of_a_chain_has_a_router_and_they_share_experts():
    moe = make_moe(chain_length=2, bias="sign", shared_size=4, shared_gate=True, balance="global")
    assert {name: tuple(tensor.shape) for name, tensor in moe.state_dict().items()} == {
        "routers.0.weight": (EXPERTS, HIDDEN),
        "routers.0.bias": (EXPERTS,),
        "routers.0.load": (EXPERTS,),
        "routers.1.weight": (EXPERTS, HIDDEN),
        "routers.1.bias": (EXPERTS,),
        "routers.1.load": (EXPERTS,),
        "experts.gate_up": (EXPERTS, 2 * SIZE, HIDDEN),
        "experts.down": (EXPERTS, HIDDEN, SIZE),
        "shared.gate_up.weight": (8, HIDDEN),
        "shared.down.weight": (HIDDEN, 4),
        "shared_gate.weight": (1, HIDDEN),
    }
    _, stats = moe(hidden(), INPUTS)
    assert stats.counts_CE.sum(dim=1).tolist() == [TOKENS.numel() * 2] * 2
    assert not torch.equal(*stats.counts_CE)


def test_one_expert_is_the_dense_network():
    moe = make_moe(num_experts=1, num_picked=1)
    mlp = MLP(ModelConfig(hidden_size=HIDDEN, ffn_size=SIZE)).double()
    with torch.no_grad():
        mlp.gate_up.weight.copy_(moe.experts.gate_up[0])
        mlp.down.weight.copy_(moe.experts.down[0])
    torch.testing.assert_close(moe(hidden())[0], mlp(hidden()), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_identical_experts_are_one_dense_network(scores):
    moe = make_moe(scores=scores, num_picked=3)
    with torch.no_grad():
        for stack in (moe.experts.gate_up, moe.experts.down):
            stack.copy_(stack[:1].expand_as(stack))
    h = swiglu_reference(hidden() @ moe.experts.gate_up[0].T)
    torch.testing.assert_close(moe(hidden())[0], h @ moe.experts.down[0].T, rtol=1e-12, atol=1e-14)


def test_names_of_experts_do_not_matter():
    moe = make_moe(scores="sigmoid", bias="sign")
    expected = moe(hidden())[0]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad():
        for tensor in (moe.experts.gate_up, moe.experts.down, moe.routers[0].weight, moe.routers[0].bias):
            tensor.copy_(tensor[order])
    torch.testing.assert_close(moe(hidden())[0], expected, rtol=1e-13, atol=1e-14)


def test_without_inputs_nothing_is_counted():
    moe = make_moe(balance="sequence", z_loss=0.1)
    y, stats = moe(hidden())
    assert stats is None
    assert torch.equal(y, moe(hidden(), INPUTS)[0])


def test_experts_without_tokens_get_gradients_of_zeros():
    moe = make_moe(num_picked=1)
    with torch.no_grad():
        moe.routers[0].weight.zero_()  # a tie, which the first expert wins
    found = gradients(moe, moe(hidden())[0])
    for name in ("experts.gate_up", "experts.down"):
        assert found[name][0].abs().max() > 0
        assert torch.equal(found[name][1:], torch.zeros_like(found[name][1:]))


def test_uncounted_tokens_pass_through_experts_all_the_same():
    moe = make_moe(balance="sequence")
    counted = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    y, stats = moe(hidden(), dataclasses.replace(INPUTS, counted_BT=counted))
    assert torch.equal(y, moe(hidden())[0])
    picks = moe.routers[0](hidden().flatten(0, 1)).picks_MJ
    expected = torch.bincount(picks[counted.flatten()].flatten(), minlength=EXPERTS)
    assert stats.counts_CE.dtype == torch.int64
    assert torch.equal(stats.counts_CE, expected[None])


def test_only_sampling_with_a_seed_draws_noise():
    moe, plain = make_moe(sampling=True), make_moe()
    seeded = dataclasses.replace(INPUTS, noise_seed=5)
    expected = plain(hidden())[0]
    assert torch.equal(moe(hidden())[0], expected)
    assert torch.equal(moe(hidden(), INPUTS)[0], expected)
    assert torch.equal(plain(hidden(), seeded)[0], expected)
    sampled = moe(hidden(), seeded)[0]
    assert not torch.equal(sampled, expected)
    assert torch.equal(sampled, moe(hidden(), seeded)[0])
    assert not torch.equal(sampled, moe(hidden(), dataclasses.replace(INPUTS, noise_seed=6))[0])
    other_layer = make_moe(sampling=True, layer=1)
    other_layer.load_state_dict(moe.state_dict())
    assert not torch.equal(sampled, other_layer(hidden(), seeded)[0])


def test_sampled_rows_do_not_depend_on_the_batch_they_are_in():
    moe = make_moe(sampling=True)
    seeded = dataclasses.replace(INPUTS, noise_seed=5)
    whole, stats = moe(hidden(), seeded)
    rows = [moe(hidden()[b : b + 1], dataclasses.replace(seeded, tokens_BT=TOKENS[b : b + 1])) for b in range(2)]
    torch.testing.assert_close(torch.cat([y for y, _ in rows]), whole, rtol=1e-13, atol=1e-14)
    assert torch.equal(sum(row.counts_CE for _, row in rows), stats.counts_CE)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("settings", [{}, {"chain_length": 2}, {"kind": "chunk_soft", "chunk_size": 4}], ids=str)
def test_the_output_is_no_view_which_fsdp_would_warn_of(settings, recompute):
    moe = make_moe(torch.float32, **settings)
    moe.recompute = recompute
    assert not moe(hidden(torch.float32).requires_grad_())[0]._is_view()


# --- Recomputation.

RECOMPUTED = [
    {"balance": "sequence", "z_loss": 0.1},
    {"scores": "sigmoid", "bias": "sign", "shared_size": 8, "shared_gate": True},
    {"chain_length": 2, "chain_residual": "both", "balance": "global"},
    {"sampling": True, "balance": "switch"},
    {"kind": "chunk_soft", "chunk_size": 4, "shared_size": 8},
]


def run(moe: MoE, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, a loss with the penalty in it, and the counts."""
    y, stats = moe(hidden(dtype), dataclasses.replace(INPUTS, noise_seed=5))
    loss = y.square().sum()
    return y, loss if stats is None else loss + stats.penalty_sum, None if stats is None else stats.counts_CE


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", RECOMPUTED, ids=str)
def test_recomputed_experts_give_the_same_bits(settings, dtype):
    moe = make_moe(dtype, **settings)
    expected, expected_loss, expected_counts = run(moe, dtype)
    expected_gradients = torch.autograd.grad(expected_loss, list(moe.parameters()))
    moe.recompute = True
    found, loss, counts = run(moe, dtype)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(loss, list(moe.parameters())), expected_gradients))
    assert (counts is None and expected_counts is None) or torch.equal(counts, expected_counts)


@pytest.mark.parametrize("settings", RECOMPUTED[:4], ids=str)
def test_a_router_that_changes_before_the_backward_re_routes_nothing(settings):
    runs_of_routers: list[bool] = []

    def gradients_after_the_change(recompute: bool) -> tuple[Tensor, ...]:
        moe = make_moe(**settings)
        moe.recompute = recompute
        _, loss, _ = run(moe)
        for router in moe.routers:
            router.register_forward_hook(lambda *_: runs_of_routers.append(recompute))
            # Through .data, or autograd itself would refuse: it is the recomputation that must not look.
            for tensor in (router.weight, *router.buffers()):
                tensor.data.neg_()
        return torch.autograd.grad(loss, list(moe.parameters()))

    assert all(
        map(torch.equal, gradients_after_the_change(recompute=True), gradients_after_the_change(recompute=False))
    )
    assert not runs_of_routers


def test_recomputation_keeps_less():
    def kept_bytes(recompute: bool) -> int:
        moe = make_moe(num_picked=4, expert_size=64)
        moe.recompute = recompute
        parameters = {parameter.data_ptr() for parameter in moe.parameters()}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = moe(hidden())[0]
        assert y.requires_grad
        return sum(sizes.values())

    assert kept_bytes(recompute=True) < kept_bytes(recompute=False) / 4


@torch.no_grad()
def test_without_gradients_nothing_is_wrapped_for_recomputation(monkeypatch):
    moe = make_moe()
    expected = moe(hidden())[0]
    moe.recompute = True
    monkeypatch.setattr("model.moe.checkpoint", None)
    assert torch.equal(moe(hidden())[0], expected)

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from model.balance import LayerLoad, RoutingLog, apply_counts, load_statistics, router_stats, set_load
from model.config import ModelConfig
from model.moe_config import MoEConfig
from model.router import Router, RouterStats, Routing
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, make_model, random_tokens

EXPERTS, PICKS = 8, 2


def random_routing(num_tokens: int, scores: str = "softmax", seed: int = 0) -> Routing:
    router = Router(MoEConfig(num_experts=EXPERTS, num_picked=PICKS, scores=scores), 6).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
    return router(torch.randn(num_tokens, 6, generator=generator, dtype=torch.float64))


def stats_of(routing: Routing, batch_size: int, counted: Tensor | None = None, load=None, **settings) -> RouterStats:
    moe = MoEConfig(num_experts=EXPERTS, num_picked=PICKS, **settings)
    return router_stats(moe, routing, load, batch_size, counted)


def counted_tokens(rows: int, length: int) -> Tensor:
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(9)) < 0.6


# --- Against the formulas, written anew.


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_sequence_loss_is_its_formula(scores):
    routing, counted = random_routing(3 * 10, scores), counted_tokens(3, 10)
    expected = 0.0
    for row in range(3):
        tokens = [row * 10 + t for t in range(10) if counted[row, t]]
        for i in range(EXPERTS):
            f = EXPERTS / (PICKS * len(tokens)) * sum(i in routing.picks_MJ[t] for t in tokens)
            p = sum(routing.scores_ME[t, i] / routing.scores_ME[t].sum() for t in tokens) / len(tokens)
            expected += len(tokens) * f * p
    found = stats_of(routing, 3, counted, scores=scores, balance="sequence", balance_weight=0.25)
    torch.testing.assert_close(found.penalty_sum, 0.25 * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("counted", [None, counted_tokens(4, 16)], ids=["all", "some"])
def test_with_the_load_of_the_step_it_is_the_switch_loss_and_a_kth_of_hugging_faces(counted):
    routing = random_routing(64)
    counts = stats_of(routing, 4, counted).counts_CE[0]
    load = counts.double() / counts.sum()
    num_counted = 64 if counted is None else int(counted.sum())
    found = stats_of(routing, 4, counted, load, balance="switch", balance_weight=1.0).penalty_sum / num_counted
    mask = None if counted is None else counted.double()
    theirs = load_balancing_loss_func((routing.logits_ME,), EXPERTS, PICKS, mask)
    torch.testing.assert_close(found, theirs.double() / PICKS, rtol=1e-6, atol=0)
    is_counted = torch.ones(64, dtype=torch.bool) if counted is None else counted.flatten()
    mean_scores = routing.logits_ME.softmax(dim=-1)[is_counted].mean(dim=0)
    torch.testing.assert_close(found, EXPERTS * (load * mean_scores).sum(), rtol=1e-12, atol=0)


def test_a_perfect_balance_costs_one():
    uniform = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    picks = torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], dim=1)
    routing = Routing(picks, uniform[:, :PICKS], uniform, uniform.log())
    for balance, load in (("sequence", None), ("switch", uniform[0]), ("global", uniform[0])):
        stats = stats_of(routing, 1, None, load, balance=balance, balance_weight=1.0)
        assert stats.penalty_sum.item() / EXPERTS == pytest.approx(1.0)
    assert stats.entropy_sum.item() / EXPERTS == pytest.approx(math.log(EXPERTS))


def test_the_z_loss_is_the_square_of_the_log_partition():
    routing, counted = random_routing(30), counted_tokens(3, 10)
    log_partitions = torch.log(torch.exp(routing.logits_ME).sum(dim=-1))
    expected = (log_partitions**2)[counted.flatten()].sum()
    stats = stats_of(routing, 3, counted, z_loss=0.5)
    torch.testing.assert_close(stats.z_sum, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.penalty_sum, 0.5 * expected, rtol=1e-12, atol=0)
    assert stats.penalty_sum.requires_grad
    assert not stats.z_sum.requires_grad
    assert not stats.entropy_sum.requires_grad


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_entropy_is_that_of_the_normalised_scores(scores):
    routing, counted = random_routing(30, scores), counted_tokens(3, 10)
    p = routing.scores_ME[counted.flatten()]
    p = p / p.sum(dim=-1, keepdim=True)
    stats = stats_of(routing, 3, counted, scores=scores)
    torch.testing.assert_close(stats.entropy_sum, -(p * p.log()).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("balance", ["none", "sequence", "switch"])
def test_a_batch_without_targets_costs_and_counts_nothing(balance):
    routing, nothing = random_routing(30), torch.zeros(3, 10, dtype=torch.bool)
    load = torch.full((EXPERTS,), 1 / EXPERTS) if balance == "switch" else None
    stats = stats_of(routing, 3, nothing, load, balance=balance, z_loss=0.1)
    assert [value.sum().item() for value in stats] == [0.0, 0, 0.0, 0.0]
    assert stats.counts_CE.dtype == torch.int64
    (gradient,) = torch.autograd.grad(stats.penalty_sum, routing.logits_ME)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_uncounted_token_has_no_gradient_from_the_penalty():
    routing, counted = random_routing(30), counted_tokens(3, 10)
    penalty_sum = stats_of(routing, 3, counted, balance="sequence", z_loss=0.1).penalty_sum
    (gradient,) = torch.autograd.grad(penalty_sum, routing.logits_ME)
    assert torch.equal((gradient != 0).any(dim=-1), counted.flatten())


# --- Whole models: however the step is cut, it is the same step.

INVARIANT = {
    name: dataclasses.replace(MOE_VARIANTS[base], moe=dataclasses.replace(MOE_VARIANTS[base].moe, **settings))
    for name, base, settings in [
        ("sequence", "qwen3-moe", {}),
        ("switch", "mixtral", {"z_loss": 1e-2}),
        ("global, shared, some layers dense", "qwen2-moe", {}),
        ("sigmoid, groups, bias", "deepseek-v3", {}),
        ("chain", "chain outer", {}),
        ("sampled", "sampling", {"balance": "global", "bias": "proportional"}),
    ]
}


def train_step(model: Transformer, tokens: Tensor, counted: Tensor, cuts: list[slice], noise_seed: int = 3) -> Tensor:
    """The gradients of all parameters, one after the other, and the state of the buffers after one step."""
    num_targets, counts = counted.sum(), 0
    if model.config.moe.balance == "switch":
        logs = [RoutingLog(counted[cut], noise_seed) for cut in cuts]
        with torch.no_grad():
            for log, cut in zip(logs, cuts):
                model(tokens[cut], routing=log)
        set_load(model, sum(log.counts_LCE for log in logs))
    model.zero_grad()
    for cut in cuts:
        log = RoutingLog(counted[cut], noise_seed)
        logits = model(tokens[cut], routing=log)
        targets = tokens[cut].roll(-1, dims=1).masked_fill(~counted[cut], -100)
        loss_sum = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        ((loss_sum + log.penalty_sum) / num_targets).backward()
        counts = counts + log.counts_LCE
    apply_counts(model, counts)
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat([*gradients, *(buffer.double() for buffer in model.buffers())])


@pytest.mark.parametrize("recompute", ["nothing", "blocks"])
@pytest.mark.parametrize("variant", INVARIANT)
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(variant, recompute):
    config = INVARIANT[variant]
    tokens, counted = random_tokens(config, 4, 12), counted_tokens(4, 12)
    counted[2] = False  # a row without targets, alone in a micro-batch
    cuts = [
        [slice(0, 4)],
        [slice(0, 2), slice(2, 4)],
        [slice(0, 1), slice(1, 4)],
        [slice(2, 3), slice(0, 2), slice(3, 4)],
    ]
    results = []
    for i, cut in enumerate(cuts):
        model = make_model(config, dtype=torch.float64)
        for block in model.blocks:
            block.recompute = "nothing" if i == 0 else recompute
        results.append(train_step(model, tokens, counted, cut))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["sequence", "switch", "chain"])
def test_the_penalty_reaches_routers_with_its_own_gradient(variant):
    model = make_model(INVARIANT[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 12)
    weights = [parameter for name, parameter in model.named_parameters() if "routers" in name]

    def penalty_sum() -> Tensor:
        log = RoutingLog()
        model(tokens, routing=log)
        return log.penalty_sum

    direction = [torch.randn(w.shape, generator=torch.Generator().manual_seed(i)) for i, w in enumerate(weights)]
    gradients = torch.autograd.grad(penalty_sum(), weights)
    slope = sum((gradient * d).sum() for gradient, d in zip(gradients, direction))
    step, found = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, d in zip(weights, direction):
                weight.add_(sign * step * d)
            found.append(penalty_sum())
            for weight, d in zip(weights, direction):
                weight.sub_(sign * step * d)
    assert abs(slope.item()) > 1e-3
    torch.testing.assert_close(slope, (found[0] - found[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_log_has_the_layers_in_order_and_their_sum():
    model = make_model(MOE_VARIANTS["chain outer"], dtype=torch.float64)
    log = RoutingLog()
    model(random_tokens(model.config, 2, 12), routing=log)
    assert log.counts_LCE.shape == (2, 2, 4)
    assert log.counts_LCE.sum(dim=-1).tolist() == [[2 * 12 * 2] * 2] * 2
    torch.testing.assert_close(log.penalty_sum, sum(stats.penalty_sum for stats in log.layers))


@pytest.mark.parametrize("config", [LLAMA, MOE_VARIANTS["chunk soft"]], ids=["dense", "soft"])
def test_a_model_without_routers_has_nothing_to_balance(config):
    log = RoutingLog()
    model = make_model(config)
    model(random_tokens(config, 1, 6), routing=log)
    assert log.penalty_sum.item() == 0
    assert log.counts_LCE.shape == (0, 0, 0)
    apply_counts(model, log.counts_LCE)
    assert load_statistics(log.counts_LCE) == []


def test_each_router_gets_its_own_counts():
    config = dataclasses.replace(LLAMA, moe=MoEConfig(num_experts=4, chain_length=2, balance="global", bias="sign"))
    model = make_model(config)
    counts = torch.randint(1, 50, (2, 2, 4), generator=torch.Generator().manual_seed(0))
    apply_counts(model, counts)
    for layer in range(2):
        for link in range(2):
            load = counts[layer, link] / counts[layer, link].sum()
            torch.testing.assert_close(model.blocks[layer].moe.routers[link].load, load)


def test_only_the_global_loss_reads_the_load_of_the_step_before():
    model = make_model(INVARIANT["switch"])
    before = [buffer.clone() for buffer in model.buffers()]
    counts = torch.tensor([[[1, 2, 3, 4]]]).expand(2, 1, 4)
    apply_counts(model, counts)
    assert all(map(torch.equal, model.buffers(), before))
    set_load(model, counts)
    assert all(torch.equal(buffer, torch.tensor([0.1, 0.2, 0.3, 0.4])) for buffer in model.buffers())


# --- Balancing without a loss.


@pytest.mark.parametrize(("kind", "rate", "num_steps"), [("sign", 1e-3, 300), ("proportional", 1e-2, 60)])
def test_the_bias_balances_a_skewed_router(kind, rate, num_steps):
    moe = MoEConfig(num_experts=32, num_picked=4, scores="sigmoid", bias=kind, bias_rate=rate)
    router = Router(moe, 32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.eye(32))
    skew = 0.5 * torch.randn(32, generator=generator)
    violations = []
    for _ in range(num_steps + 1):
        with torch.no_grad():
            picks = router(skew + 0.5 * torch.randn(4_096, 32, generator=generator)).picks_MJ
        counts = torch.bincount(picks.flatten(), minlength=32)
        violations.append(load_statistics(counts[None, None])[0].max_violation)
        router.move_bias(counts)
    assert violations[0] > 1
    assert min(violations) < 0.1, f"smallest {min(violations)}"
    # What is left is the noise of 4096 tokens: it stays so.
    assert sorted(violations[-10:])[5] < 0.15


# --- Figures of load.


def test_figures_of_a_load_known_by_hand():
    counts = torch.tensor([[[10, 10, 10, 10]], [[40, 0, 0, 0]], [[15, 13, 12, 0]], [[0, 0, 0, 0]]])
    assert load_statistics(counts) == [
        LayerLoad(max_violation=0.0, dead=0, would_drop=0.0),
        # A capacity of ceil(1.25 * 10) = 13.
        LayerLoad(max_violation=3.0, dead=3, would_drop=27 / 40),
        LayerLoad(max_violation=0.5, dead=1, would_drop=2 / 40),
        LayerLoad(max_violation=0.0, dead=0, would_drop=0.0),
    ]


def test_a_chain_is_judged_by_its_worst_link():
    # Together the links load all experts alike, and yet each pass waits for one expert.
    (load,) = load_statistics(torch.tensor([[[20, 0], [0, 20]]]))
    assert load == LayerLoad(max_violation=1.0, dead=0, would_drop=14 / 40)


def test_the_default_moe_presets_build_and_count():
    for name in ("moe-smoke", "deepseek-smoke"):
        config = dataclasses.replace(ModelConfig.preset(name), vocab_size=64)
        model = make_model(config)
        log = RoutingLog()
        model(random_tokens(config, 1, 8), routing=log)
        layers = len(config.expert_layers)
        assert log.counts_LCE.sum(dim=-1).tolist() == [[8 * config.moe.num_picked]] * layers

import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.swiglu import swiglu_reference
from model.config import ModelConfig
from model.moe_config import MoEConfig
from model.transformer import Transformer
from model.upcycle import UpcycleError, upcycle
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

COPIES = {"num_experts": 4, "num_picked": 2, "expert_size": LLAMA.ffn_size}
SHARDS = {"num_experts": 12, "num_picked": 6, "expert_size": LLAMA.ffn_size // 3}

EXACT = [
    COPIES,
    SHARDS,
    COPIES | {"scores": "sigmoid", "route_scale": 2.5, "bias": "sign", "balance": "sequence"},
    SHARDS | {"scores": "sigmoid", "route_scale": 2.5, "num_groups": 4, "num_picked_groups": 3},
    SHARDS | {"num_picked": 3, "first_dense_layers": 1, "balance": "global"},
    COPIES | {"shared_size": 10, "shared_gate": True, "sampling": True, "temperature": 0.5},
    COPIES | {"num_picked": 4, "renormalise": False},
]


def load(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    model = Transformer(config).double()
    model.load_state_dict(state)
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama", "qwen3 tied"])
@pytest.mark.parametrize("moe", EXACT, ids=str)
def test_the_mixture_computes_what_the_dense_model_did(moe, variant):
    dense = make_model(VARIANTS[variant], dtype=torch.float64)
    config, state = upcycle(dense.config, dense.state_dict(), MoEConfig(**moe), seed=1)
    assert config == dataclasses.replace(dense.config, moe=MoEConfig(**moe))
    mixture = load(config, state)
    tokens = random_tokens(dense.config, 2, 20)
    torch.testing.assert_close(mixture(tokens), dense(tokens), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_it_is_exact_because_shards_are_picked_together():
    dense = make_model(LLAMA, dtype=torch.float64)
    mixture = load(*upcycle(LLAMA, dense.state_dict(), MoEConfig(**SHARDS), seed=1))
    x = torch.randn(50, LLAMA.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    picks = mixture.blocks[0].moe.routers[0](x).picks_MJ
    assert len(picks.div(3, rounding_mode="floor").unique(dim=0)) > 1  # different tokens, different copies
    for picked in picks.sort().values.tolist():
        assert picked == [3 * copy + shard for copy in sorted({expert // 3 for expert in picked}) for shard in range(3)]


@torch.no_grad()
def test_a_shard_is_a_slice_of_the_dense_network_and_its_gate_is_not_scaled():
    dense = make_model(LLAMA, dtype=torch.float64)
    _, state = upcycle(LLAMA, dense.state_dict(), MoEConfig(**SHARDS), seed=1)
    gate_up, down = (dense.state_dict()[f"blocks.1.mlp.{name}.weight"] for name in ("gate_up", "down"))
    x = torch.randn(LLAMA.hidden_size, dtype=torch.float64)
    h = swiglu_reference(gate_up @ x)
    for expert in range(12):
        part = slice(expert % 3 * 16, expert % 3 * 16 + 16)
        found = swiglu_reference(state["blocks.1.moe.experts.gate_up"][expert] @ x)
        torch.testing.assert_close(found, h[part], rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(state["blocks.1.moe.experts.down"][expert], 3 * down[:, part], rtol=0, atol=0)


def test_names_and_shapes_are_those_of_a_new_mixture():
    dense = make_model(VARIANTS["llama tied"], dtype=torch.bfloat16)
    moe = MoEConfig(**COPIES, bias="sign", balance="switch", shared_size=6, shared_gate=True, first_dense_layers=1)
    config, state = upcycle(dense.config, dense.state_dict(), moe, seed=1)
    expected = Transformer(config).to(torch.bfloat16).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert torch.equal(state["blocks.1.moe.routers.0.load"], torch.full((4,), 0.25))


def test_noise_parts_experts_and_is_drawn_by_seed_and_name():
    dense = make_model(LLAMA)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    plain = upcycle(LLAMA, state, MoEConfig(**COPIES), seed=1)[1]
    noisy, again, other = (upcycle(LLAMA, state, MoEConfig(**COPIES), seed=seed, sigma=0.1)[1] for seed in (1, 1, 2))
    assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())  # left as they were
    for name in ("blocks.0.moe.experts.gate_up", "blocks.1.moe.experts.down"):
        noise = noisy[name] - plain[name]
        assert torch.equal(noisy[name], again[name])
        assert not torch.equal(noisy[name], other[name])
        assert not torch.equal(noise[0], noise[1])
        relative = noise.std(dim=(1, 2)) / plain[name].std(dim=(1, 2))
        torch.testing.assert_close(relative, torch.full_like(relative, 0.1), rtol=0.1, atol=0)
    assert torch.equal(noisy["blocks.0.moe.routers.0.weight"], plain["blocks.0.moe.routers.0.weight"])
    assert not torch.equal(plain["blocks.0.moe.routers.0.weight"], plain["blocks.1.moe.routers.0.weight"])


@pytest.mark.parametrize(
    ("config", "moe", "message"),
    [
        (LLAMA, COPIES | {"expert_size": 10}, "expert_size = 10 does not divide model.ffn_size = 48"),
        (LLAMA, SHARDS | {"num_experts": 13}, "num_experts = 13 and num_picked = 6: both must be multiples of 3"),
        (LLAMA, SHARDS | {"num_picked": 4}, "num_experts = 12 and num_picked = 4: both must be multiples of 3"),
        (LLAMA, SHARDS | {"num_groups": 6, "num_picked_groups": 4}, "groups of 2 experts would part the 3 shards"),
        (LLAMA, COPIES | {"renormalise": False}, "do not add up to a constant"),
        (LLAMA, COPIES | {"renormalise": False, "scores": "sigmoid", "num_picked": 4}, "do not add up to a constant"),
        (LLAMA, COPIES | {"chain_length": 2}, 'upcycle to kind = "picked", chain_length = 1'),
        (LLAMA, COPIES | {"chain_residual": "inner"}, 'chain_residual = "outer"'),
        (LLAMA, COPIES | {"kind": "chunk_soft"}, "never equal a dense network"),
        (LLAMA, {}, "no layer would have experts"),
        (VARIANTS["senet"], COPIES, 'model.ffn = "senet"'),
        (VARIANTS["gemma2"], COPIES, 'model.ffn = "geglu"'),
        (MOE_VARIANTS["mixtral"], COPIES, "has experts already"),
    ],
)
def test_a_mixture_that_would_not_be_the_dense_model_is_refused(config, moe, message):
    with pytest.raises(UpcycleError, match=message):
        upcycle(config, {}, MoEConfig(**moe), seed=1)


def test_tensors_that_are_not_the_dense_models_are_refused():
    state = make_model(LLAMA).state_dict()
    wider = dataclasses.replace(LLAMA, ffn_size=96)
    with pytest.raises(UpcycleError, match=r"blocks.0.mlp: matrices of \(96, 32\) and \(32, 48\) for model.ffn_size"):
        upcycle(wider, state, MoEConfig(**COPIES), seed=1)
    del state["blocks.1.mlp.down.weight"]
    with pytest.raises(UpcycleError, match="blocks.1.mlp.down.weight is missing"):
        upcycle(LLAMA, state, MoEConfig(**COPIES), seed=1)
    with pytest.raises(UpcycleError, match="sigma = -1.0: must not be negative"):
        upcycle(LLAMA, state, MoEConfig(**COPIES), seed=1, sigma=-1.0)

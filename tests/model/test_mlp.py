import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from model.config import ModelConfig
from model.mlp import MLP

CONFIG = ModelConfig(hidden_size=12, ffn_size=20)


def make(kind: str, size: int | None = None) -> MLP:
    torch.manual_seed(0)
    return MLP(dataclasses.replace(CONFIG, ffn=kind), size).double()


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


@pytest.mark.parametrize(
    ("kind", "theirs", "their_config"),
    [
        ("swiglu", LlamaMLP, LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)),
        ("geglu", Gemma2MLP, Gemma2Config(hidden_size=12, intermediate_size=20, num_attention_heads=2)),
    ],
)
def test_gated_networks_are_those_of_transformers(kind, theirs, their_config):
    ours, oracle = make(kind), theirs(their_config).double()
    with torch.no_grad():
        gate, up = ours.gate_up.weight.chunk(2)
        for layer, weight in ((oracle.gate_proj, gate), (oracle.up_proj, up), (oracle.down_proj, ours.down.weight)):
            layer.weight.copy_(weight)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), oracle(x), rtol=1e-13, atol=1e-13)


def test_senet_is_two_gated_stages():
    mlp = make("senet")
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    gate_up, up = mlp.gate_up.weight.chunk(2)
    gate_down, down = mlp.gate_down.weight.chunk(2)
    z = silu(x @ gate_up.T) * (x @ up.T)
    torch.testing.assert_close(mlp(x), silu(z @ gate_down.T) * (z @ down.T), rtol=1e-13, atol=1e-13)
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == {
        "gate_up.weight": (40, 12),
        "gate_down.weight": (24, 20),
    }


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "senet"])
def test_a_width_of_its_own_replaces_the_configs(kind):
    mlp = make(kind, 6)
    assert mlp.gate_up.weight.shape == (12, 12)
    assert mlp(torch.ones(3, 12, dtype=torch.float64)).shape == (3, 12)

import dataclasses
import math

import pytest
import torch

from model.config import ModelConfig
from model.init import initial_value, standard_deviation
from model.transformer import Transformer
from tests.models import VARIANTS

CONFIG = ModelConfig(hidden_size=512, num_layers=8, init="gpt2", init_std=0.02)
TINYLLAMA = dataclasses.replace(CONFIG, init="tinyllama")
SHAPE = torch.Size((400, 500))


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (CONFIG, "embedding.weight", 0.02),
        (CONFIG, "head.weight", 0.02),
        (CONFIG, "blocks.3.attention.qkv.weight", 0.02),
        (CONFIG, "blocks.3.mlp.gate_up.weight", 0.02),
        (CONFIG, "blocks.3.attention.out.weight", 0.02 / math.sqrt(16)),
        (CONFIG, "blocks.3.mlp.down.weight", 0.02 / math.sqrt(16)),
        (TINYLLAMA, "embedding.weight", math.sqrt(2 / (5 * 512))),
        (TINYLLAMA, "blocks.0.mlp.gate_up.weight", math.sqrt(2 / (5 * 512))),
        (TINYLLAMA, "blocks.0.attention.out.weight", 1 / (math.sqrt(512) * 8)),
        (TINYLLAMA, "blocks.0.mlp.down.weight", 1 / (math.sqrt(512) * 8)),
    ],
)
def test_matrices_have_the_spread_of_their_scheme(config, name, expected):
    assert standard_deviation(config, name) == pytest.approx(expected)
    value = initial_value(config, name, SHAPE, seed=1)
    assert value.dtype == torch.float32
    assert value.std().item() == pytest.approx(expected, rel=0.01)
    assert abs(value.mean().item()) < 0.02 * expected
    # Normal, not uniform or truncated: the fourth moment of a normal is three squared variances.
    assert (value.double() ** 4).mean().item() == pytest.approx(3 * expected**4, rel=0.05)


def test_values_depend_on_name_and_seed_alone():
    first = initial_value(CONFIG, "blocks.0.mlp.down.weight", SHAPE, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, initial_value(CONFIG, "blocks.0.mlp.down.weight", SHAPE, seed=1))
    deeper = dataclasses.replace(CONFIG, vocab_size=5)
    assert torch.equal(first, initial_value(deeper, "blocks.0.mlp.down.weight", SHAPE, seed=1))
    assert not torch.equal(first, initial_value(CONFIG, "blocks.0.mlp.down.weight", SHAPE, seed=2))
    assert not torch.equal(first, initial_value(CONFIG, "blocks.1.mlp.down.weight", SHAPE, seed=1))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_value(CONFIG, "embedding.weight", SHAPE, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_norms_start_as_ones_and_biases_as_zeros(variant):
    config = VARIANTS[variant]
    with torch.device("meta"):
        model = Transformer(config)
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert vectors
    for name, parameter in vectors.items():
        expected = 0.0 if name.endswith("bias") else 1.0
        assert torch.equal(initial_value(config, name, parameter.shape, seed=0), torch.full(parameter.shape, expected))

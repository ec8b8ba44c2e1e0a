import dataclasses
import math

import pytest
import torch

from model.config import LatentConfig, ModelConfig
from model.init import initial_value, standard_deviation
from model.moe_config import MoEConfig
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS

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
        (CONFIG, "blocks.3.mlp.gate_down.weight", 0.02 / math.sqrt(16)),
        (CONFIG, "blocks.3.moe.routers.1.weight", 0.02),
        (CONFIG, "blocks.3.moe.experts.gate_up", 0.02),
        (CONFIG, "blocks.3.moe.experts.down", 0.02 / math.sqrt(16)),
        (CONFIG, "blocks.3.moe.shared.gate_up.weight", 0.02),
        (CONFIG, "blocks.3.moe.shared.down.weight", 0.02 / math.sqrt(16)),
        (CONFIG, "blocks.3.moe.shared.gate_down.weight", 0.02 / math.sqrt(16)),
        (CONFIG, "blocks.3.moe.shared_gate.weight", 0.02),
        (CONFIG, "blocks.3.moe.soft.logits", 0.02),
        (TINYLLAMA, "blocks.3.moe.experts.down", 1 / (math.sqrt(512) * 8)),
        (TINYLLAMA, "blocks.3.moe.experts.gate_up", math.sqrt(2 / (5 * 512))),
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


@pytest.mark.parametrize("config", [VARIANTS["qwen2"], VARIANTS["qwen3"], VARIANTS["gemma2"], *MOE_VARIANTS.values()])
def test_norms_start_as_the_identity_biases_as_zeros_and_loads_equal(config):
    with torch.device("meta"):
        model = Transformer(config)
    vectors = {name: p for name, p in (*model.named_parameters(), *model.named_buffers()) if p.ndim == 1}
    assert vectors
    for name, vector in vectors.items():
        expected = float(name.endswith("norm.weight") and not config.norm_offset)
        if name.endswith("load"):
            expected = 1 / config.moe.num_experts
        assert torch.equal(initial_value(config, name, vector.shape, seed=0), torch.full(vector.shape, expected)), name


# --- DeepNorm: Xavier's spread for each matrix by itself, times beta but for queries and keys.

DEEPNORM = dataclasses.replace(
    LLAMA, norms="deepnorm", hidden_size=200, num_heads=16, num_kv_heads=4, head_size=16, ffn_size=300, num_layers=2
)
BETA = 0.5  # (8 * 2) ** (-1/4)
DEEPNORM_MOE = dataclasses.replace(DEEPNORM, moe=MoEConfig(num_experts=3, expert_size=150, shared_size=100))
DEEPNORM_LATENT = dataclasses.replace(
    DEEPNORM, num_kv_heads=16, latent=LatentConfig(kv_rank=120, query_rank=100, rope_size=8, value_size=24)
)


def xavier(rows: int, columns: int) -> float:
    return math.sqrt(2 / (rows + columns))


def parts_of(config: ModelConfig, name: str, sizes: list[int]) -> list[float]:
    """The spreads of a matrix's parts, rows after rows."""
    with torch.device("meta"):
        shape = Transformer(config).get_parameter(name).shape
    value = initial_value(config, name, shape, seed=1)
    assert sum(sizes) == shape[-2]
    return [part.std().item() for part in value.split(sizes, dim=-2)]


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (DEEPNORM, "attention.qkv.weight", [(256, 1.0, 200), (64, 1.0, 200), (64, BETA, 200)]),
        (DEEPNORM, "attention.out.weight", [(200, BETA, 256)]),
        (DEEPNORM, "mlp.gate_up.weight", [(300, BETA, 200)] * 2),
        (DEEPNORM, "mlp.down.weight", [(200, BETA, 300)]),
        (dataclasses.replace(DEEPNORM, ffn="senet"), "mlp.gate_down.weight", [(200, BETA, 300)] * 2),
        (DEEPNORM_MOE, "moe.experts.gate_up", [(150, BETA, 200)] * 2),
        (DEEPNORM_MOE, "moe.experts.down", [(200, BETA, 150)]),
        (DEEPNORM_MOE, "moe.shared.gate_up.weight", [(100, BETA, 200)] * 2),
        (DEEPNORM_LATENT, "attention.query_down.weight", [(100, 1.0, 200)]),
        (DEEPNORM_LATENT, "attention.query_up.weight", [(384, 1.0, 100)]),
        (DEEPNORM_LATENT, "attention.kv_down.weight", [(128, 1.0, 200)]),
    ],
)
def test_deepnorm_spreads_each_packed_matrix_by_its_own_shape(config, name, expected):
    found = parts_of(config, f"blocks.1.{name}", [rows for rows, _, _ in expected])
    assert found == pytest.approx([gain * xavier(rows, columns) for rows, gain, columns in expected], rel=0.03)


def test_deepnorm_knows_keys_and_values_of_latent_attention_apart():
    found = parts_of(DEEPNORM_LATENT, "blocks.1.attention.kv_up.weight", [16, 24] * 16)
    assert found[::2] == pytest.approx([xavier(256, 120)] * 16, rel=0.1)
    assert found[1::2] == pytest.approx([BETA * xavier(384, 120)] * 16, rel=0.1)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "blocks.0.moe.routers.0.weight"])
def test_deepnorm_leaves_the_rest_to_the_scheme(name):
    assert initial_value(DEEPNORM_MOE, name, SHAPE, 1).std().item() == pytest.approx(
        standard_deviation(DEEPNORM_MOE, name), rel=0.02
    )

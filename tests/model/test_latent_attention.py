import dataclasses
import math

import pytest
import torch
from torch import Tensor

from kernels.rope import rope_tables
from model.cache import KVCache
from model.config import LatentConfig, ModelConfig
from model.latent_attention import LatentAttention
from tests.models import LLAMA, VARIANTS, make_model

LATENT = [name for name, config in VARIANTS.items() if config.is_latent]
in_every_variant = pytest.mark.parametrize("variant", LATENT)


def layer_of(config: ModelConfig) -> LatentAttention:
    return make_model(config, dtype=torch.float64).blocks[1].attention


def stream(length: int) -> Tensor:
    return torch.randn(2, length, LLAMA.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tables(config: ModelConfig, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + length)
    return rope_tables(positions, config.latent.rope_size, config.rope_base, torch.float64)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + LLAMA.latent.norm_eps).sqrt() * weight


def rotated(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Pairs of elements as complex numbers, turned by their angles."""
    pairs = x.unflatten(0, (-1, 2)) if config.rope_interleaved else x.unflatten(0, (2, -1)).T
    exponents = torch.arange(0, len(x), 2, dtype=torch.float64) / len(x)
    angles = position * config.rope_base**-exponents
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return turned.flatten() if config.rope_interleaved else turned.T.flatten()


def by_hand(layer: LatentAttention, config: ModelConfig, x: Tensor) -> Tensor:
    """One row, one head and one query at a time, by the paper's equations."""
    size, latent, state = config.head_size, config.latent, dict(layer.named_parameters())
    out = []
    for row in x:
        compressed = [state["kv_down.weight"] @ token for token in row]
        small = [norm(c[: latent.kv_rank], state["kv_norm.weight"]) for c in compressed]
        shared = [rotated(c[latent.kv_rank :], t, config) for t, c in enumerate(compressed)]
        for t, token in enumerate(row):
            if latent.query_rank:
                rank = norm(state["query_down.weight"] @ token, state["query_norm.weight"])
                queries = (state["query_up.weight"] @ rank).unflatten(0, (config.num_heads, -1))
            else:
                queries = (state["query.weight"] @ token).unflatten(0, (config.num_heads, -1))
            first = max(0, t - (config.sliding_window or 99) + 1)
            heads = []
            for h in range(config.num_heads):
                rows = state["kv_up.weight"].unflatten(0, (config.num_heads, -1))[h]
                query = torch.cat((queries[h, :size], rotated(queries[h, size:], t, config)))
                keys = [torch.cat((rows[:size] @ small[s], shared[s])) for s in range(first, t + 1)]
                values = [rows[size:] @ small[s] for s in range(first, t + 1)]
                scores = torch.stack(keys) @ query / math.sqrt(len(query))
                if config.attention_softcap is not None:
                    scores = config.attention_softcap * torch.tanh(scores / config.attention_softcap)
                heads.append(scores.softmax(dim=0) @ torch.stack(values))
            out.append(state["out.weight"] @ torch.cat(heads))
    return torch.stack(out).view_as(x)


@in_every_variant
@torch.no_grad()
def test_latent_attention_is_what_its_formula_says(variant):
    config = VARIANTS[variant]
    layer, x = layer_of(config), stream(9)
    torch.testing.assert_close(layer(x, *tables(config, 9)), by_hand(layer, config, x), rtol=1e-12, atol=1e-12)


@in_every_variant
def test_every_weight_gets_a_gradient_that_is_right(variant):
    config = VARIANTS[variant]
    layer, x = layer_of(config), stream(3)[:1]
    parameters = dict(layer.named_parameters())

    def function(*values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x, *tables(config, 3)))

    assert torch.autograd.gradcheck(function, tuple(parameters.values()), fast_mode=True)


def test_weights_have_the_names_and_shapes_that_checkpoints_rely_on():
    config = VARIANTS["latent query"]
    shapes = {name: tuple(parameter.shape) for name, parameter in layer_of(config).named_parameters()}
    assert shapes == {
        "query_down.weight": (10, 32),
        "query_norm.weight": (10,),
        "query_up.weight": (4 * (8 + 6), 10),
        "kv_down.weight": (12 + 6, 32),
        "kv_norm.weight": (12,),
        "kv_up.weight": (4 * (8 + 20), 12),
        "out.weight": (32, 4 * 20),
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in layer_of(VARIANTS["latent"]).named_parameters()}
    assert shapes["query.weight"] == (4 * (8 + 4), 32)
    assert "query_up.weight" not in shapes


@in_every_variant
@torch.no_grad()
def test_only_distances_between_positions_matter(variant):
    config = VARIANTS[variant]
    layer, x = layer_of(config), stream(7)
    found = layer(x, *tables(config, 7, start=1_000))
    torch.testing.assert_close(found, layer(x, *tables(config, 7)), rtol=1e-10, atol=1e-10)
    standing = layer(x, torch.ones_like(tables(config, 7)[0]), torch.zeros_like(tables(config, 7)[1]))
    assert not torch.allclose(standing, found, rtol=1e-3)


@torch.no_grad()
def test_what_is_cached_is_the_normed_vector_and_the_rotated_key():
    config = VARIANTS["latent"]
    layer, x = layer_of(config), stream(5)
    cache = KVCache(config, 2, 5, torch.float64, torch.device("cpu"))
    layer(x, *tables(config, 5), cache=cache)
    small, shared = cache.parts[layer.layer]
    compressed = layer.kv_down(x)
    torch.testing.assert_close(small[1, 2], norm(compressed[1, 2, :12], layer.kv_norm.weight))
    torch.testing.assert_close(shared[1, 2], rotated(compressed[1, 2, 12:], 2, config))


@pytest.mark.parametrize("value_size", [2, 12, 30])
@torch.no_grad()
def test_values_may_be_narrower_or_wider_than_keys(value_size):
    latent = LatentConfig(kv_rank=12, rope_size=4, value_size=value_size)
    config = dataclasses.replace(LLAMA, num_kv_heads=4, latent=latent)
    layer, x = layer_of(config), stream(4)
    torch.testing.assert_close(layer(x, *tables(config, 4)), by_hand(layer, config, x), rtol=1e-12, atol=1e-12)

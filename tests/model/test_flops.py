import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import launch
from model.config import PRESETS
from model.flops import (
    DENSE_BF16_PEAK_TFLOPS,
    causal_flops_per_token,
    flops_per_token,
    mfu,
    num_active_params,
    num_params,
)
from model.transformer import Transformer
from tests.models import MOE_VARIANTS, VARIANTS

SHAPES = {**VARIANTS, **MOE_VARIANTS, **PRESETS}


@pytest.mark.parametrize("name", SHAPES)
def test_counted_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = Transformer(SHAPES[name])
    assert num_params(SHAPES[name]) == sum(parameter.numel() for parameter in model.parameters())


def test_tinyllama_has_the_parameters_of_its_paper():
    assert num_params(PRESETS["tinyllama-1.1b"]) == 1_100_048_384


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if not shape.expert_layers])
def test_counted_flops_are_those_that_torch_counts(name):
    config, batch_size, length = SHAPES[name], 2, 16
    with torch.device("meta"):
        model = Transformer(config)
        tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # Without a GPU what a window hides is computed, too.
    counted = flops_per_token(dataclasses.replace(config, sliding_window=None), length)
    assert counter.get_total_flops() == counted * batch_size * length


# Of a soft mixture the averages over tokens are not counted, and 7 B parameters are too many to run.
@pytest.mark.parametrize(
    "name", [name for name, shape in SHAPES.items() if shape.moe.kind == "picked" and 0 < num_params(shape) < 1e8]
)
def test_counted_products_of_experts_are_those_that_torch_counts(name, monkeypatch: pytest.MonkeyPatch):
    config, batch_size, length = SHAPES[name], 2, 16
    monkeypatch.setattr(launch, "_chosen", {"moe": "loop"})
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch_size, length, dtype=torch.int64)).sum().backward()
    # Attention's own products are batched ones, or not counted on a CPU.
    products = {op.__name__: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert products["mm"] + products.get("addmm", 0) == flops_per_token(config, 0) * batch_size * length


def test_the_shape_of_olmoe_has_the_parameters_of_its_paper():
    shape = PRESETS["moe-1b-active"]
    assert num_params(shape) == pytest.approx(6.92e9, abs=5e6)
    assert num_active_params(shape) == pytest.approx(1.28e9, abs=5e6)


def test_a_window_bounds_the_keys_that_are_counted():
    whole = dataclasses.replace(PRESETS["smoke"], window_pattern="SL")
    half = dataclasses.replace(whole, sliding_window=64)
    attention = [flops_per_token(shape, 256) - flops_per_token(shape, 0) for shape in (whole, half)]
    assert attention[1] == attention[0] * (64 + 256) / (256 + 256)


def test_an_expert_that_a_token_is_not_sent_to_costs_nothing():
    few = PRESETS["moe-smoke"]
    many = dataclasses.replace(few, moe=dataclasses.replace(few.moe, num_experts=64))
    routers = 4 * 56 * 192
    assert num_active_params(many) - num_active_params(few) == routers
    assert flops_per_token(many, 128) - flops_per_token(few, 128) == 6 * routers


def test_tinyllama_takes_the_flops_of_its_budget():
    with torch.device("meta"):
        model = Transformer(PRESETS["tinyllama-1.1b"])
        tokens = torch.zeros(1, 2048, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == 2048 * flops_per_token(PRESETS["tinyllama-1.1b"], 2048)
    assert flops_per_token(PRESETS["tinyllama-1.1b"], 2048) == pytest.approx(7.313818e9, rel=1e-7)
    assert causal_flops_per_token(PRESETS["tinyllama-1.1b"], 2048) == pytest.approx(6.760e9, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_causal_flops_count_the_keys_that_each_token_may_see(name):
    config, length = SHAPES[name], 16
    unwindowed = dataclasses.replace(config, sliding_window=None)
    per_key = (flops_per_token(unwindowed, length) - flops_per_token(unwindowed, 0)) // length // config.num_layers
    keys = sum(min(t, config.window(layer) or t) for layer in range(config.num_layers) for t in range(1, length + 1))
    expected = length * flops_per_token(config, 0) + per_key * keys
    assert length * causal_flops_per_token(config, length) == expected


def test_utilisation_is_work_done_over_the_peak():
    peak_tflops = DENSE_BF16_PEAK_TFLOPS["NVIDIA A100-SXM4-80GB"]
    assert mfu(1_000.0, peak_tflops * 1e9 / 2, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.5)


def test_a_device_without_a_known_peak_has_no_utilisation():
    assert mfu(1e6, 1e9, "Abacus") is None

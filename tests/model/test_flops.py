import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS
from model.flops import DENSE_BF16_PEAK_TFLOPS, causal_flops_per_token, flops_per_token, mfu, num_params
from model.transformer import Transformer
from tests.models import VARIANTS

SHAPES = {**VARIANTS, **PRESETS}


@pytest.mark.parametrize("name", SHAPES)
def test_counted_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = Transformer(SHAPES[name])
    assert num_params(SHAPES[name]) == sum(parameter.numel() for parameter in model.parameters())


def test_tinyllama_has_the_parameters_of_its_paper():
    assert num_params(PRESETS["tinyllama-1.1b"]) == 1_100_048_384


@pytest.mark.parametrize("name", SHAPES)
def test_counted_flops_are_those_that_torch_counts(name):
    batch_size, length = 2, 16
    with torch.device("meta"):
        model = Transformer(SHAPES[name])
        tokens = torch.zeros(batch_size, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == flops_per_token(SHAPES[name], length) * batch_size * length


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
    per_key = (flops_per_token(config, length) - flops_per_token(config, 0)) // length
    seen = per_key * sum(range(1, length + 1))
    assert length * causal_flops_per_token(config, length) == length * flops_per_token(config, 0) + seen


def test_utilisation_is_work_done_over_the_peak():
    peak_tflops = DENSE_BF16_PEAK_TFLOPS["NVIDIA A100-SXM4-80GB"]
    assert mfu(1_000.0, peak_tflops * 1e9 / 2, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.5)


def test_a_device_without_a_known_peak_has_no_utilisation():
    assert mfu(1e6, 1e9, "Abacus") is None

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import PRESETS
from model.flops import DENSE_BF16_PEAK_TFLOPS, flops_per_token, mfu, num_params
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


def test_utilisation_is_work_done_over_the_peak():
    peak_tflops = DENSE_BF16_PEAK_TFLOPS["NVIDIA A100-SXM4-80GB"]
    assert mfu(1_000.0, peak_tflops * 1e9 / 2, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.5)


def test_a_device_without_a_known_peak_has_no_utilisation():
    assert mfu(1e6, 1e9, "Abacus") is None

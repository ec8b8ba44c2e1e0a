import dataclasses
import re

import pytest

from model.config import PRESETS, ModelConfig, ModelConfigError


def test_the_defaults_are_tinyllamas_shape():
    assert dataclasses.replace(ModelConfig(), init="tinyllama") == ModelConfig.preset("tinyllama-1.1b")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_found_by_its_name(name):
    assert ModelConfig.preset(name) is PRESETS[name]


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ModelConfigError, match=r"'tinylama'.*tinyllama-1\.1b"):
        ModelConfig.preset("tinylama")


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(ModelConfig) if field.type in (int, float)])
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_must_be_positive(key, value):
    with pytest.raises(ModelConfigError, match=re.escape(f"model.{key} = {value}: must be positive")):
        ModelConfig(**{key: value})


def test_key_heads_that_do_not_divide_query_heads_are_refused_with_the_ones_that_do():
    with pytest.raises(ModelConfigError, match=re.escape("num_kv_heads = 5; choose num_kv_heads among [1, 2, 3, 4")):
        ModelConfig(num_heads=12, num_kv_heads=5)


def test_an_odd_head_is_refused():
    with pytest.raises(ModelConfigError, match=r"head_size = 63: must be even"):
        ModelConfig(head_size=63)

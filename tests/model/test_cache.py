import pytest
import torch

from model.cache import KVCache
from tests.models import LLAMA


def test_a_cache_returns_what_was_written_behind_what_was_there():
    cache = KVCache(LLAMA, 2, 6, torch.float32, torch.device("cpu"))
    shape = (2, 3, LLAMA.num_kv_heads, LLAMA.head_size)
    first_k, first_v, second_k, second_v = (torch.randn(shape) for _ in range(4))
    for layer in range(LLAMA.num_layers):
        keys, values = cache.extend(layer, first_k, first_v)
        assert torch.equal(keys, first_k)
        assert torch.equal(values, first_v)
    cache.advance(3)
    keys, values = cache.extend(1, second_k, second_v)
    assert torch.equal(keys, torch.cat((first_k, second_k), dim=1))
    assert torch.equal(values, torch.cat((first_v, second_v), dim=1))


def test_a_full_cache_refuses_more():
    cache = KVCache(LLAMA, 1, 4, torch.float32, torch.device("cpu"))
    too_many = torch.zeros(1, 5, LLAMA.num_kv_heads, LLAMA.head_size)
    with pytest.raises(ValueError, match="5 tokens for a capacity of 4"):
        cache.extend(0, too_many, too_many)

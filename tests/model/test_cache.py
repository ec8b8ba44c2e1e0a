import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.cache import KVCache
from model.config import LatentConfig
from tests.models import LLAMA

LATENT = dataclasses.replace(LLAMA, num_kv_heads=4, latent=LatentConfig(kv_rank=12, rope_size=4, value_size=6))
WINDOWED = dataclasses.replace(LLAMA, sliding_window=4, window_pattern="SL")


def empty_cache(config, batch_size: int, capacity: int) -> KVCache:
    return KVCache(config, batch_size, capacity, torch.float32, torch.device("cpu"))


def numbered(start: int, end: int, batch_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that say their position, and values that say it negated."""
    shape = (batch_size, end - start, LLAMA.num_kv_heads, LLAMA.head_size)
    keys = torch.arange(start, end).float()[None, :, None, None].expand(shape)
    return keys, -keys


def size_bytes(cache: KVCache) -> int:
    return sum(part.nbytes for parts in cache.parts for part in parts)


def test_a_cache_returns_what_was_written_behind_what_was_there():
    cache = empty_cache(LLAMA, 2, 6)
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


@pytest.mark.parametrize("config", [LLAMA, WINDOWED], ids=["all", "windowed"])
def test_a_full_cache_refuses_more(config):
    cache = empty_cache(config, 1, 4)
    with pytest.raises(ValueError, match="5 tokens for a capacity of 4"):
        cache.extend(0, *numbered(0, 5))


@given(pieces=st.lists(st.integers(1, 7), min_size=1, max_size=8), window=st.integers(1, 9))
def test_a_windowed_layer_gets_its_new_tokens_and_a_window_before_them(pieces, window):
    cache = empty_cache(dataclasses.replace(LLAMA, sliding_window=window, window_pattern="SL"), 1, sum(pieces))
    start = 0
    for size in pieces:
        end = start + size
        expected = list(range(max(0, start - window + 1), end))
        keys, values = cache.extend(0, *numbered(start, end))
        found = keys[0, :, 0, 0].tolist()
        assert (sorted(found) if size == 1 else found) == expected
        assert torch.equal(values, -keys)
        keys, _ = cache.extend(1, *numbered(start, end))
        assert keys[0, :, 0, 0].tolist() == list(range(end))
        cache.advance(size)
        start = end


def test_a_windowed_layer_takes_the_memory_of_its_window():
    one_token = size_bytes(empty_cache(LLAMA, 1, 1)) // LLAMA.num_layers
    assert size_bytes(empty_cache(WINDOWED, 1, 100)) == (4 + 100) * one_token
    assert size_bytes(empty_cache(WINDOWED, 1, 3)) == (3 + 3) * one_token


def test_a_latent_layer_keeps_one_small_vector_and_one_rotated_key_per_token():
    assert size_bytes(empty_cache(LATENT, 3, 10)) == LATENT.num_layers * 3 * 10 * (12 + 4) * 4
    cache = empty_cache(LATENT, 3, 10)
    small, rotated = torch.randn(3, 5, 12), torch.randn(3, 5, 4)
    assert [torch.equal(*pair) for pair in zip(cache.extend(0, small, rotated), (small, rotated))] == [True, True]


@pytest.mark.parametrize("length", [2, 4, 5, 9])
def test_every_row_can_go_on_from_a_copy_of_one(length):
    row, many = empty_cache(WINDOWED, 1, length), empty_cache(WINDOWED, 3, 12)
    for layer in range(WINDOWED.num_layers):
        row.extend(layer, *numbered(0, length))
    row.advance(length)
    row.state[1] = (torch.tensor([[5.0, 6.0]]), torch.tensor([7]))
    many.copy_row(row)
    assert many.length == length
    assert [part.tolist() for part in many.state[1]] == [[[5.0, 6.0]] * 3, [7] * 3]
    seen, _ = many.extend(0, *numbered(length, length + 2, batch_size=3))
    expected = list(range(max(0, length - 3), length + 2))
    assert seen[:, :, 0, 0].tolist() == [expected] * 3
    seen, _ = many.extend(1, *numbered(length, length + 2, batch_size=3))
    assert seen[2, :, 0, 0].tolist() == list(range(length + 2))
    assert row.parts[0][0].data_ptr() != many.parts[0][0].data_ptr()

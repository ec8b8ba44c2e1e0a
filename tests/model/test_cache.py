import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import attention
from model.cache import KVCache
from model.config import LatentConfig
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

LATENT = dataclasses.replace(LLAMA, num_kv_heads=4, latent=LatentConfig(kv_rank=12, rope_size=4, value_size=6))
WINDOWED = dataclasses.replace(LLAMA, sliding_window=4, window_pattern="SL")
ALL = {**VARIANTS, **MOE_VARIANTS}
LENGTH = 20


def empty_cache(config, batch_size: int, capacity: int, **options) -> KVCache:
    return KVCache(config, batch_size, capacity, torch.float32, torch.device("cpu"), **options)


def read_in_pieces(model, tokens: torch.Tensor, cuts: list[int], **options) -> torch.Tensor:
    """Logits of all tokens, read with a cache."""
    batch_size, length = tokens.shape
    cache = KVCache(model.config, batch_size, length, model.norm.weight.dtype, tokens.device, **options)
    pieces = [model(tokens[:, start:end], cache=cache) for start, end in itertools.pairwise([0, *cuts, length])]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("cuts", [[], [9], list(range(1, LENGTH))], ids=["at once", "in two", "token by token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_cached_logits_are_those_of_the_full_forward(variant, dtype, tolerance, cuts):
    model, tokens = make_model(ALL[variant], dtype=dtype), random_tokens(ALL[variant], 2, LENGTH)
    expected = model(tokens)
    torch.testing.assert_close(read_in_pieces(model, tokens, cuts), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cuts", [[], [14], list(range(12, LENGTH))], ids=["at once", "in two", "token by token"])
@pytest.mark.parametrize("variant", [name for name, config in ALL.items() if config.moe.kind != "chunk_soft"])
@torch.no_grad()
def test_padded_rows_are_read_as_without_padding(variant, cuts):
    model, tokens = make_model(ALL[variant], dtype=torch.float64), random_tokens(ALL[variant], 3, LENGTH)
    padding = [0, 11, 4]
    for num_recallable in (0, 3) if ALL[variant].sliding_window else (0,):  # rings differ
        found = read_in_pieces(model, tokens, cuts, padding=padding, num_recallable=num_recallable)
        for row, missing in enumerate(padding):
            expected = model(tokens[row : row + 1, missing:])[0]
            torch.testing.assert_close(found[row, missing:], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma2", "latent", "mixtral"])
@torch.no_grad()
def test_padded_rows_in_bf16_on_cuda_err_no_more_than_rows_without_padding(variant):
    config = dataclasses.replace(ALL[variant], head_size=64)
    model, tokens = make_model(config).bfloat16(), random_tokens(config, 3, LENGTH)
    exact, padding = copy.deepcopy(model).double(), [0, 11, 4]
    model.cuda()
    found = read_in_pieces(model, tokens.cuda(), list(range(12, LENGTH)), padding=padding).double().cpu()
    for row, missing in enumerate(padding):
        alone = tokens[row : row + 1, missing:]
        expected = exact(alone)[0]
        allowed = 2 * (model(alone.cuda())[0].double().cpu() - expected).abs().max()
        assert (found[row, missing:] - expected).abs().max() <= allowed


def test_padding_has_no_place_where_chunks_are_counted():
    with pytest.raises(ValueError, match="chunk_soft experts read rows of equal length"):
        empty_cache(MOE_VARIANTS["chunk soft"], 2, 9, padding=[0, 1])
    empty_cache(MOE_VARIANTS["chunk soft"], 2, 9, padding=[0, 0])


@pytest.mark.parametrize("num_queries", [1, 3, 9])
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (4, None), (None, 0.7)])
def test_attention_looks_at_visible_keys_alone(num_queries, window, soft_cap):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, num_queries, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 9, 2, size, generator=generator, dtype=torch.float64) for size in (8, 6))
    first = [2, 0] if num_queries < 9 else [0, 0]
    visible = torch.arange(9) >= torch.tensor(first)[:, None]
    found = attention(q, k, v, visible_BS=visible, window=window, soft_cap=soft_cap)
    for row, start in enumerate(first):
        one = slice(row, row + 1)
        expected = attention(q[one], k[one, start:], v[one, start:], window=window, soft_cap=soft_cap)
        torch.testing.assert_close(found[one], expected, rtol=1e-12, atol=1e-12)


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


@given(
    steps=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=10),
    window=st.integers(1, 7),
    num_recallable=st.integers(0, 6),
)
def test_a_cache_goes_back_as_if_the_tokens_had_never_been_read(steps, window, num_recallable):
    """Of what was forgotten, everything is written anew, with other numbers."""
    config = dataclasses.replace(LLAMA, sliding_window=window, window_pattern="SL")
    cache = empty_cache(config, 1, 200, num_recallable=num_recallable)
    text: list[float] = []
    furthest = 0
    for number, (size, num_forgotten) in enumerate(steps):
        new = [1_000.0 * number + len(text) + i for i in range(size)]
        keys = torch.tensor(new)[None, :, None, None].expand(1, size, LLAMA.num_kv_heads, LLAMA.head_size)
        text += new
        seen, values = cache.extend(0, keys, -keys)
        # A ring that is not yet full gives all it has: what is before the window, attention leaves out.
        in_window = seen[0, :, 0, 0].tolist()[-(window + size - 1) :]
        expected = text[-(window + size - 1) :]
        is_rotated = num_recallable == 0 and size == 1
        assert (sorted(in_window) if is_rotated else in_window) == (sorted(expected) if is_rotated else expected)
        assert torch.equal(values, -seen)
        assert cache.extend(1, keys, -keys)[0][0, :, 0, 0].tolist() == text
        cache.advance(size)
        furthest = max(furthest, len(text))
        length = len(text) - num_forgotten
        if length >= 0 and furthest - length <= num_recallable:
            cache.truncate(length)
            del text[length:]
            assert cache.length == len(text)


def test_no_more_is_forgotten_than_the_cache_was_made_for():
    cache = empty_cache(WINDOWED, 1, 20, num_recallable=3)
    cache.advance(10)
    cache.truncate(8)
    cache.truncate(7)
    for length in (6, 8):
        with pytest.raises(ValueError, match=f"cannot go back from 10 tokens to {length}; it was made to forget 3"):
            cache.truncate(length)


@torch.no_grad()
def test_states_go_back_to_where_a_reading_began():
    config = MOE_VARIANTS["chunk soft"]
    model, tokens = make_model(config, dtype=torch.float64), random_tokens(config, 1, LENGTH)
    expected = model(tokens)
    cache = KVCache(config, 1, LENGTH, torch.float64, torch.device("cpu"), num_recallable=6)
    for start, end, forgotten, left in [(0, 7, 1, 0), (0, 7, 0, 7), (7, 8, 0, 8), (8, 9, 1, 8), (8, 13, 3, 8)]:
        model(tokens[:, start:end].flip(1) if forgotten else tokens[:, start:end], cache=cache)
        cache.truncate(end - forgotten)
        assert cache.length == left
    found = model(tokens[:, 8:], cache=cache)
    torch.testing.assert_close(found, expected[:, 8:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["alternating windows", "latent windowed", "chunk soft", "qwen3-moe"])
@torch.no_grad()
def test_rows_go_on_in_any_selection(variant):
    config = ALL[variant]
    model, tokens = make_model(config, dtype=torch.float64), random_tokens(config, 3, LENGTH)
    rows = [2, 0, 2, 2]
    padding = [0] * 3 if variant == "chunk soft" else [3, 0, 1]
    cache = KVCache(config, 3, LENGTH, torch.float64, torch.device("cpu"), padding=padding)
    model(tokens[:, :11], cache=cache)
    cache.select(rows)
    assert cache.batch_size == 4
    for column in range(11, LENGTH):
        found = model(tokens[rows, column : column + 1], cache=cache)
    for place, row in enumerate(rows):
        expected = model(tokens[row : row + 1, padding[row] :])[0, -1]
        torch.testing.assert_close(found[place, -1], expected, rtol=1e-12, atol=1e-12)

"""Every configuration is causal, and a cache changes nothing: shown by changing tokens, not by reading masks."""

import itertools
import random

import pytest
import torch
from torch import Tensor, nn

from kernels import attention as attention_module
from kernels import launch
from model.balance import RoutingLog
from model.cache import KVCache
from model.config import PRESETS, ModelConfig
from model.soft_moe import ChunkSoft
from model.transformer import Transformer
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

SHAPES: dict[str, ModelConfig] = {
    **VARIANTS,
    **MOE_VARIANTS,
    **{preset: PRESETS[preset] for preset in ("smoke", "moe-smoke", "deepseek-smoke")},
}
PICKING = [name for name, config in SHAPES.items() if config.expert_layers and config.moe.kind == "picked"]
LENGTH = 24
EXACT = {"rtol": 0.0, "atol": 0.0}
ROUNDED = {"rtol": 1e-12, "atol": 1e-12}

in_every_shape = pytest.mark.parametrize("shape", SHAPES)


@torch.no_grad()
def check_that_no_token_changes_an_earlier_output(
    model: Transformer, positions: list[int], *, batch_size: int = 2, length: int = LENGTH, **tolerance: float
) -> None:
    """Also with the noise of sampling; the outputs from the token on change."""
    tokens = random_tokens(model.config, batch_size, length)
    expected = model(tokens, routing=RoutingLog(noise_seed=5))
    for position in positions:
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % model.config.vocab_size
        found = model(changed, routing=RoutingLog(noise_seed=5))
        torch.testing.assert_close(found[:, :position], expected[:, :position], **tolerance)
        assert (found[:, position] - expected[:, position]).abs().max() > 1e-4


@torch.no_grad()
def check_that_a_prefix_is_read_as_in_the_whole(model: Transformer, lengths: list[int]) -> None:
    """To rounding: a CPU's products of few rows are summed in another order."""
    tokens = random_tokens(model.config, 2, LENGTH)
    expected = model(tokens)
    for length in lengths:
        torch.testing.assert_close(model(tokens[:, :length]), expected[:, :length], **ROUNDED)


@torch.no_grad()
def check_that_reading_in_pieces_equals_reading_at_once(model: Transformer, cuts: list[int]) -> None:
    """With a cache between the pieces; to rounding."""
    tokens = random_tokens(model.config, 2, LENGTH)
    cache = KVCache(model.config, 2, LENGTH, model.embedding.weight.dtype, torch.device("cpu"))
    pieces = [model(tokens[:, start:end], cache=cache) for start, end in itertools.pairwise([0, *cuts, LENGTH])]
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), **ROUNDED)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape not in PICKING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_token_changes_no_bit_before_it(shape, dtype):
    positions = random.Random(shape).sample(range(1, LENGTH), 4)
    check_that_no_token_changes_an_earlier_output(make_model(SHAPES[shape], dtype=dtype), positions, **EXACT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on CUDA, not interpreted")
@pytest.mark.parametrize("shape", [shape for shape in PICKING if shape in MOE_VARIANTS])
def test_a_token_changes_no_bit_before_it_also_when_it_is_sent_to_other_experts(shape, monkeypatch):
    # Whom a token shares an expert with depends on later tokens, and with it the number of rows of the expert's
    # product; our kernels sum a row alike whatever the others are.
    monkeypatch.setattr(launch, "INTERPRETED", True)
    others = ("rms_norm", "rope", "swiglu")
    monkeypatch.setattr(launch, "_chosen", {"moe": "triton"} | dict.fromkeys(others, "torch"))
    positions = random.Random(shape).sample(range(1, 10), 2)
    check_that_no_token_changes_an_earlier_output(
        make_model(SHAPES[shape]), positions, batch_size=1, length=10, **EXACT
    )


@pytest.mark.parametrize("shape", PICKING)
def test_experts_in_plain_torch_differ_before_a_changed_token_by_rounding_at_most(shape):
    # Products of MKL's with less than about ten rows are summed in another order than larger ones.
    positions = random.Random(shape).sample(range(1, LENGTH), 4)
    check_that_no_token_changes_an_earlier_output(make_model(SHAPES[shape], dtype=torch.float64), positions, **ROUNDED)


@in_every_shape
def test_a_prefix_is_read_as_in_the_whole(shape):
    lengths = random.Random(shape).sample(range(1, LENGTH), 3)
    check_that_a_prefix_is_read_as_in_the_whole(make_model(SHAPES[shape], dtype=torch.float64), lengths)


@in_every_shape
def test_reading_one_token_at_a_time_equals_reading_at_once(shape):
    model = make_model(SHAPES[shape], dtype=torch.float64)
    check_that_reading_in_pieces_equals_reading_at_once(model, list(range(1, LENGTH)))


@in_every_shape
def test_reading_in_any_pieces_equals_reading_at_once(shape):
    model, draw = make_model(SHAPES[shape], dtype=torch.float64), random.Random(shape)
    for num_cuts in (1, 2, 4, 8):
        cuts = sorted(draw.sample(range(1, LENGTH), num_cuts))
        check_that_reading_in_pieces_equals_reading_at_once(model, cuts)


# --- The checks fail where they should.


class MeanOverTokens(nn.Module):
    """A layer that sees the whole text, as soft MoE does in its original form."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The mean of all tokens, at each of them."""
        return x_BTD.mean(dim=1, keepdim=True).expand_as(x_BTD)


def test_a_layer_that_averages_over_all_tokens_is_found():
    model = make_model(LLAMA, dtype=torch.float64)
    model.blocks[0].mlp = MeanOverTokens()
    with pytest.raises(AssertionError):
        check_that_no_token_changes_an_earlier_output(model, [LENGTH - 1], **ROUNDED)
    with pytest.raises(AssertionError):
        check_that_a_prefix_is_read_as_in_the_whole(model, [LENGTH - 1])
    with pytest.raises(AssertionError):
        check_that_reading_in_pieces_equals_reading_at_once(model, [LENGTH - 1])


def test_attention_that_looks_one_token_ahead_is_found(monkeypatch):
    def looks_ahead(num_queries, num_keys, *_):
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries + 1)

    monkeypatch.setattr(attention_module, "_mask", looks_ahead)
    with pytest.raises(AssertionError):
        check_that_no_token_changes_an_earlier_output(make_model(LLAMA, dtype=torch.float64), [7], **ROUNDED)


@pytest.mark.parametrize("cuts", [list(range(1, LENGTH)), [8, 11, 20]], ids=["single tokens", "pieces"])
def test_a_cache_that_forgets_a_token_of_its_window_is_found(cuts, monkeypatch):
    extend = KVCache.extend

    def forgets(cache: KVCache, layer: int, *new_BT: Tensor) -> tuple[Tensor, ...]:
        num_kept = new_BT[0].shape[1] + VARIANTS["mistral"].sliding_window - 2
        return tuple(part[:, -num_kept:] for part in extend(cache, layer, *new_BT))

    monkeypatch.setattr(KVCache, "extend", forgets)
    with pytest.raises(AssertionError):
        check_that_reading_in_pieces_equals_reading_at_once(make_model(VARIANTS["mistral"], dtype=torch.float64), cuts)


def test_a_cache_that_keeps_nothing_of_earlier_chunks_is_found(monkeypatch):
    state = ChunkSoft._state
    empty = KVCache(LLAMA, 1, 1, torch.float64, torch.device("cpu"))
    monkeypatch.setattr(ChunkSoft, "_state", lambda layer, x_BTD, _: state(layer, x_BTD, empty))
    with pytest.raises(AssertionError):
        check_that_reading_in_pieces_equals_reading_at_once(
            make_model(MOE_VARIANTS["chunk soft"], dtype=torch.float64), [9]
        )

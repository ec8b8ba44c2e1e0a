import dataclasses

import pytest
import torch
from torch import Tensor

from kernels.attention import document_boundaries
from kernels.rope import rope, rope_tables
from model.attention import Attention
from model.norm import RMSNorm
from tests.models import LLAMA, VARIANTS, make_model


def tables(length: int) -> tuple[Tensor, Tensor]:
    return rope_tables(torch.arange(length), LLAMA.head_size, LLAMA.rope_base, torch.float64)


def layer_of(**changes) -> Attention:
    return make_model(dataclasses.replace(LLAMA, **changes), dtype=torch.float64).blocks[1].attention


def stream(length: int) -> Tensor:
    return torch.randn(2, length, LLAMA.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    if norm is None:
        return x
    return x / (x.square().mean(dim=-1, keepdim=True) + LLAMA.norm_eps).sqrt() * norm.weight


def by_hand(layer: Attention, x: Tensor, qk_norm: str, window: int, scale: float, soft_cap: float) -> Tensor:
    """One query and one head at a time."""
    heads, kv_heads, size = LLAMA.num_heads, LLAMA.num_kv_heads, LLAMA.head_size
    q, k, v = layer.qkv(x).split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
    if qk_norm == "full":
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    q, k, v = (part.unflatten(-1, (-1, size)) for part in (q, k, v))
    if qk_norm == "head":
        q, k = normed(q, layer.q_norm), normed(k, layer.k_norm)
    q, k = rope(q, k, *tables(x.shape[1]))
    out = torch.zeros_like(q)
    for t in range(x.shape[1]):
        first = max(0, t - window + 1)
        for h in range(heads):
            seen = k[:, first : t + 1, h // 2], v[:, first : t + 1, h // 2]
            scores = scale * (seen[0] @ q[:, t, h, :, None])[..., 0]
            weights = (soft_cap * torch.tanh(scores / soft_cap)).softmax(dim=-1)
            out[:, t, h] = (weights[:, None] @ seen[1])[:, 0]
    return layer.out(out.flatten(2))


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
@torch.no_grad()
def test_attention_is_what_its_formula_says(qk_norm, window, soft_cap):
    layer = layer_of(qk_norm=qk_norm, sliding_window=window, attention_softcap=soft_cap, attention_scale=0.6)
    x = stream(9)
    expected = by_hand(layer, x, qk_norm, window or 99, 0.6, soft_cap or 1e9)
    # tanh(z / 1e9) * 1e9 is z to 1e-7.
    tolerance = 1e-12 if soft_cap else 1e-6
    torch.testing.assert_close(layer(x, *tables(9)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("qk_norm", "widths"), [("head", (8, 8)), ("full", (32, 16))])
def test_queries_and_keys_are_normed_by_head_or_as_a_whole(qk_norm, widths):
    layer = layer_of(qk_norm=qk_norm)
    assert (layer.q_norm.weight.shape[0], layer.k_norm.weight.shape[0]) == widths


def test_only_the_layers_of_the_pattern_are_windowed():
    config = dataclasses.replace(LLAMA, num_layers=5, sliding_window=6, window_pattern="SLL")
    blocks = make_model(config).blocks
    assert [block.attention.limits["window"] for block in blocks] == [6, None, None, 6, None]


@torch.no_grad()
def test_a_window_ends_at_the_start_of_the_document():
    layer = make_model(VARIANTS["mistral"], dtype=torch.float64).blocks[0].attention
    x = stream(8)
    boundaries = document_boundaries(torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]] * 2), eos_id=0)
    found = layer(x, *tables(8), boundaries)
    cos, sin = tables(8)
    torch.testing.assert_close(found[:, 3:], layer(x[:, 3:], cos[3:], sin[3:]), rtol=1e-12, atol=1e-12)

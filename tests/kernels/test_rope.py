import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels.rope import rope, rope_tables

BASE = 10_000.0


def random_heads(batch_size: int, length: int, num_heads: int, head_size: int, seed: int = 0) -> torch.Tensor:
    shape = (batch_size, length, num_heads, head_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(x: torch.Tensor, positions: torch.Tensor, base: float = BASE) -> torch.Tensor:
    cos, sin = rope_tables(positions, x.shape[-1], base, torch.float64)
    return rope(x, x, cos, sin)[0]


@given(length=st.integers(1, 9), half=st.integers(1, 20), start=st.integers(0, 5000), seed=st.integers(0, 99))
def test_a_rotation_keeps_every_length(length, half, start, seed):
    x = random_heads(2, length, 3, 2 * half, seed)
    y = rotated(x, torch.arange(start, start + length))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)


@given(distance=st.integers(0, 300), first=st.integers(0, 4000), second=st.integers(0, 4000), half=st.integers(1, 16))
def test_products_of_queries_and_keys_depend_on_their_distance_alone(distance, first, second, half):
    q, k = random_heads(1, 1, 1, 2 * half, seed=1), random_heads(1, 1, 1, 2 * half, seed=2)

    def product(position: int) -> float:
        rotated_q = rotated(q, torch.tensor([position + distance]))
        return (rotated_q * rotated(k, torch.tensor([position]))).sum().item()

    assert product(first) == pytest.approx(product(second), abs=1e-10)


def test_position_zero_is_left_alone():
    x = random_heads(1, 1, 2, 8)
    assert torch.equal(rotated(x, torch.tensor([0])), x)


def test_the_opposite_position_rotates_back():
    x, positions = random_heads(2, 7, 3, 10), torch.arange(7) * 100
    torch.testing.assert_close(rotated(rotated(x, positions), -positions), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rotation_is_the_one_of_transformers(base, dtype):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    q, k = random_heads(2, 300, 4, 16, seed=1).to(dtype), random_heads(2, 300, 2, 16, seed=2).to(dtype)
    positions = torch.arange(300)
    cos, sin = LlamaRotaryEmbedding(config)(q.float(), positions[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(1, 2).float(), k.transpose(1, 2).float(), cos, sin)
    our_q, our_k = rope(q, k, *rope_tables(positions, 16, base))
    assert our_q.dtype == our_k.dtype == dtype
    torch.testing.assert_close(our_q, their_q.transpose(1, 2).to(dtype))
    torch.testing.assert_close(our_k, their_k.transpose(1, 2).to(dtype))


def test_tables_hold_the_angles_of_the_formula():
    cos, sin = rope_tables(torch.tensor([0, 3]), 4, 100.0, torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 3.0 * 100.0 ** (-2 / 4)]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_gradients_are_the_opposite_rotation():
    x = random_heads(1, 5, 2, 6).requires_grad_()
    cos, sin = rope_tables(torch.arange(5), 6, BASE, torch.float64)
    assert torch.autograd.gradcheck(lambda q: rope(q, q, cos, sin), (x,))


@pytest.mark.parametrize(("length", "half"), [(4, 4), (5, 3)], ids=["too few positions", "another head size"])
def test_tables_of_another_shape_are_refused(length, half):
    q = random_heads(1, 5, 2, 8)
    table = torch.ones(length, half)
    with pytest.raises(ValueError, match=r"expected \(T, K/2\) = \(5, 4\)"):
        rope(q, q, table, table)


def test_keys_of_another_length_are_refused():
    q, k = random_heads(1, 5, 2, 8), random_heads(1, 4, 2, 8)
    table = torch.ones(5, 4)
    with pytest.raises(ValueError, match="rope: tables"):
        rope(q, k, table, table)

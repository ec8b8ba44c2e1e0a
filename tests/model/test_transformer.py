import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import launch
from kernels.attention import document_boundaries
from kernels.cross_entropy import cross_entropy_sum
from model.cache import KVCache
from model.transformer import Transformer, logits
from tests.models import LLAMA, VARIANTS, make_model, random_tokens

EOS = 0

in_every_variant = pytest.mark.parametrize("variant", VARIANTS)


def loss_gradients(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    targets = tokens.roll(-1, dims=1)
    model(tokens, readout=lambda hidden, head: cross_entropy_sum(logits(hidden, head), targets)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@in_every_variant
@torch.no_grad()
def test_a_token_changes_no_output_before_it(variant):
    model = make_model(VARIANTS[variant])
    tokens = random_tokens(model.config, 2, 24)
    expected = model(tokens)
    for position in (1, 11, 23):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % model.config.vocab_size
        found = model(changed)
        assert torch.equal(found[:, :position], expected[:, :position])
        assert not torch.equal(found[:, position:], expected[:, position:])


@in_every_variant
@torch.no_grad()
def test_a_packed_document_is_blind_to_the_one_before(variant):
    model = make_model(VARIANTS[variant])
    tokens = random_tokens(model.config, 1, 30).clamp_(min=1)
    tokens[0, 12] = EOS
    boundaries = document_boundaries(tokens, EOS)
    expected = model(tokens, boundaries)
    changed = tokens.clone()
    changed[0, 3:12] = (changed[0, 3:12] + 7) % model.config.vocab_size
    changed[changed == EOS] = 1
    changed[0, 12] = EOS
    found = model(changed, boundaries)
    assert torch.equal(found[:, 13:], expected[:, 13:])
    assert not torch.equal(found[:, 3:13], expected[:, 3:13])
    assert not torch.equal(model(changed)[:, 13:], model(tokens)[:, 13:])


@in_every_variant
@torch.no_grad()
def test_a_packed_document_is_read_as_if_it_were_alone(variant):
    model = make_model(VARIANTS[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 20).clamp_(min=1)
    tokens[0, 8] = EOS
    packed = model(tokens, document_boundaries(tokens, EOS))
    # RoPE sees only distances, so positions that go on counting do not matter.
    torch.testing.assert_close(packed[:, 9:], model(tokens[:, 9:]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:, :9], model(tokens[:, :9]), rtol=1e-10, atol=1e-10)


@in_every_variant
@given(cuts=st.sets(st.integers(1, 15)), batch_size=st.integers(1, 2))
@torch.no_grad()
def test_reading_in_any_pieces_with_a_cache_equals_reading_at_once(variant, cuts, batch_size):
    model = make_model(VARIANTS[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, batch_size, 16)
    cache = KVCache(model.config, batch_size, 16, torch.float64, torch.device("cpu"))
    edges = [0, *sorted(cuts), 16]
    pieces = [model(tokens[:, start:end], cache=cache) for start, end in itertools.pairwise(edges)]
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@in_every_variant
def test_recomputing_gives_the_same_bits(variant, recompute):
    model = make_model(VARIANTS[variant])
    tokens = random_tokens(model.config, 2, 12)
    expected = loss_gradients(model, tokens)
    for block in model.blocks:
        block.recompute = recompute
    found = loss_gradients(model, tokens)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_recomputed_block_keeps_only_its_input():
    def saved_bytes(recompute: str) -> int:
        model = make_model(LLAMA)
        for block in model.blocks:
            block.recompute = recompute
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_tokens(LLAMA, 2, 32), readout=lambda hidden, head: hidden.sum())
        return sum(sizes)

    assert saved_bytes(recompute="blocks") < saved_bytes(recompute="nothing") / 5


def test_a_tied_head_is_the_embedding_also_after_its_memory_was_replaced():
    config = VARIANTS["llama tied"]
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    model.tie()
    assert model.head.weight is model.embedding.weight
    assert sum(name == "head.weight" for name, _ in model.named_parameters()) == 0


def test_an_untied_head_is_a_parameter_of_its_own():
    model = make_model(LLAMA)
    assert model.head.weight is not model.embedding.weight
    assert "head.weight" in dict(model.named_parameters())


def test_the_readout_gets_the_last_hidden_states_and_the_head():
    model = make_model(LLAMA)
    tokens = random_tokens(LLAMA, 2, 5)
    hidden, head = model(tokens, readout=lambda *both: both)
    assert hidden.shape == (2, 5, LLAMA.hidden_size)
    assert head is model.head.weight
    assert torch.equal(logits(hidden, head), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_a_model_computes_in_the_dtype_of_its_weights(dtype):
    model = make_model(LLAMA)
    tokens = random_tokens(LLAMA, 1, 40)
    expected = model(tokens)
    found = model.to(dtype)(tokens)
    assert found.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_positions_beyond_the_context_length_are_computed_not_looked_up():
    model = make_model(dataclasses.replace(LLAMA, context_length=4))
    assert model(random_tokens(LLAMA, 1, 9)).isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on CUDA, not interpreted")
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_triton_kernels_compute_the_same_model(variant, monkeypatch):
    model = make_model(VARIANTS[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 6)
    expected_logits, expected_gradients = model(tokens), loss_gradients(model, tokens)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    torch.testing.assert_close(model(tokens), expected_logits, rtol=1e-10, atol=1e-10)
    found_gradients = loss_gradients(model, tokens)
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], expected, rtol=1e-9, atol=1e-9, msg=name)

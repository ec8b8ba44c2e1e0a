import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from kernels import launch
from kernels.attention import document_boundaries
from kernels.cross_entropy import cross_entropy_sum
from kernels.rope import rope_tables
from model.balance import RoutingLog
from model.transformer import Block, Transformer, logits
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens

EOS = 0

ALL = {**VARIANTS, **MOE_VARIANTS}

in_every_variant = pytest.mark.parametrize("variant", ALL)


def loss_gradients(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    targets, log = tokens.roll(-1, dims=1), RoutingLog(noise_seed=1)
    loss_sum = model(tokens, readout=lambda hidden, head: cross_entropy_sum(logits(hidden, head), targets), routing=log)
    (loss_sum + log.penalty_sum).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@in_every_variant
@torch.no_grad()
def test_a_packed_document_is_blind_to_the_one_before(variant):
    model = make_model(ALL[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 30).clamp_(min=1)
    tokens[0, 12] = EOS
    boundaries = document_boundaries(tokens, EOS)
    expected = model(tokens, boundaries)
    changed = tokens.clone()
    changed[0, 3:12] = (changed[0, 3:12] + 7) % model.config.vocab_size
    changed[changed == EOS] = 1
    changed[0, 12] = EOS
    found = model(changed, boundaries)
    # With experts, the other document decides how many rows a product has, and with it the order of a CPU's sums.
    tolerance = 0.0 if variant in VARIANTS else 1e-12
    torch.testing.assert_close(found[:, 13:], expected[:, 13:], rtol=tolerance, atol=tolerance)
    assert (found[:, 3:13] - expected[:, 3:13]).abs().amax(dim=-1).min() > 1e-4
    assert (model(changed) - model(tokens))[:, 13].abs().max() > 1e-4


# A document that does not start with its row has other chunks of tokens.
@pytest.mark.parametrize("variant", [name for name, config in ALL.items() if config.moe.kind != "chunk_soft"])
@torch.no_grad()
def test_a_packed_document_is_read_as_if_it_were_alone(variant):
    model = make_model(ALL[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 20).clamp_(min=1)
    tokens[0, 8] = EOS
    packed = model(tokens, document_boundaries(tokens, EOS))
    # RoPE sees only distances, so positions that go on counting do not matter.
    torch.testing.assert_close(packed[:, 9:], model(tokens[:, 9:]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed[:, :9], model(tokens[:, :9]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@in_every_variant
def test_recomputing_gives_the_same_bits(variant, recompute):
    model = make_model(ALL[variant])
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
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2", "olmo2", "latent query"])
def test_triton_kernels_compute_the_same_model(variant, monkeypatch):
    model = make_model(ALL[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 1, 6)
    expected_logits, expected_gradients = model(tokens), loss_gradients(model, tokens)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    torch.testing.assert_close(model(tokens), expected_logits, rtol=1e-10, atol=1e-10)
    found_gradients = loss_gradients(model, tokens)
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], expected, rtol=1e-9, atol=1e-9, msg=name)


def plain_block(block: Block, norms: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A dense block by its formula, on a whole stream."""

    def attend(x: Tensor) -> Tensor:
        return block.attention(x, cos, sin)

    def feed(x: Tensor) -> Tensor:
        return block.mlp(x)

    if norms == "pre":
        x = x + attend(block.attention_norm(x))
        return x + feed(block.mlp_norm(x))
    if norms == "sandwich":
        x = x + block.attention_out_norm(attend(block.attention_norm(x)))
        return x + block.mlp_out_norm(feed(block.mlp_norm(x)))
    if norms == "output":
        x = x + block.attention_out_norm(attend(x))
        return x + block.mlp_out_norm(feed(x))
    # Two layers: alpha = (2 * 2)^(1/4).
    x = block.attention_norm(2**0.5 * x + attend(x))
    return block.mlp_norm(2**0.5 * x + feed(x))


NORM_NAMES = {
    "pre": {"attention_norm", "mlp_norm"},
    "sandwich": {"attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"},
    "output": {"attention_out_norm", "mlp_out_norm"},
    "deepnorm": {"attention_norm", "mlp_norm"},
}


@pytest.mark.parametrize("norms", NORM_NAMES)
@torch.no_grad()
def test_norms_stand_where_the_config_says(norms):
    model = make_model(dataclasses.replace(LLAMA, norms=norms), dtype=torch.float64)
    x, addend = torch.randn(2, 1, 7, LLAMA.hidden_size, generator=torch.Generator().manual_seed(3)).double()
    cos, sin = rope_tables(torch.arange(7), LLAMA.head_size, LLAMA.rope_base, torch.float64)
    for block in model.blocks:
        assert {name for name, _ in block.named_children() if name.endswith("norm")} == NORM_NAMES[norms]
        expected = plain_block(block, norms, x + addend, cos, sin)
        stream, found, stats = block(x, addend, cos, sin)
        torch.testing.assert_close(stream if found is None else stream + found, expected, rtol=1e-12, atol=1e-12)
        assert stats is None


@torch.no_grad()
def test_an_offset_norm_scales_by_one_more_than_its_weight():
    plain = make_model(LLAMA, dtype=torch.float64)
    offset = make_model(dataclasses.replace(LLAMA, norm_offset=True), dtype=torch.float64)
    state = plain.state_dict()
    offset.load_state_dict({name: part - 1 if name.endswith("norm.weight") else part for name, part in state.items()})
    tokens = random_tokens(LLAMA, 1, 9)
    torch.testing.assert_close(offset(tokens), plain(tokens), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_embeddings_are_multiplied_by_the_configs_scale():
    plain = make_model(LLAMA, dtype=torch.float64)
    scaled = make_model(dataclasses.replace(LLAMA, embedding_scale=4.0), dtype=torch.float64)
    tokens = random_tokens(LLAMA, 1, 9)
    assert not torch.allclose(scaled(tokens), plain(tokens), rtol=1e-3)
    plain.embedding.weight.mul_(4.0)
    assert torch.equal(scaled(tokens), plain(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_logits_are_capped_in_high_precision_and_keep_their_dtype(dtype):
    plain = make_model(LLAMA, dtype=dtype)
    capped = make_model(dataclasses.replace(LLAMA, logit_softcap=1.5), dtype=dtype)
    tokens = random_tokens(LLAMA, 1, 9)
    found, uncapped = capped(tokens), plain(tokens)
    expected = 1.5 * torch.tanh(uncapped.double() / 1.5)
    assert found.dtype == dtype
    assert uncapped.abs().max() > 1.5 > found.abs().max()
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0.0)
    # A readout of the caller's gets the hidden states, and caps for itself.
    assert torch.equal(capped(tokens, readout=logits), uncapped)


@pytest.mark.parametrize("variant", MOE_VARIANTS)
@torch.no_grad()
def test_routing_is_reported_layer_by_layer_when_it_is_asked_for(variant):
    model = make_model(MOE_VARIANTS[variant])
    moe, tokens = model.config.moe, random_tokens(model.config, 2, 7)
    counted = torch.ones(2, 7, dtype=torch.bool)
    counted[1, 3:] = False
    log = RoutingLog(counted)
    found = model(tokens, routing=log)
    assert torch.equal(found, model(tokens))
    layers = model.config.expert_layers if moe.kind == "picked" else ()
    assert len(log.layers) == len(layers)
    for stats in log.layers:
        assert stats.counts_CE.shape == (moe.chain_length, moe.num_experts)
        assert stats.counts_CE.sum(dim=1).tolist() == [10 * moe.num_picked] * moe.chain_length


@torch.no_grad()
def test_a_chain_that_replaces_the_stream_is_all_that_the_next_block_reads():
    model = make_model(MOE_VARIANTS["chain inner"], dtype=torch.float64)
    block = model.blocks[0]
    x = torch.randn(1, 6, LLAMA.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cos, sin = rope_tables(torch.arange(6), LLAMA.head_size, LLAMA.rope_base, torch.float64)
    stream, addend, _ = block(x, None, cos, sin)
    attended = x + block.attention(block.attention_norm(x), cos, sin)
    expected, _ = block.moe(block.mlp_norm(attended))
    assert addend is None
    torch.testing.assert_close(stream, expected, rtol=1e-12, atol=1e-12)


def test_recomputing_blocks_does_not_route_again():
    model = make_model(MOE_VARIANTS["mixtral"])
    calls: list[int] = []
    for block in model.blocks:
        block.recompute = "blocks"
        block.moe.routers[0].register_forward_hook(lambda *_: calls.append(1))
    loss_gradients(model, random_tokens(model.config, 2, 9))
    assert len(calls) == LLAMA.num_layers


@pytest.mark.filterwarnings("default")  # of torch.compile's own
@pytest.mark.parametrize(
    ("variant", "recompute"),
    [
        ("gemma2", "nothing"),
        ("latent windowed", "cheap"),
        ("deepnorm", "blocks"),
        ("experts under deepnorm", "nothing"),
        ("deepseek-v3", "cheap"),
        ("chain inner", "blocks"),
    ],
)
def test_compiled_blocks_compute_the_same_model_in_whole_graphs(variant, recompute, monkeypatch):
    torch._dynamo.reset()  # graphs of other models count against the limit of one function's
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    model = make_model(ALL[variant], dtype=torch.float64)
    tokens = random_tokens(model.config, 2, 9)
    expected = loss_gradients(model, tokens)
    for block in model.blocks:
        block.recompute = recompute
        block.compile_body()
    found = loss_gradients(model, tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)

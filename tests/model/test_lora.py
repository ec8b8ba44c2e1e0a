"""Adapters compute what they say, also in blocks that are compiled, recomputed or sharded."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kernels.cross_entropy import cross_entropy_sum
from model.config import ModelConfig
from model.hugging_face_keys import ConvertError
from model.lora import LoraLinear, inject_lora, is_lora, lora_initial_value, lora_targets, merged_state
from model.lora_config import LoraConfig
from model.moe_config import ModelConfigError
from model.transformer import Block, Transformer
from resume.regions import copy_whole
from tests.adapters import adapted_model
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, make_model, random_tokens
from tests.processes import run_ranks

LORA = LoraConfig(rank=3, alpha=5.0)
LATENT = dataclasses.replace(VARIANTS["latent query"], norm_eps=1e-6)
TARGETS_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward(model: nn.Module, tokens: Tensor) -> None:
    cross_entropy_sum(model(tokens), tokens.roll(-1, dims=1)).backward()


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def linear(part_rows: dict[str, int], lora: LoraConfig, in_size: int) -> LoraLinear:
    """A layer of zeros with adapters of ones."""
    base = nn.Linear(in_size, sum(part_rows.values()), bias=False, dtype=torch.float64)
    layer = LoraLinear(base, lora, part_rows)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(1.0 if name.startswith("lora.") else 0.0)
    return layer


def test_training_starts_at_the_model_as_it_is():
    plain, injected = make_model(LLAMA), make_model(LLAMA)
    inject_lora(injected, LORA)
    tokens = random_tokens(LLAMA, 2, 20)
    assert torch.equal(injected(tokens), plain(tokens))
    assert not is_lora("blocks.0.attention.qkv.weight")
    assert {n: t.shape for n, t in injected.state_dict().items() if not is_lora(n)} == {
        n: t.shape for n, t in plain.state_dict().items()
    }


def test_only_adapters_are_trained():
    model = adapted_model(LLAMA, LORA)
    backward(model, random_tokens(LLAMA, 2, 20))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == gradients(model).keys() == {name for name in model.state_dict() if is_lora(name)}
    assert trained == {f"{target.name}.{side}" for target in lora_targets(LLAMA, LORA) for side in "ab"}
    # For each layer: q, k, v and out; gate and up; down.
    per_layer = 3 * (32 + 32 + 32 + 16 + 32 + 16 + 32 + 32) + 3 * 2 * (32 + 48) + 3 * (48 + 32)
    assert sum(model.get_parameter(name).numel() for name in trained) == 2 * per_layer


def test_rank_zero_leaves_the_model_alone():
    model = make_model(LLAMA)
    inject_lora(model, LoraConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert merged_state(model.state_dict(), LLAMA, LoraConfig()).keys() == model.state_dict().keys()


def test_an_adapter_adds_to_the_rows_of_its_own_part_alone():
    lora = LoraConfig(rank=2, alpha=6.0, targets=("k_proj",))
    layer = linear({"q_proj": 3, "k_proj": 2, "v_proj": 1}, lora, in_size=5)
    # 6 / 2 for the scale, 5 ones into each of 2 rows.
    assert layer(torch.ones(1, 5, dtype=torch.float64)).tolist() == [[0, 0, 0, 30, 30, 0]]


def test_rank_scaled_adapters_are_divided_by_the_root_of_the_rank():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rank_scaled=True).scale == 2.0


def test_dropout_zeroes_its_share_of_the_inputs_of_each_adapter_by_itself():
    num_rows, size, share = 400, 50, 0.2
    lora = LoraConfig(rank=size, alpha=float(size), dropout=share, targets=("gate_proj", "up_proj"))
    layer = linear({"gate_proj": size, "up_proj": size}, lora, in_size=size)
    with torch.no_grad():
        for parameter in layer.lora.parameters():
            parameter.copy_(torch.eye(size))
    torch.manual_seed(0)
    x = torch.ones(num_rows, size, dtype=torch.float64)
    gate, up = layer(x).chunk(2, dim=-1)
    dropped = [part == 0 for part in (gate, up)]
    for part, is_zero in zip((gate, up), dropped, strict=True):
        assert torch.all(is_zero | (part == 1 / (1 - share)))
        assert abs(is_zero.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / is_zero.numel())
    both = (dropped[0] & dropped[1]).double().mean()
    assert abs(both - share**2) < 5 * math.sqrt(share**2 / gate.numel())
    assert torch.equal(layer.eval()(x), torch.ones(num_rows, 2 * size, dtype=torch.float64))


def test_initial_values_follow_from_seed_and_name_and_are_uniform():
    shape = torch.Size((40, 500))
    first = lora_initial_value("blocks.0.mlp.down.lora.down_proj.a", shape, 3)
    assert torch.equal(first, lora_initial_value("blocks.0.mlp.down.lora.down_proj.a", shape, 3))
    assert not torch.equal(first, lora_initial_value("blocks.1.mlp.down.lora.down_proj.a", shape, 3))
    assert not torch.equal(first, lora_initial_value("blocks.0.mlp.down.lora.down_proj.a", shape, 4))
    assert not lora_initial_value("blocks.0.mlp.down.lora.down_proj.b", shape, 3).any()
    # Of torch's linear layers: kaiming_uniform_ with a = sqrt(5).
    bound = nn.init.calculate_gain("leaky_relu", math.sqrt(5)) * math.sqrt(3 / 500)
    assert bound * 0.999 < first.abs().max() <= bound
    assert abs(first.mean()) < 5 * bound / math.sqrt(3 * first.numel())
    assert first.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_an_injected_model_has_its_initial_values():
    model = make_model(LLAMA)
    inject_lora(model, LORA, seed=7)
    values = {name: parameter for name, parameter in model.named_parameters() if is_lora(name)}
    assert all(torch.equal(value, lora_initial_value(name, value.shape, 7)) for name, value in values.items())


@pytest.mark.parametrize("variant", ["llama tied", "qwen2 interleaved", "olmo2", "qwen3-moe"])
def test_merged_weights_are_a_plain_model_of_the_same_function(variant):
    config = (VARIANTS | MOE_VARIANTS)[variant]
    lora = dataclasses.replace(LORA, targets=TARGETS_OF_ATTENTION) if config.expert_layers else LORA
    model = adapted_model(config, lora, dtype=torch.float64)
    plain = make_model(config, seed=1, dtype=torch.float64)
    plain.load_state_dict(merged_state(model.state_dict(), config, lora))
    tokens = random_tokens(config, 2, 20)
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens), make_model(config, dtype=torch.float64)(tokens), atol=0.1)


def test_merging_into_bf16_rounds_once():
    model = adapted_model(LLAMA, LORA)
    state = {n: t if is_lora(n) else t.bfloat16() for n, t in model.state_dict().items()}
    merged = merged_state(state, LLAMA, LORA)["blocks.1.mlp.down.weight"]
    a, b = (state[f"blocks.1.mlp.down.lora.down_proj.{side}"] for side in "ab")
    expected = (state["blocks.1.mlp.down.weight"].float() + 5 / 3 * (b @ a)).bfloat16()
    assert torch.equal(merged, expected)


def gradients_with_blocks(lora: LoraConfig, recompute: str, compiled: bool) -> dict[str, Tensor]:
    model = adapted_model(LLAMA, lora, dtype=torch.float64)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.recompute = recompute  # pyright: ignore[reportAttributeAccessIssue]
        if compiled:
            block._body = torch.compile(block._body, backend="aot_eager", dynamic=False, fullgraph=True)
    torch.manual_seed(0)
    backward(model, random_tokens(LLAMA, 2, 20))
    return gradients(model)


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
def test_recomputed_blocks_drop_the_same_inputs_again(recompute):
    lora = dataclasses.replace(LORA, dropout=0.3)
    plain = gradients_with_blocks(lora, "nothing", compiled=False)
    assert largest_error(gradients_with_blocks(lora, recompute, compiled=False), plain) == 0
    assert largest_error(gradients_with_blocks(LORA, recompute, compiled=False), plain) > 0.1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recompute", ["nothing", "cheap", "blocks"])
def test_compiled_blocks_are_whole_graphs_with_the_same_gradients(recompute):
    plain = gradients_with_blocks(LORA, "nothing", compiled=False)
    assert largest_error(gradients_with_blocks(LORA, recompute, compiled=True), plain) < 1e-12


def sharded(config: ModelConfig, lora: LoraConfig, dtype: torch.dtype, world_size: int) -> Transformer:
    """As a run builds it: without memory, adapters injected, sharded, then filled."""
    master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.device("meta"):
        model = Transformer(config).to(master_dtype)
    inject_lora(model, lora)
    model.to_empty(device="cpu")
    model.tie()
    mesh = init_device_mesh("cpu", (world_size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=master_dtype, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        unit = fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    values = adapted_model(config, lora, dtype=master_dtype).state_dict()
    for name, parameter in model.named_parameters():
        copy_whole(parameter, values[name])
    return model


def gradients_of_ranks(folder: Path, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of four sequences, dealt out to the ranks one at a time."""

    def rank_gradients(rank: int) -> dict[str, Tensor]:
        model = sharded(LLAMA, LORA, dtype, world_size)
        for row in random_tokens(LLAMA, 4, 20)[rank::world_size]:
            backward(model, row[None])
        found = gradients(model)
        torch.distributed.barrier()
        return {name: value.full_tensor() for name, value in found.items() if isinstance(value, DTensor)}

    folder.mkdir()
    return run_ranks(rank_gradients, world_size, folder)[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.bfloat16, 1e-6)], ids=["fp64", "bf16"])
def test_two_ranks_give_the_gradients_of_one(tmp_path, dtype, limit):
    one, two = (gradients_of_ranks(tmp_path / str(n), n, dtype) for n in (1, 2))
    assert all(is_lora(name) for name in two)
    assert {value.dtype for value in two.values()} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert largest_error(two, one) < limit
    alone = adapted_model(LLAMA, LORA, dtype=torch.float64)
    backward(alone, random_tokens(LLAMA, 4, 20))
    assert largest_error(two, gradients(alone)) < (1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank = -1: must not be negative"),
        ({"alpha": 0.0}, "lora.alpha = 0.0: must be positive"),
        ({"dropout": 1.0}, "lora.dropout = 1.0: must be at least 0 and less than 1"),
        ({"targets": ()}, "name at least one"),
        ({"targets": ("q_proj", "q_proj")}, "each once"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(settings, message):
    with pytest.raises(ModelConfigError, match=message):
        LoraConfig(**settings)


SCORE = dataclasses.replace(LLAMA, head="score")


def test_a_reward_model_trains_its_head_beside_the_adapters():
    model = adapted_model(SCORE, LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in model.state_dict() if is_lora(name)} | {"head.weight"}
    merged = merged_state(model.state_dict(), SCORE, LORA)
    assert torch.equal(merged["head.weight"], model.head.weight)


@pytest.mark.parametrize(
    ("config", "targets", "error", "message"),
    [
        (LLAMA, ("q_proj", "qkv"), ModelConfigError, "no qkv that.*choose among q_proj, k_proj, v_proj, o_proj, gate_"),
        (LLAMA, ("lm_head",), ModelConfigError, "no lm_head"),
        (
            LATENT,
            LORA.targets,
            ModelConfigError,
            "no q_proj, .*attention alone.*choose among q_a_proj, q_b_proj, kv_a",
        ),
        (MOE_VARIANTS["qwen2-moe"], ("gate_proj",), ModelConfigError, r"no gate_proj .*\(attention alone, in"),
        (VARIANTS["senet"], LORA.targets, ConvertError, "senet"),
    ],
    ids=["packed", "head", "latent", "experts", "senet"],
)
def test_models_that_lack_a_target_are_left_as_they_are(config, targets, error, message):
    model = make_model(config)
    before = model.state_dict().keys()
    with pytest.raises(error, match=message):
        inject_lora(model, dataclasses.replace(LORA, targets=targets))
    assert model.state_dict().keys() == before
    assert all(parameter.requires_grad for parameter in model.parameters())

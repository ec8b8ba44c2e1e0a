import dataclasses
import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data_prep.config_file import keys
from model import convert, hugging_face_layouts
from model.config import TRAINING_KEYS, LatentConfig, ModelConfig
from model.convert import (
    ConvertError,
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_config,
    read_hugging_face,
    to_hugging_face,
    write_hugging_face,
)
from model.moe_config import MoEConfig
from model.transformer import Transformer
from tests.hugging_face import errors, load_theirs, our_model
from tests.models import MOE_VARIANTS, make_model


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """A config with some keys of itself or of its mixture changed."""
    of_moe = {key: changes.pop(key) for key in list(changes) if hasattr(config.moe, key)}
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, **of_moe), **changes)


MIXTRAL, QWEN2, QWEN3, OLMOE = (MOE_VARIANTS[name] for name in ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe"))
DEEPSEEK = changed(MOE_VARIANTS["deepseek-v3"], norm_eps=1e-6, shared_size=32)
OURS: dict[str, ModelConfig] = {
    "mixtral": MIXTRAL,
    "mixtral windows, sampling": changed(MIXTRAL, sliding_window=5, sampling=True, rope_interleaved=True),
    "qwen2": QWEN2,
    "qwen2 without biases": changed(QWEN2, qkv_bias=False, layer_every=1, renormalise=True),
    "qwen3": QWEN3,
    "qwen3 upper layers": changed(QWEN3, num_layers=5, first_dense_layers=1, layer_every=2, renormalise=False),
    "olmoe": OLMOE,
    "olmoe tied": changed(OLMOE, tie_embeddings=True, renormalise=True),
    "deepseek": DEEPSEEK,
    "deepseek without bias": changed(
        DEEPSEEK, bias="none", rope_interleaved=True, latent=LatentConfig(kv_rank=12, rope_size=4, value_size=6)
    ),
    "deepseek one group": changed(DEEPSEEK, num_groups=1, num_picked_groups=1, bias="proportional", balance="global"),
}


def written(folder: Path, config: ModelConfig, dtype: str = "fp32") -> Transformer:
    ours = make_model(config)
    write_hugging_face(folder, config, ours.state_dict(), eos_id=None, dtype=dtype)
    return ours


@pytest.mark.parametrize("variant", OURS)
def test_a_model_of_ours_becomes_the_same_function(variant, tmp_path):
    ours = written(tmp_path, OURS[variant])
    assert errors(ours.double(), load_theirs(tmp_path), tmp_path) < (1e-12, 1e-12)


@pytest.mark.parametrize("variant", OURS)
def test_shape_and_weights_come_back_bit_for_bit(variant, tmp_path):
    ours = written(tmp_path, OURS[variant])
    config, state = read_hugging_face(tmp_path)
    assert_same_shape(config, ours.config)
    again = from_hugging_face(ours.config, to_hugging_face(config, state))
    assert again.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(again[name], torch.full_like(value, 1 / len(value)) if name.endswith("load") else value)
    write_hugging_face(tmp_path / "again", config, state, eos_id=None, dtype="fp32")
    one, two = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def assert_same_shape(found: ModelConfig, expected: ModelConfig) -> None:
    """Equal keys, but for those that theirs have no place for, because they change no output."""
    free = {*TRAINING_KEYS, "rope_interleaved"}
    free |= {"ffn_size"} if len(expected.expert_layers) == expected.num_layers else set()
    free |= {"moe.bias"} if expected.is_latent else set()
    for key in keys(ModelConfig):
        if key not in free:
            assert value(found, key) == value(expected, key), key


def value(config: ModelConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def test_names_and_order_of_experts_are_those_of_the_hub():
    ours = make_model(MIXTRAL).state_dict()
    theirs = to_hugging_face(MIXTRAL, ours)
    layer, gate_up = "model.layers.1.block_sparse_moe", ours["blocks.1.moe.experts.gate_up"]
    assert torch.equal(theirs[f"{layer}.experts.2.w1.weight"], gate_up[2, :16])
    assert torch.equal(theirs[f"{layer}.experts.2.w3.weight"], gate_up[2, 16:])
    assert torch.equal(theirs[f"{layer}.experts.3.w2.weight"], ours["blocks.1.moe.experts.down"][3])
    assert torch.equal(theirs[f"{layer}.gate.weight"], ours["blocks.1.moe.routers.0.weight"])
    theirs = to_hugging_face(QWEN2, make_model(QWEN2).state_dict())
    for name in (
        "gate.weight",
        "experts.3.up_proj.weight",
        "shared_expert.down_proj.weight",
        "shared_expert_gate.weight",
    ):
        assert f"model.layers.0.mlp.{name}" in theirs
    theirs = to_hugging_face(DEEPSEEK, make_model(DEEPSEEK).state_dict())
    for name in ("gate.e_score_correction_bias", "experts.7.gate_proj.weight", "shared_experts.up_proj.weight"):
        assert f"model.layers.1.mlp.{name}" in theirs


def test_only_the_router_s_bias_stays_fp32(tmp_path):
    ours = written(tmp_path, DEEPSEEK, dtype="bf16")
    stored = load_file(tmp_path / "model.safetensors")
    bias = stored.pop("model.layers.1.mlp.gate.e_score_correction_bias")
    assert torch.equal(bias, ours.state_dict()["blocks.1.moe.routers.0.bias"])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert errors(our_model(*read_hugging_face(tmp_path)).double(), load_theirs(tmp_path), tmp_path) < (1e-12, 1e-12)


def test_a_bias_that_is_stored_in_bf16_becomes_fp32():
    theirs = to_hugging_face(DEEPSEEK, make_model(DEEPSEEK).state_dict())
    state = from_hugging_face(DEEPSEEK, {name: tensor.bfloat16() for name, tensor in theirs.items()})
    assert state["blocks.1.moe.routers.0.bias"].dtype == torch.float32
    assert state["blocks.1.moe.routers.0.weight"].dtype == torch.bfloat16


def test_loads_are_left_out_and_come_back_even():
    config = changed(MIXTRAL, balance="global")
    state = make_model(config).state_dict()
    assert not any("load" in name for name in to_hugging_face(config, state))
    again = from_hugging_face(config, to_hugging_face(config, state))
    assert torch.equal(again["blocks.0.moe.routers.0.load"], torch.full((4,), 0.25))
    assert "blocks.0.moe.routers.0.load" not in from_hugging_face(
        changed(config, balance="none"), to_hugging_face(config, state)
    )


def test_layers_that_guess_further_ahead_are_left_out(tmp_path):
    ours = written(tmp_path, DEEPSEEK)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name
    }
    extra["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=r"unexpected: model\.layers\.2"):
        read_hugging_face(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_nextn_predict_layers": 0', '"num_nextn_predict_layers": 1')
    )
    _, state = read_hugging_face(tmp_path)
    assert state.keys() == ours.state_dict().keys()


def test_import_lets_go_of_the_experts_that_it_has_packed(tmp_path, monkeypatch):
    written(tmp_path, MIXTRAL)
    read, pack = convert._read_tensors, hugging_face_layouts.Stack.from_theirs
    theirs: dict[str, weakref.ref[Tensor]] = {}
    alive: dict[str, int] = {}

    def reading(folder: Path) -> dict[str, Tensor]:
        tensors = read(folder)
        theirs.update({name: weakref.ref(tensor) for name, tensor in tensors.items() if ".experts." in name})
        return tensors

    def packing(stack: hugging_face_layouts.Stack, parts: list[Tensor]) -> Tensor:
        alive[stack.ours] = sum(reference() is not None for reference in theirs.values())
        return pack(stack, parts)

    monkeypatch.setattr(convert, "_read_tensors", reading)
    monkeypatch.setattr(hugging_face_layouts.Stack, "from_theirs", packing)
    read_hugging_face(tmp_path)
    per_layer = 4 * 3
    assert alive["embedding.weight"] == 2 * per_layer
    assert alive["blocks.1.moe.experts.gate_up"] == per_layer
    assert alive["norm.weight"] == 0


def test_the_tensors_that_a_caller_gives_stay_his():
    theirs = to_hugging_face(MIXTRAL, make_model(MIXTRAL).state_dict())
    names = list(theirs)
    from_hugging_face(MIXTRAL, theirs)
    assert list(theirs) == names


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (MIXTRAL, {"chain_length": 2}, "model.moe.chain_length = 2 (MixtralForCausalLM: 1)"),
        (MIXTRAL, {"chain_residual": "inner"}, "model.moe.chain_residual = 'inner' (MixtralForCausalLM: 'outer')"),
        (
            MIXTRAL,
            {"kind": "chunk_soft", "balance": "none"},
            "model.moe.kind = 'chunk_soft' (MixtralForCausalLM: 'pick",
        ),
        (MIXTRAL, {"temperature": 0.5}, "model.moe.temperature = 0.5 (MixtralForCausalLM: 1.0)"),
        (MIXTRAL, {"bias": "sign"}, "model.moe.bias = 'sign' (MixtralForCausalLM: 'none')"),
        (MIXTRAL, {"scores": "sigmoid"}, "model.moe.scores = 'sigmoid' (MixtralForCausalLM: 'softmax')"),
        (MIXTRAL, {"route_scale": 2.0}, "model.moe.route_scale = 2.0 (MixtralForCausalLM: 1.0)"),
        (MIXTRAL, {"renormalise": False}, "model.moe.renormalise = False (MixtralForCausalLM: True)"),
        (MIXTRAL, {"num_groups": 2, "num_picked": 1}, "model.moe.num_groups = 2 (MixtralForCausalLM: 1)"),
        (MIXTRAL, {"first_dense_layers": 1}, "model.moe.first_dense_layers = 1 (MixtralForCausalLM: 0)"),
        (MIXTRAL, {"norms": "sandwich"}, "model.norms = 'sandwich' (MixtralForCausalLM: 'pre')"),
        (MIXTRAL, {"ffn": "geglu"}, "model.ffn = 'geglu' (MixtralForCausalLM: 'swiglu')"),
        (QWEN2, {"shared_gate": False}, "model.moe.shared_gate = False (Qwen2MoeForCausalLM: True)"),
        (QWEN2, {"shared_gate": False, "shared_size": 0}, "model.moe.shared_size = 0: Qwen2-MoE, their only mixture"),
        (QWEN2, {"qk_norm": "head"}, "model.qk_norm = 'head' (Qwen2MoeForCausalLM: 'none')"),
        (QWEN3, {"sliding_window": 5}, "model.sliding_window = 5 (Qwen3MoeForCausalLM: None)"),
        (OLMOE, {"first_dense_layers": 1}, "model.moe.first_dense_layers = 1 (OlmoeForCausalLM: 0)"),
        (OLMOE, {"norms": "output"}, "model.norms = 'output' (OlmoeForCausalLM: 'pre')"),
        (OLMOE, {"hidden_size": 34}, "OlmoeForCausalLM refuses that"),
        (DEEPSEEK, {"scores": "softmax"}, "model.moe.scores = 'softmax' (DeepseekV3ForCausalLM: 'sigmoid')"),
        (DEEPSEEK, {"group_score": "max"}, "model.moe.group_score = 'max' (DeepseekV3ForCausalLM: 'top2')"),
        (DEEPSEEK, {"shared_gate": True}, "model.moe.shared_gate = True (DeepseekV3ForCausalLM: False)"),
        (DEEPSEEK, {"layer_every": 2, "num_layers": 4}, "model.moe.layer_every = 2 (DeepseekV3ForCausalLM: 1)"),
        (DEEPSEEK, {"shared_size": 24}, "multiple of model.moe.expert_size = 16 can be exported"),
        (DEEPSEEK, {"shared_size": 0}, "model.moe.shared_size = 0: DeepSeek-V3 has whole shared experts, at least one"),
        (
            DEEPSEEK,
            {"num_groups": 8, "num_picked_groups": 3, "group_score": "max"},
            "only groups of two or more can be exported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mixture_that_none_of_theirs_has_is_refused_with_what_the_nearest_has(config, changes, complaint):
    with pytest.raises(ConvertError) as caught:
        hugging_face_config(changed(config, **changes), eos_id=None, dtype="fp32")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (MIXTRAL, {"group_score": "max", "chunk_size": 3, "num_slots": 5, "z_loss": 0.1, "bias_rate": 0.1}),
        (MIXTRAL, {"ffn_size": 7}),
        (QWEN2, {"first_dense_layers": 2, "num_layers": 5}),
        (DEEPSEEK, {"layer_every": 5}),
    ],
    ids=str,
)
def test_keys_that_make_no_difference_are_no_reason_to_refuse(config, changes):
    config = changed(config, **changes)
    assert hugging_face_config(config, eos_id=None, dtype="fp32")["vocab_size"] == config.vocab_size


def test_a_mixture_whose_layers_are_all_dense_has_no_experts():
    table = their_table(QWEN3, mlp_only_layers=[0, 1])
    assert config_from_hugging_face(table).moe == MoEConfig()


def their_table(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    table = hugging_face_config(config, eos_id=None, dtype="fp32") | changes
    return {key: value for key, value in table.items() if value != "absent"}


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (MIXTRAL, {"num_local_experts": "absent"}, "num_local_experts is missing"),
        (MIXTRAL, {"num_experts_per_tok": "absent"}, "num_experts_per_tok is missing"),
        (MIXTRAL, {"num_experts_per_tok": 5}, "model.moe.num_picked = 5: there are 4 experts to pick from"),
        (MIXTRAL, {"num_experts_per_tok": 0}, "model.moe.num_picked = 0: must be positive"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: only 0.0 is implemented"),
        (MIXTRAL, {"router_aux_loss_coef": "0.1"}, "router_aux_loss_coef = '0.1': expected a number"),
        (MIXTRAL, {"router_aux_loss_coef": -0.1}, "model.moe.balance_weight = -0.1: must not be negative"),
        (QWEN2, {"num_experts": "absent"}, "num_local_experts is missing"),
        (QWEN2, {"shared_expert_intermediate_size": "absent"}, "shared_expert_intermediate_size is missing"),
        (QWEN2, {"moe_intermediate_size": "absent"}, "moe_intermediate_size is missing"),
        (QWEN2, {"norm_topk_prob": 1}, "norm_topk_prob = 1: expected true or false"),
        (QWEN2, {"qkv_bias": "yes"}, "qkv_bias = 'yes': expected true or false"),
        (QWEN2, {"use_sliding_window": True}, "use_sliding_window = True: only False is implemented"),
        (QWEN3, {"use_sliding_window": True}, "use_sliding_window = True: only False is implemented"),
        (QWEN3, {"mlp_only_layers": 1}, "mlp_only_layers = 1: expected a list of whole numbers"),
        (QWEN3, {"mlp_only_layers": [0.5]}, "mlp_only_layers = [0.5]: expected a list of whole numbers"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: must be positive"),
        (QWEN3, {"num_hidden_layers": 4, "mlp_only_layers": [3]}, "experts into layers [0, 1, 2]"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv = 8.0: only None is implemented"),
        (OLMOE, {"head_dim": 16}, "head_dim = 16: only 8 is implemented"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func = 'softmax': only 'sigmoid' is implemented"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method = 'greedy': only 'noaux_tc' is implemented"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq = 2: only 1 is implemented"),
        (DEEPSEEK, {"n_routed_experts": "absent"}, "n_routed_experts is missing"),
        (DEEPSEEK, {"n_shared_experts": "absent"}, "n_shared_experts is missing"),
        (DEEPSEEK, {"routed_scaling_factor": "absent"}, "routed_scaling_factor is missing"),
        (DEEPSEEK, {"n_group": 3}, "model.moe.num_experts = 8 is not a multiple of model.moe.num_groups = 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mixture_that_we_do_not_implement_is_refused_with_its_key_and_value(config, changes, complaint):
    with pytest.raises(ConvertError) as caught:
        config_from_hugging_face(their_table(config, **changes))
    assert complaint in str(caught.value)


def test_experts_in_every_second_layer_are_read_however_they_are_put():
    expected = changed(QWEN3, num_layers=4, layer_every=2)
    assert config_from_hugging_face(their_table(expected)).expert_layers == (0, 2)
    table = their_table(changed(QWEN3, num_layers=4), mlp_only_layers=[1, 3], num_local_experts=8, num_experts="absent")
    assert_same_shape(config_from_hugging_face(table), expected)
    table = their_table(changed(QWEN3, num_layers=2), decoder_sparse_step=2)
    assert config_from_hugging_face(table).expert_layers == (1,)


@pytest.mark.parametrize(
    ("config", "changes", "balance", "weight"),
    [
        (MIXTRAL, {"balance": "none"}, "none", None),
        (MIXTRAL, {"balance": "global", "balance_weight": 0.03}, "global", 0.03),
        (MIXTRAL, {"balance": "switch", "balance_weight": 0.03}, "global", 0.03),
        (QWEN2, {"balance": "sequence", "balance_weight": 0.03}, "global", 0.03),
        (DEEPSEEK, {"balance": "none"}, "none", None),
        (DEEPSEEK, {"balance": "sequence", "balance_weight": 0.03}, "sequence", 0.03),
        (DEEPSEEK, {"balance": "global", "balance_weight": 0.03}, "global", 0.03),
    ],
    ids=str,
)
def test_the_balancing_loss_comes_back_as_far_as_theirs_can_say_it(config, changes, balance, weight):
    again = config_from_hugging_face(their_table(changed(config, **changes))).moe
    assert again.balance == balance
    assert weight is None or again.balance_weight == pytest.approx(weight, rel=1e-15)


def test_the_weight_of_the_balancing_loss_is_theirs_over_equal_layers():
    """Their loss of all layers is our sum over layers of Switch's, where the layers have the same load."""
    num_layers, num_experts, num_picked = 3, 6, 2
    table = {"num_hidden_layers": num_layers, "num_local_experts": num_experts, "num_experts_per_tok": num_picked}
    table = their_table(changed(MIXTRAL, num_layers=3, num_experts=6), router_aux_loss_coef=0.02, **table)
    weight = config_from_hugging_face(table).moe.balance_weight
    logits_ME = torch.randn(50, num_experts, generator=torch.Generator().manual_seed(0))
    theirs = 0.02 * load_balancing_loss_func((logits_ME,) * num_layers, num_experts, num_picked)
    counts_E = logits_ME.topk(num_picked).indices.flatten().bincount(minlength=num_experts)
    switch = num_experts * (counts_E / counts_E.sum() * logits_ME.softmax(dim=-1).mean(dim=0)).sum()
    assert theirs == pytest.approx((num_layers * weight * switch).item(), rel=1e-6)


def test_a_mixture_of_theirs_without_the_keys_of_a_loss_has_none():
    assert config_from_hugging_face(their_table(MIXTRAL, router_aux_loss_coef="absent")).moe.balance == "none"
    table = their_table(DEEPSEEK, aux_loss_alpha="absent", seq_aux="absent", scoring_func="absent")
    assert config_from_hugging_face(table).moe.balance == "none"


def test_a_stack_that_lacks_an_expert_is_refused():
    theirs = to_hugging_face(MIXTRAL, make_model(MIXTRAL).state_dict())
    del theirs["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(
        ConvertError, match=r"missing: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight \(16, 32"
    ):
        from_hugging_face(MIXTRAL, theirs)


def test_a_state_without_the_bias_that_its_config_has_is_refused():
    state = make_model(DEEPSEEK).state_dict()
    del state["blocks.1.moe.routers.0.bias"]
    with pytest.raises(ConvertError, match=r"missing: blocks\.1\.moe\.routers\.0\.bias \(8,\)"):
        to_hugging_face(DEEPSEEK, state)

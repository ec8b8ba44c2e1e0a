import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels.cross_entropy import cross_entropy_sum
from model.config import ModelConfig
from model.convert import (
    ConvertError,
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_config,
    read_hugging_face,
    to_hugging_face,
    write_hugging_face,
)
from model.transformer import Transformer, logits
from tests.models import LLAMA, VARIANTS, make_model, random_tokens

THEIR_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
THEIRS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**THEIR_SIZES, **more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**THEIR_SIZES, **more)),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**THEIR_SIZES, head_dim=16, **more)),
}
THEIR_VARIANTS = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("llama", {"head_dim": 24}),
    "llama other base": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


def their_model(variant: str) -> torch.nn.Module:
    """A model of theirs whose norms and biases are random too."""
    kind, more = THEIR_VARIANTS[variant]
    torch.manual_seed(0)
    model = THEIRS[kind](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def our_model(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(state)
    return model


def assert_same_function(ours: Transformer, theirs: torch.nn.Module) -> None:
    """Equal logits and equal gradients of every weight, to the rounding of fp32."""
    tokens = random_tokens(ours.config, 2, 32)
    our_logits, their_logits = ours(tokens), theirs(input_ids=tokens).logits
    assert relative_error(our_logits, their_logits) < 1e-5
    targets = tokens.roll(-1, dims=1)
    ours(tokens, readout=lambda hidden, head: cross_entropy_sum(logits(hidden, head), targets)).backward()
    cross_entropy_sum(their_logits, targets).backward()
    state = {name: parameter.grad for name, parameter in ours.named_parameters()}
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    our_gradients = to_hugging_face(ours.config, state)
    assert our_gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        assert relative_error(our_gradients[name], expected) < 1e-5, name


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("variant", THEIR_VARIANTS)
def test_a_model_of_theirs_becomes_the_same_function(variant, tmp_path):
    theirs = their_model(variant)
    theirs.save_pretrained(tmp_path)
    assert_same_function(our_model(*read_hugging_face(tmp_path)), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_ours_becomes_the_same_function(variant, tmp_path):
    ours = make_model(VARIANTS[variant])
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), eos_id=5, dtype="fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 5
    assert theirs.config.bos_token_id is None
    assert theirs.dtype == torch.float32
    assert_same_function(ours, theirs.eval())


def test_sharded_files_are_read_like_whole_ones(tmp_path):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_function(our_model(*read_hugging_face(tmp_path)), theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shape_and_weights_come_back_bit_for_bit(variant, tmp_path):
    ours = make_model(VARIANTS[variant])
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), eos_id=None, dtype="fp32")
    config, state = read_hugging_face(tmp_path)
    assert config == dataclasses.replace(ours.config, rope_interleaved=False)
    if ours.config.rope_interleaved:
        state = from_hugging_face(ours.config, to_hugging_face(config, state))
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_written_in_the_dtype_asked_for(dtype, expected, tmp_path):
    ours = make_model(LLAMA)
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), eos_id=None, dtype=dtype)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {expected}
    assert torch.equal(stored["model.norm.weight"], ours.norm.weight.to(expected))
    assert AutoConfig.from_pretrained(tmp_path).dtype == expected


def test_the_parts_of_a_packed_matrix_keep_their_order():
    ours = make_model(LLAMA)
    theirs = to_hugging_face(LLAMA, ours.state_dict())
    qkv = ours.blocks[1].attention.qkv.weight
    assert torch.equal(theirs["model.layers.1.self_attn.q_proj.weight"], qkv[:32])
    assert torch.equal(theirs["model.layers.1.self_attn.k_proj.weight"], qkv[32:48])
    assert torch.equal(theirs["model.layers.1.self_attn.v_proj.weight"], qkv[48:])
    gate_up = ours.blocks[0].mlp.gate_up.weight
    assert torch.equal(theirs["model.layers.0.mlp.gate_proj.weight"], gate_up[:48])
    assert torch.equal(theirs["model.layers.0.mlp.up_proj.weight"], gate_up[48:])


def test_a_tied_head_may_be_present_on_either_side():
    config = VARIANTS["llama tied"]
    state = make_model(config).state_dict()
    theirs = to_hugging_face(config, state)
    assert "lm_head.weight" not in theirs
    assert to_hugging_face(config, {n: t for n, t in state.items() if n != "head.weight"}).keys() == theirs.keys()
    again = from_hugging_face(config, theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"].clone()})
    assert again["head.weight"] is again["embedding.weight"]


def test_a_tied_head_that_differs_is_refused():
    config = VARIANTS["llama tied"]
    theirs = to_hugging_face(config, make_model(config).state_dict())
    with pytest.raises(ConvertError, match=r"lm_head\.weight differs .* tie_word_embeddings"):
        from_hugging_face(config, theirs | {"lm_head.weight": theirs["model.embed_tokens.weight"] + 1})


def test_rotary_frequencies_of_old_checkpoints_are_ignored():
    state = make_model(LLAMA).state_dict()
    theirs = to_hugging_face(LLAMA, state)
    again = from_hugging_face(LLAMA, theirs | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert again.keys() == state.keys()


def test_tensors_that_do_not_fit_are_all_named():
    theirs = to_hugging_face(LLAMA, make_model(LLAMA).state_dict())
    del theirs["model.layers.1.mlp.up_proj.weight"]
    theirs["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    theirs["model.norm.weight"] = torch.ones(31)
    theirs["lm_head.weight"] = theirs["lm_head.weight"].to(torch.int8)
    with pytest.raises(ConvertError) as caught:
        from_hugging_face(LLAMA, theirs)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight (48, 32)" in message
    assert "unexpected: model.layers.0.self_attn.q_proj.bias (32,)" in message
    assert "wrong shape: model.norm.weight (31,), expected (32,)" in message
    assert "not floating point: lm_head.weight torch.int8" in message


def test_a_long_list_of_bad_tensors_is_cut_short():
    with pytest.raises(ConvertError, match=r"missing: .* and \d+ more$"):
        from_hugging_face(LLAMA, {})


def test_a_state_of_ours_that_does_not_fit_is_refused():
    state = make_model(LLAMA).state_dict()
    del state["blocks.1.attention.qkv.weight"]
    with pytest.raises(ConvertError, match=r"missing: blocks\.1\.attention\.qkv\.weight \(64, 32\)"):
        to_hugging_face(LLAMA, state)


def test_a_shape_that_none_of_theirs_has_is_refused():
    both = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)
    with pytest.raises(ConvertError, match=r"qkv_bias and model\.qk_norm are both set"):
        hugging_face_config(both, eos_id=None, dtype="fp32")
    uneven = dataclasses.replace(LLAMA, hidden_size=34)
    with pytest.raises(ConvertError, match="hidden_size = 34 is not a multiple"):
        hugging_face_config(uneven, eos_id=None, dtype="fp32")


@pytest.mark.parametrize("eos_id", [-1, LLAMA.vocab_size])
def test_an_end_token_outside_the_vocabulary_is_refused(eos_id):
    with pytest.raises(ConvertError, match=f"eos_id = {eos_id}"):
        hugging_face_config(LLAMA, eos_id=eos_id, dtype="fp32")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConvertError, match="dtype = 'float8': expected one of fp32, bf16, fp16"):
        hugging_face_config(LLAMA, eos_id=None, dtype="float8")


def their_table(**changes: Any) -> dict[str, Any]:
    table = hugging_face_config(LLAMA, eos_id=None, dtype="fp32") | changes
    return {key: value for key, value in table.items() if value != "absent"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mixtral"}, "model_type = 'mixtral': can read llama, qwen2, qwen3"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[1] = 'sliding_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear', 'factor': 2.0}"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters = {'rope_type': 'llama3'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only unscaled RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "only unscaled RoPE"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default': expected a table"),
        ({"rope_theta": 1e6}, "contradictory RoPE bases"),
        ({"vocab_size": "absent"}, "vocab_size is missing"),
        ({"rms_norm_eps": "absent"}, "rms_norm_eps is missing"),
        ({"hidden_size": 32.5}, "hidden_size = 32.5: expected a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: expected a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': expected a number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: must be positive"),
        ({"num_key_value_heads": 3}, "num_heads = 4 is not a multiple of model.num_kv_heads = 3"),
        ({"model_type": "qwen2", "num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        ({"model_type": "qwen3", "head_dim": "absent"}, "head_dim is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_that_we_do_not_implement_is_refused_with_its_key_and_value(changes, complaint):
    with pytest.raises(ConvertError) as caught:
        config_from_hugging_face(their_table(**changes))
    assert complaint in str(caught.value)


def test_a_config_of_transformers_4_is_read():
    table = their_table(rope_parameters="absent", rope_theta=5e5, rope_scaling=None, head_dim="absent")
    assert config_from_hugging_face(table) == dataclasses.replace(LLAMA, rope_base=5e5)


def test_a_first_generation_llama_config_is_read():
    table = their_table(rope_parameters="absent", rope_theta="absent", head_dim="absent", num_key_value_heads="absent")
    assert config_from_hugging_face(table) == dataclasses.replace(LLAMA, num_kv_heads=4)


def written(folder: Path) -> Path:
    ours = make_model(LLAMA)
    write_hugging_face(folder, LLAMA, ours.state_dict(), eos_id=None, dtype="fp32")
    return folder


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConvertError, match=r"config\.json: cannot be read"):
        read_hugging_face(tmp_path)


@pytest.mark.parametrize(("content", "complaint"), [("{", "not JSON"), ("[1]", "expected a JSON object, found list")])
def test_a_config_that_is_no_json_object_is_refused(content, complaint, tmp_path):
    written(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConvertError, match=complaint):
        read_hugging_face(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (written(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_hugging_face(tmp_path)


def test_a_pickle_is_not_opened(tmp_path):
    (written(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"pytorch_model\.bin, a pickle: save it again with safe_serialization"):
        read_hugging_face(tmp_path)


def test_a_cut_off_file_is_refused(tmp_path):
    weights = written(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConvertError, match=r"model\.safetensors: damaged or incomplete"):
        read_hugging_face(tmp_path)


def sharded(folder: Path) -> dict[str, Any]:
    tensors = load_file(written(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, folder / "b.safetensors")
    return {name: "a.safetensors" if name in names[:5] else "b.safetensors" for name in names}


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, sharded(tmp_path))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"names b\.safetensors, which is not there"):
        read_hugging_face(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_index(tmp_path, sharded(tmp_path) | {"model.extra.weight": "a.safetensors"})
    with pytest.raises(ConvertError, match=r"tensors that its files lack: model\.extra\.weight"):
        read_hugging_face(tmp_path)


def test_an_index_that_leaves_the_folder_is_refused(tmp_path):
    write_index(tmp_path, sharded(tmp_path) | {"lm_head.weight": "../a.safetensors"})
    with pytest.raises(ConvertError, match="is not a file of this folder"):
        read_hugging_face(tmp_path)


@pytest.mark.parametrize("weight_map", [None, ["a.safetensors"], {"lm_head.weight": 3}])
def test_an_index_without_a_table_of_files_is_refused(weight_map, tmp_path):
    sharded(tmp_path)
    write_index(tmp_path, weight_map)
    with pytest.raises(ConvertError, match="weight_map is not a table of file names"):
        read_hugging_face(tmp_path)

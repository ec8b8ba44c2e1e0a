import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from model import convert
from model.config import LatentConfig, ModelConfig
from model.convert import (
    ConvertError,
    config_from_hugging_face,
    from_hugging_face,
    hugging_face_config,
    read_hugging_face,
    to_hugging_face,
    write_hugging_face,
)
from tests.hugging_face import errors, load_theirs, our_model, their_model
from tests.models import LLAMA, VARIANTS, make_model

GEMMA2 = dataclasses.replace(VARIANTS["gemma2"], attention_scale=20**-0.5)
LATENT = dataclasses.replace(VARIANTS["latent query"], norm_eps=1e-6)
UPPER_WINDOWS = {"num_layers": 3, "sliding_window": 5, "window_pattern": "LSS"}
DENSE: dict[str, ModelConfig] = {
    **{name: config for name, config in VARIANTS.items() if name.startswith(("llama", "qwen2", "qwen3", "mistral"))},
    "qwen2 upper windows": dataclasses.replace(VARIANTS["qwen2"], **UPPER_WINDOWS),
    "qwen3 upper windows": dataclasses.replace(VARIANTS["qwen3"], **UPPER_WINDOWS),
    "gemma2": GEMMA2,
    "gemma2 untied": dataclasses.replace(
        GEMMA2, tie_embeddings=False, attention_scale=None, attention_softcap=None, rope_interleaved=True
    ),
    "olmo2": VARIANTS["olmo2"],
    "olmo2 interleaved": dataclasses.replace(VARIANTS["olmo2"], num_kv_heads=4, rope_interleaved=True),
    "deepseek": LATENT,
    "deepseek interleaved": dataclasses.replace(VARIANTS["latent"], norm_eps=1e-6, tie_embeddings=True),
}


@pytest.mark.parametrize("variant", DENSE)
def test_a_model_of_ours_becomes_the_same_function(variant, tmp_path):
    ours = make_model(DENSE[variant])
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), eos_id=5, dtype="fp32")
    theirs = load_theirs(tmp_path)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 5
    assert theirs.config.bos_token_id is None
    logits_error, gradients_error = errors(ours.double(), theirs, tmp_path)
    assert logits_error < 1e-12
    assert gradients_error < 1e-12


def test_sharded_files_are_read_like_whole_ones(tmp_path):
    theirs = their_model("Llama", torch.float64)
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert errors(our_model(*read_hugging_face(tmp_path)), theirs, tmp_path) < (1e-12, 1e-12)


def test_large_models_are_written_as_several_files(tmp_path, monkeypatch):
    limit_bytes = 10_000
    monkeypatch.setattr(convert, "_FILE_BYTES", limit_bytes)
    ours = make_model(LLAMA)
    write_hugging_face(tmp_path, LLAMA, ours.state_dict(), eos_id=None, dtype="bf16")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 3
    sizes_bytes = []
    for file in files:
        tensors = load_file(tmp_path / file)
        assert {index["weight_map"][name] for name in tensors} == {file}
        sizes_bytes.append(sum(tensor.nbytes for tensor in tensors.values()))
    assert max(sizes_bytes) <= limit_bytes
    assert sum(sizes_bytes) == index["metadata"]["total_size"]
    _, state = read_hugging_face(tmp_path)
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in ours.state_dict().items())
    assert errors(our_model(LLAMA, {n: t.double() for n, t in state.items()}), load_theirs(tmp_path), tmp_path) < (
        1e-12,
        1e-12,
    )


def test_a_tensor_above_the_largest_file_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "_FILE_BYTES", 1)
    ours = make_model(LLAMA)
    write_hugging_face(tmp_path, LLAMA, ours.state_dict(), eos_id=None, dtype="fp32")
    assert len(list(tmp_path.glob("*.safetensors"))) == len(to_hugging_face(LLAMA, ours.state_dict()))
    assert read_hugging_face(tmp_path)[1].keys() == ours.state_dict().keys()


@pytest.mark.parametrize("variant", DENSE)
def test_shape_and_weights_come_back_bit_for_bit(variant, tmp_path):
    ours = make_model(DENSE[variant])
    write_hugging_face(tmp_path, ours.config, ours.state_dict(), eos_id=None, dtype="fp32")
    config, state = read_hugging_face(tmp_path)
    expected = dataclasses.replace(ours.config, rope_interleaved=False)
    if expected.attention_scale is not None:
        assert config.attention_scale == pytest.approx(expected.attention_scale, rel=1e-15)
        expected = dataclasses.replace(expected, attention_scale=config.attention_scale)
    assert config == expected
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


WITH_BIAS, WITH_NORM = VARIANTS["qwen2"], VARIANTS["qwen3"]


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (LLAMA, {"norms": "deepnorm"}, "model.norms = 'deepnorm' (LlamaForCausalLM: 'pre')"),
        (LLAMA, {"ffn": "senet"}, "model.ffn = 'senet' (LlamaForCausalLM: 'swiglu')"),
        (LLAMA, {"ffn": "geglu"}, "model.norms = 'pre' (Gemma2ForCausalLM: 'sandwich'), model.norm_offset = False"),
        (LLAMA, {"norm_offset": True}, "model.norm_offset = True (LlamaForCausalLM: False)"),
        (LLAMA, {"embedding_scale": 2.0}, "model.embedding_scale = 2.0 (LlamaForCausalLM: 1.0)"),
        (LLAMA, {"attention_scale": 0.1}, "model.attention_scale = 0.1 (LlamaForCausalLM: None)"),
        (LLAMA, {"attention_softcap": 9.0}, "model.attention_softcap = 9.0 (LlamaForCausalLM: None)"),
        (LLAMA, {"logit_softcap": 9.0}, "model.logit_softcap = 9.0 (LlamaForCausalLM: None)"),
        (LLAMA, {"sliding_window": 5, "window_pattern": "LS"}, "model.window_pattern = 'LS' (MistralForCausalLM: 'S')"),
        (WITH_BIAS, {"qk_norm": "head"}, "model.qkv_bias = True (Qwen3ForCausalLM: False)"),
        (
            WITH_BIAS,
            {"sliding_window": 5, "window_pattern": "SL"},
            "model.window_pattern = 'SL' (Qwen2ForCausalLM: 'S')",
        ),
        (WITH_NORM, {"norms": "output"}, "model.qk_norm = 'head' (Olmo2ForCausalLM: 'full')"),
        (VARIANTS["olmo2"], {"head_size": 16}, "model.head_size = 16 (Olmo2ForCausalLM: 8)"),
        (VARIANTS["olmo2"], {"norms": "pre"}, "model.norms = 'pre' (Olmo2ForCausalLM: 'output')"),
        (GEMMA2, {"attention_scale": 0.3}, "model.attention_scale = 0.3 (Gemma2ForCausalLM: 0.30"),
        (GEMMA2, {"embedding_scale": 5.0}, "model.embedding_scale = 5.0 (Gemma2ForCausalLM: 5.65"),
        (GEMMA2, {"sliding_window": None}, "model.sliding_window = None (Gemma2ForCausalLM: 64)"),
        (GEMMA2, {"window_pattern": "S"}, "model.window_pattern = 'S' (Gemma2ForCausalLM: 'SL')"),
        (LATENT, {"norms": "sandwich"}, "model.norms = 'sandwich' (DeepseekV3ForCausalLM: 'pre')"),
        (LATENT, {"sliding_window": 5}, "model.sliding_window = 5 (DeepseekV3ForCausalLM: None)"),
        (
            LATENT,
            {"latent": dataclasses.replace(LATENT.latent, norm_eps=1e-5)},
            "model.latent.norm_eps = 1e-05 (DeepseekV3ForCausalLM: 1e-06)",
        ),
        (LLAMA, {"hidden_size": 34}, "hidden_size = 34 is not a multiple of model.num_heads = 4"),
        (VARIANTS["olmo2"], {"hidden_size": 34}, "Olmo2ForCausalLM refuses that"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_shape_that_none_of_theirs_has_is_refused_with_what_the_nearest_has(config, changes, complaint):
    with pytest.raises(ConvertError) as caught:
        hugging_face_config(dataclasses.replace(config, **changes), eos_id=None, dtype="fp32")
    assert complaint in str(caught.value)


def test_weights_of_a_shape_that_none_of_theirs_has_are_refused():
    model = make_model(VARIANTS["senet"])
    with pytest.raises(ConvertError, match="only a model trained with those can be exported"):
        to_hugging_face(model.config, model.state_dict())


@pytest.mark.parametrize(
    "changes",
    [
        {"window_pattern": "SL"},  # without a window
        {"attention_scale": 8**-0.5},
        {"sliding_window": 5, "window_pattern": "LLS"},  # two layers only
        {"latent": LatentConfig(rope_size=6)},
    ],
    ids=str,
)
def test_keys_that_make_no_difference_are_no_reason_to_refuse(changes):
    config = dataclasses.replace(LLAMA, **changes)
    table = hugging_face_config(config, eos_id=None, dtype="fp32")
    assert config_from_hugging_face(table) == LLAMA


@pytest.mark.parametrize("eos_id", [-1, LLAMA.vocab_size])
def test_an_end_token_outside_the_vocabulary_is_refused(eos_id):
    with pytest.raises(ConvertError, match=f"eos_id = {eos_id}"):
        hugging_face_config(LLAMA, eos_id=eos_id, dtype="fp32")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConvertError, match="dtype = 'float8': expected one of fp32, bf16, fp16"):
        hugging_face_config(LLAMA, eos_id=None, dtype="float8")


def their_table(config: ModelConfig = LLAMA, **changes: Any) -> dict[str, Any]:
    table = hugging_face_config(config, eos_id=None, dtype="fp32") | changes
    return {key: value for key, value in table.items() if value != "absent"}


WINDOWED = dataclasses.replace(WITH_BIAS, **UPPER_WINDOWS)


@pytest.mark.parametrize(
    ("config", "changes", "complaint"),
    [
        (LLAMA, {"model_type": "mamba"}, "model_type = 'mamba': can read llama, mistral, qwen2, qwen3, gemma2, olmo2"),
        (LLAMA, {"model_type": "absent"}, "model_type = None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu'"),
        (LLAMA, {"attention_bias": True}, "attention_bias = True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA, {"use_sliding_window": True}, "use_sliding_window = True"),
        (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types[1] = 'sliding_attention'"),
        (LLAMA, {"layer_types": ["full_attention"]}, "expected one for each of 2 layers"),
        (LLAMA, {"layer_types": "full_attention"}, "layer_types = 'full_attention': expected one for each"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = {'type': 'linear', 'factor': 2.0"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_parameters = {'rope_type': 'll"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "only unscaled RoPE"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "only unscaled RoPE"),
        (LLAMA, {"rope_parameters": "default"}, "rope_parameters = 'default': expected a table"),
        (LLAMA, {"rope_theta": 1e6}, "contradictory RoPE bases"),
        (LLAMA, {"vocab_size": "absent"}, "vocab_size is missing"),
        (LLAMA, {"rms_norm_eps": "absent"}, "rms_norm_eps is missing"),
        (LLAMA, {"hidden_size": 32.5}, "hidden_size = 32.5: expected a whole number"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers = True: expected a whole number"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5': expected a number"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads = 0: must be positive"),
        (LLAMA, {"num_key_value_heads": 3}, "num_heads = 4 is not a multiple of model.num_kv_heads = 3"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': expected true or false"),
        (LLAMA, {"model_type": "mistral"}, "sliding_window is missing; write null if the model has none"),
        (LLAMA, {"model_type": "mistral", "sliding_window": "5"}, "sliding_window = '5': expected a whole number"),
        (
            VARIANTS["mistral"],
            {"layer_types": ["full_attention"] * 2},
            "layer_types[0] = 'full_attention': expected sl",
        ),
        (WITH_BIAS, {"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        (WITH_NORM, {"head_dim": "absent"}, "head_dim is missing"),
        (
            WINDOWED,
            {"layer_types": ["chunked_attention"] * 3},
            "'chunked_attention': expected full_attention or sliding",
        ),
        (WINDOWED, {"use_sliding_window": False}, "layer_types[1] = 'sliding_attention': expected full_attention"),
        (WINDOWED, {"sliding_window": None}, "layer 1 has a sliding window, but sliding_window is null"),
        (WINDOWED, {"max_window_layers": "absent"}, "max_window_layers is missing"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu': only 'gelu_pytorch_tanh'"),
        (GEMMA2, {"hidden_act": "silu"}, "hidden_act = 'silu': only 'gelu_pytorch_tanh'"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA2, {"query_pre_attn_scalar": "absent"}, "query_pre_attn_scalar is missing"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0.0: must be positive"),
        (GEMMA2, {"attn_logit_softcapping": "absent"}, "attn_logit_softcapping is missing; write null"),
        (GEMMA2, {"final_logit_softcapping": "absent"}, "final_logit_softcapping is missing; write null"),
        (GEMMA2, {"head_dim": "absent"}, "head_dim is missing"),
        (VARIANTS["olmo2"], {"head_dim": 16}, "head_dim = 16: only 8 is implemented"),
        (LATENT, {"num_key_value_heads": 2}, "num_key_value_heads = 2: only 4 is implemented"),
        (LATENT, {"kv_lora_rank": "absent"}, "kv_lora_rank is missing"),
        (LATENT, {"q_lora_rank": "absent"}, "q_lora_rank is missing; write null"),
        (LATENT, {"qk_rope_head_dim": 5}, "rope_size = 5: must be even"),
        (LATENT, {"first_k_dense_replace": "absent"}, "first_k_dense_replace is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_that_we_do_not_implement_is_refused_with_its_key_and_value(config, changes, complaint):
    with pytest.raises(ConvertError) as caught:
        config_from_hugging_face(their_table(config, **changes))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("layer_types", ["absent", None, ["sliding_attention"] * 2])
def test_layer_types_that_say_the_same_are_read(layer_types):
    mistral = VARIANTS["mistral"]
    assert config_from_hugging_face(their_table(mistral, layer_types=layer_types)) == mistral


def test_layer_types_go_before_the_upper_layers():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = config_from_hugging_face(their_table(WINDOWED, layer_types=kinds))
    assert config == dataclasses.replace(WINDOWED, window_pattern="SL")
    assert config_from_hugging_face(their_table(WINDOWED, layer_types="absent")) == WINDOWED


def test_a_gemma2_config_that_does_not_say_so_is_tied():
    assert config_from_hugging_face(their_table(GEMMA2, tie_word_embeddings="absent")).tie_embeddings


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

"""Adapters are peft's: the same function, gradients and merged weights, and files that both read."""

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.cross_entropy import cross_entropy_sum
from model.config import ModelConfig
from model.convert import read_hugging_face, to_hugging_face, write_hugging_face
from model.hugging_face_keys import ConvertError
from model.lora import inject_lora, is_lora, merged_state
from model.lora_config import LoraConfig
from model.peft_files import read_adapter, write_adapter
from model.transformer import Transformer
from tests.adapters import adapted_model
from tests.hugging_face import InDouble, load_theirs, our_model, their_model
from tests.models import LLAMA, MOE_VARIANTS, VARIANTS, random_tokens

LORA = LoraConfig(rank=3, alpha=5.0, dropout=0.25)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
CASES: dict[str, tuple[ModelConfig, LoraConfig]] = {
    "llama": (LLAMA, LORA),
    "qwen3 interleaved": (VARIANTS["qwen3 interleaved"], LORA),
    "qwen2 interleaved, some targets, rank scaled": (
        VARIANTS["qwen2 interleaved"],
        LoraConfig(rank=2, alpha=0.5, targets=("k_proj", "up_proj"), rank_scaled=True),
    ),
    "latent interleaved": (
        dataclasses.replace(VARIANTS["latent query"], norm_eps=1e-6, rope_interleaved=True),
        dataclasses.replace(LORA, targets=LATENT),
    ),
    "experts": (
        MOE_VARIANTS["qwen3-moe"],
        dataclasses.replace(LORA, targets=("q_proj", "k_proj", "v_proj", "o_proj")),
    ),
}


def written(model: Transformer, lora: LoraConfig, folder: Path) -> tuple[Path, Path]:
    """The exported model and its adapter."""
    state, base, adapter = model.state_dict(), folder / "base", folder / "adapter"
    weights = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    write_hugging_face(base, model.config, weights, eos_id=None, dtype="fp32")
    write_adapter(adapter, model.config, lora, state, str(base))
    return base, adapter


def in_peft(base: Path, adapter: Path) -> Any:
    """What peft makes of the two folders, in fp64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        return peft.PeftModel.from_pretrained(load_theirs(base), str(adapter), is_trainable=True).eval()


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_logits_gradients_and_merged_weights(case, tmp_path):
    config, lora = CASES[case]
    ours = adapted_model(config, lora)
    theirs = in_peft(*written(ours, lora, tmp_path))
    ours.double().eval()
    tokens = random_tokens(config, 2, 24)
    our_logits = ours(tokens)
    with InDouble():
        their_logits = theirs(input_ids=tokens).logits
    assert largest_error({"": our_logits.detach()}, {"": their_logits.detach()}) < 1e-12
    cross_entropy_sum(our_logits, tokens.roll(-1, dims=1)).backward()
    cross_entropy_sum(their_logits, tokens.roll(-1, dims=1)).backward()

    # Their gradients, written as if they were weights, come back under our names and in our order of rows.
    weights = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            weights[name], parameter.data = parameter.data, parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    read, expected = read_adapter(tmp_path / "gradients", config)
    assert dataclasses.replace(read, targets=lora.targets) == lora
    assert set(read.targets) == set(lora.targets)
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert largest_error(gradients, expected) < 1e-12

    for name, weight in weights.items():
        theirs.get_parameter(name).data = weight
    merged = theirs.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    their_config, state = read_hugging_face(tmp_path / "merged")
    our_merged = to_hugging_face(config, merged_state(ours.state_dict(), config, lora))
    assert largest_error(our_merged, to_hugging_face(their_config, state)) < 1e-15


@pytest.mark.parametrize(
    "targets", [["q_proj", "up_proj", "o_proj"], r".*\.(v_proj|down_proj)"], ids=["list", "pattern"]
)
def test_an_adapter_of_theirs_becomes_ours_and_is_written_again_bit_for_bit(targets, tmp_path):
    theirs = their_model("Llama", torch.float64)
    theirs.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        settings = peft.LoraConfig(r=4, lora_alpha=9, lora_dropout=0.1, init_lora_weights=False, target_modules=targets)
        adapted = peft.get_peft_model(theirs, settings, autocast_adapter_dtype=False)
    adapted.save_pretrained(tmp_path / "adapter")
    config, weights = read_hugging_face(tmp_path / "base")
    lora, state = read_adapter(tmp_path / "adapter", config)
    ours = our_model(config, weights)
    inject_lora(ours, lora)
    assert not ours.load_state_dict(state, strict=False).unexpected_keys
    tokens = random_tokens(config, 2, 20)
    with InDouble():
        their_logits = adapted.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours.eval()(tokens), their_logits, rtol=1e-12, atol=1e-12)
    write_adapter(tmp_path / "again", config, lora, state, "base")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert same(*files)


@given(
    variant=st.sampled_from(["llama", "qwen2 interleaved", "gemma2", "olmo2"]),
    targets=st.sets(st.sampled_from(LORA.targets), min_size=1).map(sorted),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_written_is_read_bit_for_bit(tmp_path_factory, variant, targets, rank, dtype):
    lora = dataclasses.replace(LORA, rank=rank, targets=tuple(targets), rank_scaled=rank > 3)
    model = adapted_model(VARIANTS[variant], lora, dtype)
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, model.config, lora, model.state_dict(), "base")
    read, state = read_adapter(folder, model.config)
    assert dataclasses.replace(read, targets=lora.targets) == lora
    assert set(read.targets) == set(lora.targets)
    assert same(state, {name: tensor for name, tensor in model.state_dict().items() if is_lora(name)})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path, LLAMA, LORA, adapted_model(LLAMA, LORA).state_dict(), "base")
    return tmp_path


def refused(folder: Path, message: str, config: ModelConfig = LLAMA) -> None:
    with pytest.raises(ConvertError, match=message) as caught:
        read_adapter(folder, config)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"bias": "all"}, "bias = 'all'.*merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*merge_and_unload"),
        ({"use_dora": True}, "use_dora = True: not implemented"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"an_option_of_later": [1]}, "an_option_of_later"),
        ({"r": None}, "r = None: expected a number"),
        ({"r": 4}, "lora_A.weight is \\(3, 32\\), the model asks for \\(4, 32\\)"),
        ({"r": 0}, "the model asks for no such tensor"),
        ({"lora_alpha": "8"}, "lora_alpha = '8'"),
        ({"lora_alpha": -8}, "alpha = -8"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(adapter, settings, message):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    refused(adapter, message)


def test_adapters_of_what_cannot_be_exported_are_not_written(tmp_path):
    config = dataclasses.replace(LLAMA, head="score")
    with pytest.raises(ConvertError, match="head"):
        write_adapter(tmp_path, config, LORA, adapted_model(config, LORA).state_dict(), "base")
    assert not list(tmp_path.iterdir())


def test_the_adapter_of_another_model_is_refused(adapter):
    # Narrower keys and values in each of two layers.
    refused(adapter, r"the model asks for \(8, 3\) \(4 tensors differ\)", VARIANTS["llama one kv head"])


def test_missing_and_foreign_tensors_are_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    refused(adapter, re.escape(f"{name} is missing, the model asks for (48, 3)"))
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, file)
    refused(adapter, "lm_head")


def test_damaged_and_absent_files_are_refused(adapter):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(adapter, "adapter_model.safetensors: damaged or incomplete")
    weights.rename(adapter / "adapter_model.bin")
    refused(adapter, "there is a pickle")
    config.write_text("{")
    refused(adapter, "adapter_config.json: not JSON")
    config.write_text("[]")
    refused(adapter, "expected a JSON object, found list")
    config.unlink()
    refused(adapter, "adapter_config.json: cannot be read")

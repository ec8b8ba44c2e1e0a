"""The architectures of Hugging Face's that we read and write: what each has in its config.json beside the keys that all
have, to and from the keys of our config. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from model import hugging_face_mixtures as mixtures
from model.config import LatentConfig, ModelConfig
from model.hugging_face_keys import (
    ConvertError,
    Table,
    flag,
    layer_types,
    number,
    number_or_null,
    refuse_other_values,
    windows,
)

_DEEPSEEK_LATENT_EPS = 1e-6
"""Added to the mean square in DeepSeek-V3's norms of latent vectors, whatever its config says of the other norms."""


_TOKENS, SCORES = "ForCausalLM", "ForSequenceClassification"
"""What the names of classes end in, by the head."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one architecture's table is read and written, beside the keys that all have."""

    class_name: str
    read: Callable[[Table], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    only: Mapping[str, Any] = field(default_factory=dict)
    """Keys with the one value that our model computes; an absent key means that value on their side too."""
    has_even_heads: bool = False
    """Whether its class refuses a hidden size that is not a multiple of the number of heads."""
    scores: bool = True
    """Whether there is a class for reward models as well."""

    def class_for(self, config: ModelConfig) -> str:
        """The class of a model with this head, or of the nearest."""
        return self.class_name.replace(_TOKENS, SCORES) if config.head == "score" and self.scores else self.class_name


def letters_of(config: ModelConfig) -> str:
    """Which layers have a sliding window: a letter for each, as in window_pattern."""
    return "".join("L" if config.window(layer) is None else "S" for layer in range(config.num_layers))


def usual_attention_scale(config: ModelConfig) -> float:
    """What scores are multiplied by where the config does not say."""
    return (config.head_size + (config.latent.rope_size if config.is_latent else 0)) ** -0.5


def _heads(table: Table, *, num_kv_heads: int | None = None, head_size: int | None = None) -> dict[str, Any]:
    return {
        "num_kv_heads": number(table, "num_key_value_heads", int, num_kv_heads),
        "head_size": number(table, "head_dim", int, head_size),
    }


def _evenly(table: Table) -> int:
    """The width of a head where the heads share out the residual stream's."""
    return number(table, "hidden_size", int) // number(table, "num_attention_heads", int)


def _no_windows(table: Table) -> dict[str, Any]:
    return windows(table, None, "L" * number(table, "num_hidden_layers", int), may_vary=False)


def _read_llama(table: Table) -> dict[str, Any]:
    # Llama's first configs have neither key; Qwen's class defaults (32 heads, width 128) would be a guess here.
    num_heads = number(table, "num_attention_heads", int)
    return _heads(table, num_kv_heads=num_heads, head_size=_evenly(table)) | _no_windows(table)


def _write_llama(_config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _read_mistral(table: Table) -> dict[str, Any]:
    window = number_or_null(table, "sliding_window", int)
    letters = ("L" if window is None else "S") * number(table, "num_hidden_layers", int)
    return _heads(table, head_size=_evenly(table)) | windows(table, window, letters, may_vary=False)


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


def _read_qwen(table: Table) -> dict[str, Any]:
    is_qwen2 = table["model_type"] == "qwen2"
    keys: dict[str, Any] = {"qkv_bias": True} if is_qwen2 else {"qk_norm": "head"}
    keys |= _heads(table, head_size=_evenly(table) if is_qwen2 else None)
    if not flag(table, "use_sliding_window", default=False):
        return keys | _no_windows(table)
    num_layers = number(table, "num_hidden_layers", int)
    num_full = min(number(table, "max_window_layers", int), num_layers)
    letters = "L" * num_full + "S" * (num_layers - num_full)
    return keys | windows(table, number_or_null(table, "sliding_window", int), letters, may_vary=True)


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {"attention_bias": False} if config.qk_norm == "head" else {}
    letters = letters_of(config)
    if "S" not in letters:
        return keys | {"use_sliding_window": False, "sliding_window": None}
    num_full = letters.index("S")
    return keys | {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": num_full,
        # Only what max_window_layers says too: older versions of transformers do not read this key.
        "layer_types": layer_types("L" * num_full + "S" * (len(letters) - num_full)),
    }


def _read_gemma2(table: Table) -> dict[str, Any]:
    num_layers = number(table, "num_hidden_layers", int)
    scalar = number(table, "query_pre_attn_scalar", float)
    if scalar <= 0:
        raise ConvertError(f"config.json: query_pre_attn_scalar = {scalar}: must be positive")
    window = number_or_null(table, "sliding_window", int)
    return {
        **_heads(table),
        "ffn": "geglu",
        "norms": "sandwich",
        "norm_offset": True,
        "embedding_scale": math.sqrt(number(table, "hidden_size", int)),
        "attention_scale": None if scalar == table["head_dim"] else scalar**-0.5,
        "attention_softcap": number_or_null(table, "attn_logit_softcapping", float),
        "logit_softcap": number_or_null(table, "final_logit_softcapping", float),
        **windows(table, window, ("SL" * num_layers)[:num_layers], may_vary=True),
    }


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    scale = config.attention_scale or usual_attention_scale(config)
    return {
        **_GELU,
        "attention_bias": False,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window or config.context_length,
        # Older versions of transformers do not read this key: theirs alternate in any case.
        "layer_types": layer_types(("SL" * config.num_layers)[: config.num_layers]),
    }


def _read_olmo(table: Table) -> dict[str, Any]:
    # Their norms of whole queries are as wide as the residual stream.
    refuse_other_values(table, {"head_dim": _evenly(table)})
    num_heads = number(table, "num_attention_heads", int)
    keys = {"qk_norm": "full"} | _heads(table, num_kv_heads=num_heads, head_size=_evenly(table)) | _no_windows(table)
    if table["model_type"] == "olmo2":
        return keys | {"norms": "output"}
    return keys | {"moe": mixtures.read_olmoe(table)}


def _write_olmo(config: ModelConfig) -> dict[str, Any]:
    keys = {"attention_bias": False, "head_dim": config.hidden_size // config.num_heads}
    return keys | mixtures.write_olmoe(config) if config.expert_layers else keys


def _read_mixtral(table: Table) -> dict[str, Any]:
    # An absent window is none, unlike Mistral's.
    return _read_mistral({"sliding_window": None, **table}) | {"moe": mixtures.read_mixtral(table)}


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return _write_mistral(config) | mixtures.write_mixtral(config)


def _read_qwen2_moe(table: Table) -> dict[str, Any]:
    keys = _heads(table, head_size=_evenly(table)) | _no_windows(table)
    return keys | {"qkv_bias": flag(table, "qkv_bias", default=True), "moe": mixtures.read_qwen(table)}


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    if not config.moe.shared_size:
        raise ConvertError(
            "model.moe.shared_size = 0: Qwen2-MoE, their only mixture with model.qkv_bias, has a shared network; only "
            "a model with one, or without these biases, can be exported"
        )
    shared = {"qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": config.moe.shared_size}
    return _NO_WINDOW | shared | mixtures.write_qwen(config)


def _read_qwen3_moe(table: Table) -> dict[str, Any]:
    keys = _heads(table, head_size=_evenly(table)) | _no_windows(table)
    return keys | {"qk_norm": "head", "moe": mixtures.read_qwen(table)}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False} | _NO_WINDOW | mixtures.write_qwen(config)


def _read_deepseek_v3(table: Table) -> dict[str, Any]:
    num_heads = number(table, "num_attention_heads", int)
    refuse_other_values(table, {"num_key_value_heads": num_heads})
    latent = LatentConfig(
        kv_rank=number(table, "kv_lora_rank", int),
        query_rank=number_or_null(table, "q_lora_rank", int) or 0,
        rope_size=number(table, "qk_rope_head_dim", int),
        value_size=number(table, "v_head_dim", int),
        norm_eps=_DEEPSEEK_LATENT_EPS,
    )
    keys: dict[str, Any] = {"num_kv_heads": num_heads, "head_size": number(table, "qk_nope_head_dim", int)}
    return keys | {"latent": latent, "moe": mixtures.read_deepseek(table)} | _no_windows(table)


def _write_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    latent = config.latent
    return {
        "attention_bias": False,
        "head_dim": latent.rope_size,
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": config.head_size,
        "qk_rope_head_dim": latent.rope_size,
        "v_head_dim": latent.value_size,
        # Rotary pairs as neighbours, which most readers of DeepSeek-V3 take for granted.
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        **mixtures.write_deepseek(config),
    }


_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_DEEPSEEK = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM", _read_llama, _write_llama, {"use_sliding_window": False}, has_even_heads=True
    ),
    "mistral": Architecture("MistralForCausalLM", _read_mistral, _write_mistral),
    "qwen2": Architecture("Qwen2ForCausalLM", _read_qwen, _write_qwen),
    "qwen3": Architecture("Qwen3ForCausalLM", _read_qwen, _write_qwen),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        _read_gemma2,
        _write_gemma2,
        {**_GELU, "use_bidirectional_attention": False},
        has_even_heads=True,
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", _read_olmo, _write_olmo, has_even_heads=True),
    "mixtral": Architecture("MixtralForCausalLM", _read_mixtral, _write_mixtral, {"router_jitter_noise": 0.0}),
    # Versions of transformers disagree about which of its layers have windows.
    "qwen2_moe": Architecture("Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe, {"use_sliding_window": False}),
    "qwen3_moe": Architecture("Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, {"use_sliding_window": False}),
    "olmoe": Architecture(
        "OlmoeForCausalLM", _read_olmo, _write_olmo, {"clip_qkv": None}, has_even_heads=True, scores=False
    ),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", _read_deepseek_v3, _write_deepseek_v3, _DEEPSEEK),
}

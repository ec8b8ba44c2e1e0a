"""The config.json of Hugging Face's decoders, to and from our config. Imports no torch.

Each of ARCHITECTURES reads its table and writes it. What a table cannot say, none of theirs computes: before a model is
exported its table is read again, and a model that would come back as another one is refused, whatever the key.
"""

import dataclasses
import math
from typing import Any

from model.config import TRAINING_KEYS, LatentConfig, ModelConfig, ModelConfigError
from model.hugging_face_architectures import ARCHITECTURES, SCORES, letters_of, usual_attention_scale
from model.hugging_face_keys import (
    ConvertError,
    Table,
    flag,
    number,
    refuse_other_values,
    rope_base,
    shortest_period,
)
from model.hugging_face_mixtures import placement
from model.moe_config import MoEConfig

OWN_TYPE, OWN_MODULE = "bessemer", "modeling_bessemer"
"""The model_type of a model that no class of theirs computes, and the file beside it that does."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""What weights can be exported in, by the names that the command line uses; torch's names."""

# Of all architectures; absence means that value on their side too.
_ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,  # theirs would also put one on the output projection
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def hugging_face_config(
    config: ModelConfig, *, eos_id: int | None, dtype: str, pad_id: int | None = None
) -> dict[str, Any]:
    """The config.json of a model of ours, for transformers 4 and 5 alike.

    A reward model needs the pad_id to find the last token of each row; another model has none there, as it would keep a
    row of the embedding from learning.

    Raises:
        ConvertError: no architecture of theirs has this shape, an eos_id outside the vocabulary, unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConvertError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    if eos_id is not None and not 0 <= eos_id < config.vocab_size:
        raise ConvertError(f"eos_id = {eos_id}: outside the model's vocabulary of {config.vocab_size}")
    refuse_what_is_foreign_to_them(config)
    ids = {"eos_token_id": eos_id, "pad_token_id": pad_id if config.head == "score" else None}
    # transformers 4 reads torch_dtype, transformers 5 dtype.
    return _table(config) | ids | {"torch_dtype": DTYPES[dtype], "dtype": DTYPES[dtype]}


def config_from_hugging_face(table: Table) -> ModelConfig:
    """The shape that a config.json describes. The initialisation scheme is not in it.

    Raises:
        ConvertError: a feature that we do not implement, with its key and value; a missing or malformed key.
    """
    model_type = table.get("model_type")
    if model_type == OWN_TYPE:
        return _from_own_table(table)
    if model_type not in ARCHITECTURES:
        raise ConvertError(f"config.json: model_type = {model_type!r}: can read {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    refuse_other_values(table, {**_ONLY_VALUES, **architecture.only})
    keys: dict[str, Any] = {
        "vocab_size": number(table, "vocab_size", int),
        "hidden_size": number(table, "hidden_size", int),
        "num_layers": number(table, "num_hidden_layers", int),
        "num_heads": number(table, "num_attention_heads", int),
        "ffn_size": number(table, "intermediate_size", int),
        "context_length": number(table, "max_position_embeddings", int),
        "rope_base": rope_base(table),
        "norm_eps": number(table, "rms_norm_eps", float),
        "tie_embeddings": flag(table, "tie_word_embeddings", default=model_type == "gemma2"),
        "init_std": number(table, "initializer_range", float, ModelConfig().init_std),
    }
    if keys["num_heads"] < 1:
        raise ConvertError(f"config.json: num_attention_heads = {keys['num_heads']}: must be positive")
    if _is_scoring(table):
        keys |= {"head": "score", "tie_embeddings": False}
    try:
        return ModelConfig(**(keys | architecture.read(table)))
    except ModelConfigError as error:
        raise ConvertError(f"config.json: {error}") from error


def hugging_face_type(config: ModelConfig) -> str:
    """The model_type of theirs that is nearest to a config."""
    if config.is_latent:
        return "deepseek_v3"
    if config.expert_layers:
        if config.qkv_bias or config.moe.shared_size:
            return "qwen2_moe"
        return {"none": "mixtral", "head": "qwen3_moe", "full": "olmoe"}[config.qk_norm]
    if config.norms == "sandwich" or config.ffn == "geglu":
        return "gemma2"
    if config.norms == "output" or config.qk_norm == "full":
        return "olmo2"
    if config.qk_norm == "head":
        return "qwen3"
    return "qwen2" if config.qkv_bias else "mistral" if "S" in letters_of(config) else "llama"


def is_known_to_them(config: ModelConfig) -> bool:
    """Whether an architecture of theirs computes what a config says."""
    try:
        refuse_what_is_foreign_to_them(config)
    except ConvertError:
        return False
    return True


def refuse_what_is_foreign_to_them(config: ModelConfig) -> None:
    """Refuses a config that no architecture of theirs computes, with every key in which the nearest differs.

    Raises:
        ConvertError: see above.
    """
    architecture = ARCHITECTURES[hugging_face_type(config)]
    if architecture.has_even_heads and config.hidden_size % config.num_heads:
        raise ConvertError(
            f"model.hidden_size = {config.hidden_size} is not a multiple of model.num_heads = {config.num_heads}: "
            f"Hugging Face's {architecture.class_name} refuses that, whatever the head size"
        )
    ours, theirs = _computed(config), _computed(config_from_hugging_face(_table(config)))
    differing = [
        f"model.{key} = {value!r} ({architecture.class_name}: {theirs[key]!r})"
        for key, value in ours.items()
        if not _is_same(value, theirs[key])
    ]
    if differing:
        raise ConvertError(
            f"{', '.join(differing)}: no architecture of Hugging Face's that we write has this; the nearest has the "
            "values in brackets, and only a model trained with those can be exported"
        )


def own_config(config: ModelConfig, *, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of a model that OWN_MODULE computes; what others look for has their names, too."""
    return {
        "architectures": ["BessemerForCausalLM"],
        "model_type": OWN_TYPE,
        "auto_map": {
            "AutoConfig": f"{OWN_MODULE}.BessemerConfig",
            "AutoModelForCausalLM": f"{OWN_MODULE}.BessemerForCausalLM",
        },
        "shape": dataclasses.asdict(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": False,
        "eos_token_id": eos_id,
        "torch_dtype": DTYPES[dtype],
        "dtype": DTYPES[dtype],
    }


def _from_own_table(table: Table) -> ModelConfig:
    try:
        shape = table["shape"]
        parts = {"latent": LatentConfig(**shape["latent"]), "moe": MoEConfig(**shape["moe"])}
        return ModelConfig(**(shape | parts))
    except (KeyError, TypeError, ModelConfigError) as error:
        raise ConvertError(f"config.json: shape is not a model of ours: {error}") from error


def _is_scoring(table: Table) -> bool:
    """Whether the config is of a reward model, which has a single label."""
    names = table.get("architectures") or []
    if not isinstance(names, list) or not any(str(name).endswith(SCORES) for name in names):
        return False
    # Two labels are their default, and not written.
    num_labels = table.get("num_labels") or len(table.get("id2label") or "01")
    if num_labels != 1:
        raise ConvertError(f"config.json: {num_labels} labels: only a reward model, which has one, is implemented")
    return True


def _table(config: ModelConfig) -> dict[str, Any]:
    model_type = hugging_face_type(config)
    architecture = ARCHITECTURES[model_type]
    return {
        "architectures": [architecture.class_for(config)],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        # transformers 4 reads rope_theta, transformers 5 rope_parameters.
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        # Written also where there is none: Llama's own defaults are ids 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        "attention_dropout": 0.0,
        **({"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.head == "score" else {}),
    } | architecture.write(config)


def _computed(config: ModelConfig) -> dict[str, Any]:
    """The keys that decide what a model computes, each brought to one of the values that mean the same."""
    letters = letters_of(config)
    moe = _computed_mixture(config)
    scale, usual_scale = config.attention_scale, usual_attention_scale(config)
    same = dataclasses.replace(
        config,
        ffn_size=1 if len(config.expert_layers) == config.num_layers else config.ffn_size,
        rope_interleaved=False,  # rows are permuted
        attention_scale=None if scale is not None and _is_same(scale, usual_scale) else scale,
        sliding_window=config.sliding_window if "S" in letters else None,
        window_pattern=shortest_period(letters) if "S" in letters else "S",
        latent=config.latent if config.is_latent else LatentConfig(),
        moe=moe,
    )
    return {key: value for key, value in _flat(same).items() if key not in TRAINING_KEYS}


def _computed_mixture(config: ModelConfig) -> MoEConfig:
    moe = config.moe
    if not config.expert_layers:
        return MoEConfig()
    # A bias of zeros is as good as none. How it moves is a matter of training.
    has_bias = moe.bias != "none" or config.is_latent
    changes: dict[str, Any] = {"bias": "sign" if has_bias else "none"}
    if moe.num_groups == 1:
        changes["group_score"] = "top2"
    if moe.kind == "picked":
        changes |= {"chunk_size": MoEConfig().chunk_size, "num_slots": MoEConfig().num_slots}
    changes |= placement(list(config.expert_layers), config.num_layers)
    return dataclasses.replace(moe, **changes)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        is_section = dataclasses.is_dataclass(value)
        values |= _flat(value, f"{prefix}{item.name}.") if is_section else {f"{prefix}{item.name}": value}
    return values


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return one == other

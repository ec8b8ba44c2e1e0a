"""Names and layouts to and from Hugging Face: Llama, Qwen2 (biases on q, k, v), Qwen3 (norms on q and k).

We pack the matrices that read the same input, stacked along their output rows: attention.qkv = [q; k; v] and
mlp.gate_up = [gate; up]. Rotary pairs lie in the two halves of a head on their side; where ours are neighbours
(model.rope_interleaved), rows of q and k are permuted. Both directions are exact. Files are safetensors; pickles are
never opened.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, ModelConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights can be exported in, by the names that the command line uses."""

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Keys of config.json with the one value that our model computes; an absent key means that value on their side too.
_ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,  # theirs would also put one on the output projection
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}

_Number = TypeVar("_Number", int, float)


class ConvertError(ValueError):
    """A Hugging Face model that we cannot read, or a state that we cannot write as one; the message says why."""


@dataclass(frozen=True, slots=True)
class _Stack:
    """One tensor of ours, and those of theirs that make it up when stacked along the first axis."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    row_shape: tuple[int, ...] = ()
    interleaved_head: int | None = None
    """Rows of a head, where those of q and k lie in pairs on our side and in halves on theirs."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.rows), *self.row_shape)

    def to_theirs(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, part in zip(self.theirs, ours.split(self.rows), strict=True):
            yield name, self._reordered(name, part, (-1, 2))

    def from_theirs(self, theirs: Mapping[str, Tensor]) -> Tensor:
        parts = [self._reordered(name, theirs[name], (2, -1)) for name in self.theirs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _reordered(self, name: str, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Each head's rows, written into a grid row by row and read column by column; those of v as they are."""
        if self.interleaved_head is None or ".v_proj." in name:
            return rows
        heads = rows.unflatten(0, (-1, self.interleaved_head)).unflatten(1, grid)
        return heads.transpose(1, 2).flatten(0, 2)


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and splits our state dict; the results may be views, a tied head is left out.

    Raises:
        ConvertError: missing, unexpected or mis-shaped tensors, or a tied head that differs from the embedding.
    """
    state = _without_tied_head(config, state, head="head.weight", embedding="embedding.weight")
    stacks = list(_layout(config))
    _check_tensors({stack.ours: stack.shape for stack in stacks}, state)
    return dict(pair for stack in stacks for pair in stack.to_theirs(state[stack.ours]))


def from_hugging_face(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and packs their tensors into a state dict that `Transformer.load_state_dict` takes strictly.

    Raises:
        ConvertError: missing, unexpected or mis-shaped tensors, or a tied head that differs from the embedding.
    """
    # Llama checkpoints of 2023 carry RoPE's frequencies, which follow from the config.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    tensors = _without_tied_head(config, tensors, head="lm_head.weight", embedding="model.embed_tokens.weight")
    stacks = list(_layout(config))
    expected = {
        name: (rows, *stack.row_shape)
        for stack in stacks
        for name, rows in zip(stack.theirs, stack.rows, strict=True)
    }  # fmt: skip
    _check_tensors(expected, tensors)
    state = {stack.ours: stack.from_theirs(tensors) for stack in stacks}
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    return state


def hugging_face_config(config: ModelConfig, *, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of a model of ours, for transformers 4 and 5 alike.

    Raises:
        ConvertError: no architecture of theirs has this shape, an eos_id outside the vocabulary, unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConvertError(f"dtype = {dtype!r}: expected one of {', '.join(DTYPES)}")
    if eos_id is not None and not 0 <= eos_id < config.vocab_size:
        raise ConvertError(f"eos_id = {eos_id}: outside the model's vocabulary of {config.vocab_size}")
    model_type = _model_type(config)
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    return {
        "architectures": [_ARCHITECTURES[model_type]],
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
        # transformers 4 reads rope_theta and torch_dtype, transformers 5 rope_parameters and dtype.
        "rope_theta": config.rope_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        # Written also where there is none: Llama's own defaults are ids 1 and 2.
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if model_type == "llama" else {"use_sliding_window": False, "sliding_window": None}),
        **({} if model_type == "qwen2" else {"attention_bias": False}),
    }


def config_from_hugging_face(table: Mapping[str, Any]) -> ModelConfig:
    """The shape that a config.json describes. The initialisation scheme is not in it.

    Raises:
        ConvertError: a feature that we do not implement, with its key and value; a missing or malformed key.
    """
    model_type = table.get("model_type")
    if model_type not in _ARCHITECTURES:
        raise ConvertError(f"config.json: model_type = {model_type!r}: can read {', '.join(_ARCHITECTURES)}")
    _refuse_foreign_features(table)
    hidden_size = _number(table, "hidden_size", int)
    num_heads = _number(table, "num_attention_heads", int)
    if num_heads < 1:
        raise ConvertError(f"config.json: num_attention_heads = {num_heads}: must be positive")
    # Llama's first configs have neither key; Qwen's class defaults (32 heads, width 128) would be a guess here.
    num_kv_heads_default = num_heads if model_type == "llama" else None
    head_size_default = None if model_type == "qwen3" else hidden_size // num_heads
    try:
        return ModelConfig(
            vocab_size=_number(table, "vocab_size", int),
            hidden_size=hidden_size,
            num_layers=_number(table, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=_number(table, "num_key_value_heads", int, num_kv_heads_default),
            head_size=_number(table, "head_dim", int, head_size_default),
            ffn_size=_number(table, "intermediate_size", int),
            context_length=_number(table, "max_position_embeddings", int),
            rope_base=_rope_base(table),
            norm_eps=_number(table, "rms_norm_eps", float),
            tie_embeddings=bool(table.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
            init_std=_number(table, "initializer_range", float, ModelConfig().init_std),
        )
    except ModelConfigError as error:
        raise ConvertError(f"config.json: {error}") from error


def read_hugging_face(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Reads config.json and model.safetensors, whole or sharded, into our shape and state dict, in the stored dtype.

    Raises:
        ConvertError: files are missing or damaged, or see `config_from_hugging_face` and `from_hugging_face`.
    """
    try:
        config = config_from_hugging_face(_read_json(folder / "config.json"))
        return config, from_hugging_face(config, _read_tensors(folder))
    except ConvertError as error:
        raise ConvertError(f"{folder}: {error}") from error


def write_hugging_face(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], *, eos_id: int | None, dtype: str
) -> None:
    """Writes config.json, generation_config.json and model.safetensors into a folder, which is made if need be.

    Raises:
        ConvertError: see `hugging_face_config` and `to_hugging_face`.
    """
    table = hugging_face_config(config, eos_id=eos_id, dtype=dtype)
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in to_hugging_face(config, state).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", table)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos_id})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _layout(config: ModelConfig) -> Iterator[_Stack]:
    """Every tensor of the model, a tied head left out."""
    width = (config.hidden_size,)
    yield _Stack("embedding.weight", ("model.embed_tokens.weight",), (config.vocab_size,), width)
    for layer in range(config.num_layers):
        yield from _block_layout(config, f"blocks.{layer}", f"model.layers.{layer}")
    yield _Stack("norm.weight", ("model.norm.weight",), width)
    if not config.tie_embeddings:
        yield _Stack("head.weight", ("lm_head.weight",), (config.vocab_size,), width)


def _block_layout(config: ModelConfig, ours: str, theirs: str) -> Iterator[_Stack]:
    width = (config.hidden_size,)
    qkv_rows = (config.query_size, config.kv_size, config.kv_size)
    interleaved_head = config.head_size if config.rope_interleaved else None
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        names = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield _Stack(
            f"{ours}.attention.qkv.{kind}", names, qkv_rows, width if kind == "weight" else (), interleaved_head
        )
    if config.qk_norm:
        for part in "qk":
            name = f"{theirs}.self_attn.{part}_norm.weight"
            size = (config.head_size,)
            yield _Stack(f"{ours}.attention.{part}_norm.weight", (name,), size, interleaved_head=interleaved_head)
    yield _Stack(f"{ours}.attention.out.weight", (f"{theirs}.self_attn.o_proj.weight",), width, (config.query_size,))
    gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
    yield _Stack(f"{ours}.mlp.gate_up.weight", gate_up, (config.ffn_size, config.ffn_size), width)
    yield _Stack(f"{ours}.mlp.down.weight", (f"{theirs}.mlp.down_proj.weight",), width, (config.ffn_size,))
    yield _Stack(f"{ours}.attention_norm.weight", (f"{theirs}.input_layernorm.weight",), width)
    yield _Stack(f"{ours}.mlp_norm.weight", (f"{theirs}.post_attention_layernorm.weight",), width)


def _without_tied_head(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, head: str, embedding: str
) -> Mapping[str, Tensor]:
    if not config.tie_embeddings or head not in tensors or embedding not in tensors:
        return tensors
    if tensors[head] is not tensors[embedding] and not torch.equal(tensors[head], tensors[embedding]):
        raise ConvertError(
            f"{head} differs from {embedding}, but the config ties them; set tie_word_embeddings (model.tie_embeddings "
            "here) to false if the model was trained with a head of its own"
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}


def _check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    complaints = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected],
        "wrong shape": [
            f"{name} {tuple(found[name].shape)}, expected {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != shape
        ],
        "not floating point": [
            f"{name} {tensor.dtype}" for name, tensor in found.items() if not tensor.dtype.is_floating_point
        ],
    }
    if any(complaints.values()):
        raise ConvertError("; ".join(f"{kind}: {_some(names)}" for kind, names in complaints.items() if names))


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _model_type(config: ModelConfig) -> str:
    if config.qkv_bias and config.qk_norm:
        raise ConvertError(
            "model.qkv_bias and model.qk_norm are both set: of Hugging Face's dense models Qwen2 has the one and Qwen3 "
            "the other, none has both"
        )
    model_type = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if model_type == "llama" and config.hidden_size % config.num_heads:
        raise ConvertError(
            f"model.hidden_size = {config.hidden_size} is not a multiple of model.num_heads = {config.num_heads}: "
            "Hugging Face's Llama refuses that, whatever the head size"
        )
    return model_type


def _refuse_foreign_features(table: Mapping[str, Any]) -> None:
    for key, only in _ONLY_VALUES.items():
        if table.get(key) is not None and table[key] != only:
            raise ConvertError(f"config.json: {key} = {table[key]!r}: only {only!r} is implemented")
    for index, kind in enumerate(table.get("layer_types") or ()):
        if kind != "full_attention":
            raise ConvertError(f"config.json: layer_types[{index}] = {kind!r}: only 'full_attention' is implemented")


def _rope_base(table: Mapping[str, Any]) -> float:
    """The base of the rotary angles from wherever transformers 4 or 5 keep it; refuses every kind of scaling."""
    bases = {"rope_theta": table["rope_theta"]} if "rope_theta" in table else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = table.get(key) or {}
        if not isinstance(parameters, dict):
            raise ConvertError(f"config.json: {key} = {parameters!r}: expected a table")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        foreign = parameters.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or foreign or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConvertError(f"config.json: {key} = {parameters!r}: only unscaled RoPE of one base is implemented")
        if "rope_theta" in parameters:
            bases[f"{key}.rope_theta"] = parameters["rope_theta"]
    if len(set(bases.values())) > 1:
        raise ConvertError(f"config.json: contradictory RoPE bases {bases}; keep one")
    return _number({"rope_theta": next(iter(bases.values()), None)}, "rope_theta", float, 10_000.0)


def _number(table: Mapping[str, Any], key: str, kind: type[_Number], default: _Number | None = None) -> _Number:
    value = table.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConvertError(f"config.json: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise ConvertError(f"config.json: {key} = {value!r}: expected {'a whole' if kind is int else 'a'} number")
    return kind(value)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return _read_safetensors(whole)
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        hint = f"; it has {pickled[0]}, a pickle: save it again with safe_serialization=True" if pickled else ""
        raise ConvertError(f"neither {whole.name} nor {index.name} is there{hint}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConvertError(f"{index.name}: weight_map is not a table of file names")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ConvertError(f"{index.name}: {name!r} is not a file of this folder")
        if not (folder / name).is_file():
            raise ConvertError(f"{index.name} names {name}, which is not there; fetch the missing shard")
        tensors |= _read_safetensors(folder / name)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise ConvertError(f"{index.name} names tensors that its files lack: {_some(absent)}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{path.name}: damaged or incomplete ({error}); fetch it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{path.name}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConvertError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConvertError(f"{path.name}: expected a JSON object, found {type(table).__name__}")
    return table


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")

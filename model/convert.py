"""Models in Hugging Face's form, to and from ours: tensors, config and files.

Read and written are Llama, Mistral, Qwen2, Qwen3, Gemma2, OLMo2, Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V3,
with one tensor per expert, as the files of transformers 4 and 5 have them. What none of these computes is written
under our own names, for a modelling file of our own. Rotary pairs lie in the two halves of a head
on their side, in DeepSeek-V3 as neighbours; where ours lie otherwise (model.rope_interleaved), rows are permuted. Both
directions are exact. Files are safetensors; pickles are never opened.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.hugging_face_configs import (
    DTYPES,
    OWN_TYPE,
    config_from_hugging_face,
    hugging_face_config,
    own_config,
    refuse_what_is_foreign_to_them,
)
from model.hugging_face_keys import ConvertError, flag, number
from model.hugging_face_layouts import is_router_bias, layout, router_biases

_FILE_BYTES = 2 * 2**30
"""Largest file of weights, if no single tensor is larger: writing holds a file's tensors twice."""


def to_hugging_face(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames and splits our state dict; the results may be views, a tied head and our record of loads are left out.

    Raises:
        ConvertError: no architecture of theirs computes what the model does; missing, unexpected or mis-shaped tensors;
            or a tied head that differs from the embedding.
    """
    refuse_what_is_foreign_to_them(config)
    ours = _checked_state(config, state)
    return dict(pair for stack in layout(config) for pair in stack.to_theirs(ours[stack.ours]))


def from_hugging_face(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, latent_pairs: bool = True
) -> dict[str, Tensor]:
    """Renames and packs their tensors into a state dict that `Transformer.load_state_dict` takes strictly.

    `latent_pairs` is what DeepSeek's config calls rope_interleave.

    Raises:
        ConvertError: missing, unexpected or mis-shaped tensors, or a tied head that differs from the embedding.
    """
    return _packed(config, dict(tensors), latent_pairs)


def read_hugging_face(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Reads config.json and model.safetensors, whole or sharded, into our shape and state dict, in the stored dtype.

    Cost: the model, and once more the largest tensor of ours, such as a layer's experts.
    Raises:
        ConvertError: files are missing or damaged, or see `config_from_hugging_face` and `from_hugging_face`.
    """
    try:
        table = _read_json(folder / "config.json")
        config = config_from_hugging_face(table)
        tensors = _read_tensors(folder)
        if table["model_type"] == OWN_TYPE:
            return config, _from_own_form(config, tensors)
        for name in _extra_layers(config, table, tensors):
            del tensors[name]
        return config, _packed(config, tensors, flag(table, "rope_interleave", default=True))
    except ConvertError as error:
        raise ConvertError(f"{folder}: {error}") from error


def read_hugging_face_config(folder: Path) -> ModelConfig:
    """The shape that a folder's config.json describes.

    Raises:
        ConvertError: see `config_from_hugging_face`.
    """
    try:
        return config_from_hugging_face(_read_json(folder / "config.json"))
    except ConvertError as error:
        raise ConvertError(f"{folder}: {error}") from error


def write_hugging_face(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    eos_id: int | None,
    dtype: str,
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Writes config.json, generation_config.json and the weights into a folder, which is made if need be.

    `stop_ids` are those that end what is generated, by default eos_id. Weights become model.safetensors, or several
    files and their index where they are large.

    Raises:
        ConvertError: see `hugging_face_config` and `to_hugging_face`.
    """
    table = hugging_face_config(config, eos_id=eos_id, dtype=dtype, pad_id=pad_id)
    _write_folder(folder, table, to_hugging_face(config, state), dtype)
    if config.head == "tokens":
        _write_generation(folder, config, eos_id, stop_ids, pad_id)


def write_own_form(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    eos_id: int | None,
    dtype: str,
    stop_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """`write_hugging_face` for what no class of theirs computes: names are ours, and OWN_MODULE belongs beside them."""
    tensors = {name: tensor for name, tensor in state.items() if name not in _loads(config)}
    _drop_tied_head(config, tensors, head="head.weight", embedding="embedding.weight")
    _write_folder(folder, own_config(config, eos_id=eos_id, dtype=dtype), tensors, dtype)
    _write_generation(folder, config, eos_id, stop_ids, pad_id)


def _write_folder(folder: Path, table: dict[str, Any], tensors: Mapping[str, Tensor], dtype: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", table)
    _write_tensors(folder, tensors, getattr(torch, DTYPES[dtype]))


def _write_generation(
    folder: Path, config: ModelConfig, eos_id: int | None, stop_ids: Sequence[int], pad_id: int | None
) -> None:
    table = {
        "eos_token_id": list(stop_ids) if len(stop_ids) > 1 else eos_id,
        "pad_token_id": eos_id if pad_id is None else pad_id,
        "max_length": config.context_length,
    }
    _write_json(folder / "generation_config.json", table)


def _from_own_form(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    num_experts = config.moe.num_experts
    state = tensors | {name: torch.full((num_experts,), 1 / num_experts) for name in _loads(config)}
    return state | ({"head.weight": state["embedding.weight"]} if config.tie_embeddings else {})


def _checked_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors that theirs are made of; where theirs have biases of routers and ours have none, zeros."""
    ours = {name: tensor for name, tensor in state.items() if name not in _loads(config)}
    _drop_tied_head(config, ours, head="head.weight", embedding="embedding.weight")
    if config.moe.bias == "none":
        ours |= {name: torch.zeros(config.moe.num_experts) for name in router_biases(config)}
    _check_tensors({stack.ours: stack.our_shape for stack in layout(config)}, ours)
    return ours


def _packed(config: ModelConfig, tensors: dict[str, Tensor], latent_pairs: bool) -> dict[str, Tensor]:
    """Our state dict; empties the dict of theirs on the way, so that no more than one tensor of ours is held twice."""
    # Llama checkpoints of 2023 carry RoPE's frequencies, which follow from the config.
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]
    _drop_tied_head(config, tensors, head="lm_head.weight", embedding="model.embed_tokens.weight")
    stacks = list(layout(config, latent_pairs=latent_pairs))
    _check_tensors({name: shape for stack in stacks for name, shape in stack.their_shapes.items()}, tensors)
    state = {stack.ours: stack.from_theirs([tensors.pop(part.name) for part in stack.parts]) for stack in stacks}
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    for name in router_biases(config):
        bias = state.pop(name)
        if config.moe.bias != "none":
            state[name] = bias.float()
    num_experts = config.moe.num_experts
    return state | {name: torch.full((num_experts,), 1 / num_experts) for name in _loads(config)}


def _loads(config: ModelConfig) -> list[str]:
    """Names of the buffers that theirs have no equal of: the load that an auxiliary loss of whole steps goes by."""
    layers = config.expert_layers if config.moe.balance in ("switch", "global") else ()
    return [f"blocks.{layer}.moe.routers.{link}.load" for layer in layers for link in range(config.moe.chain_length)]


def _extra_layers(config: ModelConfig, table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the layers that DeepSeek-V3 trains to guess further ahead, which are no part of the language model."""
    extra = range(config.num_layers, config.num_layers + number(table, "num_nextn_predict_layers", int, 0))
    prefixes = tuple(f"model.layers.{layer}." for layer in extra)
    return [name for name in tensors if name.startswith(prefixes)]


def _drop_tied_head(config: ModelConfig, tensors: dict[str, Tensor], *, head: str, embedding: str) -> None:
    if not config.tie_embeddings or head not in tensors or embedding not in tensors:
        return
    if tensors[head] is not tensors[embedding] and not torch.equal(tensors[head], tensors[embedding]):
        raise ConvertError(
            f"{head} differs from {embedding}, but the config ties them; set tie_word_embeddings (model.tie_embeddings "
            "here) to false if the model was trained with a head of its own"
        )
    del tensors[head]


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


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    dtypes = {name: torch.float32 if is_router_bias(name) else dtype for name in tensors}
    files = list(_files({name: tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items()}))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files, 1):
        is_whole = len(files) == 1
        file = "model.safetensors" if is_whole else f"model-{index:05}-of-{len(files):05}.safetensors"
        converted = {name: tensors[name].detach().to("cpu", dtypes[name]).contiguous() for name in names}
        save_file(converted, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        size_bytes = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items())
        index_table = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index_table)


def _files(sizes_bytes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, in groups that fit into a file each."""
    names, total = [], 0
    for name, size_bytes in sizes_bytes.items():
        if names and total + size_bytes > _FILE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size_bytes
    yield names


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

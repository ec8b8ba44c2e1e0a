"""Adapters in the files of Hugging Face's peft, to and from ours: adapter_config.json and adapter_model.safetensors.

They belong to the model as `write_hugging_face` exports it; where rows of ours lie otherwise (model.rope_interleaved),
those of B do too. Both directions are exact.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.hugging_face_configs import refuse_what_is_foreign_to_them
from model.hugging_face_keys import ConvertError
from model.hugging_face_layouts import Part
from model.lora import lora_targets
from model.lora_config import LoraConfig
from model.moe_config import ModelConfigError

_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ENDINGS = (".lora_A.weight", ".lora_B.weight")
_ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    # The others, such as pissa, change the weights beside the adapter too.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
_READ = {"r", "lora_alpha", "lora_dropout", "use_rslora", *_ONLY}
_WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode loftq_config lora_ga_config megatron_core peft_version qalora_group_size revision runtime_config "
    "target_modules task_type velora_config"
)
"""Keys of peft's that say nothing of what an adapter computes, or what its tensors say too."""


def write_adapter(folder: Path, config: ModelConfig, lora: LoraConfig, state: Mapping[str, Tensor], base: str) -> None:
    """Writes the adapters of a state dict into a folder, which is made if need be.

    `base` is where the exported model lies that they belong to: a path, or a name on Hugging Face's hub.

    Raises:
        ConvertError: the model itself could not be exported.
    """
    refuse_what_is_foreign_to_them(config)
    if config.head == "score":
        raise ConvertError("model.head = 'score': its new head would be left out; export the model whole")
    tensors: dict[str, Tensor] = {}
    for name, part, _ in lora_targets(config, lora):
        b = state[f"{name}.b"]
        values = state[f"{name}.a"], b if part.rotary is None else part.rotary.to_theirs(b)
        tensors |= dict(zip(_names(part), values, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / _CONFIG_FILE).write_text(json.dumps(_their_config(lora, base), indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path, config: ModelConfig) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Reads adapters for a model of this shape, in the stored dtype, under the names of our state dict.

    Raises:
        ConvertError: files are missing or damaged, hold more than plain adapters, or those of another model.
    """
    try:
        table, tensors = _read_config(folder / _CONFIG_FILE), _read_tensors(folder / _WEIGHTS_FILE)
        lora = _our_config(table, tensors)
        _check_shapes(config, lora, tensors)
    except (ConvertError, ModelConfigError) as error:
        raise ConvertError(f"{folder}: {error}") from error
    state: dict[str, Tensor] = {}
    for name, part, _ in lora_targets(config, lora):
        a, b = (tensors[theirs] for theirs in _names(part))
        state |= {f"{name}.a": a, f"{name}.b": b if part.rotary is None else part.rotary.from_theirs(b)}
    return lora, state


def _names(part: Part) -> tuple[str, str]:
    """Of A and B in their file."""
    module = f"base_model.model.{part.name.removesuffix('.weight')}"
    return f"{module}{_ENDINGS[0]}", f"{module}{_ENDINGS[1]}"


def _their_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        # They mean a whole number by it.
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.rank_scaled,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }


def _our_config(table: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The targets are those that there are tensors for: theirs may be a pattern."""
    for key, values in _ONLY.items():
        if table.get(key) not in values:
            raise ConvertError(f"{_CONFIG_FILE}: {key} = {table.get(key)!r}: expected one of {values}{_REMEDY}")
    known = _READ.union(_WITHOUT_EFFECT.split())
    if foreign := [f"{key} = {value!r}" for key, value in table.items() if value and key not in known]:
        raise ConvertError(f"{_CONFIG_FILE}: {', '.join(foreign)}: not implemented{_REMEDY}")
    return LoraConfig(
        rank=int(_number(table, "r")),
        alpha=_number(table, "lora_alpha"),
        dropout=_number(table, "lora_dropout"),
        rank_scaled=bool(table.get("use_rslora")),
        targets=tuple(dict.fromkeys(name.split(".")[-3] for name in tensors if name.endswith(_ENDINGS))),
    )


_REMEDY = "; merge the adapter with peft (merge_and_unload) and import the result"


def _number(table: Mapping[str, Any], key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConvertError(f"{_CONFIG_FILE}: {key} = {value!r}: expected a number")
    return float(value)


def _check_shapes(config: ModelConfig, lora: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raises ConvertError unless the file has the model's adapters and nothing else."""
    expected: dict[str, tuple[int, ...]] = {}
    for _, part, num_columns in lora_targets(config, lora):
        a, b = _names(part)
        expected |= {a: (lora.rank, num_columns), b: (part.rows, lora.rank)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        name = differing[0]
        raise ConvertError(
            f"{_WEIGHTS_FILE}: {name} is {found.get(name, 'missing')}, the model asks for "
            f"{expected.get(name, 'no such tensor')} ({len(differing)} tensors differ); give the model that it was "
            "trained for"
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConvertError(f"{file.name}: cannot be read ({error.strerror}); expected a folder of peft's") from error
    except ValueError as error:
        raise ConvertError(f"{file.name}: not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ConvertError(f"{file.name}: expected a JSON object, found {type(table).__name__}")
    return table


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        is_pickled = file.with_suffix(".bin").is_file()
        hint = "; there is a pickle: save it again with safe_serialization=True" if is_pickled else ""
        raise ConvertError(f"{file.name} is not there{hint}") from error
    except (SafetensorError, OSError) as error:
        raise ConvertError(f"{file.name}: damaged or incomplete ({error}); fetch it again") from error

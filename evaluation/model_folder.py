"""A path becomes a model: a run folder, one of its checkpoints, or a Hugging Face folder."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.config_file import from_table
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from model.config import ModelConfig
from model.convert import read_hugging_face, read_hugging_face_config
from model.lora import merged_state
from model.lora_config import LoraConfig
from model.transformer import Transformer
from resume.checkpoint import latest, open_checkpoint, read_config, read_record


class ModelFolderError(ValueError):
    """A folder that holds no model we can load, or cannot take one; the message says what was expected there."""


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model's shape, its weights on the CPU as stored, and its tokenizer; `path` is the folder of the weights."""

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    path: Path


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, and its tokenizer; `path` is the folder of the weights."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.embedding.weight.device


def load_model(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> LoadedModel:
    """Builds the model that path holds; of a run folder, its newest published checkpoint.

    Dtypes: weights become `dtype`, by default bf16 on CUDA and fp32 on the CPU; routers at least fp32. device "auto" is
    CUDA where there is one.
    Raises:
        ModelFolderError: no model there, damaged weights, a tokenizer that does not fit, or no such device.
        ConvertError, CheckpointError, TokenizerError: a part of the folder is unreadable.
    """
    target = _device(device)
    if dtype is None:
        dtype = torch.bfloat16 if target.type == "cuda" else torch.float32
    stored = read_model(path)
    with torch.device("meta"):
        model = Transformer(stored.config)
    try:
        state = {name: value.to(target, loaded_dtype(name, dtype)) for name, value in stored.state.items()}
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelFolderError(f"{stored.path}: the weights do not fit the config beside them: {error}") from error
    model.tie()
    return LoadedModel(model.eval(), stored.tokenizer, stored.path)


def loaded_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Routers stay in fp32, as rounded scores would pick other experts than in training, and their buffers always."""
    if ".routers." not in name:
        return dtype
    return torch.promote_types(dtype, torch.float32) if name.endswith(".weight") else torch.float32


def read_model(path: str | Path) -> StoredModel:
    """Reads what path holds without building it; see `load_model`."""
    folder = model_folder(path)
    config, state = read_weights(folder)
    stored = StoredModel(config, state, read_tokenizer(folder), folder)
    _check_vocabulary(stored)
    return stored


def model_folder(path: str | Path) -> Path:
    """The folder of the weights: of a run, its newest published checkpoint.

    Raises:
        ModelFolderError: no model there.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelFolderError(f"{folder}: {what}; expected a run folder, a step-N checkpoint or a Hugging Face folder")
    if (folder / "record.json").is_file():
        return folder
    if (newest := latest(folder)) is not None:
        return newest
    if (folder / "config.json").is_file():
        return folder
    raise ModelFolderError(
        f"{folder}: neither a run with a published checkpoint (step-N/), nor such a checkpoint (record.json), nor "
        "a Hugging Face folder (config.json)"
    )


def read_model_config(path: str | Path) -> ModelConfig:
    """The shape of the model that path holds; see `load_model`."""
    folder = model_folder(path)
    if not (folder / "record.json").is_file():
        return read_hugging_face_config(folder)
    return from_table(_run_table(folder, read_record(folder)).get("model", {}), ModelConfig, "model")


def read_weights(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and weights of the model that path holds, adapters merged; see `load_model`."""
    folder = model_folder(path)
    if not (folder / "record.json").is_file():
        return read_hugging_face(folder)
    stored = open_checkpoint(folder)  # before the config is believed
    table = _run_table(folder, stored.record)
    config = from_table(table.get("model", {}), ModelConfig, "model")
    state = stored.read_tensors("model.")
    lora = from_table(table.get("lora", {}), LoraConfig, "lora")
    if lora.rank:  # the checkpoint holds the adapters alone
        _, base = read_weights(table["run"]["init_from"])
        state = merged_state(base | state, config, lora)
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    return config, state


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the model that path holds: of a checkpoint the run's, one folder up.

    Raises:
        TokenizerError: none, or a damaged one.
    """
    folder = model_folder(path)
    if (folder / "record.json").is_file():
        # Data may have been prepared with another end-of-document token than the tokenizer's usual one.
        eos_id = read_record(folder).get("data", {}).get("eos_id")
        return load_tokenizer(folder.absolute().parent, eos_id=eos_id)
    eos_id = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(eos_id, list):
        eos_id = eos_id[0] if eos_id else None
    return load_tokenizer(folder, eos_id=eos_id)


def _run_table(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return tomllib.loads(read_config(folder, record))
    except tomllib.TOMLDecodeError as error:
        raise ModelFolderError(f"{folder / 'config.toml'}: unreadable: {error}") from error


def _check_vocabulary(stored: StoredModel) -> None:
    tokenizer, config = stored.tokenizer, stored.config
    if max(tokenizer.vocab_size, tokenizer.eos_id + 1) > config.vocab_size:
        raise ModelFolderError(
            f"{stored.path}: the tokenizer {tokenizer.file} has {tokenizer.vocab_size} tokens and the end-of-document "
            f"id {tokenizer.eos_id}, the model only {config.vocab_size} embeddings; they do not belong together"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelFolderError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelFolderError(f"device = {name!r}: no CUDA device is available; use --device cpu")
    if device.index is not None:
        torch.cuda.set_device(device)  # triton launches on the current device
    return device

"""What a run's config leaves open, filled in from the model that it starts from and the data that it reads."""

import dataclasses
import math
from pathlib import Path
from typing import TypeVar

from data_prep.chat.chat_folder import ChatFolder, read_chat_folder
from data_prep.config_file import ConfigError, load
from data_prep.manifest import read_manifest
from data_prep.tokenizing.tokenizer import Tokenizer
from evaluation.model_folder import model_folder, read_model_config, read_tokenizer
from model.config import TRAINING_KEYS, ModelConfig
from model.lora import lora_targets
from resume import checkpoint
from resume.manifest import DataError, listed_files
from resume.state import from_json
from train import stages
from train.config import RunConfig, value_of, with_values
from train.recipes import DpoConfig, GrpoConfig, RewardConfig, SftConfig, TuneConfig

Started = TypeVar("Started", bound=RunConfig)
_KINDS: dict[type[RunConfig], tuple[str, ...]] = {
    SftConfig: ("chat", "text"),
    DpoConfig: ("pairs",),
    RewardConfig: ("pairs",),
    GrpoConfig: ("prompts",),
}
"""The kinds of data folder that each kind of training reads; the others read text and conversations."""


def resolved(config: RunConfig) -> RunConfig:
    """The config as it is trained and written down.

    The model that a fine-tuning starts from gives its shape, rows of conversations their length, and stages or
    num_epochs the number of steps.

    Raises:
        ConfigError: nothing to start from, data of another kind than this training reads, or stages that do not fit.
        ManifestError, ModelFolderError: see `read_manifest` and `read_model_config`.
    """
    rows = _rows(config)
    if isinstance(config, TuneConfig):
        config = _with_shape(config, rows.row_tokens if rows is not None else config.data.sequence_length)
    if isinstance(config, GrpoConfig) and config.run.patience is not None:
        raise ConfigError("run.patience is for runs that are validated; GRPO is not, leave it out")
    if (lora := getattr(config, "lora", None)) is not None and lora.rank:
        lora_targets(config.model, lora)  # says what cannot be adapted
    length = config.data.sequence_length
    if rows is not None and rows.row_tokens != length:
        raise ConfigError(
            f"data.sequence_length = {length}, the rows of {' '.join(config.data.paths)} have {rows.row_tokens} "
            f"tokens; set --data.sequence-length {rows.row_tokens}, or prepare them with --row-tokens {length}"
        )
    _refuse_stages(config, has_rows=rows is not None)
    if config.run.num_epochs is None or stages.give_num_steps(config):
        return stages.with_steps(config)
    num_samples = _num_samples(config, length)
    num_steps = max(1, math.floor(config.run.num_epochs * num_samples / config.data.batch_sequences + 0.5))
    return stages.with_steps(with_values(config, run={"num_steps": num_steps}))


def _num_samples(config: RunConfig, length: int) -> int:
    """Training samples of the run: of the data folders when it begins, later of what it has taken up."""
    newest = checkpoint.latest(Path(config.run.dir))
    if newest is not None:
        state = from_json(checkpoint.read_record(newest)["data"])
        return sum(-(-state.num_targets(file_id) // length) for file_id in state.readable)
    folders = {Path(path): read_manifest(Path(path)) for path in config.data.paths}
    return sum(file.num_samples(length) for file in listed_files(folders, "train"))


def _refuse_stages(config: RunConfig, has_rows: bool) -> None:
    """Refuses stages and branches where they mean nothing."""
    run, kind = config.run, type(config)
    if has_rows and any(config.length_of(stage) != config.data.sequence_length for stage in config.stage):
        raise ConfigError(
            f"stage: conversations are packed in rows of {config.data.sequence_length} tokens, so no stage can have "
            "another sequence_length; leave it out"
        )
    if (config.stage or run.branch_from) and kind not in (RunConfig, SftConfig):
        raise ConfigError(
            f"[[stage]] and run.branch_from are for train/pretrain.py and train/sft.py, not for a {kind.__name__}; "
            "leave them out"
        )
    if run.branch_from is None:
        return
    if Path(run.branch_from).resolve().parent == Path(run.dir).resolve():
        raise ConfigError(
            f"run.branch_from = {run.branch_from!r} lies in run.dir; give the branch a --run.dir of its own"
        )
    if kind is RunConfig and run.init_from is not None:
        raise ConfigError("run.init_from and run.branch_from are both given, but a run starts from one; leave one out")


def _rows(config: RunConfig) -> ChatFolder | None:
    """What the data folders say of their rows; None if all hold plain text."""
    found: dict[str, ChatFolder | None] = {path: read_chat_folder(Path(path)) for path in config.data.paths}
    wanted = _KINDS.get(type(config), ("chat", "text"))
    for path, rows in found.items():
        if type(config) in _KINDS and not Path(path).is_dir():
            raise DataError(
                f"{path}: no such data folder; make it with `python -m data_prep prepare-chat --kind {wanted[0]} "
                f"--output {path}`, or name others with --data.paths"
            )
        kind = rows.kind if rows is not None else "text"
        if kind not in wanted:
            raise ConfigError(
                f"data.paths: {path} holds {kind}, this training reads {' or '.join(wanted)}; prepare it with "
                f"`python -m data_prep prepare-chat --kind {wanted[0]}`"
            )
    marked = [rows for rows in found.values() if rows is not None]
    lengths = sorted({rows.row_tokens for rows in marked})
    if len(lengths) > 1:
        raise ConfigError(f"data.paths: rows of {lengths} tokens do not mix; prepare all with one --row-tokens")
    if len({str(rows.chat_format) for rows in marked}) > 1:
        raise ConfigError("data.paths: the folders are of different chat formats; prepare all with one --format")
    return marked[0] if marked else None


def _with_shape(config: TuneConfig, length: int) -> TuneConfig:
    """The config with the shape of the model that the run starts from, to be trained as [model] says."""
    base = config.run.branch_from
    newest = checkpoint.latest(Path(config.run.dir)) or (Path(base) if base is not None else None)
    if newest is not None:
        # By now, a run folder may hold other weights than those that this run started from.
        started = started_with(newest, type(config))
        shape, init_from = started.model, started.run.init_from
        if config.run.init_from is not None and not (init_from and Path(init_from).is_dir()):
            init_from = str(model_folder(config.run.init_from).absolute())  # it was moved
    elif config.run.init_from is None:
        raise ConfigError(
            "run.init_from is missing: name the model to start from with --run.init-from FOLDER (a run, one of its "
            "checkpoints, or a Hugging Face folder)"
        )
    else:
        folder = model_folder(config.run.init_from)
        shape, init_from = read_model_config(folder), str(folder.absolute())
    if isinstance(config, RewardConfig):
        shape = dataclasses.replace(shape, head="score", tie_embeddings=False)
    elif shape.head == "score":
        raise ConfigError(f"run.init_from = {init_from}: a reward model predicts no tokens; name a language model")
    # All at once, as neither fits the others' old values.
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, init_from=init_from),
        data=dataclasses.replace(config.data, sequence_length=length),
        model=_trained_as(shape, config.model),
    )


def started_with(folder: Path, kind: type[Started]) -> Started:
    """The config of a checkpoint.

    Raises:
        ConfigError: it is of another kind of training.
    """
    try:
        return load(folder / "config.toml", kind)
    except ConfigError as error:
        raise ConfigError(f"{folder} was made by another kind of training ({error}); set another --run.dir") from error


def _trained_as(shape: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """A shape with the keys of training that [model] sets."""
    usual = ModelConfig()
    for key in TRAINING_KEYS:
        if (value := value_of(wanted, key)) != value_of(usual, key):
            section, _, name = key.rpartition(".")
            part = dataclasses.replace(value_of(shape, section) if section else shape, **{name: value})
            shape = dataclasses.replace(shape, **{section: part}) if section else part
    return shape


def refuse_other_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuses to fine-tune a model on data that were encoded with another tokenizer than its own.

    Raises:
        ConfigError: the two differ.
    """
    if not isinstance(config, TuneConfig) or config.run.init_from is None or not Path(config.run.init_from).is_dir():
        return
    own = read_tokenizer(config.run.init_from)
    if own.content != tokenizer.content:
        raise ConfigError(
            f"{' '.join(config.data.paths)} was encoded with another tokenizer than that of {config.run.init_from}; "
            f"prepare it with --tokenizer {config.run.init_from}"
        )

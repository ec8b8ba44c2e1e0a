"""Puts a run together: data, model, optimizer and log from a config, continued from the newest checkpoint if any."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.config_file import ConfigError, keys, load, to_toml
from data_prep.manifest import Manifest, read_manifest
from data_prep.tokenizer import Tokenizer, load_tokenizer
from evaluation.score import Score, padded_token_bytes, score, shard_batches
from model.convert import read_hugging_face
from model.init import initial_value
from model.transformer import Transformer
from resume import checkpoint, rng, state
from resume.manifest import DataError, DataFile, open_split, refuse_overlap
from resume.order import Order
from resume.samples import SampleReader
from train import loop, plan
from train.config import RunConfig, refuse_changes, value_of
from train.loader import Loader, rank_positions
from train.loop import Progress, Trainer
from train.metrics import RunLog
from train.objectives import next_token_loss
from train.optim import make_optimizer
from train.ranks import Ranks
from train.sharding import WholeValue, build_model
from train.signals import StopRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Prepared data, checked, and the tokenizer it was made with."""

    manifest: Manifest
    tokenizer: Tokenizer
    training: list[DataFile]
    validation: list[DataFile]


def open_data(config: RunConfig, show_progress: bool = False) -> Data:
    """Opens and checks the data folder.

    Raises:
        DataError, ManifestError, ShardError, TokenizerError: missing, damaged or mismatching data.
        ConfigError: the model's vocabulary is smaller than the tokenizer's.
    """
    folder = Path(config.data.path)
    manifest = read_manifest(folder)
    config.check_vocabulary(manifest.vocab_size)
    tokenizer = load_tokenizer(folder / manifest.tokenizer_file, eos_id=manifest.eos_id)
    if tokenizer.digest != manifest.tokenizer_digest:
        raise DataError(
            f"{tokenizer.file}: digest {tokenizer.digest}, the shards were encoded with {manifest.tokenizer_digest}; "
            "restore the tokenizer file or encode the text again"
        )
    training = open_split(folder, manifest, "train", show_progress)
    has_validation = any(shard.split == "validation" for shard in manifest.shards)
    validation = open_split(folder, manifest, "validation") if has_validation else []
    refuse_overlap(training, validation)
    return Data(manifest, tokenizer, training, validation)


@contextlib.contextmanager
def open_run(config: RunConfig, data: Data, ranks: Ranks) -> Iterator[tuple[Trainer, Progress]]:
    """A trainer at the run's newest checkpoint, or at its beginning; closes files and threads at the end.

    Raises:
        ConfigError, DataError, CheckpointError: the checkpoint does not belong to this config or data, or is damaged.
    """
    order = Order(data.training, seed=config.run.seed, sequence_length=config.data.sequence_length)
    fresh = state.start(order, tokenizer_digest=data.manifest.tokenizer_digest, eos_id=data.manifest.eos_id)
    folder = checkpoint.latest(Path(config.run.dir))
    progress = _progress(folder, config, fresh)
    _refuse_disagreement(config, progress, ranks)
    model = build_model(config.model, config.parallel, ranks, _initial_values(config, resuming=folder is not None))
    reader = SampleReader(order.files, sequence_length=order.sequence_length, vocab_size=config.model.vocab_size)
    with contextlib.ExitStack() as cleanup:
        trainer = Trainer(
            config=config,
            ranks=ranks,
            model=model,
            optimizer=make_optimizer(model, config.optim),
            batches=cleanup.enter_context(_loader(config, data, order, reader, ranks, progress)),
            objective=next_token_loss,
            validate=_validation(config, data, model, ranks, cleanup),
            samples_per_epoch=order.samples_per_epoch,
            log=None,
            stop=cleanup.enter_context(StopRequest()),
        )
        if folder is not None:
            loop.load(trainer, folder)
        if ranks.is_first:
            trainer.log = _open_log(config, data, progress)
            cleanup.callback(trainer.log.close)
        yield trainer, progress


def _progress(folder: Path | None, config: RunConfig, fresh: state.DataState) -> Progress:
    if folder is None:
        return Progress(0, fresh)
    refuse_changes(config, load(folder / "config.toml", RunConfig))
    record = checkpoint.read_record(folder)
    generators = rng.record(config.run.seed)
    if record["rng"] != generators:
        raise ConfigError(f"{folder} draws random numbers as {record['rng']}, this run as {generators}")
    if record["step"] > config.run.num_steps:
        raise ConfigError(
            f"{folder} is past run.num_steps = {config.run.num_steps}; raise it, or set another --run.dir"
        )
    continued = state.from_json(record["data"])
    state.refuse_other_data(continued, fresh)
    return Progress(record["step"], continued)


def _initial_values(config: RunConfig, resuming: bool) -> WholeValue:
    if resuming:
        return lambda name, shape: torch.zeros(()).expand(shape)  # about to be loaded over
    if config.run.init_from is None:
        return lambda name, shape: initial_value(config.model, name, shape, config.run.seed)
    imported, tensors = read_hugging_face(Path(config.run.init_from))
    shape_keys = [field.name for field in dataclasses.fields(imported) if not field.name.startswith("init")]
    differing = [key for key in shape_keys if getattr(imported, key) != getattr(config.model, key)]
    if differing:
        wanted = " ".join(f"--model.{key.replace('_', '-')} {getattr(imported, key)}" for key in differing)
        raise ConfigError(f"{config.run.init_from} holds another model than [model] describes; set {wanted}")

    def value(name: str, shape: torch.Size) -> Tensor:
        return tensors[name]

    return value


def _loader(
    config: RunConfig, data: Data, order: Order, reader: SampleReader, ranks: Ranks, progress: Progress
) -> Loader:
    positions = rank_positions(
        progress.data.position,
        batch_sequences=config.data.batch_sequences,
        micro_batch=config.data.micro_batch_sequences,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    return Loader(
        order,
        reader,
        positions,
        eos_id=data.manifest.eos_id,
        isolate_documents=config.data.isolate_documents,
        pin_memory=ranks.device.type == "cuda",
    )


def _refuse_disagreement(config: RunConfig, progress: Progress, ranks: Ranks) -> None:
    """Machines may have been given other flags, hold other data, or see another newest checkpoint."""
    same_everywhere = {name: value_of(config, name) for name in keys(RunConfig) if name not in ("run.dir", "data.path")}
    text = json.dumps([same_everywhere, progress.step, progress.data.to_json()], sort_keys=True)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    if not ranks.agree_on(digest):
        raise ConfigError(
            f"the {ranks.world_size} processes disagree on config, data shards or newest checkpoint; give all of them "
            "the same flags, the same prepared data, and a run folder that all of them see"
        )


def _validation(
    config: RunConfig, data: Data, model: Transformer, ranks: Ranks, cleanup: contextlib.ExitStack
) -> Callable[[], Score] | None:
    if not data.validation:
        return None
    token_bytes = padded_token_bytes(data.tokenizer, config.model.vocab_size)
    sequence_length = config.data.sequence_length
    reader = SampleReader(data.validation, sequence_length=sequence_length, vocab_size=config.model.vocab_size)
    cleanup.callback(reader.close)

    def validate() -> Score:
        batches = shard_batches(
            reader,
            num_sequences=config.data.validation_sequences,
            batch_size=config.data.micro_batch_sequences,
            eos_id=data.manifest.eos_id,
            isolate_documents=config.data.isolate_documents,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        bar = tqdm(batches, desc="validate", unit="batch", leave=False, disable=None if ranks.is_first else True)
        return score(model, bar, token_bytes, ranks.device)

    return validate


def _open_log(config: RunConfig, data: Data, progress: Progress) -> RunLog:
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save(run)  # a run folder is enough to generate from
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(run, progress.step, to_toml(config))
    for note in plan.notes(config, data.manifest):
        log.note(f"note: {note}")
    if progress.step == config.run.num_steps:
        log.note(f"already at step {progress.step} of {config.run.num_steps}; to train more, raise --run.num-steps")
    elif progress.step:
        log.note(f"resuming at step {progress.step}")
    else:
        log.note(f"starting in {run}" + (f" from {config.run.init_from}" if config.run.init_from else ""))
    return log

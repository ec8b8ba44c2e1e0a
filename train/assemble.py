"""Puts a run together: data, model, optimizer and log from a config, continued from the newest checkpoint if any."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.config_file import ConfigError, keys, load, to_toml
from data_prep.manifest import Manifest, merged, read_manifest
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from evaluation.score import Score, padded_token_bytes, score, shard_batches
from kernels import launch
from kernels.attention import attention_by
from model.batch import TokenRows
from model.config import TRAINING_KEYS, ModelConfig
from model.convert import read_hugging_face
from model.init import initial_value
from model.transformer import Transformer
from model.upcycle import upcycle
from resume import checkpoint, rng, state
from resume import ledger as ledgers
from resume.checkpoint import Checkpoint
from resume.ledger import Ledger
from resume.manifest import DataError, DataFile, listed_files, refuse_other_tokenizers
from resume.order import Order
from resume.samples import SampleReader
from resume.saver import Saver
from resume.verify import check_files
from train import loop, plan
from train.config import RunConfig, refuse_changes, value_of
from train.faults import Faults
from train.feed import Feed, drop_samples_after, fresh_state
from train.guard import Guard
from train.loop import Progress, Trainer
from train.metrics import RunLog
from train.objectives import next_token_loss
from train.optim import make_optimizer, state_tensors
from train.ranks import Ranks
from train.sharding import WholeValue, build_model
from train.signals import StopRequest
from train.watch import Watch

# Keys that may differ from machine to machine: where things lie.
_LOCAL = ("run.dir", "data.paths", "data.search")


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Prepared data and the tokenizer it was made with. Held-out shards are checked, training shards only listed."""

    manifest: Manifest
    """The manifests of all data folders in one."""
    tokenizer: Tokenizer
    training: list[DataFile]
    validation: list[DataFile]


def open_data(config: RunConfig, show_progress: bool = False) -> Data:
    """Opens the data folders.

    Raises:
        DataError, ManifestError, ShardError, TokenizerError: missing, damaged or mismatching data.
        ConfigError: the model's vocabulary is smaller than the tokenizer's.
    """
    folders = {Path(path): read_manifest(Path(path)) for path in config.data.paths}
    refuse_other_tokenizers(folders)
    folder, manifest = next(iter(folders.items()))
    config.check_vocabulary(manifest.vocab_size)
    tokenizer = load_tokenizer(folder / manifest.tokenizer_file, eos_id=manifest.eos_id)
    if tokenizer.digest != manifest.tokenizer_digest:
        raise DataError(
            f"{tokenizer.file}: digest {tokenizer.digest}, the shards were encoded with {manifest.tokenizer_digest}; "
            "restore the tokenizer file or encode the text again"
        )
    training, validation = listed_files(folders, "train"), listed_files(folders, "validation")
    if not training:
        raise DataError(f"{' '.join(config.data.paths)}: no shard of split 'train'; prepare the data again")
    check_files(validation, "headtail", manifest.tokenizer_digest, show_progress=show_progress)
    return Data(merged(folders), tokenizer, training, validation)


@contextlib.contextmanager
def open_run(
    config: RunConfig, data: Data, ranks: Ranks, watch: Watch, stop: StopRequest
) -> Iterator[tuple[Trainer, Progress]]:
    """A trainer at the run's newest good checkpoint, or at its beginning; closes files and threads at the end.

    Raises:
        ConfigError, DataError, CheckpointError: the checkpoint does not belong to this config or data, or none is good.
    """
    watch.at("start", watch.step)
    run = Path(config.run.dir)
    # Said at once: it is set aside only once, and the start may fail of something else.
    newest = checkpoint.newest_valid(run, lambda text: print(text, flush=True) if ranks.is_first else None)
    progress, ledger = _progress(newest, config, data)
    if ranks.is_first:
        drop_samples_after(run, progress.step)
    _refuse_disagreement(config, progress, ranks)
    launch.choose(dataclasses.asdict(config.kernels))
    model = build_model(config.model, config.parallel, ranks, _initial_values(config, resuming=newest is not None))
    faults = Faults(run, config.debug.inject, ranks.rank)
    saver = Saver(
        run,
        keep_last=config.run.keep_checkpoints,
        keep_every=config.run.keep_every,
        in_background=config.run.async_save,
        before_write=faults.before_write,
    )
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(saver.close)
        cleanup.enter_context(attention_by(config.kernels.attention, ranks.device))
        feed = Feed(config, ranks, progress.data, ledger, data.training, data.validation)
        cleanup.callback(feed.close)
        progress = Progress(progress.step, feed.state)
        trainer = Trainer(
            config=config,
            ranks=ranks,
            model=model,
            optimizer=make_optimizer(model, config.optim, exact=config.parallel.precision == "exact"),
            feed=feed,
            objective=functools.partial(
                next_token_loss,
                z_loss=config.optim.z_loss,
                label_smoothing=config.optim.label_smoothing,
                soft_cap=config.model.logit_softcap,
            ),
            validate=_validation(config, data, model, ranks, watch, cleanup),
            log=None,
            stop=stop,
            saver=saver,
            guard=Guard(config.guard, newest.record["guard"] if newest is not None else None),
            watch=watch,
            faults=faults,
        )
        if newest is not None:
            newest.load_into(state_tensors(trainer.model, trainer.optimizer))
        if ranks.is_first:
            trainer.log = _open_log(config, data, progress, ranks.world_size)
            cleanup.callback(trainer.log.close)
        feed.open()
        loop.log_notes(trainer)
        yield trainer, progress


def _progress(newest: Checkpoint | None, config: RunConfig, data: Data) -> tuple[Progress, Ledger | None]:
    """Where the run stands, and its books."""
    if newest is None:
        return Progress(0, fresh_state(config, data.manifest, data.training)), None
    folder, record = newest.folder, newest.record
    refuse_changes(config, load(folder / "config.toml", RunConfig))
    generators = rng.record(config.run.seed)
    if record["rng"] != generators:
        raise ConfigError(f"{folder} draws random numbers as {record['rng']}, this run as {generators}")
    if record["step"] > config.run.num_steps:
        raise ConfigError(
            f"{folder} is past run.num_steps = {config.run.num_steps}; raise it, or set another --run.dir"
        )
    continued = state.from_json(record["data"])
    state.refuse_other_data(continued, tokenizer_digest=data.manifest.tokenizer_digest, eos_id=data.manifest.eos_id)
    order = Order(continued)
    ledger = ledgers.from_json(record["trained"], order.file_ids)
    length, batch = config.data.sequence_length, config.data.batch_sequences
    if length != continued.sequence_length:
        order.refuse_losing_length(length)
    if (length, batch) != (continued.sequence_length, continued.batch.batch_sequences):
        continued = state.set_batch(continued, batch, length)
    return Progress(record["step"], continued), ledger


def _initial_values(config: RunConfig, resuming: bool) -> WholeValue:
    if resuming:
        return lambda name, shape: torch.zeros(()).expand(shape)  # about to be loaded over
    if config.run.init_from is None:
        return lambda name, shape: initial_value(config.model, name, shape, config.run.seed)
    imported, tensors = read_hugging_face(Path(config.run.init_from))
    if config.model.expert_layers and not imported.expert_layers:
        noise = config.run.init_noise
        imported, tensors = upcycle(imported, tensors, config.model.moe, seed=config.run.seed, sigma=noise)
    shape_keys = [key for key in keys(ModelConfig) if key not in TRAINING_KEYS]
    differing = [key for key in shape_keys if value_of(imported, key) != value_of(config.model, key)]
    if "moe.bias" in differing and config.model.moe.bias != "none":
        differing.remove("moe.bias")  # one starts at zero, or goes on by another rule
    if differing:
        wanted = " ".join(f"--model.{key.replace('_', '-')} {value_of(imported, key)}" for key in differing)
        raise ConfigError(f"{config.run.init_from} holds another model than [model] describes; set {wanted}")

    def value(name: str, shape: torch.Size) -> Tensor:
        # Nobody else's file has what a mixture's balance goes by.
        return tensors[name] if name in tensors else initial_value(config.model, name, shape, config.run.seed)

    return value


def _refuse_disagreement(config: RunConfig, progress: Progress, ranks: Ranks) -> None:
    """Machines may have been given other flags, hold other data, or see another newest checkpoint."""
    same_everywhere = {name: value_of(config, name) for name in keys(RunConfig) if name not in _LOCAL}
    text = json.dumps([same_everywhere, progress.step, progress.data.to_json()], sort_keys=True)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    if not ranks.agree_on(digest):
        raise ConfigError(
            f"the {ranks.world_size} processes disagree on config, data shards or newest checkpoint; give all of them "
            "the same flags, the same prepared data, and a run folder that all of them see"
        )


def _validation(
    config: RunConfig, data: Data, model: Transformer, ranks: Ranks, watch: Watch, cleanup: contextlib.ExitStack
) -> Callable[[], Score] | None:
    if not data.validation:
        return None
    token_bytes = padded_token_bytes(data.tokenizer, config.model.vocab_size)
    sequence_length = config.data.sequence_length
    reader = SampleReader(
        data.validation,
        sequence_length=sequence_length,
        vocab_size=config.model.vocab_size,
        eos_id=data.manifest.eos_id,
    )
    cleanup.callback(reader.close)

    def validate() -> Score:
        batches = shard_batches(
            reader,
            num_sequences=config.data.validation_sequences,
            batch_size=config.data.micro_batch_sequences,
            isolate_documents=config.data.isolate_documents,
            rank=ranks.rank,
            world_size=ranks.world_size,
        )
        bar = tqdm(batches, desc="validate", unit="batch", leave=False, disable=None if ranks.is_first else True)
        return score(model, _ticking(bar, watch), token_bytes, ranks.device)

    return validate


def _ticking(batches: Iterable[TokenRows], watch: Watch) -> Iterator[TokenRows]:
    for batch in batches:
        watch.tick()
        yield batch


def _open_log(config: RunConfig, data: Data, progress: Progress, world_size: int) -> RunLog:
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save(run)  # a run folder is enough to generate from
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(run, progress.step, to_toml(config))
    for note in plan.notes(config, data.manifest, world_size):
        log.note(f"note: {note}")
    if progress.step == config.run.num_steps:
        log.note(f"already at step {progress.step} of {config.run.num_steps}; to train more, raise --run.num-steps")
    elif progress.step:
        log.note(f"resuming at step {progress.step}")
    else:
        log.note(f"starting in {run}" + (f" from {config.run.init_from}" if config.run.init_from else ""))
    return log

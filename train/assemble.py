"""Puts a run together: data, model, optimizer and log from a config, continued from the newest checkpoint if any."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.chat.chat_folder import read_chat_folder, write_chat_folder
from data_prep.config_file import ConfigError, keys, to_toml
from data_prep.manifest import Manifest, merged, read_manifest
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from evaluation.model_folder import read_weights
from evaluation.score import padded_token_bytes, shard_batches
from kernels import launch
from kernels.attention import attention_by
from model.batch import TokenRows
from model.config import TRAINING_KEYS, ModelConfig
from model.init import initial_value
from model.lora import lora_initial_value
from model.lora_config import LoraConfig
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
from train.branch import base_of, branched, take_over_paths
from train.config import RunConfig, refuse_changes, value_of
from train.faults import Faults
from train.feed import drop_samples_after, fresh_state
from train.guard import Guard
from train.loop import Progress, Trainer, Validation
from train.metrics import RunLog
from train.optim import make_optimizer, state_tensors
from train.patience import Patience
from train.ranks import Ranks
from train.resolve import refuse_other_tokenizer, started_with
from train.setups import Setup, begin_answers, setup_of
from train.sharding import WholeValue, build_model
from train.signals import StopRequest
from train.stages import begins_at, portions_at
from train.validation import ObjectiveValidation, TokenValidation
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
    refuse_other_tokenizer(config, tokenizer)
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
    base = base_of(config) if newest is None else None
    begins = checkpoint.open_checkpoint(base) if base is not None else newest
    progress, ledger = _progress(begins, config, data, is_branch=base is not None)
    if base is not None:
        ranks.from_first(lambda: take_over_paths(base, run))
    if ranks.is_first:
        drop_samples_after(run, progress.step)
    _refuse_disagreement(config, progress, ranks)
    launch.choose(dataclasses.asdict(config.kernels))
    values = _initial_values(config, resuming=begins is not None)
    model = build_model(config.model, config.parallel, ranks, values, lora_of(config))
    faults = Faults(run, config.debug.inject, ranks.rank)
    saver = Saver(
        run,
        keep_last=config.run.keep_checkpoints,
        keep_every=config.run.keep_every,
        in_background=config.run.async_save,
        before_write=faults.before_write,
    )
    patience = Patience(config.run.patience, newest.record.get("patience") if newest is not None else None)
    saver.protected = patience.best_steps
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(saver.close)
        cleanup.enter_context(attention_by(config.kernels.attention, ranks.device))
        setup = setup_of(config, data, ranks, lambda: starting_model(config, ranks))
        feed = setup.feed(config, ranks, progress.data, ledger, data.training, data.validation, setup.annotate)
        cleanup.callback(feed.close)
        progress = Progress(progress.step, feed.state)
        begin_answers(feed, config, data, model, progress.step, watch)
        trainer = Trainer(
            config=config,
            ranks=ranks,
            model=model,
            optimizer=make_optimizer(model, config.optim, exact=config.parallel.precision == "exact"),
            feed=feed,
            objective_at=setup.objective_at,
            validation=_validation(config, data, setup, model, ranks, watch, cleanup),
            log=None,
            stop=stop,
            saver=saver,
            patience=patience,
            guard=Guard(config.guard, begins.record["guard"] if begins is not None else None),
            watch=watch,
            faults=faults,
        )
        if begins is not None:
            begins.load_into(state_tensors(trainer.model, trainer.optimizer))
        if ranks.is_first:
            trainer.log = _open_log(config, data, progress, ranks.world_size)
            cleanup.callback(trainer.log.close)
        feed.open()
        loop.log_notes(trainer)
        if base is not None:
            loop.save(trainer, progress)  # from here on it is a run like any other
        yield trainer, progress


def starting_model(config: RunConfig, ranks: Ranks) -> Transformer:
    """The model that a run starts from, without adapters."""
    launch.choose(dataclasses.asdict(config.kernels))
    return build_model(config.model, config.parallel, ranks, _initial_values(config, resuming=False))


def _progress(
    begins: Checkpoint | None, config: RunConfig, data: Data, is_branch: bool
) -> tuple[Progress, Ledger | None]:
    """Where the run stands that begins with a checkpoint, of its own or of the run that it leaves, and its books."""
    if begins is None:
        return Progress(0, fresh_state(config, data.manifest, data.training)), None
    folder, record = begins.folder, begins.record
    stored = started_with(folder, type(config))
    refuse_changes(config, stored, is_branch)
    generators = rng.record(config.run.seed)
    if record["rng"] != generators:
        raise ConfigError(f"{folder} draws random numbers as {record['rng']}, this run as {generators}")
    if record["step"] > config.run.num_steps:
        raise ConfigError(
            f"{folder} is past run.num_steps = {config.run.num_steps}; raise it, or set another --run.dir"
        )
    continued = state.from_json(record["data"])
    state.refuse_other_data(continued, tokenizer_digest=data.manifest.tokenizer_digest, eos_id=data.manifest.eos_id)
    ledger = ledgers.from_json(record["trained"], Order(continued).file_ids)
    if is_branch:
        continued = branched(continued, config, stored, data.training)
    length, batch = portions_at(config, record["step"])
    if length != continued.sequence_length:
        Order(continued).refuse_losing_length(length)
    if (length, batch) != (continued.sequence_length, continued.batch.batch_sequences):
        continued = state.set_batch(continued, batch, length)
    return Progress(record["step"], continued), ledger


def _initial_values(config: RunConfig, resuming: bool) -> WholeValue:
    """The values that a model is built with: random ones, those of the model that the run starts from, or none."""
    has_adapters = lora_of(config).rank > 0
    if resuming and not has_adapters:
        return lambda name, shape: torch.zeros(()).expand(shape)  # about to be loaded over
    tensors = _starting_tensors(config) if config.run.init_from is not None else {}

    def value(name: str, shape: torch.Size) -> Tensor:
        if ".lora." in name:
            return lora_initial_value(name, shape, config.run.seed)
        # Nobody else's file has what a mixture's balance goes by.
        return tensors[name] if name in tensors else initial_value(config.model, name, shape, config.run.seed)

    return value


def _starting_tensors(config: RunConfig) -> dict[str, Tensor]:
    """The weights of run.init_from as this run's model has them."""
    assert config.run.init_from is not None
    imported, tensors = read_weights(config.run.init_from)
    if config.model.expert_layers and not imported.expert_layers:
        noise = config.run.init_noise
        imported, tensors = upcycle(imported, tensors, config.model.moe, seed=config.run.seed, sigma=noise)
    shape_keys = [key for key in keys(ModelConfig) if key not in TRAINING_KEYS]
    differing = [key for key in shape_keys if value_of(imported, key) != value_of(config.model, key)]
    if "moe.bias" in differing and config.model.moe.bias != "none":
        differing.remove("moe.bias")  # one starts at zero, or goes on by another rule
    if "head" in differing and config.model.head == "score":
        # A reward model starts with a head of its own, which is drawn.
        differing = [key for key in differing if key not in ("head", "tie_embeddings")]
        del tensors["head.weight"]
    if differing:
        wanted = " ".join(f"--model.{key.replace('_', '-')} {value_of(imported, key)}" for key in differing)
        raise ConfigError(f"{config.run.init_from} holds another model than [model] describes; set {wanted}")
    return tensors


def lora_of(config: RunConfig) -> LoraConfig:
    """The adapters of a run, of rank 0 if it has none."""
    return getattr(config, "lora", LoraConfig())


def _refuse_disagreement(config: RunConfig, progress: Progress, ranks: Ranks) -> None:
    """Machines may have been given other flags, hold other data, or see another newest checkpoint."""
    same_everywhere = {name: value_of(config, name) for name in keys(type(config)) if name not in _LOCAL}
    stages = [dataclasses.asdict(section) for section in config.stage]
    text = json.dumps([same_everywhere, stages, progress.step, progress.data.to_json()], sort_keys=True)
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    if not ranks.agree_on(digest):
        raise ConfigError(
            f"the {ranks.world_size} processes disagree on config, data shards or newest checkpoint; give all of them "
            "the same flags, the same prepared data, and a run folder that all of them see"
        )


def _validation(
    config: RunConfig,
    data: Data,
    setup: Setup,
    model: Transformer,
    ranks: Ranks,
    watch: Watch,
    cleanup: contextlib.ExitStack,
) -> Validation | None:
    if not data.validation or not setup.validates:
        return None
    sequence_length = config.data.sequence_length
    reader = SampleReader(
        data.validation,
        sequence_length=sequence_length,
        vocab_size=config.model.vocab_size,
        eos_id=data.manifest.eos_id,
    )
    cleanup.callback(reader.close)
    annotate = setup.annotate(data.validation) if setup.annotate is not None and setup.validates_objective else None

    def batches() -> Iterator[TokenRows]:
        found = shard_batches(
            reader,
            num_sequences=config.data.validation_sequences,
            batch_size=config.data.micro_batch_sequences,
            isolate_documents=config.data.isolate_documents,
            rank=ranks.rank,
            world_size=ranks.world_size,
            annotate=annotate,
        )
        bar = tqdm(found, desc="validate", unit="batch", leave=False, disable=None if ranks.is_first else True)
        return _ticking(bar, watch)

    if setup.validates_objective:
        return ObjectiveValidation(model, batches, setup.objective_at(0), ranks.device)
    token_bytes = padded_token_bytes(data.tokenizer, config.model.vocab_size)
    return TokenValidation(model, batches, token_bytes, ranks.device)


def _ticking(batches: Iterable[TokenRows], watch: Watch) -> Iterator[TokenRows]:
    for batch in batches:
        watch.tick()
        yield batch


def _open_log(config: RunConfig, data: Data, progress: Progress, world_size: int) -> RunLog:
    run = Path(config.run.dir)
    run.mkdir(parents=True, exist_ok=True)
    data.tokenizer.save(run)  # a run folder is enough to generate from
    chats = [chat for path in config.data.paths if (chat := read_chat_folder(Path(path))) is not None]
    if chats:
        write_chat_folder(run, chats[0])  # nor can one chat without the format
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    log = RunLog(run, progress.step, to_toml(config))
    for note in plan.notes(config, data.manifest, world_size):
        log.note(f"note: {note}")
    if progress.step == config.run.num_steps:
        log.note(f"already at step {progress.step} of {config.run.num_steps}; to train more, raise --run.num-steps")
    elif progress.step == begins_at(config) and config.run.branch_from:
        log.note(f"branching off from {config.run.branch_from} in {run}")
    elif progress.step:
        log.note(f"resuming at step {progress.step}")
    else:
        log.note(f"starting in {run}" + (f" from {config.run.init_from}" if config.run.init_from else ""))
    return log

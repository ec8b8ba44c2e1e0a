"""What is minimised, and on which batches, by the kind of training that a config is of."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from data_prep.chat.chat_format import chat_format_of
from data_prep.config_file import ConfigError
from evaluation.rewards import load_reward
from evaluation.score import Annotate
from model.balance import RoutingLog
from model.batch import Batch
from model.transformer import Transformer
from resume.manifest import DataFile
from resume.samples import SampleReader
from train.config import RunConfig
from train.distillation import distillation_at, load_teacher
from train.feed import Feed
from train.objectives import Objective, Outcome, next_token_loss
from train.policy_gradient import policy_gradient_loss, target_log_probs
from train.preference import dpo_loss, reward_loss
from train.ranks import Ranks
from train.recipes import DistillConfig, DpoConfig, GrpoConfig, RewardConfig
from train.references import has_references, note_digest, pairs, run_digest, with_references, write_references
from train.rollout import RolloutFeed
from train.sharding import compute_dtype, reshard
from train.teacher_targets import cached_teacher
from train.watch import Watch

if TYPE_CHECKING:
    from train.assemble import Data

Build = Callable[[], Transformer]
"""Builds the model that the run starts from; every rank calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """A kind of training, as the loop needs it."""

    objective_at: Callable[[int], Objective]
    """What a step, from 0, minimises."""
    annotate: Callable[[Sequence[DataFile]], Annotate] | None = None
    """Of the files of a reader: what is added to their rows."""
    feed: type[Feed] = Feed
    validates_objective: bool = False
    """Whether held-out shards are judged by the objective, instead of by the loss of their tokens."""
    validates: bool = True


def setup_of(config: RunConfig, data: "Data", ranks: Ranks, build: Build) -> Setup:
    """The kind of training of a config.

    Raises:
        ConfigError, DataError: what it needs beside the data is not there, or does not fit.
    """
    match config:
        case DpoConfig():
            return _dpo(config)
        case RewardConfig(reward=reward):
            objective = functools.partial(reward_loss, kind=reward.kind, center_weight=reward.center_weight)
            return Setup(objective_at=lambda _: objective, annotate=_as_pairs, validates_objective=True)
        case GrpoConfig():
            objective = _policy_gradient(config, ranks, build)
            return Setup(objective_at=lambda _: objective, feed=RolloutFeed, validates=False)
        case DistillConfig():
            return _distillation(config, data, ranks)
        case _:
            objective = functools.partial(
                next_token_loss,
                z_loss=config.optim.z_loss,
                label_smoothing=config.optim.label_smoothing,
                soft_cap=config.model.logit_softcap,
            )
            return Setup(objective_at=lambda _: objective)


def begin_answers(
    feed: Feed, config: RunConfig, data: "Data", model: Transformer, first_step: int, watch: Watch
) -> None:
    """Tells a feed of answers who gives them."""
    if isinstance(feed, RolloutFeed) and isinstance(config, GrpoConfig):
        stop_ids = chat_format_of(Path(config.data.paths[0])).stop_ids(data.tokenizer)
        feed.answer_with(model, data.tokenizer, stop_ids, load_reward(config.grpo.reward), first_step, watch.tick)


def prepare(config: RunConfig, data: "Data", ranks: Ranks, build: Build, watch: Watch) -> None:
    """Computes what must be there before the first step; every rank calls it. No model is left when it returns."""
    if not isinstance(config, DpoConfig):
        return
    assert config.run.init_from is not None
    name = Path(config.run.init_from).name  # the checkpoint that the machines have found, wherever it lies
    if not ranks.agree_on(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")):
        raise ConfigError(
            f"run.init_from = {config.run.init_from}: the processes have found different checkpoints in it"
        )
    run, init_from = Path(config.run.dir), config.run.init_from
    digest = ranks.from_first(lambda: note_digest(run, init_from))
    files = [*data.training, *data.validation]
    missing = ranks.from_first(lambda: [i for i, file in enumerate(files) if not has_references(file.path, digest)])
    if not missing:
        return
    model = build().eval()
    for file in (files[i] for i in missing):
        reader = SampleReader(
            [file],
            sequence_length=config.data.sequence_length,
            vocab_size=config.model.vocab_size,
            eos_id=data.manifest.eos_id,
            on_bad_sample=config.data.on_bad_sample,
        )
        try:
            write_references(model, file, reader, digest, ranks, config.data.micro_batch_sequences, watch.tick)
        finally:
            reader.close()


def _dpo(config: DpoConfig) -> Setup:
    dpo = config.dpo
    objective = functools.partial(
        dpo_loss,
        kind=dpo.kind,
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        sft_weight=dpo.sft_weight,
        soft_cap=config.model.logit_softcap,
    )
    annotate = functools.partial(with_references, digest=run_digest(Path(config.run.dir)))
    return Setup(objective_at=lambda _: objective, annotate=annotate, validates_objective=True)


def _as_pairs(_: Sequence[DataFile]) -> Annotate:
    return lambda rows, files, samples: pairs(rows)


def _policy_gradient(config: GrpoConfig, ranks: Ranks, build: Build) -> Objective:
    """GRPO's objective, with the log-probabilities of the model that the run starts from if they count."""
    grpo, soft_cap = config.grpo, config.model.logit_softcap
    objective = functools.partial(
        policy_gradient_loss,
        clip=grpo.clip,
        clip_high=grpo.clip_high,
        kl_weight=grpo.kl_weight,
        temperature=grpo.temperature,
        soft_cap=soft_cap,
    )
    if not grpo.kl_weight:
        return objective
    reference = build().requires_grad_(False).eval()

    def with_reference(model: nn.Module, batch: Batch, routing: RoutingLog | None) -> Outcome:
        with torch.no_grad():
            log_probs = target_log_probs(reference, batch, temperature=grpo.temperature, soft_cap=soft_cap)
            reshard(reference)
        extra = {**batch.extra, "reference_log_probs": log_probs}
        return objective(model, dataclasses.replace(batch, extra=extra), routing)

    return with_reference


def _distillation(config: DistillConfig, data: "Data", ranks: Ranks) -> Setup:
    """The teacher in memory, or what it once said."""
    section, num_tokens = config.distill, data.tokenizer.vocab_size
    if section.cached:
        annotate = functools.partial(
            cached_teacher,
            sequence_length=config.data.sequence_length,
            isolate_documents=config.data.isolate_documents,
            temperature=section.temperature,
        )
        return Setup(objective_at=distillation_at(config, None, num_tokens), annotate=annotate)
    if not section.teacher:
        raise ConfigError("distill.teacher is missing: name the model to learn from with --distill.teacher FOLDER")
    dtype = compute_dtype(config.parallel, ranks.device)
    teacher = load_teacher(section.teacher, data.tokenizer, str(ranks.device), dtype)
    return Setup(objective_at=distillation_at(config, teacher, num_tokens))

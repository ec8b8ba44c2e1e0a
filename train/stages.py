"""The stages of a run: which one a step is in, and which rate, mixture and length of samples it has, by arithmetic.

All follow from the config and the number of the step, so that a run that is resumed anywhere knows where it is. Imports
no torch.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.config_file import ConfigError
from train.config import Config, RunConfig, StageSection, with_values
from train.schedule import between, learning_rate


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage as steps of its run."""

    number: int
    """From 1."""
    first_step: int
    """From 0, as steps are counted over the whole run."""
    num_steps: int
    sequence_length: int
    first_rate: float | None
    """Learning rate of its first step; None where the schedule of [optim] holds for the whole run."""
    last_rate: float | None
    way: Literal["constant", "linear", "cosine"]
    mixture: str | None
    """Of its own; None where it goes on with that of the stage before."""


def begins_at(config: RunConfig) -> int:
    """The step from which the run's own steps count: 0, or where it branches from another run.

    Raises:
        ConfigError: run.branch_from is no name of a checkpoint.
    """
    base = config.run.branch_from
    if base is None:
        return 0
    match = re.fullmatch(r"step-(0|[1-9][0-9]*)", Path(base).name)
    if match is None:
        raise ConfigError(f"run.branch_from = {base!r}: name a checkpoint of another run, such as {base}/step-8000")
    return int(match[1])


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a config that is resolved; none if it names none."""
    found: list[Stage] = []
    step, rate = begins_at(config), config.optim.peak_lr
    has_rates = any(section.has_rate for section in config.stage)
    for number, section in enumerate(config.stage, 1):
        num_steps = steps_in(config, section) or config.run.num_steps - step
        first_rate = section.lr if section.lr is not None else rate
        rate = section.lr_end if section.lr_end is not None else first_rate
        found.append(
            Stage(
                number=number,
                first_step=step,
                num_steps=num_steps,
                sequence_length=config.length_of(section),
                first_rate=first_rate if has_rates else None,
                last_rate=rate if has_rates else None,
                way=section.schedule or ("constant" if section.lr_end is None else "linear"),
                mixture=section.mixture,
            )
        )
        step += num_steps
    return found


def stage_at(config: RunConfig, step: int) -> Stage | None:
    """The stage of a step, from 0; None if the run has none. Behind the last step it is the last stage."""
    begun = [stage for stage in stages_of(config) if stage.first_step <= step]
    return begun[-1] if begun else None


def portions_at(config: RunConfig, step: int) -> tuple[int, int]:
    """Targets per sample, and samples per step, of a step from 0."""
    stage = stage_at(config, step)
    length = stage.sequence_length if stage is not None else config.data.sequence_length
    return length, config.batch_tokens // length


def rate_at(config: RunConfig, step: int) -> float:
    """The learning rate of a step, from 0; the run's warm-up leads up to that of its stage."""
    stage = stage_at(config, step)
    if stage is None or stage.first_rate is None or stage.last_rate is None:
        return learning_rate(config.optim, step, config.run.num_steps)
    progress = (step - stage.first_step) / max(1, stage.num_steps - 1)
    rate = between(stage.first_rate, stage.last_rate, min(1.0, progress), stage.way)
    return rate * min(1.0, (step + 1) / max(1, config.optim.warmup_steps))


def steps_in(config: RunConfig, section: StageSection) -> int | None:
    """Steps of a stage; None where it leaves them open."""
    return round(section.tokens / config.batch_tokens) if section.tokens is not None else None


def give_num_steps(config: RunConfig) -> bool:
    """Whether the number of steps follows from the stages: all of them say how long they are."""
    return bool(config.stage) and config.stage[-1].tokens is not None


def with_steps(config: Config) -> Config:
    """The config with the number of steps that follows from its stages.

    Raises:
        ConfigError: it was given otherwise, leaves the last stage no step, or lies behind where the run branches.
    """
    first, run = begins_at(config), config.run
    total = first + sum(steps_in(config, section) or 0 for section in config.stage)
    if not give_num_steps(config):
        if run.num_steps > total:
            return config
        what = "the last stage" if config.stage else "the branch"
        raise ConfigError(
            f"run.num_steps = {run.num_steps} leaves no step for {what}, which begins behind step {total}; raise it"
            + (" (steps count on from those of the other run)" if first else "")
        )
    default = type(config)().run
    for name in ("num_steps", "num_epochs"):
        if getattr(run, name) not in (getattr(default, name), total if name == "num_steps" else None):
            raise ConfigError(
                f"run.{name} = {getattr(run, name)}, but the stages' tokens make {total} steps of "
                f"{config.batch_tokens:,}; leave run.{name} out, or the tokens of the last stage"
            )
    return with_values(config, run={"num_steps": total, "num_epochs": None})


def mixture_of(config: RunConfig, begins_at_token: int = 0) -> tuple[str, ...]:
    """The mixture in the form of data.mixture, its own or that of the stages, where the run begins at that token."""
    own = [stage for stage in stages_of(config) if stage.mixture is not None]
    if not own:
        return config.data.mixture
    starts = [begins_at_token + (stage.first_step - own[0].first_step) * config.batch_tokens for stage in own[1:]]
    return (own[0].mixture or "", *(f"{start}: {stage.mixture}" for start, stage in zip(starts, own[1:], strict=True)))


def at_longest(config: Config) -> Config:
    """The config with all samples as long as the longest, which is what memory has to hold."""
    if not config.stage:
        return config
    length = config.longest
    portions = {
        "sequence_length": length,
        "batch_sequences": config.batch_tokens // length,
        "micro_batch_sequences": config.micro_batch_at(length),
    }
    return dataclasses.replace(config, stage=(), data=dataclasses.replace(config.data, **portions))


def describe(config: RunConfig, stage: Stage) -> str:
    """A stage for people."""
    last, samples = stage.first_step + stage.num_steps, config.batch_tokens // stage.sequence_length
    parts = [
        f"steps {stage.first_step + 1:,} to {last:,} ({stage.num_steps * config.batch_tokens:,} tokens)",
        f"{samples:,} samples of {stage.sequence_length:,}",
    ]
    if stage.first_rate is not None:
        way = "" if stage.way == "constant" else f" to {stage.last_rate:g} ({stage.way})"
        parts.append(f"learning rate {stage.first_rate:g}{way}")
    return ", ".join([*parts, *([stage.mixture] if stage.mixture else [])])

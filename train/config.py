"""Every key of a training run, with its default, unit and meaning. Imports no torch, so that --help is instant."""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from data_prep.config_file import ConfigError, UnplacedError, keys
from model.config import ModelConfig
from resume.mixture import parse_max_epochs, parse_schedule, parse_weights

# Keys that may differ from the checkpoint's when a run is resumed: they change where and how fast the same steps are
# computed, or when something is written, but not what is learned. run.num_steps is here because runs get extended; it
# moves the end of the learning-rate schedule. docs/checkpoints.md lists them.
CHANGEABLE_ON_RESUME = (
    "run.dir",
    "run.num_steps",
    "run.num_epochs",
    "run.patience",
    "run.save_every",
    "run.keep_checkpoints",
    "run.keep_every",
    "run.async_save",
    "run.max_failed_saves",
    "run.validate_every",
    "run.init_from",
    "run.init_noise",
    "run.allow_changes",
    "run.hang_timeout_s",
    "data.paths",
    "data.search",
    "data.micro_batch_sequences",
    "data.validation_sequences",
    "data.verify",
    "data.on_bad_sample",
    "data.record_samples",
    "parallel.device",
    "parallel.precision",
    "parallel.replicas",
    "parallel.reshard_after_forward",
    "parallel.compile",
    "parallel.recompute",
    "kernels.rms_norm",
    "kernels.rope",
    "kernels.swiglu",
    "kernels.cross_entropy",
    "kernels.linear_cross_entropy",
    "kernels.attention",
    "kernels.moe",
    "guard.on_nonfinite",
    "guard.on_spike",
    "guard.sigma",
    "guard.window_steps",
    "guard.max_in_a_row",
    "guard.max_rollbacks",
    "debug.inject",
)


# Keys that decide which tensors a checkpoint has; a change may be allowed where it needs no other ones.
_CHANGE_TENSORS = ("model.moe.balance", "model.moe.bias")

# Keys that define the order of samples: no checkpoint can be continued under other values. (A sequence length may
# change, if allowed, where nothing is lost by it; a mixture changes by `python -m resume reweight`.)
_FIXED_FOR_A_RUN = (
    "run.seed",
    "data.mixture",
    "data.max_epochs",
    "data.when_exhausted",
    "data.group_tokens",
    "data.window_groups",
    "run.branch_from",
    "stage",
)

# Keys, beside those of [optim], that a branch may have other values of than the run that it leaves.
_FREE_IN_A_BRANCH = (
    "run.branch_from",
    "stage",
    "data.mixture",
    "data.sequence_length",
    "data.batch_sequences",
    "data.group_tokens",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """The run: how long, where to, how often."""

    dir: str = "runs/tinyllama-1.1b"
    """Folder of checkpoints, logs and report; a run continues from the newest checkpoint it finds there."""
    seed: int = 3407
    """Decides initial weights, the order of samples, and whatever a step draws."""
    num_steps: int = 10_000
    """Optimizer steps in all."""
    num_epochs: float | None = None
    """Passes over the training shards, from which num_steps follows."""
    patience: int | None = None
    """Validations in a row without a lower held-out loss after which the run ends; the best checkpoint is kept."""
    save_every: int = 500
    """Steps between checkpoints; there is always one at the end and one when the run is told to stop."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep; older ones are deleted after a newer one is published."""
    validate_every: int = 500
    """Steps between validations; there is always one before the first step and one after the last."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides are never deleted. Default: none is kept for ever."""
    async_save: bool = True
    """Whether checkpoints are written beside the training, from a copy in (pinned) memory of the host."""
    max_failed_saves: int = 3
    """Saves in a row that may fail, on a full disk for instance, before the run stops."""
    hang_timeout_s: float = 600.0
    """Seconds without progress after which the run ends and names the rank; six times as many for a save, ten times as
    many for all that comes before a life's second step."""
    init_from: str | None = None
    """Run folder, checkpoint or Hugging Face folder whose weights a new run starts from instead of random ones; where
    it holds a dense model and [model] has experts, they start as copies of its feed-forward networks (upcycling)."""
    init_noise: float = 0.0
    """Of upcycled experts, the deviation of the noise on each matrix, as a share of its own: without any, they part
    only by what their tokens are."""
    branch_from: str | None = None
    """Checkpoint of another run, RUN/step-N, that a new run goes on from with its weights, moments and place in the
    data, under a learning rate, mixture, further data and number of steps of its own."""
    allow_changes: tuple[str, ...] = ()
    """Keys (section.key) that may differ from the checkpoint's on resume besides those that always may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What is read, in which portions."""

    paths: tuple[str, ...] = ("data/default",)
    """Folders that `make prepare-data` wrote, all with one tokenizer. A run that has begun takes in more of them by
    `python -m resume append`."""
    search: tuple[str, ...] = ()
    """Further folders to look in for shards that are not where they were; files are known by their content."""
    mixture: tuple[str, ...] = ()
    """Weights of the sources, exact in every 65,536 samples: "web=0.7 code=0.3"; later ones with the number of tokens
    from which they hold: "20e9: web=0.4 code=0.6". Default: all files are one pool, each sample once an epoch."""
    max_epochs: tuple[str, ...] = ()
    """How often samples may be seen: "4", or by source, "web=1" "code=4". Default: as often as the run wants."""
    when_exhausted: Literal["renormalise", "stop", "error"] = "renormalise"
    """When a source reaches max_epochs: the others take over its share, or the run ends there, well or as an error."""
    sequence_length: int = 2_048
    """Targets per sample, in tokens."""
    group_tokens: int | None = None
    """Tokens that stay together in the order: the longest sequence_length that the run may change to. Default: one
    sample."""
    window_groups: int = 1
    """Groups whose samples are shuffled together. With large groups this is for slow storage: whole groups are read."""
    batch_sequences: int = 1_024
    """Samples per optimizer step, over all devices; with sequence_length this makes the tokens per step."""
    micro_batch_sequences: int = 16
    """Samples per forward and backward on one device; the rest of a step's samples is accumulated."""
    isolate_documents: bool = False
    """Whether tokens see only their own document in a packed sample."""
    validation_sequences: int = 512
    """Held-out samples per validation, over all devices (fewer if the split has fewer)."""
    verify: Literal["stat", "headtail", "full"] = "stat"
    """How shards are checked at a start: unchanged by size, time and inode since they were last checked; by MD5 of both
    ends; or by the hash of the whole content."""
    on_bad_sample: Literal["stop", "quarantine"] = "stop"
    """What to do with a sample that differs from its checksum: end the run, or leave it out and write it down."""
    record_samples: bool = False
    """Whether every rank writes down which samples each step read, and whether it was applied: samples/rank-*.jsonl in
    the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSection:
    """AdamW with decay on matrices only, and its schedule."""

    peak_lr: float = 4e-4
    """Highest learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_lr_ratio; wsd: constant, then linear to min_lr_ratio over decay_steps."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a share of peak_lr."""
    warmup_steps: int = 500
    """Steps of linear warm-up from 0."""
    decay_steps: int = 1_000
    """Last steps, over which wsd decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    z_loss: float = 0.0
    """Weight of log(Z)^2 in the training loss, which keeps logits from drifting; PaLM has 1e-4."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary in the training loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """Devices, precision, and what memory is traded for."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where it is available."""
    precision: Literal["auto", "bf16", "fp32", "exact", "fp64"] = "auto"
    """bf16 computes in bf16 with fp32 master weights, moments and gradient sums; auto: bf16 on CUDA, fp32 on CPU. exact
    computes in fp32 and sums gradients in fp64: the same bits on any number of devices."""
    replicas: int = 1
    """Copies of the sharded model (HSDP): set it to the number of nodes to shard inside a node only."""
    reshard_after_forward: Literal["auto", "on", "off"] = "auto"
    """Whether gathered weights are freed between forward and backward: less memory, one more gather. auto: on where
    they would fill more than a tenth of the device."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block; auto: on CUDA only."""
    recompute: Literal["nothing", "cheap", "blocks"] = "nothing"
    """What the backward computes again instead of keeping it: of each block what is cheap (norms, RoPE, the SwiGLU
    product), or the whole block."""
    float8: bool = False
    """Whether the blocks' matrix products run in float8, on Hopper and later; needs torchao."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSection:
    """What computes each operator: torch in place of our own kernel, to find a fault. auto: what suits the device."""

    rms_norm: Literal["auto", "triton", "torch"] = "auto"
    """RMSNorm, alone and with the residual addition before it."""
    rope: Literal["auto", "triton", "torch"] = "auto"
    """Rotary positions."""
    swiglu: Literal["auto", "triton", "torch"] = "auto"
    """The SwiGLU product."""
    cross_entropy: Literal["auto", "triton", "torch"] = "auto"
    """Cross-entropy and its gradient."""
    linear_cross_entropy: Literal["auto", "chunked", "whole"] = "auto"
    """The output head together with the loss: logits of a part of the rows at a time, or of all."""
    attention: Literal["auto", "cudnn", "flash", "efficient", "math", "fa3", "fa4"] = "auto"
    """Torch's attention kernels, or FlashAttention 3 or 4 of the flash-attn project's packages."""
    moe: Literal["auto", "triton", "grouped_mm", "loop"] = "auto"
    """Experts: our grouped products, torch's, or one expert after the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardSection:
    """Steps that are not applied. skip: leave the step out, its data is passed over; rollback: load the newest
    checkpoint and skip the data from there to here; stop: end with code 70, saving nothing more."""

    on_nonfinite: Literal["skip", "rollback", "stop"] = "skip"
    """What to do with a NaN or infinite loss or gradient."""
    on_spike: Literal["off", "note", "skip", "rollback", "stop"] = "note"
    """What to do with a loss or gradient norm above mean + sigma deviations of the last steps; note: log it."""
    sigma: float = 6.0
    """Deviations above the mean that make a spike."""
    window_steps: int = 128
    """Applied steps whose mean and deviation count; before there are as many, nothing is a spike."""
    max_in_a_row: int = 5
    """Steps in a row that are skipped before the run rolls back."""
    max_rollbacks: int = 3
    """Rollbacks in the life of a run before it stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSection:
    """A part of a run; all parts have as many tokens in a step. The first begins where the run does."""

    tokens: float | None = None
    """Tokens of the stage, as whole steps. The last stage may leave them out, and has what run.num_steps leaves."""
    mixture: str | None = None
    """Weights of the sources, "web=0.7 code=0.3", in place of data.mixture. Default: those of the stage before."""
    sequence_length: int | None = None
    """Targets per sample. Default: data.sequence_length."""
    lr: float | None = None
    """Learning rate at its start. Default: where the stage before ends, at first optim.peak_lr. If no stage says
    anything about rates, the schedule of [optim] holds for the whole run."""
    lr_end: float | None = None
    """Learning rate of its last step. Default: lr."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """The way from lr to lr_end. Default: constant, or linear if there is an lr_end."""

    def __post_init__(self) -> None:
        """Refuses values that make no stage."""
        for name in ("tokens", "sequence_length", "lr"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UnplacedError(f"{name} = {value}: must be positive and finite, or left out")
        if self.lr_end is not None and not (self.lr_end >= 0 and math.isfinite(self.lr_end)):
            raise UnplacedError(f"lr_end = {self.lr_end}: must be finite and not negative, or left out")
        if (self.schedule in ("linear", "cosine")) != (self.lr_end is not None) and self.schedule is not None:
            raise UnplacedError(
                f"lr_end = {self.lr_end} with schedule = {self.schedule!r}: linear and cosine want an lr_end to go to, "
                "constant has none"
            )
        if self.mixture is not None:
            parse_weights(self.mixture)

    @property
    def has_rate(self) -> bool:
        """Whether it says anything about the learning rate."""
        return (self.lr, self.lr_end, self.schedule) != (None, None, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugSection:
    """Drills."""

    inject: tuple[str, ...] = ()
    """Faults on purpose, each once: "KIND:rank=R,step=S[,seconds=T]", KIND one of kill, terminate, stop, raise, hang,
    slow, nan, spike, disk-full, corrupt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Pretrain a language model. With no argument: TinyLlama-1.1B on what `make prepare-data` made."""

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelConfig = field(default_factory=lambda: ModelConfig.preset("tinyllama-1.1b"))
    optim: OptimSection = field(default_factory=OptimSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    kernels: KernelSection = field(default_factory=KernelSection)
    guard: GuardSection = field(default_factory=GuardSection)
    debug: DebugSection = field(default_factory=DebugSection)
    stage: tuple[StageSection, ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that make no run, each by itself and across sections."""
        positive = (
            "run.num_steps run.save_every run.keep_checkpoints run.validate_every run.max_failed_saves "
            "run.hang_timeout_s data.sequence_length data.batch_sequences data.micro_batch_sequences "
            "data.validation_sequences data.window_groups "
            "optim.peak_lr optim.decay_steps optim.eps optim.max_grad_norm parallel.replicas "
            "guard.sigma guard.window_steps guard.max_in_a_row"
        )
        for name in positive.split():
            if value_of(self, name) <= 0:
                raise ConfigError(f"{name} = {value_of(self, name)}: must be positive")
        for name in keys(type(self)):
            if isinstance(value_of(self, name), float) and not math.isfinite(value_of(self, name)):
                raise ConfigError(
                    f"{name} = {value_of(self, name)}: must be finite (a very large number means no limit)"
                )
        for name in (
            "run.seed",
            "optim.warmup_steps",
            "optim.weight_decay",
            "optim.z_loss",
            "guard.max_rollbacks",
            "run.init_noise",
        ):
            if value_of(self, name) < 0:
                raise ConfigError(f"{name} = {value_of(self, name)}: must not be negative")
        for name in ("optim.beta1", "optim.beta2", "optim.label_smoothing"):
            if not 0 <= value_of(self, name) < 1:
                raise ConfigError(f"{name} = {value_of(self, name)}: must be at least 0 and below 1")
        if not 0 <= self.optim.min_lr_ratio <= 1:
            raise ConfigError(f"optim.min_lr_ratio = {self.optim.min_lr_ratio}: must be between 0 and 1")
        if self.optim.schedule == "wsd" and self.optim.warmup_steps + self.optim.decay_steps > self.run.num_steps:
            raise ConfigError(
                f"optim.warmup_steps + optim.decay_steps = {self.optim.warmup_steps + self.optim.decay_steps} exceed "
                f"run.num_steps = {self.run.num_steps}; the wsd schedule has no room for its plateau"
            )
        if self.data.sequence_length > self.model.context_length:
            raise ConfigError(
                f"data.sequence_length = {self.data.sequence_length} exceeds model.context_length = "
                f"{self.model.context_length}; lower the first or raise the second"
            )
        for name in ("run.keep_every", "run.num_epochs", "run.patience"):
            if value_of(self, name) is not None and value_of(self, name) <= 0:
                raise ConfigError(f"{name} = {value_of(self, name)}: must be positive, or left out")
        if not self.data.paths:
            raise ConfigError("data.paths is empty; name at least one folder that `make prepare-data` wrote")
        parse_schedule(self.data.mixture)
        parse_max_epochs(self.data.max_epochs)
        self._check_stages()
        group_tokens = self.group_tokens
        if group_tokens < 1 or group_tokens % self.data.sequence_length or self.batch_tokens % group_tokens:
            raise ConfigError(
                f"data.group_tokens = {group_tokens}: must be a multiple of data.sequence_length = "
                f"{self.data.sequence_length} and divide a step's {self.batch_tokens} tokens"
            )
        known = keys(type(self))
        for name in self.run.allow_changes:
            if name not in known:
                raise ConfigError(f"run.allow_changes names {name!r}, which is no key of a run")

    def _check_stages(self) -> None:
        """Refuses stages that do not fit each other, or the rest."""
        has_mixtures = any(stage.mixture is not None for stage in self.stage)
        if has_mixtures and self.data.mixture:
            raise ConfigError(
                "data.mixture and stages with a mixture are given: move that of [data] into the first stage"
            )
        if has_mixtures and self.stage[0].mixture is None:
            raise ConfigError(
                "stage.0.mixture is missing: where a later stage has one, the first says what to begin with"
            )
        rate = self.optim.peak_lr
        for i, stage in enumerate(self.stage):
            if stage.tokens is None and i < len(self.stage) - 1:
                raise ConfigError(f"stage.{i}.tokens is missing: only the last stage may leave it to run.num_steps")
            if stage.tokens is not None and round(stage.tokens / self.batch_tokens) < 1:
                raise ConfigError(
                    f"stage.{i}.tokens = {stage.tokens:g}: less than one step of {self.batch_tokens:,} tokens "
                    "(data.batch_sequences * data.sequence_length); raise the first or lower the others"
                )
            start = stage.lr if stage.lr is not None else rate
            if start <= 0:
                raise ConfigError(f"stage.{i}.lr is missing, and the stage before ends at 0; say where to begin")
            rate = stage.lr_end if stage.lr_end is not None else start
            self._check_length(f"stage.{i}.sequence_length", self.length_of(stage))

    def _check_length(self, name: str, length: int) -> None:
        """Refuses a length that a stage cannot have."""
        if length > self.model.context_length:
            raise ConfigError(
                f"{name} = {length} exceeds model.context_length = {self.model.context_length}; lower the first or "
                "raise the second"
            )
        group_tokens = self.group_tokens
        if group_tokens % length or self.batch_tokens % group_tokens:
            raise ConfigError(
                f"{name} = {length}: lengths must divide data.group_tokens = {group_tokens} (if not given, the longest "
                f"of them), and that a step's {self.batch_tokens:,} tokens; choose lengths such as 512, 1024, 2048, or "
                "set data.group_tokens to a multiple of all"
            )
        step_groups = self.batch_tokens // group_tokens
        if length != self.data.sequence_length and step_groups % self.data.window_groups:
            raise ConfigError(
                f"{name} = {length}: a length changes at the end of a window, and a step's {step_groups} groups are "
                f"no multiple of data.window_groups = {self.data.window_groups}; set that to 1, or to a divisor"
            )

    def length_of(self, stage: StageSection) -> int:
        """Targets per sample in a stage."""
        return stage.sequence_length if stage.sequence_length is not None else self.data.sequence_length

    @property
    def longest(self) -> int:
        """The longest samples that the run has."""
        return max(self.data.sequence_length, *(self.length_of(stage) for stage in self.stage), 0)

    @property
    def group_tokens(self) -> int:
        """Tokens that stay together in the order of a run that begins."""
        return self.data.group_tokens or self.longest

    def micro_batch_at(self, length: int) -> int:
        """Samples per forward and backward at another length: as many tokens, at least one sample."""
        return max(1, self.data.micro_batch_sequences * self.data.sequence_length // length)

    @property
    def batch_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.data.batch_sequences * self.data.sequence_length

    def check_vocabulary(self, token_ids: int) -> None:
        """Refuses data with more token ids than the model has embeddings.

        Raises:
            ConfigError: model.vocab_size is too small.
        """
        if token_ids > self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {self.model.vocab_size}, but {' '.join(self.data.paths)} was encoded with "
                f"{token_ids} token ids; set --model.vocab-size {token_ids} or more"
            )

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches that each of world_size devices accumulates per step; the last ones may be partly empty."""
        return -(-self.data.batch_sequences // (world_size * self.data.micro_batch_sequences))


Config = TypeVar("Config", bound=RunConfig)


def value_of(config: object, name: str) -> Any:
    """The value of `section.key`, or of a key deeper down."""
    return functools.reduce(getattr, name.split("."), config)


def refuse_changes(config: RunConfig, stored: RunConfig, is_branch: bool = False) -> None:
    """Refuses to resume under a config that would learn something else than the checkpoint's; a branch may do more.

    Raises:
        ConfigError: names every differing key with both values.
    """
    names = [*keys(type(config)), "stage"]
    allowed = {*CHANGEABLE_ON_RESUME, *config.run.allow_changes}.difference(_FIXED_FOR_A_RUN)
    if is_branch:
        allowed |= {*_FREE_IN_A_BRANCH, *(name for name in names if name.startswith("optim."))}
    differing = [name for name in names if name not in allowed and value_of(config, name) != value_of(stored, name)]
    if differing:
        both = [f"{n} = {value_of(config, n)!r}, the checkpoint has {value_of(stored, n)!r}" for n in differing]
        remedy = "Restore the values or start a new run with another --run.dir"
        if set(differing) & set(_FREE_IN_A_BRANCH):
            remedy += " (and run.branch_from, to go on from this one's checkpoint)"
        if not set(differing) & {*_FIXED_FOR_A_RUN, *_CHANGE_TENSORS}:
            remedy += f", or accept the change with --run.allow-changes {' '.join(differing)}"
        raise ConfigError(f"the config differs from the checkpoint's: {'; '.join(both)}. {remedy}")


def with_values(config: Config, **sections: dict[str, Any]) -> Config:
    """The config with some keys replaced: with_values(config, run={"num_steps": 5})."""
    replaced = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **replaced)

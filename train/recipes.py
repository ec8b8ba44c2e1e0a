"""Every key of the kinds of training that start from a trained model. Imports no torch, so that --help is instant."""

from dataclasses import dataclass, field
from typing import Literal

from data_prep.config_file import ConfigError
from model.config import ModelConfig
from model.lora_config import LoraConfig
from train.config import DataSection, OptimSection, RunConfig, RunSection


def _run(name: str, num_epochs: float) -> RunSection:
    return RunSection(dir=f"runs/{name}", num_epochs=num_epochs, save_every=100, validate_every=50)


def _data(folder: str, batch_sequences: int = 64) -> DataSection:
    return DataSection(paths=(folder,), batch_sequences=batch_sequences, micro_batch_sequences=8)


def _optim(peak_lr: float) -> OptimSection:
    return OptimSection(peak_lr=peak_lr, warmup_steps=20, weight_decay=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneConfig(RunConfig):
    """What the kinds of training that start from a trained model have in common: its shape becomes the run's."""

    run: RunSection = field(default_factory=lambda: _run("tuned", 1))
    data: DataSection = field(default_factory=lambda: _data("data/chat"))
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimSection = field(default_factory=lambda: _optim(2e-5))


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig(TuneConfig):
    """Fine-tune a model on conversations: only what the assistant says is trained."""

    run: RunSection = field(default_factory=lambda: _run("sft", 2))
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoSection:
    """Direct preference optimisation."""

    kind: Literal["sigmoid", "ipo"] = "sigmoid"
    """The loss of a pair: DPO's, or IPO's, which does not drive sure pairs further apart."""
    beta: float = 0.1
    """How strongly the model is held to where it started."""
    label_smoothing: float = 0.0
    """Share of the pairs whose preference is taken to be wrong."""
    sft_weight: float = 0.0
    """Weight of the chosen answers' own loss per token, which keeps their likelihood from falling."""

    def __post_init__(self) -> None:
        """Refuses values out of their range."""
        if self.beta <= 0 or self.sft_weight < 0 or not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"dpo.beta = {self.beta}, dpo.sft_weight = {self.sft_weight}, dpo.label_smoothing = "
                f"{self.label_smoothing}: expected a positive beta, a weight not below 0, and a smoothing below 0.5"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig(TuneConfig):
    """Train a model to prefer the chosen of two answers (DPO, IPO)."""

    run: RunSection = field(default_factory=lambda: _run("dpo", 1))
    data: DataSection = field(default_factory=lambda: _data("data/pairs"))
    optim: OptimSection = field(default_factory=lambda: _optim(5e-6))
    dpo: DpoSection = field(default_factory=DpoSection)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSection:
    """The reward model's loss."""

    kind: Literal["end", "divergence"] = "end"
    """What is compared: the scores of both answers' last tokens, or those of all tokens from where they differ."""
    center_weight: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(TuneConfig):
    """Train a model that scores answers, from pairs of a chosen and a rejected one."""

    run: RunSection = field(default_factory=lambda: _run("reward", 1))
    data: DataSection = field(default_factory=lambda: _data("data/pairs"))
    optim: OptimSection = field(default_factory=lambda: _optim(1e-5))
    reward: RewardSection = field(default_factory=RewardSection)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoSection:
    """Groups of sampled answers, rewarded by a Python function."""

    reward: str = "reward.py:reward"
    """FILE.py:FUNCTION, called as function(prompt, text, row) -> float with the prompt's text, an answer's text, and
    the line of the input file that the prompt comes from."""
    num_samples: int = 8
    """Answers to each prompt, which are compared with each other."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained."""
    top_p: float | None = None
    """Sample only from the likeliest tokens whose probabilities together reach p."""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """How tokens are weighted: each answer alike (GRPO), each token alike (DAPO), by the longest answer (Dr. GRPO)."""
    normalise: Literal["group", "none"] = "group"
    """Whether advantages are divided by the deviation of their group."""
    num_updates: int = 1
    """Steps for which prompts are answered at once; the later of them train a model that has moved on since."""
    clip: float | None = None
    """Bounds of the ratio to the probability when it was sampled, 1 - clip and 1 + clip, for num_updates above 1."""
    clip_high: float | None = None
    """Upper bound 1 + clip_high, where it is to differ (DAPO)."""
    kl_weight: float = 0.0
    """Weight of the divergence from the model that the run starts from; above 0 that model stays in memory."""
    mask_cut_answers: bool = False
    """Whether answers that reach max_new_tokens are left out of the loss."""

    def __post_init__(self) -> None:
        """Refuses values that make no groups of answers."""
        for key, least in (("num_samples", 2), ("num_updates", 1), ("max_new_tokens", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"grpo.{key} = {getattr(self, key)}: must be at least {least}")
        if self.temperature <= 0:
            raise ConfigError(f"grpo.temperature = {self.temperature}: must be positive, or all answers are the same")
        for key in ("clip", "clip_high"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ConfigError(f"grpo.{key} = {getattr(self, key)}: must be positive, or left out")
        if self.kl_weight < 0:
            raise ConfigError(f"grpo.kl_weight = {self.kl_weight}: must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig(TuneConfig):
    """Train a model on its own answers by reinforcement, with a reward function in Python (GRPO)."""

    run: RunSection = field(default_factory=lambda: _run("grpo", 1))
    data: DataSection = field(default_factory=lambda: _data("data/prompts", 32))
    optim: OptimSection = field(default_factory=lambda: _optim(1e-6))
    grpo: GrpoSection = field(default_factory=GrpoSection)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillSection:
    """What the student learns from the teacher."""

    teacher: str = ""
    """Run folder, checkpoint or Hugging Face folder of a model with the same vocabulary, which stays in memory."""
    cached: bool = False
    """Whether the teacher's likeliest tokens are read from beside the shards, where `python -m train.teacher_cache`
    wrote them."""
    kind: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """Divergence between the two distributions of the next token."""
    beta: float = 0.5
    """Of jensen_shannon: the teacher's share of the mixture."""
    temperature: float = 1.0
    """Divides the logits of both."""
    weight: float = 0.5
    """Share of the divergence in the loss; the rest is the cross-entropy of the data."""
    weight_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the share goes to weight_end over the run."""
    weight_end: float = 0.0
    """Share at the end of the run."""
    layers: tuple[str, ...] = ()
    """Hidden states to match, as STUDENT:TEACHER numbers of layers: "5:11" "11:23"."""
    hidden_weight: float = 1.0
    """Weight of their distance."""
    hidden_kind: Literal["mse", "cosine"] = "mse"
    """Their distance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig(TuneConfig):
    """Train a model on what a larger one predicts."""

    run: RunSection = field(default_factory=lambda: _run("distill", 1))
    data: DataSection = field(default_factory=lambda: _data("data/default", 256))
    optim: OptimSection = field(default_factory=lambda: _optim(1e-4))
    distill: DistillSection = field(default_factory=DistillSection)

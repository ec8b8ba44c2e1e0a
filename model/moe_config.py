"""The shape of a mixture of experts, and how its load is balanced. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


class ModelConfigError(ValueError):
    """A model shape that cannot be built; the message names the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """Experts in place of the feed-forward network of some layers; num_experts = 0 is a dense model."""

    num_experts: int = 0
    """Routed experts per layer."""
    num_picked: int = 2
    """Experts that each token is sent to (top-k)."""
    expert_size: int = 1_024
    """Width of the SwiGLU product of one routed expert."""
    shared_size: int = 0
    """Width of the SwiGLU product that all tokens pass through beside the experts; 0 has none."""
    shared_gate: bool = False
    """Whether the shared product is multiplied by a sigmoid gate of its own (Qwen2-MoE)."""
    first_dense_layers: int = 0
    """Layers at the bottom that keep a dense feed-forward network (DeepSeek)."""
    layer_every: int = 1
    """Of the layers above those, the first has experts, and from it on every so many-th."""
    kind: Literal["picked", "chunk_soft"] = "picked"
    """picked: each token goes to its num_picked best experts; chunk_soft: experts read averages of the earlier chunks,
    a causal form of soft MoE."""
    chunk_size: int = 64
    """Tokens of a chunk of chunk_soft."""
    num_slots: int = 1
    """Slots of each expert per chunk of chunk_soft."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What makes router logits into scores: over all experts, or each by itself (DeepSeek-V3)."""
    renormalise: bool = True
    """Whether the picked scores are divided by their sum (Mixtral, Qwen3-MoE, DeepSeek-V3; not OLMoE, Qwen2-MoE). With
    num_picked = 1 the weight is then always 1, and the loss teaches the router nothing."""
    route_scale: float = 1.0
    """What the weights of the picked experts are multiplied by (DeepSeek-V3: 2.5)."""
    temperature: float = 1.0
    """What router logits are divided by."""
    sampling: bool = False
    """Whether training picks experts by Gumbel noise on the log scores, keyed by seed, step, layer and token."""
    num_groups: int = 1
    """Groups that the experts are dealt into; a token picks inside its num_picked_groups best ones."""
    num_picked_groups: int = 1
    """Groups that a token may pick experts from."""
    group_score: Literal["top2", "max"] = "top2"
    """What a group is judged by: the sum of its two best experts (DeepSeek-V3), or its best one (DeepSeek-V2)."""
    chain_length: int = 1
    """Times that a token passes through the layer's experts, with a router for each (Chain-of-Experts)."""
    chain_residual: Literal["inner", "outer", "both"] = "outer"
    """Where a chain adds. outer: each pass reads what the last one made, the last is added to the residual stream, and
    a chain of one is a plain layer; inner: each pass adds to its input, and the last sum takes the stream's place;
    both: each pass adds to its input, and the last sum is added to the stream."""
    balance: Literal["none", "sequence", "switch", "global"] = "none"
    """Auxiliary loss on the load, by the counts of each sequence; of the whole step, which costs a forward pass more;
    or of the whole step before, which costs nothing."""
    balance_weight: float = 1e-2
    """Weight of the auxiliary loss in the training loss, per layer and pass of a chain."""
    z_loss: float = 0.0
    """Weight of the router's mean logsumexp(logits)^2 in the training loss, per layer and pass; ST-MoE has 1e-3."""
    bias: Literal["none", "sign", "proportional"] = "none"
    """Balancing without a loss (DeepSeek-V3): after each step a bias on the scores, which only picks, moves towards
    equal load; by bias_rate, or by bias_rate times the relative error."""
    bias_rate: float = 1e-3
    """How far the bias moves in a step."""

    def __post_init__(self) -> None:
        """Refuses mixtures that cannot be built."""
        if self.num_experts < 0:
            raise ModelConfigError(f"model.moe.num_experts = {self.num_experts}: must not be negative")
        positive = (
            "num_picked expert_size layer_every chunk_size num_slots route_scale temperature num_groups "
            "num_picked_groups chain_length bias_rate"
        )
        for key in positive.split():
            if getattr(self, key) <= 0:
                raise ModelConfigError(f"model.moe.{key} = {getattr(self, key)}: must be positive")
        for key in ("shared_size", "first_dense_layers", "balance_weight", "z_loss"):
            if getattr(self, key) < 0:
                raise ModelConfigError(f"model.moe.{key} = {getattr(self, key)}: must not be negative")
        if not self.num_experts:
            self._check_dense()
        elif self.kind == "picked":
            self._check_picks()
        else:
            self._check_soft()
        if self.shared_gate and not self.shared_size:
            raise ModelConfigError("model.moe.shared_gate is set without model.moe.shared_size")

    def _check_dense(self) -> None:
        """What would be meant for experts that are not there."""
        set_keys = [key for key in ("shared_size", "sampling", "z_loss") if getattr(self, key)]
        set_keys += [key for key in ("balance", "bias") if getattr(self, key) != "none"]
        if set_keys:
            raise ModelConfigError(
                f"model.moe.{set_keys[0]} = {getattr(self, set_keys[0])!r} without experts; set model.moe.num_experts"
            )

    def _check_soft(self) -> None:
        for key in ("balance", "bias"):
            if getattr(self, key) != "none":
                raise ModelConfigError(
                    f'model.moe.{key} = "{getattr(self, key)}": a chunk_soft layer has no picks to balance'
                )
        if self.z_loss or self.sampling or self.chain_length > 1 or self.num_groups > 1:
            raise ModelConfigError('model.moe: z_loss, sampling, chains and groups are for kind = "picked"')

    def _check_picks(self) -> None:
        if self.num_experts % self.num_groups:
            raise ModelConfigError(
                f"model.moe.num_experts = {self.num_experts} is not a multiple of model.moe.num_groups = "
                f"{self.num_groups}"
            )
        if self.num_picked_groups > self.num_groups:
            raise ModelConfigError(
                f"model.moe.num_picked_groups = {self.num_picked_groups} of model.moe.num_groups = {self.num_groups}"
            )
        group_size = self.num_experts // self.num_groups
        if self.num_picked > group_size * self.num_picked_groups:
            raise ModelConfigError(
                f"model.moe.num_picked = {self.num_picked}: there are {group_size * self.num_picked_groups} experts to "
                "pick from (num_experts / num_groups * num_picked_groups)"
            )
        if self.num_groups > 1 and self.group_score == "top2" and group_size < 2:
            raise ModelConfigError('model.moe.group_score = "top2" needs groups of at least two experts')

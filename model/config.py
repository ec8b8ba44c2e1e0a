"""The shape of a model: everything that decides its parameters, and nothing else. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from model.moe_config import ModelConfigError, MoEConfig

TRAINING_KEYS = (
    "init",
    "init_std",
    "moe.sampling",
    "moe.balance",
    "moe.balance_weight",
    "moe.z_loss",
    "moe.bias_rate",
)
"""Keys that say how a model is trained, not what it computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek): keys and values of all heads from one small vector, the only one that is
    cached. kv_rank = 0 is grouped-query attention."""

    kv_rank: int = 0
    """Width of the vector that keys and values are made of."""
    query_rank: int = 0
    """Width of the vector that queries are made of; 0 makes them of the residual stream."""
    rope_size: int = 64
    """Width of the part of a head that RoPE rotates, whose key is common to all heads; beside model.head_size."""
    value_size: int = 128
    """Width of the values of a head."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms of those vectors (DeepSeek's, whatever model.norm_eps is)."""

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        for key in ("kv_rank", "query_rank"):
            if getattr(self, key) < 0:
                raise ModelConfigError(f"model.latent.{key} = {getattr(self, key)}: must not be negative")
        for key in ("value_size", "norm_eps"):
            if getattr(self, key) <= 0:
                raise ModelConfigError(f"model.latent.{key} = {getattr(self, key)}: must be positive")
        if self.rope_size <= 0 or self.rope_size % 2:
            raise ModelConfigError(f"model.latent.rope_size = {self.rope_size}: must be even, RoPE rotates pairs")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama-family decoder, dense or with experts. The defaults are TinyLlama-1.1B."""

    vocab_size: int = 32_000
    """Entries of the embedding, in tokens; at least the tokenizer's, a multiple of 128 is fastest."""
    hidden_size: int = 2_048
    """Width of the residual stream."""
    num_layers: int = 22
    """Transformer blocks."""
    num_heads: int = 32
    """Query heads per layer."""
    num_kv_heads: int = 4
    """Key and value heads per layer (grouped-query attention); divides num_heads."""
    head_size: int = 64
    """Width of one head; even, as RoPE rotates pairs."""
    ffn_size: int = 5_632
    """Width of the product of gate and up."""
    ffn: Literal["swiglu", "geglu", "senet"] = "swiglu"
    """Feed-forward network: SiLU gate; GELU gate, by tanh (Gemma); two SiLU-gated stages in a row (Steel-LLM)."""
    context_length: int = 2_048
    """Longest sequence the model is meant for, in tokens; generation stops there."""
    rope_base: float = 10_000.0
    """Base of the rotary angles."""
    rope_interleaved: bool = False
    """Whether RoPE rotates neighbouring elements (the paper, Meta's Llama) instead of halves of a head (Hugging Face).
    The same function up to an order of rows, which import and export restore."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output head is the input embedding."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have a bias (Qwen2)."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Whether queries and keys are RMS-normalised before RoPE: each head (Qwen3), or all as one vector (OLMo2)."""
    norms: Literal["pre", "sandwich", "output", "deepnorm"] = "pre"
    """Where a layer f is normalised: x + f(N(x)); x + N(f(N(x))) (Gemma2); x + N(f(x)) (OLMo2); N(a x + f(x)) with
    a = (2 num_layers)^(1/4) (DeepNorm)."""
    norm_offset: bool = False
    """Whether a norm's scale is 1 + its weight (Gemma)."""
    embedding_scale: float = 1.0
    """What embeddings are multiplied by (Gemma: sqrt(hidden_size))."""
    attention_scale: float | None = None
    """What attention scores are multiplied by; by default 1 / sqrt of the width of a head."""
    attention_softcap: float | None = None
    """c in c * tanh(score / c) of attention scores (Gemma2: 50)."""
    logit_softcap: float | None = None
    """c in c * tanh(logit / c) of the output (Gemma2: 30)."""
    sliding_window: int | None = None
    """Tokens that a token of a windowed layer attends to, itself included."""
    window_pattern: str = "S"
    """Which layers are windowed, from the first on, repeated: S (sliding) or L (all earlier tokens). Gemma2: "SL"."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Multi-head latent attention."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Mixture of experts."""
    head: Literal["tokens", "score"] = "tokens"
    """What the output head makes of a hidden state: logits of the next token, or one number (a reward model)."""
    init: Literal["gpt2", "tinyllama"] = "tinyllama"
    """Initialisation scheme; see model/init.py."""
    init_std: float = 0.02
    """Standard deviation of the gpt2 scheme."""

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        sizes = (
            "vocab_size hidden_size num_layers num_heads num_kv_heads head_size ffn_size context_length "
            "rope_base norm_eps init_std embedding_scale"
        )
        for key in sizes.split():
            if getattr(self, key) <= 0:
                raise ModelConfigError(f"model.{key} = {getattr(self, key)}: must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ModelConfigError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = {self.num_kv_heads}; "
                f"choose num_kv_heads among {_divisors(self.num_heads)}"
            )
        if self.head_size % 2:
            raise ModelConfigError(f"model.head_size = {self.head_size}: must be even, RoPE rotates pairs")
        for key in ("attention_scale", "attention_softcap", "logit_softcap", "sliding_window"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ModelConfigError(f"model.{key} = {getattr(self, key)}: must be positive, or left out")
        if self.head == "score" and self.tie_embeddings:
            raise ModelConfigError('model.head = "score" with model.tie_embeddings = true: a score has no embedding')
        if not self.window_pattern or set(self.window_pattern) - {"S", "L"}:
            raise ModelConfigError(f'model.window_pattern = "{self.window_pattern}": expected a string of S and L')
        if self.is_latent:
            self._check_latent()
        if self.moe.num_experts and not self.expert_layers:
            raise ModelConfigError(
                f"model.moe.first_dense_layers = {self.moe.first_dense_layers} of model.num_layers = "
                f"{self.num_layers}: no layer has experts; lower it, or set model.moe.num_experts to 0"
            )
        if self.expert_layers and self.moe.chain_residual == "inner" and self.norms != "pre":
            raise ModelConfigError(
                f'model.norms = "{self.norms}" with model.moe.chain_residual = "inner": what takes the place of the '
                'stream is not normalised; choose "pre", or another residual'
            )

    def _check_latent(self) -> None:
        if self.qkv_bias or self.qk_norm != "none" or self.num_kv_heads != self.num_heads:
            raise ModelConfigError(
                "model.latent: latent attention has a key and a value for every query head and no bias or norm of "
                "heads; set model.num_kv_heads to model.num_heads, model.qkv_bias and model.qk_norm to their defaults"
            )

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The named shape; see PRESETS."""
        if name not in PRESETS:
            raise ModelConfigError(f"model.preset = {name!r}: known presets are {', '.join(PRESETS)}")
        return PRESETS[name]

    @property
    def head_rows(self) -> int:
        """Numbers that the head makes of a hidden state."""
        return 1 if self.head == "score" else self.vocab_size

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.latent.kv_rank > 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward network is a mixture of experts."""
        moe = self.moe
        above = layer - moe.first_dense_layers
        return moe.num_experts > 0 and above >= 0 and above % moe.layer_every == 0

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(layer for layer in range(self.num_layers) if self.has_experts(layer))

    def window(self, layer: int) -> int | None:
        """Tokens that a token of this layer attends to, itself included; None: all earlier ones."""
        is_windowed = self.window_pattern[layer % len(self.window_pattern)] == "S"
        return self.sliding_window if is_windowed else None

    @property
    def query_size(self) -> int:
        """Width of all query heads side by side."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads side by side."""
        return self.num_kv_heads * self.head_size


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


PRESETS: dict[str, ModelConfig] = {
    # Zhang et al., "TinyLlama", 2024: 1,100,048,384 parameters.
    "tinyllama-1.1b": ModelConfig(),
    # Steel-LLM's size (Gu et al., 2025) with a dense FFN: its six soft-MoE experts of four 1792 x 448 matrices hold
    # exactly as many weights as one SwiGLU of width 3584.
    "steel-1b": ModelConfig(
        vocab_size=151_936,
        hidden_size=1_792,
        num_layers=18,
        num_heads=32,
        num_kv_heads=32,
        head_size=56,
        ffn_size=3_584,
        rope_base=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        init="gpt2",
    ),
    # Learns Python's surface in minutes on two CPU cores.
    "smoke": ModelConfig(
        vocab_size=4_096,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        ffn_size=512,
        context_length=256,
        tie_embeddings=True,
    ),
    # The smoke model with half of its dense network in each layer, and eight experts, two of which are as wide as the
    # other half. The scale makes up for weights that add up to one.
    "moe-smoke": ModelConfig(
        vocab_size=4_096,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_size=32,
        ffn_size=512,
        context_length=256,
        tie_embeddings=True,
        moe=MoEConfig(
            num_experts=8,
            num_picked=2,
            expert_size=128,
            shared_size=256,
            route_scale=2.0,
            balance="sequence",
            z_loss=1e-3,
        ),
    ),
    # OLMoE-1B-7B (Muennighoff et al., 2024): 6.9 B parameters, 1.3 B active.
    "moe-1b-active": ModelConfig(
        vocab_size=50_304,
        hidden_size=2_048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=16,
        head_size=128,
        ffn_size=8_192,
        context_length=4_096,
        qk_norm="full",
        init="gpt2",
        moe=MoEConfig(
            num_experts=64, num_picked=8, expert_size=1_024, renormalise=False, balance="sequence", z_loss=1e-3
        ),
    ),
    # DeepSeek-V3's parts (2024) at the smoke model's size: latent attention, a dense layer, a shared expert, sigmoid
    # scores, groups, the bias in place of a loss.
    "deepseek-smoke": ModelConfig(
        vocab_size=4_096,
        hidden_size=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=6,
        head_size=32,
        ffn_size=512,
        context_length=256,
        tie_embeddings=True,
        latent=LatentConfig(kv_rank=64, query_rank=96, rope_size=16, value_size=32),
        moe=MoEConfig(
            num_experts=16,
            num_picked=4,
            expert_size=96,
            shared_size=192,
            first_dense_layers=1,
            scores="sigmoid",
            route_scale=2.5,
            num_groups=4,
            num_picked_groups=2,
            balance="sequence",
            balance_weight=1e-4,
            bias="proportional",
            bias_rate=1e-2,
        ),
    ),
}

"""The shape of a model: everything that decides its parameters, and nothing else. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


class ModelConfigError(ValueError):
    """A model shape that cannot be built; the message names the key and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A dense Llama-family decoder. The defaults are TinyLlama-1.1B."""

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
    """Width of the SwiGLU product."""
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
    qk_norm: bool = False
    """Whether queries and keys are RMS-normalised per head before RoPE (Qwen3)."""
    init: Literal["gpt2", "tinyllama"] = "tinyllama"
    """Initialisation scheme; see model/init.py."""
    init_std: float = 0.02
    """Standard deviation of the gpt2 scheme."""

    def __post_init__(self) -> None:
        """Refuses shapes that cannot be built."""
        sizes = (
            "vocab_size hidden_size num_layers num_heads num_kv_heads head_size ffn_size context_length "
            "rope_base norm_eps init_std"
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

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """The named shape; see PRESETS."""
        if name not in PRESETS:
            raise ModelConfigError(f"model.preset = {name!r}: known presets are {', '.join(PRESETS)}")
        return PRESETS[name]

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
}

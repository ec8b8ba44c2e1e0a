"""What low-rank adapters a run trains. Imports no torch."""

from dataclasses import dataclass

from model.moe_config import ModelConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters beside frozen weights; rank = 0 trains the weights themselves."""

    rank: int = 0
    """Width of an adapter's inside; 0 has no adapters."""
    alpha: float = 16.0
    """What adapters add is multiplied by alpha / rank."""
    rank_scaled: bool = False
    """Whether it is alpha / sqrt(rank) instead, which suits ranks above about 32 (rsLoRA)."""
    dropout: float = 0.0
    """Share of an adapter's inputs that training sets to zero."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Matrices that get an adapter, in every layer, by Hugging Face's names."""

    def __post_init__(self) -> None:
        """Refuses what cannot be trained."""
        if self.rank < 0:
            raise ModelConfigError(f"lora.rank = {self.rank}: must not be negative; 0 has no adapters")
        if self.alpha <= 0:
            raise ModelConfigError(f"lora.alpha = {self.alpha}: must be positive")
        if not 0 <= self.dropout < 1:
            raise ModelConfigError(f"lora.dropout = {self.dropout}: must be at least 0 and less than 1")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ModelConfigError(f"lora.targets = {list(self.targets)}: name at least one matrix, and each once")

    @property
    def scale(self) -> float:
        """What adapters add is multiplied by this."""
        return self.alpha / (self.rank**0.5 if self.rank_scaled else self.rank)

"""Dense feed-forward networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.swiglu import swiglu
from model.config import ModelConfig


class MLP(nn.Module):
    """The network that config.ffn names, with the matrices of each stage packed into one: one GEMM a stage.

    swiglu  down(silu(gate x) * up x). Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.
    geglu   down(gelu(gate x) * up x), GELU by its tanh form (Gemma). Source: ibid.
    senet   z = silu(gate x) * up x, then silu(gate' z) * down' z, where gate' and down' are `gate_down`.
            Source: Gu et al., "Steel-LLM", 2025, section 3.2.
    """

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        size = config.ffn_size if size is None else size
        self.kind = config.ffn
        self.gate_up = nn.Linear(config.hidden_size, 2 * size, bias=False)
        if self.kind == "senet":
            self.gate_down = nn.Linear(size, 2 * config.hidden_size, bias=False)
        else:
            self.down = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.kind == "senet":
            return swiglu(self.gate_down(swiglu(self.gate_up(x_BTD))))
        return self.down((geglu if self.kind == "geglu" else swiglu)(self.gate_up(x_BTD)))


def geglu(gate_up: Tensor) -> Tensor:
    """Multiplies GELU, by its tanh form, of the first half of the last axis by the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up

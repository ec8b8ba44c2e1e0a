"""The SwiGLU feed-forward network."""

from torch import Tensor, nn

from kernels.swiglu import swiglu
from model.config import ModelConfig


class MLP(nn.Module):
    """down(silu(gate x) * up x), with gate and up packed into one matrix: one GEMM."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(swiglu(self.gate_up(x_BTD)))

"""SwiGLU product on packed gate and up projections.

    y = silu(gate) * up,  silu(z) = z * sigmoid(z),  gate = x[..., :F], up = x[..., F:]

Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5.
Shapes: x (..., 2F) -> y (..., F).
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiplies SiLU of the first half of the last axis by the second half.

    Raises:
        ValueError: the last axis is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: last axis of {tuple(gate_up.shape)} is odd; gate and up have equal widths")
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The same function in plain torch: the specification."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

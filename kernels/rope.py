"""Rotary position embedding of queries and keys, half-split layout (NeoX, Hugging Face).

    angle(p, i) = p * base^(-2 i / K)          i = 0 .. K/2 - 1
    (a, b) -> (a cos - b sin, b cos + a sin)   a = x[..., i], b = x[..., i + K/2]

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, equation 34.
Shapes: q (B, T, H, K), k (B, T, G, K), cos and sin (T, K/2); K even.
Dtypes: the rotation is computed in the wider of x's and the tables' dtype and returned in x's.
"""

import torch
from torch import Tensor


def rope(q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys by their positions, rows of the tables from `rope_tables`.

    Raises:
        ValueError: the tables are not (T, K/2) of q and k.
    """
    expected = (q_BTHK.shape[1], q_BTHK.shape[-1] // 2)
    if cos_TK.shape != expected or sin_TK.shape != expected or k_BTGK.shape[1] != expected[0]:
        raise ValueError(
            f"rope: tables {tuple(cos_TK.shape)}, {tuple(sin_TK.shape)} for q {tuple(q_BTHK.shape)}, "
            f"k {tuple(k_BTGK.shape)}; expected (T, K/2) = {expected}"
        )
    return rope_reference(q_BTHK, k_BTGK, cos_TK, sin_TK)


def rope_reference(q_BTHK: Tensor, k_BTGK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The same function in plain torch: the specification."""
    return _rotate(q_BTHK, cos_TK, sin_TK), _rotate(k_BTGK, cos_TK, sin_TK)


def rope_tables(
    positions_T: Tensor, head_size: int, base: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, K/2) of the angles of the given positions.

    Dtypes: angles in fp32 as every Llama checkpoint was trained with, in fp64 when asked for fp64 tables.
    """
    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponent_K = torch.arange(0, head_size, 2, dtype=angle_dtype, device=positions_T.device) / head_size
    angles_TK = positions_T.to(angle_dtype)[:, None] * (1.0 / base**exponent_K)
    return angles_TK.cos().to(dtype), angles_TK.sin().to(dtype)


def _rotate(x_BTHK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    cos, sin = cos_TK[:, None, :], sin_TK[:, None, :]
    a, b = x_BTHK.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BTHK.dtype)

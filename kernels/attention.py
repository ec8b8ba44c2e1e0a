"""Causal grouped-query attention behind one contract: flash-attn on CUDA where it is installed, torch's SDPA elsewhere.

    o[t, h] = sum_s softmax_s(q[t, h] . k[s, g(h)] / sqrt(K)) v[s, g(h)],   g(h) = floor(h G / H)

over the keys s that t may see: s <= t (positions counted from the end, so that new queries continue a cache) and, with
document boundaries, s in t's own document.

Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (grouped queries); Dao 2023 (flash-attn 2).
Shapes: q (B, T, H, K); k, v (B, S, G, K), S >= T, H a multiple of G -> o (B, T, H, K).
"""

import dataclasses
import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class DocumentBoundaries:
    """Which tokens of a packed batch belong together, in the two forms the implementations want.

    Shapes: ids_BT int32, equal ids = same document; cumulative_lengths (documents + 1,) int32 over the B*T tokens in
    row-major order, rows always starting a document; longest: tokens of the longest document.
    """

    ids_BT: Tensor
    cumulative_lengths: Tensor
    longest: int

    def to(self, device: torch.device) -> "DocumentBoundaries":
        """The same boundaries on another device."""
        return DocumentBoundaries(
            self.ids_BT.to(device, non_blocking=True),
            self.cumulative_lengths.to(device, non_blocking=True),
            self.longest,
        )

    def pinned(self) -> "DocumentBoundaries":
        """The same boundaries in page-locked memory."""
        return DocumentBoundaries(self.ids_BT.pin_memory(), self.cumulative_lengths.pin_memory(), self.longest)


def document_boundaries(tokens_BT: Tensor, eos_id: int) -> DocumentBoundaries:
    """Finds documents in packed rows: one starts at each row's start and after each EOS (which closes its document)."""
    starts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    starts_BT[:, 1:] = tokens_BT[:, :-1] == eos_id
    starts = torch.nonzero(starts_BT.flatten()).flatten().to(torch.int32)
    ends = torch.tensor([tokens_BT.numel()], dtype=torch.int32, device=tokens_BT.device)
    cumulative_lengths = torch.cat((starts, ends))
    longest = int(cumulative_lengths.diff().max())
    return DocumentBoundaries(starts_BT.flatten().cumsum(0).view_as(starts_BT).int(), cumulative_lengths, longest)


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, boundaries: DocumentBoundaries | None = None) -> Tensor:
    """Attends causally, inside documents when boundaries are given.

    Raises:
        ValueError: head counts or lengths do not fit, or boundaries are given with a cache (S > T).
    """
    _check(q_BTHK, k_BSGK, v_BSGK, boundaries)
    if q_BTHK.is_cuda and q_BTHK.dtype in (torch.bfloat16, torch.float16) and has_flash_attn():
        if boundaries is not None:
            return _flash_documents(q_BTHK, k_BSGK, v_BSGK, boundaries)  # pyright: ignore[reportCallIssue]
        return _flash(q_BTHK, k_BSGK, v_BSGK)
    return attention_reference(q_BTHK, k_BSGK, v_BSGK, boundaries)


def attention_reference(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, boundaries: DocumentBoundaries | None = None
) -> Tensor:
    """The same function by torch's scaled_dot_product_attention: the specification."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    mask = _mask(num_queries, num_keys, boundaries, q_BTHK.device)
    if mask is not None and q_BTHK.is_cuda:
        # Of CUDA's fused kernels only the memory-efficient one takes a mask, and it wants as many keys as queries.
        groups = q_BTHK.shape[2] // k_BSGK.shape[2]
        k_BSGK, v_BSGK = k_BSGK.repeat_interleave(groups, dim=2), v_BSGK.repeat_interleave(groups, dim=2)
    o_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return o_BHTK.transpose(1, 2)


@functools.cache
def has_flash_attn() -> bool:
    """Whether the optional flash-attn package is installed."""
    return importlib.util.find_spec("flash_attn") is not None


def _mask(num_queries: int, num_keys: int, boundaries: DocumentBoundaries | None, device) -> Tensor | None:
    """True where a query may look; None where SDPA's own causal rule says the same."""
    if boundaries is None and (num_queries in (1, num_keys)):
        return None
    allowed_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if boundaries is None:
        return allowed_TS
    same_document_BTT = boundaries.ids_BT[:, :, None] == boundaries.ids_BT[:, None, :]
    return (allowed_TS & same_document_BTT)[:, None]


def _flash(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return flash_attn_func(q_BTHK, k_BSGK, v_BSGK, causal=True)


@torch.compiler.disable  # the number of documents and the longest one differ in every batch: each would be compiled
def _flash_documents(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, boundaries: DocumentBoundaries) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    lengths, longest = boundaries.cumulative_lengths, boundaries.longest
    o_MHK = flash_attn_varlen_func(
        q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1),
        lengths, lengths, longest, longest, causal=True,
    )  # fmt: skip
    return o_MHK.view_as(q_BTHK)


def _check(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, boundaries: DocumentBoundaries | None) -> None:
    num_queries, num_heads = q_BTHK.shape[1:3]
    num_keys, num_kv_heads = k_BSGK.shape[1:3]
    if num_heads % num_kv_heads or k_BSGK.shape != v_BSGK.shape or num_keys < num_queries:
        raise ValueError(
            f"attention: q {tuple(q_BTHK.shape)}, k {tuple(k_BSGK.shape)}, v {tuple(v_BSGK.shape)}; expected k and v "
            "of one shape, at least as many keys as queries, and query heads a multiple of key heads"
        )
    if boundaries is not None and num_keys != num_queries:
        raise ValueError("attention: document boundaries are for packed rows, not for a cache of earlier keys")

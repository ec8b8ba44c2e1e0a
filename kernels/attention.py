"""Causal grouped-query attention behind one contract: torch's fused kernels, chosen by device and by config.

    o[t, h] = sum_s softmax_s(cap(scale q[t, h] . k[s, g(h)])) v[s, g(h)],   g(h) = floor(h G / H)

over the keys s that t may see: s <= t (positions counted from the end, so that new queries continue a cache), with a
window s > t - window, with document boundaries s in t's own document, and none that is marked invisible. scale is
1 / sqrt(K) unless it is given; cap(z) = c tanh(z / c) where there is a soft cap c, else z.

Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (grouped queries); Beltagy et al. 2020 (windows); Dao 2023
(flash-attn 2); Gemma Team, "Gemma 2", 2024 (soft caps).
Shapes: q (B, T, H, K); k (B, S, G, K), v (B, S, G, V), S >= T, H a multiple of G -> o (B, T, H, V).
"""

import contextlib
import dataclasses
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from kernels.launch import KernelError, chosen, sum_dtype

# Since torch 2.12 fewer key heads have to be announced.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Packages of the flash-attn project that torch can run in place of its own copy of FlashAttention 2.
_PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


@dataclasses.dataclass(frozen=True, slots=True)
class DocumentBoundaries:
    """Which tokens of a packed batch belong together, in the two forms the implementations want.

    Shapes: ids_BT int32, equal ids = same document; cumulative_lengths (documents + 1,) int32 over the B*T tokens in
    row-major order, rows always starting a document.
    """

    ids_BT: Tensor
    cumulative_lengths: Tensor

    def to(self, device: torch.device) -> "DocumentBoundaries":
        """The same boundaries on another device."""
        cumulative_lengths = self.cumulative_lengths.to(device, non_blocking=True)
        # The number of documents differs in every batch: without this, each would be compiled anew.
        torch._dynamo.mark_dynamic(cumulative_lengths, 0)
        return DocumentBoundaries(self.ids_BT.to(device, non_blocking=True), cumulative_lengths)

    def pinned(self) -> "DocumentBoundaries":
        """The same boundaries in page-locked memory."""
        return DocumentBoundaries(self.ids_BT.pin_memory(), self.cumulative_lengths.pin_memory())


def boundaries_from_starts(starts_BT: Tensor) -> DocumentBoundaries:
    """Boundaries of documents that begin where `starts` (B, T) is true, as it is at the start of each row."""
    starts = torch.nonzero(starts_BT.flatten()).flatten().to(torch.int32)
    ends = torch.tensor([starts_BT.numel()], dtype=torch.int32, device=starts_BT.device)
    return DocumentBoundaries(starts_BT.flatten().cumsum(0).view_as(starts_BT).int(), torch.cat((starts, ends)))


def document_boundaries(tokens_BT: Tensor, eos_id: int) -> DocumentBoundaries:
    """Finds documents in packed rows: one starts at each row's start and after each EOS (which closes its document)."""
    starts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    starts_BT[:, 1:] = tokens_BT[:, :-1] == eos_id
    return boundaries_from_starts(starts_BT)


@contextlib.contextmanager
def attention_by(choice: str, device: torch.device) -> Iterator[None]:
    """What attention runs by, in the order of preference that this choice means on this device.

    auto: on Hopper and later FlashAttention 3 where the flash-attn project's package for it is installed, else cuDNN,
    which is ahead of torch's own FlashAttention 2 there; torch's own order elsewhere. A kernel that cannot run a case
    leaves it to the next one.

    Raises:
        KernelError: the choice's package is not installed, or there is no CUDA device for it.
    """
    if device.type != "cuda":
        if choice not in ("auto", "math"):
            raise KernelError(f'kernels.attention = "{choice}" is for CUDA devices, this run is on the {device.type}')
        yield
        return
    if choice == "auto":
        is_hopper = torch.cuda.get_device_capability(device)[0] >= 9
        choice = ("fa3" if _is_installed(_PACKAGES["fa3"]) else "cudnn") if is_hopper else "flash"
    if choice in _PACKAGES:
        if not _is_installed(_PACKAGES[choice]):
            raise KernelError(
                f'kernels.attention = "{choice}" needs the package {_PACKAGES[choice]} of the flash-attn project; '
                'install it, or choose "cudnn" or "flash"'
            )
        activate_flash_attention_impl(choice.upper())
        choice = "flash"
    others = [name for name in ("flash", "efficient", "math") if name != choice]
    with sdpa_kernel([_BACKENDS[name] for name in (choice, *others)], set_priority=True):
        yield


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    boundaries: DocumentBoundaries | None = None,
    *,
    visible_BS: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attends causally, inside documents when boundaries are given, to `window` tokens at most, its own included, and
    only to keys that are visible, of which every query needs one.

    Raises:
        ValueError: head counts or lengths do not fit, boundaries are given with a cache (S > T), or window or soft_cap
            is not positive.
    """
    _check(q_BTHK, k_BSGK, v_BSGV, boundaries, window, soft_cap)
    if window is not None and window >= k_BSGK.shape[1]:
        window = None
    is_half = q_BTHK.dtype in (torch.bfloat16, torch.float16)
    has_own_form = boundaries is not None or (window is not None and q_BTHK.shape[1] == k_BSGK.shape[1])
    can_flash = q_BTHK.is_cuda and is_half and soft_cap is None and v_BSGV.shape[-1] <= q_BTHK.shape[-1]
    if has_own_form and can_flash and visible_BS is None and chosen("attention") not in ("efficient", "math"):
        return _by_document(q_BTHK, k_BSGK, v_BSGV, boundaries, window=window, scale=scale)
    return attention_reference(
        q_BTHK, k_BSGK, v_BSGV, boundaries, visible_BS=visible_BS, window=window, scale=scale, soft_cap=soft_cap
    )


def attention_reference(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    boundaries: DocumentBoundaries | None = None,
    *,
    visible_BS: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """The same function by torch's scaled_dot_product_attention, which has no soft cap: the specification."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSGK.shape[1]
    mask = _mask(num_queries, num_keys, boundaries, window, q_BTHK.device, visible_BS)
    if soft_cap is not None:
        return _capped(q_BTHK, k_BSGK, v_BSGV, mask, scale or q_BTHK.shape[-1] ** -0.5, soft_cap)
    if mask is not None and num_queries == 1:
        return _one_query(q_BTHK, k_BSGK, v_BSGV, mask, scale)
    if mask is not None and q_BTHK.is_cuda:
        # Of CUDA's fused kernels only the memory-efficient one takes a mask, and it wants as many keys as queries.
        k_BSGK, v_BSGV = _for_every_query(q_BTHK, k_BSGK, v_BSGV)
    o_BHTV = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return o_BHTV.transpose(1, 2)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _mask(
    num_queries: int,
    num_keys: int,
    boundaries: DocumentBoundaries | None,
    window: int | None,
    device: torch.device,
    visible_BS: Tensor | None = None,
) -> Tensor | None:
    """True where a query may look; None where SDPA's own causal rule says the same."""
    if window is not None and window >= num_keys:
        window = None
    if boundaries is None and window is None and visible_BS is None and num_queries in (1, num_keys):
        return None
    own = num_keys - num_queries  # column of the first query's own key
    allowed_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(own)
    if window is not None:
        allowed_TS = allowed_TS.triu(own - window + 1)
    if boundaries is None and visible_BS is None:
        return allowed_TS
    allowed_BTS = allowed_TS[None]
    if boundaries is not None:
        allowed_BTS = allowed_BTS & (boundaries.ids_BT[:, :, None] == boundaries.ids_BT[:, None, :])
    if visible_BS is not None:
        allowed_BTS = allowed_BTS & visible_BS[:, None]
    return allowed_BTS[:, None]


def _one_query(q_B1HK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Of one token: heads that share keys become the queries of one head, so that no key has to be repeated."""
    q_BGTK = q_B1HK[:, 0].unflatten(1, (k_BSGK.shape[2], -1))
    o_BGTV = F.scaled_dot_product_attention(
        q_BGTK, k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return o_BGTV.flatten(1, 2)[:, None]


def _for_every_query(q_BTHK: Tensor, *kv_BSGK: Tensor) -> list[Tensor]:
    """Keys and values repeated, so that each query head has its own."""
    return [part.repeat_interleave(q_BTHK.shape[2] // part.shape[2], dim=2) for part in kv_BSGK]


def _capped(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask: Tensor | None, scale: float, soft_cap: float
) -> Tensor:
    """Attention with soft-capped scores, which are held whole: O(T S) memory."""
    k_BSHK, v_BSHV = _for_every_query(q_BTHK, k_BSGK, v_BSGV)
    dtype = sum_dtype(q_BTHK)  # a score of 50 in bf16 is off by 0.1
    scores_BHTS = (scale * q_BTHK.to(dtype)).transpose(1, 2) @ k_BSHK.to(dtype).permute(0, 2, 3, 1)
    scores_BHTS = soft_cap * torch.tanh(scores_BHTS / soft_cap)
    num_queries, num_keys = scores_BHTS.shape[2:]
    if mask is None and num_queries > 1:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BTHK.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, float("-inf"))
    weights_BHTS = scores_BHTS.softmax(dim=-1).to(v_BSHV.dtype)
    return (weights_BHTS @ v_BSHV.transpose(1, 2)).transpose(1, 2)


def _by_document(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    boundaries: DocumentBoundaries | None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention over rows of documents of any lengths (of whole rows without boundaries), without a mask."""
    # The longest document would do as a bound, but each length would be compiled; T costs blocks that end at once.
    batch_size, longest, _, head_size = q_BTHK.shape
    if boundaries is not None:
        lengths = boundaries.cumulative_lengths
    else:
        lengths = longest * torch.arange(batch_size + 1, dtype=torch.int32, device=q_BTHK.device)
    value_size = v_BTGV.shape[-1]
    v_BTGK = F.pad(v_BTGV, (0, head_size - value_size)) if value_size < head_size else v_BTGV
    earlier = -1 if window is None else window - 1
    o_MHK = varlen_attn(
        q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1),
        lengths, lengths, longest, longest, scale=scale, window_size=(earlier, 0), **_GROUPED,
    )  # fmt: skip
    assert isinstance(o_MHK, Tensor)  # no auxiliary results were asked for
    return o_MHK.view_as(q_BTHK)[..., :value_size]


def _check(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    boundaries: DocumentBoundaries | None,
    window: int | None,
    soft_cap: float | None,
) -> None:
    num_queries, num_heads, head_size = q_BTHK.shape[1:]
    num_keys, num_kv_heads = k_BSGK.shape[1:3]
    if num_heads % num_kv_heads or k_BSGK.shape != (*v_BSGV.shape[:3], head_size) or num_keys < num_queries:
        raise ValueError(
            f"attention: q {tuple(q_BTHK.shape)}, k {tuple(k_BSGK.shape)}, v {tuple(v_BSGV.shape)}; expected k and v "
            "of one shape (v's heads may have another width), at least as many keys as queries, and query heads a "
            "multiple of key heads"
        )
    if boundaries is not None and num_keys != num_queries:
        raise ValueError("attention: document boundaries are for packed rows, not for a cache of earlier keys")
    for name, value in (("window", window), ("soft_cap", soft_cap)):
        if value is not None and value <= 0:
            raise ValueError(f"attention: {name} = {value}; expected a positive number, or None")

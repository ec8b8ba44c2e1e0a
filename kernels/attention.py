"""Causal grouped-query attention behind one contract: torch's fused kernels, chosen by device and by config.

    o[t, h] = sum_s softmax_s(q[t, h] . k[s, g(h)] / sqrt(K)) v[s, g(h)],   g(h) = floor(h G / H)

over the keys s that t may see: s <= t (positions counted from the end, so that new queries continue a cache) and, with
document boundaries, s in t's own document.

Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (grouped queries); Dao 2023 (flash-attn 2).
Shapes: q (B, T, H, K); k, v (B, S, G, K), S >= T, H a multiple of G -> o (B, T, H, K).
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

from kernels.launch import KernelError, chosen

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


def document_boundaries(tokens_BT: Tensor, eos_id: int) -> DocumentBoundaries:
    """Finds documents in packed rows: one starts at each row's start and after each EOS (which closes its document)."""
    starts_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    starts_BT[:, 0] = True
    starts_BT[:, 1:] = tokens_BT[:, :-1] == eos_id
    starts = torch.nonzero(starts_BT.flatten()).flatten().to(torch.int32)
    ends = torch.tensor([tokens_BT.numel()], dtype=torch.int32, device=tokens_BT.device)
    return DocumentBoundaries(starts_BT.flatten().cumsum(0).view_as(starts_BT).int(), torch.cat((starts, ends)))


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


def attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, boundaries: DocumentBoundaries | None = None) -> Tensor:
    """Attends causally, inside documents when boundaries are given.

    Raises:
        ValueError: head counts or lengths do not fit, or boundaries are given with a cache (S > T).
    """
    _check(q_BTHK, k_BSGK, v_BSGK, boundaries)
    is_half = q_BTHK.dtype in (torch.bfloat16, torch.float16)
    if boundaries is not None and q_BTHK.is_cuda and is_half and chosen("attention") not in ("efficient", "math"):
        return _by_document(q_BTHK, k_BSGK, v_BSGK, boundaries)
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


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _mask(num_queries: int, num_keys: int, boundaries: DocumentBoundaries | None, device) -> Tensor | None:
    """True where a query may look; None where SDPA's own causal rule says the same."""
    if boundaries is None and (num_queries in (1, num_keys)):
        return None
    allowed_TS = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if boundaries is None:
        return allowed_TS
    same_document_BTT = boundaries.ids_BT[:, :, None] == boundaries.ids_BT[:, None, :]
    return (allowed_TS & same_document_BTT)[:, None]


def _by_document(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, boundaries: DocumentBoundaries) -> Tensor:
    """FlashAttention over rows of documents of any lengths, without a mask."""
    # The longest document would do as a bound, but each length would be compiled; T costs blocks that end at once.
    lengths, longest = boundaries.cumulative_lengths, q_BTHK.shape[1]
    o_MHK = varlen_attn(
        q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1),
        lengths, lengths, longest, longest, window_size=(-1, 0), **_GROUPED,
    )  # fmt: skip
    assert isinstance(o_MHK, Tensor)  # no auxiliary results were asked for
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

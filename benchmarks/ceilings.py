"""The least time that a training step can take on this device, from what it was measured to do in this process.

    floor = GEMMs on the model's own shapes + the fastest attention, both forward and backward
          + the bytes that must be moved outside of them / the bandwidth of a copy

Floor efficiency is the floor over the measured step: unlike MFU it does not depend on a data sheet, nor on how much of
the model's work the device is good at.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from benchmarks.timing import Call, Clock, DeviceLostError, warm_up
from kernels.attention import attention, attention_by
from model.config import ModelConfig
from model.flops import num_matmul_params, num_params

_CEILING_SIZE = 8_192
_CEILING_SECONDS = 2.0
_COPY_BYTES = 1 << 30
_ROUNDS = 15
_WARM_UP_S = 0.1
_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (B, T, H, K), k, v (B, T, G, K)) -> (B, T, H, K), causal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """What the device did, in bf16 on random numbers."""

    copy_bytes_per_s: float
    """Read and written, of a large copy."""
    matmul_flops_per_s: float
    """8192^3, sustained."""
    tokens: int
    """Of the micro-batch that the following were measured with."""
    gemm_s: float
    """All matrix products of a micro-batch, forward and backward, each at its own shape."""
    attention_s: dict[str, float]
    """All attention layers of a micro-batch, forward and backward, by implementation."""

    def gemm_flops_per_s(self, config: ModelConfig) -> float:
        """Over all of the model's shapes."""
        return 6 * num_matmul_params(config) * self.tokens / self.gemm_s

    def floor_s(self, config: ModelConfig, tokens: int) -> dict[str, float]:
        """The parts of the least time of an optimizer step of so many tokens."""
        share = tokens / self.tokens
        return {
            "gemm": self.gemm_s * share,
            "attention": min(self.attention_s.values()) * share,
            "elementwise": minimum_bytes_per_token(config) * tokens / self.copy_bytes_per_s,
            "optimizer": minimum_bytes_per_step(config) / self.copy_bytes_per_s,
        }


def minimum_bytes_per_token(config: ModelConfig, itemsize: int = 2) -> int:
    """Bytes that forward and backward move outside of GEMMs and attention if everything is fused that can be.

    Per layer: two residual additions with norm, each reading x and delta and writing both results, in the backward
    likewise; RoPE on q and k both ways; SwiGLU (2 F in, F out), backward 3 F in, 2 F out. Once: cross-entropy reads the
    logits twice and writes their gradient; embedding and final norm.
    """
    d, f = config.hidden_size, config.ffn_size
    per_layer = 2 * (4 + 4) * d + 4 * (config.query_size + config.kv_size) + (3 + 5) * f
    return itemsize * (config.num_layers * per_layer + 3 * config.vocab_size + 13 * d)


def minimum_bytes_per_step(config: ModelConfig) -> int:
    """Bytes that clipping and AdamW move: the norm reads fp32 gradients; the update reads weights, gradients and both
    moments, and writes all but the gradients, and a bf16 copy of the weights.
    """
    return num_params(config) * (4 + 4 * 4 + 3 * 4 + 2)


def measure_on_gpu(config: ModelConfig, sequences: int, length: int) -> Ceilings:
    """Measures the current CUDA device, with micro-batches of sequences x length tokens.

    Raises:
        RuntimeError: no attention runs, the device has too little memory, or answers no more.
    """
    from benchmarks.cuda_clock import CudaClock, copy_ceiling, matmul_ceiling

    clock = CudaClock()
    with clock.in_use():
        size = _CEILING_SIZE
        matmul = matmul_ceiling(clock, size, size, size, _CEILING_SECONDS)
        copy = copy_ceiling(clock).at(2 * _COPY_BYTES)
        device = torch.device("cuda")
        # After the sustained product, so that the clocks are those of a device at work.
        gemm_s = gemm_seconds(clock, config, sequences * length, device, torch.bfloat16)
        attention_s = attention_seconds(clock, config, sequences, length, device, torch.bfloat16)
    clock.release()
    restore_attention()
    return Ceilings(
        copy_bytes_per_s=copy,
        matmul_flops_per_s=matmul,
        tokens=sequences * length,
        gemm_s=gemm_s,
        attention_s=attention_s,
    )


def restore_attention() -> None:
    """Undoes what `attention_by` does to the whole process: torch's flash kernel is its own again, for other rows."""
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()


def gemm_shapes(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, outputs, inputs) of the model's linear layers."""
    d, f, layers = config.hidden_size, config.ffn_size, config.num_layers
    return [
        (layers, config.query_size + 2 * config.kv_size, d),
        (layers, d, config.query_size),
        (layers, 2 * f, d),
        (layers, d, f),
        (1, config.vocab_size, d),
    ]


def gemm_seconds(clock: Clock, config: ModelConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """All linear layers on so many tokens: forward, gradient of the input, gradient of the weight."""
    total_s = 0.0
    for count, num_outputs, num_inputs in gemm_shapes(config):
        x, w, dy = (
            _random(shape, device, dtype)
            for shape in ((tokens, num_inputs), (num_outputs, num_inputs), (tokens, num_outputs))
        )
        y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
        total_s += count * sum(
            _seconds(clock, call)
            for call in (
                lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y),
                lambda dy=dy, w=w, dx=dx: torch.mm(dy, w, out=dx),
                lambda dy=dy, x=x, dw=dw: torch.mm(dy.T, x, out=dw),
            )
        )
        del x, w, dy, y, dx, dw
        clock.release()
    return total_s


def attention_seconds(
    clock: Clock, config: ModelConfig, sequences: int, length: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """All attention layers, forward and backward, by each implementation that runs here."""
    found: dict[str, float] = {}
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (
        _random((sequences, length, num_heads, config.head_size), device, dtype).requires_grad_() for num_heads in heads
    )
    gradient = _random(q.shape, device, dtype)
    for name, ways in _implementations().items():
        for attend in ways:

            def forward_and_backward(attend: Attend = attend) -> Sequence[Tensor]:
                return torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch says at length why a backend cannot run
                    seconds = config.num_layers * _seconds(clock, forward_and_backward)
            except DeviceLostError:
                raise
            except RuntimeError:
                continue  # not here, or not for grouped heads
            found[name] = min(seconds, found.get(name, math.inf))
        clock.release()
    if not found:
        raise RuntimeError("no attention ran")
    return found


def _implementations() -> Mapping[str, Sequence[Attend]]:
    """Each with its ways to take grouped heads: as they are, or repeated."""
    ways: dict[str, Sequence[Attend]] = {
        name: [_sdpa(backend, is_grouped=True), _sdpa(backend, is_grouped=False)] for name, backend in _BACKENDS.items()
    }
    return {**ways, "as a run chooses": [_chosen]}


def _sdpa(backend: SDPBackend, is_grouped: bool) -> Attend:
    def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        if not is_grouped:
            groups = q_BTHK.shape[2] // k_BTGK.shape[2]
            k_BTGK, v_BTGK = (x.repeat_interleave(groups, dim=2) for x in (k_BTGK, v_BTGK))
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped).transpose(1, 2)

    return attend


def _chosen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    with attention_by("auto", q_BTHK.device):
        return attention(q_BTHK, k_BTGK, v_BTGK)


def _random(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    # A generator of its own: the default one keeps the state of a graph's capture that failed.
    return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))


def _seconds(clock: Clock, call: Call) -> float:
    timed = clock.prepare([call], None)
    warm_up({"": timed}, _WARM_UP_S)  # under load the clock falls to what it can hold
    return statistics.median(timed.seconds() for _ in range(_ROUNDS))

"""transformers' Llama in the step benchmark, in its strongest ordinary forms.

All: fp32 weights, autocast to bf16 on a GPU, SDPA with its causal flag, torch's own clipping, fused AdamW, a pinned
DataLoader, losses fetched every ten steps. "compiled": every layer, the final norm and head with loss through
torch.compile. Not the model as a whole: inside of a graph transformers (5.17, masking_utils) builds a mask, and with a
mask SDPA has no flash kernel. "liger": Liger's RMSNorm, RoPE, SwiGLU and linear + cross-entropy in the places where it
patches them, uncompiled, because its kernels opt out of it.
"""

import contextlib
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ours_step import peak_bytes, reset_peak, wait_for
from benchmarks.step_data import PeerBatches
from benchmarks.step_rounds import AbsentError, Block
from benchmarks.step_state import DeviceMemory, InitialValues
from model.convert import hugging_face_config, to_hugging_face
from train.config import RunConfig

Kind = Literal["eager", "compiled", "liger"]
HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (B, T, D), head (V, D), targets (B, T)) -> mean loss."""

_LOG_EVERY = 10
# What Liger replaces in the module of transformers: for all models of the process, so only while its row runs.
_LIGER_NAMES = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


class PeerRunner:
    """A plain training loop around transformers' model."""

    def __init__(
        self,
        kind: Kind,
        config: RunConfig,
        values: InitialValues,
        batches: PeerBatches,
        device: torch.device,
        backend: str = "inductor",
    ):
        """Builds the model on the device.

        Raises:
            AbsentError: transformers or Liger is not installed.
        """
        self._config, self._batches, self._device = config, batches, device
        self._values = to_hugging_face(config.model, values)
        self._model = _model(config, device)
        self._patches, self._head_loss = _prepared(self._model, kind, backend)
        self._optimizer = _optimizer(self._model, config)
        self._memory = DeviceMemory()
        self._log = Path(config.run.dir) / f"{kind}.jsonl"

    def block(self, num_untimed: int, num_spans: int, span_steps: int) -> Block:
        """So many steps, from the initial weights on."""
        self._restart()
        reset_peak(self._device)
        times_s: list[float] = []
        losses: list[float] = []
        waiting: list[Tensor] = []

        def mark() -> None:
            wait_for(self._device)
            times_s.append(time.perf_counter())

        num_steps = num_untimed + num_spans * span_steps
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._patched(), self._log.open("w", encoding="utf-8") as log:
            for i, rows in enumerate(self._batches.first(num_steps)):
                if i >= num_untimed and (i - num_untimed) % span_steps == 0:
                    mark()
                waiting.append(self._step(rows))
                if (i + 1) % _LOG_EVERY == 0 or i + 1 == num_steps:
                    losses += (fetched := torch.stack(waiting).tolist())
                    log.write(json.dumps({"step": i + 1, "losses": fetched}) + "\n")
                    log.flush()
                    waiting.clear()
            mark()
        span_s = [(end - start) / span_steps for start, end in itertools.pairwise(times_s)]
        return Block(span_s=span_s, losses=dict(enumerate(losses, 1)), peak_bytes=peak_bytes(self._device))

    def rest(self) -> None:
        """Gives back the memory of weights and moments."""
        self._optimizer.zero_grad(set_to_none=True)
        self._memory.give_back([p.detach() for p in self._model.parameters()])
        self._memory.give_back(self._moments())

    def drop(self) -> None:
        """Gives back the memory for good."""
        self.rest()

    def _restart(self) -> None:
        self._memory.take()
        for moment in self._moments():
            moment.zero_()
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._values[name], non_blocking=True)

    def _moments(self) -> list[Tensor]:
        return [value for state in self._optimizer.state.values() for value in state.values()]

    def _step(self, rows: Tensor) -> Tensor:
        """One optimizer step; its mean loss, on the device."""
        on_device = rows.to(self._device, non_blocking=True)
        tokens, targets = on_device[:, :-1], on_device[:, 1:]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            hidden = self._model.model(input_ids=tokens, use_cache=False).last_hidden_state
            loss = self._head_loss(hidden, self._model.lm_head.weight, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optim.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        if not self._patches:
            yield
            return
        from transformers.models.llama import modeling_llama

        before = {name: getattr(modeling_llama, name) for name in self._patches}
        try:
            for name, value in self._patches.items():
                setattr(modeling_llama, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(modeling_llama, name, value)


def _model(config: RunConfig, device: torch.device) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise AbsentError("transformers is not installed")
    import transformers
    from transformers.models.llama import modeling_llama

    table = hugging_face_config(config.model, eos_id=None, dtype="fp32")
    table.pop("architectures")
    hf_config = transformers.LlamaConfig(**{**table, "attn_implementation": "sdpa", "use_cache": False})
    # Without drawing weights that are replaced at once.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config).float()
    model.to_empty(device=device)
    model.tie_weights()
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config=hf_config).to(device)
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    return model.train()


def _prepared(model: Any, kind: Kind, backend: str) -> tuple[dict[str, Any], HeadLoss]:
    """Changes the model in the way of a kind; what is to be patched while it runs, and its loss."""
    if kind == "compiled":
        for module in (*model.model.layers, model.model.norm):
            module.compile(dynamic=False, backend=backend)
        return {}, torch.compile(_head_loss, dynamic=False, backend=backend)
    if kind == "liger":
        return _with_liger(model)
    return {}, _head_loss


def _head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _with_liger(model: Any) -> tuple[dict[str, Any], HeadLoss]:
    if importlib.util.find_spec("liger_kernel") is None:
        raise AbsentError("liger_kernel is not installed")
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )
    from transformers.models.llama import modeling_llama

    before = {name: getattr(modeling_llama, name) for name in _LIGER_NAMES}
    try:
        # Its fused loss is called below, and not by its own forward of the whole model, which follows transformers 4.
        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=model)
        patches = {name: getattr(modeling_llama, name) for name in _LIGER_NAMES}
    finally:
        for name, value in before.items():
            setattr(modeling_llama, name, value)

    def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        result = liger_fused_linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten())
        return getattr(result, "loss", result)

    return patches, head_loss


def _optimizer(model: Any, config: RunConfig) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.optim.beta1, config.optim.beta2)
    return torch.optim.AdamW(groups, lr=config.optim.peak_lr, betas=betas, eps=config.optim.eps, fused=True)

"""The memory of a training step, measured without having it: model, FSDP, loss and optimizer on fake tensors.

A fake tensor has a shape and no storage, so that a step of a billion parameters takes seconds on a laptop. The model is
the real one and so is its sharding; the other processes are a process group that does nothing. A GPU's step is run on
fake CPU tensors, as a build of torch for CPUs has no others, with our kernels' fake forms and attention as on a GPU.
What is counted: every storage that is alive, after each operator, and what our operators allocate inside. What is not:
the framework, the allocator's rounding, buffers of collectives, what torch.compile leaves out, float8's copies.
"""

import collections
import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import launch
from kernels.linear_cross_entropy import default_chunk_rows
from model.balance import RoutingLog
from model.batch import Batch
from model.lora import inject_lora
from model.lora_config import LoraConfig
from model.transformer import Transformer
from train.config import RunConfig
from train.objectives import next_token_loss
from train.optim import make_optimizer
from train.ranks import Ranks
from train.sharding import blocks_of, compute_dtype, reshards_after_forward, shard, sync_gradients

KINDS: tuple[str, ...] = ("weights", "gradients", "moments", "gathered weights", "activations", "temporary")
"""What storages are for. Activations are alive at the end of a forward; what has no other name is temporary."""

InsideBytes = Callable[[Any, tuple], int]
"""(operator, arguments) -> bytes that it allocates and frees inside, where nobody sees them."""


@dataclasses.dataclass(slots=True, eq=False)
class _Storage:
    memory: "weakref.ref[torch.UntypedStorage]"
    kind: str | None = None

    @property
    def num_bytes(self) -> int:
        # Asked anew each time: FSDP frees gathered weights by making their storage empty.
        memory = self.memory()
        return memory.nbytes() if memory is not None else 0


class StorageTracker(TorchDispatchMode):
    """Knows which storages are alive that were made under it, and what the most of them was for."""

    def __init__(self, inside_bytes: InsideBytes = lambda op, arguments: 0):
        super().__init__()
        self._inside_bytes = inside_bytes
        self._alive: dict[int, _Storage] = {}
        self._peak: list[tuple[_Storage | None, int]] = []
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and looks at what it made."""
        result = func(*args, **(kwargs or {}))
        tensors = [tensor for tensor in pytree.tree_leaves(result) if isinstance(tensor, Tensor)]
        is_new = [self._meet(tensor._local_tensor if isinstance(tensor, DTensor) else tensor) for tensor in tensors]
        # Views take nothing. What writes into a tensor may follow FSDP's filling of an empty storage.
        if any(is_new) or func._schema.is_mutable:
            self._note_peak(self._inside_bytes(func, args))
        return result

    @property
    def alive_bytes(self) -> int:
        """Bytes of all storages that are alive."""
        return sum(storage.num_bytes for storage in self._alive.values())

    def name_living(self, kind: str) -> None:
        """Says what those are for that are alive and have no name yet."""
        for storage in self._alive.values():
            storage.kind = storage.kind or kind

    def start_peak(self) -> None:
        """Forgets the peak."""
        self._peak, self.peak_bytes = [], 0

    def peak_by_kind(self) -> dict[str, int]:
        """What was alive at the peak, by the names of today."""
        totals = dict.fromkeys(KINDS, 0)
        for storage, num_bytes in self._peak:
            totals[storage.kind if storage is not None and storage.kind else "temporary"] += num_bytes
        return totals

    def _meet(self, tensor: Tensor) -> bool:
        """Whether the tensor's storage was not known yet."""
        memory = tensor.untyped_storage()
        key = id(memory)
        if key in self._alive:
            return False
        self._alive[key] = _Storage(weakref.ref(memory, lambda _: self._alive.pop(key, None)))
        return True

    def _note_peak(self, inside_bytes: int) -> None:
        num_bytes = self.alive_bytes + inside_bytes
        if num_bytes > self.peak_bytes:
            self.peak_bytes = num_bytes
            self._peak = [(storage, storage.num_bytes) for storage in self._alive.values()]
            self._peak.append((None, inside_bytes))


def step_memory(
    config: RunConfig, device_type: str, world_size: int, device_bytes: int | None = None
) -> Mapping[str, int]:
    """Bytes on one of world_size devices at the peak of an optimizer step, by kind.

    `device_bytes` is the memory of a device, by which gathered weights may be freed between forward and backward.
    """
    tracker = StorageTracker(_inside_bytes(device_type))
    with _fake_process_group(world_size), _implementations(config, device_type):
        model = _model_on_meta(config, device_type, world_size, device_bytes)
        with FakeTensorMode(allow_non_fake_inputs=True), _attention_of(device_type), tracker:
            model.to_empty(device="cpu")
            model.tie()
            run_step(config, model, tracker, min(2, config.num_micro_batches(world_size)))
        del model
        gc.collect()  # FSDP's modules are part of cycles
    return tracker.peak_by_kind()


def run_step(config: RunConfig, model: Transformer, tracker: StorageTracker, num_micro_batches: int) -> None:
    """What an optimizer step of a run does on one device, with each storage named; fake or real."""
    tracker.name_living("weights")
    optimizer = make_optimizer(model, config.optim, exact=config.parallel.precision == "exact")
    tracker.name_living("moments")
    with torch.no_grad():
        tokens_BT = torch.zeros(1, 8, dtype=torch.int64)
        model(tokens_BT, readout=lambda hidden_BTD, _: hidden_BTD.new_zeros(()))
        del tokens_BT
    tracker.name_living("gathered weights")
    tracker.start_peak()
    shape = (config.data.micro_batch_sequences, config.data.sequence_length)
    for i in range(num_micro_batches):
        sync_gradients(model, is_last=i == num_micro_batches - 1)
        tokens_BT = torch.zeros(shape, dtype=torch.int64)
        _loss(config, model, tokens_BT, tracker).backward()
        del tokens_BT
        tracker.name_living("gradients")
    optimizer.step()


def _loss(config: RunConfig, model: nn.Module, tokens_BT: Tensor, tracker: StorageTracker) -> Tensor:
    routing = RoutingLog(torch.ones_like(tokens_BT, dtype=torch.bool), None) if config.model.expert_layers else None
    batch = Batch(tokens_BT, tokens_BT, None, tokens_BT.numel())
    loss = next_token_loss(model, batch, routing, soft_cap=config.model.logit_softcap).loss_sum
    if routing is not None:
        loss = loss + routing.penalty_sum
    tracker.name_living("activations")
    return loss


def _model_on_meta(config: RunConfig, device_type: str, world_size: int, device_bytes: int | None) -> Transformer:
    """The model as `build_model` makes it, but nowhere."""
    dtype = compute_dtype(config.parallel, torch.device(device_type))
    master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.device("meta"):
        model = Transformer(config.model).to(master_dtype)
        if (lora := getattr(config, "lora", LoraConfig())).rank:
            inject_lora(model, lora)
    for block in blocks_of(model):
        block.recompute = config.parallel.recompute
    if world_size > 1 or dtype != master_dtype or config.parallel.precision == "exact":
        reshards = reshards_after_forward(config.model, config.parallel, dtype, device_bytes)
        shard(model, config.parallel, Ranks(0, world_size, torch.device("cpu")), dtype, reshards)
    return model


@contextlib.contextmanager
def _fake_process_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _implementations(config: RunConfig, device_type: str) -> Iterator[None]:
    """Our operators as on the run's device; experts always by our kernels, as the loop over them wants real picks."""
    choices = dataclasses.asdict(config.kernels)
    if device_type == "cpu":
        choices = {name: "torch" if choice == "auto" else choice for name, choice in choices.items()}
    interpreted, launch.INTERPRETED = launch.INTERPRETED, True
    launch.choose(choices | {"moe": "triton", "linear_cross_entropy": config.kernels.linear_cross_entropy})
    try:
        yield
    finally:
        launch.INTERPRETED = interpreted
        launch.choose({})


class _FlashAttention(TorchFunctionMode):
    """Attention that holds no scores, whatever its mask and widths: what GPUs have, by what CPUs have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces torch's attention and leaves all else alone."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q_BHTK, k_BGTK, v_BGTV = args
        missing = q_BHTK.shape[-1] - v_BGTV.shape[-1]
        v_BGTK = F.pad(v_BGTV, (0, missing)) if missing > 0 else v_BGTV
        options = {**(kwargs or {}), "attn_mask": None, "is_causal": True}
        return func(q_BHTK, k_BGTK, v_BGTK, **options)[..., : v_BGTV.shape[-1]]


def _attention_of(device_type: str) -> contextlib.AbstractContextManager:
    return _FlashAttention() if device_type == "cuda" else contextlib.nullcontext()


def _inside_bytes(device_type: str) -> InsideBytes:
    """What our operators hold inside: a chunk of logits, and the rows of experts."""

    def loss_bytes(arguments: tuple) -> int:
        hidden_MD, head_VD, _, chunk_rows, *_, soft_cap, _ = arguments
        if device_type == "cuda":
            rows, copies = default_chunk_rows(len(hidden_MD), device_type), 0
        else:  # torch's operators want the log-probabilities beside the logits, and what a soft cap makes of these
            rows, copies = chunk_rows, 1 if soft_cap is None else 4
        element_bytes = hidden_MD.itemsize + copies * launch.sum_dtype(hidden_MD).itemsize
        return min(rows, len(hidden_MD)) * len(head_VD) * element_bytes

    def expert_bytes(arguments: tuple) -> int:
        x_MD, weights_MJ, _, down_EDF, *_ = arguments
        return weights_MJ.numel() * (down_EDF.shape[1] + down_EDF.shape[2]) * x_MD.itemsize

    def expert_gradient_bytes(arguments: tuple) -> int:
        _, x_MD, weights_MJ, _, down_EDF, *_ = arguments
        _, width, inner = down_EDF.shape
        return weights_MJ.numel() * (2 * inner + max(inner, width)) * x_MD.itemsize

    known = collections.defaultdict(
        lambda: lambda arguments: 0,
        {
            "linear_cross_entropy": loss_bytes,
            "moe_experts": expert_bytes,
            "moe_experts_backward": expert_gradient_bytes,
        },
    )
    return lambda op, arguments: known[op.overloadpacket.__name__](arguments)

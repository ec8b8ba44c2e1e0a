"""From a model config to a model on its devices: built without memory, sharded, then filled."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from data_prep.config_file import ConfigError
from model.config import ModelConfig
from model.flops import num_params
from model.lora import inject_lora
from model.lora_config import LoraConfig
from model.moe import MoE
from model.transformer import Block, Transformer
from resume.regions import copy_whole
from train.config import ParallelSection
from train.ranks import Ranks

WholeValue = Callable[[str, torch.Size], Tensor]
"""(parameter name, whole shape) -> the whole value."""


def compute_dtype(config: ParallelSection, device: torch.device) -> torch.dtype:
    """The dtype of matrix products and activations."""
    precision = ("bf16" if device.type == "cuda" else "fp32") if config.precision == "auto" else config.precision
    known = {"bf16": torch.bfloat16, "fp32": torch.float32, "exact": torch.float32, "fp64": torch.float64}
    return known[precision]


def build_model(
    config: ModelConfig, parallel: ParallelSection, ranks: Ranks, value: WholeValue, lora: LoraConfig | None = None
) -> Transformer:
    """Builds the model of a run, with every parameter and buffer set to its part of `value(name, shape)`.

    With `lora` it has adapters, and everything else is frozen.

    Parameters are fp32 (fp64 for fp64 runs); under bf16, FSDP computes on a bf16 copy. A single fp32 or fp64 device
    needs neither gathering nor casting and gets the plain module, but for exact runs, whose gradients FSDP sums.
    """
    dtype = compute_dtype(parallel, ranks.device)
    master_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.device("meta"):
        model = Transformer(config).to(master_dtype)
        if lora is not None:
            inject_lora(model, lora)
    if parallel.float8:
        if lora is not None and lora.rank:
            raise ConfigError("parallel.float8 with lora.rank above 0: adapters take the place of what runs in float8")
        _use_float8(model, ranks.device)
    # Memory that is reserved but never touched costs nothing: no rank ever holds the whole model, only its part of it.
    model.to_empty(device="cpu")
    model.tie()
    # All blocks share the code that is compiled: each kind of layer (its window, dense or with experts, the first one)
    # is a graph in training and one in validation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in blocks_of(model):
        block.recompute = parallel.recompute
        if parallel.compile == "on" or (parallel.compile == "auto" and ranks.device.type == "cuda"):
            block.compile_body()
    if ranks.world_size > 1 or dtype != master_dtype or parallel.precision == "exact":
        shard(model, parallel, ranks, dtype, reshards_after_forward(config, parallel, dtype, _memory_bytes(ranks)))
    else:
        model.to(ranks.device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        copy_whole(tensor, value(name, tensor.shape))
    return model


def reshards_after_forward(
    config: ModelConfig, parallel: ParallelSection, dtype: torch.dtype, device_bytes: int | None
) -> bool:
    """Whether gathered weights are freed between forward and backward on devices of this memory (None: not known)."""
    if parallel.reshard_after_forward == "auto":
        return device_bytes is not None and num_params(config) * dtype.itemsize > device_bytes / 10
    return parallel.reshard_after_forward == "on"


def blocks_of(model: Transformer) -> list[Block]:
    """The model's blocks, typed."""
    return [block for block in model.blocks if isinstance(block, Block)]


def sync_gradients(model: nn.Module, is_last: bool) -> None:
    """Tells FSDP whether this backward is the step's last: only then are gradients summed over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        model.set_is_last_backward(is_last)
        model.set_reshard_after_backward(is_last)


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only its part of the model, or another dtype than it computes in."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Frees FSDP's gathered weights, which a forward without backward leaves in place of the sharded parameters."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _memory_bytes(ranks: Ranks) -> int | None:
    return torch.cuda.get_device_properties(ranks.device).total_memory if ranks.device.type == "cuda" else None


def _use_float8(model: Transformer, device: torch.device) -> None:
    """Replaces the blocks' linear layers by float8 ones with one scale per tensor; emulated, and slow, on a CPU.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(f"parallel.float8 needs torchao ({error}); install it, or leave the key out") from error
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"parallel.float8 needs compute capability 8.9, {torch.cuda.get_device_name(device)} has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; leave the key out"
        )
    for name, module in model.blocks.named_modules():
        if not isinstance(module, nn.Linear) or _is_gate(name):
            continue
        if any(side % 16 for side in module.weight.shape):
            raise ConfigError(
                f"parallel.float8: blocks.{name} is {tuple(module.weight.shape)}; float8 products want multiples of 16"
            )
    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=device.type == "cpu"),
        module_filter_fn=lambda module, name: name.startswith("blocks.") and not _is_gate(name),
    )


def _is_gate(name: str) -> bool:
    """Whether a linear layer makes one number a token, which costs nothing."""
    return name.endswith("shared_gate")


def _shard_routers(moe: MoE, mesh: DeviceMesh, reduce_dtype: torch.dtype) -> None:
    """Makes each router a unit of its own, so that its weights stay in fp32 where all others are gathered in bf16.

    They are small: once gathered they stay until the backward.
    """
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for router in moe.routers:
        fully_shard(router, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def _expert_placement(num_shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Stacked experts are cut between experts, or inside of them where there are more ranks than experts.

    FSDP cuts along another dimension than the first only into equal parts.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        is_stack = parameter.ndim == 3
        inside = is_stack and num_shards > parameter.shape[0] and parameter.shape[1] % num_shards == 0
        return Shard(1) if inside else None

    return placement


def shard(model: Transformer, parallel: ParallelSection, ranks: Ranks, dtype: torch.dtype, reshards: bool) -> None:
    """Makes each block, router and the rest a unit of FSDP: gathered in `dtype`, gradients summed over the ranks."""
    shape, names = (ranks.world_size,), ("shard",)
    if parallel.replicas > 1:
        shape, names = (parallel.replicas, ranks.world_size // parallel.replicas), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    # The sum of fp32 numbers is exact in fp64, so it does not depend on their order: on who computed which.
    reduce_dtype = torch.float64 if parallel.precision in ("exact", "fp64") else torch.float32
    # Inputs are not cast: activations already have the compute dtype, and the RoPE tables stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": reshards}
    for block in blocks_of(model):
        if isinstance(block.moe, MoE):
            _shard_routers(block.moe, mesh, reduce_dtype)
        fully_shard(block, shard_placement_fn=_expert_placement(ranks.world_size // parallel.replicas), **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are sums over all ranks: the loss is already divided by the global number of targets. gloo has
            # no pre-multiplied sum, hence the second call.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

"""What a run will hold and write, by arithmetic, and what is refused by it before anything is allocated."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from data_prep.config_file import ConfigError
from data_prep.manifest import Manifest
from kernels.linear_cross_entropy import default_chunk_rows
from model.config import ModelConfig
from model.flops import num_params
from resume import checkpoint
from train.config import RunConfig
from train.sharding import compute_dtype, reshards_after_forward
from train.stages import at_longest

_GIB = 2**30
RESERVE_BYTES = 1 * _GIB
"""What the allocator, the framework and the collectives take beside the tensors counted here."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one device at the peak of a step, at the end of the forward of the loss."""

    master_weights: int
    gradients: int
    moments: int
    gathered_weights: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def activation_bytes_per_token(
    model: ModelConfig,
    sequence_length: int,
    compute_bytes: int,
    *,
    recompute: Literal["nothing", "cheap", "blocks"],
    fused: bool,
) -> int:
    """Bytes that the forward keeps for the backward, per token of the micro-batch, logits apart.

    Of each block: the inputs and outputs of both norms, attention (see `_attention_elements`), the packed gate|up and
    the SwiGLU product; of experts the packed gate|up of each pick; without our fused kernels also what lies inside the
    norms, and silu(gate). What is cheap to compute again leaves the matrix products and attention; "blocks" leaves the
    input of each block, and of experts what the router reads. Either way the whole of the largest block being run again
    is there beside.
    """
    d = model.hidden_size
    norm = 2 * d if fused else 3 * d
    attention, attention_products = _attention_elements(model, fused)
    inside_bytes = 4 * model.num_heads + model.num_heads * sequence_length * _score_bytes(model, compute_bytes, fused)
    kept_bytes, largest_block_bytes = 0, 0
    for layer in range(model.num_layers):
        ffn, ffn_products, ffn_input = _ffn_elements(model, layer, fused)
        block = (2 * norm + attention + ffn) * compute_bytes + inside_bytes
        products = (2 * d + attention_products + ffn_products) * compute_bytes + inside_bytes
        kept_bytes += {"nothing": block, "cheap": products, "blocks": (d + ffn_input) * compute_bytes}[recompute]
        largest_block_bytes = max(largest_block_bytes, block)
    return kept_bytes + (largest_block_bytes if recompute != "nothing" else 0) + norm * compute_bytes


def _score_bytes(model: ModelConfig, compute_bytes: int, fused: bool) -> int:
    """Bytes that attention keeps of each score of a query and a key: none, unless they are held whole."""
    if model.attention_softcap is not None:
        return 2 * max(4, compute_bytes)  # of tanh, and of the softmax
    if model.is_latent and not fused and model.latent.value_size != model.head_size + model.latent.rope_size:
        return compute_bytes  # torch's fused attention for CPUs wants equal widths
    return 0


def _attention_elements(model: ModelConfig, fused: bool) -> tuple[int, int]:
    """Elements a token that attention keeps: all, and those of matrix products.

    q, k and v after RoPE and attention's output; without fused kernels q and k before RoPE as well; of latent attention
    the vectors that queries, keys and values are made of, before and after their norms.
    """
    if model.is_latent:
        latent = model.latent
        small = latent.kv_rank + latent.query_rank
        # Queries, keys, the matrix that values are a part of, and the output; unfused also what RoPE is given.
        width = model.head_size + latent.rope_size
        heads = model.num_heads * (2 * width + model.head_size + 2 * latent.value_size)
        inside = 0 if fused else model.num_heads * width
        return heads + inside + 2 * small + 2 * latent.rope_size, heads + small
    q, kv = model.query_size, model.kv_size
    products = q + 2 * kv + q
    inside = (0 if fused else q + kv) + (q + kv if model.qk_norm != "none" else 0)
    return products + inside, products


def _ffn_elements(model: ModelConfig, layer: int, fused: bool) -> tuple[int, int, int]:
    """Elements a token that a feed-forward network keeps: all, those of matrix products, and what "blocks" keeps."""
    d, moe = model.hidden_size, model.moe
    if not model.has_experts(layer):
        stages = 2 if model.ffn == "senet" else 1
        width = model.ffn_size + (stages - 1) * d
        return (3 if fused else 4) * width, 2 * width, 0
    shared = moe.shared_size
    passes = moe.num_picked if moe.kind == "picked" else -(-moe.num_experts * moe.num_slots // moe.chunk_size)
    # In torch's operators also the permuted inputs and outputs, silu(gate), and the product.
    routed = passes * (2 * moe.expert_size + (0 if fused else 2 * moe.expert_size + 2 * d)) + 4 * moe.num_experts
    dense = (3 if fused else 4) * shared
    # Experts are never computed again in part, and what routers say stays in fp32.
    kept_by_router = d + 8 * moe.num_experts if moe.kind == "picked" else 0
    return moe.chain_length * (routed + dense), moe.chain_length * (routed + dense), moe.chain_length * kept_by_router


def estimate_memory(config: RunConfig, device_type: str, world_size: int) -> Memory:
    """Memory of one device for a step of `config` on `world_size` devices."""
    dtype = compute_dtype(config.parallel, torch.device(device_type))
    parameters = num_params(config.model)
    compute_bytes = dtype.itemsize
    master_bytes = 8 if dtype == torch.float64 else 4
    num_shards = max(1, world_size // config.parallel.replicas)
    is_sharded = world_size > 1 or compute_bytes != master_bytes
    held = parameters * master_bytes // num_shards
    gathered = 0
    if is_sharded:
        # Without resharding all weights stay gathered; with it, the two blocks in flight and the embeddings do.
        embeddings = config.model.vocab_size * config.model.hidden_size * (1 if config.model.tie_embeddings else 2)
        per_block = (parameters - embeddings) // config.model.num_layers
        device_bytes = device_memory_bytes("cuda", 1) if device_type == "cuda" else None
        reshards = reshards_after_forward(config.model, config.parallel, dtype, device_bytes)
        gathered = compute_bytes * (embeddings + 2 * per_block if reshards else parameters)
    gradients = held
    if is_sharded and config.num_micro_batches(world_size) > 1:
        gradients += parameters * master_bytes  # whole sums of the accumulated micro-batches, not yet scattered
    tokens = config.data.micro_batch_sequences * config.data.sequence_length
    per_token = activation_bytes_per_token(
        config.model,
        config.data.sequence_length,
        compute_bytes,
        recompute=config.parallel.recompute,
        fused=device_type == "cuda",
    )
    # The logits of a chunk, over which their gradient is written (torch's operators want the log-probabilities as
    # well), and the gradients of head and hidden states that the forward computes from them.
    sum_bytes = max(4, compute_bytes)
    rows = tokens if config.kernels.linear_cross_entropy == "whole" else default_chunk_rows(tokens, device_type)
    logit_bytes = compute_bytes if device_type == "cuda" else compute_bytes + sum_bytes
    head_bytes = config.model.vocab_size * config.model.hidden_size * sum_bytes
    return Memory(
        master_weights=held,
        gradients=gradients,
        moments=2 * held,
        gathered_weights=gathered,
        activations=tokens * per_token,
        loss=min(rows, tokens) * config.model.vocab_size * logit_bytes
        + head_bytes
        + tokens * config.model.hidden_size * compute_bytes,
    )


def checkpoint_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Size of one checkpoint: weights and two moments; the rest is small."""
    return 3 * num_params(model) * (8 if dtype == torch.float64 else 4)


def device_memory_bytes(device_type: str, local_world_size: int) -> int | None:
    """Memory one process may use, None if there is no such device here to ask."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size


def notes(config: RunConfig, manifest: Manifest | None, world_size: int) -> list[str]:
    """What runs, but is probably not meant."""
    found = []
    rows = config.num_micro_batches(world_size) * world_size * config.data.micro_batch_sequences
    if rows > config.data.batch_sequences:
        found.append(
            f"data.batch_sequences = {config.data.batch_sequences} does not split into micro-batches of "
            f"{config.data.micro_batch_sequences} on {world_size} device(s): {rows - config.data.batch_sequences} of "
            f"{rows} rows of each step stay empty"
        )
    if config.optim.warmup_steps >= config.run.num_steps:
        found.append(
            f"optim.warmup_steps = {config.optim.warmup_steps} is the whole run of {config.run.num_steps} steps: the "
            "learning rate never reaches its peak"
        )
    if manifest is not None:
        if config.model.vocab_size >= 2 * manifest.vocab_size:
            found.append(
                f"model.vocab_size = {config.model.vocab_size}, the data has {manifest.vocab_size} token ids: most of "
                "the embedding is never used"
            )
        if num_epochs(config, manifest) > 10:
            found.append(f"the run sees its data {num_epochs(config, manifest):,.0f} times")
    return found


def num_epochs(config: RunConfig, manifest: Manifest) -> float:
    """How often the run reads its training shards."""
    return config.batch_tokens * config.run.num_steps / max(1, training_targets(manifest))


def training_targets(manifest: Manifest) -> int:
    """Tokens to predict in all training shards."""
    return sum(shard.token_count - 1 for shard in manifest.shards if shard.split == "train")


def refuse_uneven(config: RunConfig, world_size: int) -> None:
    """Says what does not split over the devices.

    Raises:
        ConfigError: the replicas do not.
    """
    if world_size % config.parallel.replicas:
        raise ConfigError(f"parallel.replicas = {config.parallel.replicas} does not divide the {world_size} devices")


def refuse_impossible(config: RunConfig, device_type: str, world_size: int, local_world_size: int) -> None:
    """Says what cannot fit, before anything is allocated.

    Raises:
        ConfigError: replicas do not split over the devices, or memory or disk are too small for the estimate.
    """
    refuse_uneven(config, world_size)
    dtype = compute_dtype(config.parallel, torch.device(device_type))
    needed = estimate_memory(at_longest(config), device_type, world_size).total + RESERVE_BYTES
    available = device_memory_bytes(device_type, local_world_size)
    if available is not None and needed > available:
        raise ConfigError(
            f"one step needs about {gib(needed)} per device, this machine has {gib(available)} for each of its "
            f"{local_world_size} process(es); lower --data.micro-batch-sequences "
            f"(now {config.data.micro_batch_sequences}), set --parallel.recompute cheap or blocks, use more devices, "
            "or choose a smaller model"
        )
    folder = Path(config.run.dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    # One is written beside those that are kept. Of those that are there already no more count than will make room:
    # run.keep_every may keep others for ever.
    num_to_come = min(config.run.keep_checkpoints + 1, num_checkpoints(config)) - min(
        config.run.keep_checkpoints, len(checkpoint.steps(Path(config.run.dir)))
    )
    wanted = num_to_come * checkpoint_bytes(config.model, dtype)
    if free < wanted:
        raise ConfigError(
            f"{folder} has {gib(free)} free, the {num_to_come} checkpoints to come need {gib(wanted)}; free some, "
            "lower --run.keep-checkpoints, or set another --run.dir"
        )


def num_checkpoints(config: RunConfig) -> int:
    """How many a run writes."""
    return -(-config.run.num_steps // config.run.save_every)


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / _GIB:.2f} GiB"

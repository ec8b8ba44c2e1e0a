"""From a dense model to a mixture of experts that computes the same function, to train on from there.

Each expert is a copy of the dense feed-forward network, or, where experts are narrower by G = ffn_size / expert_size,
a shard of it: columns g * expert_size on of its product. Experts r * G to r * G + G - 1 are the shards of copy r, and
their router rows are equal, so that all of them are picked together. With weights that add up to route_scale, a token's
picks come to route_scale / G times the dense network, which a factor on `down` sets right. On `down` alone: SiLU of a
scaled gate is not scaled SiLU.

Shared experts start with an output of zero. Routers are random, as in a new model.

Source: Komatsuzaki et al., "Sparse Upcycling", 2023; He et al., "Upcycling Large Language Models into Mixture of
Experts", 2024 (granular experts).
"""

import dataclasses
import hashlib

import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import initial_value
from model.moe_config import MoEConfig


class UpcycleError(ValueError):
    """A mixture that cannot start as the dense model; the message names the key and the remedy."""


def upcycle(
    config: ModelConfig, state: dict[str, Tensor], moe: MoEConfig, *, seed: int, sigma: float = 0.0
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the state dict of a mixture that gives the dense model's logits; with sigma > 0, each expert's
    matrices get normal noise of sigma times their own standard deviation, so that experts part sooner.

    Tensors that stay as they are are shared with `state`. Where noise picks the experts (`sampling`), shards of one
    copy are picked together in inference alone.

    Raises:
        UpcycleError: no such mixture, or the tensors are not those of the dense config.
    """
    _check(config, moe)
    if sigma < 0:
        raise UpcycleError(f"sigma = {sigma}: must not be negative")
    mixed = dataclasses.replace(config, moe=moe)
    found = dict(state)
    for layer in mixed.expert_layers:
        prefix = f"blocks.{layer}."
        gate_up, down = _taken(found, f"{prefix}mlp.gate_up.weight"), _taken(found, f"{prefix}mlp.down.weight")
        shapes = (2 * config.ffn_size, config.hidden_size), (config.hidden_size, config.ffn_size)
        if (gate_up.shape, down.shape) != shapes:
            raise UpcycleError(
                f"{prefix}mlp: matrices of {tuple(gate_up.shape)} and {tuple(down.shape)} for model.ffn_size = "
                f"{config.ffn_size} and model.hidden_size = {config.hidden_size}; give the config of the model"
            )
        found |= _experts(mixed, prefix + "moe.", gate_up, down, seed, sigma)
        found |= _routers(mixed, prefix + "moe.", gate_up.dtype, seed)
    return mixed, found


def _check(config: ModelConfig, moe: MoEConfig) -> None:
    if config.expert_layers:
        raise UpcycleError("model.moe: the model has experts already; only a dense model can be upcycled")
    if config.ffn != "swiglu":
        raise UpcycleError(f'model.ffn = "{config.ffn}": experts are SwiGLU networks, and so must the dense ones be')
    if not dataclasses.replace(config, moe=moe).expert_layers:
        raise UpcycleError("model.moe: no layer would have experts; set num_experts")
    if moe.kind != "picked" or moe.chain_length > 1 or moe.chain_residual != "outer":
        raise UpcycleError(
            "model.moe: soft experts and chains never equal a dense network of one pass; upcycle to "
            'kind = "picked", chain_length = 1, chain_residual = "outer"'
        )
    shards = num_shards(config, moe)
    if moe.num_experts % shards or moe.num_picked % shards:
        raise UpcycleError(
            f"model.moe.num_experts = {moe.num_experts} and num_picked = {moe.num_picked}: both must be multiples of "
            f"{shards}, as many experts as make up one dense network"
        )
    if moe.num_experts // moe.num_groups % shards:
        raise UpcycleError(
            f"model.moe.num_groups = {moe.num_groups}: groups of {moe.num_experts // moe.num_groups} experts would "
            f"part the {shards} shards of a dense network; lower it"
        )
    picks_all_of_softmax = moe.scores == "softmax" and moe.num_picked == moe.num_experts
    if not moe.renormalise and not picks_all_of_softmax:
        raise UpcycleError(
            "model.moe.renormalise = false: the weights of the picks do not add up to a constant, so no factor makes "
            "the mixture equal to the dense model; set it to true"
        )


def num_shards(config: ModelConfig, moe: MoEConfig) -> int:
    """Experts that make up one dense network."""
    if config.ffn_size % moe.expert_size:
        raise UpcycleError(
            f"model.moe.expert_size = {moe.expert_size} does not divide model.ffn_size = {config.ffn_size}"
        )
    return config.ffn_size // moe.expert_size


def _taken(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UpcycleError(f"{name} is missing; give the state dict of the dense model")
    return state.pop(name)


def _experts(
    config: ModelConfig, prefix: str, gate_up: Tensor, down: Tensor, seed: int, sigma: float
) -> dict[str, Tensor]:
    """The stacked experts, and the shared one."""
    moe, shards = config.moe, num_shards(config, config.moe)
    copies = moe.num_experts // shards
    # Gate and up each by shards of expert_size rows, down by as many columns.
    gate_up_GFD = torch.cat([half.unflatten(0, (shards, -1)) for half in gate_up.chunk(2)], dim=1)
    down_GDF = down.unflatten(1, (shards, -1)).transpose(0, 1) * (shards / moe.route_scale)
    names = (f"{prefix}experts.gate_up", f"{prefix}experts.down")
    found = {name: part.repeat(copies, 1, 1) for name, part in zip(names, (gate_up_GFD, down_GDF))}
    if sigma:
        found = {name: _with_noise(name, experts, seed, sigma) for name, experts in found.items()}
    for name, shape in _shared_shapes(config):
        value = initial_value(config, prefix + name, torch.Size(shape), seed).to(gate_up.dtype)
        found[prefix + name] = torch.zeros_like(value) if name == "shared.down.weight" else value
    return found


def _shared_shapes(config: ModelConfig) -> list[tuple[str, tuple[int, int]]]:
    moe, hidden = config.moe, config.hidden_size
    shapes = []
    if moe.shared_size:
        shapes += [("shared.gate_up.weight", (2 * moe.shared_size, hidden))]
        shapes += [("shared.down.weight", (hidden, moe.shared_size))]
    return shapes + ([("shared_gate.weight", (1, hidden))] if moe.shared_gate else [])


def _with_noise(name: str, experts: Tensor, seed: int, sigma: float) -> Tensor:
    digest = hashlib.blake2b(f"upcycle|{seed}|{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    noise = torch.randn(experts.shape, generator=generator).to(experts.dtype)
    return experts + sigma * experts.std(dim=(1, 2), keepdim=True) * noise


def _routers(config: ModelConfig, prefix: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The router with its buffers: one random row for each copy of the dense network, repeated for its shards."""
    moe, shards = config.moe, num_shards(config, config.moe)
    name = f"{prefix}routers.0."
    shape = torch.Size((moe.num_experts // shards, config.hidden_size))
    rows = initial_value(config, name + "weight", shape, seed)
    found = {name + "weight": rows.repeat_interleave(shards, dim=0).to(dtype)}
    buffers = (("bias", moe.bias != "none"), ("load", moe.balance in ("switch", "global")))
    for key, is_there in buffers:
        if is_there:
            found[name + key] = initial_value(config, name + key, torch.Size((moe.num_experts,)), seed)
    return found

"""Low-rank adapters (LoRA): beside a frozen matrix W, two narrow ones are trained,

    y = W x + scale * B A x         A (rank, in), B (out, rank), scale = alpha / rank

B starts at zero, so training starts at the model as it is; gradients and moments are kept of A and B alone.

Where ours packs several of Hugging Face's matrices into one, each has an adapter of its own, as in peft: beside
`attention.qkv.weight` there are the parameters `attention.qkv.lora.q_proj.a`, `attention.qkv.lora.q_proj.b` and so on.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4.1; Kalajdzievski, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023 (rank_scaled).
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.hugging_face_configs import refuse_what_is_foreign_to_them
from model.hugging_face_layouts import Part, Stack, layout
from model.lora_config import LoraConfig
from model.moe_config import ModelConfigError
from model.transformer import Transformer


class Adapter(nn.Module):
    """What is added to the product of one matrix of Hugging Face's: scale * B A x."""

    def __init__(self, config: LoraConfig, weight: Tensor, num_rows: int):
        super().__init__()
        self.scale, self.dropout = config.scale, config.dropout
        self.a = nn.Parameter(weight.new_empty(config.rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_empty(num_rows, config.rank))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, N)."""
        return F.linear(self.scale * F.linear(F.dropout(x_BTD, self.dropout, self.training), self.a), self.b)


class LoraLinear(nn.Linear):
    """A linear layer, its weight and bias under their names, with adapters beside some parts of its rows."""

    def __init__(self, base: nn.Linear, config: LoraConfig, num_rows: Mapping[str, int]):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.num_rows = dict(num_rows)
        self.lora = nn.ModuleDict(
            {part: Adapter(config, base.weight, num_rows[part]) for part in num_rows if part in config.targets}
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, N)."""
        parts = super().forward(x_BTD).split(list(self.num_rows.values()), dim=-1)
        # Not added in place: recomputation may keep the product, and must find it as it was.
        sums = [y + self.lora[name](x_BTD) if name in self.lora else y for name, y in zip(self.num_rows, parts)]
        return torch.cat(sums, dim=-1) if len(sums) > 1 else sums[0]


def inject_lora(model: Transformer, config: LoraConfig, seed: int = 0) -> None:
    """Gives a model its adapters, at their initial values, and freezes all else but the head of a reward model, which
    nothing has trained before; with rank 0 does nothing.

    Raises:
        ModelConfigError: the model has not all of the targets.
        ConvertError: the model cannot be exported, so that no file could hold its adapters.
    """
    if not config.rank:
        return
    stacks = _adapted(model.config, config)
    model.requires_grad_(False)
    model.head.requires_grad_(model.config.head == "score")
    for stack in stacks:
        name = stack.ours.removesuffix(".weight")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        rows = {_short_name(part): part.rows for part in stack.parts}
        model.set_submodule(name, LoraLinear(base, config, rows).train(model.training))
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.data.copy_(lora_initial_value(name, parameter.shape, seed))


def is_lora(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return ".lora." in name


def lora_initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole initial fp32 tensor of one parameter of an adapter, from the seed and its name alone: zeros for b,
    uniform within +-1 / sqrt(in) for a, as of a linear layer of torch's."""
    if name.endswith(".b"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"init|{seed}|{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return (2 * torch.rand(shape, generator=generator) - 1) * shape[1] ** -0.5


def merged_state(state: Mapping[str, Tensor], config: ModelConfig, lora: LoraConfig) -> dict[str, Tensor]:
    """The state dict of a plain model that computes what the adapted one does, in the dtypes of its weights.

    What the adapters leave alone is shared with `state`.
    """
    merged = {name: tensor for name, tensor in state.items() if not is_lora(name)}
    for stack in _adapted(config, lora):
        parts = merged[stack.ours].split([part.rows for part in stack.parts])
        sums = [_with_adapter(rows, state, stack, part, lora) for rows, part in zip(parts, stack.parts, strict=True)]
        merged[stack.ours] = torch.cat(sums)
    return merged


class Target(NamedTuple):
    """One matrix that has an adapter."""

    name: str
    """Of the adapter in our state dict; its parameters are name.a (rank, num_columns) and name.b (part.rows, rank)."""
    part: Part
    """The matrix among Hugging Face's."""
    num_columns: int


def lora_targets(config: ModelConfig, lora: LoraConfig) -> list[Target]:
    """Every matrix that has an adapter, in the order of the layers.

    Raises:
        ModelConfigError, ConvertError: see `inject_lora`.
    """
    return [
        Target(_adapter_name(stack, part), part, stack.row_shape[0])
        for stack in _adapted(config, lora)
        for part in stack.parts
        if _short_name(part) in lora.targets
    ]


def _adapted(config: ModelConfig, lora: LoraConfig) -> list[Stack]:
    """Our matrices that have an adapter beside one of their parts at least."""
    if not lora.rank:
        return []
    refuse_what_is_foreign_to_them(dataclasses.replace(config, head="tokens"))
    # In a class of theirs with experts, as DeepSeek-V3 always is, peft takes gate_proj for a matrix of the experts.
    has_experts = config.is_latent or bool(config.expert_layers)
    where = "attention" if has_experts else "(attention|mlp)"
    pattern = re.compile(rf"blocks\.\d+\.{where}\.\w+\.weight")
    stacks = [stack for stack in layout(config) if pattern.fullmatch(stack.ours) and stack.row_shape]
    known = list(dict.fromkeys(_short_name(part) for stack in stacks for part in stack.parts))
    if absent := [target for target in lora.targets if target not in known]:
        raise ModelConfigError(
            f"lora.targets: the model has no {', '.join(absent)} that an adapter can be for"
            f"{' (attention alone, in architectures with experts)' if has_experts else ''}; "
            f"choose among {', '.join(known)}"
        )
    return [stack for stack in stacks if any(_short_name(part) in lora.targets for part in stack.parts)]


def _short_name(part: Part) -> str:
    return part.name.split(".")[-2]


def _adapter_name(stack: Stack, part: Part) -> str:
    return f"{stack.ours.removesuffix('weight')}lora.{_short_name(part)}"


def _with_adapter(rows: Tensor, state: Mapping[str, Tensor], stack: Stack, part: Part, lora: LoraConfig) -> Tensor:
    """The rows of one part with what its adapter adds, if it has one; computed in fp32 at least, rounded once."""
    if _short_name(part) not in lora.targets:
        return rows
    dtype = torch.promote_types(rows.dtype, torch.float32)
    a, b = (state[f"{_adapter_name(stack, part)}.{side}"].to(rows.device, dtype) for side in "ab")
    return (rows.to(dtype) + lora.scale * (b @ a)).to(rows.dtype)

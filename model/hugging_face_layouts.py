"""Names and shapes of the tensors of Hugging Face's decoders beside ours, and how ours are made of theirs.

We pack the matrices that read the same input, stacked along their output rows: attention.qkv = [q; k; v],
mlp.gate_up = [gate; up]. Experts are stacked too: moe.experts.gate_up (E, 2F, D) has theirs one after the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hugging_face_configs import hugging_face_type


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """Rows that RoPE rotates in pairs: the last `rotated` of each `head`. The two of a pair are neighbours on our side
    and lie in two halves on theirs, or the other way round."""

    head: int
    rotated: int
    are_pairs_here: bool

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Our rows in their order."""
        return self._reordered(rows, (-1, 2) if self.are_pairs_here else (2, -1))

    def from_theirs(self, rows: Tensor) -> Tensor:
        """Their rows in our order."""
        return self._reordered(rows, (2, -1) if self.are_pairs_here else (-1, 2))

    def _reordered(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Each head's rotated rows, written into a grid row by row and read column by column."""
        heads = rows.unflatten(0, (-1, self.head))
        kept, rotated = heads.split((self.head - self.rotated, self.rotated), dim=1)
        return torch.cat((kept, rotated.unflatten(1, grid).transpose(1, 2).flatten(1, 2)), dim=1).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of theirs: its name, its rows, and which of them are in another order."""

    name: str
    rows: int
    rotary: RotaryRows | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor of ours, and those of theirs that make it up when stacked along the first axis."""

    ours: str
    parts: tuple[Part, ...]
    row_shape: tuple[int, ...] = ()
    num_experts: int | None = None
    """Where ours has an axis of experts in front, its size; the parts of each expert follow each other."""

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        num_rows = sum(part.rows for part in self.parts)
        if self.num_experts is None:
            return (num_rows, *self.row_shape)
        return (self.num_experts, num_rows // self.num_experts, *self.row_shape)

    @property
    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of their tensors."""
        return {part.name: (part.rows, *self.row_shape) for part in self.parts}

    def to_theirs(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their tensors; views of ours but where the order of rows differs."""
        rows = ours if self.num_experts is None else ours.flatten(0, 1)
        for part, theirs in zip(self.parts, rows.split([part.rows for part in self.parts]), strict=True):
            yield part.name, theirs if part.rotary is None else part.rotary.to_theirs(theirs)

    def from_theirs(self, theirs: Sequence[Tensor]) -> Tensor:
        """Our tensor, made of theirs in the order of the parts; theirs itself if there is but one in the same order."""
        ordered = [
            rows if part.rotary is None else part.rotary.from_theirs(rows)
            for part, rows in zip(self.parts, theirs, strict=True)
        ]
        stacked = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
        return stacked if self.num_experts is None else stacked.unflatten(0, (self.num_experts, -1))


def layout(config: ModelConfig, *, latent_pairs: bool = True) -> Iterator[Stack]:
    """Every tensor of the model, a tied head left out; `latent_pairs` is DeepSeek's rope_interleave: whether rotary
    pairs of latent attention are neighbours on their side."""
    width = (config.hidden_size,)
    yield _one("embedding.weight", "model.embed_tokens.weight", config.vocab_size, width)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        if config.is_latent:
            yield from _latent_attention(config, f"{ours}.attention", f"{theirs}.self_attn", latent_pairs)
        else:
            yield from _attention(config, f"{ours}.attention", f"{theirs}.self_attn")
        if config.has_experts(layer):
            yield from _mixture(config, f"{ours}.moe", theirs)
        else:
            yield from _mlp(config, f"{ours}.mlp", f"{theirs}.mlp", config.ffn_size)
        for our_norm, their_norm in _NORMS[config.norms].items():
            yield _one(f"{ours}.{our_norm}.weight", f"{theirs}.{their_norm}.weight", config.hidden_size)
    yield _one("norm.weight", "model.norm.weight", config.hidden_size)
    if not config.tie_embeddings:
        yield _one(
            "head.weight", "score.weight" if config.head == "score" else "lm_head.weight", config.head_rows, width
        )


_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "sandwich": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
    "output": {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"},
}


def router_biases(config: ModelConfig) -> list[str]:
    """Names of the buffers that theirs have too: DeepSeek's biases, which only pick."""
    layers = config.expert_layers if config.is_latent else ()
    return [f"blocks.{layer}.moe.routers.0.bias" for layer in layers]


def is_router_bias(their_name: str) -> bool:
    """Whether a tensor is a bias that only picks, which stays fp32: bf16 would make one of many near values."""
    return their_name.endswith(".e_score_correction_bias") or (".routers." in their_name and "bias" in their_name)


def _one(ours: str, theirs: str, rows: int, row_shape: tuple[int, ...] = (), rotary: RotaryRows | None = None) -> Stack:
    return Stack(ours, (Part(theirs, rows, rotary),), row_shape)


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Stack]:
    width = (config.hidden_size,)
    rotary = RotaryRows(config.head_size, config.head_size, True) if config.rope_interleaved else None
    sizes = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        parts = (Part(f"{theirs}.{p}_proj.{kind}", sizes[p], rotary if p != "v" else None) for p in sizes)
        yield Stack(f"{ours}.qkv.{kind}", tuple(parts), width if kind == "weight" else ())
    for part in "qk" if config.qk_norm != "none" else "":
        size = config.head_size if config.qk_norm == "head" else sizes[part]
        yield _one(f"{ours}.{part}_norm.weight", f"{theirs}.{part}_norm.weight", size, rotary=rotary)
    yield _one(f"{ours}.out.weight", f"{theirs}.o_proj.weight", config.hidden_size, (config.query_size,))


def _latent_attention(config: ModelConfig, ours: str, theirs: str, latent_pairs: bool) -> Iterator[Stack]:
    latent, width, heads = config.latent, (config.hidden_size,), config.num_heads
    query_head, kv_down = config.head_size + latent.rope_size, latent.kv_rank + latent.rope_size
    queries = keys = None
    if config.rope_interleaved != latent_pairs:
        queries = RotaryRows(query_head, latent.rope_size, config.rope_interleaved)
        keys = RotaryRows(kv_down, latent.rope_size, config.rope_interleaved)
    if latent.query_rank:
        yield _one(f"{ours}.query_down.weight", f"{theirs}.q_a_proj.weight", latent.query_rank, width)
        yield _one(f"{ours}.query_norm.weight", f"{theirs}.q_a_layernorm.weight", latent.query_rank)
        query_up = (latent.query_rank,)
        yield _one(f"{ours}.query_up.weight", f"{theirs}.q_b_proj.weight", heads * query_head, query_up, queries)
    else:
        yield _one(f"{ours}.query.weight", f"{theirs}.q_proj.weight", heads * query_head, width, queries)
    yield _one(f"{ours}.kv_down.weight", f"{theirs}.kv_a_proj_with_mqa.weight", kv_down, width, keys)
    yield _one(f"{ours}.kv_norm.weight", f"{theirs}.kv_a_layernorm.weight", latent.kv_rank)
    kv_size = heads * (config.head_size + latent.value_size)
    yield _one(f"{ours}.kv_up.weight", f"{theirs}.kv_b_proj.weight", kv_size, (latent.kv_rank,))
    yield _one(f"{ours}.out.weight", f"{theirs}.o_proj.weight", config.hidden_size, (heads * latent.value_size,))


def _mlp(config: ModelConfig, ours: str, theirs: str, size: int) -> Iterator[Stack]:
    gate_up = (Part(f"{theirs}.gate_proj.weight", size), Part(f"{theirs}.up_proj.weight", size))
    yield Stack(f"{ours}.gate_up.weight", gate_up, (config.hidden_size,))
    yield _one(f"{ours}.down.weight", f"{theirs}.down_proj.weight", config.hidden_size, (size,))


def _mixture(config: ModelConfig, ours: str, their_layer: str) -> Iterator[Stack]:
    moe, width, kind = config.moe, (config.hidden_size,), hugging_face_type(config)
    theirs = f"{their_layer}.block_sparse_moe" if kind == "mixtral" else f"{their_layer}.mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = [f"{theirs}.experts.{expert}" for expert in range(moe.num_experts)]
    gate_up = (Part(f"{expert}.{name}.weight", moe.expert_size) for expert in experts for name in (gate, up))
    yield Stack(f"{ours}.experts.gate_up", tuple(gate_up), width, moe.num_experts)
    downs = (Part(f"{expert}.{down}.weight", config.hidden_size) for expert in experts)
    yield Stack(f"{ours}.experts.down", tuple(downs), (moe.expert_size,), moe.num_experts)
    yield _one(f"{ours}.routers.0.weight", f"{theirs}.gate.weight", moe.num_experts, width)
    if kind == "deepseek_v3":
        yield _one(f"{ours}.routers.0.bias", f"{theirs}.gate.e_score_correction_bias", moe.num_experts)
    if moe.shared_size:
        shared = "shared_experts" if kind == "deepseek_v3" else "shared_expert"
        yield from _mlp(config, f"{ours}.shared", f"{theirs}.{shared}", moe.shared_size)
    if moe.shared_gate:
        yield _one(f"{ours}.shared_gate.weight", f"{theirs}.shared_expert_gate.weight", 1, width)

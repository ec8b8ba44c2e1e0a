"""A decoder of Bessemer's that transformers has no class for: load the folder of this file with trust_remote_code=True.

It is plain PyTorch, meant to be read, and imports nothing of Bessemer. Nothing is kept between the steps of a
generation: each reads the whole text again. Rows of different lengths are padded on the left.

Shapes: B batch, T positions, M = B*T rows, D hidden, H query heads, G key and value heads, K head width, E experts.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BessemerConfig(PretrainedConfig):
    """What the model is made of, under the names of Bessemer's own config."""

    model_type = "bessemer"

    def __init__(self, shape=None, **others):
        super().__init__(**others)
        self.shape = shape or {}


class Norm(nn.Module):
    """Divides by the root mean square of the last axis, and multiplies by a weight, or by 1 + weight."""

    def __init__(self, size, eps, offset):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(size)), eps, offset

    def forward(self, x):
        """(..., size) -> (..., size)."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


def linear(num_inputs, num_outputs, bias=False):
    """A linear layer; most have no bias."""
    return nn.Linear(num_inputs, num_outputs, bias=bias)


def norm(shape, size, eps=None):
    """A norm of the model's kind."""
    return Norm(size, shape.norm_eps if eps is None else eps, float(shape.norm_offset))


def rotated(x_BTHK, shape):
    """Rotates each pair of a head's elements by an angle that grows with the position."""
    length, size = x_BTHK.shape[1], x_BTHK.shape[3]
    even = torch.arange(0, size, 2, dtype=torch.float64, device=x_BTHK.device)
    angles = torch.arange(length, device=x_BTHK.device)[:, None] * shape.rope_base ** (-even / size)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    x = x_BTHK.float()
    a, b = (x[..., ::2], x[..., 1::2]) if shape.rope_interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if shape.rope_interleaved else torch.cat(turned, dim=-1)
    return joined.to(x_BTHK.dtype)


def attend(q_BTHK, k_BTGK, v_BTGK, is_seen, shape):
    """Mixes the values that each query may see; (B, T, H * K)."""
    repeats = q_BTHK.shape[2] // k_BTGK.shape[2]
    q, k, v = q_BTHK.transpose(1, 2), *(x.repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (k_BTGK, v_BTGK))
    scale = q.shape[-1] ** -0.5 if shape.attention_scale is None else shape.attention_scale
    scores = soft_capped((q @ k.transpose(2, 3)).float() * scale, shape.attention_softcap)
    shares = scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1).to(v.dtype)
    return (shares @ v).transpose(1, 2).flatten(2)


def soft_capped(x, cap):
    """cap tanh(x / cap); x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, shape):
        super().__init__()
        self.shape, size = shape, shape.head_size
        self.sizes = [shape.num_heads * size, shape.num_kv_heads * size, shape.num_kv_heads * size]
        self.qkv = linear(shape.hidden_size, sum(self.sizes), shape.qkv_bias)
        self.out = linear(self.sizes[0], shape.hidden_size)
        if shape.qk_norm != "none":
            self.q_norm = norm(shape, size if shape.qk_norm == "head" else self.sizes[0])
            self.k_norm = norm(shape, size if shape.qk_norm == "head" else self.sizes[1])

    def forward(self, x_BTD, is_seen):
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(x_BTD).split(self.sizes, dim=-1)
        if self.shape.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.shape.head_size)) for x in (q, k, v))
        if self.shape.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(attend(rotated(q, self.shape), rotated(k, self.shape), v, is_seen, self.shape))


class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values of all heads are made of one small vector."""

    def __init__(self, shape):
        super().__init__()
        self.shape, latent = shape, shape.latent
        query_size = shape.num_heads * (shape.head_size + latent.rope_size)
        if latent.query_rank:
            self.query_down = linear(shape.hidden_size, latent.query_rank)
            self.query_norm = norm(shape, latent.query_rank, latent.norm_eps)
            self.query_up = linear(latent.query_rank, query_size)
        else:
            self.query = linear(shape.hidden_size, query_size)
        self.kv_down = linear(shape.hidden_size, latent.kv_rank + latent.rope_size)
        self.kv_norm = norm(shape, latent.kv_rank, latent.norm_eps)
        self.kv_up = linear(latent.kv_rank, shape.num_heads * (shape.head_size + latent.value_size))
        self.out = linear(shape.num_heads * latent.value_size, shape.hidden_size)

    def forward(self, x_BTD, is_seen):
        """(B, T, D) -> (B, T, D)."""
        shape, latent = self.shape, self.shape.latent
        heads = (shape.num_heads, -1)
        q = self.query_up(self.query_norm(self.query_down(x_BTD))) if latent.query_rank else self.query(x_BTD)
        q, turned_q = q.unflatten(-1, heads).split((shape.head_size, latent.rope_size), dim=-1)
        small, shared_k = self.kv_down(x_BTD).split((latent.kv_rank, latent.rope_size), dim=-1)
        kv = self.kv_up(self.kv_norm(small)).unflatten(-1, heads)
        k, v = kv.split((shape.head_size, latent.value_size), dim=-1)
        turned_k = rotated(shared_k[:, :, None], shape).expand(-1, -1, shape.num_heads, -1)
        q, k = torch.cat((q, rotated(turned_q, shape)), dim=-1), torch.cat((k, turned_k), dim=-1)
        return self.out(attend(q, k, v, is_seen, shape))


def gated(gate_up, activation=F.silu):
    """The first half of the last axis, activated, times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate) * up


class Mlp(nn.Module):
    """A dense network: SwiGLU, GeGLU, or two stages of SwiGLU in a row."""

    def __init__(self, shape, size):
        super().__init__()
        self.kind = shape.ffn
        self.gate_up = linear(shape.hidden_size, 2 * size)
        if self.kind == "senet":
            self.gate_down = linear(size, 2 * shape.hidden_size)
        else:
            self.down = linear(size, shape.hidden_size)

    def forward(self, x):
        """(..., D) -> (..., D)."""
        if self.kind == "senet":
            return gated(self.gate_down(gated(self.gate_up(x))))
        activation = F.silu if self.kind == "swiglu" else lambda gate: F.gelu(gate, approximate="tanh")
        return self.down(gated(self.gate_up(x), activation))


class Router(nn.Module):
    """Scores all experts and picks some; a bias, where there is one, only picks."""

    def __init__(self, moe, width):
        super().__init__()
        self.moe, self.weight = moe, nn.Parameter(torch.zeros(moe.num_experts, width))
        self.register_buffer("bias", torch.zeros(moe.num_experts) if moe.bias != "none" else None)

    def forward(self, x_MD):
        """(M, D) -> the experts picked for each row, and their weights."""
        moe, logits_ME = self.moe, F.linear(x_MD.float(), self.weight.float()) / self.moe.temperature
        scores_ME = logits_ME.sigmoid() if moe.scores == "sigmoid" else logits_ME.softmax(dim=-1)
        picking_ME = scores_ME if self.bias is None else scores_ME + self.bias
        if moe.num_groups > 1:
            of_groups = picking_ME.unflatten(-1, (moe.num_groups, -1))
            judged = of_groups.topk(2 if moe.group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
            is_open = torch.zeros_like(judged, dtype=torch.bool).scatter_(1, best(judged, moe.num_picked_groups), True)
            picking_ME = of_groups.masked_fill(~is_open[..., None], -torch.inf).flatten(1)
        picks = best(picking_ME, moe.num_picked)
        weights = scores_ME.gather(1, picks)
        if moe.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return picks, weights * moe.route_scale


def best(scores, count):
    """Indices of the largest scores, the lower one first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


class Experts(nn.Module):
    """The SwiGLU networks of a layer's experts."""

    def __init__(self, moe, width):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(moe.num_experts, 2 * moe.expert_size, width))
        self.down = nn.Parameter(torch.zeros(moe.num_experts, width, moe.expert_size))

    def forward(self, index, x):
        """What one of them makes of x (..., D)."""
        return F.linear(gated(F.linear(x, self.gate_up[index])), self.down[index])


class Slots(nn.Module):
    """Each chunk reads what experts make of averages of all tokens before it, or a learned value."""

    def __init__(self, moe, width):
        super().__init__()
        self.moe, self.logits = moe, nn.Parameter(torch.zeros(moe.num_experts * moe.num_slots, width))
        self.null_key, self.null_value = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x_BTD, experts):
        """(B, T, D) -> (B, T, D)."""
        size, wide = self.moe.chunk_size, x_BTD.float()
        logits_BTS, null_BT1 = F.linear(wide, self.logits.float()), F.linear(wide, self.null_key.float()[None])
        null_B1D = self.null_value.float().expand(len(wide), 1, -1)
        read = [null_B1D.expand_as(wide[:, :size])]
        for start in range(size, x_BTD.shape[1], size):
            slots_BSD = logits_BTS[:, :start].softmax(dim=1).mT @ wide[:, :start]
            slots = slots_BSD.to(x_BTD.dtype).split(self.moe.num_slots, dim=1)
            made_BSD = torch.cat([experts(i, of_expert) for i, of_expert in enumerate(slots)], dim=1).float()
            here = slice(start, start + size)
            shares = torch.cat((logits_BTS[:, here], null_BT1[:, here]), dim=-1).softmax(dim=-1)
            read.append(shares @ torch.cat((made_BSD, null_B1D), dim=1))
        return torch.cat(read, dim=1).to(x_BTD.dtype)


class Mixture(nn.Module):
    """Experts in place of a dense network: picked by a router, perhaps several times in a row, or reading averages."""

    def __init__(self, shape):
        super().__init__()
        self.moe, width = shape.moe, shape.hidden_size
        is_soft = self.moe.kind == "chunk_soft"
        self.experts = Experts(self.moe, width)
        self.routers = nn.ModuleList(Router(self.moe, width) for _ in range(0 if is_soft else self.moe.chain_length))
        self.soft = Slots(self.moe, width) if is_soft else None
        self.shared = Mlp(shape, self.moe.shared_size) if self.moe.shared_size else None
        self.shared_gate = linear(width, 1) if self.moe.shared_gate else None

    def forward(self, x_BTD):
        """(B, T, D) -> (B, T, D)."""
        if self.soft is not None:
            return self.soft(x_BTD, self.experts) + self._beside(x_BTD)
        for router in self.routers:
            y_BTD = self._picked(router, x_BTD.flatten(0, 1)).view_as(x_BTD) + self._beside(x_BTD)
            x_BTD = y_BTD if self.moe.chain_residual == "outer" else x_BTD + y_BTD
        return x_BTD

    def _beside(self, x):
        if self.shared is None:
            return 0.0
        return self.shared(x) if self.shared_gate is None else self.shared_gate(x).sigmoid() * self.shared(x)

    def _picked(self, router, x_MD):
        picks, weights = router(x_MD)
        y_MD = torch.zeros_like(x_MD)
        for index in range(self.moe.num_experts):
            rows, place = (picks == index).nonzero(as_tuple=True)
            y_MD[rows] += self.experts(index, x_MD[rows]) * weights[rows, place, None].to(x_MD.dtype)
        return y_MD


class Block(nn.Module):
    """Attention, then a dense network or experts, each normed and added to the stream as `norms` says."""

    def __init__(self, shape, has_experts):
        super().__init__()
        self.shape, width = shape, shape.hidden_size
        self.attention = LatentAttention(shape) if shape.latent.kv_rank else Attention(shape)
        self.mlp = None if has_experts else Mlp(shape, shape.ffn_size)
        self.moe = Mixture(shape) if has_experts else None
        reads, adds = shape.norms != "output", shape.norms in ("sandwich", "output")
        self.attention_norm, self.mlp_norm = (norm(shape, width) if reads else nn.Identity() for _ in range(2))
        self.attention_out_norm, self.mlp_out_norm = (norm(shape, width) if adds else nn.Identity() for _ in range(2))

    def forward(self, x_BTD, is_seen):
        """(B, T, D) -> (B, T, D)."""
        x_BTD = self._added(x_BTD, lambda x: self.attention(x, is_seen), self.attention_norm, self.attention_out_norm)
        if self.moe is not None and self.shape.moe.chain_residual == "inner" and self.shape.moe.kind == "picked":
            return self.moe(self.mlp_norm(x_BTD))
        return self._added(x_BTD, self.mlp or self.moe, self.mlp_norm, self.mlp_out_norm)

    def _added(self, x_BTD, layer, before, behind):
        if self.shape.norms == "deepnorm":
            return before((2 * self.shape.num_layers) ** 0.25 * x_BTD + layer(x_BTD))
        return x_BTD + behind(layer(before(x_BTD)))


class BessemerForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = BessemerConfig
    _keep_in_fp32_modules_strict = {"routers"}  # noqa: RUF012
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        parts = {key: SimpleNamespace(**config.shape[key]) for key in ("latent", "moe")}
        self.shape = shape = SimpleNamespace(**(config.shape | parts))
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape, self._has_experts(i)) for i in range(shape.num_layers))
        self.norm = norm(shape, shape.hidden_size)
        self.head = linear(shape.hidden_size, shape.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self):
        """The head."""
        return self.head

    def forward(self, input_ids, attention_mask=None, labels=None, **_others):
        """Logits (B, T, V) of the next token, and with labels their mean cross-entropy."""
        shape, length = self.shape, input_ids.shape[1]
        if attention_mask is not None and self._reads_chunks() and not attention_mask.all():
            raise ValueError("experts that read chunks count them from the first token: give rows without padding")
        x_BTD = self.embedding(input_ids) * shape.embedding_scale
        distance = torch.arange(length, device=x_BTD.device)[:, None] - torch.arange(length, device=x_BTD.device)
        is_there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for layer, block in enumerate(self.blocks):
            is_windowed = shape.window_pattern[layer % len(shape.window_pattern)] == "S" and shape.sliding_window
            is_near = (distance >= 0) & (distance < (shape.sliding_window if is_windowed else math.inf))
            x_BTD = block(x_BTD, (is_near & is_there.bool()[:, None, None]) | (distance == 0))
        logits = soft_capped(self.head(self.norm(x_BTD)), shape.logit_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_others):
        """The whole text, every time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def _reads_chunks(self):
        return self.shape.moe.kind == "chunk_soft" and self.shape.moe.num_experts > 0

    def _has_experts(self, layer):
        moe = self.shape.moe
        above = layer - moe.first_dense_layers
        return moe.num_experts > 0 and above >= 0 and above % moe.layer_every == 0

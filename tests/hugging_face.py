"""Small models of transformers, and our models compared with them."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from kernels.cross_entropy import cross_entropy_sum
from model.config import ModelConfig
from model.convert import from_hugging_face, read_hugging_face, to_hugging_face
from model.transformer import Transformer
from tests.models import random_tokens

_SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    # No row of the embedding is kept from learning.
    "pad_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
_KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 12, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
               "query_pre_attn_scalar": 20, "hidden_size": 64},
    "Olmo2": {"eos_token_id": None},
    "Mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, **_EXPERTS},
    "Qwen3Moe": {"head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True, **_EXPERTS},
    "Olmoe": {"eos_token_id": None, **_EXPERTS},
    "DeepseekV3": {
        "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 12,
        "q_lora_rank": 10, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    },
}  # fmt: skip


class InDouble(TorchFunctionMode):
    """Makes fp64 of every fp32 that code asks for: theirs compute norms, softmax, rotary angles and router scores in
    fp32 whatever the model's dtype, and would be no better than that to compare with."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Calls the function."""
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        kwargs = {key: _double(value) for key, value in (kwargs or {}).items()}
        return function(*(_double(value) for value in args), **kwargs)


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def their_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model of theirs whose norms and biases are random too, in the plainest implementation that they have."""
    config = getattr(transformers, f"{kind}Config")(**(_SIZES | _KINDS[kind] | changes))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    with InDouble() if dtype == torch.float64 else contextlib.nullcontext():
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                # fp32 keeps every digit of these.
                buffer.copy_(0.1 * torch.randn(buffer.shape))
    return model


def load_theirs(folder: Path) -> PreTrainedModel:
    """The model of a folder as transformers loads it, in fp64, every tensor used and none missing."""
    with InDouble():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    assert not any(info.values()), info
    return model.eval()


def our_model(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """A model of ours in the dtype of its embedding."""
    model = Transformer(config).to(state["embedding.weight"].dtype)
    model.load_state_dict(state)
    return model


def errors(ours: Transformer, theirs: PreTrainedModel, folder: Path, length: int = 24) -> tuple[float, float]:
    """The largest differences of logits, and of gradients of a weight, each relative to the largest value.

    The folder receives their gradients as if they were weights, so that import gives them our names and shapes. Their
    model is of no use afterwards.
    """
    tokens = random_tokens(ours.config, 2, length)
    targets = tokens.roll(-1, dims=1)
    our_logits = ours(tokens)
    with InDouble() if our_logits.dtype == torch.float64 else contextlib.nullcontext():
        their_logits = theirs(input_ids=tokens).logits
    cross_entropy_sum(our_logits, targets).backward()
    cross_entropy_sum(their_logits, targets).backward()
    for parameter in theirs.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    theirs.save_pretrained(folder / "gradients")
    config, expected = read_hugging_face(folder / "gradients")
    expected = from_hugging_face(ours.config, to_hugging_face(config, expected))
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    return (
        _relative_error(our_logits, their_logits),
        max(_relative_error(gradient, expected[name]) for name, gradient in gradients.items()),
    )


def _relative_error(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return ((found - expected).abs().max() / expected.abs().max()).item()

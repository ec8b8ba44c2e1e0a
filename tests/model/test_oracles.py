"""transformers as an independent oracle of every architecture, in fp64 with random weights: logits and gradients of
every weight, relative to the largest value of each. Theirs compute in fp64 throughout, see tests/hugging_face.py."""

import pytest
import torch

from model.convert import read_hugging_face
from tests.hugging_face import errors, our_model, their_model

ORACLES = {
    "Llama": ("Llama", {}),
    "Llama tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama wide heads": ("Llama", {"head_dim": 24}),
    "Llama other base": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "Mistral": ("Mistral", {}),
    "Mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "Qwen2": ("Qwen2", {"rms_norm_eps": 1e-5}),
    "Qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2 upper windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {}),
    "Qwen3 tied": ("Qwen3", {"tie_word_embeddings": True}),
    "Gemma2": ("Gemma2", {}),
    "Gemma2 without caps": ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "Olmo2": ("Olmo2", {}),
    "Mixtral": ("Mixtral", {}),
    "Mixtral with window": ("Mixtral", {"sliding_window": 5}),
    "Qwen2Moe": ("Qwen2Moe", {}),
    "Qwen2Moe without biases": ("Qwen2Moe", {"qkv_bias": False, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "Qwen3Moe": ("Qwen3Moe", {}),
    "Qwen3Moe not renormalised": ("Qwen3Moe", {"norm_topk_prob": False, "mlp_only_layers": [0, 1]}),
    "Olmoe": ("Olmoe", {}),
    "Olmoe renormalised": ("Olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "DeepseekV3": ("DeepseekV3", {}),
    "DeepseekV3 without query rank": ("DeepseekV3", {"q_lora_rank": None, "rope_interleave": False}),
    "DeepseekV3 one group": ("DeepseekV3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "DeepseekV3 with another epsilon": ("DeepseekV3", {"rms_norm_eps": 1e-4}),
    "DeepseekV3 dense": ("DeepseekV3", {"first_k_dense_replace": 3}),
}


@pytest.mark.parametrize("oracle", ORACLES)
def test_a_model_of_theirs_becomes_the_same_function(oracle, tmp_path):
    kind, changes = ORACLES[oracle]
    theirs = their_model(kind, torch.float64, **changes)
    theirs.save_pretrained(tmp_path)
    ours = our_model(*read_hugging_face(tmp_path))
    logits_error, gradients_error = errors(ours, theirs, tmp_path)
    assert logits_error < 1e-12
    assert gradients_error < 1e-12

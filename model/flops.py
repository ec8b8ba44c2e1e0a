"""Exact parameter counts, model FLOPs per token, and the peaks that turn them into MFU. Imports no torch."""

from model.config import ModelConfig

# Dense bf16 peak without sparsity, TFLOP/s, from the vendors' data sheets. Exact device names: "NVIDIA H20" is a
# prefix of "NVIDIA H200". A device that is not here gets no MFU rather than a guess.
DENSE_BF16_PEAK_TFLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 836.0,
    "NVIDIA H800": 989.0,
    "NVIDIA H20": 148.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "AMD Instinct MI300X": 1307.0,
}


def num_params(config: ModelConfig) -> int:
    """Trainable parameters, a tied head counted once."""
    d = config.hidden_size
    norms = d * {"pre": 2, "sandwich": 4, "output": 2, "deepnorm": 2}[config.norms] + _head_norms(config)
    biases = config.query_size + 2 * config.kv_size if config.qkv_bias else 0
    embeddings = config.vocab_size * d + (0 if config.tie_embeddings else config.head_rows * d)
    blocks = sum(_attention_params(config) + _ffn_params(config, layer) for layer in range(config.num_layers))
    return embeddings + blocks + config.num_layers * (norms + biases) + d


def num_active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: of the routed experts only those that it is sent to, each as often as it is."""
    everywhere = num_params(config) - sum(_ffn_params(config, layer) for layer in range(config.num_layers))
    return everywhere + round(sum(_active_ffn_params(config, layer) for layer in range(config.num_layers)))


def num_matmul_params(config: ModelConfig) -> int:
    """Weights that multiply every token: matrices and the head, of routed experts only those that a token is sent to;
    not the input embedding, norms or biases."""
    ffns = sum(_active_ffn_params(config, layer) for layer in range(config.num_layers))
    return config.num_layers * _attention_params(config) + round(ffns) + config.head_rows * config.hidden_size


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward per trained token: 6 N_matmul + 6 L H (K_query + K_value) T.

    Attention is counted over the whole square, not halved for causality, of a windowed layer over the window;
    recomputation is not counted. Experts that a token is not sent to cost nothing.

    Source: Chowdhery et al., "PaLM", 2022, appendix B.
    """
    keys = sum(min(sequence_length, config.window(layer) or sequence_length) for layer in range(config.num_layers))
    return 6 * num_matmul_params(config) + 6 * _head_widths(config) * keys


def causal_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """What a causal model has to compute of flops_per_token: token t attends to t keys, (T + 1) / 2 in the mean, or to
    the window if that is less.

    6 N_matmul + 3 L H (K_query + K_value) (T + 1).
    """
    keys = 0
    for layer in range(config.num_layers):
        window = min(sequence_length, config.window(layer) or sequence_length)
        keys += window * (window + 1) // 2 + (sequence_length - window) * window
    return 6 * num_matmul_params(config) + 6 * _head_widths(config) * keys // sequence_length


def mfu(tokens_per_s: float, flops_per_token: float, device_name: str) -> float | None:
    """Model FLOPs utilisation of one device against its dense bf16 peak; None where the peak is not known.

    With `causal_flops_per_token` it is the share of the peak that does what no implementation can leave out.
    """
    peak_tflops = DENSE_BF16_PEAK_TFLOPS.get(device_name)
    return None if peak_tflops is None else tokens_per_s * flops_per_token / (peak_tflops * 1e12)


def _attention_params(config: ModelConfig) -> int:
    d, heads, latent = config.hidden_size, config.num_heads, config.latent
    if not config.is_latent:
        return d * (config.query_size + 2 * config.kv_size) + config.query_size * d
    query = heads * (config.head_size + latent.rope_size)
    queries = d * latent.query_rank + latent.query_rank * query if latent.query_rank else d * query
    keys_and_values = latent.kv_rank * heads * (config.head_size + latent.value_size)
    return queries + d * (latent.kv_rank + latent.rope_size) + keys_and_values + heads * latent.value_size * d


def _head_norms(config: ModelConfig) -> int:
    if config.is_latent:
        return config.latent.kv_rank + config.latent.query_rank
    return {"none": 0, "head": 2 * config.head_size, "full": config.query_size + config.kv_size}[config.qk_norm]


def _head_widths(config: ModelConfig) -> int:
    """Widths of the queries and of the values of all heads together."""
    if config.is_latent:
        latent = config.latent
        return config.num_heads * (config.head_size + latent.rope_size + latent.value_size)
    return 2 * config.query_size


def _ffn_params(config: ModelConfig, layer: int) -> int:
    d, moe = config.hidden_size, config.moe
    if not config.has_experts(layer):
        return _mlp_params(config, config.ffn_size)
    gates = (d if moe.shared_gate else 0) + (2 * d if moe.kind == "chunk_soft" else 0)  # key and value of the null slot
    experts = moe.num_experts * _expert_params(config)
    return experts + _router_params(config) * moe.chain_length + _shared_params(config) + gates


def _active_ffn_params(config: ModelConfig, layer: int) -> float:
    """Weights that one token is multiplied by, a weight as often as it is."""
    moe = config.moe
    if not config.has_experts(layer):
        return _mlp_params(config, config.ffn_size)
    # Experts of a soft mixture read slots, num_slots each for all tokens of a chunk.
    passes = moe.num_picked if moe.kind == "picked" else moe.num_experts * moe.num_slots / moe.chunk_size
    gate = config.hidden_size if moe.shared_gate else 0
    once = passes * _expert_params(config) + _router_params(config) + _shared_params(config) + gate
    return moe.chain_length * once


def _mlp_params(config: ModelConfig, width: int) -> int:
    return (4 if config.ffn == "senet" else 3) * config.hidden_size * width


def _expert_params(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe.expert_size


def _shared_params(config: ModelConfig) -> int:
    return _mlp_params(config, config.moe.shared_size) if config.moe.shared_size else 0


def _router_params(config: ModelConfig) -> int:
    moe = config.moe
    slots = moe.num_experts * (moe.num_slots if moe.kind == "chunk_soft" else 1)
    return slots * config.hidden_size

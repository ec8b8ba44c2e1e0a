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
    norms = 2 * d + (2 * config.head_size if config.qk_norm else 0)
    biases = config.query_size + 2 * config.kv_size if config.qkv_bias else 0
    embeddings = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return embeddings + config.num_layers * (_block_matmul_params(config) + norms + biases) + d


def num_matmul_params(config: ModelConfig) -> int:
    """Weights that multiply every token: all matrices and the head; not the input embedding, norms or biases."""
    return config.num_layers * _block_matmul_params(config) + config.vocab_size * config.hidden_size


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Model FLOPs of forward and backward per trained token: 6 N_matmul + 12 L (H K) T.

    Attention is counted over the whole square, not halved for causality; recomputation is not counted.

    Source: Chowdhery et al., "PaLM", 2022, appendix B.
    """
    attention = 12 * config.num_layers * config.query_size * sequence_length
    return 6 * num_matmul_params(config) + attention


def causal_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """What a causal model has to compute of flops_per_token: token t attends to t keys, (T + 1) / 2 in the mean.

    6 N_matmul + 6 L (H K) (T + 1).
    """
    return 6 * num_matmul_params(config) + 6 * config.num_layers * config.query_size * (sequence_length + 1)


def mfu(tokens_per_s: float, flops_per_token: float, device_name: str) -> float | None:
    """Model FLOPs utilisation of one device against its dense bf16 peak; None where the peak is not known.

    With `causal_flops_per_token` it is the share of the peak that does what no implementation can leave out.
    """
    peak_tflops = DENSE_BF16_PEAK_TFLOPS.get(device_name)
    return None if peak_tflops is None else tokens_per_s * flops_per_token / (peak_tflops * 1e12)


def _block_matmul_params(config: ModelConfig) -> int:
    d = config.hidden_size
    attention = d * (config.query_size + 2 * config.kv_size) + config.query_size * d
    return attention + 3 * d * config.ffn_size

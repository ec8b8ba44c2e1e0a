"""What others have found to be good sizes, beside those of a run, each with its source. Imports no torch."""

from model.config import ModelConfig
from model.flops import flops_per_token, num_active_params
from train.config import RunConfig

TOKENS_PER_PARAM = 20
"""Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022 (Chinchilla)."""
# Batches of runs of about a billion parameters: Zhang et al., "TinyLlama", 2024, and Groeneveld et al., "OLMo", 2024.
_BATCH_OF_1B = (2_000_000, 4_200_000)
_SIZES_OF_1B = (500e6, 3e9)
_MOST_WARMUP = 0.2


def step_law(model: ModelConfig, num_tokens: float) -> tuple[float, float]:
    """(best batch in tokens, best peak learning rate) of a run: B = 0.58 D^0.571, lr = 1.79 N^-0.713 D^0.307, N the
    parameters (of experts the active ones) without the embeddings.

    Source: Li et al., "Predictable Scale: Part I, Step Law", 2025 (arXiv 2503.04715).
    """
    size = num_active_params(model) - _embedding_params(model)
    return 0.58 * num_tokens**0.571, 1.79 * size**-0.713 * num_tokens**0.307


def deepseek_law(model: ModelConfig, sequence_length: int, num_tokens: float) -> tuple[float, float]:
    """(best batch in tokens, best peak learning rate) of a run: B = 0.2920 C^0.3271, lr = 0.3118 C^-0.1250, C the
    FLOPs of the run without the head's.

    Source: Bi et al., "DeepSeek LLM", 2024, equations 1 and 2.
    """
    head = 6 * model.vocab_size * model.hidden_size
    compute = (flops_per_token(model, sequence_length) - head) * num_tokens
    return 0.2920 * compute**0.3271, 0.3118 * compute**-0.1250


def advice(config: RunConfig) -> list[str]:
    """How a run's tokens, batch, learning rate and warm-up compare, a line each."""
    model, batch, num_steps = config.model, config.batch_tokens, config.run.num_steps
    num_tokens, size = batch * num_steps, num_active_params(config.model)
    step_batch, step_rate = step_law(model, num_tokens)
    deepseek_batch, deepseek_rate = deepseek_law(model, config.data.sequence_length, num_tokens)
    warmup = config.optim.warmup_steps
    return [
        f"tokens: {num_tokens / size:,.1f} per parameter; {TOKENS_PER_PARAM} are compute-optimal (Hoffmann et al. "
        f"2022), more make a better model of this size",
        f"batch: {_short(batch)} tokens; {_short(step_batch)} by Step Law (Li et al. 2025, 0.58 D^0.571), "
        f"{_short(deepseek_batch)} by Bi et al. 2024 (0.292 C^0.3271)"
        + _of_1b(size, batch)
        + _outside(batch, step_batch, deepseek_batch),
        f"learning rate: {config.optim.peak_lr:.2g}; {step_rate:.2g} by Step Law (1.79 N^-0.713 D^0.307), "
        f"{deepseek_rate:.2g} by Bi et al. 2024 (0.3118 C^-0.125)"
        + _outside(config.optim.peak_lr, step_rate, deepseek_rate),
        f"warm-up: {warmup:,} steps, {warmup / num_steps:.1%} of the run, {_short(warmup * batch)} tokens"
        + (f": MORE THAN {_MOST_WARMUP:.0%} of the run" if warmup > _MOST_WARMUP * num_steps else "")
        + (": NONE, the first steps are of full size while the moments are still empty" if not warmup else ""),
    ]


def _of_1b(size: int, batch: int) -> str:
    if not _SIZES_OF_1B[0] <= size <= _SIZES_OF_1B[1]:
        return ""
    least, most = _BATCH_OF_1B
    verdict = "" if 0.9 * least <= batch <= 1.1 * most else ", WHICH THIS IS NOT"
    return f"; 2 to 4 M in runs of this size (TinyLlama, OLMo){verdict}"


def _outside(value: float, *laws: float) -> str:
    """Says so if a value is more than three times off all laws: they are flat near their best."""
    if value > 3 * max(laws):
        return f": {value / max(laws):.1f} TIMES THE HIGHEST of them"
    return f": {min(laws) / value:.1f} TIMES BELOW THE LOWEST of them" if 3 * value < min(laws) else ""


def _embedding_params(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)


def _short(tokens: float) -> str:
    for unit, of_unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= of_unit:
            return f"{tokens / of_unit:.3g} {unit}"
    return f"{tokens:.0f}"

"""How fast text is generated: one prompt, batches, with and without the cache, and by transformers.

    python -m benchmarks.generation [--prompt-tokens 512] [--new-tokens 128]

Greedy, of random weights, which transformers loads from our export; no text ends early, so that all make as many
tokens. Prompts of a ragged batch are between a quarter of the prompt tokens and all of them; transformers pads them to
the longest, as we do. Every step reads all weights once: "weights, GB/s" is to be held against the memory's bandwidth.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.environment import describe, device_name, write_result
from benchmarks.table import Table
from evaluation.engine import complete, complete_batch
from evaluation.sampling import Sampling
from model.config import ModelConfig
from model.convert import write_hugging_face
from model.flops import num_params
from model.init import initial_value
from model.transformer import Transformer

COMMAND = "python -m benchmarks.generation"
_REPEATS = 3
_BATCH = 16
_GREEDY = Sampling()

Prompts = list[list[int]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=512 if torch.cuda.is_available() else 128)
    parser.add_argument("--new-tokens", type=int, default=128 if torch.cuda.is_available() else 32)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: benchmarks/results")
    options = parser.parse_args(argv)
    table = measure(_config(), options.prompt_tokens, options.new_tokens)
    print(f"{device_name()}  torch {describe()['torch']}")
    table.print()
    print(f"\nwrote {write_result('generation', COMMAND, table.records(), options.out, note=table.note)}")
    return 0


def measure(config: ModelConfig, num_prompt: int, num_new: int) -> Table:
    """Tokens per second of every way to generate."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _random_model(config, device, dtype)
    theirs = _transformers_model(model)
    weights_gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    one, even = _prompts(config, 1, num_prompt, num_prompt), _prompts(config, _BATCH, num_prompt, num_prompt)
    ragged = _prompts(config, _BATCH, num_prompt // 4, num_prompt)
    ways: list[tuple[str, Prompts, Callable[[], object]]] = [
        ("one prompt, no cache", one, lambda: _without_cache(model, one[0], num_new)),
        ("one prompt", one, lambda: complete(model, one[0], max_new_tokens=num_new, sampling=_GREEDY)),
        ("one prompt, transformers", one, lambda: _by_transformers(theirs, one, num_new)),
        ("even batch", even, lambda: complete_batch(model, even, max_new_tokens=num_new, sampling=_GREEDY)),
        ("even batch, transformers", even, lambda: _by_transformers(theirs, even, num_new)),
        ("ragged batch", ragged, lambda: complete_batch(model, ragged, max_new_tokens=num_new, sampling=_GREEDY)),
        ("ragged batch, transformers", ragged, lambda: _by_transformers(theirs, ragged, num_new)),
    ]
    rows = []
    for (name, prompts, _), elapsed_s in zip(ways, _medians_s([way for _, _, way in ways]), strict=True):
        tokens_per_s = len(prompts) * num_new / elapsed_s
        rows.append([name, len(prompts), tokens_per_s, 1e3 * elapsed_s / num_new, weights_gb * num_new / elapsed_s])
    return Table(
        f"Generation, {num_new} tokens after {num_prompt}",
        ["way", "prompts", "tokens/s", "ms per step", "weights, GB/s"],
        rows,
        f"{num_params(config):,} parameters in {dtype}, {weights_gb:.2f} GB; median of {_REPEATS}, reading of the "
        "prompts included",
    )


def _config() -> ModelConfig:
    if torch.cuda.is_available():
        return ModelConfig.preset("tinyllama-1.1b")
    return ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=6, num_heads=8, num_kv_heads=4, head_size=64, ffn_size=1536
    )


def _random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    with device:
        model = Transformer(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(config, name, parameter.shape, seed=0))
    return model


def _transformers_model(model: Transformer) -> Any:
    """Of the same weights, dtype and device."""
    dtype = model.embedding.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        write_hugging_face(Path(folder), model.config, model.state_dict(), eos_id=None, dtype=name)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return theirs.to(model.embedding.weight.device).eval()


def _prompts(config: ModelConfig, count: int, shortest: int, longest: int) -> Prompts:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, count).round().int().tolist() if count > 1 else [longest]
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def _without_cache(model: Transformer, prompt: list[int], num_new: int) -> None:
    tokens = torch.tensor([prompt], device=model.embedding.weight.device)
    for _ in range(num_new):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(dim=-1)), dim=1)


def _by_transformers(theirs: Any, prompts: Prompts, num_new: int) -> None:
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=theirs.device)
    is_token = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=theirs.device)
    theirs.generate(
        padded, attention_mask=is_token, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0
    )


def _medians_s(ways: Sequence[Callable[[], object]]) -> list[float]:
    """Of each way, in rounds, so that what else the machine does slows all alike."""
    rounds_s = [[_elapsed_s(way) for way in ways] for _ in range(1 + _REPEATS)]
    return [statistics.median(times_s) for times_s in zip(*rounds_s[1:], strict=True)]


def _elapsed_s(way: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    sys.exit(main())

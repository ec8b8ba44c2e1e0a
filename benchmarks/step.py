"""A training step of ours beside a plain loop over transformers' Llama of the same size: same weights, same batches.

    python -m benchmarks.step

One process; blocks of steps are interleaved, so that a slow minute of the machine hits all rows alike; medians count.
A step is forward, backward, gradient clipping and AdamW, for ours also the collectives and checks of the real loop. A
row whose loss after the warm-up differs from the first row's by more than `_LOSS_TOLERANCE` is void. On a CPU the model
is the smoke preset in fp32; on a GPU it is TinyLlama-1.1B in bf16, and MFU is printed as well.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import describe, device_name, result_path, write_result
from model.batch import Batch
from model.config import ModelConfig
from model.convert import hugging_face_config, to_hugging_face
from model.flops import flops_per_token, mfu, num_params
from model.init import initial_value
from resume.saver import Saver
from train import ranks
from train.config import DataSection, RunConfig, with_values
from train.faults import Faults
from train.feed import Feed
from train.guard import Guard
from train.loop import Trainer, train_step
from train.objectives import next_token_loss
from train.optim import make_optimizer
from train.sharding import build_model
from train.signals import StopRequest
from train.watch import Watch

COMMAND = "python -m benchmarks.step"
_LEARNING_RATE = 1e-3
_LOSS_TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}

Step = Callable[[Batch], float]
"""One optimizer step on a micro-batch, and its mean loss."""


@dataclasses.dataclass(slots=True)
class Row:
    """One way to run the step, and what was measured of it."""

    name: str
    step: Step
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0


def main() -> int:
    """Measures all rows, prints a table, writes JSON and PNG."""
    torch.manual_seed(0)
    this = ranks.start("auto")
    config = _config(this.device)
    blocks, steps_per_block, warm_up = (8, 5, 4) if this.device.type == "cpu" else (6, 20, 10)
    try:
        rows = _rows(config, this)
        # One batch again and again: a model that learns it falls fast, so that a row that trains otherwise shows.
        batches = [random_batch(config)] * (warm_up + blocks * steps_per_block)
        for row in rows:
            _run(row, batches[:warm_up], this.device)
        for row in rows:
            row.seconds.clear()
        for block in range(blocks):
            first = warm_up + block * steps_per_block
            for row in rows:
                _run(row, batches[first : first + steps_per_block], this.device)
    finally:
        ranks.stop()
    _report(rows, config, this.device)
    return 0


def _config(device: torch.device) -> RunConfig:
    if device.type == "cpu":
        model = ModelConfig.preset("smoke")
        data = DataSection(sequence_length=256, batch_sequences=8, micro_batch_sequences=8)
    else:
        model = ModelConfig.preset("tinyllama-1.1b")
        # All rows live on the device at once, about 20 GB of weights and moments each.
        sequences = 8 if torch.cuda.get_device_properties(device).total_memory > 120e9 else 2
        data = DataSection(sequence_length=2048, batch_sequences=sequences, micro_batch_sequences=sequences)
    return RunConfig(model=model, data=data)


def random_batch(config: RunConfig) -> Batch:
    """A micro-batch of random tokens, on the CPU."""
    shape = (config.data.micro_batch_sequences, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, tokens[:, 1:].numel())


def _rows(config: RunConfig, this: ranks.Ranks) -> list[Row]:
    rows = [Row("transformers, SDPA, fused AdamW", _theirs(config, this.device, compiled=False))]
    if this.device.type == "cuda":
        rows.append(Row("transformers, the same, compiled", _theirs(config, this.device, compiled=True)))
        eager = with_values(config, parallel={"compile": "off"})
        rows.append(Row("ours, not compiled", _ours(eager, this)))
    rows.append(Row("ours", _ours(config, this)))
    return rows


def make_trainer(config: RunConfig, this: ranks.Ranks) -> Trainer:
    """What the real loop's step needs, without data and without a run folder."""
    model = build_model(config.model, config.parallel, this, lambda name, shape: _value(config, name, shape))
    return Trainer(
        config=config,
        ranks=this,
        model=model,
        optimizer=make_optimizer(model, config.optim),
        feed=cast(Feed, None),  # a step is given its batches
        objective=next_token_loss,
        validate=None,
        log=None,
        stop=StopRequest(),
        saver=Saver(Path(config.run.dir)),
        guard=Guard(config.guard),
        watch=Watch(Path(config.run.dir), life="", rank=0, world_size=1, timeout_s=config.run.hang_timeout_s),
        faults=Faults(Path(config.run.dir), (), rank=0),
    )


def _ours(config: RunConfig, this: ranks.Ranks) -> Step:
    """The step of the real loop."""
    trainer = make_trainer(config, this)
    return lambda batch: train_step(trainer, [batch], batch.num_targets, _LEARNING_RATE, 1).loss_mean


def _theirs(config: RunConfig, device: torch.device, compiled: bool) -> Step:
    """What one would write around transformers' model: autocast on a GPU, torch's own clipping, fused AdamW."""
    import transformers

    table = hugging_face_config(config.model, eos_id=None, dtype="fp32")
    table.pop("architectures")
    hf_config = transformers.LlamaConfig(**{**table, "attn_implementation": "sdpa", "use_cache": False})
    model: Any = transformers.LlamaForCausalLM(hf_config)
    shapes = _shapes(config.model)
    state = {name: _value(config, name, shape) for name, shape in shapes.items()}
    model.load_state_dict(to_hugging_face(config.model, state), strict=not config.model.tie_embeddings)
    model.to(device)
    if compiled:
        model.compile()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    betas = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=betas, eps=config.optim.eps, fused=True)

    def step(batch: Batch) -> float:
        on_device = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(on_device.tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), on_device.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    from model.transformer import Transformer

    with torch.device("meta"):
        return {name: value.shape for name, value in Transformer(config).state_dict().items()}


def _value(config: RunConfig, name: str, shape: torch.Size) -> Tensor:
    if config.model.tie_embeddings and name == "head.weight":
        name = "embedding.weight"
    return initial_value(config.model, name, shape, config.run.seed)


def _run(row: Row, batches: list[Batch], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batch in batches:
        started_s = time.perf_counter()
        row.losses.append(row.step(batch))  # reading the loss waits for the device
        row.seconds.append(time.perf_counter() - started_s)
    if device.type == "cuda":
        row.peak_bytes = max(row.peak_bytes, torch.cuda.max_memory_allocated())


def _report(rows: list[Row], config: RunConfig, device: torch.device) -> None:
    tokens = config.batch_tokens
    flops = flops_per_token(config.model, config.data.sequence_length)
    base = rows[0]
    results: list[dict[str, Any]] = []
    print(
        f"{device_name()}  torch {describe()['torch']}  {num_params(config.model):,} parameters, {tokens:,} tokens/step"
    )
    print(f"{'':34} {'ms/step':>9} {'tok/s':>9} {'ratio':>6} {'p20-p80':>11} {'MFU':>6}  last loss")
    for row in rows:
        ratios = sorted(theirs / ours for theirs, ours in zip(base.seconds, row.seconds, strict=True))
        p20, p80 = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
        median_s = statistics.median(row.seconds)
        agrees = math.isclose(row.losses[-1], base.losses[-1], abs_tol=_LOSS_TOLERANCE[device.type])
        utilisation = mfu(tokens / median_s, flops, device_name())
        result = {
            "name": row.name,
            "ms_per_step": median_s * 1e3,
            "tokens_per_s": tokens / median_s,
            "speed_ratio_median": statistics.median(ratios),
            "speed_ratio_p20_p80": [p20, p80],
            "mfu": utilisation,
            "peak_bytes": row.peak_bytes or None,
            "last_loss": row.losses[-1],
            "valid": agrees,
        }
        results.append(result)
        shown = f"{utilisation:6.1%}" if utilisation is not None else "   n/a"
        print(
            f"{row.name:34} {median_s * 1e3:9.1f} {tokens / median_s:9,.0f} {statistics.median(ratios):6.2f} "
            f"{p20:5.2f}-{p80:5.2f} {shown}  {row.losses[-1]:.4f}{'' if agrees else '  VOID: another loss'}"
        )
    path = write_result("step", COMMAND, results, model=dataclasses.asdict(config.model), tokens_per_step=tokens)
    _draw(results)
    print(f"wrote {path} and {result_path('step', 'png').name}")


def _draw(results: list[dict[str, Any]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.6 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [result["name"] for result in results]
    bars = axes.barh(names, [result["tokens_per_s"] for result in results], color="#1f4e79")
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s of one device, median")
    axes.set_title(device_name(), fontsize=10)
    figure.savefig(result_path("step", "png"), dpi=120)


if __name__ == "__main__":
    sys.exit(main())

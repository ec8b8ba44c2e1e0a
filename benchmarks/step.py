"""A training step of ours beside plain loops over transformers' Llama of the same size: same weights, same batches.

    python -m benchmarks.step [--seconds 200] [--out FOLDER]

One process; blocks of steps are interleaved, so that a slow minute of the machine hits all rows alike; medians count.
Every block begins with the same initial weights and the first batch, and its first steps are not timed. A step is all
that training does: loader, forward, backward, gradient clipping, AdamW and log, for ours also the collectives, checks
and books of the real loop. Only checkpoints are not written. A row whose losses in the warm-up are not those of the
first row is void, and has no speed.

On a GPU the model is TinyLlama-1.1B in bf16, and what is measured is compared with what the device can do: MFU, the
share of a measured matrix product, floor efficiency (benchmarks/ceilings.py), and the project's goals. Rows rest on no
device memory while others run. On a CPU it is the smoke preset in fp32, and MFU does not apply.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch._dynamo

from benchmarks import step_report
from benchmarks.ceilings import Ceilings, measure_on_gpu
from benchmarks.environment import describe, device_name, result_path, write_result
from benchmarks.ours_step import KERNELS_OFF, Ours, OursRunner
from benchmarks.peers_step import Kind, PeerRunner
from benchmarks.step_data import Corpus, PeerBatches, write_corpus
from benchmarks.step_report import Setting
from benchmarks.step_rounds import Row, Runner, Schedule, measure
from benchmarks.step_state import InitialValues
from benchmarks.timing import Budget
from model.batch import Batch
from model.config import ModelConfig
from model.flops import num_params
from model.init import initial_value
from resume.saver import Saver
from train import ranks
from train.config import DataSection, OptimSection, RunConfig, with_values
from train.faults import Faults
from train.feed import Feed
from train.guard import Guard
from train.loop import Trainer
from train.objectives import next_token_loss
from train.optim import make_optimizer
from train.patience import Patience
from train.plan import estimate_memory
from train.sharding import WholeValue, build_model
from train.signals import StopRequest
from train.watch import Watch

COMMAND = "python -m benchmarks.step"
_ON_CPU = Schedule(warm_up_steps=6, settle_steps=1, span_steps=5, spans_per_block=1, max_rounds=8)
_ON_GPU = Schedule(warm_up_steps=10, settle_steps=2, span_steps=10, spans_per_block=2, max_rounds=20)
# In bf16 as low as in the first steps of a warm-up: losses fall by 1 in ten steps, and depend by 1e-3 on where bf16
# rounds. At ten times this rate some steps of deep models jump, and rows differ by more than 0.1 after it.
_LEARNING_RATE = {"cpu": 1e-3, "cuda": 1e-5}
_LOSS_TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}
_ACCUMULATED = 4
_LARGE_MICRO_BATCHES = (32, 16)
# What the estimate of our own memory may take of the device.
_SHARE_OF_MEMORY = 0.95
# More than any row reads in a block, so that a block sees no sample twice.
_CORPUS_STEPS = 32


def main(arguments: list[str] | None = None) -> int:
    """Measures all rows, prints tables, writes JSON and PNG."""
    options = _options(arguments)
    budget = Budget(options.seconds)
    started_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started_s:5.0f} s  {text}", flush=True)

    folder = Path(tempfile.mkdtemp(prefix="bessemer-step-"))
    try:
        config = _config(torch.device("cuda" if torch.cuda.is_available() else "cpu"), folder)
        corpus = write_corpus(
            folder / "shards",
            vocab_size=config.model.vocab_size,
            sequence_length=config.data.sequence_length,
            num_samples=_CORPUS_STEPS * _ACCUMULATED * config.data.batch_sequences,
        )
        batches = PeerBatches(corpus, config, on_gpu=torch.cuda.is_available())
        this = ranks.start("auto")
        try:
            _measure(config, corpus, batches, this, budget, say, options)
        finally:
            ranks.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _measure(
    config: RunConfig,
    corpus: Corpus,
    batches: PeerBatches,
    this: ranks.Ranks,
    budget: Budget,
    say: Callable[[str], None],
    options: argparse.Namespace,
) -> None:
    on_gpu = this.device.type == "cuda"
    device_bytes = torch.cuda.get_device_properties(this.device).total_memory if on_gpu else None
    setting = Setting(
        model=config.model,
        sequence_length=config.data.sequence_length,
        device=ranks.device_name(this.device),
        tolerance=_LOSS_TOLERANCE[this.device.type],
        device_bytes=device_bytes,
        ceilings=_ceilings(config, say) if on_gpu else None,
    )
    values = InitialValues(config.model, config.run.seed, pin_memory=on_gpu)
    say(f"{num_params(config.model):,} parameters, {config.batch_tokens:,} tokens/step")
    rows = _rows(config, corpus, batches, values, this, device_bytes)

    def write() -> Path:
        command = f"{COMMAND} --seconds {options.seconds:g}"
        found = step_report.results(rows, setting)
        return write_result("step", command, found, folder=options.out, **step_report.facts(rows, setting))

    # Rows share the code that is compiled: it has more forms than in any run of its own.
    with torch._dynamo.config.patch(recompile_limit=64):
        measure(rows, _ON_GPU if on_gpu else _ON_CPU, budget, setting.tolerance, say=say, after_round=write)
    print(f"\n{device_name()}  torch {describe()['torch']}  transformers {describe()['transformers']}")
    for table in step_report.tables(rows, setting):
        table.print()
    picture = result_path("step", "png", options.out)
    step_report.draw(step_report.results(rows, setting), device_name(), picture)
    print(f"\nwrote {write()} and {picture.name}")


def _ceilings(config: RunConfig, say: Callable[[str], None]) -> Ceilings | None:
    try:
        found = measure_on_gpu(config.model, config.data.micro_batch_sequences, config.data.sequence_length)
    except RuntimeError as error:  # the rows can be measured without
        say(f"no ceilings: {str(error).splitlines()[0]}")
        return None
    say(f"copy {found.copy_bytes_per_s / 1e12:.2f} TB/s, matmul {found.matmul_flops_per_s / 1e12:.0f} TFLOP/s")
    return found


def _config(device: torch.device, folder: Path) -> RunConfig:
    """The run whose step is measured: one micro-batch a step."""
    if device.type == "cpu":
        model, sequences, length = ModelConfig.preset("smoke"), 8, 256
    else:
        model, length = ModelConfig.preset("tinyllama-1.1b"), 2048
        # transformers takes about 6 GB a sequence, beside 20 GB of weights, gradients and moments.
        sequences = 8 if torch.cuda.get_device_properties(device).total_memory > 75e9 else 2
    config = RunConfig(
        model=model,
        data=DataSection(sequence_length=length, batch_sequences=sequences, micro_batch_sequences=sequences),
        optim=OptimSection(peak_lr=_LEARNING_RATE[device.type], schedule="constant", warmup_steps=0),
    )
    return with_values(config, run={"dir": str(folder / "run")}, data={"paths": (str(folder / "shards"),)})


def _rows(
    config: RunConfig,
    corpus: Corpus,
    batches: PeerBatches,
    values: InitialValues,
    this: ranks.Ranks,
    device_bytes: int | None,
) -> list[Row]:
    sequences = config.data.micro_batch_sequences

    def theirs(kind: Kind, name: str, priority: int) -> Row:
        runner = partial(PeerRunner, kind, config, values, batches, this.device)
        return Row(key=kind, name=f"transformers, {name}", open=runner, micro_batch=sequences, priority=priority)

    def of_ours(key: str, name: str, runner: Callable[[], Runner], priority: int, checks_losses: bool = True) -> Row:
        return Row(
            key=key, name=name, open=runner, micro_batch=sequences, priority=priority, checks_losses=checks_losses
        )

    # Rows with other kernels are other models: an error in one leaves the other as it is.
    make = partial(make_trainer, config, this, values.value)
    with_kernels, without = Ours(make, values, this.device), Ours(make, values, this.device)
    eager = theirs("eager", "SDPA, fused AdamW", 0)
    ours = of_ours("ours", "ours", partial(OursRunner, with_kernels, config, corpus), 1)
    if device_bytes is None:
        return [eager, ours]
    kernels_off = partial(OursRunner, without, with_values(config, kernels=KERNELS_OFF), corpus)
    read_once = partial(OursRunner, with_kernels, config, corpus, reads_once=True)
    return [
        eager,
        theirs("compiled", "the same, compiled", 3),
        theirs("liger", "the same, Liger", 4),
        of_ours("off", "ours, kernels off", kernels_off, 2),
        ours,
        of_ours("synthetic", "ours, data read once", read_once, 5, checks_losses=False),
        *_extra_rows(config, corpus, with_kernels, device_bytes),
    ]


def _extra_rows(config: RunConfig, corpus: Corpus, ours: Ours, device_bytes: int) -> list[Row]:
    """Steps of several micro-batches, and the same steps with micro-batches as large as the memory allows."""
    sequences, length = config.data.micro_batch_sequences, config.data.sequence_length
    step = _ACCUMULATED * sequences

    def row(key: str, name: str, micro_batch: int, reference: str | None) -> Row:
        data = {"batch_sequences": step, "micro_batch_sequences": micro_batch}
        return Row(
            key=key,
            name=name,
            open=partial(OursRunner, ours, with_values(config, data=data), corpus),
            micro_batch=micro_batch,
            micro_batches=step // micro_batch,
            is_extra=True,
            checks_losses=reference is not None,
            reference=reference,
        )

    name = f"ours, {_ACCUMULATED} micro-batches of {sequences} x {length}"
    found = [row("accumulated", name, sequences, None)]
    for micro_batch in _LARGE_MICRO_BATCHES:
        wanted = with_values(config, data={"batch_sequences": step, "micro_batch_sequences": micro_batch})
        if (
            sequences < micro_batch <= step
            and estimate_memory(wanted, "cuda", 1).total < _SHARE_OF_MEMORY * device_bytes
        ):
            name = f"ours, {step // micro_batch} of {micro_batch} x {length}"
            return [*found, row("largest", name, micro_batch, "accumulated")]
    return found


def make_trainer(config: RunConfig, this: ranks.Ranks, value: WholeValue | None = None) -> Trainer:
    """What the real loop's step needs, without data and without a run folder; `value` gives initial weights."""
    if value is None:
        value = partial(_value, config)
    model = build_model(config.model, config.parallel, this, value)
    return Trainer(
        config=config,
        ranks=this,
        model=model,
        optimizer=make_optimizer(model, config.optim),
        feed=cast(Feed, None),  # a step is given its batches
        objective_at=lambda _: next_token_loss,
        validation=None,
        log=None,
        stop=StopRequest(),
        saver=Saver(Path(config.run.dir)),
        guard=Guard(config.guard),
        patience=Patience(None),
        watch=Watch(Path(config.run.dir), life="", rank=0, world_size=1, timeout_s=config.run.hang_timeout_s),
        faults=Faults(Path(config.run.dir), (), rank=0),
    )


def random_batch(config: RunConfig) -> Batch:
    """A micro-batch of random tokens, on the CPU."""
    shape = (config.data.micro_batch_sequences, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, tokens[:, 1:].numel())


def _value(config: RunConfig, name: str, shape: torch.Size) -> torch.Tensor:
    if config.model.tie_embeddings and name == "head.weight":
        name = "embedding.weight"
    return initial_value(config.model, name, shape, config.run.seed)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Time a training step beside transformers'.")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="no block begins after so long; the first round always runs"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG; default: benchmarks/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

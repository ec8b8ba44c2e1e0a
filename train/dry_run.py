"""The dry run: what a run would compute, hold, take, cost and write, without starting it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from data_prep.config_file import ConfigError, load, to_toml
from data_prep.manifest import Manifest, ManifestError, merged, read_manifest
from model.config import ModelConfig
from model.flops import flops_per_token, num_active_params, num_params
from resume import checkpoint
from resume import state as states
from resume.manifest import DataFile, listed_files
from resume.report import duration, plan_tables
from resume.report import plan as plan_data
from resume.state import DataState
from train import plan
from train.advice import advice
from train.branch import base_of, branched
from train.config import RunConfig, refuse_changes, with_values
from train.cost import Gpu, PlanOptions, Speed, speed_of
from train.fake_memory import step_memory
from train.feed import fresh_state
from train.plan import RESERVE_BYTES, gib
from train.sharding import compute_dtype
from train.stages import at_longest, begins_at, describe, portions_at, stages_of

Rows = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The devices that are planned for; memory_bytes is of one, None where it is not known."""

    device_type: str
    world_size: int
    gpu: Gpu | None
    memory_bytes: int | None
    is_elsewhere: bool


def dry_run(config: RunConfig, options: PlanOptions) -> None:
    """Prints the plan on the first rank.

    Raises:
        ConfigError: it cannot fit, or an option is out of its range.
    """
    options.check()
    target = _target(config, options)
    plan.refuse_uneven(config, target.world_size)
    try:
        folders = {Path(path): read_manifest(Path(path)) for path in config.data.paths}
    except ManifestError:
        folders, manifest = {}, None
    else:
        manifest = merged(folders)
        config.check_vocabulary(manifest.vocab_size)
    if int(os.environ.get("RANK", "0")) == 0:
        is_bf16 = compute_dtype(config.parallel, torch.device(target.device_type)) == torch.bfloat16
        speed = speed_of(config, target.gpu, options, is_bf16=is_bf16)
        memory_bytes = _print_plan(config, manifest, target, speed, options.gpu_price)
        if manifest is not None:
            state = _data_state(config, manifest, listed_files(folders, "train"))
            of_data = plan_data(state, config.run.num_steps, speed and _step_s(config, target, speed))
            print(f"\nthe data of a run that begins here, {plan_tables(of_data)}")
        if target.is_elsewhere:
            _refuse_too_large(config, target, memory_bytes)
    if not target.is_elsewhere:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        plan.refuse_impossible(config, target.device_type, target.world_size, local_world_size)


def _data_state(config: RunConfig, manifest: Manifest, training: list[DataFile]) -> DataState:
    """The data state that the run begins with."""
    base = base_of(config)
    if base is None:
        return fresh_state(config, manifest, training)
    stored = load(base / checkpoint.CONFIG, type(config))
    refuse_changes(config, stored, is_branch=True)
    state = branched(states.from_json(checkpoint.read_record(base)["data"]), config, stored, training)
    length, batch_sequences = portions_at(config, state.step)
    return states.set_batch(state, batch_sequences, length)


def _target(config: RunConfig, options: PlanOptions) -> Target:
    """The GPUs that --gpus names; those that WORLD_SIZE counts, of an unknown kind; or the devices of this launch."""
    if options.num_gpus is not None and options.gpu is not None:
        return Target("cuda", options.num_gpus, options.gpu, options.gpu.memory_bytes, is_elsewhere=True)
    world_size, wanted = int(os.environ.get("WORLD_SIZE", "1")), config.parallel.device
    if "WORLD_SIZE" in os.environ and "RANK" not in os.environ:
        return Target("cpu" if wanted == "cpu" else "cuda", world_size, None, None, is_elsewhere=True)
    if wanted == "cpu" or not torch.cuda.is_available():
        device_type = "cuda" if wanted == "cuda" else "cpu"
        memory_bytes = plan.device_memory_bytes(device_type, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return Target(device_type, world_size, None, memory_bytes, is_elsewhere=False)
    found = torch.cuda.get_device_properties(0)
    return Target("cuda", world_size, Gpu(found.name, found.total_memory), found.total_memory, is_elsewhere=False)


def _print_plan(
    config: RunConfig, manifest: Manifest | None, target: Target, speed: Speed | None, price: float | None
) -> int:
    """Prints everything but the data's order, and returns the bytes that a step takes on a device."""
    memory = step_memory(at_longest(config), target.device_type, target.world_size, target.memory_bytes)
    total = sum(memory.values())
    rows = [
        *_size_rows(config, manifest, target),
        *((f"stage {s.number} of {len(config.stage)}", describe(config, s)) for s in stages_of(config)),
        *_memory_rows(config, target, memory),
        *_time_rows(config, target, speed, price),
        *_disk_rows(config, target),
    ]
    print(f"{to_toml(config)}\n" + "\n".join(f"{name:<18} {value}" for name, value in rows))
    for line in advice(config) if config.run.init_from is None else []:
        print(f"advice: {line}")
    for note in plan.notes(config, manifest, target.world_size):
        print(f"note: {note}")
    return total


def _size_rows(config: RunConfig, manifest: Manifest | None, target: Target) -> Rows:
    dtype = compute_dtype(config.parallel, torch.device(target.device_type))
    flops = flops_per_token(config.model, config.data.sequence_length)
    tokens = config.batch_tokens * (config.run.num_steps - begins_at(config))
    num_micro_batches = config.num_micro_batches(target.world_size)
    name = f" x {target.gpu.name}" if target.gpu is not None else ""
    return [
        ("devices", f"{target.world_size}{name}, {num_micro_batches} micro-batches per step each, {dtype}"),
        ("parameters", f"{num_params(config.model):,}" + _active(config.model)),
        ("model FLOPs", f"{flops:.4g} per token, {flops * tokens:.3g} in all"),
        ("tokens", f"{config.batch_tokens:,} per step, {tokens:,} in all"),
        ("data", _describe_data(config, manifest)),
    ]


def _memory_rows(config: RunConfig, target: Target, memory: Mapping[str, int]) -> Rows:
    total = sum(memory.values())
    largest = at_longest(config)
    by_arithmetic = plan.estimate_memory(largest, target.device_type, target.world_size).total
    rows = [
        (
            "memory per device",
            f"{gib(total)} at the peak of a step, on fake tensors; {gib(by_arithmetic)} by arithmetic",
        ),
        ("of which", ", ".join(f"{kind} {gib(num_bytes)}" for kind, num_bytes in memory.items() if num_bytes)),
    ]
    if target.memory_bytes is not None:
        most = most_sequences(largest, target, total) * config.longest // config.data.sequence_length
        verdict = f"fits up to --data.micro-batch-sequences {most}" if most else "DOES NOT FIT at any micro-batch"
        reserve = f"about {gib(RESERVE_BYTES)} of them for the framework"
        rows.append(("a device has", f"{gib(target.memory_bytes)}, {reserve}: {verdict}"))
    return rows


def most_sequences(config: RunConfig, target: Target, total: int) -> int:
    """The largest micro-batch that fits, at most a device's share of a step; 0 if none does.

    `total` are the bytes of the config's own micro-batch. Memory is nearly, but not quite, a line: it is measured again
    where the line through two points says that it ends, until that is the same place.
    """
    assert target.memory_bytes is not None
    room, share = target.memory_bytes - RESERVE_BYTES, -(-config.data.batch_sequences // target.world_size)
    last, most = config.data.micro_batch_sequences, 2 * config.data.micro_batch_sequences
    for _ in range(4):
        at_most = _bytes_of(config, target, most)
        per_sequence = max(1.0, (at_most - total) / (most - last))
        last, total = most, at_most
        most = min(last + int((room - total) // per_sequence), share)
        if most in (last, share) or most < 1:
            break
    return max(0, most)


def _bytes_of(config: RunConfig, target: Target, sequences: int) -> int:
    """What a step takes with other micro-batches, but as many of them."""
    num_micro_batches = min(2, config.num_micro_batches(target.world_size))
    data = {"micro_batch_sequences": sequences, "batch_sequences": sequences * num_micro_batches * target.world_size}
    # Not what the data is cut into: only the memory is asked for.
    wanted = with_values(config, data=data | {"group_tokens": None})
    return sum(step_memory(wanted, target.device_type, target.world_size, target.memory_bytes).values())


def _refuse_too_large(config: RunConfig, target: Target, memory_bytes: int) -> None:
    if target.memory_bytes is not None and memory_bytes + RESERVE_BYTES > target.memory_bytes:
        raise ConfigError(
            f"one step takes {gib(memory_bytes + RESERVE_BYTES)} of {gib(target.memory_bytes)}; lower "
            f"--data.micro-batch-sequences (now {config.data.micro_batch_sequences}), set --parallel.recompute cheap "
            "or blocks, or plan for more or larger GPUs"
        )


def _step_s(config: RunConfig, target: Target, speed: Speed) -> float:
    return config.batch_tokens / (speed.tokens_per_s * target.world_size)


def _time_rows(config: RunConfig, target: Target, speed: Speed | None, price: float | None) -> Rows:
    if speed is None:
        return [("time", "not known: no peak and no measured run of this device; name GPUs with --gpus 8xH100")]
    step_s = _step_s(config, target, speed)
    num_steps = config.run.num_steps - begins_at(config)
    device_hours = step_s * num_steps * target.world_size / 3600
    rows = [
        ("speed", f"{speed.tokens_per_s * target.world_size:,.0f} tokens/s, {step_s:.3g} s a step ({speed.source})"),
        (
            "time",
            f"{duration(step_s * num_steps)}, {device_hours:,.4g} device-hours, beside validation and saving",
        ),
    ]
    if price is not None:
        rows.append(("cost", f"{device_hours * price:,.2f} at {price:g} for a device-hour"))
    return rows


def _disk_rows(config: RunConfig, target: Target) -> Rows:
    one = plan.checkpoint_bytes(config.model, compute_dtype(config.parallel, torch.device(target.device_type)))
    num_checkpoints = plan.num_checkpoints(config)
    for_ever = config.run.num_steps // config.run.keep_every if config.run.keep_every is not None else 0
    num_kept = min(num_checkpoints, config.run.keep_checkpoints + for_ever)
    rows = [
        ("checkpoints", f"{num_checkpoints} of {gib(one)}"),
        ("disk", f"{gib(one * (num_kept + 1))} in {config.run.dir} ({num_kept} kept, one being written)"),
        ("beside them", "config.toml, tokenizer, metrics.jsonl, tensorboard/ and, at the end, report.html"),
    ]
    if config.run.async_save:
        num_shards = target.world_size // config.parallel.replicas
        rows.append(("host memory", f"{gib(one // num_shards)} per process for the copy that is being saved"))
    return rows


def _active(model: ModelConfig) -> str:
    return f", {num_active_params(model):,} active" if model.expert_layers else ""


def _describe_data(config: RunConfig, manifest: Manifest | None) -> str:
    if manifest is None:
        return f"{' '.join(config.data.paths)}: not prepared yet (`make prepare-data`)"
    tokens, epochs = plan.training_targets(manifest), plan.num_epochs(config, manifest)
    return f"{tokens:,} tokens in {' '.join(config.data.paths)}, so {epochs:,.2f} epochs"

"""What a run takes on devices that need not be here: GPUs known by name, time from an MFU, price. Imports no torch."""

import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.config_file import ConfigError
from evaluation.metrics_file import read_metrics
from model.flops import DENSE_BF16_PEAK_TFLOPS, flops_per_token
from train.config import RunConfig

ASSUMED_MFU = 0.4
"""Where nothing was measured on a GPU and no --assume-mfu is given."""
_MEASURED = Path(__file__).parent.parent / "benchmarks" / "results"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: its name as torch and the table of peaks spell it, and the memory that torch finds on it."""

    name: str
    memory_bytes: int


GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", int(39.4 * _GIB)),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", int(79.1 * _GIB)),
    "h100": Gpu("NVIDIA H100 80GB HBM3", int(79.1 * _GIB)),
    "h200": Gpu("NVIDIA H200", int(139.7 * _GIB)),
    "b200": Gpu("NVIDIA B200", int(178.3 * _GIB)),
    "l40s": Gpu("NVIDIA L40S", int(44.3 * _GIB)),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", int(23.5 * _GIB)),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", int(23.5 * _GIB)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Flags of the dry run beside the run's."""

    gpus: str | None = None
    """Devices to plan for, elsewhere or here: NUMBERxNAME, as 8xH100. Default: those of this launch."""
    gpu_price: float | None = None
    """Price of one GPU for one hour, in any currency."""
    assume_mfu: float | None = None
    """Model FLOPs utilisation that the time is estimated from, between 0 and 1. Default: what was measured."""

    def check(self) -> None:
        """Refuses what plans nothing.

        Raises:
            ConfigError: an unknown GPU, or a value out of its range.
        """
        if self.gpus is not None and (re.fullmatch(r"[1-9]\d*x.+", self.gpus) is None or self.gpu is None):
            raise ConfigError(f"--gpus {self.gpus}: expected NUMBERxNAME, as 8xH100; names are {', '.join(GPUS)}")
        if self.gpu_price is not None and self.gpu_price < 0:
            raise ConfigError(f"--gpu-price {self.gpu_price}: must not be negative")
        if self.assume_mfu is not None and not 0 < self.assume_mfu <= 1:
            raise ConfigError(f"--assume-mfu {self.assume_mfu}: must be above 0, and 1 at most; 0.4 is 40 %")

    @property
    def num_gpus(self) -> int | None:
        """How many GPUs are named."""
        return int(self.gpus.partition("x")[0]) if self.gpus is not None else None

    @property
    def gpu(self) -> Gpu | None:
        """The kind of GPU that is named."""
        return GPUS.get(self.gpus.partition("x")[2].lower()) if self.gpus is not None else None


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the flags of PlanOptions with their values, all other arguments)."""
    flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(PlanOptions)}
    own: list[str] = []
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, equals, _ = argument.partition("=")
        if flag.replace("_", "-") not in flags:
            others.append(argument)
            continue
        own.append(argument)
        if not equals:
            own += itertools.islice(remaining, 1)
    return own, others


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one device, and where the figure comes from."""

    tokens_per_s: float
    source: str


def speed_of(config: RunConfig, gpu: Gpu | None, options: PlanOptions, *, is_bf16: bool) -> Speed | None:
    """How fast a device will train: by an MFU where it is a GPU whose peak is known, else as the run did so far."""
    peak = DENSE_BF16_PEAK_TFLOPS.get(gpu.name) if gpu is not None and is_bf16 else None
    if peak is not None and gpu is not None:
        mfu, source = _mfu(gpu, options)
        return Speed(mfu * peak * 1e12 / flops_per_token(config.model, config.data.sequence_length), source)
    steps = [record for record in read_metrics(Path(config.run.dir)) if "tokens_per_s_per_device" in record]
    if gpu is None and steps:
        median = statistics.median(record["tokens_per_s_per_device"] for record in steps[-100:])
        return Speed(median, f"as {config.run.dir} last did")
    return None


def _mfu(gpu: Gpu, options: PlanOptions) -> tuple[float, str]:
    if options.assume_mfu is not None:
        return options.assume_mfu, f"MFU {options.assume_mfu:.2f} ASSUMED by --assume-mfu"
    for path in sorted(_MEASURED.glob("*-step.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        measured = [row["mfu"] for row in results["rows"] if row["key"] == "ours" and row.get("mfu") is not None]
        if results["environment"]["device"] == gpu.name and measured:
            return measured[0], f"MFU {measured[0]:.2f} measured, benchmarks/results/{path.name}"
    return ASSUMED_MFU, f"MFU {ASSUMED_MFU:.2f} ASSUMED, not measured on this GPU: --assume-mfu"

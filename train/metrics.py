"""What a person sees of a run: one line a step, metrics.jsonl, TensorBoard.

TensorBoard tags: train/loss, optim/learning_rate, optim/grad_norm, perf/tokens_per_s_per_device,
perf/mfu, perf/step_s, perf/memory_gib, perf/save_stall_s, perf/save_s, data/tokens_seen, data/epoch, validation/loss,
validation/perplexity, validation/bits_per_byte; of a mixture experts/penalty and, for each layer with experts,
experts/max_violation, dead, would_drop, entropy, z, bias_lowest, bias_highest and histograms of experts/load; the
resolved config as text under run/config.
"""

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard.writer import SummaryWriter

from data_prep import publish
from evaluation.metrics_file import read_metrics
from resume.saver import Saved

_TENSORBOARD_TAGS = {
    "loss": "train/loss",
    "learning_rate": "optim/learning_rate",
    "grad_norm": "optim/grad_norm",
    "tokens_per_s_per_device": "perf/tokens_per_s_per_device",
    "mfu": "perf/mfu",
    "step_s": "perf/step_s",
    "memory_gib": "perf/memory_gib",
    "tokens_seen": "data/tokens_seen",
    "epoch": "data/epoch",
    "save_stall_s": "perf/save_stall_s",
    "save_s": "perf/save_s",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One committed (or skipped) optimizer step, as it stands in metrics.jsonl."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s_per_device: float
    mfu: float | None
    memory_gib: float
    step_s: float
    tokens_seen: int
    epoch: float
    skipped: bool = False
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    """What else the objective measures, as means over its units; TensorBoard's tags are train/<name>."""
    stage: int | None = None
    """From 1, of a run that has stages."""
    experts: dict[str, Any] | None = None
    """See `train.experts.expert_record`."""


class RunLog:
    """Writes a run's records; rank 0 has one, other ranks none. A resumed run continues the files where it resumes."""

    def __init__(self, folder: Path, first_step: int, config_toml: str):
        self._path = folder / "metrics.jsonl"
        _drop_records_after(self._path, first_step)
        self._file = self._path.open("a", encoding="utf-8")
        # purge_step hides what an earlier life of the run logged after the checkpoint it now resumes from.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else 0)
        self._mean_step_s = 0.0
        self._board.add_text("run/config", f"```toml\n{config_toml}\n```", first_step)

    def step(self, record: StepRecord, num_steps: int) -> None:
        """Logs one step everywhere and prints its line."""
        values = dataclasses.asdict(record)
        if not record.means:
            del values["means"]
        for name, value in record.means.items():
            self._board.add_scalar(f"train/{name}", value, record.step)
        if record.stage is None:
            del values["stage"]
        if record.experts is None:
            del values["experts"]
        else:
            self._draw_experts(record.step, record.experts)
        self._write(values)
        # The running mean of about twenty steps: steady, yet it follows a change of speed. The first step warms up.
        self._mean_step_s = 0.95 * self._mean_step_s + 0.05 * record.step_s if self._mean_step_s else record.step_s
        print(format_step(record, num_steps, self._mean_step_s * (num_steps - record.step)), flush=True)

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs one validation everywhere and prints its line."""
        self._write({"step": step, **{f"validation_{name}": value for name, value in figures.items()}})
        for name, value in figures.items():
            self._board.add_scalar(f"validation/{name}", value, step)
        line = "  ".join(f"{name.replace('_per_', '/')} {value:,.4f}" for name, value in figures.items())
        print(f"valid {step:>7,}  {line}", flush=True)

    def event(self, step: int, action: str, cause: str, samples: range) -> None:
        """Logs what the guard found in a step, and which positions of the data order the step read."""
        places = {"first_sample": samples[0], "last_sample": samples[-1]}
        self._write({"step": step, "event": action, "cause": cause, **places})
        print(f"GUARD: {action}, step {step}: {cause}; {named(samples)}", flush=True)

    def saved(self, saved: Saved) -> None:
        """Logs how a save ended, and how long the training waited for it."""
        if saved.error is not None:
            self._write({"step": saved.step, "event": "save failed", "cause": str(saved.error)})
            print(f"NOT SAVED: {saved.error}", flush=True)
            return
        values = {"save_stall_s": saved.stall_s, "save_s": saved.save_s, "save_gb": saved.size_bytes / 1e9}
        self._write({"step": saved.step, **values})
        print(f"saved {saved.folder} in {saved.save_s:.2f} s, waited {saved.stall_s:.2f} s", flush=True)
        if saved.remark is not None:
            self.note(saved.remark)

    def note(self, text: str) -> None:
        """Prints a line that is not a measurement."""
        print(text, flush=True)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        self._board.close()

    def _draw_experts(self, step: int, experts: dict[str, Any]) -> None:
        """One curve for each layer; of loads, histograms over the experts."""
        self._board.add_scalar("experts/penalty", experts["penalty"], step)
        for name in ("max_violation", "dead", "would_drop", "entropy", "z"):
            for layer, value in zip(experts["layers"], experts[name], strict=True):
                self._board.add_scalar(f"experts/{name}/{layer:02}", value, step)
        for layer, (lowest, highest) in zip(experts["layers"], experts.get("bias_range", ()), strict=False):
            self._board.add_scalar(f"experts/bias_lowest/{layer:02}", lowest, step)
            self._board.add_scalar(f"experts/bias_highest/{layer:02}", highest, step)
        for layer, shares in zip(experts["layers"], experts.get("load", ()), strict=False):
            self._board.add_histogram(f"experts/load/{layer:02}", np.asarray(shares), step)

    def _write(self, record: dict[str, Any]) -> None:
        finite = _finite(record)
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        for key, tag in _TENSORBOARD_TAGS.items():
            if finite.get(key) is not None:
                self._board.add_scalar(tag, finite[key], record["step"])


def _finite(value: Any) -> Any:
    """JSON has no NaN: a skipped step's non-finite loss is null, and every reader can parse the line."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named(samples: range) -> str:
    """Positions of the data order, as a person reads them."""
    return f"samples {samples[0]} to {samples[-1]} of the data order"


def format_step(record: StepRecord, num_steps: int, seconds_left: float) -> str:
    """One step as a line of fixed columns."""
    mfu = f"{record.mfu:6.1%}" if record.mfu is not None else "   n/a"
    return (
        f"step {record.step:>8,}/{num_steps:,}  loss {record.loss:7.4f}  lr {record.learning_rate:.2e}  "
        f"gnorm {record.grad_norm:7.3f}  {record.tokens_per_s_per_device:>9,.0f} tok/s/dev  mfu {mfu}  "
        f"mem {record.memory_gib:5.1f} GiB  eta {format_duration(seconds_left)}"
        + "".join(f"  {name} {value:.3f}" for name, value in record.means.items())
        + ("  NOT APPLIED" if record.skipped else "")
    )


def format_duration(seconds: float) -> str:
    """3 d 04 h, 2 h 05 m or 3 m 20 s."""
    if not math.isfinite(seconds):
        return "n/a"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02} h"
    return f"{h} h {m:02} m" if h else f"{m} m {s:02} s"


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / 2**30


def _drop_records_after(path: Path, step: int) -> None:
    """Removes what was logged after the checkpoint, all without one: those steps are about to be trained again.

    That the run went back stays: it is why they are.
    """
    found = read_metrics(path.parent)
    records = [r for r in found if r.get("event") == "rollback" or (step > 0 and r["step"] <= step)]
    if path.is_file():
        publish.write_text(path, "".join(json.dumps(record) + "\n" for record in records))

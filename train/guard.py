"""Steps that should not be applied: those that are not finite, and those far above what the last steps were.

A spike is a loss or gradient norm above mean + sigma * standard deviation of the last window_steps applied steps; so
OLMo 2 was trained (https://github.com/allenai/OLMo-core, SkipStepOptimizer). Only finite, applied steps enter the
history: one NaN in it would make every comparison false. The history is saved, so that a resumed run decides as the
uninterrupted one does.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping
from typing import Any, Literal

from train.config import GuardSection

Action = Literal["apply", "skip", "rollback", "stop"]

# A history that hardly varies must not make a spike of rounding: deviations below this share of the mean are noise.
_LEAST_DEVIATION = 0.01


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a step, and what is wrong with it (None: nothing)."""

    action: Action
    cause: str | None = None


class Guard:
    """Judges each step by its loss and gradient norm, which all ranks have alike, so that all decide alike."""

    def __init__(self, config: GuardSection, record: Mapping[str, Any] | None = None):
        """`record` is what `to_json` gave to the checkpoint that a run goes on from."""
        self._config = config
        stored = record or {"losses": [], "grad_norms": [], "num_in_a_row": 0}
        self._losses = collections.deque(stored["losses"], config.window_steps)
        self._grad_norms = collections.deque(stored["grad_norms"], config.window_steps)
        self._num_in_a_row: int = stored["num_in_a_row"]

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """What to do with a step; called once for each."""
        config, cause, policy = self._config, None, "apply"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            cause, policy = f"not finite: loss {loss}, gradient norm {grad_norm}", config.on_nonfinite
        elif config.on_spike != "off":
            cause = _spike("loss", loss, self._losses, config) or _spike(
                "gradient norm", grad_norm, self._grad_norms, config
            )
            policy = "apply" if cause is None or config.on_spike == "note" else config.on_spike
        self._num_in_a_row = self._num_in_a_row + 1 if policy != "apply" else 0
        if policy == "apply":
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
        elif policy == "skip" and self._num_in_a_row >= config.max_in_a_row:
            return Verdict("rollback", f"{cause}; step {self._num_in_a_row} in a row that could not be applied")
        return Verdict(policy, cause)

    def forget(self) -> None:
        """Begins to learn anew what losses are usual: those of other data are."""
        self._losses.clear()
        self._grad_norms.clear()

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint holds of the guard; floats survive JSON exactly."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_in_a_row": self._num_in_a_row,
        }


def _spike(what: str, value: float, history: collections.deque[float], config: GuardSection) -> str | None:
    if len(history) < config.window_steps:
        return None
    mean = statistics.fmean(history)
    deviation = max(statistics.pstdev(history, mean), _LEAST_DEVIATION * abs(mean))
    limit = mean + config.sigma * deviation
    if value <= limit:
        return None
    return f"spike: {what} {value:.4g}, limit {limit:.4g} (mean {mean:.4g} + {config.sigma:g} x {deviation:.2g})"

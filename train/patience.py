"""When a run has learned what it can: validations in a row without a lower held-out loss end it."""

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """The best validation so far, and how many were worse since; with `limit` None nothing is over."""

    def __init__(self, limit: int | None, record: Mapping[str, Any] | None = None):
        """Goes on from the record of a checkpoint."""
        self._limit = limit
        record = record or {}
        self._best_loss = record.get("best_loss")
        self.best_step: int | None = record.get("best_step")
        self.num_worse: int = record.get("num_worse", 0)

    def judge(self, step: int, loss: float) -> bool:
        """Counts a validation; whether it is the best one, and its checkpoint to be kept."""
        if self._limit is None:
            return False
        if math.isfinite(loss) and (self._best_loss is None or loss < self._best_loss):
            self._best_loss, self.best_step, self.num_worse = loss, step, 0
            return step > 0
        self.num_worse += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether the run ends."""
        return self._limit is not None and self.num_worse >= self._limit

    @property
    def best_steps(self) -> set[int]:
        """The step whose checkpoint must stay."""
        return {self.best_step} if self.best_step else set()

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"best_loss": self._best_loss, "best_step": self.best_step, "num_worse": self.num_worse}

"""What a run is judged by on its held-out shards: the loss of tokens, or its own objective."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.score import Score, score
from model.batch import TokenRows
from model.transformer import Transformer
from train.objectives import Objective

Batches = Callable[[], Iterable[TokenRows]]
"""This rank's batches of a validation, as many as on every rank."""


class TokenValidation:
    """Loss, perplexity and bits per byte of the held-out targets."""

    def __init__(self, model: Transformer, batches: Batches, token_bytes: NDArray[np.int32], device: torch.device):
        self._model, self._batches, self._token_bytes, self._device = model, batches, token_bytes, device

    def sums(self) -> list[float]:
        """Loss, targets and bytes of this rank's batches."""
        mine = score(self._model, self._batches(), self._token_bytes, self._device)
        return [mine.loss_sum, mine.num_targets, mine.num_bytes]

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over all ranks' targets."""
        total = Score(*sums)
        return {"loss": total.loss_mean, "perplexity": total.perplexity, "bits_per_byte": total.bits_per_byte}


class ObjectiveValidation:
    """The mean of what is minimised, and of what else the objective measures, over the held-out units."""

    def __init__(self, model: Transformer, batches: Batches, objective: Objective, device: torch.device):
        self._model, self._batches, self._objective, self._device = model, batches, objective, device
        self._names: list[str] = []

    @torch.no_grad()
    def sums(self) -> list[float]:
        """Units, loss and the rest of this rank's batches."""
        was_training = self._model.training
        self._model.eval()
        num_units, totals = 0, {}
        for rows in self._batches():
            outcome = self._objective(self._model, rows.to(self._device), None)
            num_units += rows.num_units
            for name, value in {"loss": outcome.loss_sum, **outcome.sums}.items():
                totals[name] = totals.get(name, 0.0) + value.double()
        self._model.train(was_training)
        self._names = list(totals)
        return [num_units, *(float(value) for value in totals.values())]

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Means over all ranks' units."""
        num_units, *totals = sums
        return {name: total / max(1.0, num_units) for name, total in zip(self._names, totals, strict=True)}

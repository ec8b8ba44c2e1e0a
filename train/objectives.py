"""What is minimised: pure functions of model and batch that return sums. The loop divides once, by the global count."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.balance import RoutingLog
from model.batch import Batch


class Outcome(NamedTuple):
    """What an objective says of a batch, as sums over its units: targets, or pairs of answers."""

    loss_sum: Tensor
    sums: Mapping[str, Tensor] = {}
    """Without gradients; their means over the units of a step are logged under these names."""


Objective = Callable[[nn.Module, Batch, RoutingLog | None], Outcome]
"""(model, batch, routing) -> sums over the batch's units; it hands `routing` to the model that it trains."""


def next_token_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
) -> Outcome:
    """The sum of -log p(target) over the batch's targets, and of what the options of `cross_entropy_rows` add.

    What the experts of a mixture got to do is written into `routing`; its penalty is not part of the result.
    """
    loss_sum = model(
        batch.tokens,
        batch.boundaries,
        routing=routing,
        readout=lambda hidden_BTD, head_VD: linear_cross_entropy_sum(
            hidden_BTD, head_VD, batch.targets, z_loss=z_loss, label_smoothing=label_smoothing, soft_cap=soft_cap
        ),
    )
    return Outcome(loss_sum)

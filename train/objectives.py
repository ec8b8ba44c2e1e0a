"""What is minimised: pure functions (model, batch) -> sum over targets. The loop divides, once, by the global count."""

from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.balance import RoutingLog
from model.batch import Batch


def next_token_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
) -> Tensor:
    """The sum of -log p(target) over the batch's targets, and of what the options of `cross_entropy_rows` add.

    What the experts of a mixture got to do is written into `routing`; its penalty is not part of the result.
    """
    return model(
        batch.tokens,
        batch.boundaries,
        routing=routing,
        readout=lambda hidden_BTD, head_VD: linear_cross_entropy_sum(
            hidden_BTD, head_VD, batch.targets, z_loss=z_loss, label_smoothing=label_smoothing, soft_cap=soft_cap
        ),
    )

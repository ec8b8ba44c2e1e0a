"""What is minimised: pure functions (model, batch) -> sum over targets. The loop divides, once, by the global count."""

from torch import Tensor, nn

from kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.batch import Batch


def next_token_loss(model: nn.Module, batch: Batch, *, z_loss: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """The sum of -log p(target) over the batch's targets, and of what the options of `cross_entropy_rows` add."""
    return model(
        batch.tokens,
        batch.boundaries,
        readout=lambda hidden_BTD, head_VD: linear_cross_entropy_sum(
            hidden_BTD, head_VD, batch.targets, z_loss=z_loss, label_smoothing=label_smoothing
        ),
    )

"""What is minimised: pure functions (model, batch) -> sum over targets. The loop divides, once, by the global count."""

from torch import Tensor, nn

from kernels.cross_entropy import cross_entropy_sum
from model.batch import Batch
from model.transformer import logits


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of -log p(target) over the batch's targets."""
    return model(
        batch.tokens,
        batch.boundaries,
        readout=lambda hidden_BTD, head_VD: cross_entropy_sum(logits(hidden_BTD, head_VD), batch.targets),
    )

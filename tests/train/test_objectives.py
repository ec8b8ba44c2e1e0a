import torch

from model.batch import Batch
from tests.models import LLAMA, make_model, random_tokens
from train.objectives import next_token_loss


def test_the_options_of_the_loss_reach_it_and_add_what_they_say():
    model, tokens = make_model(LLAMA, dtype=torch.float64), random_tokens(LLAMA, 2, 9)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, 16)
    logits = model(batch.tokens).flatten(0, 1)
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, batch.targets.flatten()[:, None]).sum()
    torch.testing.assert_close(next_token_loss(model, batch).loss_sum, nll)
    torch.testing.assert_close(
        next_token_loss(model, batch, z_loss=0.01).loss_sum, nll + 0.01 * logits.logsumexp(-1).square().sum()
    )
    smoothed = 0.9 * nll - 0.1 * log_p.mean(-1).sum()
    torch.testing.assert_close(next_token_loss(model, batch, label_smoothing=0.1).loss_sum, smoothed)

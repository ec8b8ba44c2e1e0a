"""Learning from pairs of answers of which one was preferred: directly (DPO, IPO), or as a model of the reward.

A row holds whole pairs. Document 0 of it is context only; document 2p + 1 is the chosen answer of pair p behind its
prompt, 2p + 2 the rejected one behind the same. A pair is there if both have trained targets; whatever else a row holds
adds nothing. Sums are over pairs.

Shapes, beside those of the model: P pairs of a row, of which the last may be missing; 2: chosen, rejected.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import IGNORE
from kernels.launch import sum_dtype
from kernels.linear_log_probs import linear_log_probs
from model.balance import RoutingLog
from model.batch import Batch
from train.objectives import Outcome


class Answers(NamedTuple):
    """Where the documents of pairs lie among the inputs of their rows, and how many of their targets are trained."""

    is_pair_BP: Tensor
    first_BP2: Tensor
    end_BP2: Tensor
    num_trained_BP2: Tensor


def dpo_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    soft_cap: float | None = None,
) -> Outcome:
    """Sums f(margin) over pairs, the margin being how much more the model than the reference prefers the chosen answer.

        ratio   = log p(answer) - log p_reference(answer)
        sigmoid:  margin = beta (ratio_chosen - ratio_rejected)                         f(m) = -log sigmoid(m)
        ipo:      margin = ratio_chosen / tokens_chosen - ratio_rejected / tokens_rejected  f(m) = (m - 1 / (2 beta))^2

    With label smoothing e the loss is (1 - e) f(margin) + e f(-margin): that share of the pairs is held to be labelled
    the wrong way round. sft_weight adds so many times the mean of -log p(token) of each chosen answer.
    batch.extra["reference"], (B, P, 2), has the reference's `pair_log_probs`.

    Source: Rafailov et al., "Direct Preference Optimization", 2023, equation 7; Azar et al., "A General Theoretical
    Paradigm", 2023, equation 17, with means over tokens as in TRL, whose authors had that from the paper's. Mitchell,
    "A note on DPO with noisy preferences", 2023 (smoothing). Pang et al., "Iterative Reasoning Preference
    Optimization", 2024, equation 2 (the added likelihood, a mean over each answer's own tokens).
    """
    reference_BP2 = batch.extra["reference"]
    answers = find_answers(batch, reference_BP2.shape[1])
    log_probs_BP2 = _answer_log_probs(model, batch, routing, answers, soft_cap)
    lengths_BP2 = answers.num_trained_BP2.clamp(min=1)
    ratios_BP2 = log_probs_BP2 - reference_BP2
    margin_BP = _chosen_less_rejected(beta * ratios_BP2 if kind == "sigmoid" else ratios_BP2 / lengths_BP2)

    def loss(margin_BP: Tensor) -> Tensor:
        return -F.logsigmoid(margin_BP) if kind == "sigmoid" else (margin_BP - 1 / (2 * beta)).square()

    loss_BP = (1 - label_smoothing) * loss(margin_BP) + label_smoothing * loss(-margin_BP)
    mean_log_probs_BP2 = log_probs_BP2 / lengths_BP2
    loss_BP = loss_BP - sft_weight * mean_log_probs_BP2[..., 0]
    logged = _reward_means(beta * ratios_BP2) | {
        "log_prob/chosen": mean_log_probs_BP2[..., 0],
        "log_prob/rejected": mean_log_probs_BP2[..., 1],
        "length_ratio": lengths_BP2[..., 0] / lengths_BP2[..., 1],
    }
    return Outcome(torch.where(answers.is_pair_BP, loss_BP, 0.0).sum(), _sums_over_pairs(answers, logged))


@torch.no_grad()
def pair_log_probs(model: nn.Module, batch: Batch, *, soft_cap: float | None = None) -> Tensor:
    """log p of the chosen and the rejected answer of each pair, (B, P, 2), 0 where a row has fewer pairs than others.

    What `dpo_loss` wants of the reference model. Waits for the device, to learn how many pairs there are.
    """
    answers = find_answers(batch, int(batch.document_numbers.max()) // 2)
    log_probs_BP2 = _answer_log_probs(model, batch, None, answers, soft_cap)
    return torch.where(answers.is_pair_BP[..., None], log_probs_BP2, 0.0)


def reward_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    kind: Literal["end", "divergence"] = "end",
    center_weight: float = 0.0,
) -> Outcome:
    """Sums -log sigmoid(score_chosen - score_rejected) over pairs, for a model whose head is a single score.

    end: of the scores at the answers' last tokens. divergence: the mean of it over the positions, counted from the
    documents' starts, from the first at which the two differ to the end of the longer one; behind the end of the
    shorter one its last score stands. Two equal answers count log 2. center_weight adds so many times
    (score_chosen + score_rejected)^2 at the last tokens, which holds scores near 0.

    Source: Ouyang et al., "InstructGPT", 2022, equation 1. Yao et al., "DeepSpeed-Chat", 2023 (divergence; it gives a
    shorter answer the scores of its padding instead). Eisenstein et al., "Helping or Herding?", 2023 (centering).
    """
    scores_BT = model(batch.tokens, batch.boundaries, routing=routing, readout=scores)
    answers = find_answers(batch, batch.tokens.shape[1] // 2)
    scores_BP2 = _at(scores_BT, (answers.end_BP2 - 1).clamp(min=0))
    loss_BP = center_weight * scores_BP2.sum(dim=-1).square()
    if kind == "end":
        loss_BP = loss_BP - F.logsigmoid(_chosen_less_rejected(scores_BP2))
    loss_sum = torch.where(answers.is_pair_BP, loss_BP, 0.0).sum()
    if kind == "divergence":
        loss_sum = loss_sum + _divergence_sum(scores_BT, batch, answers)
    return Outcome(loss_sum, _sums_over_pairs(answers, _reward_means(scores_BP2)))


def scores(hidden_BTD: Tensor, head_1D: Tensor) -> Tensor:
    """The readout of a reward model: the score at each position, in fp32 at least, because differences are small."""
    dtype = sum_dtype(hidden_BTD)
    return hidden_BTD.to(dtype) @ head_1D[0].to(dtype)


def find_answers(batch: Batch, num_pairs: int) -> Answers:
    """The answers of the first num_pairs pairs of each row, by static shapes: nothing waits for the device."""
    documents_BT = batch.document_numbers
    shape = len(documents_BT), num_pairs, 2
    numbers_BN = torch.arange(1, 2 * num_pairs + 1, dtype=documents_BT.dtype, device=documents_BT.device)
    numbers_BN = numbers_BN.expand(len(documents_BT), -1).contiguous()
    first_BN = torch.searchsorted(documents_BT, numbers_BN)
    end_BN = torch.searchsorted(documents_BT, numbers_BN, right=True)
    num_trained_BP2 = _sum_between(batch.targets != IGNORE, first_BN, end_BN).view(shape)
    return Answers((num_trained_BP2 > 0).all(dim=-1), first_BN.view(shape), end_BN.view(shape), num_trained_BP2)


def _sum_between(counts_BT: Tensor, first_BN: Tensor, end_BN: Tensor) -> Tensor:
    """Sums integers over positions first..end - 1."""
    before_BT = F.pad(counts_BT.cumsum(dim=1), (1, 0))
    return before_BT.gather(1, end_BN) - before_BT.gather(1, first_BN)


def _answer_log_probs(
    model: nn.Module, batch: Batch, routing: RoutingLog | None, answers: Answers, soft_cap: float | None
) -> Tensor:
    log_probs_BT = model(
        batch.tokens,
        batch.boundaries,
        routing=routing,
        readout=lambda hidden_BTD, head_VD: linear_log_probs(hidden_BTD, head_VD, batch.targets, soft_cap=soft_cap),
    )
    # One term for each answer and position, where adding to places would be in another order each time on a GPU.
    positions_T = torch.arange(log_probs_BT.shape[1], device=log_probs_BT.device)
    is_inside_BP2T = (answers.first_BP2[..., None] <= positions_T) & (positions_T < answers.end_BP2[..., None])
    return torch.where(is_inside_BP2T, log_probs_BT[:, None, None], 0.0).sum(dim=-1)


def _divergence_sum(scores_BT: Tensor, batch: Batch, answers: Answers) -> Tensor:
    """Sums the mean losses of pairs over the tokens that stand for an offset from the answers' starts.

    That is the chosen answer's token at this offset; behind its end, the rejected one's.
    """
    documents_BT, positions_T = batch.document_numbers, torch.arange(scores_BT.shape[1], device=scores_BT.device)
    pair_BT = (documents_BT.long() - 1).clamp(min=0) // 2
    pair_BT2 = pair_BT[..., None].expand(-1, -1, 2)
    first_BT2, end_BT2 = answers.first_BP2.gather(1, pair_BT2), answers.end_BP2.gather(1, pair_BT2)
    is_chosen_BT = documents_BT % 2 == 1
    offset_BT = (positions_T - torch.where(is_chosen_BT, first_BT2[..., 0], first_BT2[..., 1])).clamp(min=0)
    is_behind_BT2 = first_BT2 + offset_BT[..., None] >= end_BT2
    at_BT2 = torch.minimum(first_BT2 + offset_BT[..., None], end_BT2 - 1).clamp(min=0)
    scores_BT2, tokens_BT2 = _at(scores_BT, at_BT2), _at(batch.tokens, at_BT2)

    differ_BT = (tokens_BT2[..., 0] != tokens_BT2[..., 1]) | is_behind_BT2.any(dim=-1)
    first_chosen_BT, end_chosen_BT = first_BT2[..., 0], end_BT2[..., 0]
    have_differed_BT = _sum_between(differ_BT, first_chosen_BT, positions_T.expand_as(pair_BT) + 1) > 0
    # Two equal answers would have no position at all: their last one counts.
    are_as_long_BT = (end_BT2 - first_BT2).diff(dim=-1)[..., 0] == 0
    counts_BT = have_differed_BT | (are_as_long_BT & (positions_T == end_chosen_BT - 1))
    counts_BT &= (is_chosen_BT | is_behind_BT2[..., 0]) & answers.is_pair_BP.gather(1, pair_BT) & (documents_BT > 0)
    num_BP = _sum_between(counts_BT, answers.first_BP2[..., 0], answers.end_BP2[..., 1])
    loss_BT = -F.logsigmoid(_chosen_less_rejected(scores_BT2)) / num_BP.gather(1, pair_BT).clamp(min=1)
    return torch.where(counts_BT, loss_BT, 0.0).sum()


def _at(values_BT: Tensor, places: Tensor) -> Tensor:
    """The values at places (B, ...) of their rows."""
    rows = torch.arange(len(places), device=places.device).view(-1, *[1] * (places.ndim - 1))
    # Not `gather`: where places are the same, its backward adds on a GPU in another order each time.
    return values_BT[rows, places]


def _chosen_less_rejected(values_2: Tensor) -> Tensor:
    return values_2[..., 0] - values_2[..., 1]


def _reward_means(rewards_BP2: Tensor) -> dict[str, Tensor]:
    margin_BP = _chosen_less_rejected(rewards_BP2)
    return {
        "rewards/chosen": rewards_BP2[..., 0],
        "rewards/rejected": rewards_BP2[..., 1],
        "rewards/margin": margin_BP,
        "rewards/accuracy": (margin_BP > 0).to(margin_BP.dtype),
    }


def _sums_over_pairs(answers: Answers, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.where(answers.is_pair_BP, value_BP.detach(), 0.0).sum() for name, value_BP in values.items()}

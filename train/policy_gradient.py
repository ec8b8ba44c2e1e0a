"""Learning from rewards of the model's own answers: policy gradients with the advantages of groups (GRPO).

Sums are over trained targets, the tokens of answers, whatever the weights of tokens: of a global batch with N of them
the loop makes the mean. `token_weights` says what each token has to count for other means than that.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.cross_entropy import IGNORE
from kernels.linear_log_probs import linear_log_probs, linear_log_probs_and_entropy
from model.balance import RoutingLog
from model.batch import Batch
from train.objectives import Outcome

# Added to a standard deviation of rewards, as TRL does: a group that differs by less is noise.
_LEAST_DEVIATION = 1e-4


def policy_gradient_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    clip: float | None = 0.2,
    clip_high: float | None = None,
    kl_weight: float = 0.0,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> Outcome:
    """Sums  weight (-min(ratio A, clipped A) + kl_weight kl)  over the tokens of answers.

        ratio   = p(token) / p_old(token), clipped to 1 - clip .. 1 + clip_high     A: the advantage
        kl      = p_reference / p - log(p_reference / p) - 1

    p is the model's distribution at the temperature that the answers were sampled with. clip_high is clip unless it is
    given; with clip None nothing is clipped. Of batch.extra, each (B, T) and read at trained targets only: `advantage`;
    `old_log_probs`, log p when the answers were sampled, without which they are the model's own now, and the gradient
    that of REINFORCE; `reference_log_probs`, needed if kl_weight is not 0; `weight`, 1 without it.

    Source: Schulman et al., "Proximal Policy Optimization", 2017, equation 7; Shao et al., "DeepSeekMath", 2024,
    equation 3 (groups); Yu et al., "DAPO", 2025, equation 10 (clip_high, the mean over all tokens); Schulman,
    "Approximating KL Divergence", 2020 (k3).
    """
    log_probs_BT, entropy_BT = model(
        batch.tokens,
        batch.boundaries,
        routing=routing,
        readout=lambda hidden_BTD, head_VD: torch.stack(
            linear_log_probs_and_entropy(hidden_BTD, head_VD, batch.targets, soft_cap=soft_cap, temperature=temperature)
        ),
    )
    is_trained_BT = batch.targets != IGNORE
    of_answers = {name: torch.where(is_trained_BT, value_BT, 0.0) for name, value_BT in batch.extra.items()}
    old_log_probs_BT = of_answers.get("old_log_probs", log_probs_BT.detach())
    ratio_BT = (log_probs_BT - old_log_probs_BT).exp()
    clipped_BT = ratio_BT if clip is None else ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    gain_BT, clipped_gain_BT = ratio_BT * of_answers["advantage"], clipped_BT * of_answers["advantage"]
    loss_BT = -torch.minimum(gain_BT, clipped_gain_BT)
    is_clipped_BT = (clipped_gain_BT < gain_BT).to(loss_BT.dtype)
    logged = {"ratio": ratio_BT, "clip_fraction": is_clipped_BT, "entropy": entropy_BT}
    if kl_weight or "reference_log_probs" in of_answers:
        below_BT = of_answers["reference_log_probs"] - log_probs_BT
        logged["kl"] = below_BT.exp() - below_BT - 1
        loss_BT = loss_BT + kl_weight * logged["kl"]
    loss_sum = (loss_BT * of_answers.get("weight", is_trained_BT)).sum()
    return Outcome(loss_sum, {name: (value_BT.detach() * is_trained_BT).sum() for name, value_BT in logged.items()})


@torch.no_grad()
def target_log_probs(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, soft_cap: float | None = None
) -> Tensor:
    """log p of each target, (B, T), 0 where it is not trained: what is kept of the model before, and of a reference."""
    return model(
        batch.tokens,
        batch.boundaries,
        readout=lambda hidden_BTD, head_VD: linear_log_probs(
            hidden_BTD, head_VD, batch.targets, soft_cap=soft_cap, temperature=temperature
        ),
    )


def group_advantages(rewards: Tensor, *, normalise_by: Literal["group", "none"] = "group") -> Tensor:
    """By how much each reward is above the mean of its group, in standard deviations of the group if wanted.

    Shapes: rewards (groups, answers to one prompt), two of these at least.
    Source: Shao et al., "DeepSeekMath", 2024, section 4.1.2; Liu et al., "Understanding R1-Zero-Like Training", 2025
    (none: a division would favour prompts that are nearly always or nearly never answered well).
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"group_advantages: rewards {tuple(rewards.shape)}; expected (groups, answers) with at least 2 answers to "
            "each prompt: one answer alone is neither better nor worse than its group"
        )
    above = rewards - rewards.mean(dim=1, keepdim=True)
    if normalise_by == "none":
        return above
    return above / (rewards.std(dim=1, keepdim=True) + _LEAST_DEVIATION)


def token_weights(
    num_tokens: Tensor, *, kind: Literal["dapo", "grpo", "dr_grpo"] = "dapo", most_tokens: int | None = None
) -> Tensor:
    """What each token of an answer counts, so that a sum over N tokens of answers, divided by N, is another mean.

    dapo: the mean over tokens, each weight 1. grpo: over answers, of their means over tokens. dr_grpo: over answers, of
    their sums over most_tokens, the length at which an answer is cut, so that long ones weigh by their length.

    Shapes: num_tokens (answers,), of all answers of a step on all ranks, as the division is by all their tokens.
    Source: as `policy_gradient_loss`; Liu et al., "Understanding R1-Zero-Like Training", 2025, section 3.1 (dr_grpo).
    """
    if kind == "dapo":
        return torch.ones_like(num_tokens, dtype=torch.float32)
    if kind == "grpo":
        divisor = num_tokens.clamp(min=1)
    else:
        if most_tokens is None:
            raise ValueError('token_weights: kind = "dr_grpo" needs most_tokens, the length at which answers are cut')
        divisor = torch.full_like(num_tokens, most_tokens)
    return num_tokens.sum() / (num_tokens.numel() * divisor)

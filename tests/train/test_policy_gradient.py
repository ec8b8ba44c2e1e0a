import contextlib
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.cross_entropy import IGNORE
from model.batch import Batch
from model.convert import from_hugging_face, read_hugging_face
from tests.models import LLAMA, make_model
from tests.train.packed import packed, random_documents
from train.objectives import Outcome
from train.policy_gradient import group_advantages, policy_gradient_loss, target_log_probs, token_weights

ROWS = [random_documents(3, 131, seed=1), random_documents(1, 131, seed=2), []]


def random_case() -> tuple[Batch, dict[str, Tensor]]:
    """Packed answers, and for each position an advantage, and log-probabilities that are not far from the model's."""
    batch = packed(ROWS, 32)
    generator = torch.Generator().manual_seed(0)
    advantage, old, reference = torch.randn(3, 3, 32, generator=generator, dtype=torch.float64)
    log_probs = target_log_probs(make_model(LLAMA, dtype=torch.float64), batch)
    return batch, {
        "advantage": advantage,
        "old_log_probs": log_probs + 0.3 * old,
        "reference_log_probs": log_probs + 0.5 * reference,
    }


def with_extra(batch: Batch, extra: dict[str, Tensor]) -> Batch:
    return Batch(batch.tokens, batch.targets, batch.boundaries, batch.num_targets, extra)


def loss_at(log_ratio: float, advantage: float, **options) -> tuple[float, float, Outcome]:
    """Loss and gradient of a single token, whose probability is exp(log_ratio) times the old one."""
    log_prob = torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True)
    extra = {"advantage": torch.tensor([[advantage]]), "old_log_probs": log_prob.detach() - log_ratio}
    extra["reference_log_probs"] = log_prob.detach() + options.pop("below_reference", 0.0)
    batch = Batch(torch.tensor([[1]]), torch.tensor([[2]]), None, 1, extra)
    outcome = policy_gradient_loss(says(log_prob), batch, **options)
    (gradient,) = torch.autograd.grad(outcome.loss_sum, log_prob)
    return outcome.loss_sum.item(), gradient.item(), outcome


def says(log_probs: Tensor) -> Any:
    """A model whose readout comes to these log-probabilities, and entropies of 1."""
    return lambda *_arguments, **_options: torch.stack((log_probs, torch.ones_like(log_probs)))


def test_log_probabilities_are_those_of_the_distribution_that_was_sampled():
    batch, _ = random_case()
    model = make_model(LLAMA, dtype=torch.float64)
    expected = (model(batch.tokens, batch.boundaries) / 0.7).log_softmax(-1)
    expected = expected.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0].masked_fill(batch.targets < 0, 0.0)
    torch.testing.assert_close(target_log_probs(model, batch, temperature=0.7), expected.detach())


def test_without_old_log_probabilities_the_gradient_is_that_of_reinforce():
    batch, extra = random_case()
    model = make_model(LLAMA, dtype=torch.float64)
    outcome = policy_gradient_loss(model, with_extra(batch, {"advantage": extra["advantage"]}), temperature=0.7)
    log_p = (model(batch.tokens, batch.boundaries) / 0.7).log_softmax(-1)
    is_trained = batch.targets != IGNORE
    log_probs = log_p.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    expected = -(log_probs * extra["advantage"])[is_trained].sum()
    parameters = list(model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(outcome.loss_sum, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    assert outcome.loss_sum.item() == pytest.approx(-extra["advantage"][is_trained].sum().item())
    entropies = -(log_p.exp() * log_p).sum(-1)
    assert outcome.sums["entropy"].item() == pytest.approx(entropies[is_trained].sum().item())
    assert outcome.sums["ratio"].item() == pytest.approx(batch.num_targets)
    assert outcome.sums["clip_fraction"] == 0
    assert "kl" not in outcome.sums


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.6, True),  # has gained enough
        (0.5, 2.0, -1.0, False),  # has lost: may come back
        (1.5, -2.0, 3.0, False),  # has gained what it should lose
        (0.5, -2.0, 1.6, True),
    ],
)
def test_a_token_is_left_alone_once_its_probability_has_moved_far_enough(ratio, advantage, loss, is_clipped):
    found, gradient, outcome = loss_at(math.log(ratio), advantage, clip=0.2, clip_high=0.3)
    assert found == pytest.approx(loss)
    assert gradient == pytest.approx(0.0 if is_clipped else loss)
    assert outcome.sums["clip_fraction"] == is_clipped
    assert loss_at(math.log(ratio), advantage, clip=None)[0] == pytest.approx(-ratio * advantage)


def test_the_upper_clip_is_the_lower_one_unless_it_is_given():
    assert loss_at(1.0, 1.0, clip=0.25)[0] == pytest.approx(-1.25)


@given(below=st.floats(-3, 3), weight=st.floats(0.01, 2))
def test_the_kl_term_pulls_towards_the_reference(below, weight):
    loss, gradient, outcome = loss_at(0.0, 0.0, kl_weight=weight, below_reference=below)
    assert outcome.sums["kl"].item() == pytest.approx(math.expm1(below) - below, abs=1e-12)
    assert outcome.sums["kl"] >= 0
    assert loss == pytest.approx(weight * outcome.sums["kl"].item())
    assert gradient == pytest.approx(-weight * math.expm1(below), abs=1e-12)


def test_what_stands_at_untrained_targets_does_not_matter():
    batch, extra = random_case()
    model = make_model(LLAMA, dtype=torch.float64)
    spoilt = {name: value.masked_fill(batch.targets == IGNORE, math.nan) for name, value in extra.items()}
    found, expected = (
        policy_gradient_loss(model, with_extra(batch, values), kl_weight=0.1) for values in (spoilt, extra)
    )
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    for gradients in zip(*(torch.autograd.grad(each.loss_sum, parameters) for each in (found, expected)), strict=True):
        torch.testing.assert_close(*gradients)


def test_the_sums_of_rows_are_the_sum_of_a_batch():
    batch, extra = random_case()
    extra["weight"] = torch.rand(3, 32, generator=torch.Generator().manual_seed(9))
    model = make_model(LLAMA, dtype=torch.float64)
    whole = policy_gradient_loss(model, with_extra(batch, extra), kl_weight=0.1)
    rows = []
    for row, documents in enumerate(ROWS):
        one = packed([documents], 32, {name: value[row, None] for name, value in extra.items()})
        rows.append(policy_gradient_loss(model, one, kl_weight=0.1))
    torch.testing.assert_close(whole.loss_sum, sum(outcome.loss_sum for outcome in rows))
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, sum(outcome.sums[name] for outcome in rows))


# --- Advantages and weights.


def test_advantages_are_deviations_from_the_mean_of_the_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = group_advantages(rewards)
    deviation = math.sqrt(1 / 3)
    torch.testing.assert_close(found[0], torch.tensor([1.0, -1, -1, 1], dtype=torch.float64) * 0.5 / (deviation + 1e-4))
    assert not found[1].any()
    torch.testing.assert_close(group_advantages(rewards, normalise_by="none")[2].tolist(), [-0.25, -0.25, -0.25, 0.75])


def test_a_group_of_one_answer_is_refused():
    with pytest.raises(ValueError, match=r"rewards \(5, 1\); expected \(groups, answers\) with at least 2 answers"):
        group_advantages(torch.ones(5, 1))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_weighted_sums_over_all_tokens_are_the_means_that_were_asked_for(lengths):
    num_tokens = torch.tensor(lengths)
    values = [torch.randn(length, dtype=torch.float64) for length in lengths]

    def mean(kind) -> float:
        weights = token_weights(num_tokens, kind=kind, most_tokens=9)
        return sum((weight * some).sum().item() for weight, some in zip(weights, values, strict=True)) / sum(lengths)

    assert mean("dapo") == pytest.approx(torch.cat(values).mean().item())
    assert mean("grpo") == pytest.approx(sum(v.mean().item() for v in values if len(v)) / len(lengths), rel=1e-5)
    assert mean("dr_grpo") == pytest.approx(sum(v.sum().item() / 9 for v in values) / len(lengths), rel=1e-5)


def test_a_fixed_length_has_to_be_named():
    with pytest.raises(ValueError, match="needs most_tokens"):
        token_weights(torch.tensor([3]), kind="dr_grpo")


# --- TRL, its own code on its own model of the same weights.


def their_inputs(documents: list[tuple[list[int], list[int]]], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompts padded on the left, answers on the right."""
    widths = [max(len(document[part]) for document in documents) for part in range(2)]
    inputs = {
        f"{part}_{kind}": torch.zeros(len(documents), width, dtype=torch.int64)
        for part, width in zip(("prompt", "completion"), widths, strict=True)
        for kind in ("ids", "mask")
    }
    per_token = {name: torch.zeros(len(documents), widths[1], dtype=torch.float64) for name in extra}
    for row, (prompt, answer) in enumerate(documents):
        inputs["prompt_ids"][row, widths[0] - len(prompt) :] = torch.tensor(prompt)
        inputs["prompt_mask"][row, widths[0] - len(prompt) :] = 1
        inputs["completion_ids"][row, : len(answer)] = torch.tensor(answer)
        inputs["completion_mask"][row, : len(answer)] = 1
        for name, values in extra.items():
            first = len(prompt)  # a token of context, and targets one to the left of their tokens
            per_token[name][row, : len(answer)] = values[row, first : first + len(answer)]
    return inputs | per_token | {"num_items_in_batch": inputs["completion_mask"].sum()}


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_the_loss_and_its_gradients_are_those_of_trl(loss_type, tmp_path):
    documents = random_documents(4, 101, seed=3)
    batch, generator = packed([[document] for document in documents], 12), torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 12, generator=generator, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.grpo_trainer import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        from tests.hugging_face import InDouble, our_model, their_model

        theirs = their_model("Llama", torch.float64)
        theirs.save_pretrained(tmp_path)
        ours = our_model(*read_hugging_face(tmp_path))
        log_probs = target_log_probs(ours, batch, temperature=0.8)
        advantages = group_advantages(torch.tensor([[1.0, 0.2, 0.0, 0.7]], dtype=torch.float64))[0]
        old, reference = log_probs + 0.3 * noise[0], log_probs + 0.5 * noise[1]
        inputs = their_inputs(documents, {"old_per_token_logps": old, "ref_per_token_logps": reference})
        same = {name: lambda value, **_: value for name in ("gather", "reduce")}
        trainer: Any = SimpleNamespace(
            model=theirs, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            importance_sampling_level="token", beta=0.1, loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.3,
            use_vllm=False, max_completion_length=6, current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False, _metrics={"eval": defaultdict(list)},
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            accelerator=SimpleNamespace(
                is_main_process=False, num_processes=1, autocast=contextlib.nullcontext, **same
            ),
        )  # fmt: skip
        trainer._get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
        add_fused_lm_head(theirs, temperature=0.8, outputs=("log_probs", "entropy"))
        with InDouble():
            their_loss = GRPOTrainer._compute_loss(trainer, theirs, inputs | {"advantages": advantages})
            their_loss.backward()
    lengths = torch.tensor([len(answer) for _, answer in documents])
    kind = "dapo" if loss_type == "bnpo" else loss_type
    weights = token_weights(lengths.double(), kind=kind, most_tokens=6)
    extra = {"old_log_probs": old, "reference_log_probs": reference}
    extra |= {name: value[:, None].expand(4, 12) for name, value in (("advantage", advantages), ("weight", weights))}
    options: dict[str, Any] = {"clip": 0.2, "clip_high": 0.3, "kl_weight": 0.1, "temperature": 0.8}
    outcome = policy_gradient_loss(ours, with_extra(batch, extra), **options)
    (outcome.loss_sum / batch.num_targets).backward()
    assert outcome.loss_sum.item() / batch.num_targets == pytest.approx(their_loss.item(), rel=1e-6)
    logged = {"kl": "kl", "entropy": "entropy", "clip_fraction": "clip_ratio/region_mean"}
    for our_name, their_name in logged.items():
        (expected,) = trainer._metrics["eval"][their_name]
        assert expected > 0
        assert outcome.sums[our_name].item() / batch.num_targets == pytest.approx(expected, rel=1e-6), our_name
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found: dict[str, Any] = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, expected in from_hugging_face(ours.config, gradients).items():
        assert (found[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name

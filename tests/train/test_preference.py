import contextlib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from model.convert import from_hugging_face, read_hugging_face
from tests.models import LLAMA, make_model
from tests.train.packed import Document, packed, random_documents
from train.preference import dpo_loss, pair_log_probs, reward_loss, scores

KINDS: list[dict[str, Any]] = [
    {},
    {"beta": 0.4, "label_smoothing": 0.2, "sft_weight": 0.3},
    {"kind": "ipo", "beta": 0.7},
    {"kind": "ipo", "label_smoothing": 0.1},
]
with_each_kind = pytest.mark.parametrize("options", KINDS, ids=lambda options: "+".join(options) or "plain")
TWO_ROWS = [random_documents(4, 131, seed=1), random_documents(2, 131, seed=2)]
"""Two pairs, and one pair."""
LENGTH = 42


def says(values: Tensor) -> Any:
    """A model whose readout comes to these values."""
    return lambda *_arguments, **_options: values


def answers_of(rows: list[list[Document]], values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The values, (B, T), at the answers' targets, of the chosen and the rejected one of each pair in turn."""
    found = []
    for row, documents in enumerate(rows):
        first = 1
        for prompt, answer in documents:
            start = first + len(prompt) - 1  # target j is token j + 1
            found.append(values[row, start : start + len(answer)])
            first += len(prompt) + len(answer)
    return list(zip(found[::2], found[1::2], strict=True))


def dpo_by_hand(
    pairs, references, kind="sigmoid", beta=0.1, label_smoothing=0.0, sft_weight=0.0
) -> tuple[Tensor, dict[str, float]]:
    loss_sum, sums = torch.zeros((), dtype=torch.float64), defaultdict(float)
    for (chosen, rejected), reference in zip(pairs, references, strict=True):
        ratios = chosen.sum() - reference[0], rejected.sum() - reference[1]
        if kind == "sigmoid":
            p = torch.sigmoid(beta * (ratios[0] - ratios[1]))
            loss_sum = loss_sum - (1 - label_smoothing) * p.log() - label_smoothing * (1 - p).log()
        else:
            margin = ratios[0] / len(chosen) - ratios[1] / len(rejected)
            loss_sum = loss_sum + (1 - label_smoothing) * (margin - 0.5 / beta) ** 2
            loss_sum = loss_sum + label_smoothing * (margin + 0.5 / beta) ** 2
        loss_sum = loss_sum - sft_weight * chosen.mean()
        sums["rewards/chosen"] += beta * ratios[0].item()
        sums["rewards/rejected"] += beta * ratios[1].item()
        sums["rewards/margin"] += beta * (ratios[0] - ratios[1]).item()
        sums["rewards/accuracy"] += (ratios[0] > ratios[1]).item()
        sums["log_prob/chosen"] += chosen.mean().item()
        sums["log_prob/rejected"] += rejected.mean().item()
        sums["length_ratio"] += len(chosen) / len(rejected)
    return loss_sum, dict(sums)


@with_each_kind
@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_loss_and_what_is_logged_are_sums_over_the_pairs_of_all_rows(options, counts, seed):
    rows = [random_documents(2 * count, 99, seed + 7 * row) for row, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(seed)
    reference = -20 * torch.rand(len(rows), 3, 2, generator=generator, dtype=torch.float64)
    for row, count in enumerate(counts):
        reference[row, count:] = 0.0
    batch = packed(rows, 61, {"reference": reference})
    leaf = -5 * torch.rand(len(rows), 61, generator=generator, dtype=torch.float64).requires_grad_()
    log_probs = leaf.masked_fill(batch.targets < 0, 0.0)
    outcome = dpo_loss(says(log_probs), batch, **options)
    references = [pair for row, count in enumerate(counts) for pair in reference[row, :count]]
    loss_sum, sums = dpo_by_hand(answers_of(rows, log_probs), references, **options)
    torch.testing.assert_close(outcome.loss_sum, loss_sum)
    if sum(counts):
        assert {name: value.item() for name, value in outcome.sums.items()} == pytest.approx(sums, rel=1e-6)
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True) for loss in (outcome.loss_sum, loss_sum)]
        torch.testing.assert_close(*gradients)
    else:
        assert not any(outcome.sums.values())
        assert not torch.autograd.grad(outcome.loss_sum, leaf)[0].any()


def test_log_probabilities_of_packed_pairs_are_those_of_answers_read_alone():
    model = make_model(LLAMA, dtype=torch.float64)
    found = pair_log_probs(model, packed(TWO_ROWS, LENGTH))
    assert found.shape == (2, 2, 2)
    assert not found.requires_grad
    assert not found[1, 1].any()
    for row, documents in enumerate(TWO_ROWS):
        for (prompt, answer), log_prob in zip(documents, found[row].flatten()[: len(documents)], strict=True):
            log_p = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            expected = sum(log_p[len(prompt) + i - 1, token] for i, token in enumerate(answer))
            torch.testing.assert_close(log_prob, expected)


def test_an_untrained_model_is_indifferent_and_its_gradient_prefers_the_chosen():
    model = make_model(LLAMA, dtype=torch.float64)
    batch = packed(TWO_ROWS, LENGTH)
    batch = packed(TWO_ROWS, LENGTH, {"reference": pair_log_probs(model, batch)})
    outcome = dpo_loss(model, batch)
    assert outcome.loss_sum.item() == pytest.approx(3 * math.log(2))
    assert outcome.sums["rewards/accuracy"] == 0
    outcome.loss_sum.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-3 * parameter.grad)
    assert dpo_loss(model, batch).sums["rewards/accuracy"] == 3


def test_a_document_without_its_counterpart_is_no_pair():
    (prompt, answer), other = random_documents(2, 131, seed=3)
    lonely = [[(prompt, answer)], [(prompt, answer), (other[0] + other[1], [])], [(prompt, answer), other]]
    batch = packed(lonely, 30, {"reference": torch.zeros(3, 2, 2)})
    model = make_model(LLAMA)
    assert dpo_loss(model, batch).sums["length_ratio"] == len(answer) / len(other[1])
    batch = packed(lonely[:2], 30, {"reference": torch.zeros(2, 2, 2)})
    for kind in ("sigmoid", "ipo"):
        outcome = dpo_loss(model, batch, kind=kind)
        gradients = torch.autograd.grad(outcome.loss_sum, list(model.parameters()))
        assert outcome.loss_sum.item() == 0
        assert not any(gradient.any() for gradient in gradients)


# --- Reward models.


def score_model() -> nn.Module:
    model = make_model(LLAMA, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    model.head = nn.Linear(LLAMA.hidden_size, 1, bias=False, dtype=torch.float64)
    nn.init.normal_(model.head.weight, generator=generator)
    return model


def documents_of(rows: list[list[Document]], values: Tensor) -> list[tuple[list[int], Tensor]]:
    """Tokens and values of each document."""
    found = []
    for row, documents in enumerate(rows):
        first = 1
        for prompt, answer in documents:
            size = len(prompt) + len(answer)
            found.append((prompt + answer, values[row, first : first + size]))
            first += size
    return found


def divergence_by_hand(rows: list[list[Document]], values: Tensor) -> list[Tensor]:
    losses, documents = [], documents_of(rows, values)
    for (chosen, chosen_scores), (rejected, rejected_scores) in zip(documents[::2], documents[1::2], strict=True):
        end = max(len(chosen), len(rejected))
        held = [torch.cat([x, x[-1:].expand(end - len(x))]) for x in (chosen_scores, rejected_scores)]
        differ = [i for i in range(end) if chosen[i : i + 1] != rejected[i : i + 1]]
        first = differ[0] if differ else end - 1
        losses.append(-torch.sigmoid(held[0][first:] - held[1][first:]).log().mean())
    return losses


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    vocab_size=st.integers(2, 4),  # so few tokens that answers begin alike, continue each other, and are the same
    seed=st.integers(0, 10_000),
)
def test_the_divergence_loss_is_the_mean_from_the_first_difference_to_the_longer_end(counts, vocab_size, seed):
    rows = [random_documents(2 * count, vocab_size, seed + 7 * row, most_tokens=3) for row, count in enumerate(counts)]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(rows), 40, generator=generator, dtype=torch.float64, requires_grad=True)
    outcome = reward_loss(says(values), packed(rows, 40), kind="divergence")
    expected = sum(divergence_by_hand(rows, values), start=0.0 * values.sum())
    torch.testing.assert_close(outcome.loss_sum, expected)
    gradients = [torch.autograd.grad(loss_sum, values)[0] for loss_sum in (outcome.loss_sum, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["end", "divergence"])
def test_two_equal_answers_count_log_2_and_teach_nothing(kind):
    (document,) = random_documents(1, 131, seed=4)
    model = score_model()
    outcome = reward_loss(model, packed([[document, document]], 24), kind=kind)
    assert outcome.loss_sum.item() == pytest.approx(math.log(2))
    gradients = torch.autograd.grad(outcome.loss_sum, list(model.parameters()), allow_unused=True)
    assert max(gradient.abs().max().item() for gradient in gradients if gradient is not None) < 1e-12


@pytest.mark.parametrize("kind", ["end", "divergence"])
def test_scores_of_packed_pairs_are_those_of_answers_read_alone(kind):
    model = score_model()
    alone = torch.zeros(2, LENGTH, dtype=torch.float64)
    for row, documents in enumerate(TWO_ROWS):
        first = 1
        for prompt, answer in documents:
            end = first + len(prompt) + len(answer)
            alone[row, first:end] = model(torch.tensor([prompt + answer]), readout=scores)[0]
            first = end
    batch = packed(TWO_ROWS, LENGTH)
    found, expected = reward_loss(model, batch, kind=kind), reward_loss(says(alone), batch, kind=kind)
    torch.testing.assert_close(found, expected)


@given(seed=st.integers(0, 999))
def test_what_is_logged_of_rewards_are_sums_over_last_tokens(seed):
    values = torch.randn(2, LENGTH, generator=torch.Generator().manual_seed(seed))
    ends = [score[-1].item() for _, score in documents_of(TWO_ROWS, values)]
    margins = [chosen - rejected for chosen, rejected in zip(ends[::2], ends[1::2], strict=True)]
    found = reward_loss(says(values), packed(TWO_ROWS, LENGTH), kind="divergence").sums
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {
            "rewards/chosen": sum(ends[::2]),
            "rewards/rejected": sum(ends[1::2]),
            "rewards/margin": sum(margins),
            "rewards/accuracy": sum(margin > 0 for margin in margins),
        },
        rel=1e-4,
        abs=1e-5,
    )


@pytest.mark.parametrize("kind", ["end", "divergence"])
def test_rows_without_pairs_give_no_loss_and_no_gradient(kind):
    model = score_model()
    outcome = reward_loss(model, packed([[], random_documents(1, 131, seed=6)], 16), kind=kind, center_weight=0.1)
    gradients = torch.autograd.grad(outcome.loss_sum, list(model.parameters()))
    assert outcome.loss_sum.item() == 0
    assert not any(gradient.any() for gradient in gradients)


def test_a_document_that_fills_its_row_is_scored_at_its_last_input():
    documents = random_documents(2, 131, seed=7)
    length = sum(len(prompt) + len(answer) for prompt, answer in documents)
    values = torch.randn(1, length, generator=torch.Generator().manual_seed(0))
    found = reward_loss(says(values), packed([documents], length)).sums["rewards/rejected"]
    assert found.item() == values[0, -1].item()


def test_scores_are_finer_than_the_dtype_of_their_operands():
    hidden, head = torch.randn(2, 3, 64).bfloat16().requires_grad_(), torch.randn(1, 64).bfloat16()
    found = scores(hidden, head)
    assert not found._is_view()  # FSDP would warn
    torch.testing.assert_close(found, (hidden.float() * head.float()).sum(-1))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("loss", [dpo_loss, reward_loss], ids=lambda loss: loss.__name__)
def test_the_sums_of_rows_are_the_sum_of_a_batch(loss):
    model = score_model() if loss is reward_loss else make_model(LLAMA, dtype=torch.float64)
    reference = torch.tensor([[[-3.0, -20.0], [-9.0, -8.0]], [[-2.0, -1.0], [0.0, 0.0]]])
    whole = loss(model, packed(TWO_ROWS, LENGTH, {"reference": reference}))
    rows = [
        loss(model, packed([row], LENGTH, {"reference": some[None]}))
        for row, some in zip(TWO_ROWS, reference, strict=True)
    ]
    torch.testing.assert_close(whole.loss_sum, sum(outcome.loss_sum for outcome in rows))
    for name, value in whole.sums.items():
        torch.testing.assert_close(value, sum(outcome.sums[name] for outcome in rows))


# --- TRL, its own code on its own model of the same weights.


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Their code, importable and in fp64 throughout."""
    from tests.hugging_face import InDouble

    with warnings.catch_warnings(), InDouble():
        warnings.simplefilter("ignore")
        yield


def accelerator() -> SimpleNamespace:
    same = {name: lambda value, **_: value for name in ("gather", "gather_for_metrics", "reduce")}
    return SimpleNamespace(device=torch.device("cpu"), num_processes=1, autocast=contextlib.nullcontext, **same)


def their_batch(rows: list[list[Document]]) -> dict[str, Tensor]:
    """All chosen answers, then all rejected ones, each in a row of its own that is padded on the right."""
    documents = [document for row in rows for document in row]
    documents = documents[::2] + documents[1::2]
    length = max(len(prompt) + len(answer) for prompt, answer in documents)
    tokens, mask, answer_mask = torch.zeros(3, len(documents), length, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(documents):
        size = len(prompt) + len(answer)
        tokens[row, :size] = torch.tensor(prompt + answer)
        mask[row, :size] = 1
        answer_mask[row, len(prompt) : size] = 1
    return {"input_ids": tokens, "attention_mask": mask, "completion_mask": answer_mask}


def assert_equal_gradients(ours: Any, theirs: nn.Module, tolerance: float) -> None:
    """Of every weight, in units of its largest one."""
    found: dict[str, Any] = {name: parameter.grad for name, parameter in ours.named_parameters()}
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients["lm_head.weight"] = gradients.pop("score.weight", gradients.get("lm_head.weight"))
    head = gradients["lm_head.weight"]
    assert head is not None
    if len(head) == 1:  # a score instead of tokens
        gradients["lm_head.weight"] = head.expand(ours.config.vocab_size, -1)
    for name, expected in from_hugging_face(ours.config, gradients).items():
        expected = expected[:1] if name == "head.weight" and len(head) == 1 else expected
        torch.testing.assert_close(
            found[name] / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=tolerance
        )


THEIR_LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"loss_types": ["sigmoid"]}, {}),
    "ipo": ({"loss_types": ["ipo"]}, {"kind": "ipo"}),
    # In a batch of one pair, "aot" is their smoothed loss, and "sft" has no other answer's tokens in its mean.
    "smoothing": ({"loss_types": ["aot"], "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "sft": ({"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}, {"sft_weight": 0.4}),
}


@pytest.mark.parametrize("case", THEIR_LOSSES)
def test_dpo_and_its_gradients_are_those_of_trl(case, tmp_path):
    theirs_options, our_options = THEIR_LOSSES[case]
    rows = TWO_ROWS if case in ("sigmoid", "ipo") else [TWO_ROWS[1]]
    num_pairs = sum(len(row) for row in rows) // 2
    rows = [[([t % 101 for t in prompt], [t % 101 for t in answer]) for prompt, answer in row] for row in rows]
    with in_double():
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        from tests.hugging_face import our_model, their_model

        theirs = their_model("Llama", torch.float64)
        theirs.save_pretrained(tmp_path)
        ours = our_model(*read_hugging_face(tmp_path))
        reference = pair_log_probs(ours, packed(rows, LENGTH)) + torch.tensor([1.5, -0.5])
        add_fused_lm_head(theirs, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        settings: dict[str, Any] = {"loss_weights": [1.0], "label_smoothing": 0.0} | theirs_options
        trainer: Any = SimpleNamespace(
            model=theirs, accelerator=accelerator(), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", beta=0.3, use_weighting=False, _total_train_tokens=0, _tp_size=1,
            _metrics={"eval": defaultdict(list)}, **settings,
        )  # fmt: skip
        references = torch.cat([row[: len(documents) // 2] for row, documents in zip(reference, rows, strict=True)])
        inputs = their_batch(rows) | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references.T, strict=True))
        their_loss = DPOTrainer._compute_loss(trainer, theirs, inputs, False)
        their_loss.backward()
    outcome = dpo_loss(ours, packed(rows, LENGTH, {"reference": reference}), beta=0.3, **our_options)
    (outcome.loss_sum / num_pairs).backward()
    assert outcome.loss_sum.item() / num_pairs == pytest.approx(their_loss.item(), rel=1e-9)
    assert_equal_gradients(ours, theirs, 1e-6)  # their readout's backward is in fp32
    logged = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected",
              "rewards/accuracy": "rewards/accuracies", "rewards/margin": "rewards/margins"}  # fmt: skip
    for our_name, their_name in logged.items():
        (expected,) = trainer._metrics["eval"][their_name]
        assert outcome.sums[our_name].item() / num_pairs == pytest.approx(expected, rel=1e-6), our_name


def test_rewards_and_their_gradients_are_those_of_trl(tmp_path):
    rows = [
        [([t % 100 + 1 for t in prompt], [t % 100 + 1 for t in answer]) for prompt, answer in row] for row in TWO_ROWS
    ]
    with in_double():
        from transformers import LlamaForSequenceClassification
        from trl.trainer.reward_trainer import RewardTrainer

        from tests.hugging_face import our_model, their_model

        language_model = their_model("Llama", torch.float64)
        language_model.save_pretrained(tmp_path)
        ours = our_model(*read_hugging_face(tmp_path))
        language_model.config.num_labels, language_model.config.pad_token_id = 1, 0
        theirs = LlamaForSequenceClassification(language_model.config).double().eval()
        theirs.model.load_state_dict(language_model.model.state_dict())
        ours.head = nn.Linear(32, 1, bias=False)
        ours.head.weight = nn.Parameter(theirs.score.weight.detach().clone())
        trainer: Any = SimpleNamespace(
            model=theirs, accelerator=accelerator(), args=SimpleNamespace(center_rewards_coefficient=0.05),
            _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
        )  # fmt: skip
        inputs = their_batch(rows)
        del inputs["completion_mask"]
        their_loss: Any = RewardTrainer.compute_loss(trainer, theirs, inputs)
        their_loss.backward()
    outcome = reward_loss(ours, packed(rows, LENGTH), center_weight=0.05)
    (outcome.loss_sum / 3).backward()
    assert outcome.loss_sum.item() / 3 == pytest.approx(their_loss.item(), rel=1e-9)
    assert_equal_gradients(ours, theirs, 1e-9)
    for name in ("accuracy", "margin"):
        (expected,) = trainer._metrics["eval"][name]
        assert outcome.sums[f"rewards/{name}"].item() / 3 == pytest.approx(expected, rel=1e-6)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.cross_entropy import IGNORE, cross_entropy_sum, cross_entropy_sum_reference


def formula(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum over rows, one by one, in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.double().flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target != IGNORE:
            total = total + row.logsumexp(0) - row[target]
    return total


def random_case(batch_size: int, length: int, vocab_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch_size, length, vocab_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (batch_size, length), generator=generator)
    targets[torch.rand(batch_size, length, generator=generator) < 0.3] = IGNORE
    return logits, targets


@given(batch_size=st.integers(1, 3), length=st.integers(1, 6), vocab_size=st.integers(1, 60), seed=st.integers(0, 1000))
def test_the_sum_is_the_formula_and_ignored_targets_add_nothing(batch_size, length, vocab_size, seed):
    logits, targets = random_case(batch_size, length, vocab_size, seed)
    expected = formula(logits, targets)
    torch.testing.assert_close(cross_entropy_sum(logits, targets), expected, rtol=1e-12, atol=1e-12)


@given(split=st.integers(1, 11), seed=st.integers(0, 1000))
def test_sums_of_parts_add_up_to_the_sum_of_the_whole(split, seed):
    logits, targets = random_case(1, 12, 20, seed)
    parts = [cross_entropy_sum(logits[:, s], targets[:, s]) for s in (slice(0, split), slice(split, 12))]
    torch.testing.assert_close(parts[0] + parts[1], cross_entropy_sum(logits, targets), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_low_precision_logits_are_summed_in_fp32(dtype):
    logits, targets = random_case(4, 200, 300, seed=0)
    logits = logits.to(dtype)
    found = cross_entropy_sum(logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(formula(logits, targets).item(), rel=1e-6)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss_sum = cross_entropy_sum(torch.zeros(5, 32_000), torch.arange(5))
    assert loss_sum.item() == pytest.approx(5 * math.log(32_000), rel=1e-6)


def test_all_targets_ignored_give_zero_and_no_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    loss_sum = cross_entropy_sum(logits, torch.full((2, 3), IGNORE))
    loss_sum.backward()
    assert loss_sum.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_gradient_is_the_softmax_less_the_target():
    logits, targets = random_case(2, 5, 9, seed=3)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy_sum(logits, targets), logits)
    counted = targets != IGNORE
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), 9)
    expected = (logits.detach().softmax(-1) - one_hot) * counted[..., None]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("target", [-1, 7])
def test_targets_outside_the_vocabulary_are_an_error(target: int):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        cross_entropy_sum(torch.zeros(1, 7), torch.tensor([target]))


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets \(2, 4\) for logits \(2, 3, 7\)"):
        cross_entropy_sum(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_value_and_gradient_are_the_reference_s(dtype):
    logits, targets = random_case(3, 40, 70, seed=1)
    found, expected = (logits.to(dtype).requires_grad_() for _ in range(2))
    value, reference = cross_entropy_sum(found, targets), cross_entropy_sum_reference(expected, targets)
    torch.testing.assert_close(value, reference)
    (0.37 * value).backward()
    (0.37 * reference).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_a_second_backward_is_an_error_and_not_a_wrong_gradient():
    logits, targets = random_case(1, 5, 9, seed=2)
    logits.requires_grad_()
    loss_sum = cross_entropy_sum(logits, targets)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from train.config import OptimSection
from train.optim import clip_factor, make_optimizer, scale_gradients, squared_grad_norm, state_tensors
from train.schedule import learning_rate


def test_adamw_is_the_equation_of_the_paper_with_decay_on_matrices_only():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    config = OptimSection(peak_lr=1e-2, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    optimizer = make_optimizer(model, config)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 5):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            decay = 0.1 if p.ndim == 2 else 0.0
            m[name] = 0.9 * m[name] + 0.1 * p.grad
            v[name] = 0.95 * v[name] + 0.05 * p.grad**2
            update = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] - 1e-2 * (update + decay * expected[name])
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_everything_that_training_changes_has_a_name():
    model = nn.Linear(3, 2)
    names = set(state_tensors(model, make_optimizer(model, OptimSection())))
    assert names == {f"model.{p}" for p in ("weight", "bias")} | {
        f"optim.{p}.{s}" for p in ("weight", "bias") for s in ("step", "exp_avg", "exp_avg_sq")
    }


def test_clipping_gives_the_norm_torch_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = math.sqrt(squared_grad_norm(model, rank=0).item())
    assert norm == pytest.approx(expected.item(), rel=1e-14)
    scale_gradients(model, clip_factor(norm, 0.5))
    assert math.sqrt(squared_grad_norm(model, rank=0).item()) == pytest.approx(0.5, rel=1e-5)
    assert clip_factor(0.4, 0.5) == 1.0


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 20),
    num_steps=st.integers(1, 200),
    floor=st.floats(0, 1),
)
def test_rates_rise_to_the_peak_once_and_never_rise_again(kind: str, warmup: int, num_steps: int, floor: float):
    config = OptimSection(schedule=kind, warmup_steps=warmup, min_lr_ratio=floor, peak_lr=1.0, decay_steps=10)  # pyright: ignore[reportArgumentType]
    rates = [learning_rate(config, step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= 1 or (rate == 0 and floor == 0) for rate in rates)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if num_steps > warmup + 10 and kind != "constant":
        assert rates[-1] == pytest.approx(floor)
    if num_steps > warmup + 11:
        assert rates[warmup] == 1.0


def test_wsd_stays_at_the_peak_until_its_decay():
    config = OptimSection(schedule="wsd", warmup_steps=5, decay_steps=10, peak_lr=1.0, min_lr_ratio=0.0)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert set(rates[5:90]) == {1.0}
    assert rates[94] == pytest.approx(0.5)

"""The learning rate as a pure function of the step."""

import math
from typing import Literal

from train.config import OptimSection


def between(first: float, last: float, progress: float, way: Literal["constant", "linear", "cosine"]) -> float:
    """What lies at a share of the way from first to last; a constant stays at first."""
    match way:
        case "constant":
            return first
        case "linear":
            return last + (first - last) * (1 - progress)
        case "cosine":
            return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config: OptimSection, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `num_steps`.

    Linear warm-up to the peak, then one of
        cosine    floor + (peak - floor) (1 + cos(pi t)) / 2,  t the share of the steps after the warm-up
        wsd       peak, then linear to the floor over the last decay_steps
        constant  peak
    with floor = min_lr_ratio * peak.

    Source: Loshchilov and Hutter, "SGDR", 2017; Hu et al., "MiniCPM", 2024 (warm-up, stable, decay).
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio * config.peak_lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
        return between(config.peak_lr, floor, min(1.0, progress), "cosine")
    if config.schedule == "wsd":
        steps_left = max(0, num_steps - 1 - step)
        return floor + (config.peak_lr - floor) * min(1.0, steps_left / config.decay_steps)
    return config.peak_lr

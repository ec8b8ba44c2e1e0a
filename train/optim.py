"""AdamW over named parameters, its state as flat named tensors, and gradient clipping."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from resume.regions import is_first_replica, local_part
from train.config import OptimSection


def make_optimizer(model: nn.Module, config: OptimSection, exact: bool = False) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only; its state exists from the start, so that it can be loaded into.

    `exact`: not fused. On a CPU the fused one rounds the last elements of a part otherwise than those before them, so
    that the bits depend on where the parts are cut.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.peak_lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=not exact
    )
    for p in trained:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=local_part(p).device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
    """Everything that training changes, by name: `model.<parameter>` and `optim.<parameter>.<state>`."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue  # beside adapters: it stays what the run started from
        # A gathered copy in a parameter's place would be saved as the parameter, without moments.
        assert p in optimizer.state, f"{name} is not what the optimizer updates"
        tensors[f"model.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f"optim.{name}.{key}"] = value
    for name, buffer in model.named_buffers():  # of a mixture's routers: equal on all ranks
        tensors[f"model.{name}"] = buffer
    return tensors


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def squared_grad_norm(model: nn.Module, rank: int) -> Tensor:
    """This rank's share of the squared global L2 norm of all gradients, in fp64.

    The shares of all ranks add up to the norm's square whatever the sharding: of replicas only the first one counts.
    fp64 hides the order of summation, so that clipping does the same on any number of ranks.
    """
    grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None and is_first_replica(p.grad, rank)]
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def scale_gradients(model: nn.Module, factor: float) -> None:
    """Multiplies every gradient by one factor."""
    grads = [local_part(p.grad) for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]


def clip_factor(grad_norm: float, max_grad_norm: float) -> float:
    """The factor that brings the norm down to max_grad_norm, 1 below it; rounded to fp32, equal on every rank.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, algorithm 1.
    """
    factor = min(1.0, max_grad_norm / (grad_norm + 1e-6))
    return float(torch.tensor(factor, dtype=torch.float32))

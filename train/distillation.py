"""Learning from a teacher: its distributions of the next token, and its hidden states.

    loss = w T^2 D(teacher, student at temperature T) + (1 - w) cross-entropy + w_h mean over layers of a distance

summed over targets (`kernels.linear_divergence` says what D is). The teacher is a model of the same vocabulary, whole
on every rank, or what `python -m train.teacher_cache` has written of one beside the shards.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; hidden states: Romero et al., "FitNets",
2015 (mse), Sanh et al., "DistilBERT", 2019 (cosine).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.config_file import ConfigError
from data_prep.tokenizing.tokenizer import Tokenizer
from evaluation.model_folder import load_model
from kernels.cross_entropy import IGNORE, LossOptions
from kernels.launch import sum_dtype
from kernels.linear_cross_entropy import linear_cross_entropy_sum
from kernels.linear_divergence import Divergence, linear_divergence_sum, linear_divergence_topk_sum
from model.balance import RoutingLog
from model.batch import Batch
from model.transformer import Transformer
from train.objectives import Objective, Outcome
from train.recipes import DistillConfig, DistillSection

_PROJECTION_SEED = 0


class LayerPair(NamedTuple):
    """Layers, from 0, after which the two models' hidden states are compared."""

    student: int
    teacher: int


def load_teacher(
    path: str | Path, tokenizer: Tokenizer, device: str = "auto", dtype: torch.dtype | None = None
) -> Transformer:
    """The model that path holds, frozen; its tokens are those of the data's tokenizer, with perhaps more behind them.

    Dtypes: see `load_model`.
    Raises:
        ConfigError: it has another vocabulary, or no tokens to predict.
        ModelFolderError: no model there.
    """
    loaded = load_model(path, device=device, dtype=dtype)
    if loaded.config.head != "tokens":
        raise ConfigError(f"{path} scores answers and predicts no tokens; name a language model as teacher")
    contents = tokenizer.token_contents()
    if loaded.tokenizer.digest != tokenizer.digest and loaded.tokenizer.token_contents()[: len(contents)] != contents:
        raise ConfigError(
            f"the teacher {path} has another vocabulary ({loaded.tokenizer.vocab_size} tokens) than the data "
            f"({tokenizer.vocab_size}). Prepare the data with its tokenizer (--tokenizer.path {path}), or fine-tune "
            "the student on texts that the teacher wrote"
        )
    return loaded.model.requires_grad_(False)


def distillation_at(config: DistillConfig, teacher: Transformer | None, num_tokens: int) -> Callable[[int], Objective]:
    """The objective of each step, from 0; `teacher` is None where what it says is read from beside the shards.

    Raises:
        ConfigError: a layer does not exist, or hidden states are to be matched with a teacher that is not there.
    """
    section = config.distill
    if section.layers and teacher is None:
        raise ConfigError("distill.layers: hidden states are not cached; leave distill.layers or distill.cached out")
    num_layers = teacher.config.num_layers if teacher is not None else 0
    options = functools.partial(
        distillation_loss,
        teacher=teacher,
        kind=section.kind,
        beta=section.beta,
        temperature=section.temperature,
        z_loss=config.optim.z_loss,
        soft_cap=config.model.logit_softcap,
        label_smoothing=config.optim.label_smoothing,
        num_tokens=num_tokens,
        layers=layer_pairs(section.layers, config.model.num_layers, num_layers),
        hidden_weight=section.hidden_weight,
        hidden_kind=section.hidden_kind,
    )
    return lambda step: functools.partial(options, weight=divergence_weight(section, step, config.run.num_steps))


def layer_pairs(texts: Sequence[str], num_student_layers: int, num_teacher_layers: int) -> tuple[LayerPair, ...]:
    """Parses "student:teacher" numbers of layers.

    Raises:
        ConfigError: not such a pair, or no such layer.
    """
    pairs = []
    for text in texts:
        numbers = [int(part) if part.isdecimal() else -1 for part in text.split(":")]
        if len(numbers) != 2 or not (0 <= numbers[0] < num_student_layers and 0 <= numbers[1] < num_teacher_layers):
            raise ConfigError(
                f"distill.layers = {text!r}: expected STUDENT:TEACHER, layers 0 to {num_student_layers - 1} of the "
                f"student and 0 to {num_teacher_layers - 1} of the teacher"
            )
        pairs.append(LayerPair(*numbers))
    return tuple(pairs)


def divergence_weight(config: DistillSection, step: int, num_steps: int) -> float:
    """The share of the divergence in the loss of step `step`, from 0, of `num_steps`: a pure function of the step."""
    progress = min(1.0, step / max(1, num_steps - 1))
    passed = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
    return config.weight + (config.weight_end - config.weight) * passed[config.weight_schedule]


def distillation_loss(
    model: nn.Module,
    batch: Batch,
    routing: RoutingLog | None = None,
    *,
    teacher: Transformer | None,
    weight: float,
    num_tokens: int,
    kind: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    layers: Sequence[LayerPair] = (),
    hidden_weight: float = 1.0,
    hidden_kind: Literal["mse", "cosine"] = "mse",
    **loss_options: Unpack[LossOptions],
) -> Outcome:
    """The sum over targets of what the module's text says, and of its terms before they are weighted.

    The divergence is over the vocabulary's `num_tokens`: models may have embeddings beyond it. Without a teacher,
    batch.extra has its likeliest tokens at this temperature, as `teacher_targets.cached_teacher` adds them. The options
    are the cross-entropy's; the soft cap is the student's everywhere.
    """
    options = {"kind": kind, "temperature": temperature, "beta": beta, "soft_cap": loss_options.get("soft_cap")}
    teacher_states: dict[int, Tensor] = {}
    if teacher is None:
        of_teacher = batch.extra["teacher_ids"], batch.extra["teacher_log_probs"]
        divergence_sum = functools.partial(linear_divergence_topk_sum, **options)
    else:
        hidden_BTE, teacher_states = _read(teacher, batch, [pair.teacher for pair in layers])
        of_teacher = hidden_BTE, first_rows(teacher.head.weight, num_tokens)
        caps = {"teacher_soft_cap": teacher.config.logit_softcap}
        divergence_sum = functools.partial(linear_divergence_sum, **options, **caps)

    def both(hidden_BTD: Tensor, head_VD: Tensor) -> Tensor:
        with _gradients_if(weight > 0):
            divergence = divergence_sum(hidden_BTD, first_rows(head_VD, num_tokens), *of_teacher, batch.targets)
        with _gradients_if(weight < 1):
            cross_entropy = linear_cross_entropy_sum(hidden_BTD, head_VD, batch.targets, **loss_options)
        return torch.stack([divergence, cross_entropy])

    with _kept_states(model, [pair.student for pair in layers]) as states:
        divergence, cross_entropy = model(batch.tokens, batch.boundaries, routing=routing, readout=both)
    loss_sum = weight * divergence + (1 - weight) * cross_entropy
    sums = {"divergence": divergence.detach(), "cross_entropy": cross_entropy.detach()}
    if layers:
        distances = [
            hidden_distance_sum(states[pair.student], teacher_states[pair.teacher], batch.targets, hidden_kind)
            for pair in layers
        ]
        hidden = torch.stack(distances).mean()
        loss_sum, sums["hidden"] = loss_sum + hidden_weight * hidden, hidden.detach()
    return Outcome(loss_sum, sums)


def hidden_distance_sum(
    student_BTD: Tensor, teacher_BTE: Tensor, targets_BT: Tensor, kind: Literal["mse", "cosine"]
) -> Tensor:
    """Sums over targets the distance of hidden states: mean square of the difference, or 1 - cosine.

    Of different widths, the wider one is projected onto the other's by a fixed random matrix of orthonormal columns,
    which keeps mean squares and angles on average: a learned one would be weights of a run that no model has.
    """
    dtype = sum_dtype(student_BTD)
    a, b = student_BTD.to(dtype), teacher_BTE.to(dtype)
    widths = a.shape[-1], b.shape[-1]
    if widths[0] != widths[1]:
        projection = _projection(max(widths), min(widths), a.device, dtype)
        a, b = (x if x.shape[-1] == min(widths) else x @ projection for x in (a, b))
    distance_BT = (a - b).square().mean(-1) if kind == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
    return distance_BT.masked_fill(targets_BT == IGNORE, 0.0).sum()


@functools.cache
def _projection(wide: int, narrow: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Drawn on the CPU, so that every rank has the same, and a run the same again.
    generator = torch.Generator().manual_seed(_PROJECTION_SEED)
    orthonormal, _ = torch.linalg.qr(torch.randn(wide, narrow, generator=generator, dtype=torch.float64))
    return orthonormal.to(device, dtype)


@torch.no_grad()
def _read(teacher: Transformer, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """What the teacher's head reads, and its states after some layers."""
    with _kept_states(teacher, layers) as states:
        hidden_BTE = teacher(batch.tokens, batch.boundaries, readout=lambda hidden_BTE, _: hidden_BTE)
    return hidden_BTE, states


@contextlib.contextmanager
def _kept_states(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keeps the residual stream (B, T, D) after some layers of the forward inside, by layer."""
    states: dict[int, Tensor] = {}

    def keep(layer: int, _block: nn.Module, _inputs: object, output: tuple[Tensor, Tensor | None, object]) -> None:
        stream_BTD, addend_BTD, _ = output
        states[layer] = stream_BTD if addend_BTD is None else stream_BTD + addend_BTD

    hooks = [
        model.get_submodule(f"blocks.{layer}").register_forward_hook(functools.partial(keep, layer)) for layer in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def first_rows(head_VD: Tensor, num_rows: int) -> Tensor:
    """The rows of the vocabulary's tokens, without those that only fill a model's head up."""
    return head_VD if len(head_VD) == num_rows else head_VD[:num_rows]


def _gradients_if(is_used: bool) -> torch.set_grad_enabled:
    """What has no weight is measured, but costs no backward."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and is_used)

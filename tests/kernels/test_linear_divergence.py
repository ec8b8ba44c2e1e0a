import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import deterministic
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.cross_entropy import IGNORE
from kernels.linear_divergence import (
    linear_divergence_sum,
    linear_divergence_sum_reference,
    linear_divergence_topk_sum,
    linear_divergence_topk_sum_reference,
    linear_top_log_probs,
)
from tests.kernels.accuracy import DEVICES, assert_as_accurate
from tests.kernels.test_linear_cross_entropy import peak_bytes

KINDS = ["forward", "reverse", "jensen_shannon"]
TEACHERS = ["whole", "topk"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.5},
    {"soft_cap": 3.0},
    {"temperature": 0.7, "soft_cap": 4.0, "beta": 0.2},
]

on_each_device = pytest.mark.parametrize("device", DEVICES)
of_each_kind = pytest.mark.parametrize("kind", KINDS)
with_each_teacher = pytest.mark.parametrize("teacher", TEACHERS)
with_each_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")


def random_case(
    num_rows: int,
    vocab_size: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    teacher_width: int = 6,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of a student, both trained, and of a teacher; targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    hidden, head = drawn(num_rows, width), 3 * drawn(vocab_size, width) / width**0.5
    teacher_hidden, teacher_head = drawn(num_rows, teacher_width), 2 * drawn(vocab_size, teacher_width)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    targets[torch.rand(num_rows, generator=generator) < 0.3] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, targets.to(device)


def found_and_expected(teacher: str, case: tuple[Tensor, ...], chunk_rows: int | None, **options) -> list[Tensor]:
    """The sum by chunks and by the reference, of a whole teacher or of one known by its four likeliest tokens."""
    hidden, head, teacher_hidden, teacher_head, targets = case
    if teacher == "whole":
        found = linear_divergence_sum(*case, chunk_rows=chunk_rows, **options)
        return [found, linear_divergence_sum_reference(*case, **options)]
    top = linear_top_log_probs(teacher_hidden, teacher_head, 4, temperature=options.get("temperature", 1.0))
    found = linear_divergence_topk_sum(hidden, head, *top, targets, chunk_rows=chunk_rows, **options)
    return [found, linear_divergence_topk_sum_reference(hidden, head, *top, targets, **options)]


@on_each_device
@of_each_kind
@with_each_teacher
@given(
    num_rows=st.integers(0, 9),
    vocab_size=st.integers(5, 40),
    width=st.integers(1, 20),
    chunk_rows=st.one_of(st.none(), st.integers(1, 12)),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1000),
)
def test_any_shape_in_any_chunks_equals_whole_logits(
    device, kind, teacher, num_rows, vocab_size, width, chunk_rows, options, seed
):
    case = random_case(num_rows, vocab_size, width, torch.float64, device, seed)
    found, expected = found_and_expected(teacher, case, chunk_rows, kind=kind, **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    expected_gradients = torch.autograd.grad(expected, case[:2])
    torch.testing.assert_close(torch.autograd.grad(found, case[:2]), expected_gradients, rtol=1e-10, atol=1e-11)


@on_each_device
@of_each_kind
@with_each_teacher
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_and_its_gradients_are_as_accurate_as_eager_torch(dtype, teacher, kind, device):
    case = random_case(11, 40, 24, dtype, device)
    true_case = *(operand.detach().cpu().double().requires_grad_() for operand in case[:4]), case[4].cpu()
    options = {"kind": kind, "temperature": 1.5}
    found, eager = found_and_expected(teacher, case, 4, **options)
    if teacher == "whole":
        truth = linear_divergence_sum_reference(*true_case, **options)
    else:
        top = linear_top_log_probs(*case[2:4], 4, temperature=1.5)
        top = [part.cpu() for part in top]
        truth = linear_divergence_topk_sum_reference(*true_case[:2], *top, true_case[4], **options)
    assert_as_accurate(found.cpu(), eager.cpu(), truth)
    results = (torch.autograd.grad(total / 7, operands[:2]) for total, operands in
               ((found, case), (eager, case), (truth, true_case)))  # fmt: skip
    for parts in zip(*results, strict=True):
        assert_as_accurate(*(part.cpu() for part in parts), factor=4)


@on_each_device
@of_each_kind
@with_each_teacher
@with_each_option
def test_gradients_are_right(options, teacher, kind, device):
    hidden, head, *rest = random_case(4, 6, 3, torch.float64, device)

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        # A backward can run once; checkpoint computes the forward again before each.
        once = checkpoint(
            lambda *operands: found_and_expected(teacher, (*operands, *rest), 2, kind=kind, **options)[0],
            hidden,
            head,
            use_reentrant=False,
        )
        assert isinstance(once, Tensor)
        return once

    assert torch.autograd.gradcheck(total, (hidden, head), fast_mode=True)


@of_each_kind
def test_the_sum_is_what_kl_div_says_and_jensen_shannon_tends_to_both(kind):
    hidden, head, teacher_hidden, teacher_head, targets = case = random_case(9, 30, 8)
    for operand in (head, teacher_head):
        operand.data.div_(4)  # the less p / q, the nearer the limits
    log_q = (hidden @ head.T).log_softmax(-1)[targets != IGNORE]
    log_p = (teacher_hidden @ teacher_head.T).log_softmax(-1)[targets != IGNORE]
    forward = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    reverse = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if kind != "jensen_shannon":
        expected = forward if kind == "forward" else reverse
        torch.testing.assert_close(linear_divergence_sum(*case, kind=kind), expected)
        return
    for beta, limit in ((1e-7, forward), (1 - 1e-7, reverse)):
        found = linear_divergence_sum(*case, kind=kind, beta=beta)
        torch.testing.assert_close(found / (beta * (1 - beta)), limit, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_trl_computes_the_same_divergence_and_gradient(kind, temperature):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gkd = pytest.importorskip("trl.experimental.gkd", reason="TRL is an oracle, not a requirement")
    *_, targets = case = random_case(9, 30, 8)
    hidden, head, teacher_hidden, teacher_head, _ = case
    # TRL's beta of 0 and 1 stands for the two Kullback-Leibler divergences; it has no factor temperature^2.
    beta = 0.3
    trl_beta = {"forward": 0.0, "reverse": 1.0, "jensen_shannon": beta}[kind]
    theirs = temperature**2 * gkd.GKDTrainer.generalized_jsd_loss(
        hidden @ head.T,
        teacher_hidden @ teacher_head.T,
        targets,
        beta=trl_beta,
        temperature=temperature,
        reduction="sum",
    )
    ours = linear_divergence_sum(*case, kind=kind, temperature=temperature, beta=beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for found, expected in zip(
        torch.autograd.grad(ours, (hidden, head)), torch.autograd.grad(theirs, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@on_each_device
@of_each_kind
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(temperature, kind, device):
    hidden, head, *_, targets = random_case(9, 30, 8, torch.float32, device)
    options = {"kind": kind, "temperature": temperature, "chunk_rows": 4}
    whole = linear_divergence_sum(hidden, head, hidden, head, targets, **options)
    top = linear_top_log_probs(hidden, head, 5, temperature=temperature)
    for total in (whole, linear_divergence_topk_sum(hidden, head, *top, targets, **options)):
        assert abs(total.item()) < 1e-5
        assert all(gradient.abs().max() < 1e-5 for gradient in torch.autograd.grad(total, (hidden, head)))


@of_each_kind
@given(num_kept=st.integers(1, 38), seed=st.integers(0, 1000))
def test_more_of_the_teachers_tokens_never_make_the_divergence_smaller(kind, num_kept, seed):
    hidden, head, teacher_hidden, teacher_head, targets = case = random_case(5, 40, 6, seed=seed)
    sums = [
        linear_divergence_topk_sum(
            hidden, head, *linear_top_log_probs(teacher_hidden, teacher_head, kept), targets, kind=kind
        ).item()
        for kept in (num_kept, num_kept + 1, 39)
    ]
    assert sums[0] <= sums[1] + 1e-9
    assert sums[2] == pytest.approx(linear_divergence_sum(*case, kind=kind).item(), abs=1e-9)


def test_top_log_probs_are_those_of_the_likeliest_tokens_and_of_all_others():
    *_, teacher_hidden, teacher_head, _ = random_case(7, 20, 3)
    probs = (5 * torch.tanh(teacher_hidden @ teacher_head.T / 5) / 2).softmax(-1)
    options = {"temperature": 2.0, "soft_cap": 5.0, "chunk_rows": 3}
    ids, log_probs = linear_top_log_probs(teacher_hidden.view(7, 1, -1), teacher_head, 4, **options)
    assert ids.shape == (7, 1, 4)
    assert log_probs.shape == (7, 1, 5)
    for row, row_ids, row_log_probs in zip(probs, ids[:, 0], log_probs[:, 0], strict=True):
        assert row_ids.tolist() == sorted(range(20), key=lambda i: -row[i].item())[:4]
        torch.testing.assert_close(row_log_probs[:4].exp(), row[row_ids])
        torch.testing.assert_close(row_log_probs[4].exp(), 1 - row[row_ids].sum())


@on_each_device
@of_each_kind
def test_rounded_teachers_lose_nothing_but_their_rounding(kind, device):
    hidden, head, teacher_hidden, teacher_head, targets = random_case(40, 50, 8, torch.float64, device)
    ids, log_probs = linear_top_log_probs(teacher_hidden, teacher_head, 8)
    exact = linear_divergence_topk_sum(hidden, head, ids, log_probs, targets, kind=kind)
    rounded = linear_divergence_topk_sum(hidden, head, ids.int(), log_probs.half(), targets, kind=kind)
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=0)
    same = linear_top_log_probs(hidden, head, 8)
    itself = linear_divergence_topk_sum(hidden, head, same[0], same[1].half(), targets, kind=kind)
    assert 0 <= itself.item() < 1e-4


@on_each_device
@with_each_teacher
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_operand_gets_no_gradient_and_costs_none(frozen, teacher, device):
    hidden, head, *_ = case = random_case(7, 11, 8, torch.float64, device)
    trained = head if frozen == "hidden" else hidden
    expected = torch.autograd.grad(found_and_expected(teacher, case, 3)[1], trained)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(found_and_expected(teacher, case, 3)[0], trained), expected)
    with FlopCounterMode(display=False) as counter:
        if teacher == "whole":
            linear_divergence_sum(*case)
        else:
            ids, log_probs = torch.zeros(7, 1, dtype=torch.int64, device=device), torch.zeros(7, 2, device=device)
            linear_divergence_topk_sum(hidden, head, ids, log_probs, case[4])
    assert counter.get_total_flops() == 4 * 7 * 11 * 8 + (2 * 7 * 11 * 6 if teacher == "whole" else 0)


@on_each_device
def test_without_gradients_nothing_but_the_sum_is_kept(device):
    case = random_case(7, 11, 8, torch.float64, device)
    with torch.no_grad():
        total = linear_divergence_sum(*case, chunk_rows=3)
    assert not total.requires_grad
    torch.testing.assert_close(total, linear_divergence_sum_reference(*case).detach())


@on_each_device
@with_each_teacher
def test_rows_that_are_ignored_may_hold_anything(teacher, device):
    case = random_case(8, 9, 5, torch.float64, device)
    case[4][:4] = IGNORE
    for operand in (case[0], case[2]):
        operand.data[:2] = torch.inf
    total = found_and_expected(teacher, case, 3)[0]
    kept = (*(operand[4:] if operand.shape[0] == 8 else operand for operand in case),)
    expected = found_and_expected(teacher, kept, None)[0]
    torch.testing.assert_close(total, expected)
    d_hidden, _ = torch.autograd.grad(total, case[:2])
    assert not d_hidden[:4].any()


@on_each_device
@with_each_teacher
@pytest.mark.parametrize("num_rows", [0, 7])
def test_every_output_element_is_written(num_rows, teacher, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else CUDA's matrix products refuse to be deterministic
    case = random_case(num_rows, 9, 5, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        total = found_and_expected(teacher, case, 3)[0]
        results = total, *torch.autograd.grad(total, case[:2])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


@on_each_device
@with_each_teacher
def test_the_operator_keeps_torchs_contract(teacher, device):
    hidden, head, teacher_hidden, teacher_head, targets = random_case(5, 9, 4, torch.float32, device)
    is_topk = teacher == "topk"
    of_teacher = linear_top_log_probs(teacher_hidden, teacher_head, 3) if is_topk else (teacher_hidden, teacher_head)
    for with_gradients in ((True, True), (False, True), (False, False)):
        hidden.requires_grad_(with_gradients[0])
        head.requires_grad_(with_gradients[1])
        arguments = (hidden, head, targets, *of_teacher, is_topk, "forward", 2.0, 0.5, None, None, 2, *with_gradients)
        torch.library.opcheck(torch.ops.bessemer.linear_divergence.default, arguments)


@on_each_device
def test_torch_compile_sees_one_graph_and_the_same_numbers(device):
    torch.compiler.reset()
    hidden, head, *rest = random_case(5, 9, 4, torch.float32, device)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_divergence_sum(hidden * 2, head, *rest, kind="jensen_shannon", chunk_rows=2) / 7

    found, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, head), loss(hidden, head)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(total, (hidden, head)) for total in (found, expected)]
    torch.testing.assert_close(*gradients)


@with_each_teacher
@of_each_kind
@pytest.mark.parametrize("chunk_rows", [4, 16])
def test_no_more_is_held_than_a_chunk_of_logits_and_the_gradients(chunk_rows, kind, teacher):
    num_rows, vocab_size, width = 64, 3_000, 4
    hidden, head, teacher_hidden, teacher_head, targets = random_case(num_rows, vocab_size, width, torch.float32)
    top = linear_top_log_probs(teacher_hidden, teacher_head, 5)

    def step() -> None:
        if teacher == "whole":
            operands = (hidden, head, teacher_hidden, teacher_head, targets)
            total = linear_divergence_sum(*operands, kind=kind, chunk_rows=chunk_rows)
        else:
            total = linear_divergence_topk_sum(hidden, head, *top, targets, kind=kind, chunk_rows=chunk_rows)
        torch.autograd.grad(total / 7, (hidden, head))

    # Then small change, like one divergence a row.
    bound = 4 * (6 * chunk_rows * vocab_size + hidden.numel() + head.numel()) + 8_192
    assert peak_bytes(step) <= bound
    if chunk_rows == 4:
        assert bound < 4 * num_rows * vocab_size  # less than one matrix of whole logits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sideways"}, "kind = 'sideways'; expected forward, reverse or jensen_shannon"),
        ({"temperature": 0.0}, "temperature = 0.0; expected a positive number"),
        ({"beta": 1.0}, "beta = 1.0; expected between 0 and 1"),
        ({"chunk_rows": 0}, "chunk_rows = 0; expected at least one row"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"linear_divergence_sum: {message}"):
        linear_divergence_sum(*random_case(3, 9, 4), **changes)


def test_operands_that_do_not_fit_are_refused():
    hidden, head, teacher_hidden, teacher_head, targets = random_case(3, 9, 4)
    with pytest.raises(ValueError, match=r"expected \(..., D\), \(V, D\) and \(...\)"):
        linear_divergence_sum(hidden, head[:, :3], teacher_hidden, teacher_head, targets)
    with pytest.raises(ValueError, match="hidden is torch.float64, head torch.float32; cast one to other"):
        linear_divergence_sum(hidden, head.float(), teacher_hidden, teacher_head, targets)
    with pytest.raises(ValueError, match=r"teacher_head \(8, 6\); expected \(3, 'E'\) and \(9, 'E'\)"):
        linear_divergence_sum(hidden, head, teacher_hidden, teacher_head[:8], targets)
    ids, log_probs = linear_top_log_probs(teacher_hidden, teacher_head, 4)
    with pytest.raises(ValueError, match=r"teacher_log_probs \(3, 4\); expected \(3, 'J'\) and \(3, 'J \+ 1'\)"):
        linear_divergence_topk_sum(hidden, head, ids, log_probs[:, :4], targets)
    with pytest.raises(ValueError, match="9 tokens of a vocabulary of 9; expected some, but not all"):
        linear_top_log_probs(teacher_hidden, teacher_head, 9)

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention as module
from kernels import launch
from kernels.attention import DocumentBoundaries, attention, attention_by, attention_reference, document_boundaries
from kernels.launch import KernelError

EOS = 0


def random_heads(
    batch_size: int, num_queries: int, num_keys: int, num_heads: int, num_kv_heads: int, head_size: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads)]
    q, k, v = (
        torch.randn(batch_size, length, heads, head_size, generator=generator, dtype=torch.float64)
        for length, heads in shapes
    )
    return q, k, v


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """One query, one head, one row at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    num_queries, num_keys = q.shape[1], k.shape[1]
    heads_per_group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for t in range(num_queries):
            last = num_keys - num_queries + t
            first = 0 if window is None else max(0, last - window + 1)
            seen = [
                s for s in range(first, last + 1) if document_ids is None or document_ids[b, s] == document_ids[b, t]
            ]
            for h in range(q.shape[2]):
                keys, values = k[b, seen, h // heads_per_group], v[b, seen, h // heads_per_group]
                scores = keys @ q[b, t, h] * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
                if soft_cap is not None:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                out[b, t, h] = torch.softmax(scores, dim=0) @ values
    return out


@given(
    batch_size=st.integers(1, 2),
    num_queries=st.integers(1, 7),
    num_cached=st.integers(0, 5),
    num_kv_heads=st.integers(1, 3),
    heads_per_group=st.integers(1, 3),
    head_size=st.sampled_from([2, 6, 8]),
    seed=st.integers(0, 99),
)
def test_output_is_a_softmax_over_the_tokens_before(
    batch_size, num_queries, num_cached, num_kv_heads, heads_per_group, head_size, seed
):
    num_heads = num_kv_heads * heads_per_group
    q, k, v = random_heads(batch_size, num_queries, num_queries + num_cached, num_heads, num_kv_heads, head_size, seed)
    torch.testing.assert_close(attention(q, k, v), naive(q, k, v), rtol=1e-12, atol=1e-12)


@given(
    num_queries=st.integers(1, 7),
    num_cached=st.integers(0, 5),
    heads_per_group=st.integers(1, 2),
    value_size=st.sampled_from([1, 4, 6, 9]),
    window=st.none() | st.integers(1, 14),
    scale=st.none() | st.sampled_from([0.1, 2.0]),
    soft_cap=st.none() | st.sampled_from([0.5, 30.0]),
    seed=st.integers(0, 99),
)
def test_windows_scales_soft_caps_and_widths_of_values_are_obeyed(
    num_queries, num_cached, heads_per_group, value_size, window, scale, soft_cap, seed
):
    q, k, v = random_heads(2, num_queries, num_queries + num_cached, 2 * heads_per_group, 2, 6, seed)
    v = random_heads(2, num_queries, num_queries + num_cached, 2, 2, value_size, seed + 1)[2]
    options = {"window": window, "scale": scale, "soft_cap": soft_cap}
    torch.testing.assert_close(attention(q, k, v, **options), naive(q, k, v, **options), rtol=1e-12, atol=1e-12)


@given(
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    window=st.integers(1, 12),
    soft_cap=st.none() | st.just(0.5),
)
def test_windows_end_where_documents_start(tokens, window, soft_cap):
    boundaries = document_boundaries(torch.tensor([tokens]), EOS)
    q, k, v = random_heads(1, len(tokens), len(tokens), 2, 1, 4)
    options = {"window": window, "soft_cap": soft_cap}
    found, expected = attention(q, k, v, boundaries, **options), naive(q, k, v, boundaries.ids_BT, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(tokens=st.lists(st.integers(0, 3), min_size=1, max_size=12), batch_size=st.integers(1, 2))
def test_packed_documents_attend_as_if_each_were_alone(tokens, batch_size):
    ids = torch.tensor([tokens, tokens[::-1]][:batch_size])
    boundaries = document_boundaries(ids, EOS)
    q, k, v = random_heads(batch_size, len(tokens), len(tokens), 2, 1, 4)
    packed = attention(q, k, v, boundaries)
    torch.testing.assert_close(packed, naive(q, k, v, boundaries.ids_BT), rtol=1e-12, atol=1e-12)
    starts = boundaries.cumulative_lengths.tolist()
    flat = [part.flatten(0, 1) for part in (q, k, v)]
    for start, end in itertools.pairwise(starts):
        alone = attention(*(part[None, start:end] for part in flat))
        torch.testing.assert_close(packed.flatten(0, 1)[start:end], alone[0], rtol=1e-12, atol=1e-12)


def test_a_document_starts_at_each_row_and_after_each_eos():
    boundaries = document_boundaries(torch.tensor([[5, 6, EOS, 7], [EOS, EOS, 8, 9]]), EOS)
    assert boundaries.cumulative_lengths.tolist() == [0, 3, 4, 5, 6, 8]
    ids = boundaries.ids_BT.tolist()
    assert ids[0][0] == ids[0][2] != ids[0][3]
    assert len({*ids[0], *ids[1]}) == 5
    assert boundaries.cumulative_lengths.dtype == boundaries.ids_BT.dtype == torch.int32


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=3))
def test_both_forms_of_boundaries_say_the_same(rows):
    boundaries = document_boundaries(torch.tensor(rows), EOS)
    _, counts = boundaries.ids_BT.flatten().unique_consecutive(return_counts=True)
    lengths = boundaries.cumulative_lengths.diff()
    assert counts.tolist() == lengths.tolist()
    assert lengths.sum() == 6 * len(rows)


def test_moving_boundaries_keeps_them():
    boundaries = document_boundaries(torch.tensor([[1, EOS, 2]]), EOS)
    moved = boundaries.to(torch.device("cpu"))
    assert torch.equal(moved.ids_BT, boundaries.ids_BT)
    assert torch.equal(moved.cumulative_lengths, boundaries.cumulative_lengths)


def test_gradients_are_right():
    q, k, v = (part.requires_grad_() for part in random_heads(1, 4, 4, 2, 1, 4))
    boundaries = document_boundaries(torch.tensor([[3, EOS, 4, 5]]), EOS)
    assert torch.autograd.gradcheck(lambda *parts: attention(*parts, boundaries), (q, k, v))
    options = {"window": 2, "scale": 0.3, "soft_cap": 0.5}
    assert torch.autograd.gradcheck(lambda *parts: attention(*parts, **options), (q, k, v))


@pytest.mark.parametrize("soft_cap", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_stays_near_fp64(dtype, soft_cap):
    q, k, v = random_heads(2, 50, 50, 4, 2, 16)
    lowered = [part.to(dtype) for part in (q, k, v)]
    truth = attention(*(part.double() for part in lowered), soft_cap=soft_cap)
    found = attention(*lowered, soft_cap=soft_cap)
    assert found.dtype == dtype
    error = (found.double() - truth).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "num_heads", "num_kv_heads"),
    [(3, 3, 4, 3), (4, 3, 2, 2)],
    ids=["heads that do not divide", "fewer keys than queries"],
)
def test_shapes_that_do_not_fit_are_refused(num_queries, num_keys, num_heads, num_kv_heads):
    q, k, v = random_heads(1, num_queries, num_keys, num_heads, num_kv_heads, 4)
    with pytest.raises(ValueError, match="at least as many keys as queries, and query heads a multiple"):
        attention(q, k, v)


def test_keys_and_values_of_different_shapes_are_refused():
    q, k, v = random_heads(1, 3, 3, 2, 2, 4)
    with pytest.raises(ValueError, match="expected k and v of one shape"):
        attention(q, k, v[:, :2])


@pytest.mark.parametrize("option", ["window", "soft_cap"])
def test_limits_that_are_not_positive_are_refused(option):
    q, k, v = random_heads(1, 3, 3, 2, 2, 4)
    with pytest.raises(ValueError, match=f"{option} = 0; expected a positive number"):
        attention(q, k, v, **{option: 0})


def test_boundaries_together_with_a_cache_are_refused():
    q, k, v = random_heads(1, 2, 3, 2, 2, 4)
    boundaries = document_boundaries(torch.tensor([[1, 2]]), EOS)
    with pytest.raises(ValueError, match="not for a cache"):
        attention(q, k, v, boundaries)


@pytest.mark.parametrize("choice", ["cudnn", "flash", "fa3"])
def test_a_cuda_kernel_on_a_cpu_is_refused(choice):
    with pytest.raises(KernelError, match=f'"{choice}" is for CUDA devices, this run is on the cpu'):
        attention_by(choice, torch.device("cpu")).__enter__()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(module._PACKAGES, "fa3", "flash_attn_of_nobody.interface")
    with pytest.raises(KernelError, match="needs the package flash_attn_of_nobody.interface"):
        attention_by("fa3", torch.device("cuda")).__enter__()


def stand_in(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """What FlashAttention computes of documents laid end to end."""
    ends = lengths.tolist()
    alone = [attention_reference(q[None, i:j], k[None, i:j], v[None, i:j])[0] for i, j in itertools.pairwise(ends)]
    return torch.cat(alone)


@torch.library.custom_op("test::by_document", mutates_args=())
def by_document(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The stand-in as an operator that the compiler sees as it sees torch's own."""
    return stand_in(q, k, v, lengths)


@by_document.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(q)


def test_documents_laid_end_to_end_are_one_graph_however_many_there_are(monkeypatch):
    def varlen(q, k, v, lengths_q, lengths_k, longest_q, longest_k, *, window_size, **_):
        assert (longest_q, longest_k, window_size) == (8, 8, (-1, 0))
        assert lengths_q is lengths_k
        return torch.ops.test.by_document(q, k, v, lengths_q)

    monkeypatch.setattr(module, "varlen_attn", varlen)
    graphs: list[int] = []

    def backend(graph, _inputs):
        graphs.append(1)
        return graph

    compiled = torch.compile(module._by_document, fullgraph=True, dynamic=False, backend=backend)
    q, k, v = random_heads(2, 8, 8, 4, 2, 4)
    for num_eos in (0, 1, 3, 5):
        tokens = torch.ones(2, 8, dtype=torch.int64)
        tokens[0, :num_eos] = EOS
        boundaries = document_boundaries(tokens, EOS).to(torch.device("cpu"))
        torch.testing.assert_close(compiled(q, k, v, boundaries), attention_reference(q, k, v, boundaries))
    assert len(graphs) == 1


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_documents", [True, False], ids=["documents", "whole rows"])
def test_a_flash_kernel_gets_window_scale_and_padded_values(window, with_documents, monkeypatch):
    def varlen(q, k, v, lengths_q, _lengths_k, longest_q, _longest_k, *, scale, window_size, **_):
        assert v.shape[-1] == k.shape[-1]  # all that the kernel can read
        assert lengths_q.dtype == torch.int32
        assert longest_q == 8
        ends = lengths_q.tolist()
        alone = [
            naive(*(part[None, i:j] for part in (q, k, v)), window=window and window_size[0] + 1, scale=scale)[0]
            for i, j in itertools.pairwise(ends)
        ]
        assert window_size == ((-1, 0) if window is None else (window - 1, 0))
        return torch.cat(alone)

    monkeypatch.setattr(module, "varlen_attn", varlen)
    q, k, _ = random_heads(2, 8, 8, 4, 2, 6)
    v = random_heads(2, 8, 8, 2, 2, 4, seed=1)[2]
    boundaries = document_boundaries(torch.tensor([[1, EOS, 1, 1, 1, 1, EOS, 1], [1] * 8]), EOS)
    given_boundaries = boundaries if with_documents else None
    found = module._by_document(q, k, v, given_boundaries, window=window, scale=0.7)
    expected = naive(q, k, v, boundaries.ids_BT if with_documents else None, window=window, scale=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ["auto", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("case", ["whole rows", "documents", "cache"])
@pytest.mark.parametrize(
    ("value_size", "options"),
    [(64, {}), (64, {"window": 9, "scale": 0.2}), (32, {}), (32, {"window": 9}), (64, {"soft_cap": 2.0})],
    ids=str,
)
def test_every_implementation_equals_the_reference(choice, case, value_size, options, monkeypatch):
    monkeypatch.setitem(launch._chosen, "attention", choice)
    num_queries = 5 if case == "cache" else 64
    q, k, v = random_heads(2, num_queries, 64, 4, 2, 64)
    q, k, v = (part.to("cuda").requires_grad_() for part in (q, k, v[..., :value_size].contiguous()))
    boundaries: DocumentBoundaries | None = None
    if case == "documents":
        tokens = torch.randint(0, 8, (2, 64), generator=torch.Generator().manual_seed(0))
        boundaries = document_boundaries(tokens, EOS).to(torch.device("cuda"))
    halves = tuple(part.detach().bfloat16().requires_grad_() for part in (q, k, v))
    expected = attention_reference(q, k, v, boundaries, **options)
    with attention_by(choice, torch.device("cuda")):
        found = attention(*halves, boundaries, **options)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(found)
    for one_found, one_expected in zip(
        torch.autograd.grad(found, halves, direction),
        torch.autograd.grad(expected, (q, k, v), direction.double()),
        strict=True,
    ):
        torch.testing.assert_close(one_found.double(), one_expected, rtol=3e-2, atol=3e-2)

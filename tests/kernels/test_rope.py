import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels import rope as rope_file
from kernels.rope import rope, rope_packed, rope_packed_reference, rope_reference, rope_tables
from tests.kernels.accuracy import DEVICES, assert_as_accurate, gradients

BASE = 10_000.0
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, T, H, G, K): padded heads, padded pairs, several tiles with a partial last one, one element of each.
SHAPES = [(2, 5, 4, 2, 8), (1, 3, 5, 3, 56), (1, 13, 8, 2, 64), (1, 1, 1, 1, 2)]

on_each_device = pytest.mark.parametrize("device", DEVICES)
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
in_each_layout = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Equation 34 of the paper, pair by pair."""
    half = x.shape[-1] // 2
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    y = torch.zeros_like(x)
    y[..., first] = x[..., first] * cos[:, None] - x[..., second] * sin[:, None]
    y[..., second] = x[..., second] * cos[:, None] + x[..., first] * sin[:, None]
    return y


def packed_formula(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, interleaved: bool):
    heads = qkv.reshape(*qkv.shape[:2], num_heads + 2 * num_kv_heads, 2 * cos.shape[1])
    rotated = formula(heads, cos, sin, interleaved)
    last_key = num_heads + num_kv_heads
    return rotated[:, :, :num_heads], rotated[:, :, num_heads:last_key], heads[:, :, last_key:]


def random_tables(length: int, head_size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """As the model makes them, far enough from zero for every angle to matter."""
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return rope_tables(torch.arange(length, device=device) + 77, head_size, BASE, table_dtype)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).requires_grad_()


def random_query_and_key(shape, dtype, device, seed: int = 0) -> tuple[Tensor, Tensor]:
    batch_size, length, num_heads, num_kv_heads, head_size = shape
    q = random_tensor((batch_size, length, num_heads, head_size), dtype, device, seed)
    return q, random_tensor((batch_size, length, num_kv_heads, head_size), dtype, device, seed + 1)


def random_packed(shape, dtype, device, seed: int = 0) -> Tensor:
    batch_size, length, num_heads, num_kv_heads, head_size = shape
    return random_tensor((batch_size, length, (num_heads + 2 * num_kv_heads) * head_size), dtype, device, seed)


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().cpu().double().requires_grad_(t.requires_grad) for t in tensors)


def check_all(inputs, found, eager, true_inputs, truth) -> None:
    all_gradients = gradients(found, inputs), gradients(eager, inputs), gradients(truth, true_inputs)
    for results in (*zip(found, eager, truth, strict=True), *zip(*all_gradients, strict=True)):
        assert_as_accurate(*(result.cpu() for result in results))


def check_against_fp64(shape, dtype, device, interleaved: bool, seed: int = 0) -> None:
    inputs = random_query_and_key(shape, dtype, device, seed)
    tables = random_tables(shape[1], shape[-1], dtype, device)
    true_inputs, true_tables = doubled(*inputs), doubled(*tables)
    found, eager = rope(*inputs, *tables, interleaved), rope_reference(*inputs, *tables, interleaved)
    truth = tuple(formula(x, *true_tables, interleaved) for x in true_inputs)
    check_all(inputs, found, eager, true_inputs, truth)


def check_packed_against_fp64(shape, dtype, device, interleaved: bool, seed: int = 0) -> None:
    qkv = random_packed(shape, dtype, device, seed)
    tables, heads = random_tables(shape[1], shape[-1], dtype, device), shape[2:4]
    (true_qkv,), true_tables = doubled(qkv), doubled(*tables)
    found, eager = (door(qkv, *tables, *heads, interleaved) for door in (rope_packed, rope_packed_reference))
    truth = packed_formula(true_qkv, *true_tables, *heads, interleaved)
    check_all((qkv,), found, eager, (true_qkv,), truth)
    assert torch.equal(found[2], eager[2])  # values are copied, not computed


def random_heads(batch_size: int, length: int, num_heads: int, head_size: int, seed: int = 0) -> Tensor:
    shape = (batch_size, length, num_heads, head_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotated(x: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    cos, sin = rope_tables(positions, x.shape[-1], BASE, torch.float64)
    return rope(x, x, cos, sin, interleaved)[0]


@in_each_layout
@given(length=st.integers(1, 9), half=st.integers(1, 20), start=st.integers(0, 5000), seed=st.integers(0, 99))
def test_a_rotation_keeps_every_length(interleaved, length, half, start, seed):
    x = random_heads(2, length, 3, 2 * half, seed)
    y = rotated(x, torch.arange(start, start + length), interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)


@in_each_layout
@given(distance=st.integers(0, 300), first=st.integers(0, 4000), second=st.integers(0, 4000), half=st.integers(1, 16))
def test_products_of_queries_and_keys_depend_on_their_distance_alone(interleaved, distance, first, second, half):
    q, k = random_heads(1, 1, 1, 2 * half, seed=1), random_heads(1, 1, 1, 2 * half, seed=2)

    def product(position: int) -> float:
        rotated_q = rotated(q, torch.tensor([position + distance]), interleaved)
        return (rotated_q * rotated(k, torch.tensor([position]), interleaved)).sum().item()

    assert product(first) == pytest.approx(product(second), abs=1e-10)


def test_position_zero_is_left_alone():
    x = random_heads(1, 1, 2, 8)
    assert torch.equal(rotated(x, torch.tensor([0])), x)


def test_the_opposite_position_rotates_back():
    x, positions = random_heads(2, 7, 3, 10), torch.arange(7) * 100
    torch.testing.assert_close(rotated(rotated(x, positions), -positions), x, rtol=1e-12, atol=1e-12)


@on_each_device
@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rotation_is_the_one_of_transformers(base, dtype, device):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    q, k = random_heads(2, 300, 4, 16, seed=1).to(dtype), random_heads(2, 300, 2, 16, seed=2).to(dtype)
    positions = torch.arange(300)
    cos, sin = LlamaRotaryEmbedding(config)(q.float(), positions[None])
    their_q, their_k = apply_rotary_pos_emb(q.transpose(1, 2).float(), k.transpose(1, 2).float(), cos, sin)
    tables = (table.to(device) for table in rope_tables(positions, 16, base))
    our_q, our_k = rope(q.to(device), k.to(device), *tables)
    assert our_q.dtype == our_k.dtype == dtype
    torch.testing.assert_close(our_q.cpu(), their_q.transpose(1, 2).to(dtype))
    torch.testing.assert_close(our_k.cpu(), their_k.transpose(1, 2).to(dtype))


@on_each_device
def test_interleaved_pairs_are_complex_numbers_that_are_multiplied(device):
    q, k = (x.detach() for x in random_query_and_key((2, 9, 3, 1, 10), torch.float64, device))
    cos, sin = random_tables(9, 10, torch.float64, device)
    turns = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, None, :]
    for found, x in zip(rope(q, k, cos, sin, interleaved=True), (q, k), strict=True):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        torch.testing.assert_close(found, torch.view_as_real(pairs * turns).flatten(-2))


@on_each_device
def test_the_layouts_differ_by_the_order_of_elements_alone(device):
    q, k = random_query_and_key((2, 4, 3, 1, 12), torch.float32, device)
    tables = random_tables(4, 12, torch.float32, device)
    order = torch.cat((torch.arange(0, 12, 2), torch.arange(1, 12, 2)))
    halves = rope(q[..., order], k[..., order], *tables)
    for found, interleaved in zip(halves, rope(q, k, *tables, interleaved=True), strict=True):
        torch.testing.assert_close(found, interleaved[..., order])


def test_tables_hold_the_angles_of_the_formula():
    cos, sin = rope_tables(torch.tensor([0, 3]), 4, 100.0, torch.float64)
    angles = torch.tensor([[0.0, 0.0], [3.0, 3.0 * 100.0 ** (-2 / 4)]], dtype=torch.float64)
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


@in_each_layout
def test_the_references_are_the_formula(interleaved):
    tables = random_tables(3, 8, torch.float64, "cpu")
    q, k = random_query_and_key((2, 3, 4, 2, 8), torch.float64, "cpu")
    for found, x in zip(rope_reference(q, k, *tables, interleaved), (q, k), strict=True):
        torch.testing.assert_close(found, formula(x, *tables, interleaved))
    qkv = random_packed((2, 3, 4, 2, 8), torch.float64, "cpu")
    expected = packed_formula(qkv, *tables, 4, 2, interleaved)
    torch.testing.assert_close(rope_packed_reference(qkv, *tables, 4, 2, interleaved), expected)


@on_each_device
@in_each_dtype
@in_each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_as_accurate_as_eager_torch(shape, interleaved, dtype, device):
    check_against_fp64(shape, dtype, device, interleaved)


@on_each_device
@in_each_dtype
@in_each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_splitting_while_rotating_is_as_accurate_as_eager_torch(shape, interleaved, dtype, device):
    check_packed_against_fp64(shape, dtype, device, interleaved)


@on_each_device
@given(
    batch_size=st.integers(0, 3),
    length=st.integers(0, 20),
    num_kv_heads=st.integers(1, 4),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    interleaved=st.booleans(),
    packed=st.booleans(),
)
def test_any_shape_is_as_accurate_as_eager_torch(
    device, batch_size, length, num_kv_heads, groups, half, interleaved, packed
):
    shape = (batch_size, length, groups * num_kv_heads, num_kv_heads, 2 * half)
    check = check_packed_against_fp64 if packed else check_against_fp64
    check(shape, torch.float32, device, interleaved, seed=length)


@on_each_device
def test_tables_wider_than_the_queries_are_not_rounded_before_the_rotation(device):
    q, k = random_query_and_key((1, 3, 2, 1, 6), torch.float32, device)
    cos, sin = random_tables(3, 6, torch.float64, device)
    for found, x in zip(rope(q, k, cos, sin), (q, k), strict=True):
        truth = formula(x.detach().cpu().double(), cos.cpu(), sin.cpu(), interleaved=False)
        torch.testing.assert_close(found.cpu(), truth.float(), rtol=1e-7, atol=0.0)


@on_each_device
@in_each_layout
def test_every_sequence_of_a_batch_starts_at_the_same_position(interleaved, device):
    qkv = random_packed((3, 11, 8, 2, 64), torch.float32, device)  # two tiles per sequence
    tables = random_tables(11, 64, torch.float32, device)
    together = rope_packed(qkv, *tables, 8, 2, interleaved)
    for sequence in range(3):
        alone = rope_packed(qkv[sequence : sequence + 1], *tables, 8, 2, interleaved)
        for found, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(found[sequence], expected[0])


@on_each_device
@in_each_layout
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 3:-5],
        lambda x: x[:, 1:-1],
        lambda x: x[::2],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x.transpose(0, 1),
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    ],
    ids=["inside wider rows", "inside longer rows", "every other", "repeated", "transposed", "every other element"],
)
def test_rows_may_lie_anywhere_in_memory(view, interleaved, device):
    wide = random_tensor((4, 7, 5 * 6 + 8), torch.float32, device).detach()
    x = view(wide)
    x = x[..., : 5 * 6]
    tables = random_tables(x.shape[1], 6, torch.float32, device)
    for found, expected in zip(
        rope_packed(x, *tables, 3, 1, interleaved), rope_packed(x.contiguous(), *tables, 3, 1, interleaved), strict=True
    ):
        torch.testing.assert_close(found, expected)
    q, k = x.unflatten(-1, (5, 6)).split((3, 2), dim=2)
    for found, expected in zip(
        rope(q, k, *tables, interleaved), rope(q.contiguous(), k.contiguous(), *tables, interleaved), strict=True
    ):
        torch.testing.assert_close(found, expected)


@on_each_device
@in_each_layout
def test_gradients_and_tables_may_lie_anywhere_in_memory(interleaved, device):
    qkv = random_packed((2, 4, 3, 1, 6), torch.float32, device)
    tables = random_tables(4, 6, torch.float32, device)
    across = tuple(table.T.contiguous().T for table in tables)
    outputs = rope_packed(qkv, *across, 3, 1, interleaved)
    for found, expected in zip(outputs, rope_packed(qkv, *tables, 3, 1, interleaved), strict=True):
        torch.testing.assert_close(found, expected)
    gradients_BTHK = [random_tensor(x.shape, torch.float32, device, seed).detach() for seed, x in enumerate(outputs)]
    (expected,) = torch.autograd.grad(outputs, qkv, gradients_BTHK, retain_graph=True)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in gradients_BTHK]
    wider = [torch.cat((x, x), dim=-1)[..., :6] for x in gradients_BTHK]
    for directions in (heads_first, wider):
        (found,) = torch.autograd.grad(outputs, qkv, directions, retain_graph=True)
        torch.testing.assert_close(found, expected)
    (of_sum,) = torch.autograd.grad(sum(x.sum() for x in outputs), qkv)  # gradients with all strides zero
    (of_ones,) = torch.autograd.grad(
        rope_packed(qkv, *tables, 3, 1, interleaved), qkv, [torch.ones_like(x) for x in outputs]
    )
    torch.testing.assert_close(of_sum, of_ones)


@on_each_device
@pytest.mark.parametrize("used", [0, 1, 2], ids=["queries", "keys", "values"])
def test_a_gradient_of_one_output_is_enough(used, device):
    qkv = random_packed((2, 3, 2, 1, 4), torch.float64, device)
    tables = random_tables(3, 4, torch.float64, device)
    found, expected = (
        torch.autograd.grad(door(qkv, *tables, 2, 1)[used].square().sum(), qkv)[0]
        for door in (rope_packed, rope_packed_reference)
    )
    torch.testing.assert_close(found, expected)
    q_and_k = random_query_and_key((2, 3, 2, 1, 4), torch.float64, device)
    index = min(used, 1)
    found, expected = (
        torch.autograd.grad(door(*q_and_k, *tables)[index].square().sum(), q_and_k[index])[0]
        for door in (rope, rope_reference)
    )
    torch.testing.assert_close(found, expected)


@on_each_device
@in_each_layout
def test_gradients_are_those_of_finite_differences(interleaved, device):
    shape = (1, 2, 1, 1, 4)
    q, k = random_query_and_key(shape, torch.float64, device)
    qkv, tables = random_packed(shape, torch.float64, device), random_tables(2, 4, torch.float64, device)
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, *tables, interleaved), (q, k), fast_mode=True)
    assert torch.autograd.gradcheck(lambda qkv: rope_packed(qkv, *tables, 1, 1, interleaved), (qkv,), fast_mode=True)


@on_each_device
@pytest.mark.parametrize("shape", [(0, 3, 2, 1, 4), (2, 0, 2, 1, 4)], ids=["no sequences", "no positions"])
def test_nothing_gives_nothing(shape, device):
    tables = random_tables(shape[1], shape[-1], torch.float32, device)
    q, k = random_query_and_key(shape, torch.float32, device)
    qkv = random_packed(shape, torch.float32, device)
    outputs = (*rope(q, k, *tables), *rope_packed(qkv, *tables, 2, 1))
    assert [x.shape[2] for x in outputs] == [2, 1, 2, 1, 1]
    assert not any(x.numel() for x in outputs)
    for gradient, x in zip(gradients(outputs, (q, k, qkv)), (q, k, qkv), strict=True):
        assert gradient.shape == x.shape


class CountedLaunches:
    """Stands in for the kernel and counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


class RecordedOperators(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@on_each_device
@pytest.mark.parametrize("packed", [False, True], ids=["rope", "rope_packed"])
def test_each_direction_is_one_launch_and_nothing_beside_it(packed, device, monkeypatch):
    shape = (2, 3, 4, 2, 8)
    q, k = random_query_and_key(shape, torch.float32, device)
    qkv, tables = random_packed(shape, torch.float32, device), random_tables(3, 8, torch.float32, device)
    launches = CountedLaunches(rope_file._rope_kernel)
    monkeypatch.setattr(rope_file, "_rope_kernel", launches)
    with RecordedOperators() as forward:
        outputs = rope_packed(qkv, *tables, 4, 2) if packed else rope(q, k, *tables)
    assert launches.count == 1
    directions = [torch.ones_like(x) for x in outputs]
    with RecordedOperators() as backward:
        torch.autograd.grad(outputs, (qkv,) if packed else (q, k), directions)
    assert launches.count == 2
    for operators in (forward, backward):
        assert sum(name.startswith("bessemer.rope") for name in operators.names) == 1
        assert not {"aten.cat.default", "aten.copy_.default", "aten.clone.default"}.intersection(operators.names)


@on_each_device
def test_the_packed_projection_is_not_kept_for_the_backward(device):
    qkv = random_packed((2, 3, 4, 2, 8), torch.float32, device) * 1
    memory = StorageWeakRef(qkv.untyped_storage())
    outputs = rope_packed(qkv, *random_tables(3, 8, torch.float32, device), 4, 2)
    del qkv
    gc.collect()  # the interpreter's closures hold its arguments in a cycle
    assert memory.expired()
    assert all(x.requires_grad and x.is_contiguous() for x in outputs)


@on_each_device
@in_each_layout
def test_every_output_element_is_written(interleaved, device):
    shape = (2, 9, 5, 3, 56)  # padded heads, padded pairs, a partial last tile
    q, k = random_query_and_key(shape, torch.float32, device)
    qkv, tables = random_packed(shape, torch.float32, device), random_tables(9, 56, torch.float32, device)
    torch.use_deterministic_algorithms(True)
    try:
        assert deterministic.fill_uninitialized_memory  # fresh memory is NaN now
        outputs = (*rope(q, k, *tables, interleaved), *rope_packed(qkv, *tables, 5, 3, interleaved))
        results = (*outputs, *gradients(outputs, (q, k, qkv)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(result.isnan().any() for result in results)


@on_each_device
@in_each_layout
def test_equal_inputs_give_equal_bits(interleaved, device):
    shape = (2, 9, 6, 3, 20)
    q, k = random_query_and_key(shape, torch.bfloat16, device)
    qkv, tables = random_packed(shape, torch.bfloat16, device), random_tables(9, 20, torch.float32, device)

    def run() -> tuple[Tensor, ...]:
        outputs = (*rope(q, k, *tables, interleaved), *rope_packed(qkv, *tables, 6, 3, interleaved))
        return (*outputs, *gradients(outputs, (q, k, qkv)))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


@on_each_device
@in_each_layout
def test_the_operators_keep_torchs_contract(interleaved, device):
    shape = (2, 3, 2, 1, 4)
    q, k = random_query_and_key(shape, torch.float32, device)
    qkv, tables = random_packed(shape, torch.float32, device), random_tables(3, 4, torch.float32, device)
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.bessemer.rope.default, (q, k, *tables, interleaved, inverse))
    torch.library.opcheck(torch.ops.bessemer.rope_packed.default, (qkv, *tables, 2, 1, interleaved))
    parts = (q.detach(), k.detach(), k.detach())
    torch.library.opcheck(torch.ops.bessemer.rope_packed_backward.default, (*parts, *tables, interleaved))


@on_each_device
@in_each_layout
def test_torch_compile_sees_one_graph_and_the_same_numbers(interleaved, device):
    qkv = random_packed((2, 5, 4, 2, 6), torch.float32, device)
    tables = random_tables(5, 6, torch.float32, device)

    def block(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k, v = rope_packed(qkv * 2, cos, sin, 4, 2, interleaved)
        return *rope(q + 1, k, cos, sin, interleaved), v

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found, expected = compiled(qkv, *tables), block(qkv, *tables)
    for one_found, one_expected in zip(found, expected, strict=True):
        torch.testing.assert_close(one_found, one_expected)
    torch.testing.assert_close(gradients(found, (qkv,)), gradients(expected, (qkv,)))


def test_without_cuda_or_interpreter_the_doors_run_the_references(monkeypatch):
    monkeypatch.setattr("kernels.launch.INTERPRETED", False)
    monkeypatch.setattr(rope_file, "_rope_kernel", None)
    shape = (2, 3, 4, 2, 8)
    q, k = random_query_and_key(shape, torch.float32, "cpu")
    qkv, tables = random_packed(shape, torch.float32, "cpu"), random_tables(3, 8, torch.float32, "cpu")
    for found, expected in zip(rope(q, k, *tables), rope_reference(q, k, *tables), strict=True):
        assert torch.equal(found, expected)
    expected_parts = rope_packed_reference(qkv, *tables, 4, 2)
    for found, expected in zip(rope_packed(qkv, *tables, 4, 2), expected_parts, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("length", "half"), [(4, 4), (5, 3)], ids=["too few positions", "another head size"])
def test_tables_of_another_shape_are_refused(length, half):
    q = random_heads(1, 5, 2, 8)
    table = torch.ones(length, half)
    with pytest.raises(ValueError, match=r"tables \(T, K/2\) = \(5, 4\)"):
        rope(q, q, table, table)


def test_keys_of_another_length_are_refused():
    q, k = random_heads(1, 5, 2, 8), random_heads(1, 4, 2, 8)
    table = torch.ones(5, 4)
    with pytest.raises(ValueError, match="rope: tables"):
        rope(q, k, table, table)


@pytest.mark.parametrize(
    "k",
    [torch.ones(2, 5, 2, 8), torch.ones(1, 5, 2, 6), torch.ones(1, 5, 2, 8, dtype=torch.bfloat16)],
    ids=["another batch", "another head size", "another dtype"],
)
def test_keys_unlike_the_queries_are_refused(k):
    table = torch.ones(5, 4)
    with pytest.raises(ValueError, match="expected them to differ in their number of heads alone"):
        rope(torch.ones(1, 5, 4, 8), k, table, table)


def test_heads_of_odd_size_are_refused():
    q, table = torch.ones(1, 5, 2, 7), torch.ones(5, 3)
    with pytest.raises(ValueError, match="expected K even"):
        rope(q, q, table, table)
    with pytest.raises(ValueError, match="heads of an even K"):
        rope_packed(torch.ones(1, 5, 4 * 7), table, table, 2, 1)


@pytest.mark.parametrize(
    ("width", "length", "half"),
    [(33, 5, 4), (32, 4, 4), (32, 5, 3)],
    ids=["not whole heads", "too few positions", "another head size"],
)
def test_a_packed_projection_unlike_its_heads_or_tables_is_refused(width, length, half):
    table = torch.ones(length, half)
    with pytest.raises(ValueError, match=r"2 \+ 2 \* 1 heads of an even K, and tables \(T, K/2\) = \(5, 4\)"):
        rope_packed(torch.ones(1, 5, width), table, table, 2, 1)

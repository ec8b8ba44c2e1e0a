import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention import document_boundaries
from kernels.cross_entropy import IGNORE
from model.batch import as_unsigned, collate, empty_rows, token_rows

CPU = torch.device("cpu")


@given(
    data=st.data(),
    num_rows=st.integers(1, 4),
    length=st.integers(1, 9),
    token_bytes=st.sampled_from([2, 4]),
    isolate_documents=st.booleans(),
)
def test_narrow_rows_become_the_tokens_and_targets_that_they_hold(
    data: st.DataObject, num_rows: int, length: int, token_bytes: int, isolate_documents: bool
):
    eos_id = data.draw(st.sampled_from([0, 2**15, 2**16 - 1]))
    ids = st.one_of(st.just(eos_id), st.integers(0, 2**16 - 1 if token_bytes == 2 else 2**31 - 1))
    values = np.array(data.draw(st.lists(ids, min_size=num_rows * (length + 1), max_size=num_rows * (length + 1))))
    values = values.reshape(num_rows, length + 1)
    row_targets = data.draw(st.lists(st.integers(0, length), min_size=num_rows, max_size=num_rows))
    narrow = empty_rows(num_rows, length, token_bytes)
    as_unsigned(narrow)[:] = values
    rows = token_rows(narrow, row_targets, eos_id=eos_id, isolate_documents=isolate_documents)
    batch = rows.to(CPU)
    assert batch.tokens.tolist() == values[:, :-1].tolist()
    for targets, row, num_targets in zip(batch.targets.tolist(), values.tolist(), row_targets, strict=True):
        assert targets == row[1 : 1 + num_targets] + [IGNORE] * (length - num_targets)
    assert batch.num_targets == rows.num_targets == sum(row_targets)
    for tensor in (batch.tokens, batch.targets):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    if isolate_documents:
        expected = document_boundaries(batch.tokens, eos_id)
        assert batch.boundaries is not None
        assert torch.equal(batch.boundaries.ids_BT, expected.ids_BT)
        assert torch.equal(batch.boundaries.cumulative_lengths, expected.cumulative_lengths)
    else:
        assert batch.boundaries is None


def test_a_short_sample_is_eos_with_ignored_targets_behind_its_end():
    rows = collate([np.array([5, 6, 7], dtype=np.uint16), np.arange(5, dtype=np.uint16)], 4, eos_id=9)
    batch = rows.to(CPU)
    assert batch.tokens.tolist() == [[5, 6, 7, 9], [0, 1, 2, 3]]
    assert batch.targets.tolist() == [[6, 7, IGNORE, IGNORE], [1, 2, 3, 4]]
    assert batch.num_targets == 6


def test_widening_leaves_the_rows_as_they_were():
    narrow = torch.tensor([[-1, 5, -2]], dtype=torch.int16)
    rows = token_rows(narrow, [1], eos_id=0, isolate_documents=False)
    assert rows.to(CPU).tokens.tolist() == [[65_535, 5]]
    assert rows.to(CPU).targets.tolist() == [[5, IGNORE]]
    assert narrow.tolist() == [[-1, 5, -2]]


@pytest.mark.gpu
def test_pinned_rows_reach_the_device_whole():
    narrow = empty_rows(3, 8, 2, pin_memory=True)
    as_unsigned(narrow)[:] = np.arange(27).reshape(3, 9) * 2_000
    rows = token_rows(narrow, [8, 3, 0], eos_id=40_000, isolate_documents=True)
    found, expected = rows.to(torch.device("cuda")), rows.to(CPU)
    assert torch.equal(found.tokens.cpu(), expected.tokens)
    assert torch.equal(found.targets.cpu(), expected.targets)
    assert found.boundaries is not None
    assert expected.boundaries is not None
    assert torch.equal(found.boundaries.ids_BT.cpu(), expected.boundaries.ids_BT)

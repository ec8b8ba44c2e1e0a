import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.manifest import read_manifest
from kernels.cross_entropy import IGNORE
from model.batch import collate
from resume.manifest import DataError, open_split
from resume.order import Order
from resume.samples import SampleReader
from tests.prepared import write_data
from train.loader import Loader, rank_positions


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    folder: Path = write_data(tmp_path_factory.mktemp("data") / "data")
    return Order(open_split(folder, read_manifest(folder), "train"), seed=1, sequence_length=32)


def make_loader(order: Order, start: int = 0, vocab_size: int = 300, **options) -> Loader:
    reader = SampleReader(order.files, sequence_length=32, vocab_size=vocab_size)
    positions = rank_positions(start, batch_sequences=6, micro_batch=3, rank=0, world_size=1)
    return Loader(order, reader, positions, eos_id=0, **options)


def test_batches_hold_the_samples_of_their_positions_also_across_epochs(order: Order):
    num_batches = 3 * order.samples_per_epoch // 3 + 5  # into the fourth epoch
    reader = SampleReader(order.files, sequence_length=32, vocab_size=300)
    with make_loader(order) as loader:
        for i in range(num_batches):
            batch = next(loader)
            files, samples = order.resolve(np.arange(3 * i, 3 * i + 3))
            rows = [reader.read(f, s) for f, s in zip(files.tolist(), samples.tolist(), strict=True)]
            expected = collate(rows, 32, 0)
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.targets, expected.targets)
            assert batch.num_targets == expected.num_targets
    reader.close()


def test_a_loader_started_later_continues_the_same_sequence(order: Order):
    with make_loader(order) as whole, make_loader(order, start=6) as rest:
        for _ in range(2):
            next(whole)
        for _ in range(20):
            assert torch.equal(next(whole).tokens, next(rest).tokens)


def test_a_short_sample_is_eos_with_ignored_targets_behind_its_end():
    batch = collate([np.array([5, 6, 7], dtype=np.uint16), np.arange(5, dtype=np.uint16)], 4, eos_id=9)
    assert batch.tokens.tolist() == [[5, 6, 9, 9], [0, 1, 2, 3]]
    assert batch.targets.tolist() == [[6, 7, IGNORE, IGNORE], [1, 2, 3, 4]]
    assert batch.num_targets == 6


def test_documents_are_marked_when_they_are_to_be_isolated(order: Order):
    with make_loader(order, isolate_documents=True) as loader:
        batch = next(loader)
    assert batch.boundaries is not None
    assert batch.boundaries.ids_BT.shape == batch.tokens.shape


def test_what_the_reading_thread_finds_is_raised_where_the_batch_is_asked_for(order: Order):
    with make_loader(order, vocab_size=5) as loader, pytest.raises(DataError, match="vocab_size is 5"):
        next(loader)


def test_the_thread_ends_with_the_context_also_when_nobody_reads(order: Order):
    before = threading.active_count()
    with make_loader(order, micro_batches_ahead=1):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_prep.checksums import write_checksums
from data_prep.manifest import read_manifest
from data_prep.shards import HEADER_BYTES, open_tokens
from kernels.cross_entropy import IGNORE
from resume.manifest import DataError, DataFile
from resume.samples import BadSampleError, SampleReader
from resume.verify import open_split
from tests.prepared import write_data
from train import loader as loader_module
from train.loader import Loader, MicroBatch, rank_positions

LENGTH = 32
CPU = torch.device("cpu")


class Strided:
    """An order of all samples, again and again, that jumps between files."""

    def __init__(self, files: Sequence[DataFile]):
        self.files = list(files)
        self.samples = [(f, i) for f, file in enumerate(files) for i in range(file.num_samples(LENGTH))]

    def resolve(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        chosen = [self.samples[position * 7 % len(self.samples)] for position in positions.tolist()]
        files, samples = np.array(chosen, dtype=np.int64).reshape(-1, 2).T
        return files, samples


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Strided:
    folder = write_data(tmp_path_factory.mktemp("data") / "data")
    return Strided(open_split({folder: read_manifest(folder)}, "train"))


def make_loader(
    order: Strided,
    positions: Iterator[NDArray[np.int64]] | None = None,
    micro_batch: int = 3,
    vocab_size: int = 300,
    bad_sample: str = "stop",
    **options,
) -> Loader:
    reader = SampleReader(
        order.files,
        sequence_length=LENGTH,
        vocab_size=vocab_size,
        eos_id=0,
        on_bad_sample=bad_sample,  # pyright: ignore[reportArgumentType]
    )
    endless = rank_positions(0, batch_sequences=6, micro_batch=3, rank=0, world_size=1)
    return Loader(order, reader, positions or endless, micro_batch=micro_batch, **options)  # pyright: ignore[reportArgumentType]


def expected_targets(order: Strided, position: int) -> list[int]:
    file, sample = order.samples[position * 7 % len(order.samples)]
    return open_tokens(order.files[file].path)[sample * LENGTH + 1 : sample * LENGTH + LENGTH + 1].tolist()


def check(order: Strided, micro_batch: MicroBatch, num_rows: int) -> None:
    """Rows, indices and counts of a micro-batch are those of its positions."""
    batch = micro_batch.to(CPU)
    assert batch.tokens.shape == batch.targets.shape == (num_rows, LENGTH)
    targets = [expected_targets(order, position) for position in micro_batch.positions.tolist()]
    targets += [[]] * (num_rows - len(targets))
    for row, expected in zip(batch.targets.tolist(), targets, strict=True):
        assert row == expected + [IGNORE] * (LENGTH - len(expected))
    assert micro_batch.num_targets == batch.num_targets == sum(map(len, targets))
    files, samples = order.resolve(micro_batch.positions)
    assert np.array_equal(micro_batch.files, files)
    assert np.array_equal(micro_batch.samples, samples)


def test_batches_hold_the_samples_of_their_positions_also_across_blocks(
    order: Strided, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader_module, "_BLOCK_POSITIONS", 40)
    monkeypatch.setattr(loader_module, "_PIECE_BYTES", 1_000)
    num_batches = len(order.samples) + 5  # every sample three times
    with make_loader(order) as loader:
        for i in range(num_batches):
            micro_batch = next(loader)
            assert micro_batch.positions.tolist() == [3 * i, 3 * i + 1, 3 * i + 2]
            check(order, micro_batch, num_rows=3)


@given(
    start=st.integers(0, 1_000),
    world_size=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    batch_sequences=st.integers(1, 20),
    num_positions=st.integers(0, 60),
)
def test_ranks_of_any_number_share_the_positions_of_each_step_up_to_the_end(
    start: int, world_size: int, micro_batch: int, batch_sequences: int, num_positions: int
):
    end = start + num_positions
    options = {"batch_sequences": batch_sequences, "micro_batch": micro_batch, "world_size": world_size, "end": end}
    shares = [list(rank_positions(start, rank=rank, **options)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    first = 0
    for t in range(start, end, batch_sequences):
        step_end = min(t + batch_sequences, end)
        per_rank = -(-(step_end - t) // (world_size * micro_batch))
        for a in range(per_rank):
            for rank in range(world_size):
                place = t + (a * world_size + rank) * micro_batch
                wanted = range(place, max(place, min(place + micro_batch, step_end)))
                assert shares[rank][first + a].tolist() == list(wanted)
        first += per_rank
    assert first == len(shares[0])


@given(
    world_size=st.integers(1, 3),
    micro_batch=st.integers(1, 4),
    batch_sequences=st.integers(1, 9),
    end=st.integers(0, 30),
    piece_bytes=st.integers(1, 2_000),
)
def test_every_micro_batch_has_the_same_shape_whatever_is_left_for_it(
    order: Strided, world_size: int, micro_batch: int, batch_sequences: int, end: int, piece_bytes: int
):
    options = {"batch_sequences": batch_sequences, "micro_batch": micro_batch, "world_size": world_size, "end": end}
    positions: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_PIECE_BYTES", piece_bytes)
        for rank in range(world_size):
            with make_loader(order, rank_positions(0, rank=rank, **options), micro_batch) as loader:
                for item in loader:
                    check(order, item, micro_batch)
                    positions += item.positions.tolist()
    assert sorted(positions) == list(range(end))


def test_a_rank_that_is_never_left_anything_still_takes_part(order: Strided):
    positions = rank_positions(0, batch_sequences=1, micro_batch=1, rank=1, world_size=2)  # and does so for ever
    with make_loader(order, positions, micro_batch=1) as loader:
        for _ in range(3):
            assert next(loader).num_targets == 0


def test_the_end_is_the_end_however_often_one_asks(order: Strided):
    positions = rank_positions(0, batch_sequences=3, micro_batch=3, rank=0, world_size=1, end=3)
    with make_loader(order, positions) as loader:
        assert len(list(loader)) == 1
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(loader)


def test_samples_are_announced_ahead_of_their_use_also_across_blocks(order: Strided, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader_module, "_BLOCK_POSITIONS", 30)
    monkeypatch.setattr(loader_module, "_PIECE_BYTES", 1)
    loader = make_loader(order)
    announced: list[int] = []
    monkeypatch.setattr(loader._reader, "will_need", lambda files, _: announced.extend(files.tolist()))
    pieces = loader._announced_pieces()
    for num_read in range(0, 300, 3):
        next(pieces)
        assert 256 <= len(announced) - num_read - 3 <= 256 + 3


def test_documents_are_marked_when_they_are_to_be_isolated(order: Strided):
    with make_loader(order, isolate_documents=True) as loader:
        batch = next(loader).to(CPU)
    assert batch.boundaries is not None
    assert batch.boundaries.ids_BT.shape == batch.tokens.shape


def test_what_the_reading_thread_finds_is_raised_where_the_batch_is_asked_for(order: Strided):
    with make_loader(order, vocab_size=5) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match="vocab_size is 5"):
                next(loader)


@pytest.fixture
def rotten(order: Strided, tmp_path: Path) -> tuple[Strided, tuple[int, int]]:
    """The same order over copies with checksums, and the sample of them that holds a flipped byte."""
    copies: list[DataFile] = []
    for file in order.files:
        path = tmp_path / file.path.name
        path.write_bytes(file.path.read_bytes())
        write_checksums(path, LENGTH)
        copies.append(dataclasses.replace(file, path=path))
    content = bytearray(copies[1].path.read_bytes())
    content[HEADER_BYTES + 2 * (3 * LENGTH + 5)] ^= 1
    copies[1].path.write_bytes(content)
    return Strided(copies), (1, 3)


def test_a_bad_sample_is_quarantined_and_handed_on_with_its_micro_batch(rotten: tuple[Strided, tuple[int, int]]):
    order, bad = rotten
    positions = rank_positions(0, batch_sequences=6, micro_batch=3, rank=0, world_size=1, end=2 * len(order.samples))
    found = []
    with make_loader(order, positions, bad_sample="quarantine") as loader:
        for item in loader:
            samples = list(zip(item.files.tolist(), item.samples.tolist(), strict=True))
            assert item.bad == [sample for sample in samples if sample == bad]
            assert [item.rows.row_targets[samples.index(sample)] for sample in item.bad] == [0] * len(item.bad)
            found += item.bad
    assert found == [bad, bad]


def test_a_bad_sample_stops_the_run_unless_told_otherwise(rotten: tuple[Strided, tuple[int, int]]):
    positions = rank_positions(0, batch_sequences=6, micro_batch=3, rank=0, world_size=1, end=len(rotten[0].samples))
    with make_loader(rotten[0], positions) as loader, pytest.raises(BadSampleError, match="sample 3 .* its checksum"):
        list(loader)


@pytest.mark.parametrize("num_read", [0, 1, 30])
@pytest.mark.parametrize("end", [None, 3, 90])
def test_the_thread_ends_with_the_context_also_when_nobody_reads(
    order: Strided, monkeypatch: pytest.MonkeyPatch, num_read: int, end: int | None
):
    monkeypatch.setattr(loader_module, "_PIECE_BYTES", 1)
    before = threading.active_count()
    positions = rank_positions(0, batch_sequences=6, micro_batch=3, rank=0, world_size=1, end=end)
    with make_loader(order, positions) as loader:
        for _, _ in zip(range(num_read), loader):
            pass
        started_s = time.perf_counter()
    assert time.perf_counter() - started_s < 2
    assert threading.active_count() == before
    assert not loader._reader._open_files

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader, loader_cold, loader_peers, loader_state
from benchmarks.loader import rows_of
from benchmarks.loader_data import Corpus, WrongRowsError, write_corpus
from benchmarks.loader_ours import open_loader, open_loader_on_cpu
from data_prep.shards import open_tokens

LENGTH = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 200_000, LENGTH)


def test_the_packed_blocks_of_the_open_chunks_come_once_each_and_the_other_chunks_never(corpus: Corpus):
    blocks = loader_peers.PackedBlocks(corpus.shards, LENGTH + 1)
    per_chunk = len(open_tokens(corpus.shards[0])) // (LENGTH + 1)
    first, second = (np.stack(list(itertools.islice(blocks, 8 * per_chunk))) for _ in range(2))
    corpus.check(first, stride=LENGTH + 1)
    corpus.check(second, stride=LENGTH + 1)
    assert not np.array_equal(first, second)
    assert {row.tobytes() for row in first} == {row.tobytes() for row in second}  # 2 of 10 chunks are never reached


@pytest.mark.parametrize("with_checksums", [False, True])
def test_every_way_to_read_gives_rows_of_the_data(corpus: Corpus, with_checksums: bool):
    def read(batches) -> np.ndarray:
        return np.concatenate([rows_of(next(batches)).copy() for _ in range(20)])

    with loader_peers.packed_blocks(corpus) as batches:
        corpus.check(read(batches), stride=LENGTH + 1)
    with loader_peers.packed_blocks_and_data_loader(corpus) as batches:
        corpus.check(read(batches), stride=LENGTH + 1)
    with loader_peers.random_memmap(corpus) as batches:
        corpus.check(read(batches), stride=LENGTH, may_repeat=True)
    with open_loader(corpus, with_checksums) as batches:
        corpus.check(read(batches), stride=LENGTH)
    with open_loader_on_cpu(corpus, with_checksums) as batches:
        corpus.check(read(batches), stride=LENGTH)


def test_rows_that_are_wrong_shifted_or_repeated_are_seen(corpus: Corpus):
    tokens = open_tokens(corpus.shards[3])
    good = tokens[: LENGTH + 1].astype(np.int64)
    corpus.check(good[None], stride=LENGTH)
    for bad in (good + 2**16, np.append(good[:-1], good[-1] ^ 1), tokens[1 : LENGTH + 2]):
        with pytest.raises(WrongRowsError):
            corpus.check(bad[None], stride=LENGTH)
    with pytest.raises(WrongRowsError, match="repeated"):
        corpus.check(np.stack([good, good]), stride=LENGTH)
    with pytest.raises(WrongRowsError, match="shifted"):
        rows_of((torch.tensor([[1, 2]]), torch.tensor([[3, 4]])))


def test_a_small_run_of_all_sections_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.environment.RESULTS", tmp_path / "results")
    for module, name, value in (
        (loader, "SEQUENCE_LENGTH", LENGTH),
        (loader, "_BLOCKS", 2),
        (loader, "_BLOCK_SAMPLES", 64),
        (loader, "_WARM_UP_SAMPLES", 64),
        (loader, "_CHECKED_SAMPLES", 64),
        (loader, "_MEMORY_SAMPLES", 64),
        (loader, "_SETTLE_S", 0.0),
        (loader_cold, "_SAMPLES", 64),
        (loader_cold, "_ROUNDS", 1),
        (loader_state, "NUM_FILES", 12),
        (loader_state, "_APPENDS", (0, 2)),
        (loader_state, "_REPEATS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    assert loader.main(["--gigabytes", "0.0002", "--folder", str(tmp_path)]) == 0
    assert len(list((tmp_path / "results").iterdir())) == 2
    printed = capsys.readouterr().out
    assert "VOID" not in printed
    assert "TinyLlama" in printed
    assert "Restart" in printed
    assert not list(tmp_path.glob("bessemer-loader-*"))

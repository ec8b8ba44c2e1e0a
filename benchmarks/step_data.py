"""Shards for the step benchmark, and the same samples, in the same order, for rows that are not ours."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.checksums import write_checksums
from data_prep.fingerprint import fingerprint
from data_prep.manifest import Manifest
from data_prep.shards import ShardWriter, open_tokens, token_dtype
from resume.manifest import DataFile, file_of
from resume.order import Order
from resume.state import DataState
from train.config import RunConfig
from train.feed import fresh_state

_EOS_ID = 0
_TOKENIZER_DIGEST = "benchmark"
_TOKENS_PER_SHARD = 4_000_000
_WORKERS = 2
# A worker that says nothing for so long is an error of its row, not the end of the benchmark.
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Corpus:
    """Shards of samples whose tokens are as unevenly frequent as those of a text, with checksums."""

    files: list[DataFile]
    manifest: Manifest

    def fresh_state(self, config: RunConfig) -> DataState:
        """The data state of a run that begins on these shards."""
        return fresh_state(config, self.manifest, self.files)


def write_corpus(folder: Path, *, vocab_size: int, sequence_length: int, num_samples: int) -> Corpus:
    """Writes so many samples.

    Token i has a probability of about 1/i, so that a model has something to learn in its first steps, and a row that
    trains otherwise than the others shows.
    """
    rng = np.random.default_rng(0)
    writer = ShardWriter(
        folder,
        "random",
        vocab_size=vocab_size,
        tokenizer_digest=_TOKENIZER_DIGEST,
        eos_id=_EOS_ID,
        shard_tokens=max(1, _TOKENS_PER_SHARD // sequence_length) * sequence_length,
    )
    with writer:
        # One document of whole samples, less the EOS that the writer adds.
        ranks = np.exp(rng.random(num_samples * sequence_length - 1) * np.log(vocab_size - 1))
        writer.add(ranks.astype(token_dtype(vocab_size)))
    paths = [path for path, _ in writer.close()]
    token_bytes = np.dtype(token_dtype(vocab_size)).itemsize
    for path in paths:
        write_checksums(path, sequence_length)
    manifest = Manifest(
        tokenizer_file="none",
        tokenizer_digest=_TOKENIZER_DIGEST,
        vocab_size=vocab_size,
        eos_id=_EOS_ID,
        sample_tokens=sequence_length,
        shards=(),
    )
    return Corpus([file_of(fingerprint(path).file_id, path, token_bytes) for path in paths], manifest)


class PeerBatches:
    """Batches of a plain torch DataLoader: pinned and read ahead by workers where there is a GPU.

    The samples are those that our loader reads, in its order. Workers start when this is made: a process that has
    threads and a GPU should not fork.
    """

    def __init__(self, corpus: Corpus, config: RunConfig, on_gpu: bool):
        self._places = _Places(Order(corpus.fresh_state(config)), config.data.batch_sequences)
        files = {file.file_id: file for file in corpus.files}
        rows = _Rows([files[file_id].path for file_id in self._places.file_ids], config.data.sequence_length)
        workers: dict[str, Any] = {}
        if on_gpu:
            workers = {
                "num_workers": _WORKERS,
                "persistent_workers": True,
                "pin_memory": True,
                "timeout": _TIMEOUT_S,
            }
        self._loader = DataLoader(rows, batch_sampler=self._places, **workers)  # pyright: ignore[reportArgumentType]
        for _ in self.first(1):
            pass

    def first(self, num_batches: int) -> Iterator[Tensor]:
        """The first batches of the order, rows (B, T + 1) int64 on the host."""
        self._places.num_batches = num_batches
        return iter(self._loader)


class _Places:
    """Where the samples of each batch lie: (file, sample) pairs, from the beginning of the order."""

    def __init__(self, order: Order, batch_size: int):
        self._order, self._batch_size = order, batch_size
        self.file_ids = order.file_ids
        self.num_batches = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.num_batches):
            positions = np.arange(batch * self._batch_size, (batch + 1) * self._batch_size)
            files, samples = self._order.resolve(positions)
            yield list(zip(files.tolist(), samples.tolist(), strict=True))

    def __len__(self) -> int:
        return self.num_batches


class _Rows(Dataset):
    def __init__(self, paths: list[Path], sequence_length: int):
        self._tokens, self._length = [open_tokens(path) for path in paths], sequence_length

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        file, sample = place
        first = sample * self._length
        return torch.from_numpy(self._tokens[file][first : first + self._length + 1].astype(np.int64))

"""Other ways to read packed token files, for the loader benchmark.

TinyLlama's packed data set and nanoGPT's memory map are written anew from what they do, operation by operation where it
costs time; mosaicml-streaming and litdata are themselves, if they are installed. Each gives batches of int64 rows of
L + 1 tokens, as their training loops take them.
"""

import contextlib
import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.loader_data import Corpus
from data_prep.shards import HEADER_BYTES, open_tokens

BATCH = 8
_OPEN_CHUNKS = 8
# Samples written in the formats of the libraries: their cost per sample does not depend on the size.
_LIBRARY_SAMPLES = 40_000
# Of litdata's chunks, so that some are open at a time, as with its default of 64 MB.
_CHUNK_BLOCKS = 8_192


class PackedBlocks:
    """TinyLlama's iterator: some chunks are mapped at a time, and all their blocks are permuted.

    Source: lit_gpt/packed_dataset.py of TinyLlama. What it reads of a chunk's header, here a shard's size tells.
    """

    def __init__(self, paths: list[Path], block_size: int, open_chunks: int = _OPEN_CHUNKS, seed: int = 0):
        self._paths, self._block_size, self._open_chunks = paths, block_size, open_chunks
        self._rng = np.random.default_rng(seed)
        self._next_path = 0
        self._dtype = np.uint16
        self._blocks_per_chunk = 0
        self._buffers: list[memoryview] = []
        self._order = np.zeros(0, dtype=np.int64)
        self._next_block = 0
        self._open_next_chunks()

    def __iter__(self) -> "PackedBlocks":
        return self

    def __next__(self) -> Tensor:
        """The next block, widened to int64."""
        if self._next_block >= len(self._order):
            self._open_next_chunks()
        block = self._order[self._next_block]
        buffer = self._buffers[block // self._blocks_per_chunk]
        first = (block % self._blocks_per_chunk) * self._block_size
        offset = np.dtype(self._dtype).itemsize * first
        values = np.frombuffer(buffer, dtype=self._dtype, count=self._block_size, offset=offset)
        self._next_block += 1
        return torch.from_numpy(values.astype(np.int64))

    def _open_next_chunks(self) -> None:
        if self._open_chunks > len(self._paths) - self._next_path:
            self._next_path = 0  # the rest of the list is never reached: one of its defects
        chosen = self._paths[self._next_path : self._next_path + self._open_chunks]
        self._next_path += self._open_chunks
        maps: list[Any] = [np.memmap(path, mode="r", order="C", offset=HEADER_BYTES) for path in chosen]
        self._buffers = [memoryview(tokens) for tokens in maps]
        self._blocks_per_chunk = len(self._buffers[0]) // np.dtype(self._dtype).itemsize // self._block_size
        self._order = self._rng.permutation(len(chosen) * self._blocks_per_chunk)
        self._next_block = 0


class _PackedDataset(IterableDataset):
    def __init__(self, paths: list[Path], block_size: int):
        self._paths, self._block_size = paths, block_size

    def __iter__(self) -> Iterator[Tensor]:
        return PackedBlocks(self._paths, self._block_size)


@contextlib.contextmanager
def packed_blocks(corpus: Corpus) -> Iterator[Iterator[list[Tensor]]]:
    """TinyLlama's iterator alone; batches are lists of rows."""
    blocks = PackedBlocks(corpus.shards, corpus.sequence_length + 1)
    yield ([next(blocks) for _ in range(BATCH)] for _ in itertools.count())


@contextlib.contextmanager
def packed_blocks_and_data_loader(corpus: Corpus) -> Iterator[Iterator[Tensor]]:
    """TinyLlama's iterator behind torch's DataLoader, as TinyLlama trains."""
    dataset = _PackedDataset(corpus.shards, corpus.sequence_length + 1)
    yield iter(DataLoader(dataset, batch_size=BATCH, shuffle=False, pin_memory=False, num_workers=0))


@contextlib.contextmanager
def random_memmap(corpus: Corpus) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """nanoGPT's way: rows at random places of a memory map, inputs and targets stacked one by one.

    nanoGPT maps one file anew for each batch; here all stay mapped, and places are multiples of the sequence length.
    """
    maps = [open_tokens(path) for path in corpus.shards]
    length = corpus.sequence_length
    samples_per_shard = (len(maps[0]) - 1) // length
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            chosen = torch.randint(samples_per_shard * len(maps), (BATCH,), generator=generator)
            places = [divmod(int(i), samples_per_shard) for i in chosen]
            rows = [(maps[shard], sample * length) for shard, sample in places]
            x = torch.stack([torch.from_numpy(m[i : i + length].astype(np.int64)) for m, i in rows])
            y = torch.stack([torch.from_numpy(m[i + 1 : i + 1 + length].astype(np.int64)) for m, i in rows])
            yield x, y

    yield batches()


@contextlib.contextmanager
def mosaic(corpus: Corpus, with_data_loader: bool = False) -> Iterator[Iterator[Any]]:
    """mosaicml-streaming on MDS files, which are written at the first call.

    Raises:
        ImportError: not installed.
    """
    streaming = importlib.import_module("streaming")
    folder = corpus.folder / "mds"
    if not folder.exists():
        with streaming.MDSWriter(
            out=str(folder), columns={"tokens": f"ndarray:uint16:{corpus.sequence_length + 1}"}
        ) as out:
            for row in _rows(corpus):
                out.write({"tokens": row})
    streaming.base.util.clean_stale_shared_memory()

    class Rows(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Tensor:
            return torch.from_numpy(super().__getitem__(at)["tokens"].astype(np.int64))

    dataset: Any = Rows(local=str(folder), shuffle=True, batch_size=BATCH)
    if with_data_loader:
        loader: Any = streaming.StreamingDataLoader(dataset, batch_size=BATCH)
        yield (batch for _ in itertools.count() for batch in loader)
    else:
        rows = (row for _ in itertools.count() for row in dataset)
        yield ([next(rows) for _ in range(BATCH)] for _ in itertools.count())


@contextlib.contextmanager
def litdata(corpus: Corpus, with_data_loader: bool = False) -> Iterator[Iterator[Any]]:
    """Lightning's litdata with its loader of token blocks, on chunks that are written at the first call.

    Raises:
        ImportError: not installed.
    """
    library = importlib.import_module("litdata")
    block_size = corpus.sequence_length + 1
    tokens_loader = importlib.import_module("litdata.streaming.item_loader").TokensLoader
    folder = corpus.folder / "litdata"
    if not folder.exists():
        cache = library.streaming.Cache(
            str(folder), chunk_size=_CHUNK_BLOCKS * block_size, item_loader=tokens_loader(block_size)
        )
        for i, row in enumerate(_rows(corpus)):
            cache[i] = torch.from_numpy(row)
        cache.done()
        cache.merge()
    dataset = library.StreamingDataset(str(folder), item_loader=tokens_loader(block_size), shuffle=True, drop_last=True)
    if with_data_loader:
        loader = library.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
        yield (batch.to(torch.int64) for _ in itertools.count() for batch in loader)
    else:
        rows = (row.to(torch.int64) for _ in itertools.count() for row in dataset)
        yield ([next(rows) for _ in range(BATCH)] for _ in itertools.count())


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    names = {"streaming": "mosaicml-streaming", "litdata": "litdata"}
    return {name: version(name) for module, name in names.items() if importlib.util.find_spec(module) is not None}


def _rows(corpus: Corpus) -> Iterator[np.ndarray]:
    """Consecutive rows of L + 1 tokens that do not overlap."""
    size = corpus.sequence_length + 1
    rows = (
        tokens[i : i + size]
        for path in corpus.shards
        for tokens in [open_tokens(path)]
        for i in range(0, len(tokens) - size + 1, size)
    )
    yield from (np.array(row) for row in itertools.islice(rows, _LIBRARY_SAMPLES))

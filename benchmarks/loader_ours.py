"""The real loader of this project, opened on the shards of the loader benchmark."""

import contextlib
from collections.abc import Iterator

import torch

from benchmarks.loader_data import EOS_ID, TOKENIZER_DIGEST, VOCAB_SIZE, Corpus
from model.batch import Batch
from resume.order import Order
from resume.samples import SampleReader
from resume.state import start
from train.loader import Loader, MicroBatch, rank_positions

MICRO_BATCH = 8


@contextlib.contextmanager
def open_loader(corpus: Corpus, with_checksums: bool, end: int | None = None) -> Iterator[Iterator[MicroBatch]]:
    """Micro-batches of 8 rows as the loader hands them over, on the host and in uint16; `end` is the last position."""
    files = {file.file_id: file for file in corpus.files(with_checksums)}
    state = start(
        {"random": list(files)},
        seed=0,
        sequence_length=corpus.sequence_length,
        batch_sequences=MICRO_BATCH,
        tokenizer_digest=TOKENIZER_DIGEST,
        eos_id=EOS_ID,
    )
    order = Order(state)
    reader = SampleReader(
        [files[file_id] for file_id in order.file_ids],
        sequence_length=corpus.sequence_length,
        vocab_size=VOCAB_SIZE,
        eos_id=EOS_ID,
    )
    assert reader.num_checked_files == (len(files) if with_checksums else 0)
    positions = rank_positions(0, batch_sequences=MICRO_BATCH, micro_batch=MICRO_BATCH, rank=0, world_size=1, end=end)
    with Loader(order, reader, positions, micro_batch=MICRO_BATCH) as loader:
        yield loader


@contextlib.contextmanager
def open_loader_on_cpu(corpus: Corpus, with_checksums: bool) -> Iterator[Iterator[Batch]]:
    """The same, widened to int64 tokens and targets on the CPU; on a GPU the widening is the GPU's work."""
    with open_loader(corpus, with_checksums) as loader:
        device = torch.device("cpu")
        yield (micro_batch.to(device) for micro_batch in loader)

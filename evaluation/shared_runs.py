"""Which runs of words of evaluation items stand in the documents of a data folder.

Words, runs and their hashes are those of the decontamination: case, punctuation and line ends do not count. Runs that
more than BOILERPLATE_ITEMS items have say nothing and are not looked for.
"""

import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.duplicates.decontaminate import BOILERPLATE_ITEMS, Hashes, piece_batches, piece_tokens, token_runs
from data_prep.engine import EngineConfig, default_workers, started
from data_prep.manifest import read_manifest
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from evaluation.set_items import Item
from evaluation.stored_documents import documents_in, shards_by_source

_BATCH_DOCUMENTS = 64


class Runs(NamedTuple):
    """The runs to look for: distinct hashes, ascending; and pairs of an index into them and an item with that run."""

    hashes: Hashes
    run_of_pair: NDArray[np.int64]
    item_of_pair: NDArray[np.int64]


class Place(NamedTuple):
    """Where a document begins."""

    shard: str
    token: int


def runs_of_items(items: Sequence[Item], ngram: int) -> Runs:
    """The runs of items, but for those that more than BOILERPLATE_ITEMS of them have."""
    texts = [text for item in items for text in item.texts]
    item_of_text = np.repeat(np.arange(len(items)), [len(item.texts) for item in items])
    parts = [(item_of_text[owners], hashes) for owners, hashes in _hashed(texts, ngram)]
    all_hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(hashes for _, hashes in parts)])
    all_items = np.concatenate([np.empty(0, dtype=np.int64), *(owners for owners, _ in parts)])
    hashes, run_of_pair = np.unique(all_hashes, return_inverse=True)
    runs, owners = np.unique(np.stack([run_of_pair, all_items]), axis=1)
    is_rare = np.bincount(runs, minlength=len(hashes)) <= BOILERPLATE_ITEMS
    kept = is_rare[runs]
    return Runs(hashes[is_rare], (np.cumsum(is_rare) - 1)[runs[kept]], owners[kept])


def find(data: Path, split: str, hashes: Hashes, ngram: int, num_workers: int | None) -> dict[int, Place]:
    """The indices of the hashes that are runs of documents of a data folder, each with the first document that has it.

    Cost: one pass over the shards, some documents at a time; the workers share the hashes.
    """
    found: dict[int, Place] = {}
    shards = shards_by_source(data, split)
    with tempfile.TemporaryDirectory(prefix="contamination-") as folder:
        np.save(hashes_file := Path(folder) / "hashes.npy", hashes)
        tasks = [_Task(data, split, name, i, hashes_file, ngram) for name in shards for i in range(len(shards[name]))]
        num_workers = min(num_workers or default_workers(), len(tasks))
        config = EngineConfig(kind="pool" if num_workers > 1 else "inline", num_workers=num_workers)
        with started(config, len(tasks)) as engine:
            for _, places in tqdm(engine.run(_search, tasks), "search", len(tasks), unit="shard", disable=None):
                found |= {run: min(place, found.get(run, place)) for run, place in places.items()}
    return found


class _Task(NamedTuple):
    """A shard to be searched. The hashes are in a file, as every worker needs the same ones."""

    folder: Path
    split: str
    source: str
    index: int
    hashes: Path
    ngram: int


def _search(task: _Task) -> dict[int, Place]:
    shards, tokenizer = _opened(task.folder, task.split)
    hashes = np.load(task.hashes, mmap_mode="r")
    name = shards[task.source][task.index].relative_to(task.folder).as_posix()
    documents = documents_in(shards[task.source], task.index)
    found: dict[int, Place] = {}
    while batch := list(itertools.islice(documents, _BATCH_DOCUMENTS)):
        for owners, runs in _hashed([tokenizer.decode(tokens.tolist()) for _, tokens in batch], task.ngram):
            at = np.minimum(np.searchsorted(hashes, runs), len(hashes) - 1)
            for hit in np.flatnonzero(hashes[at] == runs):
                found.setdefault(int(at[hit]), Place(name, batch[owners[hit]][0]))
    return found


@functools.cache
def _opened(folder: Path, split: str) -> tuple[dict[str, list[Path]], Tokenizer]:
    return shards_by_source(folder, split), load_tokenizer(folder, eos_id=read_manifest(folder).eos_id)


def _hashed(texts: Sequence[str], ngram: int) -> Iterator[tuple[NDArray[np.int64], Hashes]]:
    """The index of the text, and the hash, of every run of the texts."""
    for owners, pieces in piece_batches(texts):
        words, piece_of = piece_tokens(pieces)
        for length, runs in token_runs(words, (ngram,)):
            is_whole = piece_of[: len(runs)] == piece_of[length - 1 :]
            yield np.array(owners)[piece_of[: len(runs)][is_whole]], runs[is_whole]

"""Small runs that are walked through by hand: which file, epoch and sample was trained at which step."""

import collections
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.shards import HEADER_BYTES
from resume import state as states
from resume.ledger import Ledger, Quarantined
from resume.order import Order, changeable
from resume.state import DataState

Span = tuple[int, int]
"""A sample: its first token and its length."""


def file_of(number: int, num_targets: int) -> str:
    """The identity of a file of so many targets."""
    return f"{number:032x}-{number:032x}-{HEADER_BYTES + 2 * (num_targets + 1)}"


def begun(files: dict[str, list[str]] | list[int], length: int = 8, **options) -> DataState:
    """A run over files, of so many targets each, in batches of four groups."""
    if isinstance(files, list):
        files = {"web": [file_of(i, count) for i, count in enumerate(files)]}
    per_group = options.get("group_tokens", length) // length
    common = {"seed": 1, "batch_sequences": 4 * per_group, "tokenizer_digest": "abc", "eos_id": 0}
    return states.start(files, sequence_length=length, **{**common, **options})


class Walk:
    """A run that writes down what its steps are given, one sample after the other."""

    def __init__(self, state: DataState, is_bad: Callable[[str, int], bool] = lambda file_id, first_token: False):
        self.state = state
        self.trained: dict[str, dict[int, dict[Span, int]]] = collections.defaultdict(dict)
        """Steps by file, epoch and sample; those that are bad are among them."""
        self.log: list[tuple[str, int]] = []
        """File and epoch of each sample, in the order in which they were trained."""
        self._is_bad = is_bad
        self._times: collections.Counter[tuple[str, int]] = collections.Counter()
        self._joined = dict.fromkeys(self._file_ids(), 0)

    def steps(self, count: int) -> "Walk":
        """Trains so many steps, or up to the end of the data."""
        order = Order(self.state)
        for _ in range(count):
            now = self.state
            wanted = now.first_sample + now.batch.batch_sequences
            end = order.extend(-(-wanted // now.samples_per_group)) * now.samples_per_group
            places = np.arange(now.first_sample, min(wanted, end))
            if not len(places):
                break
            files, samples = order.resolve(places)
            spans = [(order.file_ids[f], s * now.sequence_length) for f, s in zip(files.tolist(), samples.tolist())]
            num_targets = sum(self._train(file_id, first_token) for file_id, first_token in spans)
            self.state = now.advance(len(places), num_targets)
        return self

    def change(self, change: Callable[[DataState], DataState]) -> "Walk":
        """Has something happen to the data."""
        epochs = {source: self._epoch(file_ids) for source, file_ids in self.state.sources.items()}
        self.state = change(changeable(self.state))
        for source, file_ids in self.state.sources.items():
            self._joined |= {i: epochs.get(source, 0) for i in file_ids if i not in self._joined}
        return self

    def ledger(self) -> Ledger:
        """The books that the steps would have kept."""
        books = Ledger(Order(self.state).file_ids)
        for file_id, (first, length), step in self.samples():
            if self._is_bad(file_id, first):
                books.quarantined.append(Quarantined(file_id, first, length, step))
            else:
                books.add(np.array([books.file_ids.index(file_id)]), np.array([first // length]), length)
        return books

    def samples(self) -> Iterator[tuple[str, Span, int]]:
        """File, sample and step of all that was trained."""
        for file_id, epochs in self.trained.items():
            for spans in epochs.values():
                for span, step in spans.items():
                    yield file_id, span, step

    def _train(self, file_id: str, first: int) -> int:
        """Writes a sample of the next step down, unless it is empty; returns its targets."""
        length = self.state.sequence_length
        targets = range(first, min(first + length, self.state.num_targets(file_id)))
        if targets:
            epoch = self._joined[file_id] + self._times[file_id, first]
            of_epoch = self.trained[file_id].setdefault(epoch, {})
            assert (first, length) not in of_epoch
            of_epoch[first, length] = self.state.step + 1
            self.log.append((file_id, epoch))
            self._times.update((file_id, target) for target in targets)
        return len(targets)

    def _epoch(self, file_ids: list[str]) -> int:
        """The epoch that a source of these files is in: the last one that any sample was trained in."""
        return max((epoch for file_id in file_ids for epoch in self.trained[file_id]), default=0)

    def _file_ids(self) -> list[str]:
        return [file_id for file_ids in self.state.sources.values() for file_id in file_ids]

"""What is packed as a whole: conversations, pairs or prompts of raw files, encoded, none of them twice."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep.chat.chat_folder import ChatFolder
from data_prep.chat.chat_format import ChatFormatError
from data_prep.chat.chat_records import BadRecords, read_records
from data_prep.chat.conversations import documents_of
from data_prep.chat.packing import Document, row_capacity
from data_prep.chat.turns import Part
from data_prep.reading.corpus import InputFile
from data_prep.reading.field_template import BadRecordError
from data_prep.shards import token_dtype
from data_prep.tokenizing.tokenizer import Tokenizer

BATCH = 512
"""Records that are encoded at a time."""


class Unit(NamedTuple):
    """One document, or two that stay together."""

    documents: list[Document]
    digest: bytes
    """Of what is said."""
    line: str
    """The record itself, where the rows keep it."""


class _Read(NamedTuple):
    """A unit before it is encoded: the parts of each document."""

    parts: list[list[Part]]
    digest: bytes
    line: str
    num_turns: int


class UnitReader:
    """Reads units and counts what becomes of the records."""

    def __init__(self, chat: ChatFolder, tokenizer: Tokenizer, max_bad_fraction: float, seen: Iterable[bytes]) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        self._seen = set(seen)
        self.bad = BadRecords(max_bad_fraction)
        self.dropped: Counter[str] = Counter()
        """Good records that are of no use, by reason."""
        self.digests: list[bytes] = []
        """Of all units that were not seen before, those of no use included."""
        self.num_turns = self.num_cut = 0

    def read(self, files: Iterable[InputFile]) -> Iterator[Unit]:
        """Every new unit of the files.

        Raises:
            InputError: too much of the input is bad.
        """
        dtype = token_dtype(self._tokenizer.vocab_size)
        options = {"desc": "prepare-chat", "unit": " records", "mininterval": 1.0, "disable": None}
        records = iter(tqdm(self._read_records(files), **options))
        while batch := list(itertools.islice(records, BATCH)):
            parts = [document for read in batch for document in read.parts]
            encoded = iter(self._chat.chat_format.encode_parts(self._tokenizer, parts))
            for read in batch:
                own = itertools.islice(encoded, len(read.parts))
                whole = [Document(np.array(ids, dtype), np.array(is_trained, bool)) for ids, is_trained in own]
                documents = fitted(whole, row_capacity(self._chat.kind, self._chat.row_tokens))
                if (reason := self._unfit(whole, documents)) is not None:
                    self.dropped[reason] += 1
                    continue
                self.num_turns += read.num_turns
                self.num_cut += sum(len(a.tokens) > len(b.tokens) for a, b in zip(whole, documents))
                yield Unit(documents, read.digest, read.line)
        self.bad.check()

    def dropped_in_words(self) -> str:
        """What was dropped, to be put behind a sentence."""
        named = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(self.dropped.items()))
        return f"; dropped, {named}" if named else ""

    def _unfit(self, whole: Sequence[Document], documents: Sequence[Document]) -> str | None:
        """Why a unit is of no use in a row."""
        if self._chat.kind == "prompts":
            return "longer than a row" if len(documents[0].tokens) < len(whole[0].tokens) else None
        if not all(document.is_trained.any() for document in documents):
            return "no answer within a row's length"
        is_pair = len(documents) == 2
        if is_pair and np.array_equal(documents[0].tokens, documents[1].tokens):
            return "chosen and rejected differ only behind a row's length"
        return None

    def _read_records(self, files: Iterable[InputFile]) -> Iterator[_Read]:
        """Every good record that no other has said before."""
        kind, chat_format = self._chat.kind, self._chat.chat_format
        for file in files:
            for record in read_records(file):
                where = f"{file.path}:{record.line}"
                try:
                    if isinstance(record.value, BadRecordError):
                        raise record.value
                    told = documents_of(record.value, kind)
                    parts = [
                        chat_format.parts(turns, trained_from=trained_from, is_prompt=kind == "prompts")
                        for turns, trained_from in told
                    ]
                except (BadRecordError, ChatFormatError) as error:
                    self.bad.add(where, str(error))
                    continue
                self.bad.add(where, None)
                digest = xxhash.xxh3_128_digest(json.dumps(told).encode("utf-8"))
                if digest in self._seen:
                    self.dropped["duplicate"] += 1
                    continue
                self._seen.add(digest)
                self.digests.append(digest)
                line = json.dumps(record.value, default=str) if kind == "prompts" else ""
                yield _Read(parts, digest, line, sum(len(document.turns) for document in told))


def fitted(unit: Sequence[Document], row_tokens: int) -> list[Document]:
    """The documents of a unit cut at their ends, so that a row holds them; one in two gets half of it at least."""
    lengths = [len(document.tokens) for document in unit]
    if sum(lengths) <= row_tokens:
        return list(unit)
    share = row_tokens // len(unit)
    most = [max(share, row_tokens - (sum(lengths) - length)) for length in lengths]
    return [Document(d.tokens[:limit], d.is_trained[:limit]) for d, limit in zip(unit, most, strict=True)]

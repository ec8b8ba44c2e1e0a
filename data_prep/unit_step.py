"""The one parallel step: a unit is read, cleaned, filtered, sketched for near-duplicates and encoded, in one pass.

Its result is a folder of the work area, named by everything that shapes it, and published by one rename: a unit is done
if its folder exists, whoever did it. Nothing in it names a path, so that equal files share one result.

    tokens.bin       ids of the kept documents, an EOS behind each, in the dtype of the shards
    documents.npy    one DOCUMENT record per kept document
    bands.npy        near-duplicate keys, one row per band (absent if near-duplicates are not looked for)
    sketch.npy       what candidates are verified with, one row per document
    dropped.jsonl    documents that a filter refused: file, place, line, reason; of some the beginning of the text
    bad_lines.jsonl  what gave no document: file, place, line, reason, hex of its beginning
    summary.json     counts
"""

import dataclasses
import functools
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import numpy as np
import xxhash

from data_prep import publish
from data_prep.cleaning.clean import Cleaner, kind_of
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.duplicates import near_duplicates
from data_prep.duplicates.dedup_config import DecontaminateConfig
from data_prep.duplicates.minhash import exact_hash
from data_prep.reading import chat
from data_prep.reading.documents import BadLine, Document, Unit, read_unit
from data_prep.shards import token_dtype
from data_prep.tokenizing.encoders import Encoder, encoder_named
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer

STEP_VERSION = 1
"""Raised when the same input and settings begin to give another result."""
BATCH_CHARACTERS = 512 * 1024
BATCH_DOCUMENTS = 512
NUM_SAMPLES, SAMPLE_CHARACTERS = 20, 300
"""Of so many documents that a filter dropped, the beginning of the text is kept for the report."""
DOCUMENT = np.dtype(
    [
        ("file", "<u4"),
        ("line", "<u4"),
        ("place", "<u8"),
        ("hash_high", "<u8"),
        ("hash_low", "<u8"),
        ("num_tokens", "<u4"),  # its EOS included
        ("text_bytes", "<u4"),
        ("language", "S8"),
    ]
)
TOKENS_FILE, DOCUMENTS_FILE, BANDS_FILE, SKETCH_FILE = "tokens.bin", "documents.npy", "bands.npy", "sketch.npy"
DROPPED_FILE, BAD_LINES_FILE, SUMMARY_FILE = "dropped.jsonl", "bad_lines.jsonl", "summary.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is done to the units of a source."""

    tokenizer_file: str
    tokenizer_digest: str
    eos_id: int
    vocab_size: int
    marks: tuple[tuple[str, int], ...]
    """Special tokens around the turns of a dialogue, with their ids; none if the vocabulary lacks them."""
    encoder: str
    clean: CleanConfig
    decontaminate: DecontaminateConfig
    exact: bool
    """Whether texts that differ in white space only count as the same."""
    near: str
    """How near-duplicates are sketched; see `near_duplicates`."""
    kind: str
    """"prose", "code" or "chat"; "auto" tells by the suffix of the file."""


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One unit, what is done to it, and the folder that it becomes."""

    unit: Unit
    recipe: Recipe
    folder: str


@dataclass(slots=True)
class UnitSummary:
    """What a unit held, in numbers."""

    num_documents: int = 0
    """Kept by the filters; duplicates are found later."""
    num_tokens: int = 0
    read_bytes: int = 0
    """Text of all documents, as read."""
    kept_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)

    @property
    def num_lines(self) -> int:
        """Lines, rows or files of the unit, good and bad."""
        return self.num_documents + sum(self.dropped.values()) + sum(self.bad.values())


def unit_key(unit: Unit, file_ids: Sequence[str], recipe_digest: str) -> str:
    """The name of a unit's result: equal for equal content and settings, wherever the files lie."""
    content = [STEP_VERSION, unit.kind, unit.start, unit.stop, repr(unit.layout), list(file_ids), recipe_digest]
    if recipe_digest.startswith("auto"):  # then the suffix says what is code
        content.append([kind_of(path, "prose") for path in unit.paths])
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode("utf-8"))


def recipe_digest(recipe: Recipe) -> str:
    """What of a recipe shapes the result: not where the tokenizer lies, nor which encoder gives its ids."""
    context = _context(recipe)
    parts = [recipe.tokenizer_digest, recipe.eos_id, context.cleaner.digest, recipe.exact]
    parts.append(near_duplicates.digest(recipe.near))
    if context.decontaminator is not None:
        parts.append(context.decontaminator.digest)
    return f"{recipe.kind}-{xxhash.xxh3_128_hexdigest(json.dumps(parts).encode('utf-8'))}"


def process_unit(task: UnitTask) -> UnitSummary:
    """Does the work of a unit, unless its folder exists; returns its counts."""
    folder = Path(task.folder)
    if not folder.is_dir():
        temporary = publish.temporary_beside(folder)
        temporary.mkdir(parents=True)
        try:
            _Pass(task, temporary).run()
            publish_result(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return read_summary(folder)


def publish_result(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in its place; one that another worker put there meanwhile is the same, and stays."""
    publish.sync_files(temporary)
    try:
        publish.publish(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise


def read_summary(folder: Path) -> UnitSummary:
    """The counts of a finished unit."""
    return UnitSummary(**json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8")))


def text_hash(text: str, *, exact: bool) -> tuple[int, int]:
    """(high, low) of a text; the low one decides its split. exact: texts that differ in white space only have one."""
    if exact:
        return exact_hash(text)
    digest = xxhash.xxh3_128_intdigest(text.encode("utf-8"))
    return digest >> 64, digest & 0xFFFFFFFFFFFFFFFF


class _Context:
    """What units of one recipe share: made once in each worker."""

    def __init__(self, recipe: Recipe) -> None:
        # One thread per worker: the workers are the parallelism.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        os.environ["RAYON_NUM_THREADS"] = "1"
        self.recipe = recipe
        self.cleaner = Cleaner(recipe.clean)
        self.sketch = near_duplicates.sketcher(recipe.near)
        self.decontaminator = recipe.decontaminate.load()

    @functools.cached_property
    def encoder(self) -> Encoder:
        tokenizer = load_tokenizer(self.recipe.tokenizer_file, eos_id=self.recipe.eos_id, is_known=True)
        return encoder_named(tokenizer, self.recipe.encoder)


_thread = threading.local()


def _context(recipe: Recipe) -> _Context:
    """Made once in each thread: a worker of a cluster may have several, and cleaners count what they mask."""
    contexts: dict[Recipe, _Context] = _thread.__dict__.setdefault("contexts", {})
    if recipe not in contexts:
        contexts.clear()  # of the source before
        contexts[recipe] = _Context(recipe)
    return contexts[recipe]


def kind_of_file(unit: Unit, file: int, kind: str) -> str:
    """What the documents of a file are: as configured, else as the layout says, else by the suffix."""
    return kind if kind != "auto" else unit.layout.kind or kind_of(unit.paths[file], "prose")


@dataclass(slots=True)
class _Kept:
    """A document that passed the filters."""

    document: Document
    text: str
    pieces: list[chat.Piece]
    """What is encoded: the text, or the turns of a dialogue with their marks."""
    kind: str
    language: str = ""


class _Pass:
    """One pass over a unit, batch by batch, so that memory does not grow with its size."""

    def __init__(self, task: UnitTask, folder: Path) -> None:
        self._unit, self._recipe, self._folder = task.unit, task.recipe, folder
        self._context = _context(task.recipe)
        self._kinds = [kind_of_file(task.unit, file, task.recipe.kind) for file in range(len(task.unit.paths))]
        self._dtype = np.dtype(token_dtype(task.recipe.vocab_size)).newbyteorder("<")
        self._marks = {mark: np.array([token_id], dtype=np.uint32) for mark, token_id in task.recipe.marks}
        self._summary = UnitSummary()
        self._dropped, self._bad = Counter[str](), Counter[str]()
        self._languages = Counter[str]()
        self._records: list[np.ndarray] = []
        self._sketches: list[tuple[np.ndarray, np.ndarray]] = []

    def run(self) -> None:
        """Writes the files of the unit's folder."""
        masked_before = Counter(self._context.cleaner.masked)
        with (
            (self._folder / TOKENS_FILE).open("wb") as tokens,
            (self._folder / DROPPED_FILE).open("w", encoding="utf-8") as dropped,
            (self._folder / BAD_LINES_FILE).open("w", encoding="utf-8") as bad_lines,
        ):
            for batch in _batches(self._judged(dropped, bad_lines)):
                if clean := self._without_evaluation_sets(batch, dropped):
                    self._encode(clean, tokens, bad_lines)
        self._write_arrays()
        summary = self._summary
        summary.dropped, summary.bad = dict(sorted(self._dropped.items())), dict(sorted(self._bad.items()))
        summary.languages = dict(sorted(self._languages.items()))
        summary.masked = dict(sorted((self._context.cleaner.masked - masked_before).items()))
        content = json.dumps(dataclasses.asdict(summary), indent=1)
        (self._folder / SUMMARY_FILE).write_text(content + "\n", encoding="utf-8")

    def _judged(self, dropped: TextIO, bad_lines: TextIO) -> Iterator[_Kept]:
        """Documents that pass the filters; the others are listed."""
        cleaner = self._context.cleaner
        for item in read_unit(self._unit):
            if isinstance(item, BadLine):
                self._list_bad(item, bad_lines)
                continue
            self._summary.read_bytes += _utf8_bytes(item.text)
            kept = self._cleaned(item)
            reason = "empty after cleaning"
            if kept.text.strip():
                reason = cleaner.judge(kept.text, kept.kind, num_turns=len(item.turns) or None)
            if reason is not None:
                self._list_dropped(kept, reason, dropped)
                continue
            kept.language = cleaner.language(kept.text, kept.kind)
            yield kept

    def _without_evaluation_sets(self, batch: list[_Kept], dropped: TextIO) -> list[_Kept]:
        if self._context.decontaminator is None:
            return batch
        clean: list[_Kept] = []
        for kept, reason in zip(batch, self._context.decontaminator.overlaps([k.text for k in batch]), strict=True):
            if reason is None:
                clean.append(kept)
            else:
                self._list_dropped(kept, reason, dropped)
        return clean

    def _cleaned(self, document: Document) -> _Kept:
        normalise = self._context.cleaner.normalise
        kind = "chat" if document.turns else self._kinds[document.file]
        if not document.turns:
            text = normalise(document.text, kind)
            return _Kept(document, text, [chat.Piece(text, False)], kind)
        turns = [chat.Turn(turn.role, normalise(turn.content, kind)) for turn in document.turns]
        if not self._marks:  # the vocabulary has no marks of turns: a dialogue is a text
            pieces = [chat.Piece("\n\n".join(f"{turn.role}: {turn.content}" for turn in turns), False)]
        else:
            pieces = list(chat.pieces(turns))
        return _Kept(document, chat.plain_text(turns), pieces, kind)

    def _encode(self, batch: list[_Kept], tokens: BinaryIO, bad_lines: TextIO) -> None:
        texts = [piece.text for kept in batch for piece in kept.pieces if not piece.is_special]
        encoded = iter(self._context.encoder.encode_arrays(texts))
        eos_id, vocab_size = self._recipe.eos_id, self._recipe.vocab_size
        eos = np.array([eos_id], dtype=np.uint32)
        good: list[_Kept] = []
        parts: list[np.ndarray] = []
        num_tokens: list[int] = []
        for kept in batch:
            of_document = [self._marks[p.text] if p.is_special else next(encoded) for p in kept.pieces]
            ids = of_document[0] if len(of_document) == 1 else np.concatenate(of_document)
            # Some published vocabularies spell their own EOS out of ordinary text; written so, it would end a document
            # in its middle.
            if (ids == eos_id).any():
                document = kept.document
                reason, head = "text encodes to the end-of-document token", kept.text[:100].encode("utf-8")
                self._list_bad(BadLine(document.file, document.line, document.place, reason, head), bad_lines)
                continue
            good.append(kept)
            parts += [ids, eos]
            num_tokens.append(ids.size + 1)
        if good:
            stream = np.concatenate(parts)
            assert int(stream.max()) < vocab_size  # a cast to uint16 wraps without a word
            tokens.write(stream.astype(self._dtype).tobytes())
            self._record(good, num_tokens)

    def _record(self, good: list[_Kept], num_tokens: list[int]) -> None:
        records = np.zeros(len(good), dtype=DOCUMENT)
        hashes = [text_hash(kept.text, exact=self._recipe.exact) for kept in good]
        columns = {
            "file": [kept.document.file for kept in good],
            "line": [kept.document.line for kept in good],
            "place": [kept.document.place for kept in good],
            "hash_high": [high for high, _ in hashes],
            "hash_low": [low for _, low in hashes],
            "num_tokens": num_tokens,
            "text_bytes": [_utf8_bytes(kept.text) for kept in good],
            "language": [kept.language for kept in good],
        }
        for name, values in columns.items():
            records[name] = values
        self._languages.update(columns["language"])
        self._records.append(records)
        self._summary.num_documents += len(good)
        self._summary.num_tokens += sum(num_tokens)
        self._summary.kept_bytes += int(records["text_bytes"].sum(dtype=np.int64))
        if self._context.sketch is not None:
            self._sketches.append(self._context.sketch([kept.text for kept in good]))

    def _write_arrays(self) -> None:
        np.save(self._folder / DOCUMENTS_FILE, np.concatenate([np.zeros(0, DOCUMENT), *self._records]))
        if self._context.sketch is not None:
            sketches = self._sketches or [self._context.sketch([])]
            np.save(self._folder / BANDS_FILE, np.concatenate([bands for bands, _ in sketches], axis=1))
            np.save(self._folder / SKETCH_FILE, np.concatenate([sketch for _, sketch in sketches]))

    def _list_dropped(self, kept: _Kept, reason: str, dropped: TextIO) -> None:
        self._dropped[reason] += 1
        document = kept.document
        where = {"file": document.file, "place": document.place, "line": document.line, "reason": reason}
        if self._dropped[reason] <= NUM_SAMPLES:
            where["text"] = kept.text[:SAMPLE_CHARACTERS]
        dropped.write(json.dumps(where, ensure_ascii=False) + "\n")

    def _list_bad(self, bad: BadLine, bad_lines: TextIO) -> None:
        self._bad[bad.reason] += 1
        where = {"file": bad.file, "place": bad.place, "line": bad.line, "reason": bad.reason, "head": bad.head.hex()}
        bad_lines.write(json.dumps(where) + "\n")


def marks_of_turns(tokenizer: Tokenizer) -> tuple[tuple[str, int], ...]:
    """The special tokens of `chat.pieces` with ids; none if the vocabulary lacks one, or ends documents with it."""
    marks = [(mark, tokenizer.special_id(mark)) for mark in (chat.TURN_START, chat.TURN_END)]
    found = tuple((mark, token_id) for mark, token_id in marks if token_id not in (None, tokenizer.eos_id))
    return found if len(found) == len(marks) else ()


def _batches(items: Iterable[_Kept]) -> Iterator[list[_Kept]]:
    batch: list[_Kept] = []
    num_characters = 0
    for item in items:
        batch.append(item)
        num_characters += len(item.text)
        if num_characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))

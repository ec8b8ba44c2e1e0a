"""The one step that sees all documents: which of them repeat older ones, and which stream each of the others joins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import generations, unit_step
from data_prep.cut import Pieces, merge_neighbours
from data_prep.duplicates import near_duplicates
from data_prep.duplicates.dedup import SketchFiles, Verdicts, find_duplicates
from data_prep.duplicates.dedup_config import DedupConfig
from data_prep.reading.documents import Unit
from data_prep.unit_step import UnitSummary

TRAIN, VALIDATION = "train", "validation"
_HASHES = 2**64


@dataclass(frozen=True, slots=True)
class FinishedUnit:
    """A unit whose result lies in a folder."""

    unit: Unit
    source: str
    folder: Path
    summary: UnitSummary


@dataclass(frozen=True, slots=True)
class Documents:
    """Columns of all documents that passed the filters, in the order of the input.

    Shapes: (num_documents,), hashes (num_documents, 2).
    """

    hashes: np.ndarray
    num_tokens: np.ndarray
    text_bytes: np.ndarray
    unit: np.ndarray
    """Index of the unit that holds it."""
    start: np.ndarray
    """Place of its first token in the unit's file."""

    @property
    def split_hash(self) -> np.ndarray:
        """Decides the split: equal texts have equal ones."""
        return self.hashes[:, 1]


@dataclass(frozen=True, slots=True)
class Decided:
    """What becomes of the documents: columns beside those of Documents."""

    verdicts: Verdicts
    held_out: np.ndarray
    """Whether it goes to validation. Shapes: (num_documents,), bool."""
    place: np.ndarray
    """Of its first token in its stream, the leading EOS left out; -1 for a duplicate. Shapes: (num_documents,)."""

    @property
    def kept(self) -> np.ndarray:
        """Whether it is in a stream. Shapes: (num_documents,), bool."""
        return self.verdicts.kind == 0


def load_documents(units: Sequence[FinishedUnit]) -> Documents:
    """Columns of finished units.

    Cost: 44 bytes of memory per document.
    """
    columns: list[list[np.ndarray]] = [[], [], [], [], []]
    for index, unit in enumerate(units):
        records = np.load(unit.folder / unit_step.DOCUMENTS_FILE, mmap_mode="r")
        num_tokens = records["num_tokens"].astype(np.int64)
        values = (
            np.stack([records["hash_high"], records["hash_low"]], axis=1),
            num_tokens,
            records["text_bytes"].copy(),
            np.full(records.size, index, dtype=np.int32),
            np.cumsum(num_tokens) - num_tokens,
        )
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    empty = (np.zeros((0, 2), np.uint64), *(np.zeros(0, kind) for kind in (np.int64, np.uint32, np.int32, np.int64)))
    return Documents(*(np.concatenate([none, *column]) for none, column in zip(empty, columns, strict=True)))


def find_verdicts(
    units: Sequence[FinishedUnit], documents: Documents, older: Sequence[Path], config: DedupConfig
) -> Verdicts:
    """Which documents repeat an older one: of this input, or of the generations `older`, whose rows come first.

    duplicate_of counts the kept documents of the older generations first, then those of this input.
    """
    old_hashes = [np.load(folder / generations.HASHES_FILE) for folder in older]
    num_old = sum(map(len, old_hashes))
    if not config.exact:
        return Verdicts.all_kept(len(documents.hashes))
    hashes = np.concatenate([*old_hashes, documents.hashes])
    if config.near == "off":
        return _of_new(find_duplicates(hashes, [], hashes, threshold=1, near=False, num_settled=num_old), num_old)
    parts = [
        (folder / generations.BANDS_FILE, folder / generations.SKETCH_FILE, len(rows))
        for folder, rows in zip(older, old_hashes, strict=True)
    ]
    for unit in units:
        folder = unit.folder
        parts.append((folder / unit_step.BANDS_FILE, folder / unit_step.SKETCH_FILE, unit.summary.num_documents))
    files = SketchFiles(parts)
    found = find_duplicates(
        hashes,
        files.bands,
        files.sketches,
        threshold=config.min_similarity,
        near=True,
        similarity=near_duplicates.similarity(config.near),
        num_settled=num_old,
    )
    return _of_new(found, num_old)


def _of_new(verdicts: Verdicts, num_old: int) -> Verdicts:
    return Verdicts(verdicts.duplicate_of[num_old:], verdicts.kind[num_old:])


def hold_out(documents: Documents, kept: np.ndarray, fraction: float, *, at_least_one: bool) -> np.ndarray:
    """Which kept documents go to validation: those whose hash lies in the fraction.

    With at_least_one, if that is none, the text with the smallest hash, unless there is only one text.

    Shapes: (num_documents,), bool.
    """
    held_out = kept & (documents.split_hash < np.uint64(split_threshold(fraction)))
    if fraction and at_least_one and kept.any() and not held_out.any():
        smallest, largest = documents.split_hash[kept].min(), documents.split_hash[kept].max()
        if smallest < largest:
            return kept & (documents.split_hash == smallest)
    return held_out


def split_threshold(fraction: float) -> int:
    """Texts whose hash lies below it go to validation."""
    return int(fraction * _HASHES)


def streams(
    units: Sequence[FinishedUnit], documents: Documents, kept: np.ndarray, held_out: np.ndarray
) -> tuple[dict[tuple[str, str], Pieces], np.ndarray]:
    """The stream of each source and split that has documents, and the place of every document in its own."""
    names = list(dict.fromkeys(unit.source for unit in units))
    source_of_unit = np.array([names.index(unit.source) for unit in units], dtype=np.int32)
    source = source_of_unit[documents.unit] if units else documents.unit
    files = [str(unit.folder / unit_step.TOKENS_FILE) for unit in units]
    place = np.full(documents.num_tokens.size, -1, dtype=np.int64)
    found: dict[tuple[str, str], Pieces] = {}
    for split, of_split in ((TRAIN, kept & ~held_out), (VALIDATION, kept & held_out)):
        for index, name in enumerate(names):
            members = np.flatnonzero(of_split & (source == index))
            if members.size:
                length = documents.num_tokens[members]
                place[members] = np.cumsum(length) - length
                file = documents.unit[members].astype(np.int64)
                found[name, split] = merge_neighbours(files, file, documents.start[members], length)
    return found, place

"""The texts of each domain: of the sub-folders and files of a folder, or of the sources of a data folder."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import MANIFEST_FILE, read_manifest
from data_prep.reading.corpus import find_inputs
from data_prep.reading.documents import plan_units, read_unit
from data_prep.reading.file_kinds import compression, content_suffix, file_kind
from data_prep.reading.records import Document
from data_prep.reading.templates import Layout
from data_prep.tokenizing.tokenizer import Tokenizer
from evaluation.stored_documents import documents_in, shards_by_source


class Text(NamedTuple):
    """A document, encoded and as it reads."""

    tokens: Sequence[int] | NDArray[np.unsignedinteger]
    text: str


def domain_texts(folder: Path, tokenizer: Tokenizer, split: str) -> dict[str, Iterator[Text]]:
    """The documents of each domain, by its name; the split is that of a data folder.

    Raises:
        ValueError: no such folder, nothing in it that can be read, or it was encoded with another tokenizer.
    """
    if (folder / MANIFEST_FILE).is_file():
        return _stored(folder, tokenizer, split)
    return {name: _read(paths, tokenizer) for name, paths in sorted(_files(folder).items())}


def _stored(folder: Path, tokenizer: Tokenizer, split: str) -> dict[str, Iterator[Text]]:
    if read_manifest(folder).tokenizer_digest != tokenizer.digest:
        raise ValueError(f"{folder} was encoded with another tokenizer than the model's; score a folder of raw texts")

    def texts(shards: list[Path]) -> Iterator[Text]:
        for index in range(len(shards)):
            for _, tokens in documents_in(shards, index):
                yield Text(tokens, tokenizer.decode(tokens.tolist()))

    return {source: texts(shards) for source, shards in sorted(shards_by_source(folder, split).items())}


def _files(folder: Path) -> dict[str, list[str]]:
    """The files of each domain; a file and a sub-folder of one name are one domain."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with a sub-folder or a file per domain")
    found: dict[str, list[str]] = {}
    for entry in sorted(folder.iterdir()):
        below = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
        paths = [str(path) for path in below if path.is_file() and file_kind(str(path))]
        if paths and not entry.name.startswith("."):
            found.setdefault(entry.name if entry.is_dir() else _stem(entry.name), []).extend(paths)
    if not found:
        raise ValueError(f"{folder}: no file of a known kind in it; expected a sub-folder or a file per domain")
    return found


def _stem(name: str) -> str:
    """A file name without what tells its kind: `wiki.en` of `wiki.en.jsonl.gz`."""
    return name[: len(name) - len(content_suffix(name) + compression(name))] or name


def _read(paths: Sequence[str], tokenizer: Tokenizer) -> Iterator[Text]:
    num_bad_lines = 0
    for unit in plan_units(find_inputs(paths), Layout.named("auto")):
        for item in read_unit(unit):
            if isinstance(item, Document):
                yield Text(tokenizer.encode(item.text), item.text)
            else:
                num_bad_lines += 1
    if num_bad_lines:
        print(f"note: {num_bad_lines} lines of {paths[0]} ... gave no document and are not scored", file=sys.stderr)

"""A data folder, opened to be looked into: its documents, where their tokens lie, and their texts."""

import difflib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import config_file, generations
from data_prep.chat.chat_format import CHAT_FILE
from data_prep.fingerprint import fingerprint
from data_prep.generations import Generation
from data_prep.looking import raw_text
from data_prep.looking.documents_query import Bounds, DocumentsQuery, Row
from data_prep.looking.stream_places import ShardSpan, Stretch, stretches
from data_prep.manifest import ShardRecord
from data_prep.prepare_config import PrepareConfig
from data_prep.reading.chat import TURN_END, TURN_START
from data_prep.reading.file_kinds import is_url
from data_prep.reading.templates import Layout
from data_prep.shards import open_tokens, read_header
from data_prep.summary import read_lines
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer

SHORTEST_ID = 8
"""So many characters of a shard's identity name it."""
_NUM_SIMILAR, _NUM_COMPARED = 3, 5_000


class NotFoundError(ValueError):
    """What is asked for is not in the data folder; the message says what is."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard, with the generation whose streams it is cut from."""

    generation: int
    record: ShardRecord
    span: ShardSpan


@dataclass(frozen=True, slots=True)
class BadLineRecord:
    """A line that gave no document."""

    generation: int
    path: str
    line: int
    reason: str
    head: bytes


class PreparedFolder:
    """A data folder that was prepared in one generation or in several."""

    def __init__(self, folder: Path) -> None:
        if (folder / CHAT_FILE).is_file():
            raise NotFoundError(
                f"{folder} holds conversations; look at them with: python -m data_prep show-mask {folder}"
            )
        self.folder = folder
        self.generations: list[Generation] = generations.read_generations(folder)
        if not self.generations:
            raise NotFoundError(
                f"{folder}: not a prepared data folder, it has no {generations.FOLDER}; make one with make prepare-data"
            )
        tables = [generation.folder / generations.DOCUMENTS_FILE for generation in self.generations]
        self.documents = [DocumentsQuery(table, index) for index, table in enumerate(tables)]
        self.shards = [
            Shard(index, record, ShardSpan(record.file, start, record.token_count - 1))
            for index, generation in enumerate(self.generations)
            for record, start in generation.shards
        ]
        self._open_file: tuple[str, np.ndarray] = "", np.zeros(0)
        self._unchanged: dict[str, bool] = {}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of its shards."""
        return load_tokenizer(self.folder, eos_id=read_header(self.folder / self.shards[0].record.file).eos_id)

    @functools.cached_property
    def config(self) -> PrepareConfig:
        """The configuration that it was prepared with."""
        return config_file.load(self.folder / "prepare.toml", PrepareConfig)

    @property
    def published_name(self) -> str:
        """The name that the preparation gave it: while it is made, it has another."""
        return Path(self.config.output.folder).resolve().name

    def describe_tokenizer(self) -> str:
        """File, kind, size and end of documents of its tokenizer, in words."""
        tokenizer = self.tokenizer
        assert tokenizer.file is not None  # it was loaded
        kind, eos = tokenizer_kind(tokenizer.file, tokenizer.eos_id)
        return f"{tokenizer.file_name}, {kind} of {tokenizer.vocab_size:,} tokens; documents end with {eos}"

    def layout_of(self, source: str) -> Layout:
        """How the files of a source are read."""
        return self.config.sources.get(source, self.config.input).read_layout()

    def shard(self, name: str) -> Shard:
        """The shard that is given by its file in the folder, a path, a file name, or the beginning of its identity.

        Raises:
            NotFoundError: none or several fit.
        """
        place = Path(name).absolute()
        fitting = [s for s in self.shards if s.record.file == name or (self.folder / s.record.file).absolute() == place]
        if not fitting:
            fitting = [s for s in self.shards if s.record.file.endswith(f"/{name}") or self._has_identity(s, name)]
        if not fitting and place.is_file():  # a copy elsewhere
            fitting = [s for s in self.shards if s.record.fingerprint == fingerprint(place)]
        if len(fitting) != 1:
            known = [s.record.file for s in fitting or self.shards]
            examples = ", ".join(known[:_NUM_SIMILAR]) + (", ..." if len(known) > _NUM_SIMILAR else "")
            finding = "fits several" if fitting else "is none"
            raise NotFoundError(f"{name}: {finding} of the shards of {self.folder}, as {examples}")
        return fitting[0]

    @staticmethod
    def _has_identity(shard: Shard, name: str) -> bool:
        return len(name) >= SHORTEST_ID and shard.record.fingerprint.file_id.startswith(name)

    def stretches_of(self, row: Row) -> list[Stretch]:
        """Where the shards hold a kept document, its EOS included."""
        return stretches(self._stream_of(row), *row.extent)

    def text(self, row: Row) -> str:
        """The text of a kept document, as its tokens say it."""
        parts = [self.tokens(stretch) for stretch in self.stretches_of(row)]
        return self.decode(np.concatenate(parts)[:-1])

    def tokens(self, stretch: Stretch) -> np.ndarray:
        """Ids in a shard."""
        return np.array(self._opened(stretch.file)[stretch.first : stretch.stop])

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ids, with the marks of chat turns, which a tokenizer leaves out."""
        names = {self.tokenizer.special_id(name): name for name in (TURN_START, TURN_END)}
        marks = np.flatnonzero(np.isin(tokens, [number for number in names if number is not None]))
        parts: list[str] = []
        for first, stop in zip([0, *(marks + 1).tolist()], [*marks.tolist(), tokens.size], strict=True):
            parts.append(self.tokenizer.decode(tokens[first:stop].tolist()))
            parts.append(names[int(tokens[stop])] if stop < tokens.size else "")
        return "".join(parts)

    def raw_text(self, row: Row, most_bytes: int | None = None) -> str | None:
        """The text as it stands in the raw file; None if that is gone, or is not what was prepared."""
        if not self._is_unchanged(row.path):
            return None
        return raw_text.read_again(row.path, row.place, self.layout_of(row.source), most_bytes)

    def rows_between(self, shard: Shard, first: int, stop: int) -> Iterator[Row]:
        """The documents that hold the places first to stop of the stream of a shard, in order."""
        import pyarrow.compute as pc

        query, record = self.documents[shard.generation], shard.record
        end = pc.field("start") + pc.field("num_tokens").cast("int64")
        where = (pc.field("source") == record.source) & (pc.field("split") == record.split)
        where &= (pc.field("start") < stop) & (end > first)
        bounds: Bounds = {
            "source": (record.source, record.source),
            "split": (record.split, record.split),
            "start": (first - query.longest(), stop - 1),
        }
        for row in query.select(where, ["source", "split", "start", "num_tokens"], bounds):
            yield row
            if row.extent[1] >= stop:  # documents of a stream stand in its order: none follows
                return

    def find(self, path: str, *, place: int | None = None, line: int | None = None) -> list[Row]:
        """The documents at a place, or at a line, or of a whole file; oldest first."""
        import pyarrow.compute as pc

        where, columns, bounds = pc.field("path") == path, ["path"], {"path": (path, path)}
        for name, value in (("place", place), ("line", line)):
            if value is not None:
                where &= pc.field(name) == value
                columns, bounds = [*columns, name], {**bounds, name: (value, value)}
        return [row for query in self.documents for row in query.select(where, columns, bounds)]

    def original(self, row: Row) -> Row | None:
        """The kept document that a duplicate repeats; None if another data folder holds it."""
        seen: set[Row] = set()  # an id may be that of several rows, if a file was prepared twice
        while row.duplicate_of is not None and row not in seen:
            seen.add(row)
            path, _, place = row.duplicate_of.rpartition("#")
            older = [found for found in self.find(path, place=int(place)) if found not in seen]
            if not older:
                return None
            row = next((found for found in older if found.is_kept), older[0])
        return row if row.is_kept else None

    def bad_lines(self, path: str | None = None) -> Iterator[BadLineRecord]:
        """The lines that gave no document: of a file, or all."""
        for index, generation in enumerate(self.generations):
            for item in read_lines(generation.folder / generations.BAD_LINES_FILE):
                if path is None or item["path"] == path:
                    head = bytes.fromhex(item["head"])
                    yield BadLineRecord(index, item["path"], item["line"], item["reason"], head)

    def paths(self) -> dict[str, None]:
        """Every raw file that gave a document or a bad line."""
        found: dict[str, None] = {}
        for query in self.documents:
            for table in query.tables(["path"]):
                found |= dict.fromkeys(table["path"].unique().to_pylist())
        return found | dict.fromkeys(bad.path for bad in self.bad_lines())

    def full_path(self, name: str) -> str:
        """The raw file that is meant by its path, or by the end of it.

        Raises:
            NotFoundError: none or several fit; the message names the nearest.
        """
        known = self.paths()
        if name in known:
            return name
        fitting = [path for path in known if path.endswith(f"/{name}") or path == str(Path(name).absolute())]
        if len(fitting) == 1:
            return fitting[0]
        by_name = [path for path in known if path.rpartition("/")[2] == name.rpartition("/")[2]]
        some = list(known)[:_NUM_COMPARED]
        nearest = fitting or by_name or difflib.get_close_matches(name, some, n=_NUM_SIMILAR, cutoff=0)
        finding = f"fits {len(fitting)} input files" if fitting else "no input file"
        raise NotFoundError(f"{name}: {finding} of {self.folder}; nearest: {', '.join(nearest[:_NUM_SIMILAR])}")

    def neighbours(self, path: str, place: int | None, line: int | None) -> list[tuple[int, int]]:
        """Place and line of the documents of a file that lie before and behind a place, or a line."""
        import pyarrow.compute as pc

        found = [np.zeros((2, 0), dtype=np.int64)]
        for query in self.documents:
            for table in query.tables(["path", "place", "line"], {"path": (path, path)}):
                own = table.filter(pc.field("path") == path)
                found.append(np.stack([own[name].to_numpy().astype(np.int64) for name in ("place", "line")]))
        known = np.concatenate(found, axis=1)
        numbers, wanted = (known[0], place) if place is not None else (known[1], line or 0)
        before, behind = np.flatnonzero(numbers < wanted), np.flatnonzero(numbers > wanted)
        ranks = [before[numbers[before].argmax()]] if before.size else []
        ranks += [behind[numbers[behind].argmin()]] if behind.size else []
        return [(int(known[0, rank]), int(known[1, rank])) for rank in ranks]

    def summaries(self) -> list[dict[str, dict]]:
        """For each generation the table of each of its sources; see `summary`."""
        folders = [generation.folder for generation in self.generations]
        return [json.loads((f / generations.SUMMARY_FILE).read_text(encoding="utf-8"))["sources"] for f in folders]

    def _is_unchanged(self, path: str) -> bool:
        """Whether a local file has the content that was prepared; of remote ones nothing is asked."""
        if is_url(path):
            return True
        if path not in self._unchanged:
            try:
                self._unchanged[path] = fingerprint(path).file_id in self._input_ids
            except OSError:
                self._unchanged[path] = False
        return self._unchanged[path]

    @functools.cached_property
    def _input_ids(self) -> set[str]:
        """Fingerprints of the input files, without what `storage.identity` adds to them."""
        inputs = (item for generation in self.generations for item in generation.inputs)
        return {"-".join(item.file_id.split("-")[:3]) for item in inputs}

    def _opened(self, file: str) -> np.ndarray:
        if file != self._open_file[0]:  # neighbours are asked for one after the other
            self._open_file = file, open_tokens(self.folder / file)
        return self._open_file[1]

    def _stream_of(self, row: Row) -> list[ShardSpan]:
        key = (row.generation, row.source, row.split)
        return [s.span for s in self.shards if (s.generation, s.record.source, s.record.split) == key]


def tokenizer_kind(file: Path, eos_id: int) -> tuple[str, str]:
    """The kind of a tokenizer's file, and the name of the token that ends documents, as far as the file tells them."""
    if file.suffix != ".json":
        return "sentencepiece", f"id {eos_id}"
    table = json.loads(file.read_bytes())
    kind = str(table["model"].get("type") or "BPE")
    if (table.get("decoder") or {}).get("type") == "ByteLevel":
        kind = f"byte-level {kind}"
    names = [token["content"] for token in table.get("added_tokens", ()) if token["id"] == eos_id]
    return kind, f"id {eos_id}" + (f", {names[0]}" if names else "")

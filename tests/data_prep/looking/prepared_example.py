"""A small data folder of two generations, written by the writers of the formats, with something of everything in it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import config_file, generations
from data_prep.documents_table import DocumentsWriter
from data_prep.generations import Input
from data_prep.manifest import Manifest, ShardRecord, record_shard, write_manifest
from data_prep.prepare_config import OutputConfig, PrepareConfig, SourceConfig
from data_prep.reading import storage
from data_prep.shards import write_shard
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe

SHARD_TOKENS, SAMPLE_TOKENS = 96, 16
SCRIPT = "<script>alert('owned')</script> & <b>bold</b> 数据准备的报告"
LONG = "The harbour was quiet in the morning, and the boats lay still. " * 6
TEXTS = {
    "first": "A first document, of which a later one is a copy; it is long enough to be kept.",
    "long": LONG,
    "near": LONG + "But not for long.",
    "script": f"A page of the web that holds {SCRIPT} in its middle.",
    "held out": "What is held out is never trained on.",
    "later": "A document of the second preparation, that nothing repeats: 第二次准备。",
    "note": "A whole file\nof two lines.\n",
}


@dataclass(slots=True)
class Example:
    """The folder, what was read for it, and what every stream should hold."""

    folder: Path
    raw: Path
    tokenizer: Tokenizer
    streams: dict[tuple[int, str, str], list[tuple[str, int]]] = field(default_factory=dict)
    """By generation, source and split: for each token the id of its document, and the token."""
    places: dict[str, list[int]] = field(default_factory=dict)
    """For each raw file the byte offsets of its lines."""

    def id(self, name: str, line: int) -> str:
        return f"{self.raw / name}#{self.places[name][line - 1]}"


def make(place: Path) -> Example:
    """Two generations: web.jsonl; then more.jsonl and the whole file note.txt."""
    raw, folder = place / "raw", place / "out"
    raw.mkdir()
    tokenizer = train_bpe(TEXTS.values(), 300)
    example = Example(folder, raw, tokenizer)
    folder.mkdir()
    tokenizer.save(folder)
    web = ["first", None, "short", "long", "first", "near", "script", "held out"]
    _write_jsonl(example, "web.jsonl", web)
    rows = [
        _row(example, "web.jsonl", 1, "first"),
        _row(example, "web.jsonl", 3, "short", verdict="text.length"),
        _row(example, "web.jsonl", 4, "long"),
        _row(example, "web.jsonl", 5, "first", verdict="exact duplicate", duplicate_of=example.id("web.jsonl", 1)),
        _row(example, "web.jsonl", 6, "near", verdict="near duplicate", duplicate_of=example.id("web.jsonl", 4)),
        _row(example, "web.jsonl", 7, "script"),
        _row(example, "web.jsonl", 8, "held out", split="validation"),
    ]
    bad = [{"path": str(raw / "web.jsonl"), "line": 2, "reason": "invalid JSON", "head": b'{"text": \xff<i>'.hex()}]
    records = _add_generation(example, 0, rows, bad)
    _write_jsonl(example, "more.jsonl", ["script", "later", "later"])
    (raw / "note.txt").write_text(TEXTS["note"], encoding="utf-8")
    example.places["note.txt"] = [0]
    rows = [
        _row(example, "more.jsonl", 1, "script", verdict="exact duplicate", duplicate_of=example.id("web.jsonl", 7)),
        _row(example, "more.jsonl", 2, "later"),
        _row(example, "more.jsonl", 3, "later", verdict="near duplicate", duplicate_of="elsewhere/old.jsonl#77"),
        _row(example, "note.txt", 1, "note", source="notes"),
    ]
    records += _add_generation(example, 1, rows, [])
    write_manifest(folder, _manifest(tokenizer, records))
    return example


def _write_jsonl(example: Example, name: str, texts: Sequence[str | None]) -> None:
    lines = [b'{"text": \xff<i>' if t is None else json.dumps({"text": TEXTS.get(t, t)}).encode() for t in texts]
    example.places[name] = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1].tolist()
    (example.raw / name).write_bytes(b"\n".join([*lines, b""]))


def _row(
    example: Example, name: str, line: int, text: str, *, source: str = "web", split: str = "train", **verdict: Any
):
    text = TEXTS.get(text, text)
    row = {"path": str(example.raw / name), "line": line, "place": example.places[name][line - 1], "source": source}
    row |= {"text": text, "split": split, "verdict": "kept", "duplicate_of": None, **verdict}
    row["text_bytes"] = len(text.encode())
    return row


def _add_generation(
    example: Example, number: int, rows: list[dict[str, Any]], bad: list[dict[str, Any]]
) -> list[ShardRecord]:
    folder = generations.folder_of(example.folder, number)
    folder.mkdir(parents=True)
    streams: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        tokens = [*example.tokenizer.encode(row["text"]), example.tokenizer.eos_id]
        is_kept = row["verdict"] == "kept"
        is_filtered = not is_kept and row["duplicate_of"] is None
        stream = streams.setdefault((row["source"], row["split"]), []) if is_kept else []
        row |= {"start": len(stream) if is_kept else None, "num_tokens": None if is_filtered else len(tokens)}
        row |= {"split": row["split"] if is_kept else None, "language": None if is_filtered else "en"}
        row["text_bytes"] = None if is_filtered else row["text_bytes"]
        if is_kept:
            key = number, row["source"], row["split"]
            example.streams.setdefault(key, []).extend((f"{row['path']}#{row['place']}", token) for token in tokens)
            stream += tokens
    with DocumentsWriter(folder / generations.DOCUMENTS_FILE) as table:
        columns = ("path", "line", "place", "source", "language", "verdict", "duplicate_of", "split", "start")
        table.add({name: [row[name] for row in rows] for name in (*columns, "num_tokens", "text_bytes")})
    names = dict.fromkeys(Path(row["path"]).name for row in rows)
    inputs = [Input("web", name, storage.identity(str(example.raw / name))) for name in names]
    generations.write_inputs(folder, {"v": 1}, inputs)
    shards = [shard for key, stream in streams.items() for shard in _cut(example, number, *key, stream)]
    generations.write_shards(folder, shards)
    lines = "".join(json.dumps(item) + "\n" for item in bad)
    (folder / generations.BAD_LINES_FILE).write_text(lines, encoding="utf-8")
    sources = {name: _summary(example, name, rows, bad) for name in dict.fromkeys(row["source"] for row in rows)}
    (folder / generations.SUMMARY_FILE).write_text(json.dumps({"sources": sources}), encoding="utf-8")
    output = OutputConfig(folder="data/<example>", shard_tokens=SHARD_TOKENS, sample_tokens=SAMPLE_TOKENS)
    config = PrepareConfig(
        sources={"web": SourceConfig(text_field="text", licence="CC0 & more"), "notes": SourceConfig()}, output=output
    )
    (example.folder / "prepare.toml").write_text(config_file.to_toml(config), encoding="utf-8")
    return [record for record, _ in shards]


def _cut(
    example: Example, generation: int, source: str, split: str, stream: list[int]
) -> list[tuple[ShardRecord, int]]:
    tokenizer, shards = example.tokenizer, []
    whole = np.array([tokenizer.eos_id, *stream], dtype="<u2")
    (example.folder / split).mkdir(exist_ok=True)
    for start in range(0, len(stream), SHARD_TOKENS):
        number = len(list((example.folder / split).glob(f"{source}-*.bin")))
        path = example.folder / split / f"{source}-{number:05d}.bin"
        options = {"vocab_size": tokenizer.vocab_size, "tokenizer_digest": tokenizer.digest, "eos_id": tokenizer.eos_id}
        header = write_shard(path, [whole[start : start + SHARD_TOKENS + 1]], **options)
        record = record_shard(example.folder, path, header, source=source, sample_tokens=SAMPLE_TOKENS)
        shards.append((record, start))
    return shards


def _summary(example: Example, source: str, rows: list[dict[str, Any]], bad: list[dict[str, Any]]) -> dict[str, Any]:
    own = [row for row in rows if row["source"] == source]
    kept = [row for row in own if row["verdict"] == "kept"]

    def counts(found: list[dict[str, Any]]) -> dict[str, int]:
        texts = sum(row["text_bytes"] for row in found)
        return {"documents": len(found), "text_bytes": texts, "tokens": sum(row["num_tokens"] for row in found)}

    dropped = [row for row in own if row["num_tokens"] is None]
    return {
        "files": len({row["path"] for row in own}),
        "input_bytes": sum((example.raw / Path(path).name).stat().st_size for path in {row["path"] for row in own}),
        "read_bytes": sum(len(row["text"].encode()) for row in own),
        **counts(kept),
        "splits": {split: counts([row for row in kept if row["split"] == split]) for split in ("train", "validation")},
        "exact_duplicates": counts([row for row in own if row["verdict"] == "exact duplicate"]),
        "near_duplicates": counts([row for row in own if row["verdict"] == "near duplicate"]),
        "dropped": {row["verdict"]: 1 for row in dropped},
        "bad": {item["reason"]: 1 for item in bad} if source == "web" else {},
        "masked": {"email": 3} if source == "web" else {},
        "languages": {"en": len(own) - len(dropped)},
        "length_histogram": [[64, len(kept) - 1], [256, 1]],
        "samples": {
            row["verdict"]: [{"id": f"{row['path']}#{row['place']}", "line": row["line"], "text": row["text"]}]
            for row in dropped
        },
        "bad_lines": {item["reason"]: [item] for item in bad} if source == "web" else {},
        "licence": "CC0 & more" if source == "web" else "",
    }


def _manifest(tokenizer: Tokenizer, records: list[ShardRecord]) -> Manifest:
    return Manifest(
        tokenizer_file=tokenizer.file_name,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sample_tokens=SAMPLE_TOKENS,
        shards=tuple(records),
    )

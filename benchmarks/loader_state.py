"""The data state of a run over a trillion tokens: what a lookup, a save and a restart cost.

2,440 shards of 200,000 samples of 2,048 tokens, 2 TB of uint16. Where files are needed they are sparse: a real header,
and behind it a hole that reads as zeros and takes no space.
"""

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.loader_data import EOS_ID, TOKENIZER_DIGEST
from benchmarks.table import Table
from data_prep import publish
from data_prep.fingerprint import HEAD_BYTES, TAIL_BYTES
from data_prep.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from data_prep.shards import HEADER_BYTES, ShardHeader, _format_header
from model.config import ModelConfig
from resume import state as states
from resume.ledger import Ledger
from resume.manifest import listed_files
from resume.order import Order
from resume.state import DataState
from resume.verify import StatCache
from train import ranks
from train.config import RunConfig, with_values
from train.feed import Feed

NUM_FILES = 2_440
SEQUENCE_LENGTH = 2_048
_SAMPLES_PER_FILE = 200_000
_TOKENS_PER_FILE = _SAMPLES_PER_FILE * SEQUENCE_LENGTH + 1
_FILE_BYTES = HEADER_BYTES + 2 * _TOKENS_PER_FILE
_BATCH_SEQUENCES = 512
_VOCAB_SIZE = 32_000
_APPENDS = (0, 10, 50, 200)
_BLOCK_POSITIONS = 4_096
_REPEATS = 20


def lookups(folder: Path) -> Table:
    """CPU time of resolving positions after appends, each of one file, evenly over the first half of the data."""
    rows: list[list[str | float | None]] = []
    for num_appends in _APPENDS:
        state = _state(num_appends)
        started_s = time.process_time()
        order = Order(state)
        replay_ms = (time.process_time() - started_s) * 1e3
        costs = sorted(_lookup_costs(order))
        rows.append([str(num_appends), costs[0], statistics.median(costs), replay_ms])
    return Table(
        f"Lookup of a position among {NUM_FILES * _SAMPLES_PER_FILE:,} samples, in blocks of {_BLOCK_POSITIONS:,}",
        ["appends", "CPU us/sample best", "median", "replay of the state, CPU ms"],
        rows,
    )


def state_sizes(folder: Path) -> Table:
    """Bytes and durability of what a checkpoint holds of the data."""
    plain = _state(0)
    size_bytes = _json_bytes(plain)
    grown = states.append(dataclasses.replace(plain, position=512), {states.WHOLE: [_file_id("another")]})
    skipped = states.skip(plain, 10)
    ids = plain.sources[states.WHOLE]
    saves: list[float] = []
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        publish.write_text(folder / "data_state.json", json.dumps(plain.to_json()))
        saves.append((time.perf_counter() - started_s) * 1e3)
    rows: list[list[str | float | None]] = [
        [f"data state, {NUM_FILES:,} files", size_bytes, "bytes"],
        ["the same without its files", size_bytes - len(json.dumps(ids)), "bytes"],
        ["an append of one file", _json_bytes(grown) - size_bytes, "bytes more"],
        ["a skip", _json_bytes(skipped) - size_bytes, "bytes more"],
        ["books: counts and digests of files", len(json.dumps(Ledger(ids).to_json())), "bytes"],
        ["save of the state, fsync included, best", min(saves), "ms"],
        ["median", statistics.median(saves), "ms"],
    ]
    return Table("State of a run over 1T tokens", ["what", "value", "unit"], rows)


def restart(folder: Path) -> Table:
    """Wall time from the manifest on disk to the first step's rows, with `data.verify = stat`."""
    data, run = folder / "trillion", folder / "run"
    _write_sparse_data(data)
    state = _state(0, [record.fingerprint.file_id for record in read_manifest(data).shards])
    state_path = folder / "restart_state.json"
    publish.write_text(state_path, json.dumps(dataclasses.replace(state, position=1_000 * _BATCH_SEQUENCES).to_json()))
    StatCache(run).write(listed_files({data: read_manifest(data)}, "train"))
    config = with_values(
        RunConfig(model=ModelConfig.preset("tinyllama-1.1b")),
        run={"dir": str(run)},
        data={"paths": (str(data),), "sequence_length": SEQUENCE_LENGTH, "batch_sequences": _BATCH_SEQUENCES},
    )
    this = ranks.start("cpu")
    try:
        measured = [_restart(config, this, data, state_path) for _ in range(5)]
    finally:
        ranks.stop()
    names = list(measured[0])
    rows: list[list[str | float | None]] = []
    for name in [*names, "together"]:
        times = sorted(sum(times.values()) if name == "together" else times[name] for times in measured)
        rows.append([name, times[0] * 1e3, statistics.median(times) * 1e3])
    return Table(
        f"Restart: {NUM_FILES:,} files, {NUM_FILES * _FILE_BYTES / 1e12:.1f} TB apparent, verification by stat",
        ["part", "wall ms best", "median"],
        rows,
        "warm cache; importing torch and loading the model are not part of it",
    )


def _restart(config: RunConfig, this: ranks.Ranks, data: Path, state_path: Path) -> dict[str, float]:
    marks = [time.perf_counter()]
    listed = listed_files({data: read_manifest(data)}, "train")
    marks.append(time.perf_counter())
    state = states.from_json(json.loads(state_path.read_text()))
    marks.append(time.perf_counter())
    feed = Feed(config, this, state, None, listed, [])
    try:
        marks.append(time.perf_counter())
        micro_batches = feed.next_step()
        marks.append(time.perf_counter())
        assert sum(micro_batch.num_targets for micro_batch in micro_batches) == _BATCH_SEQUENCES * SEQUENCE_LENGTH
    finally:
        feed.close()
    parts = ["read the manifest", "read the state", "find and check files, order", "first step's rows"]
    return {name: end - start for name, start, end in zip(parts, marks, marks[1:])}


def _state(num_appends: int, file_ids: list[str] | None = None) -> DataState:
    """A run over a trillion tokens; with appends, it stands in the middle of the data."""
    file_ids = file_ids or [_file_id(i) for i in range(NUM_FILES)]
    first = len(file_ids) - num_appends
    state = states.start(
        {"web": file_ids[:first]},
        seed=3407,
        sequence_length=SEQUENCE_LENGTH,
        batch_sequences=_BATCH_SEQUENCES,
        tokenizer_digest=TOKENIZER_DIGEST,
        eos_id=EOS_ID,
    )
    if num_appends:
        between = NUM_FILES * _SAMPLES_PER_FILE // (2 * num_appends) // _BATCH_SEQUENCES * _BATCH_SEQUENCES
        for file_id in file_ids[first:]:
            state = dataclasses.replace(state, position=state.position + between)
            state = states.append(state, {"web": [file_id]})
    return state


def _lookup_costs(order: Order) -> Iterator[float]:
    for i in range(_REPEATS):
        first = order.state.position + i * _BLOCK_POSITIONS
        positions = np.arange(first, first + _BLOCK_POSITIONS)
        started_s = time.process_time()
        order.resolve(positions)
        yield (time.process_time() - started_s) / _BLOCK_POSITIONS * 1e6


def _json_bytes(state: DataState) -> int:
    return len(json.dumps(state.to_json()))


def _file_id(name: object) -> str:
    digest = hashlib.md5(str(name).encode(), usedforsecurity=False).hexdigest()
    return f"{digest}-{digest[::-1]}-{_FILE_BYTES}"


def _write_sparse_data(folder: Path) -> None:
    """A data folder with its manifest, whose shards differ in their headers and have no content."""
    (folder / "train").mkdir(parents=True)
    rest_of_head = bytes(HEAD_BYTES - HEADER_BYTES)
    md5_tail = hashlib.md5(bytes(TAIL_BYTES), usedforsecurity=False).hexdigest()
    records: list[ShardRecord] = []
    for i in range(NUM_FILES):
        header = ShardHeader("uint16", _VOCAB_SIZE, TOKENIZER_DIGEST, EOS_ID, _TOKENS_PER_FILE, 0, f"{i:032x}")
        head = _format_header(header)
        path = folder / "train" / f"sparse-{i:05d}.bin"
        path.write_bytes(head)
        os.truncate(path, _FILE_BYTES)
        records.append(
            ShardRecord(
                file=path.relative_to(folder).as_posix(),
                split="train",
                source="web",
                size_bytes=_FILE_BYTES,
                md5_head=hashlib.md5(head + rest_of_head, usedforsecurity=False).hexdigest(),
                md5_tail=md5_tail,
                payload_xxh3=header.payload_xxh3,
                dtype=header.dtype,
                token_count=header.token_count,
                document_count=0,
                sample_count=_SAMPLES_PER_FILE,
            )
        )
    manifest = Manifest(
        tokenizer_file="none",
        tokenizer_digest=TOKENIZER_DIGEST,
        vocab_size=_VOCAB_SIZE,
        eos_id=EOS_ID,
        sample_tokens=SEQUENCE_LENGTH,
        shards=tuple(records),
    )
    write_manifest(folder, manifest)

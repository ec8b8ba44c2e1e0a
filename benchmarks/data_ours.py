"""This project's ways from JSON lines to shards, and the parts of them, for the benchmark of data preparation.

python -m benchmarks.data_ours WAY JOB     (started by benchmarks.data)
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_child import TOKENS, Finished, Job, Stream, Way, serve
from data_prep import pipeline
from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.clean_config import CleanConfig
from data_prep.duplicates import near_duplicates
from data_prep.duplicates.dedup_config import DecontaminateConfig, DedupConfig
from data_prep.duplicates.minhash import exact_hash
from data_prep.engine import EngineConfig
from data_prep.generations import DOCUMENTS_FILE, folder_of
from data_prep.prepare_config import InputConfig, OutputConfig, PrepareConfig, SourceConfig, TokenizerConfig
from data_prep.reading.corpus import find_inputs
from data_prep.reading.documents import Document, plan_units, read_unit
from data_prep.reading.templates import Layout
from data_prep.shards import HEADER_BYTES
from data_prep.tokenizing.encoders import encoder_named, fastest_encoder
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.unit_step import BATCH_CHARACTERS, BATCH_DOCUMENTS, Recipe, UnitTask, process_unit

NOTHING_CLEANED = CleanConfig(filters=(), mask=(), normalise=False)
NO_DEDUP = DedupConfig(exact=False, near="off")
_LAYOUT = "text"


def raw_encode(job: Job) -> Finished:
    """The limit: the fastest encoder alone, in as many processes, on texts that they hold in memory."""
    context = multiprocessing.get_context("spawn")
    name = fastest_encoder(load_tokenizer(job.tokenizer, eos_id=job.eos_id)).name
    barrier, times = context.Barrier(job.num_workers), context.SimpleQueue()
    shares = np.array_split(np.arange(len(job.files)), job.num_workers)
    processes = [
        context.Process(target=_raw_process, args=(job, name, index, share.tolist(), barrier, times))
        for index, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    spans = [times.get() for _ in processes]
    for process in processes:
        process.join()
    elapsed_s = max(stop_s for _, stop_s, _ in spans) - min(start_s for start_s, _, _ in spans)
    streams = [Stream(str(_raw_file(job, index))) for index in range(job.num_workers)]
    cpu_s = sum(cpu_s for _, _, cpu_s in spans)
    return Finished(streams, list(range(len(job.files))), {"encoder": name}, elapsed_s, cpu_s)


def _raw_process(job: Job, name: str, index: int, share: Sequence[int], barrier: Any, times: Any) -> None:
    encoder = encoder_named(load_tokenizer(job.tokenizer, eos_id=job.eos_id), name)
    batches = list(_batches(text for i in share for text in _texts(job.files[i])))
    encoder.encode_arrays(["warm"])
    barrier.wait()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    ids = [part for batch in batches for part in encoder.encode_arrays(batch)]
    times.put((started_s, time.perf_counter(), time.process_time() - started_cpu_s))
    eos = np.array([job.eos_id], dtype=TOKENS)
    np.concatenate([part for document in ids for part in (document.astype(TOKENS), eos)]).tofile(_raw_file(job, index))


def _raw_file(job: Job, index: int) -> Path:
    return Path(job.folder) / f"raw-{index}.bin"


def plain(job: Job) -> Finished:
    """`data_prep.pipeline`, nothing cleaned, no duplicates looked for."""
    source = InputConfig(paths=job.files, layout=_LAYOUT, kind="code", source="text")
    return _prepare(job, 0.0, input=source, clean=NOTHING_CLEANED, dedup=NO_DEDUP)


def full(job: Job) -> Finished:
    """`data_prep.pipeline` as it is by default, files by kind. Option "by_kind": {kind: files}."""
    sources = {
        kind: SourceConfig(paths=tuple(files), layout=_LAYOUT, kind="code" if kind == "code" else "prose")
        for kind, files in job.options["by_kind"].items()
    }
    return _prepare(job, OutputConfig().validation_fraction, sources=sources)


def _prepare(job: Job, validation_fraction: float, **sections: Any) -> Finished:
    """Option "engine": where it runs."""
    folder = Path(job.folder) / "data"
    config = PrepareConfig(
        **sections,
        tokenizer=TokenizerConfig(path=job.tokenizer),
        output=OutputConfig(folder=str(folder), validation_fraction=validation_fraction),
        engine=EngineConfig(kind=job.options["engine"], num_workers=job.num_workers),
    )
    started_s = time.perf_counter()
    made = pipeline.prepare(config)
    elapsed_s = time.perf_counter() - started_s
    # The first token of a shard is the last of the one before.
    streams = [Stream(str(folder / shard.file), HEADER_BYTES + TOKENS.itemsize) for shard in made.shards]
    return Finished(streams, list(range(len(job.files))), _verdicts(folder), elapsed_s)


def _verdicts(folder: Path) -> dict[str, Any]:
    """How many documents were kept, and what became of the copies in files whose name ends in "-1.jsonl"."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder_of(folder, 0) / DOCUMENTS_FILE, columns=["path", "line", "verdict"])
    verdicts = table["verdict"].to_pylist()
    rows = sorted(zip(table["path"].to_pylist(), table["line"].to_pylist(), verdicts, strict=True))
    copies = [verdict for path, _, verdict in rows if path.endswith("-1.jsonl")]
    return {"documents": len(verdicts), "kept": verdicts.count("kept"), "copies": copies}


def steps(job: Job) -> Finished:
    """Each step alone, in this process, on option "by_kind": {kind: files}, at most option "most_bytes" of each."""
    rows: list[dict[str, Any]] = []
    tokenizer = load_tokenizer(job.tokenizer, eos_id=job.eos_id)
    encoder = encoder_named(tokenizer, fastest_encoder(tokenizer).name)
    for kind, files in job.options["by_kind"].items():
        path = _beginning(Path(files[0]), Path(job.folder) / f"{kind}.jsonl", job.options["most_bytes"])
        texts = list(_texts(str(path)))
        batches = list(_batches(texts))
        clean_kind = "code" if kind == "code" else "prose"
        text_bytes = sum(len(text.encode("utf-8")) for text in texts)
        cleaner, sketch = Cleaner(CleanConfig()), near_duplicates.sketcher("minhash")
        assert sketch is not None
        timed: dict[str, Callable[[], object]] = {
            "read": lambda path=path: sum(isinstance(item, Document) for item in _read(path)),
            "normalise": lambda t=texts, k=clean_kind, c=cleaner: [c.normalise(text, k) for text in t],
            "judge": lambda t=texts, k=clean_kind, c=cleaner: [(c.judge(text, k), c.language(text, k)) for text in t],
            "exact hash": lambda t=texts: [exact_hash(text) for text in t],
            "sketch": lambda b=batches, s=sketch: [s(batch) for batch in b],
            "encode": lambda b=batches: [encoder.encode_arrays(batch) for batch in b],
            "unit, nothing cleaned": _unit_step(job, path, clean_kind, encoder.name, NOTHING_CLEANED, "off"),
            "unit, all": _unit_step(job, path, clean_kind, encoder.name, CleanConfig(), "minhash"),
        }
        rows += [
            {"kind": kind, "step": step, "mb_per_cpu_s": text_bytes / 1e6 / _cpu_s(f)} for step, f in timed.items()
        ]
    return Finished([], [], {"rows": rows, "encoder": encoder.name})


def _unit_step(job: Job, path: Path, kind: str, encoder: str, clean: CleanConfig, near: str) -> Callable[[], object]:
    tokenizer = load_tokenizer(job.tokenizer, eos_id=job.eos_id)
    recipe = Recipe(
        tokenizer_file=job.tokenizer,
        tokenizer_digest=tokenizer.digest,
        eos_id=job.eos_id,
        vocab_size=job.vocab_size,
        marks=(),
        encoder=encoder,
        clean=clean,
        decontaminate=DecontaminateConfig(),
        exact=near != "off",
        near=near,
        kind=kind,
    )
    (unit,) = _units(path)
    folder = Path(job.folder) / f"unit-{path.stem}-{near}"
    # A worker loads tokenizer and encoder once, for all its units.
    process_unit(UnitTask(replace(unit, stop=1), recipe, f"{folder}-first"))
    return lambda: process_unit(UnitTask(unit, recipe, str(folder)))


def _cpu_s(function: Callable[[], object]) -> float:
    started_s = time.process_time()
    function()
    return time.process_time() - started_s


def _beginning(path: Path, copy: Path, most_bytes: int) -> Path:
    with path.open("rb") as file, copy.open("wb") as out:
        while most_bytes > 0 and (line := file.readline()):
            most_bytes -= out.write(line)
    return copy


def _read(path: Path) -> Iterator[object]:
    for unit in _units(path):
        yield from read_unit(unit)


def _units(path: Path) -> list[Any]:
    return plan_units(find_inputs([str(path)]), Layout.named(_LAYOUT))


def _texts(path: str) -> Iterator[str]:
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """As the unit step makes them."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


WAYS: dict[str, Way] = {
    "raw_encode": raw_encode,
    "plain": plain,
    "full": full,
    "steps": steps,
}

if __name__ == "__main__":
    # One thread a process: the processes are the parallelism.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    raise SystemExit(serve(WAYS, sys.argv[1:]))

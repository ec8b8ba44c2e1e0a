"""Other ways from JSON lines to token files, for the benchmark of data preparation.

Steel-LLM's, Megatron-LM's, nanoGPT's and TinyLlama's ways are written anew from what they do, operation by operation
where it costs time; datatrove, and `datasets` for nanoGPT, are themselves, if they are installed. All use the same
tokenizer.json, through the library that each of them uses, and end documents with the same token. Where they are spared
work, their docstrings say so.

    python -m benchmarks.data_peers WAY JOB     (started by benchmarks.data)
"""

import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_child import TOKENS, Finished, Job, Stream, Way, serve
from data_prep.tokenizing.backends import load_backend
from data_prep.tokenizing.byte_pairs import SPLIT_PATTERN

# TinyLlama's blocks of a chunk; Steel-LLM takes 200 times as many.
_CHUNK_TOKENS = 2_049 * 1_024
_CHUNK_HEADER = b"LITPKDS\0" + bytes(16)
_STEEL_LINES = 10_000
_MEGATRON_LINES = 32
_ARROW_ROWS = 1_000
_MEMMAP_SHARDS = 1_024

_processes = multiprocessing.get_context("fork")  # as they have it, on Linux


class PackedBuilder:
    """TinyLlama's writer: a chunk of fixed size, filled with a separator, written when it is full.

    Source: PackedDatasetBuilder in lit_gpt/packed_dataset.py of TinyLlama.
    """

    def __init__(self, folder: Path, prefix: str, separator: int):
        self._folder, self._prefix, self._separator = folder, prefix, separator
        self._chunk = np.full(_CHUNK_TOKENS, separator, dtype=TOKENS)
        self._filled = self._num_files = 0

    def add(self, ids: np.ndarray) -> None:
        """Appends tokens."""
        while self._filled + ids.size > _CHUNK_TOKENS:
            room = _CHUNK_TOKENS - self._filled
            self._chunk[self._filled :] = ids[:room]
            self.write()
            ids = ids[room:]
        self._chunk[self._filled : self._filled + ids.size] = ids
        self._filled += ids.size

    def write(self) -> None:
        """Writes the chunk as it is, and begins the next."""
        with (self._folder / f"{self._prefix}_{self._num_files:010d}.bin").open("wb") as file:
            file.write(_CHUNK_HEADER)
            file.write(self._chunk.tobytes(order="C"))
        self._num_files += 1
        self._chunk.fill(self._separator)
        self._filled = 0


def steel_llm(job: Job) -> Finished:
    """Steel-LLM: files dealt to processes; 10,000 texts joined by the EOS in one string, encoded in one call.

    Source: pretrain_modify_from_TinyLlama/scripts/prepare_steel_llm_data.py. Spared: its chunks of 420 million tokens,
    which take 840 MB a process; it drops the last one where that is filled to less than 5 %, here it is written.
    """
    dealt = [list(range(len(job.files)))[process :: job.num_workers] for process in range(job.num_workers)]
    tokenizer = _transformers_tokenizer(job)
    _in_processes(_steel_llm_process, [(job, tokenizer, process, own) for process, own in enumerate(dealt)])
    return Finished(_chunks(job), [index for own in dealt for index in own])


def _steel_llm_process(job: Job, tokenizer: Any, process: int, own: Sequence[int]) -> None:
    builder = PackedBuilder(Path(job.folder), f"process{process:04d}", job.pad_id)
    eos = tokenizer.convert_ids_to_tokens(job.eos_id)
    for index in own:
        cached = ""
        for num_lines, text in enumerate(_texts(job.files[index]), 1):
            cached += text + eos
            if num_lines % _STEEL_LINES == 0:
                builder.add(np.array(tokenizer.encode(cached), dtype=TOKENS))
                cached = ""
        if cached:
            builder.add(np.array(tokenizer.encode(cached), dtype=TOKENS))
    builder.write()


def tinyllama(job: Job) -> Finished:
    """TinyLlama with a Hugging Face vocabulary: a list of files for each process, one call a document, BOS before it.

    Source: scripts/prepare_slimpajama.py and lit_gpt/tokenizer.py. Spared: it makes a torch tensor of each document on
    the way, and its script for SlimPajama drops each process's last chunk.
    """
    shares = [share.tolist() for share in np.array_split(np.arange(len(job.files)), job.num_workers)]
    _in_processes(_tinyllama_process, [(job, process, own) for process, own in enumerate(shares)])
    return Finished(_chunks(job), [index for own in shares for index in own])


def _tinyllama_process(job: Job, process: int, own: Sequence[int]) -> None:
    tokenizer = _hf_tokenizer(job)
    builder = PackedBuilder(Path(job.folder), f"process{process:04d}", job.eos_id)
    for index in own:
        for text in _texts(job.files[index]):
            ids = [job.eos_id, *tokenizer.encode(text).ids]
            builder.add(np.array(ids, dtype=TOKENS))
    builder.write()


_megatron_tokenizer: Any = None


def megatron(job: Job) -> Finished:
    """Megatron-LM: `Pool.imap` over lines in chunks of 32, one call a document, one process that writes.

    Source: tools/preprocess_data.py with --append-eod and one partition.
    """
    lengths: list[int] = []
    path = Path(job.folder) / "text_document.bin"
    with path.open("wb") as file, _processes.Pool(job.num_workers, _start_megatron, (job,)) as pool:
        encode = functools.partial(_encode_line, job.eos_id)
        for ids in pool.imap(encode, _lines(job.files), _MEGATRON_LINES):
            tokens = np.array(ids, dtype=TOKENS)
            file.write(tokens.tobytes(order="C"))
            lengths.append(tokens.size)
        pool.close()
        pool.join()
    ends = np.cumsum(lengths, dtype=np.int64)
    path.with_suffix(".idx").write_bytes(np.array(lengths, dtype="<i4").tobytes() + (2 * ends).tobytes())
    return Finished([Stream(str(path))], tuple(range(len(job.files))))


def _start_megatron(job: Job) -> None:
    global _megatron_tokenizer
    _megatron_tokenizer = _transformers_tokenizer(job)


def _encode_line(eos_id: int, line: str) -> list[int]:
    ids = _megatron_tokenizer(json.loads(line)["text"]).input_ids
    ids.append(eos_id)
    return ids


def nanogpt(job: Job) -> Finished:
    """nanoGPT: `datasets.map` with tiktoken, one call a document, then a memory map that is filled shard by shard.

    Source: data/openwebtext/prepare.py. Spared: its shuffled split.

    Raises:
        ImportError: datasets or tiktoken is not installed.
    """
    datasets = importlib.import_module("datasets")
    encoding = _tiktoken_encoding(job)

    def process(example: dict[str, Any]) -> dict[str, Any]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(job.eos_id)
        return {"ids": ids, "len": len(ids)}

    loaded = datasets.load_dataset(
        "json", data_files=list(job.files), split="train", cache_dir=f"{job.folder}/cache", num_proc=job.num_workers
    )
    tokenized = loaded.map(process, remove_columns=["text"], num_proc=job.num_workers)
    path = Path(job.folder) / "train.bin"
    tokens = np.memmap(path, dtype=TOKENS, mode="w+", shape=(int(np.sum(tokenized["len"])),))
    num_shards, filled = min(_MEMMAP_SHARDS, len(tokenized)), 0
    for index in range(num_shards):
        shard = tokenized.shard(num_shards=num_shards, index=index, contiguous=True).with_format("numpy")
        batch = np.concatenate(shard["ids"])
        tokens[filled : filled + len(batch)] = batch
        filled += len(batch)
    tokens.flush()
    return Finished([Stream(str(path))], list(range(len(job.files))))


def arrow(job: Job) -> Finished:
    """nanoGPT's way without `datasets`: texts and ids as Arrow files written by pyarrow, then the memory map.

    It does less than nanoGPT's program: no dictionary, no type inference and no copy for each example.
    """
    pa = importlib.import_module("pyarrow")
    texts = [text for path in job.files for text in _texts(path)]
    raw = Path(job.folder) / "raw.arrow"
    _write_arrow(raw, ({"text": texts[i : i + _ARROW_ROWS]} for i in range(0, len(texts), _ARROW_ROWS)))
    edges = np.linspace(0, len(texts), job.num_workers + 1).astype(int).tolist()
    spans = list(itertools.pairwise(edges))
    _in_processes(_arrow_process, [(job, process, span) for process, span in enumerate(spans)])
    files = [pa.memory_map(str(Path(job.folder) / f"ids-{process:05d}.arrow")) for process in range(job.num_workers)]
    table = pa.concat_tables([pa.ipc.open_stream(file).read_all() for file in files])
    path = Path(job.folder) / "train.bin"
    tokens = np.memmap(path, dtype=TOKENS, mode="w+", shape=(int(np.sum(table["len"].to_numpy())),))
    filled = 0
    for span in itertools.pairwise(np.linspace(0, len(texts), min(_MEMMAP_SHARDS, len(texts)) + 1).astype(int)):
        batch = table.slice(int(span[0]), int(span[1] - span[0]))["ids"].combine_chunks().flatten().to_numpy()
        tokens[filled : filled + batch.size] = batch
        filled += batch.size
    tokens.flush()
    return Finished([Stream(str(path))], tuple(range(len(job.files))))


def _arrow_process(job: Job, process: int, span: tuple[int, int]) -> None:
    pa = importlib.import_module("pyarrow")
    encoding = _tiktoken_encoding(job)
    with pa.memory_map(str(Path(job.folder) / "raw.arrow")) as file:
        texts = pa.ipc.open_stream(file).read_all().slice(span[0], span[1] - span[0])["text"]

        def batches() -> Iterator[dict[str, list[Any]]]:
            for first in range(0, len(texts), _ARROW_ROWS):
                rows = [[*encoding.encode_ordinary(t.as_py()), job.eos_id] for t in texts[first : first + _ARROW_ROWS]]
                yield {"ids": rows, "len": list(map(len, rows))}

        _write_arrow(Path(job.folder) / f"ids-{process:05d}.arrow", batches())


def _write_arrow(path: Path, batches: Iterator[dict[str, list[Any]]]) -> None:
    pa = importlib.import_module("pyarrow")
    first = pa.RecordBatch.from_pydict(next(batches))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(pa.RecordBatch.from_pydict(batch, schema=first.schema))


def _tiktoken_encoding(job: Job) -> Any:
    """The vocabulary of a byte-level BPE trained by this project, whose ids follow its merges."""
    tiktoken = importlib.import_module("tiktoken")
    contents = load_backend(Path(job.tokenizer).read_bytes(), job.tokenizer).token_contents()
    ranks = {content: token_id for token_id, content in enumerate(contents) if content}
    special = {f"<special {token_id}>": token_id for token_id, content in enumerate(contents) if not content}
    return tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def datatrove(job: Job) -> Finished:
    """datatrove's own DocumentTokenizer, a task for each process, files dealt to tasks in turn.

    Raises:
        ImportError: not installed.
    """
    executor = importlib.import_module("datatrove.executor.local").LocalPipelineExecutor
    reader = importlib.import_module("datatrove.pipeline.readers").JsonlReader
    document_tokenizer = importlib.import_module("datatrove.pipeline.tokens").DocumentTokenizer
    inputs = Path(job.folder) / "input"
    inputs.mkdir()
    for index, path in enumerate(job.files):
        (inputs / f"{index:05d}.jsonl").symlink_to(Path(path).resolve())
    tokens = document_tokenizer(
        output_folder=f"{job.folder}/tokens",
        tokenizer_name_or_path=job.tokenizer,
        eos_token=_hf_tokenizer(job).id_to_token(job.eos_id),
        shuffle_documents=False,
    )
    executor(
        pipeline=[reader(str(inputs)), tokens],
        tasks=job.num_workers,
        workers=job.num_workers,
        logging_dir=f"{job.folder}/logs",
    ).run()
    written = sorted(Path(job.folder, "tokens").glob("*.ds"))
    order = [index for task in range(job.num_workers) for index in range(len(job.files))[task :: job.num_workers]]
    return Finished([Stream(str(path)) for path in written], order)


def _transformers_tokenizer(job: Job) -> Any:
    return importlib.import_module("transformers").PreTrainedTokenizerFast(tokenizer_file=job.tokenizer)


def _hf_tokenizer(job: Job) -> Any:
    return importlib.import_module("tokenizers").Tokenizer.from_file(job.tokenizer)


def _texts(path: str) -> Iterator[str]:
    for line in _lines([path]):
        yield json.loads(line)["text"]


def _lines(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        with Path(path).open(encoding="utf-8") as file:
            yield from file


def _in_processes(function: Any, calls: Sequence[tuple[Any, ...]]) -> None:
    processes = [_processes.Process(target=function, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a process of {function.__name__} failed")


def _chunks(job: Job) -> list[Stream]:
    return [Stream(str(path), len(_CHUNK_HEADER)) for path in sorted(Path(job.folder).glob("process*.bin"))]


WAYS: dict[str, Way] = {
    "steel_llm": steel_llm,
    "tinyllama": tinyllama,
    "megatron": megatron,
    "nanogpt": nanogpt,
    "arrow": arrow,
    "datatrove": datatrove,
}
_LIBRARIES = {
    "steel_llm": "transformers",
    "tinyllama": "tokenizers",
    "megatron": "transformers",
    "nanogpt": "datasets",
    "arrow": "pyarrow",
    "datatrove": "datatrove.pipeline.tokens",
}
"""Imported before the time is taken, as programs do."""


def main(arguments: Sequence[str]) -> int:
    """Runs one way."""
    with contextlib.suppress(ImportError):  # the way itself will say so
        importlib.import_module(_LIBRARIES[arguments[0]])
    return serve(WAYS, arguments)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

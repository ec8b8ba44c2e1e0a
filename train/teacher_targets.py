"""What a teacher says of a data folder's targets: computed once and written beside the shards, then read with them."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep import publish
from data_prep.chat.chat_folder import read_chat_folder
from data_prep.chat.row_marks import marks_path
from data_prep.config_file import ConfigError
from data_prep.manifest import Manifest, read_manifest
from data_prep.teacher_file import (
    TeacherFiles,
    TeacherHeader,
    new_header,
    read_teacher_header,
    write_teacher_file,
)
from data_prep.tokenizing.tokenizer import load_tokenizer
from evaluation.score import Annotate, shard_batches
from kernels.linear_divergence import linear_top_log_probs
from model.batch import TokenRows
from model.transformer import Transformer
from resume.manifest import DataFile
from resume.samples import SampleReader
from resume.verify import open_split
from train.distillation import first_rows, load_teacher
from train.references import model_digest


def write_teacher_cache(
    model: Path,
    data: Path,
    *,
    num_kept: int,
    temperature: float = 1.0,
    sequence_length: int | None = None,
    isolate_documents: bool = False,
    split: str = "train",
    batch_size: int = 8,
    device: str = "auto",
) -> tuple[int, int]:
    """Writes what a teacher says beside each shard that lacks it; returns the shards, and those written now.

    A file of another teacher, or made with other options, is written anew.

    Raises:
        ConfigError, ManifestError, DataError, ModelFolderError: what is wrong with options, data or teacher.
    """
    manifest = read_manifest(data)
    if num_kept >= manifest.vocab_size:
        raise ConfigError(f"--k {num_kept}: must be below the {manifest.vocab_size} tokens of {data}'s vocabulary")
    length = _sample_tokens(data, manifest, sequence_length)
    files = open_split({data: manifest}, split)
    tokenizer = load_tokenizer(data / manifest.tokenizer_file, eos_id=manifest.eos_id)
    teacher = load_teacher(model, tokenizer, device)
    digest, num_written = model_digest(model), 0
    publish.remove_leftovers(data / split)
    for file in tqdm(files, desc="teacher", unit="shard", disable=None):
        header = new_header(
            file.path,
            sequence_length=length,
            is_isolated=isolate_documents or _has_marks(file),
            num_kept=num_kept,
            temperature=temperature,
            teacher_digest=digest,
        )
        if read_teacher_header(file.path) != header:
            reader = SampleReader(
                [file], sequence_length=length, vocab_size=manifest.vocab_size, eos_id=manifest.eos_id
            )
            batches = shard_batches(
                reader, num_sequences=header.sample_count, batch_size=batch_size, isolate_documents=isolate_documents
            )
            write_teacher_file(file.path, header, _said_of(batches, teacher, header, manifest.vocab_size))
            reader.close()
            num_written += 1
    return len(files), num_written


def cached_teacher(
    files: Sequence[DataFile], *, sequence_length: int, isolate_documents: bool, temperature: float
) -> Annotate:
    """Adds to batches of these files what `write_teacher_cache` has written: "teacher_ids" and "teacher_log_probs".

    Raises:
        TeacherFileError: a file is missing, or was written for other rows, another temperature or by another teacher.
    """
    # Beside conversations, documents of text are isolated too.
    is_isolated = isolate_documents or any(map(_has_marks, files))
    reader = TeacherFiles(
        [file.path for file in files],
        sequence_length=sequence_length,
        is_isolated=[is_isolated] * len(files),
        temperature=temperature,
    )

    def annotate(rows: TokenRows, file_indices: NDArray[np.int64], samples: NDArray[np.int64]) -> TokenRows:
        extra = dict(rows.extra)
        said = reader.read(file_indices, samples)
        for name, values in zip(("teacher_ids", "teacher_log_probs"), map(torch.from_numpy, said), strict=True):
            extra[name] = values.pin_memory() if rows.tokens.is_pinned() else values
        return dataclasses.replace(rows, extra=extra)

    return annotate


def _has_marks(file: DataFile) -> bool:
    """Whether the shard holds rows of conversations, which are isolated whatever the run says."""
    return marks_path(file.path).exists()


def _sample_tokens(data: Path, manifest: Manifest, asked: int | None) -> int:
    rows = read_chat_folder(data)
    if rows is not None and asked not in (None, rows.row_tokens):
        raise ConfigError(f"--sequence-length {asked}: the rows of {data} have {rows.row_tokens} tokens; leave it out")
    return asked or (rows.row_tokens if rows is not None else manifest.sample_tokens)


@torch.no_grad()
def _said_of(
    batches: Iterable[TokenRows], teacher: Transformer, header: TeacherHeader, num_tokens: int
) -> Iterator[tuple[NDArray, NDArray]]:
    """(ids (L, J), log-probabilities (L, J + 1)) of one sample after another."""
    num_left, head_VD = header.sample_count, first_rows(teacher.head.weight, num_tokens)
    options = {"temperature": header.temperature, "soft_cap": teacher.config.logit_softcap}
    for rows in batches:
        batch = rows.to(head_VD.device)
        hidden_BTD = teacher(batch.tokens, batch.boundaries, readout=lambda hidden_BTD, _: hidden_BTD)
        ids, log_probs = linear_top_log_probs(hidden_BTD, head_VD, header.num_kept, **options)
        yield from list(zip(ids.cpu().numpy(), log_probs.cpu().numpy(), strict=True))[:num_left]
        num_left -= len(ids)

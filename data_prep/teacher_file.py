"""What a teacher says of a shard's targets, in a file beside it: its likeliest tokens, and all others as one.

`web-00000.teacher` belongs to `web-00000.bin`. Each sample of L targets is a record of fixed size, so that one is one
positioned read:

    ids (L, J), the shard's dtype | log-probabilities (L, J + 1), float16, the others' last | xxh3-64 of both, 8 bytes

Records follow a head of 1 KiB: magic, version, length of the JSON, the JSON (`TeacherHeader`), zeros. What a shorter
last sample lacks is there, and means nothing.
"""

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep import publish
from data_prep.manifest import num_samples
from data_prep.shards import read_header

MAGIC = b"BESSTEAC"
VERSION = 1
HEADER_BYTES = 1024
_PREFIX = struct.Struct("<8sII")  # magic, version, length of the JSON that follows
_HASH_BYTES = 8


class TeacherFileError(ValueError):
    """A teacher's file is missing, damaged, or another one's; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherHeader:
    """What a teacher's file says about itself."""

    payload_xxh3: str
    """Of the shard that it belongs to."""
    id_dtype: str
    sample_count: int
    sequence_length: int
    """Targets of a sample: the teacher read each sample by itself."""
    is_isolated: bool
    """Whether it saw only the document that a token belongs to."""
    num_kept: int
    temperature: float
    teacher_digest: str

    @property
    def record_bytes(self) -> int:
        """Of one sample."""
        id_bytes = np.dtype(self.id_dtype).itemsize
        return self.sequence_length * (self.num_kept * id_bytes + 2 * (self.num_kept + 1)) + _HASH_BYTES


def teacher_path(shard: Path) -> Path:
    """The teacher's file of a shard: its name with another ending."""
    return shard.with_suffix(".teacher")


def new_header(
    shard: Path, *, sequence_length: int, is_isolated: bool, num_kept: int, temperature: float, teacher_digest: str
) -> TeacherHeader:
    """The header that a shard's file is to have."""
    of_shard = read_header(shard)
    return TeacherHeader(
        payload_xxh3=of_shard.payload_xxh3,
        id_dtype=of_shard.dtype,
        sample_count=num_samples(of_shard.token_count, sequence_length),
        sequence_length=sequence_length,
        is_isolated=is_isolated,
        num_kept=num_kept,
        temperature=temperature,
        teacher_digest=teacher_digest,
    )


def write_teacher_file(shard: Path, header: TeacherHeader, samples: Iterable[tuple[NDArray, NDArray]]) -> Path:
    """Writes the file of a shard, published whole, from (ids, log-probabilities) of its samples in order.

    Shapes: ids (L, J), log-probabilities (L, J + 1).
    """
    path = teacher_path(shard)
    temporary = publish.temporary_beside(path)
    content = json.dumps(dataclasses.asdict(header)).encode()
    try:
        with temporary.open("wb") as file:
            file.write((_PREFIX.pack(MAGIC, VERSION, len(content)) + content).ljust(HEADER_BYTES, b"\0"))
            for ids, log_probs in samples:
                # Below what float16 holds there is no probability to speak of.
                rounded = np.clip(log_probs, np.finfo(np.float16).min, 0.0).astype("<f2")
                record = ids.astype(f"<u{np.dtype(header.id_dtype).itemsize}").tobytes() + rounded.tobytes()
                file.write(record + xxhash.xxh3_64_digest(record))
            assert file.tell() == HEADER_BYTES + header.sample_count * header.record_bytes
            file.flush()
            os.fsync(file.fileno())
        publish.publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_teacher_header(shard: Path) -> TeacherHeader | None:
    """The header of a shard's teacher file, checked against the shard and the file's size; None without a file.

    Raises:
        TeacherFileError: not such a file, cut short, or another shard's.
        ShardError: see `data_prep.shards.read_header`.
    """
    path = teacher_path(shard)
    try:
        with path.open("rb") as file:
            head, size_bytes = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    remedy = "delete it and run python -m train.teacher_cache again"
    try:
        magic, version, num_json_bytes = _PREFIX.unpack_from(head)
        table = json.loads(head[_PREFIX.size : _PREFIX.size + num_json_bytes])
        header = TeacherHeader(**table)
    except (ValueError, TypeError, struct.error) as error:
        raise TeacherFileError(f"{path}: unreadable header ({error}); {remedy}") from error
    if (magic, version) != (MAGIC, VERSION):
        raise TeacherFileError(f"{path}: not a teacher's file of version {VERSION}; {remedy}")
    if header.payload_xxh3 != read_header(shard).payload_xxh3:
        raise TeacherFileError(f"{path}: made for another shard than {shard.name}; {remedy}")
    if size_bytes != HEADER_BYTES + header.sample_count * header.record_bytes:
        raise TeacherFileError(f"{path}: {size_bytes:,} bytes are not {header.sample_count:,} records; {remedy}")
    return header


class TeacherFiles:
    """Reads samples out of the teacher files of shards, all of one teacher and as a run reads the shards."""

    def __init__(
        self, shards: Sequence[Path], *, sequence_length: int, is_isolated: Sequence[bool], temperature: float
    ) -> None:
        """Raises:
        TeacherFileError: a file is missing, made otherwise than asked for, or of another teacher than the first.
        """
        self._shards = list(shards)
        # A run that had a shard taken out of its data reads it no more.
        self._headers = {i: self._checked(shard) for i, shard in enumerate(shards) if shard.exists()}
        first = next(iter(self._headers.values()))
        self._sequence_length, self._num_kept = sequence_length, first.num_kept
        for i, header in self._headers.items():
            wanted = {
                "sequence_length": sequence_length, "is_isolated": is_isolated[i], "temperature": temperature,
                "num_kept": first.num_kept, "teacher_digest": first.teacher_digest,
            }  # fmt: skip
            for key, value in wanted.items():
                if (found := getattr(header, key)) != value:
                    raise TeacherFileError(
                        f"{teacher_path(shards[i])}: {key} is {found}, this run wants {value}; write all anew with: "
                        "python -m train.teacher_cache, or change the run"
                    )

    def read(self, files: NDArray[np.int64], samples: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray]:
        """(ids, log-probabilities) of samples[r] of files[r]; zeros in rows that are empty.

        Shapes: files, samples (R,); ids (R, L, J), log-probabilities (R, L, J + 1) float16.
        Raises:
            TeacherFileError: a record is not what was written.
        """
        length, num_kept = self._sequence_length, self._num_kept
        ids = np.zeros((len(files), length, num_kept), dtype=np.int32)
        log_probs = np.zeros((len(files), length, num_kept + 1), dtype=np.float16)
        for row, (file, sample) in enumerate(zip(files.tolist(), samples.tolist())):
            header = self._headers.get(file)
            if header is None or sample >= header.sample_count:
                continue
            record = self._record(file, sample)
            id_dtype = np.dtype(f"<u{np.dtype(header.id_dtype).itemsize}")
            ids[row] = np.frombuffer(record, id_dtype, length * num_kept).reshape(length, num_kept)
            num_id_bytes = length * num_kept * id_dtype.itemsize
            log_probs[row] = np.frombuffer(record, "<f2", offset=num_id_bytes).reshape(length, num_kept + 1)
        return ids, log_probs

    def _record(self, file: int, sample: int) -> bytes:
        path, size = teacher_path(self._shards[file]), self._headers[file].record_bytes
        with path.open("rb", buffering=0) as opened:
            content = os.pread(opened.fileno(), size, HEADER_BYTES + sample * size)
        record, digest = content[:-_HASH_BYTES], content[-_HASH_BYTES:]
        if len(content) != size or xxhash.xxh3_64_digest(record) != digest:
            raise TeacherFileError(
                f"{path}: sample {sample} differs from its checksum; delete the file and run python -m "
                "train.teacher_cache again"
            )
        return record

    @staticmethod
    def _checked(shard: Path) -> TeacherHeader:
        header = read_teacher_header(shard)
        if header is None:
            raise TeacherFileError(
                f"{teacher_path(shard)}: does not exist; write it with: python -m train.teacher_cache MODEL DATA"
            )
        return header

"""Reads samples out of shards, straight into the rows of a batch: positioned reads, no memory map.

Every sample is checked against its checksum where the shard has a file of them, every token id against the vocabulary.
"""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.chat.chat_format import CHAT_FILE
from data_prep.chat.row_marks import RowMarks, marks_path
from data_prep.checksums import (
    CHECKSUM_BYTES,
    TABLE_OFFSET,
    ChecksumError,
    ChecksumHeader,
    checksum_path,
    read_checksum_header,
    sample_checksums,
    verify_checksums,
)
from data_prep.shards import HEADER_BYTES, ShardError
from resume.local_shards import LocalShards
from resume.manifest import DataError, DataFile

NO_SAMPLE = 2**40
"""A sample index behind the end of any file: its row is EOS without a target."""
# Groups of samples remembered as announced: more than a window of a shuffle by groups holds.
_RECENT_GROUPS = 16_384


class BadSampleError(DataError):
    """A sample whose bytes are not those that were written."""


@dataclass(frozen=True, slots=True)
class RowsRead:
    """What the rows of one `read_into` hold."""

    num_targets: NDArray[np.int64]
    """Targets per row (R,): fewer than the sequence length at the end of a file, none in an empty or bad row."""
    bad_rows: list[int]
    """Rows whose sample is quarantined, that is EOS without a target."""
    trained: NDArray[np.bool_] | None = None
    """Which targets count (R, L), where a file of the reader has marks beside it (data_prep/chat/row_marks.py)."""
    starts: NDArray[np.bool_] | None = None
    """Which inputs begin a document (R, L), likewise."""


class _OpenFile(NamedTuple):
    """Handles of a shard and, where its samples are checked, of its checksum file."""

    shard: int
    checksums: int | None


class SampleReader:
    """Sample i of a file is its tokens [i L, i L + L]: L targets, each with the token before it as input.

    Positioned reads instead of a memory map: a map's default read-ahead fetches a hundred times what random samples
    need, and a file that shrinks under a map kills the process with SIGBUS instead of raising.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        *,
        sequence_length: int,
        vocab_size: int,
        eos_id: int,
        on_bad_sample: Literal["stop", "quarantine"] = "stop",
        group_samples: int = 1,
        shards: LocalShards | None = None,
    ):
        """Reads the heads of the files' checksum files; samples are read in groups of `group_samples` neighbours.

        Raises:
            DataError: a checksum file that is damaged or another shard's, or files of different dtypes.
        """
        self.files = list(files)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self._shards = shards or LocalShards()
        self.dtype = _common_dtype(self.files)
        self._quarantines = on_bad_sample == "quarantine"
        self._group_samples = group_samples
        self._targets_of_file = np.array([file.num_targets for file in self.files], dtype=np.int64)
        self._checksums = [_usable_checksums(file, sequence_length) for file in self.files]
        self._marks = [_marks_of(file) for file in self.files]
        self._max_open_files = _max_open_files()
        self._open_files: dict[int, _OpenFile] = {}
        self._recent_groups: dict[tuple[int, int], None] = {}
        self.spoil_next = False
        """Flips a bit of the next sample in memory, before it is compared with its checksum: for drills."""

    @property
    def num_checked_files(self) -> int:
        """Files whose samples are compared with checksums; not those that have none for this sequence length."""
        return sum(header is not None for header in self._checksums)

    def read_into(self, files: NDArray[np.int64], samples: NDArray[np.int64], rows: NDArray) -> RowsRead:
        """Reads sample samples[r] of file files[r] into rows[r]; what a short one lacks becomes EOS.

        Shapes: files, samples (R,); rows (R or more, L + 1), contiguous.
        Dtypes: rows as `dtype`.
        Raises:
            BadSampleError: a sample differs from its checksum, and is not to be quarantined.
            DataError: a file shrank, cannot be read, holds a token id that the vocabulary does not have, or its
                checksums are damaged.
        """
        num_targets = np.clip(self._targets_of_file[files] - samples * self.sequence_length, 0, self.sequence_length)
        row_bytes, token_bytes = rows.strides[0], rows.itemsize
        sample_bytes = row_bytes - token_bytes
        # A row without targets has no context token either.
        sizes = (num_targets + (num_targets > 0)) * token_bytes
        memory, starts = rows.data.cast("B"), range(0, len(files) * row_bytes, row_bytes)
        # Looked up once: this loop is what reading costs.
        read_part, is_open = self._shards.read_into, self._open_files.get
        bad_rows: list[int] = []
        spoil, self.spoil_next = self.spoil_next, False
        file = sample = 0
        try:
            for file, sample, start, size in zip(files.tolist(), samples.tolist(), starts, sizes.tolist()):
                if not size:
                    continue
                shard, checksums = is_open(file) or self._open(file)
                content = memory[start : start + size]
                found = read_part(shard, (content,), HEADER_BYTES + sample * sample_bytes)
                if found != size:
                    raise self._truncated(file, sample, size, found)
                if spoil:
                    content[-1] ^= 1
                    spoil = False
                if checksums is not None and not self._is_intact(file, sample, content, checksums):
                    self._refuse_bad(file, sample)
                    bad_rows.append(start // row_bytes)
        except OSError as error:  # a dying disk: rot mostly shows as this
            raise DataError(
                f"{self.files[file].path}: sample {sample} cannot be read ({error.strerror}); restore the shard"
            ) from error
        num_targets[bad_rows] = 0
        for row in np.flatnonzero(num_targets < self.sequence_length).tolist():
            rows[row, num_targets[row] + 1 if num_targets[row] else 0 :] = self.eos_id
        self._refuse_foreign_ids(files, samples, rows[: len(files)])
        if not self.has_marks:
            return RowsRead(num_targets, bad_rows)
        return RowsRead(num_targets, bad_rows, *self._read_marks(files, samples, num_targets, rows[: len(files)]))

    @property
    def has_marks(self) -> bool:
        """Whether some files say which of their targets count."""
        return any(marks is not None for marks in self._marks)

    def will_need(self, files: NDArray[np.int64], samples: NDArray[np.int64]) -> None:
        """Asks the kernel to read samples (R,) of files (R,), or the groups that they belong to, in the background."""
        exist = samples * self.sequence_length < self._targets_of_file[files]
        firsts = samples[exist] // self._group_samples * self._group_samples
        wanted = list(zip(files[exist].tolist(), firsts.tolist()))
        if self._group_samples > 1:
            wanted = self._not_announced(wanted)
        sample_bytes = self.sequence_length * self.dtype.itemsize
        num_bytes = self._group_samples * sample_bytes + self.dtype.itemsize
        for file, first in wanted:
            shard, _ = self._open_files.get(file) or self._open(file)
            self._shards.will_need(shard, HEADER_BYTES + first * sample_bytes, num_bytes)

    def close(self) -> None:
        """Closes the files; the reader may be used again."""
        while self._open_files:
            self._close(next(iter(self._open_files)))

    def _read_marks(
        self, files: NDArray[np.int64], samples: NDArray[np.int64], num_targets: NDArray[np.int64], rows: NDArray
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(trained, starts) of rows; of files without marks every target counts, and EOS closes a document."""
        trained = np.arange(self.sequence_length) < num_targets[:, None]
        starts = np.zeros_like(trained)
        starts[:, 0] = True
        starts[:, 1:] = rows[:, : self.sequence_length - 1] == self.eos_id
        for file in np.unique(files):
            if (marks := self._marks[file]) is not None:
                chosen = (files == file) & (num_targets > 0)
                trained[chosen], starts[chosen] = marks.rows(samples[chosen], self.sequence_length)
        return trained, starts

    def _close(self, index: int) -> None:
        for handle in self._open_files.pop(index):
            if handle is not None:
                self._shards.close(handle)

    def _not_announced(self, groups: list[tuple[int, int]]) -> list[tuple[int, int]]:
        fresh = [group for group in dict.fromkeys(groups) if group not in self._recent_groups]
        self._recent_groups.update(dict.fromkeys(fresh))
        while len(self._recent_groups) > _RECENT_GROUPS:
            del self._recent_groups[next(iter(self._recent_groups))]
        return fresh

    def _open(self, index: int) -> _OpenFile:
        if len(self._open_files) >= self._max_open_files:
            # The one opened first: the order is random, so that the least recently used would serve no better.
            self._close(next(iter(self._open_files)))
        path = self.files[index].path
        checksums = None
        if self._checksums[index] is not None:
            checksums = self._shards.open(checksum_path(path))
            # All of it, a quarter of a megabyte per gigabyte: else each sample would wait for a page of checksums.
            self._shards.will_need(checksums, 0, 0)
        opened = self._open_files[index] = _OpenFile(self._shards.open(path), checksums)
        return opened

    def _is_intact(self, file: int, sample: int, content: memoryview, checksums: int) -> bool:
        header = self._checksums[file]
        assert header is not None
        if header.sample_tokens == self.sequence_length:  # the usual case, at half the cost of the general one
            recorded = self._read_checksums(checksums, sample, 1)
            return int.from_bytes(recorded, "little") == xxhash.xxh3_64_intdigest(content) & 0xFFFFFFFF
        found = sample_checksums(content, header.sample_tokens, self.dtype.itemsize)
        first = sample * (self.sequence_length // header.sample_tokens)
        recorded = self._read_checksums(checksums, first, len(found))
        return recorded == b"".join([checksum.to_bytes(CHECKSUM_BYTES, "little") for checksum in found])

    def _read_checksums(self, handle: int, first: int, count: int) -> bytearray:
        recorded = bytearray(count * CHECKSUM_BYTES)
        found = self._shards.read_into(handle, (recorded,), TABLE_OFFSET + first * CHECKSUM_BYTES)
        return recorded[:found]

    def _refuse_bad(self, index: int, sample: int) -> None:
        """Raises unless it is the sample that is bad, and bad samples are quarantined."""
        file, header = self.files[index], self._checksums[index]
        assert header is not None
        try:
            verify_checksums(file.path, header)
        except (ChecksumError, ShardError) as error:
            raise DataError(str(error)) from error
        if not self._quarantines:
            first = sample * self.sequence_length
            last = min(first + self.sequence_length, file.num_targets)
            raise BadSampleError(
                f"{file.path}: sample {sample} (tokens {first} to {last}) differs from its checksum: the shard changed "
                "after it was written. See what else is damaged with: python -m resume verify RUN; restore the shard, "
                "or train without such samples with --data.on-bad-sample quarantine"
            )

    def _truncated(self, index: int, sample: int, wanted_bytes: int, found_bytes: int) -> DataError:
        return DataError(
            f"{self.files[index].path}: sample {sample} wants {wanted_bytes} bytes, the file has {found_bytes} of "
            "them; it was truncated while in use: restore it"
        )

    def _refuse_foreign_ids(self, files: NDArray[np.int64], samples: NDArray[np.int64], rows: NDArray) -> None:
        if int(rows.max(initial=0)) < self.vocab_size:
            return
        row, at = np.argwhere(rows >= self.vocab_size)[0].tolist()
        raise DataError(
            f"{self.files[files[row]].path}: token id {rows[row, at]} at token "
            f"{samples[row] * self.sequence_length + at} (sample {samples[row]}), the model's vocab_size is "
            f"{self.vocab_size}; restore the shard, or set --model.vocab-size to that of the tokenizer"
        )


def _marks_of(file: DataFile) -> RowMarks | None:
    """What a shard's rows say of their tokens; None for plain text."""
    path = marks_path(file.path)
    if path.exists():
        return RowMarks(file.path)
    if (file.path.parent.parent / CHAT_FILE).exists():
        raise DataError(
            f"{path} is not there: without it prompts would be trained; restore it, or prepare the data again"
        )
    return None


def _common_dtype(files: Sequence[DataFile]) -> np.dtype:
    dtypes = {file.dtype: file for file in files}
    if len(dtypes) != 1:
        examples = ", ".join(f"{file.path} of {dtype}" for dtype, file in dtypes.items()) or "none"
        raise DataError(f"the samples of a batch come from files of one dtype, not {examples}; prepare the data anew")
    return files[0].dtype


def _usable_checksums(file: DataFile, sequence_length: int) -> ChecksumHeader | None:
    """The head of a file's checksums; None without any, or where samples do not begin and end where checksums do."""
    try:
        header = read_checksum_header(file.path)
    except (ChecksumError, ShardError) as error:
        raise DataError(str(error)) from error
    return header if header is not None and sequence_length % header.sample_tokens == 0 else None


def _max_open_files() -> int:
    """Files that a reader holds open, after raising this process's soft limit as far as it may.

    A trillion tokens are thousands of shards, the usual soft limit is 1,024 open files, and opening a shard costs more
    than reading a sample of it. An eighth of the limit: each file has two descriptors, there are readers for training
    and validation, and others need some, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(65_536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max(1, (wanted if soft == resource.RLIM_INFINITY else soft) // 8)

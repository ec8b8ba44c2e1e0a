"""Reads samples out of shards: positioned reads, no memory map, every token id checked against the vocabulary."""

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.shards import HEADER_BYTES
from resume.manifest import DataError, DataFile

# A trillion tokens are thousands of shards, the usual limit of open files is 1,024; the least recently used is closed.
_MAX_OPEN_FILES = 512


class SampleReader:
    """Sample i of a file is its tokens [i L, i L + L]: L targets, each with the token before it as input.

    Positioned reads instead of a memory map: a map's default read-ahead fetches a hundred times what random samples
    need, and a file that shrinks under a map kills the process with SIGBUS instead of raising.
    """

    def __init__(self, files: Sequence[DataFile], *, sequence_length: int, vocab_size: int):
        self.files = list(files)
        self.sequence_length = sequence_length
        self.vocab_size = vocab_size
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def read(self, file_index: int, sample_index: int) -> NDArray[np.unsignedinteger]:
        """Returns the sample's tokens, at most sequence_length + 1 and at least 2, in the shard's dtype.

        Raises:
            DataError: the file shrank, or holds a token id that the vocabulary does not have.
        """
        file = self.files[file_index]
        offset, num_bytes = self._extent(file, sample_index)
        data = os.pread(self._descriptor(file_index), num_bytes, offset)
        if len(data) != num_bytes:
            raise DataError(
                f"{file.path}: sample {sample_index} wants {num_bytes} bytes at {offset}, the file has {len(data)}; "
                "it was truncated while in use: restore it"
            )
        tokens = np.frombuffer(data, dtype=file.dtype)
        if int(tokens.max()) >= self.vocab_size:
            at = int(tokens.argmax())
            raise DataError(
                f"{file.path}: token id {tokens[at]} at token {sample_index * self.sequence_length + at} (sample "
                f"{sample_index}), the model's vocab_size is {self.vocab_size}; restore the shard, or set "
                "--model.vocab-size to that of the tokenizer"
            )
        return tokens

    def will_need(self, file_index: int, sample_index: int) -> None:
        """Asks the kernel to read the sample in the background."""
        offset, num_bytes = self._extent(self.files[file_index], sample_index)
        os.posix_fadvise(self._descriptor(file_index), offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Closes the files; the reader may be used again."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _extent(self, file: DataFile, sample_index: int) -> tuple[int, int]:
        first = sample_index * self.sequence_length
        num_tokens = min(self.sequence_length + 1, file.num_tokens - first)
        return HEADER_BYTES + first * file.dtype.itemsize, num_tokens * file.dtype.itemsize

    def _descriptor(self, file_index: int) -> int:
        if file_index not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[file_index] = os.open(self.files[file_index].path, os.O_RDONLY)
        self._descriptors.move_to_end(file_index)
        return self._descriptors[file_index]

"""A file of tensors in the safetensors format, hashed while it is written.

The format: 8 bytes, little-endian, the length of a JSON header; the header, name -> dtype, shape, first and last byte
of the data; the data. Source: https://github.com/huggingface/safetensors#format. It is written here and not by the
library, because that would copy every tensor once more and read the file again to hash it. The library reads it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHUNK_BYTES = 16 * 1024 * 1024


def write(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Writes contiguous CPU tensors, flushes them to disk, and returns size in bytes and xxh3_128 of the file.

    Raises:
        OSError: the disk is full or fails.
    """
    digest, written_bytes = xxhash.xxh3_128(), 0
    with path.open("wb", buffering=0) as file:
        for chunk in _chunks(tensors):
            digest.update(chunk)
            while chunk:  # a nearly full disk takes a part, and says why with the next one
                count = file.write(chunk)
                chunk, written_bytes = chunk[count:], written_bytes + count
        os.fsync(file.fileno())
    return written_bytes, digest.hexdigest()


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    yield memoryview(_header(tensors))
    for name in _in_order(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    table, end = {}, 0
    for name in _in_order(tensors):
        tensor, first = tensors[name], end
        end += tensor.nbytes
        table[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned in a memory map
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide elements first, so that each tensor is aligned to its own."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))

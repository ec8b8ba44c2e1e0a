"""Small data folders for tests, in the real format."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.checksums import write_checksums
from data_prep.manifest import Manifest, record_shard, write_manifest
from data_prep.shards import HEADER_BYTES, ShardWriter
from data_prep.tokenizing.tokenizer import Tokenizer, train_bpe

TEXTS = [f"def f{i}(x):\n    return x + {i * i}\n" * 3 for i in range(80)]


@functools.cache
def tokenizer(vocab_size: int = 300) -> Tokenizer:
    return train_bpe(TEXTS, vocab_size)


def texts_about(name: str, count: int) -> list[str]:
    """Texts in the words of TEXTS, but none of them the same, nor the same as those of another name."""
    return [f"def {name}{i}(x):\n    return x * {i * i} + {i}\n" * 3 for i in range(count)]


def write_data(
    folder: Path,
    *,
    texts: Sequence[str] = TEXTS,
    shard_tokens: int = 640,
    num_held_out: int = 12,
    source: str = "test",
    checksum_tokens: int | None = None,
    vocab_size: int = 300,
) -> Path:
    """A data folder with several training shards and a validation shard, the last texts held out.

    With `checksum_tokens` each shard has a file of checksums beside it. All folders of one vocab_size have one
    tokenizer.
    """
    folder.mkdir(parents=True)
    made = tokenizer(vocab_size)
    tokenizer_file = made.save(folder)
    records = []
    for split, chosen in (("train", texts[:-num_held_out]), ("validation", texts[-num_held_out:])):
        options = {"vocab_size": made.vocab_size, "tokenizer_digest": made.digest, "eos_id": made.eos_id}
        with ShardWriter(folder / split, source, shard_tokens=shard_tokens, **options) as writer:
            for text in chosen:
                writer.add(np.array(made.encode(text)))
        records += [record_shard(folder, path, h, source=source, sample_tokens=32) for path, h in writer.close()]
    manifest = Manifest(
        tokenizer_file=tokenizer_file,
        tokenizer_digest=made.digest,
        vocab_size=made.vocab_size,
        eos_id=made.eos_id,
        sample_tokens=32,
        shards=tuple(records),
    )
    write_manifest(folder, manifest)
    if checksum_tokens is not None:
        for record in records:
            write_checksums(folder / record.file, checksum_tokens)
    return folder


def rot(shard: Path, token: int) -> None:
    """Flips the lowest bit of a token (counted from the shard's first) and leaves no trace: size and time stay."""
    looked = shard.stat()
    with shard.open("r+b") as file:
        file.seek(HEADER_BYTES + 2 * token)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + 2 * token)
        file.write(bytes([byte ^ 1]))
    os.utime(shard, ns=(looked.st_atime_ns, looked.st_mtime_ns))

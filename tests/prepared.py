"""Small data folders for tests, in the real format."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.manifest import Manifest, record_shard, write_manifest
from data_prep.shards import ShardWriter
from data_prep.tokenizer import Tokenizer, train_bpe

TEXTS = [f"def f{i}(x):\n    return x + {i * i}\n" * 3 for i in range(80)]


def tokenizer(vocab_size: int = 300) -> Tokenizer:
    return train_bpe(TEXTS, vocab_size)


def write_data(folder: Path, *, texts: Sequence[str] = TEXTS, shard_tokens: int = 640, num_held_out: int = 12) -> Path:
    """A data folder with several training shards and a validation shard, the last texts held out."""
    folder.mkdir(parents=True)
    made = tokenizer()
    tokenizer_file = made.save(folder)
    records = []
    for split, chosen in (("train", texts[:-num_held_out]), ("validation", texts[-num_held_out:])):
        options = {"vocab_size": made.vocab_size, "tokenizer_digest": made.digest, "eos_id": made.eos_id}
        with ShardWriter(folder / split, "test", shard_tokens=shard_tokens, **options) as writer:
            for text in chosen:
                writer.add(np.array(made.encode(text)))
        records += [record_shard(folder, path, h, source="test", sample_tokens=32) for path, h in writer.close()]
    manifest = Manifest(
        tokenizer_file=tokenizer_file,
        tokenizer_digest=made.digest,
        vocab_size=made.vocab_size,
        eos_id=made.eos_id,
        sample_tokens=32,
        shards=tuple(records),
    )
    write_manifest(folder, manifest)
    return folder

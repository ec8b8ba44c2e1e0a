from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.document_starts import read_document_starts, starts_path, write_document_starts
from data_prep.shards import ShardError, ShardWriter, open_tokens

EOS = 0


def write_shards(folder: Path, documents: list[list[int]], shard_tokens: int) -> list[Path]:
    options = {"vocab_size": 300, "tokenizer_digest": "digest", "eos_id": EOS, "shard_tokens": shard_tokens}
    with ShardWriter(folder, "web", **options) as writer:
        for document in documents:
            writer.add(np.array(document))
    return [path for path, _ in writer.close()]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 20))
def test_every_document_begins_once_where_its_shard_says(tmp_path_factory, documents, shard_tokens):
    shards = write_shards(tmp_path_factory.mktemp("starts"), documents, shard_tokens)
    firsts = []
    for shard in shards:
        write_document_starts(shard)
        tokens, starts = open_tokens(shard), read_document_starts(shard)
        assert (tokens[starts - 1] == EOS).all()
        firsts += tokens[starts].tolist()
    assert firsts == [document[0] for document in documents]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (shard,) = write_shards(tmp_path, [[1, 2], [3]], 100)
    write_document_starts(shard)
    return shard


def test_the_bytes_are_as_documented(shard: Path):
    content = starts_path(shard).read_bytes()
    assert content[:8] == b"BESSDOCS"
    assert np.frombuffer(content, "<u4", 2, 8).tolist() == [1, 4]
    assert np.frombuffer(content, "<u8", 1, 16).tolist() == [2]
    assert np.frombuffer(content, "<u4", offset=64).tolist() == [1, 4]


@pytest.mark.parametrize("place", [0, 9, 30, 50, 64, -1])
def test_damage_is_noticed(shard: Path, place: int):
    content = bytearray(starts_path(shard).read_bytes())
    content[place] ^= 1
    starts_path(shard).write_bytes(content)
    with pytest.raises(ShardError, match=r"web-00000\.idx: damaged; make it anew with"):
        read_document_starts(shard)


def test_the_starts_of_another_shard_are_refused_and_missing_ones_named(shard: Path, tmp_path: Path):
    (other,) = write_shards(tmp_path / "other", [[1, 2], [4]], 100)
    with pytest.raises(ShardError, match="cannot read the document starts"):
        read_document_starts(other)
    starts_path(other).write_bytes(starts_path(shard).read_bytes())
    with pytest.raises(ShardError, match="made for another shard than web-00000.bin"):
        read_document_starts(other)

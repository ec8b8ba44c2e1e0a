from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.manifest import ManifestError
from data_prep.shards import ShardWriter, open_tokens
from evaluation import stored_documents
from evaluation.stored_documents import documents_in, shards_by_source
from tests.prepared import write_data

DOCUMENTS = st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=12), min_size=1, max_size=12)


def write_shards(folder: Path, documents: list[list[int]], shard_tokens: int) -> list[Path]:
    options = {"vocab_size": 300, "tokenizer_digest": "digest", "eos_id": 0, "shard_tokens": shard_tokens}
    with ShardWriter(folder, "web", **options) as writer:
        for document in documents:
            writer.add(np.array(document))
    return [path for path, _ in writer.close()]


def stored(shards: list[Path]) -> list[list[int]]:
    return [tokens.tolist() for index in range(len(shards)) for _, tokens in documents_in(shards, index)]


@settings(max_examples=60)
@given(DOCUMENTS, st.integers(1, 20), st.integers(1, 7))
def test_every_document_comes_back_once_and_whole(tmp_path_factory, documents, shard_tokens, block_tokens):
    shards = write_shards(tmp_path_factory.mktemp("stored"), documents, shard_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_documents, "_BLOCK_TOKENS", block_tokens)
        assert stored(shards) == documents
        for index, shard in enumerate(shards):
            for place, tokens in documents_in(shards, index):
                assert open_tokens(shard)[place - 1] == 0
                assert open_tokens(shard)[place] == tokens[0]


def test_documents_are_not_joined_across_a_shard_that_is_missing(tmp_path: Path):
    shards = write_shards(tmp_path, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], shard_tokens=4)
    assert stored([shards[0], shards[2]]) == [[1, 2, 3, 4]]


def test_the_shards_of_a_split_are_listed_by_source(tmp_path: Path):
    data = write_data(tmp_path / "data")
    assert list(shards_by_source(data, "train")) == ["test"]
    assert [path.name for path in shards_by_source(data, "validation")["test"]] == ["test-00000.bin"]
    assert len(shards_by_source(data, "train")["test"]) > 1


def test_a_split_or_folder_that_is_not_there_is_refused(tmp_path: Path):
    data = write_data(tmp_path / "data")
    with pytest.raises(ValueError, match="no shard of split 'test'; it has train, validation"):
        shards_by_source(data, "test")
    with pytest.raises(ManifestError, match="no such data folder"):
        shards_by_source(tmp_path / "nowhere", "train")

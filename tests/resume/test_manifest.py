import dataclasses
import shutil
from pathlib import Path

import pytest

from data_prep.manifest import read_manifest, write_manifest
from data_prep.shards import HEADER_BYTES
from resume.manifest import DataError, refuse_overlap
from resume.verify import open_split
from tests.prepared import write_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def shard(folder: Path, number: int = 0) -> Path:
    return folder / "train" / f"test-{number:05}.bin"


def test_a_good_folder_opens_with_all_its_shards(data: Path):
    manifest = read_manifest(data)
    files = open_split({data: manifest}, "train")
    assert len(files) == sum(record.split == "train" for record in manifest.shards)
    assert [file.file_id for file in files] == sorted(file.file_id for file in files)


def test_a_missing_shard_is_named(data: Path):
    shard(data).unlink()
    with pytest.raises(DataError, match=r"test-00000\.bin: in the manifest but not on disk"):
        open_split({data: read_manifest(data)}, "train")


def test_a_truncated_shard_is_named_with_both_sizes(data: Path):
    with shard(data).open("r+b") as file:
        file.truncate(HEADER_BYTES + 100)
    with pytest.raises(DataError, match=r"test-00000\.bin: 4196 bytes.*truncated or replaced"):
        open_split({data: read_manifest(data)}, "train")


@pytest.mark.parametrize("place", [HEADER_BYTES, -1])
def test_a_byte_changed_at_either_end_is_refused(data: Path, place: int):
    content = bytearray(shard(data).read_bytes())
    content[place] ^= 1
    shard(data).write_bytes(content)
    with pytest.raises(DataError, match="fingerprint"):
        open_split({data: read_manifest(data)}, "train")


def test_shards_of_another_tokenizer_are_refused(data: Path):
    manifest = dataclasses.replace(read_manifest(data), tokenizer_digest="0" * 32)
    with pytest.raises(DataError, match="written with tokenizer"):
        open_split({data: manifest}, "train")


def test_the_same_content_twice_is_refused_with_both_names(data: Path):
    manifest = read_manifest(data)
    shutil.copy(shard(data), data / "train" / "copy.bin")
    twin = dataclasses.replace(manifest.shards[0], file="train/copy.bin")
    write_manifest(data, dataclasses.replace(manifest, shards=(*manifest.shards, twin)))
    with pytest.raises(DataError, match=r"(copy|test-00000)\.bin and .* same content"):
        open_split({data: read_manifest(data)}, "train")


def test_a_split_without_shards_is_refused(data: Path):
    with pytest.raises(DataError, match="no shard of split 'test'"):
        open_split({data: read_manifest(data)}, "test")


def test_a_shard_both_trained_on_and_held_out_is_refused(data: Path):
    files = open_split({data: read_manifest(data)}, "train")
    with pytest.raises(DataError, match=r"\(validation\) has the content of"):
        refuse_overlap(files, files[:1])

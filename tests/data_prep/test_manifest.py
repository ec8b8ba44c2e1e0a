import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.fingerprint import fingerprint
from data_prep.manifest import (
    Manifest,
    ManifestError,
    num_samples,
    read_manifest,
    record_shard,
    write_manifest,
)
from data_prep.shards import ShardWriter


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    with ShardWriter(
        tmp_path / "train", "text", vocab_size=10, tokenizer_digest="d", eos_id=0, shard_tokens=6
    ) as writer:
        writer.add(np.array([1, 2, 3, 4, 5, 6, 7]))
    records = [record_shard(tmp_path, path, h, source="text", sample_tokens=4) for path, h in writer.close()]
    made = Manifest(
        tokenizer_file="tokenizer.json",
        tokenizer_digest="d",
        vocab_size=10,
        eos_id=0,
        sample_tokens=4,
        shards=tuple(records),
    )
    write_manifest(tmp_path, made)
    return made


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path, manifest: Manifest):
    assert read_manifest(tmp_path) == manifest


def test_a_record_holds_place_split_counts_and_fingerprint(tmp_path: Path, manifest: Manifest):
    first, second = manifest.shards
    assert (first.file, first.split, first.source) == ("train/text-00000.bin", "train", "text")
    assert [record.sample_count for record in manifest.shards] == [2, 1]
    assert [record.document_count for record in manifest.shards] == [0, 1]
    assert second.fingerprint == fingerprint(tmp_path / second.file)


@pytest.mark.parametrize(("token_count", "expected"), [(2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_samples_cover_every_target_and_the_last_may_be_short(token_count: int, expected: int):
    assert num_samples(token_count, sample_tokens=4) == expected


def refusal(folder: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    assert "make prepare-data" in str(caught.value) or "expected" in str(caught.value)
    return str(caught.value)


def test_without_folder_or_manifest_the_error_names_the_remedy(tmp_path: Path):
    assert "no such data folder" in refusal(tmp_path / "nothing")
    assert "has no manifest.json" in refusal(tmp_path)


def edited(folder: Path, manifest: Manifest, edit: Any) -> str:
    write_manifest(folder, manifest)
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    edit(table)
    path.write_text(json.dumps(table))
    return refusal(folder)


def test_a_malformed_manifest_names_file_and_key(tmp_path: Path, manifest: Manifest):
    assert "manifest has no key 'eos_id'" in edited(tmp_path, manifest, lambda t: t.pop("eos_id"))
    assert "manifest.shards[1] has no key 'dtype'" in edited(tmp_path, manifest, lambda t: t["shards"][1].pop("dtype"))
    assert "vocab_size = '10', expected int" in edited(tmp_path, manifest, lambda t: t.update(vocab_size="10"))
    assert "shards[0] is 5, expected an object" in edited(tmp_path, manifest, lambda t: t.update(shards=[5]))
    assert "format = 'bessemer-data/9'" in edited(tmp_path, manifest, lambda t: t.update(format="bessemer-data/9"))
    assert str(tmp_path / "manifest.json") in edited(tmp_path, manifest, lambda t: t.update(format="other"))


@pytest.mark.parametrize("content", ["", '{"format": ', "[1, 2]", "\ufffe"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-16"))
    assert "manifest.json" in refusal(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    assert "manifest.json" in refusal(tmp_path)


def test_a_manifest_without_shards_is_refused(tmp_path: Path, manifest: Manifest):
    write_manifest(tmp_path, replace(manifest, shards=()))
    assert "shards is empty" in refusal(tmp_path)


def test_keys_of_a_later_version_are_ignored(tmp_path: Path, manifest: Manifest):
    table = json.loads((tmp_path / "manifest.json").read_text())
    table["licence"] = "MIT"
    (tmp_path / "manifest.json").write_text(json.dumps(table))
    assert read_manifest(tmp_path) == manifest

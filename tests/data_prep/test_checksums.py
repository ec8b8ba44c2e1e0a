import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_prep import checksums
from data_prep.checksums import (
    CHECKSUM_BYTES,
    TABLE_OFFSET,
    ChecksumError,
    checksum_path,
    main,
    read_checksum_header,
    verify_checksums,
    write_checksums,
)
from data_prep.manifest import read_manifest
from data_prep.shards import HEADER_BYTES, ShardError, ShardWriter, open_tokens, read_header
from tests.prepared import write_data


def write_shard(folder: Path, num_targets: int, vocab_size: int = 300, first: int = 1) -> Path:
    options = {"vocab_size": vocab_size, "tokenizer_digest": "d1", "eos_id": 0, "shard_tokens": 10_000}
    with ShardWriter(folder, "text", **options) as writer:
        writer.add(np.arange(first, first + num_targets - 1) % (vocab_size - 1) + 1)
    return writer.close()[0][0]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@given(
    num_targets=st.integers(1, 300),
    sample_tokens=st.integers(1, 320),
    vocab_size=st.sampled_from([300, 70_000]),
    read_bytes=st.integers(1, 2_000),
)
def test_checksum_j_is_that_of_sample_j_with_its_context(
    num_targets: int, sample_tokens: int, vocab_size: int, read_bytes: int
):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "_READ_BYTES", read_bytes)  # pieces of any size give the same table
        shard = write_shard(Path(folder), num_targets, vocab_size)
        path = write_checksums(shard, sample_tokens)
        header, tokens = read_checksum_header(shard), open_tokens(shard)
        assert header is not None
        samples = [tokens[i : i + sample_tokens + 1].tobytes() for i in range(0, num_targets, sample_tokens)]
        table = np.fromfile(path, dtype="<u4", offset=TABLE_OFFSET)
        assert table.tolist() == [xxhash.xxh3_64_intdigest(sample) % 2**32 for sample in samples]
        assert (header.num_checksums, header.sample_tokens) == (len(samples), sample_tokens)
        assert header.payload_xxh3 == read_header(shard).payload_xxh3
        verify_checksums(shard, header)


def read_and_verify(shard: Path) -> None:
    header = read_checksum_header(shard)
    assert header is not None
    verify_checksums(shard, header)


@given(at=st.integers(0, TABLE_OFFSET + 5 * CHECKSUM_BYTES - 1))
def test_any_flipped_byte_of_the_checksum_file_is_found(at: int):
    with tempfile.TemporaryDirectory() as folder:
        shard = write_shard(Path(folder), 50)
        flip(write_checksums(shard, 10), at)
        with pytest.raises(ChecksumError, match=r"text-00000\.xxh3: .*python -m data_prep checksums /"):
            read_and_verify(shard)


def test_a_shard_without_checksums_is_legal(tmp_path: Path):
    assert read_checksum_header(write_shard(tmp_path, 50)) is None


def test_checksums_of_another_shard_are_refused(tmp_path: Path):
    shard, other = write_shard(tmp_path / "a", 50), write_shard(tmp_path / "b", 50, first=7)
    shutil.copy(write_checksums(other, 10), checksum_path(shard))
    with pytest.raises(
        ChecksumError, match=r"xxh3: made for a shard with payload xxh3 .*python -m data_prep checksums"
    ):
        read_checksum_header(shard)


@pytest.mark.parametrize("keep", [0, 20, TABLE_OFFSET, TABLE_OFFSET + 7])
def test_a_checksum_file_that_was_cut_short_is_refused(tmp_path: Path, keep: int):
    shard = write_shard(tmp_path, 50)
    path = write_checksums(shard, 10)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ChecksumError, match="python -m data_prep checksums"):
        read_checksum_header(shard)


def test_rot_is_never_blessed(tmp_path: Path):
    shard = write_shard(tmp_path, 50)
    flip(shard, HEADER_BYTES + 61)
    with pytest.raises(ShardError, match="The tokens changed after they were written"):
        write_checksums(shard, 10)
    assert not checksum_path(shard).exists()


def test_the_command_makes_them_anew_for_each_shard_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_data(tmp_path / "data")
    manifest = read_manifest(folder)
    before = (folder / "manifest.json").read_bytes()
    for flags, expected in (([], manifest.sample_tokens), (["--sample-tokens", "16"], 16)):
        assert main([str(folder), *flags]) == 0
        assert f"{len(manifest.shards)} shards verified, one checksum for each {expected} targets" in (
            capsys.readouterr().out
        )
        for record in manifest.shards:
            header = read_checksum_header(folder / record.file)
            assert header is not None
            assert header.sample_tokens == expected
    assert (folder / "manifest.json").read_bytes() == before


def test_the_command_refuses_a_damaged_shard_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = write_data(tmp_path / "data")
    flip(folder / read_manifest(folder).shards[1].file, HEADER_BYTES + 100)
    for arguments, exit_code, message in (
        ([str(folder)], 65, "the payload's xxh3 is"),
        ([str(folder), "--sample-tokens", "0"], 65, "sample_tokens = 0"),
        ([str(tmp_path / "nowhere")], 65, "no such data folder"),
    ):
        assert main(arguments) == exit_code
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1

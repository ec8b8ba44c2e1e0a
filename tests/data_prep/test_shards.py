import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import shards
from data_prep.shards import HEADER_BYTES, ShardError, ShardHeader, ShardWriter, open_tokens, read_header

EOS = 3
Documents = list[list[int]]


def write(folder: Path, documents: Documents, shard_tokens: int, vocab_size: int = 300) -> list[Path]:
    options = {"vocab_size": vocab_size, "tokenizer_digest": "d1", "eos_id": EOS, "shard_tokens": shard_tokens}
    with ShardWriter(folder, "text", **options) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    return [path for path, _ in writer.close()]


def stream(documents: Documents) -> list[int]:
    return [EOS, *(token for document in documents for token in (*document, EOS))]


documents = st.lists(st.lists(st.integers(0, 299).filter(lambda token: token != EOS), max_size=40), max_size=12)


@given(documents, st.integers(1, 50))
def test_every_token_is_the_target_of_one_shard_and_the_first_is_a_copy_of_the_one_before(
    documents: Documents, shard_tokens: int
):
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder), documents, shard_tokens)
        expected = stream(documents)
        pieces = [open_tokens(path).tolist() for path in paths]
        for k, piece in enumerate(pieces):
            assert piece == expected[k * shard_tokens : (k + 1) * shard_tokens + 1]
        assert [EOS, *(token for piece in pieces for token in piece[1:])] == expected
        assert [path.name for path in paths] == [f"text-{k:05d}.bin" for k in range(len(paths))]
        assert sorted(Path(folder).iterdir()) == paths


@given(documents, st.integers(1, 50))
def test_counts_of_all_shards_add_up(documents: Documents, shard_tokens: int):
    with tempfile.TemporaryDirectory() as folder:
        headers = [read_header(path) for path in write(Path(folder), documents, shard_tokens)]
    assert sum(header.document_count for header in headers) == len(documents)
    assert sum(header.token_count - 1 for header in headers) == len(stream(documents)) - 1
    assert all(header.token_count - 1 == shard_tokens for header in headers[:-1])


def test_the_header_says_what_was_written(tmp_path: Path):
    (path,) = write(tmp_path, [[5, 6], [7]], shard_tokens=100)
    header = read_header(path)
    expected = ShardHeader("uint16", 300, "d1", EOS, token_count=6, document_count=2, payload_xxh3=header.payload_xxh3)
    assert header == expected
    shards.verify_payload(path)


def test_no_documents_give_no_shards(tmp_path: Path):
    assert write(tmp_path / "train", [], shard_tokens=10) == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32"), (200_000, "uint32")])
def test_ids_take_two_bytes_as_long_as_the_largest_fits(tmp_path: Path, vocab_size: int, dtype: str):
    largest = vocab_size - 1
    (path,) = write(tmp_path, [[0, largest]], shard_tokens=10, vocab_size=vocab_size)
    assert read_header(path).dtype == dtype
    assert open_tokens(path).dtype == np.dtype(dtype)
    assert open_tokens(path).tolist() == [EOS, 0, largest, EOS]


@pytest.mark.parametrize("bad_id", [-1, 300, 65_536 + 7, 2**40])
def test_ids_outside_the_vocabulary_are_refused_and_never_wrap(tmp_path: Path, bad_id: int):
    with pytest.raises(ShardError, match="another tokenizer"):
        write(tmp_path, [[5], [6, bad_id]], shard_tokens=10)
    assert list(tmp_path.iterdir()) == []


def test_the_end_token_inside_a_document_is_refused(tmp_path: Path):
    with pytest.raises(ShardError, match="end-of-document id 3 occurs inside"):
        write(tmp_path, [[5, EOS, 6]], shard_tokens=10)


@pytest.mark.parametrize("tokens", [np.zeros((2, 2), dtype=np.int64), np.array([1.5])])
def test_a_document_must_be_a_row_of_integers(tmp_path: Path, tokens: np.ndarray):
    writer = ShardWriter(tmp_path, "text", vocab_size=300, tokenizer_digest="", eos_id=EOS, shard_tokens=10)
    with pytest.raises(ShardError, match="1-d integer array"):
        writer.add(tokens)


@pytest.mark.parametrize(("eos_id", "shard_tokens"), [(300, 10), (-1, 10), (EOS, 0)])
def test_a_writer_refuses_settings_that_cannot_work(tmp_path: Path, eos_id: int, shard_tokens: int):
    with pytest.raises(ShardError):
        ShardWriter(tmp_path, "text", vocab_size=300, tokenizer_digest="", eos_id=eos_id, shard_tokens=shard_tokens)


def add_and_interrupt(writer: ShardWriter) -> None:
    writer.add(np.arange(10, 15))
    raise KeyboardInterrupt


def test_an_interrupted_writer_leaves_only_whole_shards(tmp_path: Path):
    with (
        pytest.raises(KeyboardInterrupt),
        ShardWriter(tmp_path, "text", vocab_size=300, tokenizer_digest="", eos_id=EOS, shard_tokens=4) as writer,
    ):
        add_and_interrupt(writer)
    assert [path.name for path in tmp_path.iterdir()] == ["text-00000.bin"]
    assert open_tokens(tmp_path / "text-00000.bin").tolist() == [EOS, 10, 11, 12, 13]


def damaged(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ShardError, match=re.escape(str(path))) as caught:
        read_header(path)
    return str(caught.value)


def test_a_damaged_shard_is_refused_with_its_name_and_the_damage(tmp_path: Path):
    (path,) = write(tmp_path, [[5, 6, 7]], shard_tokens=10)
    good = path.read_bytes()
    assert f"has {HEADER_BYTES + 8:,} bytes, its header promises {HEADER_BYTES + 10:,}" in damaged(path, good[:-2])
    assert f"has {HEADER_BYTES + 12:,} bytes" in damaged(path, good + b"\0\0")
    assert "the header alone has 4,096" in damaged(path, good[:100])
    assert "not a shard" in damaged(path, b"PK\x03\x04" + good[4:])
    assert "not a shard" in damaged(path, b"")
    assert "shard version 2" in damaged(path, good[:8] + b"\2\0\0\0" + good[12:])
    assert "unreadable header" in damaged(path, good[:16] + b"x" + good[17:])
    assert "unreadable header" in damaged(path, good.replace(b'"eos_id"', b'"eos_ix"'))
    assert "unreadable header" in damaged(path, good.replace(b'"uint16"', b'"uint32"'))
    assert "unreadable header" in damaged(path, good.replace(b'"vocab_size": 300', b'"vocab_size": "3"'))


def test_a_missing_shard_is_a_shard_error(tmp_path: Path):
    with pytest.raises(ShardError, match="No such file"):
        read_header(tmp_path / "nothing.bin")


def test_a_flipped_bit_in_the_payload_is_found(tmp_path: Path):
    (path,) = write(tmp_path, [[5, 6, 7]], shard_tokens=10)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match="payload's xxh3"):
        shards.verify_payload(path)


def test_tokens_are_mapped_read_only(tmp_path: Path):
    (path,) = write(tmp_path, [[5]], shard_tokens=10)
    with pytest.raises(ValueError, match="read-only"):
        open_tokens(path)[0] = 1


def test_headers_with_keys_of_a_later_version_are_read(tmp_path: Path):
    (path,) = write(tmp_path, [[5]], shard_tokens=10)
    header = read_header(path)
    table = {**{name: getattr(header, name) for name in header.__slots__}, "language": "zh"}
    assert shards._header_from_table(table) == replace(header)


def test_the_numpy_snippet_of_the_documentation_reads_a_shard(tmp_path: Path):
    (path,) = write(tmp_path, [[5, 6], [7]], shard_tokens=10)
    page = (Path(__file__).parents[2] / "docs" / "shard-format.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found: dict = {"path": path}
    exec(snippet, found)
    assert found["tokens"].tolist() == open_tokens(path).tolist()
    assert (found["version"], found["header"]["document_count"]) == (shards.VERSION, 2)

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cut import CutTask, Pieces, between, cut_shard, merge_neighbours, shard_pieces
from data_prep.shards import ShardWriter, open_tokens, read_header, verify_payload

EOS = 0


@st.composite
def documents(draw: st.DrawFn) -> list[tuple[int, int, int, bool]]:
    """Documents of some files: file, start, length, whether it is kept."""
    found = []
    for file in range(draw(st.integers(1, 4))):
        start = 0
        for length in draw(st.lists(st.integers(1, 12), max_size=8)):
            found.append((file, start, length, draw(st.booleans())))
            start += length
    return found


def pieces_of(found: list[tuple[int, int, int, bool]], folder: Path = Path()) -> Pieces:
    kept = np.array([row[:3] for row in found if row[3]], dtype=np.int64).reshape(-1, 3)
    return merge_neighbours([str(folder / f"{i}.bin") for i in range(4)], *kept.T)


def tokens_of(pieces: Pieces) -> list[tuple[str, int]]:
    return [
        (pieces.files[file], start + i)
        for file, start, length in zip(pieces.file, pieces.start, pieces.length, strict=True)
        for i in range(length)
    ]


@given(documents())
def test_joined_pieces_are_the_same_tokens_in_fewer_pieces(found: list[tuple[int, int, int, bool]]):
    pieces = pieces_of(found)
    expected = [(f"{file}.bin", start + i) for file, start, length, kept in found if kept for i in range(length)]
    assert tokens_of(pieces) == expected
    borders = [i for i in range(1, len(expected)) if expected[i] != (expected[i - 1][0], expected[i - 1][1] + 1)]
    assert pieces.file.size == (len(borders) + 1 if expected else 0)


@given(documents(), st.data())
def test_a_part_of_a_stream_is_that_part(found: list[tuple[int, int, int, bool]], data: st.DataObject):
    pieces = pieces_of(found)
    if not pieces.num_tokens:
        return
    first = data.draw(st.integers(0, pieces.num_tokens - 1))
    stop = data.draw(st.integers(first + 1, pieces.num_tokens))
    part = between(pieces, np.cumsum(pieces.length), first, stop)
    assert tokens_of(part) == tokens_of(pieces)[first:stop]
    assert set(part.files) == {file for file, _ in tokens_of(part)}
    assert (part.length > 0).all()


@settings(deadline=None, max_examples=40)
@given(documents(), st.integers(1, 9))
def test_cut_shards_are_those_that_a_writer_of_documents_makes(
    tmp_path_factory, found: list[tuple[int, int, int, bool]], shard_samples: int
):
    folder = tmp_path_factory.mktemp("cut")
    rng = np.random.default_rng(len(found))
    files = {}
    for file, start, length, _ in found:
        tokens = files.setdefault(file, np.zeros(200, dtype="<u2"))
        tokens[start : start + length - 1], tokens[start + length - 1] = rng.integers(1, 300, length - 1), EOS
    for file, tokens in files.items():
        tokens.tofile(folder / f"{file}.bin")
    shard_tokens = 2 * shard_samples
    options = {"vocab_size": 300, "tokenizer_digest": "digest", "eos_id": EOS}
    with ShardWriter(folder / "expected", "web", **options, shard_tokens=shard_tokens) as writer:
        for file, start, length, kept in found:
            if kept:
                writer.add(files[file][start : start + length - 1])
    records = [
        cut_shard(CutTask(str(folder), f"train/web-{i:05d}.bin", "web", content, context, 300, "digest", EOS, 2))
        for i, (content, context) in enumerate(shard_pieces(pieces_of(found, folder), shard_tokens))
    ]
    expected = sorted((folder / "expected").glob("*.bin"))
    assert [Path(record.file).name for record in records] == [path.name for path in expected]
    for record, path in zip(records, expected, strict=True):
        made = folder / record.file
        verify_payload(made)
        assert made.read_bytes() == path.read_bytes()
        assert (record.token_count, record.document_count) == (open_tokens(path).size, read_header(path).document_count)
        assert made.with_suffix(".xxh3").exists()


def test_a_shard_that_is_there_is_not_cut_again(tmp_path: Path):
    np.array([5, 6, EOS], dtype="<u2").tofile(tmp_path / "0.bin")
    pieces = pieces_of([(0, 0, 3, True)], tmp_path)
    task = CutTask(str(tmp_path), "train/web-00000.bin", "web", pieces, None, 300, "digest", EOS, 2)
    first = cut_shard(task)
    (tmp_path / "0.bin").unlink()
    assert cut_shard(task) == first

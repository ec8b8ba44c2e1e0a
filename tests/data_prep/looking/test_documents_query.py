from pathlib import Path

import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import documents_table
from data_prep.documents_table import DocumentsWriter
from data_prep.looking.documents_query import Bounds, DocumentsError, DocumentsQuery, Row

PATHS = ("a.jsonl", "b#1.jsonl", "数据.jsonl")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentsQuery, list[Row]]:
    """60 documents in groups of five, and the same as a list."""
    rows = [
        Row(
            path=PATHS[i // 20],
            line=i % 20 + 1,
            place=i % 20 * 10,
            source="web" if i % 3 else "books",
            language=None if i % 5 == 0 else "en",
            verdict="text.length" if i % 5 == 0 else "kept",
            duplicate_of=None,
            split=None if i % 5 == 0 else "train",
            start=None if i % 5 == 0 else i * 7,
            num_tokens=None if i % 5 == 0 else 7,
            text_bytes=None if i % 5 == 0 else 28,
            generation=3,
        )
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("table") / "documents.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_table, "GROUP_ROWS", 5)
        with DocumentsWriter(path) as writer:
            for row in rows:
                writer.add({name: [getattr(row, name)] for name in Row.__slots__ if name != "generation"})
    return DocumentsQuery(path, 3), rows


def test_bounds_pass_over_groups_and_lose_no_document(table: tuple[DocumentsQuery, list[Row]]):
    query, rows = table
    for wanted in rows:
        where = (pc.field("path") == wanted.path) & (pc.field("place") == wanted.place)
        bounds: Bounds = {"path": (wanted.path, wanted.path), "place": (wanted.place, wanted.place)}
        assert list(query.select(where, ["path", "place"], bounds)) == [wanted]
        assert len(list(query.tables(["path"], bounds))) == 1


def test_bounds_that_no_group_meets_read_nothing(table: tuple[DocumentsQuery, list[Row]]):
    query, _ = table
    assert not list(query.tables(["path"], {"path": ("c", "d")}))


@given(st.sets(st.integers(0, 47), max_size=10))
def test_what_is_picked_are_the_documents_of_those_ranks(table: tuple[DocumentsQuery, list[Row]], ranks: set[int]):
    query, rows = table
    kept, where = [row for row in rows if row.is_kept], pc.field("verdict") == "kept"
    assert query.count(where, ["verdict"]) == len(kept) == 48
    assert query.pick(where, ["verdict"], list(ranks)) == [kept[rank] for rank in sorted(ranks)]


def test_the_longest_document_is_known_without_reading_the_columns(table: tuple[DocumentsQuery, list[Row]]):
    assert table[0].longest() == 7


def test_a_table_that_is_damaged_or_missing_is_named(tmp_path: Path):
    (tmp_path / "documents.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    for name in ("documents.parquet", "missing.parquet"):
        with pytest.raises(DocumentsError, match=f"{name}: not readable .*restore it"):
            DocumentsQuery(tmp_path / name, 0).longest()

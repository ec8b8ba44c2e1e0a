import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.looking import html_parts, report_html
from data_prep.looking.prepared import PreparedFolder
from data_prep.looking.source_totals import SourceTotals
from data_prep.looking.text_table import visible
from tests.data_prep.looking.prepared_example import LONG, Example, make

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: which elements, whether each is closed, and what text is read."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return make(tmp_path_factory.mktemp("example"))


@pytest.fixture(scope="module")
def content(example: Example) -> str:
    path = report_html.write(example.folder)
    assert path == example.folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(content: str):
    page = Page(content)
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    for _, attributes in page.elements:
        assert {"src", "href", "onclick"}.isdisjoint(attributes)
    assert "@import" not in content
    assert "url(" not in content
    assert "default-src 'none'" in content


def test_markup_in_documents_and_names_shows_as_text(content: str, tmp_path: Path):
    assert "<example>" in Page(content).text
    assert "CC0 & more" in Page(content).text
    hostile = make(tmp_path)
    summary = hostile.folder / "generations/0000/summary.json"
    text = summary.read_text(encoding="utf-8").replace('"short"', '"</pre><script>alert(1)</script>\\u001b[2J"')
    summary.write_text(text, encoding="utf-8")
    page = Page(report_html.write(hostile.folder).read_text(encoding="utf-8"))
    assert "</pre><script>alert(1)</script>\\x1b[2J" in page.text
    assert "script" not in {tag for tag, _ in page.elements}


def test_the_page_says_what_became_of_everything(content: str, example: Example):
    text = Page(content).text
    for expected in (
        "tokenizer.json, byte-level BPE of 300 tokens; documents end with id 0, <|endoftext|>",
        "kept 6 (50.00%)",
        "dropped by filters 1 (8.33%)",
        "exact duplicates 2 (16.67%)",
        "near duplicates 2 (16.67%)",
        "bad lines 1 (8.33%)",
        "text.length: 1 samples",
        '{"text": \\xff<i>',
        f"{example.raw / 'web.jsonl'}:2",
        "not stated",
        "train/web-00003.bin",
        "email",
    ):
        assert expected in text
    rows = re.findall(r"<tr><td>(000\d)</td>(.*?)</tr>", content)
    assert [[name, *re.findall(r">(\d+)<", cells)] for name, cells in rows] == [
        ["0000", "1", "8", "4", "310", "4"],
        ["0001", "2", "4", "2", "90", "2"],
    ]


def test_near_duplicates_stand_beside_what_they_repeat_with_the_difference_marked(content: str, example: Example):
    pair = content[content.index('<div class="pair">') :]
    assert f"<code>{example.id('web.jsonl', 4)}</code><pre>{LONG}</pre>" in pair
    assert f"<code>{example.id('web.jsonl', 6)}</code><pre>{LONG}<mark>But not for long.</mark></pre>" in pair
    assert "elsewhere/old.jsonl#77 is repeated by" in Page(content).text


def test_without_the_raw_file_a_pair_is_its_ids(tmp_path: Path):
    moved = make(tmp_path)
    shutil.rmtree(moved.raw)
    text = Page(content_of(moved.folder)).text
    assert f"{moved.id('web.jsonl', 4)} is repeated by {moved.id('web.jsonl', 6)}" in text
    assert "But not for long." not in text


def test_the_same_folder_gives_the_same_page_before_and_after_its_manifest(
    content: str, example: Example, tmp_path: Path
):
    copy = tmp_path / "stage-1234"
    shutil.copytree(example.folder, copy)
    (copy / "manifest.json").unlink()
    (copy / "report.html").unlink()
    assert report_html.write(copy).read_text(encoding="utf-8") == content


def test_the_mixture_is_part_of_the_page_if_there_is_one(example: Example, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(example.folder, copy)
    assert "Proposed mixture" not in Page(content_of(copy)).text
    (copy / "mixture.toml").write_text('[data]\nmixture = ["web=0.5 notes=0.5"]\n', encoding="utf-8")
    assert 'mixture = ["web=0.5 notes=0.5"]' in Page(content_of(copy)).text


@given(st.text(), st.text())
def test_differences_lose_nothing_and_mark_only_what_the_other_lacks(first: str, second: str):
    sides = html_parts.differences(first, second)
    for side, text in zip(sides, (first, second), strict=True):
        assert Page(f"<pre>{side}</pre>").text == visible(text)
    if first == second:
        assert "<mark>" not in sides[0] + sides[1]


@given(st.lists(st.tuples(st.text(max_size=5), st.integers(0, 10**12)), max_size=8))
def test_bars_and_tables_of_any_counts_are_well_formed(counts: list[tuple[str, int]]):
    for part in (html_parts.stacked_bar(counts), html_parts.histogram(counts), html_parts.table(["a", "b"], counts)):
        Page(part)


def test_totals_count_each_line_once():
    totals = SourceTotals(documents=5, exact_duplicates=1, near_duplicates=2)
    totals.dropped.update({"a": 3, "b": 4})
    totals.bad.update({"c": 6})
    assert totals.lines == 21


def content_of(folder: Path) -> str:
    return report_html.content(PreparedFolder(folder))

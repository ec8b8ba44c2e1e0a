"""HTML that an extractor left in prose: tags and comments go, entities are decoded, in one pass over the text.

What was escaped stays text: "the &lt;b&gt; tag" becomes "the <b> tag". So does what only looks like a tag: "a < b",
and names that stand for something else, such as List<a> or "git config <section>", unless they have attributes or
their closing tag follows. Code in Markdown - fenced, indented, between backticks - is left as it is.
"""

import html
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

_BLOCKS: Final = "br p div li ul ol dl dt dd tr table tbody thead hr h1 h2 h3 h4 h5 h6 section article blockquote"
_INLINE: Final = "a b i u s em strong span font img td th sup sub small big center code tt"
_SELF_EVIDENT: Final = "br hr div li ul ol dl dt dd tr td th tbody thead h1 h2 h3 h4 h5 h6 blockquote"
_BLOCK_NAMES: Final = frozenset(_BLOCKS.split())
_SELF_EVIDENT_NAMES: Final = frozenset(_SELF_EVIDENT.split())
"""Often written without a closing tag, and hardly ever the name of anything else."""
_NAME: Final = "|".join(sorted([*_BLOCKS.split(), *_INLINE.split()], key=len, reverse=True))

_ENTITY: Final = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
_ATTRIBUTES: Final = r"""(?:\s{1,20}[\w:-]{1,40}\s?=\s?(?:"[^"<>]{0,1000}"|'[^'<>]{0,1000}'|[^\s"'<>]{1,1000})){0,20}"""
_MARKUP: Final = re.compile(
    rf"(?P<entity>{_ENTITY})|<!--[^<>]{{0,2000}}-->"
    rf"|<(?P<closes>/?)(?P<name>{_NAME})(?P<attributes>{_ATTRIBUTES})\s?(?P<void>/?)>(?P<line_end>\n?)",
    re.IGNORECASE,
)
_MAYBE_ENTITY: Final = re.compile(_ENTITY)
_MAYBE_TAG: Final = re.compile(r"<[/!a-zA-Z]")
_CLOSING: Final = re.compile(rf"</({_NAME})\s?>", re.IGNORECASE)

_MARKDOWN: Final = re.compile(r"^#{1,6} |^[ \t]{0,12}(?:```|~~~)|(?<!`)`[^`\n]{1,80}`(?!`)|\]\(", re.MULTILINE)
_FENCE: Final = re.compile(r"^[ \t]{0,12}(?:(`{3,})([^`\n]*)|(~{3,})([^\n]*))$", re.MULTILINE)
_CODE_SPAN: Final = re.compile(r"(?<!`)(`{1,2})(?!`)[^`\n]{1,400}\1(?!`)")
_INDENT: Final = re.compile(r" {4}| {0,3}\t")
_NO_PARAGRAPH: Final = re.compile(r"\s*\Z|#{1,6} |[ \t]{0,12}(?:```|~~~)")


def remove_html(text: str) -> str:
    """Remove comments and common tags, and decode entities, once; linear in the length of any text."""
    has_entity = "&" in text and _MAYBE_ENTITY.search(text) is not None
    if not has_entity and not ("<" in text and _MAYBE_TAG.search(text)):
        return text
    last_closing = {match[1].lower(): match.start() for match in _CLOSING.finditer(text)}
    code = _Code(text)

    def replacement(match: re.Match[str]) -> str:
        if match.start() in code:
            return match[0]
        if match["entity"]:
            return _decoded(match[0])
        if not match["name"]:
            return ""  # a comment
        name = match["name"].lower()
        is_marked = match["closes"] or match["attributes"] or match["void"] or name in _SELF_EVIDENT_NAMES
        if not is_marked and last_closing.get(name, -1) < match.start():
            return match[0]
        return "\n" if name in _BLOCK_NAMES else match["line_end"]

    return _MARKUP.sub(replacement, text)


def _decoded(entity: str) -> str:
    character = html.unescape(entity)
    # A surrogate or an unknown name: not what an entity in a text could mean.
    return entity if character == "\ufffd" else character


class _Code:
    """The places of a text that are code in Markdown."""

    def __init__(self, text: str) -> None:
        spans: list[tuple[int, int]] = []
        if _MARKDOWN.search(text):
            spans = sorted([*_fenced(text), *_indented(text), *(match.span() for match in _CODE_SPAN.finditer(text))])
        self._starts = [start for start, _ in spans]
        # The furthest end so far: spans may lie in one another.
        self._ends = list(accumulate((end for _, end in spans), max))

    def __contains__(self, place: int) -> bool:
        index = bisect_right(self._starts, place) - 1
        return index >= 0 and place < self._ends[index]


def _fenced(text: str) -> Iterator[tuple[int, int]]:
    """Blocks between two fences; a fence that nothing closes is an ornament."""
    fences = [(match.span(), match[1] or match[3], match[2] or match[4]) for match in _FENCE.finditer(text)]
    closing_left = Counter(fence for _, fence, info in fences if not (info or "").strip())
    opened: tuple[int, str] | None = None
    for (start, end), fence, info in fences:
        may_close = not (info or "").strip()
        closing_left[fence] -= may_close
        if opened is None:
            opened = (start, fence) if closing_left[fence] > 0 else None
        elif may_close and fence == opened[1]:
            yield opened[0], end
            opened = None


def _indented(text: str) -> Iterator[tuple[int, int]]:
    """Lines that are indented and do not go on with a paragraph."""
    start = 0
    in_paragraph = False
    for line in text.split("\n"):
        is_blank = not line.strip()
        if not is_blank and not in_paragraph and _INDENT.match(line):
            yield start, start + len(line)
        else:
            in_paragraph = not _NO_PARAGRAPH.match(line)
        start += len(line) + 1

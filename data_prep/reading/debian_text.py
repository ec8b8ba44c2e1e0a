"""The text of manual pages and of HTML documents, without their markup."""

import re
from html.parser import HTMLParser

_COMMENT = re.compile(r'^[.\']\\"|^\.\s*$')
_ESCAPE = re.compile(
    r"\\(?:f(?:\[[^]]*\]|\(..|.)|s[+-]?\d|\*(?:\[[^]]*\]|\(..|.)|[hvwbo]'[^']*'|\((?P<pair>..)|\[(?P<name>[^]]*)\]|(?P<one>.))"
)
_NAMED = {"em": "—", "en": "–", "hy": "-", "bu": "•", "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’"}
_NAMED |= {
    "co": "©",
    "rg": "®",
    "ha": "^",
    "ti": "~",
    "rs": "\\",
    "ga": "`",
    "->": "→",
    "<-": "←",
    "mu": "×",
    "mi": "-",
}
_SINGLE = {"e": "\\", "-": "-", " ": " ", "~": " ", "0": " ", "t": " ", ".": ".", "'": "'", "`": "`", "\\": "\\"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_FONTS = {"B", "I", "SM", "R", "BI", "IB", "BR", "RB", "IR", "RI", "SB"}
_PARAGRAPHS = {"PP", "P", "LP", "sp", "HP", "RS", "RE", "bp"}
# What stands between these is no running text.
_LEFT_OUT = {"TS": "TE", "EQ": "EN", "PS": "PE", "de": ".", "ig": "."}
# Between Han characters, kana and full-width punctuation a line break of the source is no space.
_WIDE_BREAK = re.compile(
    r"(?<=[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef])\n(?=[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef])"
)
# While a page is read, \n is where its source was broken, and these end a line, a paragraph, a cell of a table.
_LINE, _PARAGRAPH, _CELL = "\v", "\x1e", "\x1f"


def man_text(source: str) -> str:
    """The text of a manual page in the man macros; empty if the page only points to another."""
    page = _ManPage()
    for line in source.splitlines():
        page.add(line)
    return _tidy(page.text())


def html_text(source: str) -> str:
    """The text of an HTML document, without navigation and table of contents."""
    page = _HtmlPage()
    page.feed(source)
    page.close()
    return _tidy("".join(page.parts))


class _ManPage:
    def __init__(self) -> None:
        self._parts: list[str] = []
        self._is_filled = True
        self._ends_at: str | None = None  # the request that ends what is left out
        self._is_tag = False

    def text(self) -> str:
        return "".join(self._parts)

    def add(self, line: str) -> None:
        if self._ends_at is not None:
            if line[1:].strip() == self._ends_at:
                self._ends_at = None
        elif _COMMENT.match(line):
            return
        elif line[:1] in (".", "'"):
            name, _, rest = line[1:].strip().partition(" ")
            self._request(name, [a.replace('""', '"') or b for a, b in _ARGUMENT.findall(rest)])
        else:
            self._write(line)

    def _request(self, name: str, arguments: list[str]) -> None:
        if name in _LEFT_OUT:
            self._ends_at = _LEFT_OUT[name]
        elif name in ("SH", "SS"):
            self._parts.append(_PARAGRAPH)
            self._write(" ".join(arguments))
            self._parts.append(_LINE)
        elif name in _FONTS:
            self._write(("" if len(name) == 2 and name not in ("SM", "SB") else " ").join(arguments))
        elif name in _PARAGRAPHS:
            self._parts.append(_PARAGRAPH)
        elif name == "br":
            self._parts.append(_LINE)
        elif name in ("TP", "TQ", "IP"):
            self._parts.append(_PARAGRAPH)
            self._is_tag = name != "IP"
            if arguments and name == "IP":
                self._write(arguments[0])
        elif name in ("nf", "EX", "fi", "EE"):
            self._parts.append(_LINE)
            self._is_filled = name in ("fi", "EE")

    def _write(self, line: str) -> None:
        text = _unescaped(line)
        if not text.strip():
            self._parts.append(_PARAGRAPH)
            return
        self._parts += [text.strip() if self._is_filled else text.rstrip(), "\n"]
        if self._is_tag or not self._is_filled or text.startswith(" "):
            self._parts.append(_LINE)
        self._is_tag = False


def _unescaped(line: str) -> str:
    def character(match: re.Match[str]) -> str:
        name = match["pair"] or match["name"]
        return _NAMED.get(name, "") if name else _SINGLE.get(match["one"] or "", "")

    return _ESCAPE.sub(character, line.partition('\\"')[0])


class _HtmlPage(HTMLParser):
    _VOID = frozenset(("br", "hr", "img", "link", "meta", "input", "col", "area", "base", "wbr"))
    _BLOCKS = frozenset(
        ("p", "div", "li", "ul", "ol", "dl", "dt", "dd", "table", "tr", "pre", "blockquote", "section", "title")
    ) | {f"h{level}" for level in range(1, 7)}
    _LEFT_OUT = frozenset(("head", "script", "style", "nav"))
    _LEFT_OUT_CLASSES = frozenset(("navheader", "navfooter", "docnav", "toc", "indexterm"))
    _LEFT_OUT_IDS = frozenset(("banner", "title"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._left_out_depth = 0
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.parts.append(_LINE)
        if tag in self._VOID:
            return
        values = dict(attrs)
        classes = set((values.get("class") or "").split())
        is_left_out = (
            tag in self._LEFT_OUT or classes & self._LEFT_OUT_CLASSES or values.get("id") in self._LEFT_OUT_IDS
        )
        if is_left_out or self._left_out_depth:
            self._left_out_depth += 1
            return
        self._pre_depth += tag == "pre"
        self._separate(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self.parts.append(_LINE)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._VOID:
            return
        if self._left_out_depth:
            self._left_out_depth -= 1
            return
        self._pre_depth -= tag == "pre"
        self._separate(tag)

    def handle_data(self, data: str) -> None:
        if self._left_out_depth:
            return
        if self._pre_depth:
            self.parts.append(re.sub(r"\n[ \t]*\n", _PARAGRAPH, data).replace("\n", _LINE))
            return
        text = re.sub(r"\s+", lambda blank: "\n" if "\n" in blank[0] else " ", data)
        if self.parts and self.parts[-1].endswith((_LINE, _PARAGRAPH, _CELL)):
            text = text.lstrip()
        if text:
            self.parts.append(text)

    def _separate(self, tag: str) -> None:
        if tag in self._BLOCKS:
            is_paragraph = tag in ("p", "pre", "table", "ul", "ol", "dl") or tag[0] == "h"
            self.parts.append(_PARAGRAPH if is_paragraph else _LINE)
        elif tag in ("td", "th"):
            self.parts.append(_CELL)


def _tidy(text: str) -> str:
    text = _WIDE_BREAK.sub("", re.sub(r" *\n[ \n]*", "\n", text))
    text = re.sub(r"(?<=[\v\x1e])[\n\x1f]+|[\n\x1f]+(?=[\v\x1e])", "", text)
    text = re.sub(r"[ \n]*\x1f[ \n\x1f]*|\n", " ", text)
    text = re.sub(r" *[\v\x1e]+(?: *[\v\x1e]+)*", lambda ends: "\n\n" if _PARAGRAPH in ends[0] else "\n", text)
    return text.strip()

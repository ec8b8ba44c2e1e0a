"""Pieces of a self-contained HTML page: everything that comes in as text is escaped here, markup is only made here."""

import difflib
import html
import re
from collections.abc import Iterable, Sequence

from data_prep.looking.text_table import visible

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d2428; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { margin-top: 2.4rem; border-bottom: 2px solid #d9dfe3 }
h3 { margin: 1.5rem 0 .3rem; font-size: 1.02rem } p.note { color: #5a666d; margin: .2rem 0 .8rem }
table { border-collapse: collapse; margin: .4rem 0 1rem } th { text-align: left; color: #5a666d; font-weight: 600 }
th, td { padding: .18rem .9rem .18rem 0; border-bottom: 1px solid #e7ebee; vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f7f8; padding: .5rem .7rem; margin: .2rem 0 .8rem;
  font: 13px/1.4 ui-monospace, monospace } details { margin: .2rem 0 } summary { cursor: pointer }
.bar { display: flex; height: 1.4rem; border-radius: 3px; overflow: hidden; background: #e7ebee }
.bar span { min-width: 1px } .legend { margin: .3rem 0 1rem } .legend span { margin-right: 1.2rem; white-space: nowrap }
.legend i, .bar span { print-color-adjust: exact; -webkit-print-color-adjust: exact }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .pair code { overflow-wrap: anywhere }
mark { background: #ffe2a8; print-color-adjust: exact; -webkit-print-color-adjust: exact }
svg { display: block; max-width: 100% } svg rect { fill: #4a7ea8 } svg text { font: 11px system-ui, sans-serif }
@media print { body { margin: 0; max-width: none; font-size: 12px } .pair { break-inside: avoid } }
"""
_COLOURS = ("#2f7d4f", "#d08a2e", "#6d6fb0", "#b0b1d6", "#b5423c", "#4a7ea8", "#8c6d4f", "#7d9b3a", "#999999")
_BAR_WIDTH, _BAR_HEIGHT = 46, 110
_WORD = re.compile(r"[A-Za-z0-9_]+|\s+|.", re.DOTALL)


class Markup(str):
    """HTML that is well-formed and escaped; any other text is escaped when it becomes part of a page."""

    __slots__ = ()


def escaped(text: object) -> Markup:
    """Any text as HTML; Markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(visible(str(text))))


def element(name: str, *content: object, of: str = "") -> Markup:
    """An element with its content; `of` is its class."""
    of_class = f' class="{html.escape(of)}"' if of else ""
    return Markup(f"<{name}{of_class}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """Parts one behind the other."""
    return Markup("".join(escaped(part) for part in parts))


def page(title: str, *content: object) -> Markup:
    """A whole page. Nothing in it is loaded from elsewhere, and no script runs in it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{escaped(title)}</title><style>{_STYLE}</style>'
    )
    body = element("body", *content)
    return Markup(f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n')


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; cells that are numbers stand to the right."""
    filled = list(rows)
    is_number = [all(isinstance(row[i], int | float) for row in filled) for i in range(len(heads))]
    kinds = ["number" if filled and right else "" for right in is_number]
    lines = [element("tr", *(element("th", head, of=kind) for head, kind in zip(heads, kinds, strict=True)))]
    for row in filled:
        cells = (element("td", number(cell), of=kind) for cell, kind in zip(row, kinds, strict=True))
        lines.append(element("tr", *cells))
    return element("table", Markup("\n"), *(Markup(f"{line}\n") for line in lines))


def facts(rows: Iterable[tuple[str, object]]) -> Markup:
    """A table of names and values."""
    lines = (element("tr", element("th", name), element("td", number(value), of="number")) for name, value in rows)
    return element("table", *(Markup(f"{line}\n") for line in lines))


def number(value: object) -> object:
    """A number as people read it; anything else as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else value


def share(part: int, whole: int) -> str:
    """A part in percent."""
    return f"{part / max(whole, 1):.2%}"


def stacked_bar(parts: Sequence[tuple[str, int]]) -> Markup:
    """Parts of a whole as a bar, with a legend that says them in numbers; colours are those of the places."""
    total = sum(count for _, count in parts)
    colours = [_COLOURS[min(index, len(_COLOURS) - 1)] for index in range(len(parts))]
    pieces = [
        Markup(f'<span style="flex: {count} 0 0; background: {colour}"></span>')
        for (_, count), colour in zip(parts, colours, strict=True)
        if count
    ]
    legend = [
        element("span", Markup(f'<i style="background: {colour}"></i>'), f"{name} {count:,} ({share(count, total)})")
        for (name, count), colour in zip(parts, colours, strict=True)
        if count
    ]
    return joined([element("div", *pieces, of="bar"), element("div", *legend, of="legend")])


def histogram(bars: Sequence[tuple[str, int]]) -> Markup:
    """Counts as upright bars with their names below."""
    most = max((count for _, count in bars), default=0)
    width, height = _BAR_WIDTH * max(len(bars), 1), _BAR_HEIGHT + 36
    parts: list[str] = []
    for index, (name, count) in enumerate(bars):
        left, size = index * _BAR_WIDTH, round(_BAR_HEIGHT * count / max(most, 1), 1)
        middle, top = left + _BAR_WIDTH // 2 - 2, 16 + _BAR_HEIGHT - size
        label = f"{count:,}" if count < 10_000 else f"{count / 1e3:,.0f}k"
        parts.append(f'<rect x="{left}" y="{top:g}" width="{_BAR_WIDTH - 4}" height="{size:g}"/>')
        parts.append(f'<text x="{middle}" y="{top - 4:g}" text-anchor="middle">{escaped(label)}</text>')
        parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escaped(name)}</text>')
    return Markup(
        f'<svg role="img" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def folded(title: object, *content: object) -> Markup:
    """Content that is shown when its title is clicked."""
    return element("details", element("summary", title), *content)


def differences(first: str, second: str) -> tuple[Markup, Markup]:
    """Two texts, each with what the other lacks marked."""
    words = _WORD.findall(first), _WORD.findall(second)
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, *ends in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, own, (start, stop) in zip(sides, words, (ends[:2], ends[2:]), strict=True):
            content = "".join(own[start:stop])
            side.append(escaped(content) if kind == "equal" or not content else element("mark", content))
    return joined(sides[0]), joined(sides[1])

"""Text for a terminal or a page: tables, and nothing that moves the cursor."""

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[-+]?[\d,.]+%?")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_CONTROL |= {code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)}  # of file names that are not UTF-8
_LINE_ENDS = {ord("\n"): "\\n", ord("\t"): "\\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def aligned(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of text as lines with aligned columns, those of numbers to the right."""
    columns: list[list[str]] = []
    for cells in zip(heads, *rows, strict=True):
        width = max(map(len, cells))
        is_number = all(_NUMBER.fullmatch(cell) for cell in cells[1:] if cell)
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def visible(text: str) -> str:
    """The text with control characters spelled out, as raw files may hold any."""
    return text.translate(_CONTROL)


def one_line(name: str) -> str:
    """A name with control characters and line ends spelled out: a file can be called anything."""
    return visible(name).translate(_LINE_ENDS)

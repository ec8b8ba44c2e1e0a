"""What a file holds, told by its suffix."""

import re
from typing import Literal

_CODE = (
    ".asm .bash .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .el .erl .ex .exs .f .f90 .f95 .fish "
    ".fs .go .gradle .groovy .h .hh .hpp .hs .htm .html .hxx .ipy .java .jl .js .jsx .kt .kts .less .lisp "
    ".lua .m .mjs .ml .mli .mm .nim .php .pl .pm .proto .ps1 .py .pyi .pyx .r .rb .rs .s .scala .scss .sh "
    ".sql .sv .swift .tex .ts .tsx .v .vb .vhd .vhdl .vim .vue .zig .zsh"
)
CODE_SUFFIXES = tuple(_CODE.split())
PROSE_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
TEXT_SUFFIXES = (*PROSE_SUFFIXES, *CODE_SUFFIXES)
LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
COMPRESSIBLE_SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json")
KNOWN_SUFFIXES = (*COMPRESSIBLE_SUFFIXES, ".parquet")

FileKind = Literal["text", "jsonl", "json", "parquet"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Whether a path names a place that is reached by a protocol, such as s3://bucket/key."""
    return _URL.match(path) is not None


def compression(path: str) -> str:
    """The last suffix, lower-case, if it is one of COMPRESSIONS, else nothing."""
    name = _name(path).lower()
    return next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")


def content_suffix(path: str) -> str:
    """The suffix that tells what is inside, lower-case: `.jsonl` of `a.jsonl.gz`; nothing if the name has none."""
    name = _name(path)
    name = name[: len(name) - len(compression(path))]
    return "." + name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def file_kind(path: str) -> FileKind | None:
    """What kind of file a path names; None if it is not known."""
    suffix = content_suffix(path)
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in LINE_SUFFIXES:
        return "jsonl"
    if suffix == ".json":
        return "json"
    return "parquet" if suffix == ".parquet" and not compression(path) else None


def _name(path: str) -> str:
    # A download link may carry questions behind the name.
    return path.partition("?")[0] if is_url(path) else path

"""Chinese texts from Debian packages, as one jsonl file: `python -m data_prep debian-chinese FOLDER`.

For Debian and Ubuntu machines that reach a mirror: manual pages, the Debian Reference and the Debian Administrator's
Handbook, under GFDL, GPL and CC-BY-SA. The packages are downloaded and unpacked, not installed; no root is needed.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep import publish
from data_prep.reading.debian_text import html_text, man_text
from data_prep.reading.storage import InputError

PACKAGES = ("manpages-zh", "debian-reference-zh-cn", "debian-handbook")
TEXTS_FILE = "debian-chinese.jsonl"
MIN_CHINESE_SHARE = 0.1
"""Pages with a smaller share of Han characters were not translated."""
_PATTERNS = {
    "manpages-zh": "usr/share/man/zh_*/man*/*.gz",
    "debian-reference-zh-cn": "usr/share/debian-reference/*.zh-cn.html",
    "debian-handbook": "usr/share/doc/debian-handbook/html/zh-*/*.html",
}
_HAN = re.compile(r"[\u4e00-\u9fff]")
_EXIT_UNAVAILABLE = 69


class DebianError(InputError):
    """The packages cannot be had here; the message says why, and what to do."""


def debian_chinese(folder: Path) -> Path:
    """Download the packages and write their Chinese texts to `<folder>/debian-chinese.jsonl`.

    Raises:
        DebianError: no Debian or Ubuntu, no mirror that answers, or packages without Chinese texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".debian-", dir=folder) as name:
        unpack(Path(name))
        records = list(chinese_texts(Path(name)))
    if not records:
        raise DebianError(f"{', '.join(PACKAGES)}: no Chinese text found in them; this version of them is not known")
    path = folder / TEXTS_FILE
    publish.write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def unpack(folder: Path) -> None:
    """Download the packages and unpack them into one tree.

    Raises:
        DebianError: see `debian_chinese`.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise DebianError(f"{program}: not found; Chinese texts come from packages of Debian or Ubuntu")
    patience = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::Retries=2")
    _run(["apt-get", *patience, "download", *PACKAGES], folder, "Is a mirror reachable? Try `apt-get update` first")
    for package in sorted(folder.glob("*.deb")):
        _run(["dpkg-deb", "-x", package.name, "."], folder, "Download it again")


def chinese_texts(tree: Path) -> Iterator[dict[str, str]]:
    """A record for each Chinese page of an unpacked tree, in the order of packages and names."""
    for package, pattern in _PATTERNS.items():
        for path in sorted(tree.glob(pattern)):
            text = "" if path.is_symlink() else _page_text(path)
            if text and len(_HAN.findall(text)) >= MIN_CHINESE_SHARE * len(text):
                yield {"text": text, "package": package, "path": path.relative_to(tree).as_posix()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `debian_chinese` from the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep debian-chinese", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"where to write {TEXTS_FILE}")
    folder = parser.parse_args(argv).folder
    try:
        path = debian_chinese(folder)
    except DebianError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_UNAVAILABLE
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB of Chinese text; give it to data_prep.pipeline as --input.paths")
    return 0


def _run(command: list[str], folder: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise DebianError(f"{' '.join(command)}: {'; '.join(reasons[:3]) or f'exit code {done.returncode}'}. {remedy}")


def _page_text(path: Path) -> str:
    """The text of a page; nothing of one that cannot be read."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        source = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return ""
    return man_text(source) if path.suffix == ".gz" else html_text(source)

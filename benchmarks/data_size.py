"""What data preparation needs on disk beyond torch: the distributions that it imports, and those that they require."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

import data_prep

_ENCODER = Path(sys.prefix) / "encoder"


def installed_sizes() -> dict[str, int]:
    """Bytes of each distribution that is needed and that torch alone would not bring, largest first."""
    needed = _with_requirements(_imported_distributions()) - _with_requirements({"torch"})
    sizes = {name: _size_bytes(name) for name in needed}
    if _ENCODER.is_dir():
        sizes["the encoder's folder"] = sum(path.stat().st_size for path in _ENCODER.rglob("*") if path.is_file())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _imported_distributions() -> set[str]:
    """Distributions of requirements.txt, or optional ones that are installed, that a module of data_prep imports."""
    distributions = metadata.packages_distributions()
    folder = Path(next(iter(data_prep.__path__)))
    modules = {name for path in folder.rglob("*.py") for name in _imports(path)}
    return {_normal(name) for module in modules for name in distributions.get(module, ())}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def _with_requirements(names: Iterable[str]) -> set[str]:
    """The distributions, and all that they require here without extras, as far as they are installed."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in found or name == "bessemer":
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        wanted = [Requirement(text) for text in required]
        todo += [_normal(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def _size_bytes(name: str) -> int:
    files = [Path(str(file.locate())) for file in metadata.files(name) or []]
    return sum(path.stat().st_size for path in files if path.is_file())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""What an evaluation leaves behind: every judged item on a line of its own, and shares with their intervals."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep import publish


def write_items(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; the file appears whole."""
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    publish.make_folder(path.parent)
    publish.write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def wilson_interval(num_correct: int, num_items: int, z: float = 1.959964) -> tuple[float, float]:
    """The interval of shares that num_correct of num_items is compatible with, at 95 % with the usual z.

    It stays inside [0, 1], and has a width when nothing or everything is correct.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    if num_items == 0:
        return 0.0, 1.0
    share, shrink = num_correct / num_items, 1 + z**2 / num_items
    centre = (share + z**2 / (2 * num_items)) / shrink
    half_width = z / shrink * math.sqrt(share * (1 - share) / num_items + z**2 / (4 * num_items**2))
    # At 0 and at 1 the bounds are exact, but for rounding.
    return min(max(0.0, centre - half_width), share), max(min(1.0, centre + half_width), share)

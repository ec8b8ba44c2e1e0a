"""The ways to find near-duplicates, by the name that the configuration knows them by."""

from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from data_prep.duplicates import minhash, simhash
from data_prep.duplicates.dedup import Similarity

Sketcher = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def sketcher(near: str) -> Sketcher | None:
    """What makes band keys and sketches of texts; None for "off"."""
    return None if near == "off" else _module(near).sketch


def similarity(near: str) -> Similarity:
    """What compares two sketches."""
    return _module(near).similarity


def digest(near: str) -> str:
    """Changes whenever sketches do."""
    return near if near == "off" else f"{near}-{_module(near).VERSION}"


def _module(near: str) -> ModuleType:
    return {"minhash": minhash, "simhash": simhash}[near]

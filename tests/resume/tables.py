"""Permutations and mixtures from tables: tests that replay small orders often compute each of them once."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from resume import mixture
from resume.permutation import Permutation


class Table:
    """A small permutation, looked up."""

    def __init__(self, n: int, key: int):
        self._forwards = Permutation(n, key)(np.arange(n))
        self._backwards = np.argsort(self._forwards).astype(np.uint64)

    def __call__(self, positions: NDArray) -> NDArray[np.uint64]:
        return self._looked_up(self._forwards, positions)

    def inverse(self, indices: NDArray) -> NDArray[np.uint64]:
        return self._looked_up(self._backwards, indices)

    def _looked_up(self, table: NDArray[np.uint64], places: NDArray) -> NDArray[np.uint64]:
        assert not len(places) or places.min() >= 0  # as a permutation refuses them
        return table[places]


@contextlib.contextmanager
def computed_once() -> Iterator[None]:
    """Inside, permutations and the blocks of mixtures are made once and then looked up."""
    tables: dict[tuple[int, int], Table] = {}
    blocks: dict[tuple[int, bytes], Any] = {}
    make_block = mixture._Block

    def table(n: int, key: int) -> Table:
        if (n, key) not in tables:
            tables[n, key] = Table(n, key)
        return tables[n, key]

    def block(quotas: NDArray[np.int64], key: int) -> Any:
        name = (key, quotas.tobytes())
        if name not in blocks:
            blocks[name] = make_block(quotas, key)
        return blocks[name]

    with (
        mock.patch.object(mixture, "_Block", block),
        mock.patch("resume.chain.Permutation", table),
        mock.patch("resume.order.Permutation", table),
    ):
        yield

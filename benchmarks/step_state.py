"""What all rows of the step benchmark begin with, and the device memory that a row gives back while others run."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import initial_value
from model.transformer import Transformer


class InitialValues(Mapping[str, Tensor]):
    """The initial value of every parameter, drawn once for all rows; page-locked if they are to go to a GPU.

    Every block of every row begins with them, so that no row has to keep what it has trained while others run.
    """

    def __init__(self, config: ModelConfig, seed: int, pin_memory: bool):
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in Transformer(config).state_dict().items()}
        if config.tie_embeddings:
            shapes["head.weight"] = shapes["embedding.weight"]

        def draw(name: str) -> Tensor:
            drawn = "embedding.weight" if config.tie_embeddings and name == "head.weight" else name
            value = initial_value(config, drawn, shapes[name], seed)
            return value.pin_memory() if pin_memory else value

        # A billion normal numbers take one core half a minute; each matrix has a generator of its own.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            self._values = dict(zip(shapes, threads.map(draw, shapes), strict=True))

    def value(self, name: str, shape: torch.Size) -> Tensor:
        """The value of a parameter, as a model is filled with."""
        assert self._values[name].shape == shape, name
        return self._values[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class DeviceMemory:
    """The memory of a row's weights and moments, given back while other rows run. What was in it is lost.

    The tensors stay the objects that module, optimizer and compiled code know: only their storages become empty.
    """

    def __init__(self) -> None:
        self._given_back: list[tuple[torch.UntypedStorage, int]] = []

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Empties the storages of these tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if size_bytes := storage.nbytes():
                self._given_back.append((storage, size_bytes))
                storage.resize_(0)

    def take(self) -> None:
        """Gives the storages their sizes again; they hold nothing of use."""
        while self._given_back:
            storage, size_bytes = self._given_back[-1]
            storage.resize_(size_bytes)
            self._given_back.pop()

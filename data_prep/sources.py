"""The sources of a preparation: which files each has, how they are read, and which of them are new to a data folder."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.generations import Generation, Input
from data_prep.prepare_config import PrepareConfig, SourceConfig
from data_prep.reading import corpus, storage
from data_prep.reading.corpus import InputFile
from data_prep.reading.documents import InputError
from data_prep.reading.file_kinds import is_url
from data_prep.reading.templates import Layout


class ChangedInputError(InputError):
    """A file is not what it was when it was prepared."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source with its files found."""

    name: str
    config: SourceConfig
    files: tuple[InputFile, ...]

    @property
    def layout(self) -> Layout:
        """How its records become documents."""
        return self.config.read_layout()


def find_sources(config: PrepareConfig) -> list[Source]:
    """Every source with its files, in the order of the configuration.

    Raises:
        InputError: a pattern that leads nowhere, or a file that two sources claim.
    """
    if config.sources:
        sources = [Source(name, source, _files(source)) for name, source in config.sources.items()]
    else:
        sources = [Source(config.input.source_name, config.input, _files(config.input))]
    claimed: dict[str, str] = {}
    for source in sources:
        for file in source.files:
            other = claimed.setdefault(os.path.realpath(file.path), source.name)
            if other != source.name:
                raise InputError(f"{file.path}: belongs to the sources {other} and {source.name}; leave it to one")
    return sources


def identify(sources: Sequence[Source]) -> dict[Input, InputFile]:
    """Every file of the input by what it holds; of files of one source with equal content and name only the first."""
    found: dict[Input, InputFile] = {}
    for source in sources:
        for file in source.files:
            found.setdefault(Input(source.name, file.name, _file_id(file)), file)
    return found


def new_inputs(current: Sequence[Input], folder: str, older: Sequence[Generation]) -> list[Input]:
    """What a data folder does not hold yet. A file that moved, or is gone, changes nothing: what it gave stays.

    Raises:
        ChangedInputError: a file has changed under its name since it was prepared.
    """
    held = [item for generation in older for item in generation.inputs]
    contents, names = {(item.source, item.file_id) for item in held}, {(item.source, item.name): item for item in held}
    new = [item for item in current if (item.source, item.file_id) not in contents]
    for item in new:
        if (item.source, item.name) in names:
            raise ChangedInputError(
                f"{folder}: already holds a data set, and the input file {item.name} has changed since then (of files "
                "above 2 MiB the time of the last change counts, too). Give the new version another name to add it, "
                "choose another --output.folder, or make the data set anew with --output.overwrite True"
            )
    return new


def absolute(path: str) -> str:
    """A path that means the same in every process; URLs as they are."""
    return path if is_url(path) else os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - links stay as named


def _files(config: SourceConfig) -> tuple[InputFile, ...]:
    found = corpus.find_inputs(config.paths) if config.paths else corpus.installed_python()
    files = [dataclasses.replace(file, path=absolute(file.path)) for file in found]
    return tuple(files if config.max_input_bytes is None else corpus.choose(files, config.max_input_bytes))


def _file_id(file: InputFile) -> str:
    try:
        return storage.identity(file.path)
    except OSError as error:
        raise InputError(f"{file.path}: cannot read the input file ({error.strerror or error})") from error

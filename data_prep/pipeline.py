"""From raw text to a data folder: `python -m data_prep prepare [FILE.toml] [--section.key value ...]`.

    find files -> units -> [read, clean, filter, sketch, encode] per unit -> duplicates -> [cut] per shard -> publish

What is in brackets runs on the engine. A folder is published whole; run again, it says "already prepared", or adds what
is new as further shards and leaves every earlier file as it is. A run that is killed goes on where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import config_file, engine, generations, heads, manifest, report, sources, work_area
from data_prep.config_file import ConfigError
from data_prep.engine import WorkerDiedError
from data_prep.generations import Generation
from data_prep.manifest import Manifest, read_manifest
from data_prep.preparation import Preparation, settings_of
from data_prep.prepare_config import PrepareConfig
from data_prep.sources import Source
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer
from data_prep.work_area import WorkArea

EXIT_BAD_DATA, EXIT_WORKER_DIED, EXIT_IO, EXIT_CONFIG, EXIT_INTERRUPTED = 65, 70, 74, 78, 130


class OutputError(ValueError):
    """The output folder is taken; the message says by what, and what to do."""


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data folder that the config describes, or add to it what it does not hold yet.

    Raises:
        ConfigError, InputError, OutputError, TokenizerError, WorkAreaError: the data folder is as it was.
        WorkerDiedError: worker processes died again and again; the data folder is as it was.
    """
    found = sources.find_sources(config)
    folder = Path(config.output.folder).resolve()
    # All that follows under the lock: what the folder holds must not change while something is added to it.
    with work_area.opened(folder, config.engine.work_folder) as area:
        made = _prepare(config, folder, found, area)
        area.clear()
    print(report.next_command(Path(config.output.folder)))
    return made


def _prepare(config: PrepareConfig, folder: Path, found: list[Source], area: WorkArea) -> Manifest:
    older = _older_generations(folder, config.output.overwrite)
    given = _given_tokenizer(config)
    settings = settings_of(config, found, given)
    inputs = sources.identify(found)
    try:
        _check_settings(config, older, settings)
        new = sources.new_inputs(list(inputs), config.output.folder, older)
    except (OutputError, sources.ChangedInputError):
        if not config.output.overwrite:
            raise
        older, new = [], list(inputs)
    if older and not new:
        changed = heads.complete(folder, config, older)
        print(f"{config.output.folder}: already prepared from the same input with the same configuration; {changed}")
        return read_manifest(folder)
    tokenizer = _prepared_tokenizer(folder) if older and given is None else given
    preparation = Preparation(config, settings, {item: inputs[item] for item in new}, found, older, area)
    with engine.started(config.engine, preparation.num_units) as running:
        return preparation.run(tokenizer, running)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prepare` from the command line; errors are one line on stderr and an exit code of sysexits.h."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        prog = "python -m data_prep prepare"
        prepare(config_file.parse(PrepareConfig, arguments, prog=prog, description=__doc__))
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG)
    except ValueError as error:
        return _fail(str(error), EXIT_BAD_DATA)
    except WorkerDiedError as error:
        return _fail(str(error), EXIT_WORKER_DIED)
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", EXIT_IO)
    except KeyboardInterrupt:
        return _fail("interrupted; what is done is kept, and the same command goes on", EXIT_INTERRUPTED)
    return 0


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


def _older_generations(folder: Path, overwrite: bool) -> list[Generation]:
    """What the folder holds; nothing if there is room for it."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    try:
        found = generations.read_generations(folder) if folder.is_dir() else []
    except generations.GenerationError:
        if not overwrite:
            raise
        return []
    if not found and not (overwrite and (folder / manifest.MANIFEST_FILE).is_file()):
        # Never under overwrite either: a mistyped folder might be somebody's home.
        raise OutputError(f"{folder}: exists and is not a data folder; choose another --output.folder")
    return found


def _check_settings(config: PrepareConfig, older: Sequence[Generation], settings: dict[str, Any]) -> None:
    difference = generations.difference(older[-1].settings, settings) if older else ""
    if difference:
        raise OutputError(
            f"{config.output.folder}: already holds a data set, and its configuration differs: {difference}. "
            "Choose another --output.folder, or replace it with --output.overwrite True"
        )


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.tokenizer.path is None:
        return None
    return load_tokenizer(config.tokenizer.path, config.tokenizer.eos_token)


def _prepared_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that made the shards of a data folder."""
    made = read_manifest(folder)
    tokenizer = load_tokenizer(folder / made.tokenizer_file, eos_id=made.eos_id)
    if tokenizer.digest != made.tokenizer_digest:
        raise OutputError(
            f"{folder / made.tokenizer_file}: not the tokenizer that made the shards (digest {tokenizer.digest}, the "
            f"manifest has {made.tokenizer_digest}); restore it, or make the data set anew with --output.overwrite True"
        )
    return tokenizer

"""From raw text to a data folder: `python -m data_prep prepare [FILE.toml] [--section.key value ...]`.

    find files -> units -> [read, clean, filter, sketch, encode] per unit -> duplicates -> [cut] per shard -> publish

What is in brackets runs on the engine. A folder is published whole; run again, it says "already prepared", or adds what
is new as further shards and leaves every earlier file as it is. A run that is killed goes on where it was.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep import config_file, engine, generations, manifest, report, sources, work_area
from data_prep.config_file import ConfigError
from data_prep.engine import WorkerDiedError
from data_prep.generations import Generation
from data_prep.manifest import Manifest, read_manifest
from data_prep.preparation import Preparation, settings_of
from data_prep.prepare_config import PrepareConfig
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer

EXIT_BAD_DATA, EXIT_WORKER_DIED, EXIT_IO, EXIT_CONFIG, EXIT_INTERRUPTED = 65, 70, 74, 78, 130


class OutputError(ValueError):
    """The output folder is taken; the message says by what, and what to do."""


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data folder that the config describes, or add to it what it does not hold yet.

    Raises:
        ConfigError, InputError, OutputError, TokenizerError, WorkAreaError: the data folder is as it was.
        WorkerDiedError: worker processes died again and again; the data folder is as it was.
    """
    folder = Path(config.output.folder)
    older = _older_generations(folder, config.output.overwrite)
    tokenizer = _given_tokenizer(config, folder if older else None)
    found = sources.find_sources(config)
    settings = settings_of(config, found, tokenizer if config.tokenizer.path is not None else None)
    if older and (difference := generations.difference(older[-1].settings, settings)):
        if not config.output.overwrite:
            raise OutputError(
                f"{folder}: already holds a data set, and its configuration differs: {difference}. "
                "Choose another --output.folder, or replace it with --output.overwrite True"
            )
        older, tokenizer = [], _given_tokenizer(config, None)
    inputs = sources.identify(found)
    try:
        new = sources.new_inputs(list(inputs), str(folder), older)
    except sources.ChangedInputError:
        if not config.output.overwrite:
            raise
        older, tokenizer, new = [], _given_tokenizer(config, None), list(inputs)
    if older and not new:
        _repair_manifest(folder, older)
        print(f"{folder}: already prepared from the same input with the same configuration; nothing was written")
        print(report.next_command(folder))
        return read_manifest(folder)
    work_folder = Path(config.engine.work_folder or f"{folder.resolve()}.work")
    with work_area.opened(work_folder) as area:
        preparation = Preparation(config, settings, {item: inputs[item] for item in new}, found, older, area)
        with engine.started(config.engine, preparation.num_units) as running:
            made = preparation.run(tokenizer, running)
        work_area.remove(area)
    print(report.next_command(folder))
    return made


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


def _given_tokenizer(config: PrepareConfig, prepared: Path | None) -> Tokenizer | None:
    """The tokenizer that is there before the preparation: the configuration's, or that of a folder to add to."""
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path, config.tokenizer.eos_token)
    if prepared is None:
        return None
    made = read_manifest(prepared)
    return load_tokenizer(prepared / made.tokenizer_file, eos_id=made.eos_id)


def _repair_manifest(folder: Path, older: Sequence[Generation]) -> None:
    """A run that was killed between its last two renames left a manifest that lacks its shards."""
    made = read_manifest(folder)
    records = tuple(record for generation in older for record, _ in generation.shards)
    if made.shards != records:
        manifest.write_manifest(folder, manifest.with_shards(made, records))

"""From raw text to a data folder: `python -m data_prep.pipeline [FILE.toml] [--section.key value ...]`.

Files in, one folder out, published by one rename: it is whole or absent. Running it again changes nothing; it says
"already prepared", or refuses if input or configuration have changed.
"""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from data_prep import config_file, corpus, identity, publish, report, training_sample
from data_prep.checksums import write_checksums
from data_prep.config_file import ConfigError
from data_prep.corpus import InputFile
from data_prep.documents import InputError, Unit, plan_units
from data_prep.encode import EncodedUnit, WorkerDiedError, default_workers, encode_units
from data_prep.manifest import Manifest, read_manifest, record_shard, write_manifest
from data_prep.merge import BAD_LINES_FILE, TRAIN, VALIDATION, Merged, check_bad_lines, merge, split_threshold
from data_prep.prepare_config import InputConfig, PrepareConfig
from data_prep.tokenizer import Tokenizer, load_tokenizer, train_bpe

EXIT_BAD_DATA, EXIT_WORKER_DIED, EXIT_IO, EXIT_CONFIG, EXIT_INTERRUPTED = 65, 70, 74, 78, 130


class OutputError(ValueError):
    """The output folder is taken; the message says by what, and what to do."""


def prepare(config: PrepareConfig) -> Manifest:
    """Make the data folder that the config describes, unless it is already there.

    Raises:
        ConfigError, InputError, OutputError, TokenizerError: nothing has been written.
        WorkerDiedError: a worker process was killed; nothing has been written.
    """
    folder = Path(config.output.folder)
    given_tokenizer = _given_tokenizer(config)
    files = _find_files(config.input)
    current = identity.identify(files, _settings(config, given_tokenizer))
    if _is_prepared(folder, current, config.output.overwrite):
        print(f"{folder}: already prepared from the same input with the same configuration; nothing was written")
        print(report.next_command(folder))
        return read_manifest(folder)
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in publish.remove_leftovers(target.parent, target.name):
        print(f"removed {leftover}, left by a run that did not end")
    temporary = publish.temporary_beside(target)
    temporary.mkdir()
    try:
        manifest = _build(config, files, given_tokenizer, temporary)
        identity.write(temporary, current)
        publish.write_text(temporary / "prepare.toml", config_file.to_toml(config))
        # Asked again, because another run may have published the folder meanwhile.
        if not _is_prepared(folder, current, config.output.overwrite):
            publish.publish_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(report.next_command(folder))
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prepare` from the command line; errors are one line on stderr and an exit code of sysexits.h."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        prog = "python -m data_prep.pipeline"
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
        return _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
    return 0


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code


def _find_files(config: InputConfig) -> list[InputFile]:
    files = corpus.find_inputs(config.paths) if config.paths else corpus.installed_python()
    return files if config.max_input_bytes is None else corpus.choose(files, config.max_input_bytes)


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.tokenizer.path is None:
        return None
    return load_tokenizer(config.tokenizer.path, config.tokenizer.eos_token)


def _settings(config: PrepareConfig, given_tokenizer: Tokenizer | None) -> dict[str, object]:
    """What shapes the result besides the input files. Not: paths, because only the files they lead to count."""
    trained = {"vocab_size": config.tokenizer.vocab_size, "training_bytes": config.tokenizer.training_bytes}
    return {
        "source": config.input.source_name,
        "text_field": config.input.text_field,
        "tokenizer": trained if given_tokenizer is None else given_tokenizer.digest,
        "shard_tokens": config.output.shard_tokens,
        "sample_tokens": config.output.sample_tokens,
        "validation_fraction": config.output.validation_fraction,
    }


def _is_prepared(folder: Path, current: identity.Identity, overwrite: bool) -> bool:
    """Whether the folder is already the result; False if there is room for it, or leave to make room."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / identity.INPUTS_FILE).is_file():
        # Never under overwrite either: a mistyped folder might be somebody's home.
        raise OutputError(f"{folder}: exists and is not a data folder; choose another --output.folder")
    difference = identity.difference(folder, current)
    if difference is None:
        return True
    if overwrite:
        return False
    raise OutputError(
        f"{folder}: already holds a data set, and {difference}. "
        "Choose another --output.folder, or replace it with --output.overwrite True"
    )


def _build(
    config: PrepareConfig, files: Sequence[InputFile], given_tokenizer: Tokenizer | None, folder: Path
) -> Manifest:
    started_s = time.perf_counter()
    units = plan_units(
        [file.path for file in files], source=config.input.source_name, text_field=config.input.text_field
    )
    threshold = split_threshold(config.output.validation_fraction)
    tokenizer = given_tokenizer or _train_tokenizer(config, units, threshold)
    tokenizer_file = tokenizer.save(folder)
    merged = _encode_and_merge(config, units, tokenizer, folder, threshold)
    check_bad_lines(merged, config.engine.max_bad_fraction)
    if threshold and not merged.splits[VALIDATION].num_documents and merged.smallest_hash < merged.largest_hash:
        # Only in small inputs, so that doing it again is cheap.
        print("the input is small: the one text with the smallest hash is held out for validation")
        _discard(merged, folder)
        merged = _encode_and_merge(config, units, tokenizer, folder, merged.smallest_hash + 1)
    _check_splits(merged, config.output.validation_fraction)
    manifest = _write_manifest(config, merged, tokenizer, tokenizer_file, folder)
    print(report.table(merged, time.perf_counter() - started_s))
    if merged.bad_lines.counts:
        print(report.bad_lines(merged, Path(config.output.folder)))
    return manifest


def _train_tokenizer(config: PrepareConfig, units: Sequence[Unit], threshold: int) -> Tokenizer:
    started_s = time.perf_counter()
    texts = training_sample.texts(units, config.tokenizer.training_bytes, threshold)
    tokenizer = train_bpe(texts, config.tokenizer.vocab_size)
    print(f"trained a byte-level BPE of {tokenizer.vocab_size:,} tokens in {time.perf_counter() - started_s:.1f} s")
    return tokenizer


def _encode_and_merge(
    config: PrepareConfig, units: Sequence[Unit], tokenizer: Tokenizer, folder: Path, threshold: int
) -> Merged:
    scratch = folder / "scratch"
    scratch.mkdir()
    num_workers = default_workers() if config.engine.num_workers is None else config.engine.num_workers
    tokenizer_file = folder / tokenizer.file_name
    with closing(encode_units(units, tokenizer_file, tokenizer.eos_id, scratch, num_workers)) as encoded:
        merged = merge(
            _with_progress(encoded, units),
            folder,
            config.input.source_name,
            tokenizer,
            config.output.shard_tokens,
            threshold,
        )
    scratch.rmdir()
    return merged


def _discard(merged: Merged, folder: Path) -> None:
    for split in merged.splits:
        shutil.rmtree(folder / split, ignore_errors=True)
    (folder / BAD_LINES_FILE).unlink(missing_ok=True)


def _with_progress(encoded: Iterator[EncodedUnit], units: Sequence[Unit]) -> Iterator[EncodedUnit]:
    num_documents = num_bad = 0
    # In a log file a line every half minute is enough.
    interval_s = 0.2 if sys.stderr.isatty() else 30.0
    total_bytes = sum(unit.size_bytes for unit in units)
    with tqdm(total=total_bytes, desc="encode", unit="B", unit_scale=True, mininterval=interval_s, disable=None) as bar:
        for unit in encoded:
            yield unit
            num_documents += unit.num_tokens.size
            num_bad += len(unit.bad_lines)
            bar.set_postfix_str(f"{num_documents:,} documents, {num_bad:,} bad", refresh=False)
            bar.update(unit.unit.size_bytes)


def _check_splits(merged: Merged, validation_fraction: float) -> None:
    if not merged.splits[TRAIN].num_documents:
        raise InputError(
            f"the training split is empty: all {merged.num_documents:,} documents were held out. "
            f"Add documents, or lower output.validation_fraction = {validation_fraction:g}"
        )
    if validation_fraction and not merged.splits[VALIDATION].num_documents:
        raise InputError(
            "the validation split is empty: the input has only one distinct text, which training needs. "
            "Add documents, or hold out none with --output.validation-fraction 0"
        )


def _write_manifest(
    config: PrepareConfig, merged: Merged, tokenizer: Tokenizer, tokenizer_file: str, folder: Path
) -> Manifest:
    manifest = Manifest(
        tokenizer_file=tokenizer_file,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        sample_tokens=config.output.sample_tokens,
        shards=tuple(
            record_shard(
                folder, path, header, source=config.input.source_name, sample_tokens=config.output.sample_tokens
            )
            for shards in merged.shards.values()
            for path, header in shards
        ),
    )
    for record in manifest.shards:
        write_checksums(folder / record.file, manifest.sample_tokens)
    write_manifest(folder, manifest)
    return manifest


if __name__ == "__main__":
    raise SystemExit(main())

"""Looks into a data folder: what it holds, what became of a document, where a training sample came from.

    python -m data_prep inspect FOLDER                        counts by source and split, and by generation
    python -m data_prep inspect FOLDER --documents 5          documents, decoded
    python -m data_prep inspect FOLDER --shard train/web-00003.bin [--document 7]
    python -m data_prep inspect FOLDER --sample train/web-00003.bin:17
    python -m data_prep inspect FOLDER --id PATH:LINE         or PATH#PLACE, as reports name documents
    python -m data_prep inspect FOLDER --dropped gopher.word_count
    python -m data_prep inspect FOLDER --search "some words"

A shard is named by its file, or by its identity or the beginning of that, as `python -m resume audit` does.
Exit codes: 0 done; 64 an option without the one that it goes with; 65 the folder is not as it should be; 74 cannot
read; 78 what is asked for is not there.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.looking import folder_statistics, inspect_documents, inspect_fates
from data_prep.looking.prepared import NotFoundError, PreparedFolder
from data_prep.looking.text_table import one_line, visible
from data_prep.manifest import read_manifest

BAD_DATA, CANNOT_READ, NOT_FOUND, USAGE = os.EX_DATAERR, os.EX_IOERR, os.EX_CONFIG, os.EX_USAGE
_GOES_WITH = {
    "source": ("documents", "dropped", "search"),
    "split": ("documents", "search"),
    "seed": ("documents", "dropped"),
    "first": ("documents", "dropped"),
    "number": ("dropped", "search"),
    "document": ("shard",),
    "sample_tokens": ("sample",),
}
_NUMBER = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = _parser().parse_args(argv)
    if (stray := _stray(arguments)) is not None:
        return _fail(stray, USAGE)
    try:
        for line in _lines(PreparedFolder(arguments.folder), arguments):
            print(visible(line))
        print(end="", flush=True)  # here, so that a reader who left is no traceback
    except NotFoundError as error:
        return _fail(str(error), NOT_FOUND)
    except ValueError as error:
        return _fail(str(error), BAD_DATA)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", CANNOT_READ)
    return 0


def _stray(arguments: argparse.Namespace) -> str | None:
    """What is wrong if an option is given without one that it goes with."""
    for option, others in _GOES_WITH.items():
        if getattr(arguments, option) is not None and all(getattr(arguments, other) is None for other in others):
            return f"{_flag(option)}: goes with {' or '.join(map(_flag, others))}"
    return None


def _flag(option: str) -> str:
    return "-n" if option == "number" else f"--{option.replace('_', '-')}"


def _lines(folder: PreparedFolder, arguments: argparse.Namespace) -> Iterator[str]:
    """What is asked for."""
    known = sorted({shard.record.source for shard in folder.shards})
    if arguments.source not in (None, *known):
        raise NotFoundError(f"--source {arguments.source}: no source of {folder.folder}; it has {', '.join(known)}")
    seed = None if arguments.first else arguments.seed or 0
    number = _NUMBER if arguments.number is None else arguments.number
    if arguments.documents is not None:
        choose = inspect_documents.chosen(arguments.documents, seed)
        return inspect_documents.documents(folder, choose, arguments.source, arguments.split)
    if arguments.shard is not None:
        shard = folder.shard(arguments.shard)
        if arguments.document is not None:
            return inspect_documents.shard_document(folder, shard, arguments.document)
        return inspect_documents.shard_documents(folder, shard)
    if arguments.sample is not None:
        return _sample(folder, arguments.sample, arguments.sample_tokens)
    if arguments.id is not None:
        return inspect_fates.fate(folder, arguments.id)
    if arguments.dropped is not None:
        choose = inspect_documents.chosen(number, seed)
        return inspect_fates.dropped(folder, arguments.dropped, choose, arguments.source)
    if arguments.search is not None:
        return inspect_documents.search(folder, arguments.search, number, arguments.source, arguments.split)
    return folder_statistics.lines(folder)


def _sample(folder: PreparedFolder, name: str, sample_tokens: int | None) -> Iterator[str]:
    file, _, number = name.rpartition(":")
    if not (file and number.isascii() and number.isdecimal()):
        raise NotFoundError(f"--sample {name}: expected SHARD:NUMBER, as train/web-00003.bin:17")
    length = read_manifest(folder.folder).sample_tokens if sample_tokens is None else sample_tokens
    return inspect_documents.sample(folder, folder.shard(file), int(number), length)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be positive")
    return value


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m data_prep inspect", description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="data folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--documents", type=_positive, metavar="N", help="show N documents")
    what.add_argument("--shard", metavar="SHARD", help="list the documents of a shard")
    what.add_argument("--sample", metavar="SHARD:I", help="show training sample I of a shard, and where it came from")
    what.add_argument(
        "--id", metavar="ID", help="what became of a document: PATH:LINE, PATH#PLACE, or PATH of a whole file"
    )
    what.add_argument("--dropped", metavar="REASON", help="documents or lines that were left out for a reason")
    what.add_argument("--search", metavar="TEXT", help="documents that contain a text; reads everything")
    parser.add_argument("--source", help="only of this source")
    parser.add_argument("--split", choices=("train", "validation"), help="only of this split")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--seed", type=int, help="another seed shows others")
    order.add_argument("--first", action="store_const", const=True, help="the first ones, not drawn ones")
    parser.add_argument("--document", type=int, metavar="I", help="with --shard: show this one of the list")
    parser.add_argument(
        "--sample-tokens", type=_positive, help="with --sample: the sequence length, if not the prepared"
    )
    parser.add_argument(
        "-n", dest="number", type=_positive, help=f"with --dropped and --search: so many, not {_NUMBER}"
    )
    return parser


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return exit_code

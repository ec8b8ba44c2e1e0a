"""Shows what of chat data is trained: green on a terminal, between {+ and +} elsewhere; the rest is context.

python -m data_prep show-mask data/chat                          rows of a chat data folder
python -m data_prep show-mask chat.jsonl --tokenizer data/demo   records of a raw file, before they are packed
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_prep import command_line
from data_prep.chat.turns import Kind
from data_prep.config_file import ConfigError

if TYPE_CHECKING:
    from data_prep.chat.mask_text import MaskText

# Everything else is imported where it is used, so that --help is instant.


def show_mask(
    data: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATA")],
    /,
    *,
    rows: int = 3,
    split: str = "train",
    tokenizer: Path | None = None,
    chat_format: Annotated[str, tyro.conf.arg(name="format")] = "chatml",
    kind: Kind = "chat",
) -> None:
    """Shows rows of a chat data folder, or records of a raw file.

    Args:
        data: Chat data folder, or a file of conversations.
        rows: How many rows, or records, to show.
        split: Split of the folder.
        tokenizer: Of a raw file: the model's tokenizer.
        chat_format: Of a raw file: the chat format.
        kind: Of a raw file: chat, pairs or prompts.
    """
    from data_prep.chat.mask_text import MaskText

    if rows < 1:
        raise ConfigError(f"--rows {rows}: must be at least 1")
    is_coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if data.is_dir():
        lines = _of_folder(data, split, rows, is_coloured)
    elif tokenizer is None:
        raise ConfigError(f"{data}: no data folder; to look into a raw file, name its --tokenizer FOLDER")
    else:
        from data_prep.chat.model_tokenizer import load_tokenizer_of

        lines = _of_file(data, rows, MaskText(load_tokenizer_of(tokenizer, None), is_coloured), chat_format, kind)
    for line in lines:
        print(line)


def _of_folder(folder: Path, split: str, num_rows: int, is_coloured: bool) -> Iterator[str]:
    import numpy as np

    from data_prep.chat.chat_folder import read_chat_folder
    from data_prep.chat.mask_text import MaskText
    from data_prep.chat.row_marks import RowMarks
    from data_prep.manifest import read_manifest
    from data_prep.shards import open_tokens
    from data_prep.tokenizing.tokenizer import load_tokenizer

    manifest, chat = read_manifest(folder), read_chat_folder(folder)
    if chat is None:
        raise ConfigError(f"{folder}: not a chat data folder (no chat.json); make one with prepare-chat")
    records = [record for record in manifest.shards if record.split == split]
    if not records:
        known = ", ".join(sorted({record.split for record in manifest.shards}))
        raise ConfigError(f"--split {split}: {folder} has no such split; it has {known}")
    mask = MaskText(load_tokenizer(folder / manifest.tokenizer_file, eos_id=manifest.eos_id), is_coloured)
    length, num_left = chat.row_tokens, num_rows
    for record in records:
        tokens, marks = open_tokens(folder / record.file), RowMarks(folder / record.file)
        for row in range(min(num_left, record.sample_count)):
            (trained,), (starts,) = marks.rows(np.array([row]), length)
            yield f"=== row {row} of {record.file}: {trained.sum():,} of {length:,} tokens are trained ==="
            yield from mask.row(tokens[row * length + 1 : (row + 1) * length + 1], trained, starts)
        num_left -= min(num_left, record.sample_count)


def _of_file(path: Path, num_records: int, mask: "MaskText", chat_format: str, kind: Kind) -> Iterator[str]:
    from data_prep.chat.chat_format import format_named
    from data_prep.chat.chat_records import find_files, read_records
    from data_prep.chat.conversations import documents_of
    from data_prep.reading.field_template import BadRecordError

    made = format_named(chat_format)
    for record in (record for file in find_files([str(path)]) for record in read_records(file)):
        if not num_records:
            return
        num_records -= 1
        yield f"=== {path}:{record.line} ==="
        try:
            if isinstance(record.value, BadRecordError):
                raise record.value
            told = documents_of(record.value, kind)
        except BadRecordError as error:
            yield f"bad record: {error}"
            continue
        for turns, trained_from in told:
            parts = made.parts(turns, trained_from=trained_from, is_prompt=kind == "prompts")
            (encoded,) = made.encode_parts(mask.tokenizer, [parts])
            yield from mask.document(*encoded)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors are one message on stderr and an exit code of sysexits.h."""
    try:
        command_line.read(show_mask, argv, prog="python -m data_prep show-mask", description=__doc__)
        print(end="", flush=True)  # here, so that a reader who left is no traceback
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    return 0

"""Conversations to a data folder for fine-tuning: packed rows with marks of what is trained.

python -m data_prep prepare-chat chat.jsonl --output data/chat --tokenizer data/demo
python -m data_prep prepare-chat pairs/ --kind pairs --output data/pairs --tokenizer runs/sft --row-tokens 1024

Run again with further files, it adds their conversations as further shards and leaves every earlier file as it is.
Look at the result with: python -m data_prep show-mask data/chat
"""

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from data_prep import command_line
from data_prep.chat.turns import Kind
from data_prep.config_file import ConfigError

# Everything else is imported where it is used, so that --help is instant.


def prepare_chat(
    inputs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="INPUT")],
    /,
    *,
    output: Path,
    tokenizer: Path,
    chat_format: Annotated[str, tyro.conf.arg(name="format")] = "chatml",
    default_system: str | None = None,
    kind: Kind = "chat",
    row_tokens: int = 2048,
    validation_share: float = 0.02,
    source: str = "chat",
    eos_token: str | None = None,
    max_bad_fraction: float = 0.01,
    shard_tokens: int = 2**26,
) -> None:
    """Makes a chat data folder, or adds to one what it does not hold yet.

    Args:
        inputs: Files (.jsonl, .json, also .gz and .zst, .parquet), folders of them, patterns (** crosses folders).
        output: The data folder to make, or to add to.
        tokenizer: The model's tokenizer: a data folder, run folder or Hugging Face folder, or the file itself.
        chat_format: chatml, llama2, llama3, mistral, gemma, zephyr or alpaca.
        default_system: System prompt of conversations that have none.
        kind: chat (answers are trained), pairs (chosen and rejected answers) or prompts (to be answered).
        row_tokens: Length of the rows that conversations are packed into: the sequence length of the fine-tuning.
        validation_share: Share of the conversations that is held out, chosen by their content.
        source: Name of what is added, for mixtures and reports.
        eos_token: End of document, where it is not the tokenizer's usual one.
        max_bad_fraction: With more bad records than this the input counts as misread.
        shard_tokens: About how many tokens are packed together, into one shard; they are held in memory.
    """
    from data_prep import work_area
    from data_prep.chat.chat_folder import ChatFolder
    from data_prep.chat.chat_format import format_named
    from data_prep.chat.chat_preparation import ChatPreparation
    from data_prep.chat.chat_records import find_files
    from data_prep.chat.model_tokenizer import load_tokenizer_of

    _check_options(row_tokens, validation_share, source, max_bad_fraction, shard_tokens)
    made_format = format_named(chat_format)
    if default_system is not None:
        made_format = dataclasses.replace(made_format, default_system=default_system)
    chat = ChatFolder(kind, row_tokens, made_format)
    files = find_files(inputs)
    with work_area.opened(output.resolve()) as area:
        preparation = ChatPreparation(
            folder=output.resolve(),
            stage=area.stage("chat"),
            chat=chat,
            tokenizer=load_tokenizer_of(tokenizer, eos_token),
            source=source,
            validation_share=validation_share,
            max_bad_fraction=max_bad_fraction,
            shard_tokens=shard_tokens,
        )
        try:
            print(preparation.run(files))
        finally:
            area.clear()
    print(f"look: python -m data_prep show-mask {output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors are one message on stderr and an exit code of sysexits.h."""
    try:
        command_line.read(prepare_chat, argv, prog="python -m data_prep prepare-chat", description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    except KeyboardInterrupt:
        print("error: interrupted; the data folder is as it was", file=sys.stderr)
        return 130
    return 0


def _check_options(
    row_tokens: int, validation_share: float, source: str, max_bad_fraction: float, shard_tokens: int
) -> None:
    """Refuses numbers and names that make no chat data.

    Raises:
        ConfigError: names the flag and what it expects.
    """
    if row_tokens < 8 or row_tokens % 8:
        raise ConfigError(f"--row-tokens {row_tokens}: must be a positive multiple of 8")
    if not 0 <= validation_share < 1:
        raise ConfigError(f"--validation-share {validation_share:g}: must be at least 0 and below 1")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {max_bad_fraction:g}: must be in [0, 1]")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", source):
        raise ConfigError(f"--source {source!r}: names files; use letters, digits, dots, dashes and underscores")
    if shard_tokens < row_tokens:
        raise ConfigError(f"--shard-tokens {shard_tokens}: must be at least --row-tokens, {row_tokens}")

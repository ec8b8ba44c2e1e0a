"""Prepares data and looks into it: `python -m data_prep COMMAND ...`; each COMMAND has its own --help.

prepare            raw text to a data folder, or further text into one
prepare-chat       conversations, pairs of answers or prompts to a data folder for fine-tuning
show-mask          what of conversations is trained
inspect            what a data folder holds, what became of a document, where a training sample came from
checksums          the checksums of a data folder, made anew
train-tokenizer    a tokenizer from text files
tokenizer-report   tokenizers compared on texts
train-ngrams       a model of character n-grams, for the perplexity filter
debian-chinese     Chinese texts from the packages of a Debian machine
"""

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "prepare": "pipeline",
    "prepare-chat": "chat.prepare_chat",
    "show-mask": "chat.show_mask",
    "inspect": "looking.inspect_data",
    "checksums": "checksums",
    "train-tokenizer": "tokenizing.train_tokenizer",
    "tokenizer-report": "tokenizing.tokenizer_report",
    "train-ngrams": "cleaning.ngram_model",
    "debian-chinese": "reading.debian_chinese",
}
"""The module of data_prep that does each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command with the arguments behind it and returns its exit code."""
    command, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if command not in COMMANDS:
        print(f"error: {command}: no such command; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return os.EX_USAGE
    # Only now: each of them loads what the others do not need.
    return importlib.import_module(f"data_prep.{COMMANDS[command]}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""Trains a tokenizer on a sample of files.

    python -m data_prep train-tokenizer tokenizers/mine "corpus/**/*.jsonl" notes.txt --vocab-size 32000
    python -m data_prep train-tokenizer tokenizers/mine corpus.parquet --algorithm sentencepiece-unigram

Files are of the kinds that data preparation reads, and cleaned as it cleans by default. OUT becomes a folder with
tokenizer.json (bpe) or tokenizer.model (sentencepiece), for `--tokenizer.path` of data preparation.
Exit codes: 0 done, 65 bad data or a vocabulary that the text does not yield, 74 cannot read or write.
"""

import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import sentencepiece
import tyro

from data_prep import command_line, publish
from data_prep.tokenizing.backends import MODEL_FILE, TokenizerError, load_backend
from data_prep.tokenizing.tokenizer import NO_TEXT, Tokenizer, train_bpe

Algorithm = Literal["bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
UNKNOWN, END = "<unk>", "</s>"
CHAT_MARKS = ("<|im_start|>", "<|im_end|>", "<|pad|>")
"""Ids 2 to 4 of a sentencepiece model trained here, after UNKNOWN and END; text never gives them."""
CHARACTER_COVERAGE = 0.9995
"""Share of the sample's characters that get a token of their own; the others are spelled in bytes."""
MAX_LINE_CHARACTERS = 4096
"""Longer lines are cut: the trainer leaves out what it finds too long."""


def train(texts: Iterable[str], algorithm: Algorithm, vocab_size: int) -> Tokenizer:
    """Train a tokenizer; equal texts in equal order give equal files.

    Raises:
        TokenizerError: there is no text, or the vocabulary is too small for the algorithm, or too large for the texts.
    """
    if algorithm == "bpe":
        return train_bpe(texts, vocab_size)
    return train_sentencepiece(texts, vocab_size, "bpe" if algorithm == "sentencepiece-bpe" else "unigram")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model: Literal["bpe", "unigram"] = "bpe") -> Tokenizer:
    """Train a sentencepiece model with byte fallback, single digits and text left as it is.

    Any text comes back unchanged, but for U+2581, which is how sentencepiece writes a space and comes back as one. Line
    ends and tabs are spelled as bytes. Up to 65,536 tokens, ids take two bytes each.

    Raises:
        TokenizerError: vocab_size leaves no room for bytes and characters, or the texts do not yield so many tokens.
    Cost: about 0.2 CPU-seconds per MB of text for BPE, ten times that for unigram.
    """
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=written,
            model_type=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=CHARACTER_COVERAGE,
            split_digits=True,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,  # indentation
            remove_extra_whitespaces=False,
            # Without a space put before it, a text that continues another is encoded as it would be inside it.
            add_dummy_prefix=False,
            unk_id=0,
            unk_piece=UNKNOWN,
            eos_id=1,
            eos_piece=END,
            bos_id=-1,
            pad_id=-1,
            control_symbols=list(CHAT_MARKS),
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            num_threads=2,  # on any machine: how sums are divided among threads shapes the result
            minloglevel=2,
        )
    except RuntimeError as error:
        _explain(vocab_size, error)
    raw = written.getvalue()
    return Tokenizer(load_backend(raw, MODEL_FILE), raw, eos_id=1)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            yield from (line[i : i + MAX_LINE_CHARACTERS] for i in range(0, len(line), MAX_LINE_CHARACTERS))


def _explain(vocab_size: int, error: RuntimeError) -> NoReturn:
    """What the trainer's message means for the user."""
    message = str(error)
    if "!sentences_.empty()" in message:
        raise TokenizerError(NO_TEXT) from error
    if too_many := re.search(r"Vocabulary size too high.* <= (\d+)", message):
        reason = f"this text yields at most {too_many[1]} tokens; give more text, or ask for fewer tokens"
    elif too_few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        reason = f"marks, bytes and the characters of this text need at least {too_few[1]}"
    else:
        reason = message
    raise TokenizerError(f"vocab_size = {vocab_size}: {reason}") from error


def train_tokenizer(
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILES")],
    /,
    *,
    algorithm: Algorithm = "bpe",
    vocab_size: int = 32_000,
    training_bytes: int = 32_000_000,
) -> None:
    """Trains a tokenizer on a sample of files and writes it into a folder.

    Args:
        out: Folder for the tokenizer; one in it is replaced.
        files: Files, patterns (** crosses folders) or URLs.
        algorithm: A byte-level BPE, or sentencepiece with byte fallback.
        vocab_size: Tokens of the vocabulary; up to 65,536 ids take two bytes each.
        training_bytes: About how much text to train on, sampled over all files.
    """
    # Here, so that what only trains does not load the readers.
    from data_prep import training_sample
    from data_prep.cleaning.clean import Cleaner
    from data_prep.cleaning.clean_config import CleanConfig
    from data_prep.reading.corpus import find_inputs
    from data_prep.reading.documents import plan_units
    from data_prep.reading.templates import Layout

    if not files:
        raise TokenizerError("no files to train on; name some after OUT")
    if training_bytes < 1:
        raise TokenizerError(f"training_bytes = {training_bytes}: must be positive")
    units = plan_units(find_inputs(files), Layout.named("auto"))
    sample = training_sample.texts(
        [(unit, "auto") for unit in units], training_bytes, 0, Cleaner(CleanConfig()), exact=True
    )
    trained = train(sample, algorithm, vocab_size)
    publish.make_folder(out)
    name = trained.save(out)
    print(f"{out / name}: {trained.vocab_size:,} tokens, end of document {trained.eos_id}, digest {trained.digest}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors are one line on stderr and an exit code of sysexits.h."""
    try:
        command_line.read(train_tokenizer, argv, prog="python -m data_prep train-tokenizer", description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    return 0

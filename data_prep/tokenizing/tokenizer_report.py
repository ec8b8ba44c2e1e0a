"""How well tokenizers fit texts, by language.

    python -m data_prep tokenizer-report tokenizers/mine other/tokenizer.json -- "held-out/**/*.jsonl" notes.txt

Columns: bytes and characters per token (compression: more is better); tokens per word (fertility: fewer is better; each
Chinese or Japanese character counts as a word); the share of tokens that are parts of characters; the share of the
vocabulary that occurs; what it cannot express: tokens that stand for it, and characters that vanish without one.
Exit codes: 0 done, 64 no "--" between tokenizers and files, 65 bad data or no tokenizer, 74 cannot read.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.looking import text_table
from data_prep.tokenizing.encoders import fastest_encoder
from data_prep.tokenizing.spelling import num_vanished
from data_prep.tokenizing.tokenizer import Tokenizer, load_tokenizer

MAX_LANGUAGE_BYTES = 8_000_000
"""The command line takes so much of each language, and passes over no more than that of what it has enough of."""
_SPACELESS = "\u2e80-\u2fdf\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+")
"""A character of a script without spaces, or a run of other letters, digits and underscores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One tokenizer on the texts of one language: sums, and what follows from them."""

    tokenizer: str
    language: str
    num_bytes: int
    num_characters: int
    num_words: int
    num_tokens: int
    num_partial_tokens: int
    """Tokens whose bytes alone are not whole characters."""
    num_unknown: int
    """Tokens that stand for what the vocabulary cannot express, and characters that vanish without one."""
    num_used_tokens: int
    """Different ids that occur."""
    vocab_size: int

    @property
    def bytes_per_token(self) -> float:
        """Compression."""
        return self.num_bytes / max(self.num_tokens, 1)

    @property
    def characters_per_token(self) -> float:
        """Compression, without the advantage that UTF-8 gives to other scripts than Latin."""
        return self.num_characters / max(self.num_tokens, 1)

    @property
    def tokens_per_word(self) -> float:
        """Fertility."""
        return self.num_tokens / max(self.num_words, 1)

    @property
    def partial_fraction(self) -> float:
        """Share of tokens that are parts of characters."""
        return self.num_partial_tokens / max(self.num_tokens, 1)

    @property
    def used_fraction(self) -> float:
        """Share of the vocabulary that occurs."""
        return self.num_used_tokens / self.vocab_size


def report(tokenizer: Tokenizer, texts_by_language: Mapping[str, Sequence[str]], name: str | None = None) -> list[Row]:
    """A row for each language, in the order given; rows of several tokenizers on the same texts can be compared.

    Raises:
        TokenizerError: the kind of tokenizer does not tell which bytes its tokens stand for.
    """
    is_partial = np.array([not _is_text(content) for content in tokenizer.token_contents()])
    encoder, unknown_id = fastest_encoder(tokenizer), tokenizer.unknown_id
    name = str(tokenizer.file or tokenizer.digest[:8]) if name is None else name
    rows: list[Row] = []
    for language, texts in texts_by_language.items():
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for ids in encoder.encode_arrays(texts):
            counts += np.bincount(ids, minlength=counts.size)
        rows.append(
            Row(
                tokenizer=name,
                language=language,
                num_bytes=sum(len(text.encode("utf-8")) for text in texts),
                num_characters=sum(map(len, texts)),
                num_words=sum(len(_WORD.findall(text)) for text in texts),
                num_tokens=int(counts.sum()),
                num_partial_tokens=int(counts[is_partial].sum()),
                num_unknown=num_vanished(tokenizer, texts) + (0 if unknown_id is None else int(counts[unknown_id])),
                num_used_tokens=int(np.count_nonzero(counts)),
                vocab_size=tokenizer.vocab_size,
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text, those of one language together."""
    heads = ("language", "tokenizer", "MB", "bytes/token", "chars/token", "tokens/word", "partial", "used", "unknown")
    languages = list(dict.fromkeys(row.language for row in rows))
    cells = [
        (
            row.language,
            row.tokenizer,
            f"{row.num_bytes / 1e6:.2f}",
            f"{row.bytes_per_token:.3f}",
            f"{row.characters_per_token:.3f}",
            f"{row.tokens_per_word:.3f}",
            f"{row.partial_fraction:.2%}",
            f"{row.used_fraction:.1%}",
            f"{row.num_unknown:,}",
        )
        for row in sorted(rows, key=lambda row: languages.index(row.language))
    ]
    return "\n".join(text_table.aligned(heads, cells))


def read_texts(patterns: Sequence[str], max_language_bytes: int = MAX_LANGUAGE_BYTES) -> dict[str, list[str]]:
    """Texts of files by language, at most so many bytes of each, and one text.

    A unit of the input is left when an equal share of as many bytes is passed over in it, in languages of which there
    is enough: another language can still be found behind them, but a large input is not read to its end.

    Raises:
        InputError: no such file, or one that cannot be read.
    """
    # Here, so that what only reports does not load the readers.
    from data_prep.cleaning.clean import Cleaner, kind_of
    from data_prep.cleaning.clean_config import CleanConfig
    from data_prep.reading.corpus import find_inputs
    from data_prep.reading.documents import plan_units, read_unit
    from data_prep.reading.records import BadLine
    from data_prep.reading.templates import Layout

    cleaner = Cleaner(CleanConfig())
    texts: dict[str, list[str]] = {}
    num_bytes: dict[str, int] = {}
    units = plan_units(find_inputs(patterns), Layout.named("auto"))
    for unit in units:
        rest_bytes = max_language_bytes / len(units)
        for item in read_unit(unit):
            if isinstance(item, BadLine):
                continue
            language = cleaner.language(item.text, kind_of(unit.paths[item.file], "prose"))
            text_bytes = len(item.text.encode("utf-8"))
            if num_bytes.setdefault(language, 0) < max_language_bytes:
                texts.setdefault(language, []).append(item.text)
                num_bytes[language] += text_bytes
                continue
            rest_bytes -= text_bytes
            if rest_bytes <= 0:
                break
    return dict(sorted(texts.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors are one line on stderr and an exit code of sysexits.h."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if "--" not in arguments[1:-1]:
        print("error: expected TOKENIZER [TOKENIZER ...] -- FILE [FILE ...]; see --help", file=sys.stderr)
        return os.EX_USAGE
    at = arguments.index("--")
    try:
        texts = read_texts(arguments[at + 1 :])
        print(table([row for path in arguments[:at] for row in report(load_tokenizer(path), texts, path)]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    except OSError as error:
        print(f"error: {error.filename or 'input/output'}: {error.strerror or error}", file=sys.stderr)
        return os.EX_IOERR
    return 0


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True

"""A character n-gram language model for filtering by perplexity: `python -m data_prep train-ngrams OUT.npz FILES...`.

Counts of n-grams of 1 to N UTF-16 units lie in one hashed table per length (interpolated, after MacKay and Peto 1995):

    p_0 = 1 / 65536,   p_k(c | h) = (count(h c) + S * p_{k-1}(c | h')) / (count(h) + S)

where h' is h without its first unit. White space of any kind counts as one space. Scores are equal on every machine:
each division is one IEEE operation, and logarithms come from a table of integers.

Source: Wenzek et al. 2020 (CCNet, arXiv 1911.00359) filter by perplexity; hashed tables instead of a trie are our own.
"""

import argparse
import errno
import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from data_prep import publish

ORDER: Final = 5
TABLE_BITS: Final = 22
_SMOOTHING: Final = 4.0
_BLOCK_UNITS: Final = 1 << 16
_FORMAT: Final = 1
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_MIXER: Final = np.uint64(0xFF51AFD7ED558CCD)
_LOG_BITS: Final = 12
_FIXED: Final = 1 << 16  # logarithms are integers of this unit
_LOG2: Final = np.array(
    [round(_FIXED * math.log2(1 + (index + 0.5) / (1 << _LOG_BITS))) for index in range(1 << _LOG_BITS)], np.int64
)


class NgramModelError(ValueError):
    """A model file, or a reference text, cannot be used or written."""


class NgramModel:
    """Hashed counts of character n-grams, and the perplexity that they give to texts."""

    def __init__(self, counts: np.ndarray, num_units: int) -> None:
        """counts: (order, 2**bits) uint32, of n-grams of 1, 2, ... units; num_units: size of the reference text."""
        self.counts = counts
        self.num_units = num_units
        self.table_bits = counts.shape[1].bit_length() - 1

    @classmethod
    def train(cls, texts: Iterable[str], *, order: int = ORDER, table_bits: int = TABLE_BITS) -> "NgramModel":
        """Count the n-grams of reference texts."""
        counts = np.zeros((order, 1 << table_bits), np.uint32)
        num_units = 0
        for text in texts:
            for start, units in _blocks(text, order):
                for length, buckets in enumerate(_buckets(units, order, table_bits), 1):
                    # A block begins with what the one before it ended with: those n-grams are counted already.
                    np.add.at(counts[length - 1], buckets[max(start - length + 1, 0) :], np.uint32(1))
                num_units += units.size - start
        if not num_units:
            raise NgramModelError("the reference text is empty; give files with text like what is to be kept")
        return cls(counts, num_units)

    @classmethod
    def load(cls, path: str | Path) -> "NgramModel":
        """Read a model.

        Raises:
            NgramModelError: not a model of this format.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                form, num_units = (int(value) for value in arrays["header"])
                counts = arrays["counts"]
        except OSError as error:
            raise NgramModelError(f"{path}: cannot read the n-gram model ({error.strerror or error})") from error
        except Exception as error:  # numpy and zipfile raise a dozen types for damaged files
            raise NgramModelError(f"{path}: not an n-gram model ({error}); make one with {_COMMAND}") from error
        is_table = counts.ndim == 2 and counts.dtype == np.uint32 and counts.shape[1].bit_count() == 1
        if form != _FORMAT or not is_table:
            raise NgramModelError(f"{path}: an n-gram model of another format; make it again with {_COMMAND}")
        return cls(counts, num_units)

    def save(self, path: Path) -> None:
        """Write the model, whole or not at all.

        Raises:
            NgramModelError: it cannot be written there.
        """
        temporary = publish.temporary_beside(path)
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, header=np.array([_FORMAT, self.num_units]), counts=self.counts)
            temporary.replace(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        finally:
            if temporary.exists():
                temporary.unlink()

    @property
    def digest(self) -> str:
        """Digest of the counts, which does not depend on how they were compressed."""
        state = hashlib.blake2b(f"{_FORMAT} {self.counts.shape} {self.num_units}".encode(), digest_size=16)
        state.update(self.counts.astype("<u4", copy=False).tobytes())
        return state.hexdigest()

    def perplexity(self, text: str) -> float:
        """The perplexity per UTF-16 unit of a text: the mean surprise, as a number of equally likely units."""
        total = num_units = 0
        for start, units in _blocks(text, len(self.counts)):
            total += self._surprise(units, start)
            num_units += units.size - start
        # Rounded, because the last bit of a power differs between C libraries.
        return round(2.0 ** (round(total / num_units) / _FIXED), 6) if num_units else 1.0

    def _surprise(self, units: np.ndarray, start: int) -> int:
        """Sum of -log2 p in units of 1/_FIXED over the units from start on."""
        probability = np.full(units.size, 1 / 65536)
        context = np.full(units.size, float(self.num_units))
        for length, buckets in enumerate(_buckets(units, len(self.counts), self.table_bits), 1):
            # Two n-grams may share a bucket, but none is commoner than the context it begins with.
            found = np.minimum(self.counts[length - 1][buckets], context)
            # The first units of a text have no context of this length: they keep the shorter one.
            part = probability[length - 1 :]
            part *= _SMOOTHING
            part += found
            part /= context + _SMOOTHING
            context = found[:-1]
        return -int(_fixed_log2(probability[start:]).sum())


def main(argv: Sequence[str] | None = None) -> int:
    """Train a model, and print the perplexities of a part that was held out, to choose limits by."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep train-ngrams",
        description="Make a character n-gram model for clean.perplexity_model.",
    )
    parser.add_argument("out", type=Path, help="the model to write, .npz")
    parser.add_argument(
        "files", nargs="+", help="files, patterns (** crosses folders) or URLs with texts like what is to be kept"
    )
    parser.add_argument("--order", type=int, default=ORDER, choices=range(1, 9), help="longest n-gram (%(default)s)")
    parser.add_argument("--table-bits", type=int, default=TABLE_BITS, choices=range(12, 29), metavar="BITS")
    arguments = parser.parse_args(argv)
    try:
        _check_writable(arguments.out)
        reference = _Reference(arguments.files)
        model = NgramModel.train(reference.pieces(), order=arguments.order, table_bits=arguments.table_bits)
        model.save(arguments.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_DATAERR
    print(f"{arguments.out}: {model.num_units:,} characters, order {arguments.order}")
    for reason, count in reference.left_out.items():
        print(f"left out {count:,}: {reason}")
    held_out = reference.held_out
    if held_out:
        found = sorted(map(model.perplexity, held_out))
        marks = ", ".join(f"{share} % below {found[len(found) * share // 100]:.1f}" for share in (1, 50, 90, 99))
        print(f"perplexity of {len(found):,} pieces held out: {marks}")
    return 0


_COMMAND: Final = "`python -m data_prep train-ngrams OUT.npz FILES...`"
_PIECE_CHARACTERS: Final = 2000


_HELD_OUT: Final = 20


class _Reference:
    """The texts of files of any kind that a preparation reads, in pieces of about the size of a document."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self.held_out: list[str] = []
        """One piece in twenty."""
        self.left_out: Counter[str] = Counter()
        """Why lines and files gave no text."""

    def pieces(self) -> Iterator[str]:
        """All but those that are held out.

        Raises:
            InputError: a pattern that leads nowhere, or a file that cannot be read.
            NgramModelError: no text in any of the files.
        """
        index = 0
        for text in self._texts():
            for start in range(0, len(text), _PIECE_CHARACTERS):
                index += 1
                piece = text[start : start + _PIECE_CHARACTERS]
                if index % _HELD_OUT:
                    yield piece
                else:
                    self.held_out.append(piece)
        if not index and self.left_out:
            raise NgramModelError(f"no text in these files ({next(iter(self.left_out))}); give UTF-8 texts")

    def _texts(self) -> Iterator[str]:
        # Here, so that a model is used without loading the readers.
        from data_prep.reading.corpus import find_inputs
        from data_prep.reading.documents import Document, plan_units, read_unit
        from data_prep.reading.templates import Layout

        for unit in plan_units(find_inputs(self._patterns), Layout.named("auto")):
            for item in read_unit(unit):
                if isinstance(item, Document):
                    yield item.text
                else:
                    self.left_out[f"{unit.paths[item.file]}: {item.reason}"] += 1


def _check_writable(path: Path) -> None:
    """Find out before the work whether a model can be written.

    Raises:
        NgramModelError: it cannot.
    """
    temporary = publish.temporary_beside(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> NgramModelError:
    return NgramModelError(
        f"{path}: cannot write the model ({error.strerror or error}); name a file in a folder that exists and is yours"
    )


def _blocks(text: str, order: int) -> Iterator[tuple[int, np.ndarray]]:
    """The text in blocks of units that fit the caches; each says how many of its first ones are only context."""
    text = " ".join(text.split())
    units = np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2")
    for block in range(0, units.size, _BLOCK_UNITS):
        start = min(order - 1, block)
        yield start, units[block - start : block + _BLOCK_UNITS].astype(np.uint64)


def _buckets(units: np.ndarray, order: int, table_bits: int) -> Iterator[np.ndarray]:
    """For n-grams of 1, 2, ... order units: the bucket of the one that begins at each unit."""
    shift = np.uint64(64 - table_bits)
    rolling = units * _MULTIPLIER
    for length in range(1, order + 1):
        if length > 1:
            # Only n-grams that end inside the text: one fewer for each unit of length.
            rolling = rolling[:-1] * _MULTIPLIER + units[length - 1 :] * _MIXER
        mixed = rolling ^ (rolling >> np.uint64(32))
        yield (mixed * _MIXER) >> shift


def _fixed_log2(values: np.ndarray) -> np.ndarray:
    """Logarithms of positive, normal float64 as integers of 1/_FIXED, from exponent and first bits of the mantissa."""
    bits = values.view(np.int64)
    exponent = (bits >> 52) - 1023
    return exponent * _FIXED + _LOG2[(bits >> (52 - _LOG_BITS)) & ((1 << _LOG_BITS) - 1)]

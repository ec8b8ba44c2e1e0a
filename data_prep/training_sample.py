"""The texts a tokenizer is trained on: a fixed sample, spread over the whole input, cleaned as the input will be."""

from collections.abc import Iterator, Sequence

import xxhash

from data_prep.cleaning.clean import Cleaner
from data_prep.reading.documents import BadLine, Unit, read_unit
from data_prep.unit_step import kind_of_file, text_hash


def texts(
    units: Sequence[tuple[Unit, str]], training_bytes: int, threshold: int, cleaner: Cleaner, *, exact: bool
) -> Iterator[str]:
    """About training_bytes of text from all units alike; texts held out for validation stay unseen.

    Units come with the kind that is configured for them, in the order of the hash of their index, so that a sample that
    ends early still has some of everything. From each only the beginning is read, at most twice its equal share, as
    others may have less.

    Cost: reads about the bytes it gives; nothing is held.
    """
    quota_bytes = 2 * training_bytes / max(len(units), 1)
    rest_bytes = training_bytes
    for index in sorted(range(len(units)), key=_hash):
        for text, num_bytes in _beginning(*units[index], quota_bytes, cleaner):
            if rest_bytes <= 0:
                return
            if text_hash(text, exact=exact)[1] >= threshold:
                yield text
                rest_bytes -= num_bytes


def _beginning(unit: Unit, kind: str, quota_bytes: float, cleaner: Cleaner) -> Iterator[tuple[str, int]]:
    for item in read_unit(unit):
        if isinstance(item, BadLine):
            continue
        of_file = "chat" if item.turns else kind_of_file(unit, item.file, kind)
        text = cleaner.normalise(item.text, of_file)
        if not text.strip() or cleaner.judge(text, of_file, num_turns=len(item.turns) or None):
            continue
        num_bytes = len(text.encode("utf-8"))
        yield text, num_bytes
        quota_bytes -= num_bytes
        if quota_bytes <= 0:
            return


def _hash(index: int) -> int:
    # Of the place in the order, not of the path: an installation elsewhere gives the same tokenizer.
    return xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"))

"""The texts a tokenizer is trained on: a fixed sample, spread over the whole input, cleaned as the input will be."""

from collections.abc import Iterator, Sequence

import xxhash

from data_prep.cleaning.clean import Cleaner, kind_of
from data_prep.duplicates.minhash import exact_hash
from data_prep.reading.documents import BadLine, Unit, read_unit


def texts(units: Sequence[Unit], training_bytes: int, threshold: int, cleaner: Cleaner) -> Iterator[str]:
    """About training_bytes of text from all units alike; texts held out for validation stay unseen.

    Units come in the order of the hash of their index, so that a sample that ends early still has some of everything.
    From each unit only the beginning is read, at most twice its equal share, as others may have less.

    Cost: reads about the bytes it gives; nothing is held.
    """
    quota_bytes = 2 * training_bytes / max(len(units), 1)
    rest_bytes = training_bytes
    for index in sorted(range(len(units)), key=_hash):
        for text, num_bytes in _beginning(units[index], quota_bytes, cleaner):
            if rest_bytes <= 0:
                return
            if exact_hash(text)[1] >= threshold:
                yield text
                rest_bytes -= num_bytes


def _beginning(unit: Unit, quota_bytes: float, cleaner: Cleaner) -> Iterator[tuple[str, int]]:
    for item in read_unit(unit):
        if isinstance(item, BadLine):
            continue
        kind = "chat" if item.turns else kind_of(unit.paths[item.file], "prose")
        text = cleaner.normalise(item.text, kind)
        if not text.strip() or cleaner.judge(text, kind, num_turns=len(item.turns) or None):
            continue
        num_bytes = len(text.encode("utf-8"))
        yield text, num_bytes
        quota_bytes -= num_bytes
        if quota_bytes <= 0:
            return


def _hash(index: int) -> int:
    # Of the place in the order, not of the path: an installation elsewhere gives the same tokenizer.
    return xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"))

"""The texts a tokenizer is trained on: a fixed sample, spread over the whole input."""

from collections.abc import Iterator, Sequence

import xxhash

from data_prep.documents import BadLine, Unit, read_unit


def texts(units: Sequence[Unit], training_bytes: int, threshold: int) -> Iterator[str]:
    """About training_bytes of text from all units alike; texts held out for validation stay unseen.

    Units come in the order of the hash of their index, so that a sample that ends early still has some of everything.
    From each unit only the beginning is read, at most twice its equal share, as others may have less.

    Cost: reads about the bytes it gives; nothing is held.
    """
    quota_bytes = 2 * training_bytes / max(len(units), 1)
    rest_bytes = training_bytes
    for index in sorted(range(len(units)), key=_hash):
        for text, num_bytes in _beginning(units[index], quota_bytes):
            if rest_bytes <= 0:
                return
            if xxhash.xxh3_64_intdigest(text.encode("utf-8")) >= threshold:
                yield text
                rest_bytes -= num_bytes


def _beginning(unit: Unit, quota_bytes: float) -> Iterator[tuple[str, int]]:
    for item in read_unit(unit):
        if isinstance(item, BadLine):
            continue
        num_bytes = len(item.text.encode("utf-8"))
        yield item.text, num_bytes
        quota_bytes -= num_bytes
        if quota_bytes <= 0:
            return


def _hash(index: int) -> int:
    # Of the place in the order, not of the path: an installation elsewhere gives the same tokenizer.
    return xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"))

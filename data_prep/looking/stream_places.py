"""Where things lie in a stream of documents: which shards hold a stretch of it, and which stretch a sample is.

A place counts the tokens of a stream from the first token of its first document: the EOS before that is at -1.
"""

from collections.abc import Sequence
from typing import NamedTuple


class ShardSpan(NamedTuple):
    """The targets of a shard, as places of its stream."""

    file: str
    start: int
    num_targets: int


class Stretch(NamedTuple):
    """Tokens of a shard, counted as its file does: 0 is the context token, 1 the first target."""

    file: str
    first: int
    stop: int


def stretches(spans: Sequence[ShardSpan], first: int, stop: int) -> list[Stretch]:
    """Where the shards of a stream hold its places first to stop as targets: each place once.

    spans: in the order of the stream.
    """
    return [
        Stretch(span.file, max(first, span.start) - span.start + 1, min(stop, end) - span.start + 1)
        for span in spans
        if first < (end := span.start + span.num_targets) and stop > span.start
    ]


def sample_places(span: ShardSpan, sample: int, sample_tokens: int) -> tuple[int, int]:
    """The places first to stop of a training sample, its context token the first of them."""
    first = span.start + sample * sample_tokens
    return first - 1, min(first + sample_tokens, span.start + span.num_targets)

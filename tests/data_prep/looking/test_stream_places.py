import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.looking.stream_places import ShardSpan, sample_places, stretches

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(lengths, st.data())
def test_stretches_hold_every_place_once_where_its_shard_has_it(sizes: list[int], data: st.DataObject):
    starts = (np.cumsum(sizes) - sizes).tolist()
    spans = [ShardSpan(f"{k}.bin", start, size) for k, (start, size) in enumerate(zip(starts, sizes, strict=True))]
    first = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(first + 1, sum(sizes)))
    # A file has one token before its targets.
    stream = [(span.file, 1 + token) for span in spans for token in range(span.num_targets)]
    found = [(piece.file, token) for piece in stretches(spans, first, stop) for token in range(piece.first, piece.stop)]
    assert found == stream[first:stop]


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 20))
def test_samples_of_a_shard_share_one_context_token_and_hold_each_target_once(start: int, targets: int, length: int):
    span = ShardSpan("a.bin", start, targets)
    places = [sample_places(span, sample, length) for sample in range(-(-targets // length))]
    assert [place for first, stop in places for place in range(first + 1, stop)] == list(range(start, start + targets))
    assert all(stop - first <= length + 1 for first, stop in places)

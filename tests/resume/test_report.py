"""What is shown of a run's data: numbers that a walk over every sample confirms, and tables that say them."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resume import report
from resume import state as states
from resume.audit import audit_file
from resume.order import Order
from resume.requests import Request
from resume.runs import Run
from resume.state import Append, Batch, Cut, DataState, Event, Remove, Requeue, Reweight, Skip
from tests.resume.walks import Walk, begun, file_of

WEB = [file_of(1, 100), file_of(2, 61), file_of(3, 5)]
CODE = [file_of(4, 83), file_of(5, 40)]
NEW = [file_of(6, 75), file_of(7, 8)]
EXHAUSTED = "is exhausted"


@given(st.sets(st.integers(0, 60)), st.integers(1, 9))
def test_ranges_can_be_read_back_and_say_how_many_there_are_if_not_all_are_shown(numbers: set[int], most: int):
    text = report.ranges(np.array(sorted(numbers), dtype=np.int64), most)
    shown, _, remark = text.partition(" ... ")
    parts = [tuple(map(int, part.split("-"))) for part in shown.split() if part != "none"]
    told = [n for part in parts for n in range(part[0], part[-1] + 1)]
    assert told == sorted(numbers)[: len(told)]
    assert (text == "none") == (not numbers)
    num_ranges = sum(n - 1 not in numbers for n in numbers)
    assert len(parts) == min(most, num_ranges)
    assert remark == (f"({num_ranges:,} ranges)" if num_ranges > most else "")


def test_columns_are_aligned_numbers_to_the_right_and_those_that_say_nothing_left_out():
    rows = iter([("web", "1,250", "", "50.0%", "2.5 h"), ("documents", "7", "", "5.00%", "90 s")])
    assert report.columns(["source", "files", "removed", "share", "in"], rows) == [
        "source     files  share     in",
        "web        1,250  50.0%  2.5 h",
        "documents      7  5.00%   90 s",
    ]
    assert report.columns(["file", "samples"], []) == ["file  samples"]
    with pytest.raises(ValueError, match="longer|shorter"):
        report.columns(["file", "samples"], [("a",)])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (119.4, "119 s"),
        (120, "2.0 min"),
        (7_199, "120.0 min"),
        (7_200, "2.0 h"),
        (172_799, "48.0 h"),
        (216_000, "2.5 d"),
    ],
)
def test_a_length_of_time_is_told_in_the_largest_unit_of_which_there_are_two(seconds: float, text: str):
    assert report.duration(seconds) == text


Limits = Mapping[str, int]


def mixed(limits: Limits, **options) -> Walk:
    mixture = ["web=0.6 code=0.4", "400: web=0.2 code=0.8"]
    return Walk(begun({"web": WEB, "code": CODE}, mixture=mixture, max_epochs=limits, **options))


def appended(now: DataState) -> DataState:
    return states.append(now, {"web": NEW})


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run that stands somewhere in its data, and how far ahead is planned."""

    walked: Callable[[Limits], Walk]
    num_steps: int
    limits: dict[str, int] = dataclasses.field(default_factory=dict)


PLANS = {
    "one pool": Planned(lambda limits: Walk(begun({"web": WEB}, max_epochs=limits)), 20),
    "one pool, which ends": Planned(lambda limits: Walk(begun({"web": WEB}, max_epochs=limits)).steps(2), 20, {"": 2}),
    "one pool, which ends with the run": Planned(
        lambda limits: Walk(begun({"web": WEB}, max_epochs=limits)).steps(2), 11, {"": 2}
    ),
    "nothing left to do": Planned(lambda limits: Walk(begun({"web": WEB}, max_epochs=limits)).steps(7), 7),
    "an append": Planned(lambda limits: Walk(begun({"web": WEB})).steps(8).change(appended), 18),
    "a skip": Planned(lambda limits: Walk(begun({"web": WEB})).steps(1).change(lambda s: states.skip(s, 2)), 9),
    "a ragged last step": Planned(
        lambda limits: Walk(begun({"web": WEB}, max_epochs=limits)).steps(99).change(appended), 30, {"": 3}
    ),
    "two sources": Planned(lambda limits: mixed(limits).steps(3), 25),
    "two sources, one of which runs out": Planned(lambda limits: mixed(limits).steps(3), 25, {"code": 3}),
    "two sources, which run out": Planned(lambda limits: mixed(limits), 40, {"code": 2, "web": 1}),
    "two sources, one of which ends it all": Planned(
        lambda limits: mixed(limits, when_exhausted="stop").steps(2), 25, {"code": 2}
    ),
}


def draws(walk: Walk, num_steps: int) -> list[tuple[str, int]]:
    """Source and epoch of each position from here to the end of a step, or of the data, after walking there."""
    sources = {file_id: source for source, file_ids in walk.state.sources.items() for file_id in file_ids}
    first = len(walk.log)
    walk.steps(num_steps - walk.state.step)
    return [(sources[file_id], epoch) for file_id, epoch in walk.log[first:]]


def coming_by_hand(planned: Planned, num_steps: int) -> list[tuple[int, str, str]]:
    """Positions at which an epoch begins or a source has nothing more to give."""
    walk = planned.walked(planned.limits)
    start = walk.state.position
    begun_before = {(source, epoch) for source, ids in walk.state.sources.items() for i, epoch in walk.log if i in ids}
    begins: dict[tuple[str, int], int] = {}
    for position, entry in enumerate(draws(walk, num_steps), start):
        begins.setdefault(entry, position)
    coming = [(p, source, f"begins epoch {e}") for (source, e), p in begins.items() if (source, e) not in begun_before]
    for limited, limit in planned.limits.items():
        if limited:
            # Where it would be drawn from once more if only it were not limited.
            others = {source: n for source, n in planned.limits.items() if source != limited}
            coming.append(
                (start + draws(planned.walked(others), num_steps).index((limited, limit)), limited, EXHAUSTED)
            )
        else:
            coming.append((walk.state.position, states.WHOLE, EXHAUSTED))
    return sorted(coming)


@pytest.mark.parametrize("planned", PLANS.values(), ids=PLANS.keys())
def test_a_plan_says_what_a_walk_to_the_end_comes_across(planned: Planned):
    state, num_steps = planned.walked(planned.limits).state, planned.num_steps
    per_step, last = state.batch.batch_sequences, state.position + (num_steps - state.step) * 4
    ended = planned.walked(planned.limits).steps(num_steps - state.step).state
    values = report.plan(state, num_steps, step_s=0.5)
    # Of what lies behind the run, the first of each source.
    expected, is_shown = [], dict.fromkeys(state.sources, True)
    for position, source, what in coming_by_hand(planned, num_steps + 40):
        if is_shown[source]:
            expected.append((position * 8, source, what))
        is_shown[source] = position < ended.position
    coming = [entry for entry in values["coming"] if entry["source"]]
    assert [(entry["tokens"], entry["source"], entry["what"]) for entry in coming] == expected
    for entry in coming:
        position = entry["tokens"] // 8
        steps_before = (position - state.position) // per_step
        assert (entry["step"], entry["in_s"]) == (state.step + steps_before + 1, steps_before * 0.5)
        assert entry["is_within_run"] == (position < ended.position or position == ended.position < last)
    assert values["data_ends_after_step"] == (ended.step if ended.position < last else None)


@pytest.mark.parametrize("planned", PLANS.values(), ids=PLANS.keys())
def test_a_plan_says_how_far_each_source_is_drawn_at_the_end(planned: Planned):
    state = planned.walked(planned.limits).state
    walk = planned.walked(planned.limits).steps(planned.num_steps - state.step)
    order = Order(walk.state)
    files, _ = order.resolve_groups(np.arange(walk.state.position))
    drawn = collections.Counter(order.source_of(order.file_ids[i]) for i in files.tolist())
    for source in report.plan(state, planned.num_steps)["sources_at_end"]:
        file_ids = walk.state.sources[source["source"]]
        live = sum(walk.state.num_groups(file_id) for file_id in file_ids)
        epoch = max((epoch for file_id in file_ids for epoch in walk.trained[file_id]), default=0)
        seen = sum(len(walk.trained[file_id].get(epoch, ())) for file_id in file_ids)
        assert source["epochs"] == pytest.approx(epoch + seen / live)
        assert (source["files"], source["groups"]) == (len(file_ids), live)
        assert source["tokens"] == sum(map(state.num_targets, file_ids))
        assert source["drawn_groups"] == drawn[source["source"]]


def test_shares_at_the_end_are_the_mixture_s_and_go_over_to_the_others_from_a_source_that_has_run_out():
    def shares(limits: Limits, num_steps: int) -> dict[str, float]:
        plan = report.plan(mixed(limits).state, num_steps)
        return {source["source"]: round(source["share"], 4) for source in plan["sources_at_end"]}

    assert shares({}, 12) == {"code": 0.4, "web": 0.6}
    assert shares({}, 13) == {"code": 0.8, "web": 0.2}  # 400 tokens are twelve steps and a half
    assert shares({"code": 1}, 13) == {"code": 0.0, "web": 1.0}


def test_a_plan_tells_weights_to_come_but_not_those_that_hold_already():
    def told(steps: int) -> list[tuple[int, str]]:
        coming = report.plan(mixed({}).steps(steps).state, 20)["coming"]
        return [(entry["step"], entry["what"]) for entry in coming if not entry["source"]]

    assert told(3) == [(13, "weights become web=0.2 code=0.8")]
    assert told(13) == []


def test_the_table_of_a_plan_tells_what_ends_the_data_as_part_of_the_run_and_the_rest_as_after_it():
    ending = report.plan_tables(report.plan(mixed({"code": 1}, when_exhausted="stop").state, 20, 90.0))
    assert "from step 0 to 20, 30.0 min at 90 s a step" in ending
    assert "THE DATA ENDS after step 7, before the run does" in ending
    assert re.search(r"^ +8 +224 +10.5 min +code +is exhausted$", ending, re.MULTILINE)
    lasting = report.plan_tables(report.plan(mixed({}).state, 20))
    assert "THE DATA ENDS" not in lasting
    assert re.search(r"^ +\d+ +1,272 +web +begins epoch 2, after the run$", lasting, re.MULTILINE)


def test_a_source_that_has_run_out_is_told_once_though_weights_change_again_and_once_more_if_it_was_filled_up():
    def told(state: DataState) -> list[str]:
        coming = report.plan(state, 40)["coming"]
        return [entry["source"] for entry in coming if entry["what"] == EXHAUSTED]

    run = mixed({"web": 1})
    ended = mixed({"web": 1}).steps(20)
    assert told(run.state) == ["web"]
    assert told(ended.state) == []
    assert told(ended.change(appended).state) == ["web"]


BAD = (WEB[0], 96)


def with_bad(state: DataState) -> Walk:
    return Walk(state, is_bad=lambda *place: place == BAD)


def changed() -> Walk:
    """A run to which much has happened, on its way through its second epoch; the last sample of WEB[0] is bad."""
    walk = with_bad(begun({"web": WEB}, batch_sequences=3))
    walk.steps(2).change(lambda now: states.skip(now, 2)).steps(1)
    walk.change(lambda now: states.skip(now, 1, for_good=True)).change(lambda now: states.remove(now, [WEB[1]]))
    return walk.steps(3).change(appended).steps(6).change(lambda now: states.skip(now, 2)).steps(1)


def shorter() -> Walk:
    """A run whose samples are of 16, 4 and 8 tokens, the last ones inside the first epoch."""
    walk = with_bad(begun({"web": WEB}, 16)).steps(1)
    walk.change(lambda now: states.set_batch(now, 8, 4)).steps(1)
    return walk.change(lambda now: states.set_batch(now, 4, 8)).steps(2)


HISTORIES = {
    "much has happened": changed,
    "other lengths": shorter,
    "two sources": lambda: with_bad(mixed({"code": 2}).state).steps(16),
}


def epoch_lines(text: str, epoch: int) -> list[str]:
    return re.findall(rf"^epoch {epoch}: (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("walked", HISTORIES.values(), ids=HISTORIES.keys())
def test_the_history_of_a_file_is_what_a_walk_over_every_sample_has_seen(walked: Callable[[], Walk]):
    walk = walked()
    order, books = Order(walk.state), walk.ledger()
    for file_id in order.file_ids:
        values = report.file_history(order, books, file_id, Path("/data/web.bin"))
        text = report.history_tables(values)
        assert text.startswith(f"/data/web.bin ({file_id})\nsource {order.source_of(file_id)}: ")
        for epoch in values["epochs"]:
            of_epoch = {
                (sample * part["sequence_length"], part["sequence_length"]): step
                for part in epoch["trained"]
                for sample, step in zip(part["samples"], part["steps"], strict=True)
            }
            assert of_epoch == walk.trained[file_id].get(epoch["epoch"], {})
            told = epoch_lines(text, epoch["epoch"])
            for length in {length for _, length in of_epoch}:
                steps = [step for (_, of_length), step in of_epoch.items() if of_length == length]
                samples = np.array(sorted(first // length for first, of_length in of_epoch if of_length == length))
                trained = f"{len(steps)} samples of {length} tokens trained at steps {min(steps)} to {max(steps)}"
                assert f"{trained}: {report.ranges(samples)}" in told
            # Each group is somewhere: trained, waiting, skipped, dropped or removed.
            groups = {first // walk.state.group_tokens for first, _ in of_epoch}
            others = [epoch[f"{kind}_groups"] for kind in ("waiting", "skipped", "dropped", "removed")]
            assert len(groups) + sum(others) in (values["groups"], 0)
        assert max((epoch for epoch in walk.trained[file_id]), default=0) < len(values["epochs"])


def test_the_tables_of_files_that_were_skipped_dropped_or_removed_say_so():
    walk = changed()
    order, books = Order(walk.state), walk.ledger()
    text = {i: report.history_tables(report.file_history(order, books, i, None)) for i in order.file_ids}
    assert all(table.startswith(f"place unknown ({file_id})\nsource all: ") for file_id, table in text.items())
    assert "100 tokens in 13 samples; 19 samples trained by the books, as the order says" in text[WEB[0]]
    assert epoch_lines(text[WEB[0]], 0)[1:] == ["of its samples 3 dropped"]
    assert epoch_lines(text[WEB[0]], 2)[1:] == ["of its samples 5 waiting, 4 skipped, 3 dropped"]
    assert text[WEB[0]].splitlines()[-2:] == [
        f"quarantined: tokens 96 to 104 (sample 12) of {WEB[0]}, at step {step}" for step in (5, 10)
    ]
    assert epoch_lines(text[WEB[1]], 0) == [
        "3 samples of 8 tokens trained at steps 1 to 2: 0 2 6",
        "of its samples 5 removed",
    ]
    assert epoch_lines(text[WEB[1]], 1) == epoch_lines(text[WEB[1]], 2) == ["not part of it"]
    assert epoch_lines(text[WEB[2]], 2) == ["of its samples 1 waiting"]
    assert epoch_lines(text[NEW[0]], 0) == ["not part of it"]
    grouped = Walk(begun([100], 8, group_tokens=16)).steps(1)
    history = report.file_history(Order(grouped.state), grouped.ledger(), file_of(0, 100), None)
    assert epoch_lines(report.history_tables(history), 0)[-1] == "of its groups 3 waiting"


@pytest.mark.parametrize("walked", HISTORIES.values(), ids=HISTORIES.keys())
def test_the_history_of_a_sample_has_every_step_that_trained_a_part_of_it(walked: Callable[[], Walk]):
    walk = walked()
    order, books, length = Order(walk.state), walk.ledger(), walk.state.sequence_length
    for file_id in order.file_ids:
        for sample, first in enumerate(range(0, walk.state.num_targets(file_id), length)):
            last = min(first + length, walk.state.num_targets(file_id))
            values = report.sample_history(order, books, file_id, None, sample)
            text = report.sample_tables(values)
            assert f"\nsample {sample}: tokens {first} to {last}\n" in text
            for epoch in values["epochs"]:
                overlapping = {
                    (begin, of_length, step)
                    for (begin, of_length), step in walk.trained[file_id].get(epoch["epoch"], {}).items()
                    if set(range(begin, begin + of_length)) & set(range(first, last))
                }
                trained = epoch["trained"]
                found = [(t["sample"] * t["sequence_length"], t["sequence_length"], t["step"]) for t in trained]
                assert sorted(found) == sorted(overlapping)
                assert [t["is_quarantined"] for t in trained] == [(file_id, begin) == BAD for begin, _, _ in found]
                assert (epoch["otherwise"] is None) == bool(trained)
                told = []
                for part in trained:
                    what = "QUARANTINED" if part["is_quarantined"] else "trained"
                    other = f" as sample {part['sample']} of {part['sequence_length']} tokens"
                    told.append(f"{what} at step {part['step']}{other * (part['sequence_length'] != length)}")
                assert epoch_lines(text, epoch["epoch"]) == (told or [epoch["otherwise"]])


def test_a_sample_that_was_not_trained_has_its_reason():
    walk = changed()
    order, books = Order(walk.state), walk.ledger()
    reasons: dict[str, collections.Counter[str]] = {}
    for file_id in order.file_ids:
        for sample in range(walk.state.num_groups(file_id)):
            for epoch in report.sample_history(order, books, file_id, None, sample)["epochs"]:
                counts = reasons.setdefault(
                    f"{order.file_ids.index(file_id)} in {epoch['epoch']}", collections.Counter()
                )
                counts.update([epoch["otherwise"]] if epoch["otherwise"] else [])
    assert reasons["0 in 2"] == {"waits": 5, "was skipped, and waits": 4, "was skipped for good": 3}
    assert reasons["1 in 0"] == {"was removed with its file": 5}
    assert reasons["1 in 1"] == {"is not part of this epoch": 8}


def test_the_table_of_the_books_names_the_file_that_differs_and_it_alone():
    walk = mixed({}).steps(5)
    order, books = Order(walk.state), walk.ledger()
    paths = {file_id: Path(f"/data/{i}/train/web-{i:05}.bin") for i, file_id in enumerate(WEB)}

    def table() -> str:
        return report.audit_tables([audit_file(order, books, file_id) for file_id in order.file_ids], paths)

    assert table().splitlines()[-1] == "20 samples trained; the books and the order agree, file by file"
    assert len(re.findall("yes$", table(), re.MULTILINE)) == 5
    sources = [line.split()[1] for line in table().splitlines()[1:6]]
    assert sources == ["code", "code", "web", "web", "web"]
    books.counts[order.file_ids.index(WEB[1])] += 1
    books.digests[order.file_ids.index(CODE[1])] += np.uint64(1)
    wrong = [line.split()[0] for line in table().splitlines() if line.endswith("NO")]
    assert wrong == [CODE[1], "1/train/web-00001.bin"]
    assert table().splitlines()[-1] == "21 samples trained; in 2 of 5 files the books and the order differ"
    (values,) = [report.file_history(order, books, i, path) for i, path in paths.items() if i == WEB[1]]
    num = values["computed"]
    assert f"{num + 1} samples trained by the books, BUT THE ORDER DIFFERS, with {num}" in report.history_tables(values)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Append(at=0, step=0, files={"web": WEB, "code": CODE[:1]}), "3 files of web, 1 files of code"),
        (Remove(at=0, step=0, file_ids=WEB), "3 files"),
        (Skip(at=0, step=0, num_groups=1_200, for_good=False), "1,200 groups, to return within the epoch"),
        (Skip(at=0, step=0, num_groups=8, for_good=True), "8 groups for good"),
        (Requeue(at=0, step=0), "what was skipped returns"),
        (Reweight(at=0, step=0, weights={"web": 0.25, "code": 3}), "web=0.25 code=3"),
        (Batch(at=0, step=0, batch_sequences=1_024, sequence_length=2_048), "1,024 samples of 2,048 tokens a step"),
        (Cut(at=0, step=0), "the data ended inside a window"),
    ],
)
def test_every_kind_of_event_is_told_in_words(event: Event, text: str):
    assert report.describe(event) == text


def test_status_counts_what_was_trained_skipped_and_quarantined_and_lists_events_and_requests():
    walk = changed()
    pending: list[tuple[int, Request]] = [(3, {"kind": "requeue"})]
    config = {"run": {"num_steps": 1_500}}
    run = Run(Path("/runs/a"), Path("/runs/a/step-13"), config, walk.state, Order(walk.state), walk.ledger(), pending)
    values = report.status(run)
    num_trained = sum(1 for _ in walk.samples())
    assert (values["step"], values["sample"]) == (13, walk.state.position)
    assert values["skipped_samples"] == values["sample"] - num_trained == 15
    lengths = [min(8, walk.state.num_targets(file_id) - first) for file_id, (first, _), _ in walk.samples()]
    assert values["tokens_seen"] == sum(lengths)
    (source,) = values["sources"]
    assert (source["files"], source["removed_files"], source["drawn_groups"]) == (5, 1, values["sample"])
    assert source["tokens"] == 100 + 5 + 75 + 8
    text = report.status_tables(values)
    assert text.startswith(
        f"/runs/a: step 13 of 1,500, {sum(lengths)} tokens trained; next is sample {values['sample']} "
    )
    assert "(3 samples of 8 tokens a step), 15 before it were skipped\n" in text
    kinds = [line.split()[0] for line in text.splitlines() if re.match(r"\w+ +\d+ +\d+ ", line)]
    assert kinds[1:] == ["batch", "append", "skip", "skip", "remove", "append", "skip"]
    assert text.count("quarantined: tokens 96 to 104") == 2
    assert text.splitlines()[-1] == "request 3 waits for the run: return of what was skipped"

"""Requests are numbered, lose nothing when many are made at once, and what is none is refused by name."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resume import checkpoint, requests, state
from resume.manifest import DataError
from resume.order import Order
from resume.state import Append, DataState, Remove, Requeue, Reweight, Skip
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from train import pretrain


def file_id(name: int, num_targets: int = 80) -> str:
    return f"{name:032x}-{name:032x}-{4096 + 2 * (num_targets + 1)}"


def fresh(**changes: Any) -> DataState:
    options: dict[str, Any] = {"seed": 3, "sequence_length": 8, "batch_sequences": 4}
    options |= {"tokenizer_digest": "t", "eos_id": 0, **changes}
    files = {"web": [file_id(1), file_id(2)], "code": [file_id(3)]}
    return state.start(files, **options)


APPEND = {"kind": "append", "files": {"web": {file_id(9): "/x/web.bin"}}, "weights": None}
REMOVE = {"kind": "remove", "file_ids": [file_id(1)]}
SKIP = {"kind": "skip", "num_steps": 2, "for_good": False}
REWEIGHT = {"kind": "reweight", "weights": {"web": 0.25, "code": 0.75}, "from_tokens": None}


def test_requests_are_numbered_from_one_and_come_back_in_that_order_as_they_were(tmp_path: Path):
    wanted = [APPEND, REMOVE, SKIP, {"kind": "requeue"}, REWEIGHT]
    assert [requests.queue(tmp_path, request) for request in wanted] == [1, 2, 3, 4, 5]
    assert requests.pending(tmp_path, 0) == list(enumerate(wanted, 1))
    assert requests.pending(tmp_path, 3) == [(4, {"kind": "requeue"}), (5, REWEIGHT)]
    assert requests.pending(tmp_path, 5) == []
    assert sorted(path.name for path in (tmp_path / "requests").iterdir()) == [f"{i:04}.json" for i in range(1, 6)]


def test_numbers_are_compared_as_numbers(tmp_path: Path):
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "9999.json").write_text(json.dumps(SKIP))
    assert [requests.queue(tmp_path, {"kind": "requeue"}) for _ in range(2)] == [10_000, 10_001]
    assert [number for number, _ in requests.pending(tmp_path, 0)] == [9_999, 10_000, 10_001]


def test_a_run_without_requests_has_none_waiting(tmp_path: Path):
    assert requests.pending(tmp_path, 0) == []


def test_a_number_that_the_run_has_passed_is_not_given_again_though_its_file_is_gone(tmp_path: Path):
    assert requests.queue(tmp_path, SKIP, taken=7) == 8
    assert requests.pending(tmp_path, 7) == [(8, SKIP)]


def test_many_processes_at_once_neither_collide_nor_lose_a_request(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from resume import requests\n"
        "for i in range(12): print(requests.queue(Path(sys.argv[1]),"
        " {'kind': 'skip', 'num_steps': 100 * int(sys.argv[2]) + i, 'for_good': False}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(4)]
    given = {i: [int(line) for line in process.communicate()[0].split()] for i, process in enumerate(started)}
    found = dict(requests.pending(tmp_path, 0))
    assert sorted(found) == list(range(1, 49))
    for i, numbers in given.items():
        assert [found[number]["num_steps"] for number in numbers] == [100 * i + j for j in range(12)]
        assert numbers == sorted(numbers)
    assert len(list((tmp_path / "requests").iterdir())) == 48  # nothing temporary is left


def test_many_threads_at_once_neither_collide_nor_lose_a_request(tmp_path: Path):
    def make(i: int) -> None:
        for j in range(10):
            requests.queue(tmp_path, {"kind": "skip", "num_steps": 100 * i + j, "for_good": True})

    threads = [threading.Thread(target=make, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = requests.pending(tmp_path, 0)
    assert [number for number, _ in found] == list(range(1, 41))
    assert sorted(request["num_steps"] for _, request in found) == [100 * i + j for i in range(4) for j in range(10)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"kind": "dance"}',
        b'{"kind": "skip"}',
        b'{"kind": "skip", "num_steps": "3", "for_good": false}',
        b'{"kind": "remove", "file_ids": "abc"}',
        b'{"kind": "remove", "file_ids": [7]}',
        b'{"kind": "append", "files": {"all": {"abc": "/x"}}, "weights": null}',
        b'{"kind": "append", "files": {"all": ["abc"]}, "weights": null}',
        b'{"kind": "reweight", "weights": {"web": "1"}, "from_tokens": null}',
        b'{"kind": "reweight", "weights": {"web": -1, "code": 2}, "from_tokens": null}',
        b'{"kind": "reweight", "weights": {"web": NaN}, "from_tokens": null}',
        b'{"kind": "reweight", "weights": {"web": 0}, "from_tokens": null}',
        b'{"kind": "reweight", "weights": {"web": 1}, "from_tokens": 1.5}',
        b'{"kind": "reweight", "weights": {"web": 1' + b"0" * 400 + b'}, "from_tokens": null}',
        b"[" * 200_000,
        b'{"kind": "remove", "file_ids": ["%s-%s-0"]}' % (b"0" * 32, b"0" * 32),
        b'{"kind": "remove", "file_ids": ["%s-%s-1%s"]}' % (b"0" * 32, b"0" * 32, b"0" * 30),
        b'{"kind": "remove", "file_ids": ["%s-%s-%s"]}' % (b"0" * 32, b"0" * 32, b"9" * 5_000),
    ],
    ids=lambda content: content[:60].decode(errors="replace"),
)
def test_what_is_no_request_is_refused_by_name_and_keeps_nothing_else_from_being_done(tmp_path: Path, content: bytes):
    (tmp_path / "requests").mkdir()
    (tmp_path / "requests" / "0001.json").write_bytes(content)
    assert requests.queue(tmp_path, REMOVE) == 2
    (_, broken), second = requests.pending(tmp_path, 0)
    assert second == (2, REMOVE)
    assert requests.describe(broken) == "unreadable"
    with pytest.raises(DataError, match=r"requests/0001\.json: not a request \(.+\); make it again"):
        requests.applied(fresh(), broken)


def test_a_request_that_the_disk_does_not_give_is_an_error_and_not_a_refusal(tmp_path: Path):
    (tmp_path / "requests" / "0001.json").mkdir(parents=True)
    with pytest.raises(DataError, match=r"0001\.json: cannot be read \(not a plain file\)"):
        requests.pending(tmp_path, 0)


def test_a_pipe_in_the_place_of_a_request_keeps_nobody_waiting(tmp_path: Path):
    (tmp_path / "requests").mkdir()
    os.mkfifo(tmp_path / "requests" / "0001.json")
    with pytest.raises(DataError, match=r"0001\.json: cannot be read \(not a plain file\); restore it, or delete it"):
        requests.pending(tmp_path, 0)


def test_a_name_that_no_request_was_given_is_none(tmp_path: Path):
    assert requests.queue(tmp_path, REMOVE) == 1
    for name in ("1.json", "00001.json", "002.json", "0003.json.old"):
        (tmp_path / "requests" / name).write_text(json.dumps(SKIP))
    assert requests.pending(tmp_path, 0) == [(1, REMOVE)]


@pytest.mark.parametrize(
    ("request_", "event", "words"),
    [
        (APPEND, Append(at=0, step=0, files={"all": [file_id(9)]}), "append of files: 1 of web"),
        (REMOVE, Remove(at=0, step=0, file_ids=[file_id(1)]), "removal of 1 files"),
        (SKIP, Skip(at=0, step=0, num_groups=8, for_good=False), "skip of 2 steps"),
        ({**SKIP, "for_good": True}, Skip(at=0, step=0, num_groups=8, for_good=True), "skip of 2 steps for good"),
        ({"kind": "requeue"}, Requeue(at=0, step=0), "return of what was skipped"),
    ],
)
def test_a_request_becomes_the_event_that_its_words_say(request_: requests.Request, event: state.Event, words: str):
    advanced = fresh().advance(4, 32)
    changed = requests.applied(advanced, request_)
    assert [e for e in changed.events if e not in advanced.events] == [dataclasses.replace(event, at=4, step=1)]
    assert changed.position == (12 if isinstance(event, Skip) else 4)
    assert requests.describe(request_) == words


def test_weights_change_now_or_later_and_with_an_append():
    mixed = fresh(mixture=["web=0.5 code=0.5"]).advance(4, 32)
    now = requests.applied(mixed, REWEIGHT)
    assert now.events[-1] == Reweight(at=4, step=1, weights={"web": 0.25, "code": 0.75})
    later = requests.applied(mixed, {**REWEIGHT, "from_tokens": 801})
    assert later.events[-1] == Reweight(at=101, step=1, weights={"web": 0.25, "code": 0.75})
    weights = {"web": 1, "code": 1, "books": 2}
    both = {"kind": "append", "files": {"books": {file_id(9): "/b.bin"}}, "weights": weights}
    assert requests.applied(mixed, both).events[-2:] == (
        Append(at=4, step=1, files={"books": [file_id(9)]}),
        Reweight(at=4, step=1, weights={"web": 1, "code": 1, "books": 2}),
    )
    assert requests.describe(both) == "append of files: 1 of books, weights web=1 code=1 books=2"
    assert requests.describe({**REWEIGHT, "from_tokens": 20_000_000}).endswith("from 20,000,000 tokens on")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({**APPEND, "files": {"web": {file_id(1): "/x"}}}, "is part of the run already"),
        ({**APPEND, "files": {}}, "no file to append"),
        ({"kind": "remove", "file_ids": [file_id(7)]}, "is not part of the run"),
        ({**SKIP, "num_steps": 0}, "cannot skip 0 steps"),
        ({**SKIP, "num_steps": -2}, "cannot skip -2 steps"),
        (REWEIGHT, "one pool"),
        (
            {**SKIP, "num_steps": 10**12},
            "skip of 1000000000000 steps: the whole data is 7 steps; skip no more than that",
        ),
        ({**SKIP, "num_steps": 10**400}, "the whole data is 7 steps"),
        ({**SKIP, "num_steps": 10**400, "because": "it rolled back"}, "not a request|skip"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_request_that_does_not_fit_is_refused_and_says_why(request_: requests.Request, message: str):
    with pytest.raises(DataError, match=message):
        requests.applied(fresh(), request_)


def test_a_run_that_goes_back_to_an_older_checkpoint_takes_requests_up_again_to_the_same_order(tmp_path: Path):
    data, more = write_data(tmp_path / "data"), write_data(tmp_path / "more", texts=texts_about("more", 40))
    run = tmp_path / "run"
    record = next(s for s in json.loads((more / "manifest.json").read_text())["shards"] if s["split"] == "train")
    new = f"{record['md5_head']}-{record['md5_tail']}-{record['size_bytes']}"

    def train_until(num_steps: int) -> dict[str, Any]:
        config = tiny_run(data, run, run={"num_steps": num_steps, "save_every": 2, "validate_every": 99})
        assert pretrain.pretrain(config) == 0
        newest = checkpoint.latest(run)
        assert newest is not None
        return checkpoint.read_record(newest)

    train_until(2)
    files = {"test": {new: str(more / record["file"])}}
    requests.queue(run, {"kind": "append", "files": files, "weights": None})
    requests.queue(run, SKIP)
    first = train_until(6)
    kinds = [event["kind"] for event in first["data"]["events"]]
    assert kinds == ["batch", "append", "append", "skip"]
    assert first["data"]["requests_taken"] == 2
    for step in (4, 6):
        (run / f"step-{step}").rename(tmp_path / f"lost-{step}")
    again = train_until(6)
    for name in ("data", "trained", "files"):
        assert again[name] == first[name]  # order, books and weights
    order = Order(state.from_json(again["data"]))
    files_at, _ = order.resolve(np.arange(24, order.state.position))
    assert order.file_ids.index(new) in files_at

"""Real processes, killed at any moment and resumed on other numbers of ranks while their data changes: what they train.

The witnesses are the lines that every rank writes with data.record_samples, the shards themselves, and a run on one
rank that nobody interrupted, to which the same happened at the same steps.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resume import checkpoint, requests
from tests import lives
from tests.prepared import texts_about, write_data
from tests.runs import tiny_run
from tests.trained import Sample, audited, file_ids, pretrain_in_process, resume, samples_in, total, trained
from train.config import RunConfig, with_values


class Life(lives.Life):
    """One life of a run, whose lines are read as they come."""

    def __init__(self, config: RunConfig, num_ranks: int):
        self.batch_sequences = config.data.batch_sequences
        self._num_read = 0
        super().__init__(config, num_ranks)

    @property
    def lines(self) -> list[str]:
        """All that the first rank has printed."""
        return self.out().splitlines()

    @property
    def resumed_at(self) -> int:
        """The step that it went on from."""
        found = re.search(r"^(?:resuming|already) at step (\d+)", self.out(), re.MULTILINE)
        return int(found[1]) if found else 0

    def until_line(self, pattern: str) -> re.Match[str]:
        """Waits for a line that has not been waited for, and returns what matches in it."""
        found: list[re.Match[str]] = []

        def has_come() -> bool:
            lines = self.out().split("\n")[:-1]  # whole ones
            while self._num_read < len(lines) and not found:
                found.extend(filter(None, [re.match(pattern, lines[self._num_read])]))
                self._num_read += 1
            return bool(found)

        self.until(has_come)
        assert found or has_come(), f"the run ended before a line {pattern!r}:\n{self.out()}{self.err()}"
        return found[0]

    def steps(self, count: int) -> None:
        """Waits until so many more steps are done."""
        for _ in range(count):
            self.until_line(r"step +[\d,]+/")

    def terminate(self) -> None:
        """Asks for the end as a scheduler does, or the kernel if the launcher is gone."""
        self.signal(signal.SIGTERM)
        self.end()


@dataclasses.dataclass
class History:
    """All lives of a run so far."""

    run: Path
    lives: list[Life] = dataclasses.field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [line for life in self.lives for line in life.lines]

    @contextlib.contextmanager
    def life(self, config: RunConfig, num_ranks: int, **data: Any) -> Iterator[Life]:
        """The next life, with other values in [data]."""
        allowed = {"allow_changes": ("data.batch_sequences",)}
        with Life(with_values(config, data=data, run=allowed), num_ranks) as life:
            self.lives.append(life)
            yield life

    def taken_at(self) -> dict[int, int]:
        """The step at which each request was taken up, for good."""
        told: dict[int, int] = {}
        for line in self.lines:
            if match := re.match(r"request (\d+) taken up at step (\d+):", line):
                assert told.setdefault(int(match[1]), int(match[2])) == int(match[2])  # it is told once it is saved
        steps = checkpoint.steps(self.run)
        saved = {step: checkpoint.read_record(self.run / f"step-{step}")["data"]["requests_taken"] for step in steps}
        for number, _ in requests.pending(self.run, 0):
            # The kill came between the checkpoint and the line about it, or the request was refused.
            if taken := [step for step in steps if saved[step] >= number]:  # else it came when the data had ended
                told.setdefault(number, min(taken))
        return told

    def uninterrupted(self, config: RunConfig, folder: Path) -> Path:
        """The run folder of a run on one rank, in this process, to which the same happened at the same steps."""
        run, taken = folder / "run", self.taken_at()
        last = checkpoint.steps(self.run)[-1]
        # A life's steps are those up to the checkpoint from which the next one went on.
        begins = [life.resumed_at for life in self.lives]
        lengths = {begin: life.batch_sequences for begin, life in zip(begins, self.lives, strict=True)}
        stops = sorted({step for step in (*begins, *taken.values()) if 0 < step < last} | {last})
        for stop, begin in zip(stops, [0, *stops], strict=False):
            for number, step in taken.items():
                if step == begin:
                    (run / requests.FOLDER).mkdir(parents=True, exist_ok=True)
                    shutil.copy(self.run / requests.FOLDER / f"{number:04d}.json", run / requests.FOLDER)
            batch = lengths[max(b for b in lengths if b <= begin)]
            data = {"batch_sequences": batch, "micro_batch_sequences": batch}
            alone = with_values(config, run={"dir": str(run), "num_steps": stop}, data=data)
            code, output = pretrain_in_process(alone, "--run.allow-changes", "data.batch_sequences")
            assert code == 0, output
        return run


def config_for(folder: Path, *data_folders: Path, **data: Any) -> RunConfig:
    portions = {"paths": tuple(map(str, data_folders)), "batch_sequences": 6, "record_samples": True, **data}
    often = {"num_steps": 10_000, "save_every": 7, "validate_every": 10_000, "keep_checkpoints": 10_000}
    return tiny_run(data_folders[0], folder / "run", run=often, data=portions)


def epochs_in_order(run: Path, ids: list[str], window_steps: int = 0) -> None:
    """No epoch has a sample twice, and each is over before the next one of the same source begins.

    Where samples are shuffled in windows, the last window of an epoch may hold the first samples of the next one.
    """
    code, output = resume("audit", run, *ids, "--json")
    assert code == 0
    of_source: dict[str, dict[int, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for file in json.loads(output)["files"]:
        for epoch in file["epochs"]:
            for part in epoch["trained"]:
                assert len(set(part["samples"])) == len(part["samples"])
                of_source[file["source"]][epoch["epoch"]] += part["steps"]
            whole = (
                epoch["waiting_groups"] + epoch["skipped_groups"] + epoch["dropped_groups"] + epoch["removed_groups"]
            )
            is_absent = not any(part["samples"] for part in epoch["trained"])
            if whole == 0 and not is_absent:
                (part,) = epoch["trained"]
                assert len(part["samples"]) == -(-file["targets"] // part["sequence_length"])
    for epochs in of_source.values():
        for earlier, later in itertools.pairwise(sorted(epoch for epoch, steps in epochs.items() if steps)):
            assert max(epochs[earlier]) <= min(epochs[later]) + window_steps


def test_a_run_killed_thrice_whose_data_changes_trains_each_sample_once_an_epoch(tmp_path: Path):
    chance = random.Random(20)
    folders = {name: write_data(tmp_path / name, texts=texts_about(name, 200)) for name in ("begun", "live", "stopped")}
    run = tmp_path / "run"
    history = History(run)
    config = config_for(tmp_path, folders["begun"], max_epochs=("2",))

    with history.life(config, 2) as life:
        life.steps(chance.randint(8, 14))
        assert resume("append", run, folders["live"])[0] == 0  # beside the running run
        at = int(life.until_line(r"request 1 taken up at step (\d+): append of files: \d+ of test")[1])
        assert at % 7 == 0
        life.steps(chance.randint(1, 9))
        time.sleep(0.02 * chance.random())
        life.kill()
    last = max(trained(run))
    assert checkpoint.steps(run)[-1] <= last

    assert resume("append", run, folders["stopped"])[0] == 0
    removed = file_ids(folders["begun"])[1]
    assert resume("remove", run, removed)[0] == 0
    assert resume("skip", run, "--steps", 3)[0] == 0
    with history.life(config, 4, micro_batch_sequences=1) as life:
        life.until_line("request 4 taken up")
        life.steps(chance.randint(5, 12))
        time.sleep(0.02 * chance.random())
        life.kill()

    vanishing = write_data(tmp_path / "vanishing", texts=texts_about("vanishing", 40))
    with history.life(config, 1, micro_batch_sequences=4) as life:
        life.steps(1)
        life.signal(signal.SIGSTOP)  # so that nothing is taken up before its file is gone
        assert resume("append", run, vanishing)[0] == 0
        shutil.rmtree(vanishing)
        requests.queue(run, requests.pending(run, 0)[0][1])  # a second time, past the command that would refuse it
        life.signal(signal.SIGCONT)
        assert str(vanishing) in life.until_line("request 5 REFUSED: .*").string
        assert "is part of the run already" in life.until_line("request 6 REFUSED: .*").string
        life.steps(chance.randint(1, 9))
        life.kill()

    with history.life(config, 2, micro_batch_sequences=5) as life:
        life.until_line("the data ends after step")
        assert life.end() == [0, 0]

    steps, counts = trained(run), total(trained(run))
    assert sorted(steps) == list(range(1, max(steps) + 1))
    every = set[Sample]().union(*map(samples_in, folders.values()))
    stay = {sample for sample in every if sample.file_id != removed}
    assert {sample: counts[sample] for sample in stay} == dict.fromkeys(stay, 2)
    assert set(counts) <= every
    assert all(counts[sample] <= 1 for sample in every - stay)
    assert any(counts[sample] == 0 for sample in every - stay)

    ids = [i for folder in folders.values() for i in file_ids(folder)]
    code, output = resume("audit", run)
    assert code == 0, output
    assert "the books and the order agree, file by file" in output
    assert audited(run, ids) == steps
    epochs_in_order(run, ids)
    assert trained(history.uninterrupted(config, tmp_path / "alone")) == steps


@dataclasses.dataclass(frozen=True)
class Soak:
    """What a long test plays through."""

    seed: int
    data: dict[str, Any]
    batches: tuple[int, ...]
    num_lives: int = 12


SOAKS = {
    "two sources": Soak(
        seed=1,
        data={"mixture": ("code=0.4 web=0.6",), "max_epochs": ("code=3", "web=2")},
        batches=(6, 7, 12),
    ),
    "windows": Soak(
        seed=2,
        data={"group_tokens": 128, "window_groups": 6, "max_epochs": ("3",)},
        batches=(8, 12, 24),
    ),
    "two sources in windows": Soak(
        seed=3,
        data={
            "mixture": ("code=0.4 web=0.6", "30e3: code=0.7 web=0.3"),
            "group_tokens": 64,
            "window_groups": 4,
            "max_epochs": ("code=2",),
        },
        batches=(8, 12),
    ),
}


def skips_at_its_end(run: Path) -> bool:
    """Whether the newest checkpoint took up a skip of steps.

    The run that is not interrupted would take it up with the next life's batches: as other steps.
    """
    step = checkpoint.steps(run)[-1]
    events = checkpoint.read_record(run / f"step-{step}")["data"]["events"]
    return any(event["kind"] == "skip" and event["step"] == step for event in events)


@pytest.mark.slow
@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("soak", SOAKS.values(), ids=SOAKS.keys())
def test_a_run_of_many_lives_trains_what_an_uninterrupted_one_does(soak: Soak, tmp_path: Path):
    chance = random.Random(soak.seed)
    begun = [
        write_data(tmp_path / name, texts=texts_about(name, count), source=name)
        for name, count in (("code", 150), ("web", 250))
    ]
    folders = list(begun)
    run = tmp_path / "run"
    history = History(run)
    config = config_for(tmp_path, *begun, **soak.data, batch_sequences=soak.batches[0])
    config = with_values(config, run={"num_steps": 400})

    def something() -> None:
        """Asks for a random change; some do not fit and are refused at once, or later by the run."""
        kind = chance.choice(("append", "append", "remove", "skip", "requeue", "reweight"))
        if kind == "append":
            name = f"more{len(folders)}"
            source = chance.choice(("code", "web"))
            folders.append(write_data(tmp_path / name, texts=texts_about(name, chance.randint(20, 80)), source=source))
            assert resume("append", run, folders[-1])[0] == 0
        elif kind == "remove":
            resume("remove", run, chance.choice([i for folder in folders for i in file_ids(folder)]))
        elif kind == "skip":
            for_good = ("--for-good",) if chance.random() < 0.3 else ()
            resume("skip", run, "--steps", chance.randint(1, 6), *for_good)
        elif kind == "requeue":
            resume("requeue", run)
        else:
            share = chance.randint(1, 9) / 10
            resume("reweight", run, f"code={share} web={1 - share:.1f}")

    batch, num_ended = soak.batches[0], 0
    for number in range(soak.num_lives):
        if number > 2 and chance.random() < 0.4 and not skips_at_its_end(run):
            batch = chance.choice(soak.batches)
        portions = {"batch_sequences": batch, "micro_batch_sequences": chance.choice((1, 2, 5))}
        with history.life(config, chance.choice((1, 2, 4)), **portions) as life:
            try:
                life.steps(chance.randint(1, 15) if number else 8)
                for _ in range(chance.randint(0, 2)):
                    something()
                    life.steps(chance.randint(1, 10))
                time.sleep(0.05 * chance.random())
            except AssertionError:
                assert set(life.end()) == {0}, life.lines
                num_ended += 1
            chance.choice((life.kill, life.kill, life.terminate, life.terminate))()
        for _ in range(chance.randint(0, 2)):
            something()
    with history.life(config, 2, batch_sequences=batch) as life:
        assert life.end() == [0, 0], life.lines

    ids = [i for folder in folders for i in file_ids(folder)]
    ids = [i for i in ids if i in resume("audit", run, "--json")[1]]  # those whose append was not refused
    steps = trained(run)
    assert sorted(steps) == list(range(1, max(steps) + 1))
    code, output = resume("audit", run)
    assert code == 0, output
    assert audited(run, ids) == steps
    window_tokens = config.data.window_groups * (config.data.group_tokens or 0)
    epochs_in_order(run, ids, window_steps=window_tokens // (config.data.sequence_length * min(soak.batches)))
    assert trained(history.uninterrupted(config, tmp_path / "alone")) == steps
    print(f"{len(steps)} steps, {len(history.lives)} lives, {num_ended} ended by themselves, {history.taken_at()}")

"""Which samples a run trained, from the lines that its ranks wrote: what counts when order and books are judged."""

import collections
import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.config_file import to_toml
from data_prep.manifest import read_manifest
from resume import __main__ as command
from resume.manifest import listed_files
from train import pretrain
from train.config import RunConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """Targets first..first + length - 1 of a file, or as many of them as the file has."""

    file_id: str
    first: int
    length: int


def trained(run: Path) -> dict[int, collections.Counter[Sample]]:
    """The samples of each step, of all ranks together."""
    steps: dict[int, collections.Counter[Sample]] = collections.defaultdict(collections.Counter)
    for path in sorted((run / "samples").glob("rank-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        numbers = [line["step"] for line in lines]
        assert numbers == sorted(set(numbers)), f"{path}: steps out of order or twice"
        for line in lines:
            if not line["applied"]:
                continue
            length, step = line["sequence_length"], steps[line["step"]]
            for file_id, samples in line["samples"].items():
                step.update(Sample(file_id, sample * length, length) for sample in samples)
    return dict(sorted(steps.items()))


def total(steps: dict[int, collections.Counter[Sample]]) -> collections.Counter[Sample]:
    """How often each sample was trained."""
    return sum(steps.values(), collections.Counter())


def samples_in(folder: Path, length: int = 32) -> set[Sample]:
    """The samples of a data folder's training shards."""
    files = listed_files({folder: read_manifest(folder)}, "train")
    return {Sample(f.file_id, first, length) for f in files for first in range(0, f.num_targets, length)}


def file_ids(folder: Path) -> list[str]:
    """Identities of a data folder's training shards, by file name."""
    return [
        s.fingerprint.file_id for s in sorted(read_manifest(folder).shards, key=lambda s: s.file) if s.split == "train"
    ]


def audited(run: Path, ids: Iterable[str]) -> dict[int, collections.Counter[Sample]]:
    """What `python -m resume audit --json FILE...` says of each step."""
    code, output = resume("audit", run, *ids, "--json")
    assert code == 0
    steps: dict[int, collections.Counter[Sample]] = collections.defaultdict(collections.Counter)
    for file in json.loads(output)["files"]:
        for epoch in file["epochs"]:
            for part in epoch["trained"]:
                length = part["sequence_length"]
                for sample, step in zip(part["samples"], part["steps"], strict=True):
                    steps[step][Sample(file["file_id"], sample * length, length)] += 1
    return dict(sorted(steps.items()))


def pretrain_in_process(config: RunConfig, *flags: object) -> tuple[int, str]:
    """Exit code and output of train/pretrain.py in this process."""
    path = Path(config.run.dir).with_suffix(f".{os.getpid()}.toml")  # ranks do not write each other's
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(config))
    return _called(pretrain.main, str(path), *map(str, flags))


def resume(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `python -m resume` in this process."""
    return _called(command.main, *map(str, arguments))


def _called(main, *arguments: str) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(arguments)
    return code, output.getvalue()

"""What a run trains, by its own records: damage, mixtures, the end of the data, uneven batches, changes on the way."""

import collections
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.manifest import read_manifest
from data_prep.shards import ShardWriter
from evaluation.report import read_metrics
from resume import checkpoint, requests, state, verify
from resume.ledger import Quarantined
from resume.order import Order
from resume.runs import open_run
from tests.prepared import rot, texts_about, tokenizer, write_data
from tests.processes import run_ranks
from tests.runs import tiny_run
from tests.trained import Sample, audited, file_ids, pretrain_in_process, resume, samples_in, total, trained
from train.config import RunConfig
from train.pretrain import BAD_CONFIG, BAD_DATA

Coverage = dict[str, NDArray[np.int64]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two sources, code and web, of different sizes."""
    folder = tmp_path_factory.mktemp("sources")
    code = write_data(folder / "code", texts=texts_about("code", 50), source="code")
    return code, write_data(folder / "web", texts=texts_about("web", 80), source="web")


def recording(data_folder: Path, run_folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A tiny run that writes down what it trains."""
    data = {"record_samples": True, "micro_batch_sequences": 6, **sections.pop("data", {})}
    return tiny_run(data_folder, run_folder, data=data, **sections)


def until(step: int) -> tuple[str, str]:
    return ("--run.num-steps", str(step))


def order_of(run: Path) -> Order:
    """The order of a run as its newest checkpoint has it."""
    newest = checkpoint.latest(run)
    assert newest is not None
    return Order(state.from_json(checkpoint.read_record(newest)["data"]))


def at_positions(order: Order, first: int, last: int) -> collections.Counter[Sample]:
    """The samples at sample positions first..last-1, those behind the end of their file left out."""
    files, samples = order.resolve(np.arange(first, last))
    length, ids = order.sequence_length, order.file_ids
    found = (Sample(ids[f], s * length, length) for f, s in zip(files.tolist(), samples.tolist(), strict=True))
    return collections.Counter(sample for sample in found if sample.first < targets_in(sample.file_id))


def targets_in(file_id: str) -> int:
    return (int(file_id.rsplit("-", 1)[1]) - 4096) // 2 - 1


def coverage(steps: dict[int, collections.Counter[Sample]], *folders: Path) -> Coverage:
    """How often each target of the training shards was trained."""
    counts = {i: np.zeros(targets_in(i), dtype=np.int64) for folder in folders for i in file_ids(folder)}
    for sample, times in total(steps).items():
        counts[sample.file_id][sample.first : sample.first + sample.length] += times
    return counts


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run)
    assert newest is not None
    return checkpoint.open_checkpoint(newest).read_tensors("model.")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a folder, with its time of change, but for those that tell of a process and how it ended."""
    of_a_life = {"lock", "exit.json", "earlier-exit.json", "rank-00000.json"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in of_a_life]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def succeeds(config: RunConfig, *flags: object) -> str:
    code, output = pretrain_in_process(config, *flags)
    assert code == 0, output
    return output


def agrees(run: Path) -> None:
    code, output = resume("audit", run)
    assert code == 0, output
    assert "the books and the order agree, file by file" in output


# Damage


def path_of(folder: Path, file_id: str) -> Path:
    return next(folder / s.file for s in read_manifest(folder).shards if s.fingerprint.file_id == file_id)


def damaged_after_one_step(tmp_path: Path, step: int) -> tuple[Path, RunConfig, Sample]:
    """A run that has made one step, and a full sample that it will meet at `step`, damaged without trace meanwhile."""
    folder = write_data(tmp_path / "data", checksum_tokens=32)
    config = recording(folder, tmp_path / "run")
    succeeds(config, *until(1))
    coming = at_positions(order_of(tmp_path / "run"), 12 * (step - 1), 12 * step)
    sample = min((s for s in coming if s.first + 32 <= targets_in(s.file_id)), key=lambda s: (s.file_id, s.first))
    rot(path_of(folder, sample.file_id), sample.first + 16)
    return folder, config, sample


def test_a_sample_damaged_on_disk_ends_the_run_and_is_named(tmp_path: Path):
    folder, config, sample = damaged_after_one_step(tmp_path, step=3)
    code, output = pretrain_in_process(config, *until(6))
    assert code == BAD_DATA
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    first, last = sample.first, sample.first + 32
    named = f"{path_of(folder, sample.file_id)}: sample {first // 32} (tokens {first} to {last})"
    assert f"{named} differs from its checksum" in error
    assert "--data.on-bad-sample quarantine" in error
    code, output = resume("verify", tmp_path / "run")
    assert code == BAD_DATA
    assert f"samples {first // 32} differ from their checksums" in output


def test_a_quarantined_sample_is_left_out_written_down_and_nothing_else_changes(tmp_path: Path):
    # Two epochs, so that the same sample is met twice.
    whole = write_data(tmp_path / "whole" / "data")
    succeeds(recording(whole, tmp_path / "whole" / "run"), *until(18))
    folder, config, sample = damaged_after_one_step(tmp_path, step=3)
    output = succeeds(config, *until(18), "--data.on-bad-sample", "quarantine")
    run, expected = tmp_path / "run", trained(tmp_path / "whole" / "run")
    met = [step for step, samples in expected.items() if sample in samples]
    assert len(met) == 2
    assert met[0] == 3
    for step in met:
        path = path_of(folder, sample.file_id)
        told = f"QUARANTINED: sample {sample.first // 32} of {path} differs from its checksum, step {step}\n"
        assert output.count(told) == 1
        del expected[step][sample]
    assert trained(run) == expected
    seen = [[r["tokens_seen"] for r in read_metrics(r) if "loss" in r] for r in (tmp_path / "whole" / "run", run)]
    fewer = [32 * sum(m <= step for m in met) for step in range(1, 19)]
    assert [a - b for a, b in zip(*seen, strict=True)] == fewer
    assert open_run(run).ledger.quarantined == [Quarantined(sample.file_id, sample.first, 32, step) for step in met]
    agrees(run)
    assert f"quarantined: tokens {sample.first:,} to {sample.first + 32:,}" in resume("status", run)[1]


def test_a_sample_quarantined_on_any_rank_is_announced(tmp_path: Path):
    folder, _config, sample = damaged_after_one_step(tmp_path, step=3)

    def go_on(rank: int) -> tuple[int, str]:
        # One config file for each rank: they all would write the same one.
        flags = (*until(4), "--data.on-bad-sample", "quarantine", "--data.micro-batch-sequences", "1")
        return pretrain_in_process(recording(folder, tmp_path / "run"), *flags)

    (codes, outputs) = zip(*run_ranks(go_on, 4, tmp_path), strict=True)
    assert codes == (0, 0, 0, 0)
    assert [output.count("QUARANTINED: sample") for output in outputs] == [1, 0, 0, 0]
    assert open_run(tmp_path / "run").ledger.quarantined == [Quarantined(sample.file_id, sample.first, 32, 3)]
    agrees(tmp_path / "run")


def test_a_step_of_nothing_but_quarantined_samples_changes_no_weight(tmp_path: Path):
    folder = write_data(tmp_path / "data", checksum_tokens=32)
    config = recording(folder, tmp_path / "run", data={"batch_sequences": 1, "micro_batch_sequences": 1})
    succeeds(config, *until(1))
    (sample,) = at_positions(order_of(tmp_path / "run"), 1, 2)
    rot(path_of(folder, sample.file_id), sample.first + 3)
    succeeds(config, *until(2), "--data.on-bad-sample", "quarantine")
    run = tmp_path / "run"
    before, after = (checkpoint.open_checkpoint(run / f"step-{step}").read_tensors("model.") for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(trained(run)) == [1]
    agrees(run)


def test_a_token_without_a_checksum_file_is_not_checked_and_the_run_says_so(data: Path, tmp_path: Path):
    config = recording(data, tmp_path / "run")
    assert "5 of 5 shards have no checksums for samples of 32 tokens" in succeeds(config, *until(1))


# Mixtures, and where the data ends


def test_a_mixture_trains_what_its_order_says_and_every_sample_as_often_as_its_source_s_epochs(
    sources: tuple[Path, Path], tmp_path: Path
):
    mixture = {"paths": tuple(map(str, sources)), "mixture": ("code=0.25 web=0.75",)}
    config = recording(sources[0], tmp_path / "run", run={"num_steps": 40, "save_every": 40}, data=mixture)
    succeeds(config)
    steps, order = trained(tmp_path / "run"), order_of(tmp_path / "run")
    assert list(steps) == list(range(1, 41))
    assert all(samples == at_positions(order, 12 * (n - 1), 12 * n) for n, samples in steps.items())
    counts = total(steps)
    for folder, share in zip(sources, (0.25, 0.75), strict=True):
        samples = samples_in(folder)
        drawn = sum(counts[sample] for sample in samples)
        assert drawn == pytest.approx(480 * share, abs=12)
        # Epochs are whole: no sample is ahead of another by more than the present one.
        epoch = drawn // len(samples)
        assert {counts[sample] for sample in samples} == {epoch, epoch + 1}
        assert sum(counts[sample] == epoch + 1 for sample in samples) == drawn - epoch * len(samples)
    agrees(tmp_path / "run")
    assert audited(tmp_path / "run", [i for folder in sources for i in file_ids(folder)]) == steps


@pytest.mark.parametrize(("policy", "code"), [("stop", 0), ("error", BAD_DATA), ("renormalise", 0)])
def test_a_run_ends_where_its_data_does_and_goes_on_after_an_append(
    sources: tuple[Path, Path], tmp_path: Path, policy: str, code: int
):
    code_folder, web = sources
    run = tmp_path / "run"
    ends = {"max_epochs": ("1",), "when_exhausted": policy, "mixture": ("code=0.5 web=0.5",)}
    ends["paths"] = tuple(map(str, sources))
    config = recording(web, run, run={"num_steps": 200, "save_every": 1_000, "validate_every": 1_000}, data=ends)
    found, output = pretrain_in_process(config)
    assert found == code
    steps, counts = trained(run), total(trained(run))
    last = max(steps)
    smaller, all_samples = samples_in(code_folder), samples_in(code_folder) | samples_in(web)
    assert len(smaller) < len(samples_in(web))
    assert set(counts.values()) == {1}
    if policy == "renormalise":
        assert set(counts) == all_samples
        assert last == math.ceil(len(all_samples) / 12)
        assert len(steps[last].keys()) == len(all_samples) - 12 * (last - 1) < 12  # ragged
    else:
        assert smaller < set(counts) < all_samples
        assert len(set(counts) - smaller) <= len(smaller) + 12
        assert last == math.ceil(len(counts) / 12)
    assert all(sum(samples.values()) == 12 for step, samples in steps.items() if step < last)
    assert checkpoint.steps(run) == [last]
    assert f"the data ends after step {last} of 200: data.max_epochs is reached" in output
    assert f"python -m resume append {run} FOLDER" in output
    # Once more without more data: nothing to train, the same end.
    again, output = pretrain_in_process(config)
    assert (again, checkpoint.steps(run), trained(run)) == (code, [last], steps)
    assert f"the data ends after step {last} of 200" in output

    more = write_data(tmp_path / "more", texts=texts_about("more", 40), source="code")
    assert resume("append", run, more)[0] == 0
    found, output = pretrain_in_process(config)
    assert found == code
    assert f"request 1 taken up at step {last}: append of files" in output
    longer = trained(run)
    assert {step: longer[step] for step in steps} == steps
    counts = total(longer)
    assert set(counts.values()) == {1}
    # What ended the run was the smaller source, which now goes on: with `stop` until one of the two is used up.
    used_up = [folder for folder in (more, web) if samples_in(folder) <= set(counts)]
    assert len(used_up) == 2 if policy == "renormalise" else used_up
    assert checkpoint.steps(run)[-1] == max(longer) > last
    agrees(run)
    assert audited(run, [i for folder in (*sources, more) for i in file_ids(folder)]) == longer


# Uneven batches


def fp64(data_folder: Path, run_folder: Path, **sections: dict[str, Any]) -> RunConfig:
    return recording(data_folder, run_folder, parallel={"precision": "fp64"}, **sections)


def trained_by(config: RunConfig, world_size: int, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    assert [code for code, _ in run_ranks(lambda rank: pretrain_in_process(config), world_size, folder)] == (
        [0] * world_size
    )


@pytest.fixture(scope="module")
def whole_epoch(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over one epoch, 99 samples, on one rank and without accumulation; its last step has 3 samples."""
    run = tmp_path_factory.mktemp("whole") / "run"
    once = {"num_steps": 9, "save_every": 9}
    succeeds(fp64(data, run, run=once, data={"max_epochs": ("1",), "micro_batch_sequences": 12}))
    assert [sum(samples.values()) for samples in trained(run).values()] == [*[12] * 8, 3]
    return run


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 5), (2, 5), (5, 1), (5, 2), (3, 7)])
def test_batches_that_divide_by_nothing_train_the_same_samples_to_the_same_weights(
    data: Path, whole_epoch: Path, tmp_path: Path, world_size: int, micro_batch: int
):
    sections: dict[str, dict] = {"run": {"num_steps": 9, "save_every": 9}}
    sections["data"] = {"max_epochs": ("1",), "micro_batch_sequences": micro_batch}
    trained_by(fp64(data, tmp_path / "run", **sections), world_size, tmp_path / "ranks")
    assert trained(tmp_path / "run") == trained(whole_epoch)
    assert largest_difference(weights(tmp_path / "run"), weights(whole_epoch)) < 1e-12
    agrees(tmp_path / "run")


def test_another_batch_size_on_resume_goes_on_in_the_same_order(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    succeeds(recording(data, run), *until(3))
    larger = recording(data, run, data={"batch_sequences": 7})
    code, output = pretrain_in_process(larger, *until(6))
    assert code == BAD_CONFIG
    assert "data.batch_sequences = 7, the checkpoint has 12" in output
    succeeds(larger, *until(6), "--run.allow-changes", "data.batch_sequences")
    succeeds(recording(data, run), *until(8), "--run.allow-changes", "data.batch_sequences")
    order, steps = order_of(run), trained(run)
    ends = np.cumsum([0, 12, 12, 12, 7, 7, 7, 12, 12]).tolist()
    assert {n: at_positions(order, ends[n - 1], ends[n]) for n in range(1, 9)} == steps
    agrees(run)
    assert audited(run, file_ids(data)) == steps


# Other sequence lengths on the way


def at_length(folder: Path, run: Path, length: int, group_tokens: int | None, **more: Any) -> RunConfig:
    """Steps of 384 tokens."""
    portions = {"sequence_length": length, "batch_sequences": 384 // length, "group_tokens": group_tokens, **more}
    once = {"max_epochs": ("1",), "micro_batch_sequences": 4}
    return recording(folder, run, run={"save_every": 100, "validate_every": 100}, data={**once, **portions})


ALLOWED = ("--run.allow-changes", "data.sequence_length", "data.batch_sequences")


@pytest.mark.parametrize(
    "lengths",
    [{1: 32, 4: 64, 20: 64}, {2: 32, 3: 128, 20: 128}, {1: 16, 2: 128, 3: 32, 5: 64, 20: 16}],
    ids=["doubled", "quadrupled", "to and fro"],
)
def test_a_planned_sequence_length_may_change_at_any_step_and_every_token_is_trained_once(
    data: Path, tmp_path: Path, lengths: dict[int, int]
):
    run = tmp_path / "run"
    for last, length in lengths.items():
        code, output = pretrain_in_process(at_length(data, run, length, 128), *until(last), *ALLOWED)
        assert code == 0, output
    steps = trained(run)
    assert {sample.length for sample in total(steps)} == set(lengths.values())
    assert all((count == 1).all() for count in coverage(steps, data).values())
    agrees(run)
    assert audited(run, file_ids(data)) == steps


def lost_tokens(steps: dict[int, collections.Counter[Sample]], folder: Path, length: int) -> int:
    """Untrained targets in those samples of the new length that are partly trained, counted one by one."""
    lost = 0
    for count in coverage(steps, folder).values():
        for first in range(0, len(count), length):
            piece = count[first : first + length]
            lost += int((piece == 0).sum()) if (piece > 0).any() else 0
    return lost


@pytest.mark.parametrize(
    ("group_tokens", "window_groups"), [(None, 1), (128, 4)], ids=["not planned", "inside a window"]
)
def test_a_sequence_length_that_would_lose_tokens_is_refused_with_their_number(
    data: Path, tmp_path: Path, group_tokens: int | None, window_groups: int
):
    run = tmp_path / "run"
    fixed = {"group_tokens": group_tokens, "window_groups": window_groups}
    succeeds(at_length(data, run, 32, **fixed), *until(3))
    before = snapshot(run)
    # The group is one sample of 32 if it was not planned: then the new config names none either.
    code, output = pretrain_in_process(at_length(data, run, 64, **fixed), *until(6), *ALLOWED)
    assert code == BAD_DATA
    lost = lost_tokens(trained(run), data, 64)
    assert lost > 0
    assert f"data.sequence_length 32 -> 64 would lose {lost:,} tokens of this epoch" in output
    assert snapshot(run) == before
    succeeds(at_length(data, run, 32, **fixed), *until(6))


def test_with_windows_a_planned_sequence_length_changes_at_a_window_s_end(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    fixed = {"group_tokens": 128, "window_groups": 4}
    succeeds(at_length(data, run, 32, **fixed), *until(3))
    # 3 steps are 9 groups: the third window ends after 12.
    code, output = pretrain_in_process(at_length(data, run, 64, **fixed), *until(4), *ALLOWED)
    assert code == BAD_DATA
    assert "it can change 12 samples further on" in output
    succeeds(at_length(data, run, 32, **fixed), *until(4))
    succeeds(at_length(data, run, 64, **fixed), *until(6), *ALLOWED)
    code, output = pretrain_in_process(at_length(data, run, 128, **fixed), *until(20), *ALLOWED)
    assert code == BAD_DATA
    assert "would lose" in output
    succeeds(at_length(data, run, 64, **fixed), *until(20))
    steps = trained(run)
    assert {sample.length for sample in total(steps)} == {32, 64}
    assert all((count == 1).all() for count in coverage(steps, data).values())
    agrees(run)
    assert audited(run, file_ids(data)) == steps


# Locality


def test_groups_in_windows_train_each_sample_once_and_stay_together(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    local = {"group_tokens": 128, "window_groups": 4, "batch_sequences": 4, "max_epochs": ("2",)}
    succeeds(recording(data, run, run={"num_steps": 60, "save_every": 100, "validate_every": 100}, data=local))
    steps = trained(run)
    assert total(steps) == collections.Counter(dict.fromkeys(samples_in(data), 2))
    num_groups = 0
    for first in range(1, max(steps) + 1, 4):
        window = sum(
            (steps.get(step, collections.Counter()) for step in range(first, first + 4)), collections.Counter()
        )
        groups: dict[tuple[str, int], int] = {}
        for sample, times in window.items():  # twice where an epoch ends inside the window
            group = (sample.file_id, sample.first // 128)
            groups[group] = max(times, groups.get(group, 0))
        assert sum(groups.values()) <= 4  # a window of four steps reads four groups
        num_groups += sum(groups.values())
    assert num_groups == 2 * sum(-(-targets_in(i) // 128) for i in file_ids(data))  # each of them once an epoch
    mixed = [step for step in steps.values() if len({(s.file_id, s.first // 128) for s in step}) > 1]
    assert len(mixed) > len(steps) / 2  # and yet they are shuffled
    agrees(run)
    assert audited(run, file_ids(data)) == steps


# Files that change, vanish, or do not belong


def large_data(folder: Path) -> Path:
    """A data folder with one training shard that is longer than its fingerprint's head and tail."""
    write_data(folder, shard_tokens=100_000)
    from data_prep.manifest import record_shard, write_manifest

    made, manifest = tokenizer(), read_manifest(folder)
    options = {"vocab_size": made.vocab_size, "tokenizer_digest": made.digest, "eos_id": made.eos_id}
    with ShardWriter(folder / "train", "large", shard_tokens=1_500_000, **options) as writer:
        generator = np.random.default_rng(5)
        allowed = np.array([i for i in range(made.vocab_size) if i != made.eos_id])
        writer.add(generator.choice(allowed, 1_400_000))
    (written,) = writer.close()
    record = record_shard(folder, *written, source="test", sample_tokens=32)
    held_out = [shard for shard in manifest.shards if shard.split == "validation"]
    import dataclasses

    write_manifest(folder, dataclasses.replace(manifest, shards=(record, *held_out)))
    return folder


@pytest.mark.parametrize(
    ("token", "found_by"), [(100, "headtail"), (700_000, "full")], ids=["in its head", "in its middle"]
)
def test_a_shard_that_changed_without_a_trace_is_found_by_a_closer_look(tmp_path: Path, token: int, found_by: str):
    folder = large_data(tmp_path / "data")
    config = recording(folder, tmp_path / "run")
    succeeds(config, *until(1))
    shard = folder / "train" / "large-00000.bin"
    rot(shard, token)
    for step, level in enumerate(verify.LEVELS, start=2):
        code, output = pretrain_in_process(config, *until(step), "--data.verify", level)
        if level == found_by:
            assert code == BAD_DATA
            assert str(shard) in output
            assert "changed" in output
            return
        assert code == 0, output


def test_a_shard_that_was_only_touched_is_fingerprinted_once_and_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_data(tmp_path / "data")
    looked_at: list[Path] = []
    real = verify.fingerprint
    monkeypatch.setattr(verify, "fingerprint", lambda path: looked_at.append(path) or real(path))
    config = recording(folder, tmp_path / "run")

    def training_shards_looked_at(step: int) -> list[str]:
        looked_at.clear()
        succeeds(config, *until(step))
        return sorted(path.name for path in looked_at if path.parent.name == "train")

    every = sorted(path.name for path in (folder / "train").glob("*.bin"))
    assert training_shards_looked_at(1) == every
    assert training_shards_looked_at(2) == []
    os.utime(folder / "train" / every[1])
    assert training_shards_looked_at(3) == [every[1]]
    assert training_shards_looked_at(4) == []
    shutil.copy(folder / "train" / every[2], tmp_path / "copy")
    (tmp_path / "copy").replace(folder / "train" / every[2])
    assert training_shards_looked_at(5) == [every[2]]


def test_a_shard_of_the_run_that_was_replaced_by_another_is_refused(data: Path, tmp_path: Path):
    folder = write_data(tmp_path / "data")
    config = recording(folder, tmp_path / "run")
    succeeds(config, *until(1))
    one, other = (folder / "train" / f"test-0000{i}.bin" for i in (0, 1))
    assert one.stat().st_size == other.stat().st_size
    shutil.copy(one, other)
    code, output = pretrain_in_process(config, *until(2))
    assert code == BAD_DATA
    assert f"{other}: fingerprint" in output
    assert "restore it, or add the new version under another name" in output
    assert checkpoint.steps(tmp_path / "run") == [1]


def test_appended_shards_that_were_moved_and_renamed_are_found_by_their_content(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(1))
    more = write_data(tmp_path / "more", texts=texts_about("more", 40))
    new = samples_in(more)
    assert resume("append", run, more)[0] == 0
    succeeds(config, *until(2))
    (tmp_path / "attic" / "deep").mkdir(parents=True)
    for i, path in enumerate(sorted((more / "train").glob("*.bin"))):
        path.rename(tmp_path / "attic" / "deep" / f"{i}.bin")
    shutil.rmtree(more)
    code, output = pretrain_in_process(config, *until(20))
    assert code == BAD_DATA
    assert "--data.search FOLDER" in output
    succeeds(config, *until(20), "--data.search", tmp_path / "attic")
    succeeds(config, *until(21))  # and from now on they are known to lie there
    assert new <= set(total(trained(run)))
    agrees(run)


def test_the_validation_shard_cannot_be_trained_on(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(1))
    held_out = data / "validation" / "test-00000.bin"
    code, output = resume("append", run, held_out)
    assert code == BAD_DATA
    assert f"{held_out} (validation) has the content of {held_out} (train)" in output
    # Nor by a request that nobody checked.
    record = next(s for s in read_manifest(data).shards if s.split == "validation")
    files = {"all": {record.fingerprint.file_id: str(held_out)}}
    requests.queue(run, {"kind": "append", "files": files, "weights": None})
    assert "request 1 REFUSED" in succeeds(config, *until(2))
    assert total(trained(run)).keys() <= samples_in(data)


@pytest.mark.parametrize("what", ["folder", "shard"])
def test_data_of_another_tokenizer_cannot_be_appended(data: Path, tmp_path: Path, what: str):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(1))
    other = write_data(tmp_path / "other", texts=texts_about("other", 40), vocab_size=270)
    shard = other / "train" / "test-00000.bin"
    code, output = resume("append", run, other if what == "folder" else shard)
    assert code == BAD_DATA
    assert "tokenizer" in output
    assert not requests.pending(run, 0)
    file_id = read_manifest(other).shards[0].fingerprint.file_id
    requests.queue(run, {"kind": "append", "files": {"all": {file_id: str(shard)}}, "weights": None})
    assert "request 1 REFUSED" in succeeds(config, *until(2))


def test_requests_that_no_longer_fit_are_refused_one_by_one_and_the_others_taken_up(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(1))
    twice, gone = (write_data(tmp_path / n, texts=texts_about(n, 40)) for n in ("twice", "gone"))
    for folder in (twice, gone):
        assert resume("append", run, folder)[0] == 0
    first = json.loads((run / "requests" / "0001.json").read_text())
    requests.queue(run, first)
    requests.queue(run, {"kind": "remove", "file_ids": ["0" * 65]})
    requests.queue(run, {"kind": "dance"})
    assert resume("skip", run, "--steps", 2)[0] == 0
    shutil.rmtree(gone)
    output = succeeds(config, *until(20))
    told = [line for line in output.splitlines() if line.startswith("request ")]
    assert [line.split(":")[0] for line in told] == [
        "request 1 taken up at step 1",
        "request 2 REFUSED",
        "request 3 REFUSED",
        "request 4 REFUSED",
        "request 5 REFUSED",
        "request 6 taken up at step 1",
    ]
    assert str(gone) in told[1]
    assert "is part of the run already" in told[2]
    assert samples_in(twice) <= set(total(trained(run)))
    agrees(run)
    # Refused for good: the next start does not try again.
    assert "REFUSED" not in succeeds(config, *until(21))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"kind": "append", "files": {"all": {"abc": "/x"}}, "weights": null}', '{"kind": "skip"}'],
)
def test_an_ill_formed_request_is_refused_and_the_run_goes_on(data: Path, tmp_path: Path, content: str):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(1))
    (run / "requests").mkdir()
    (run / "requests" / "0001.json").write_text(content)
    assert resume("status", run)[0] in (0, BAD_DATA)
    assert "request 1 REFUSED" in succeeds(config, *until(2))
    assert checkpoint.steps(run)[-1] == 2


def test_a_lost_shard_can_be_taken_out_as_the_error_says(tmp_path: Path):
    folder, run = write_data(tmp_path / "data"), tmp_path / "run"
    config = recording(folder, run)
    succeeds(config, *until(1))
    lost = file_ids(folder)[1]
    path_of(folder, lost).unlink()
    code, output = pretrain_in_process(config, *until(9))
    assert code == BAD_DATA
    assert "take them out with `python -m resume remove RUN FILE`" in output
    assert resume("remove", run, "test-00001.bin")[0] == 0
    output = succeeds(config, *until(9))
    assert "request 1 taken up at step 1: removal of 1 files" in output
    succeeds(config, *until(10))
    steps = trained(run)
    assert all(sample.file_id != lost for step in range(2, 11) for sample in steps[step])
    agrees(run)


def test_a_file_removed_inside_a_window_is_still_read_to_the_window_s_end_after_a_restart(tmp_path: Path):
    folder, run = write_data(tmp_path / "data"), tmp_path / "run"
    # Ten groups to a window, three to a step.
    config = recording(folder, run, data={"group_tokens": 128, "window_groups": 10})
    succeeds(config, *until(1))
    gone = file_ids(folder)[1]
    window = at_positions(order_of(run), 12, 40)
    assert any(sample.file_id == gone for sample in window)
    assert resume("remove", run, "test-00001.bin")[0] == 0
    for step in (2, 3, 8):
        succeeds(config, *until(step))
    steps = trained(run)
    in_window = sum((steps[step] for step in (2, 3)), collections.Counter())
    assert in_window <= window
    assert sum((window - in_window).values()) <= 4
    assert all(sample.file_id != gone for step in range(5, 9) for sample in steps[step])
    agrees(run)
    assert audited(run, file_ids(folder)) == steps


def test_a_removed_file_leaves_and_what_was_skipped_comes_back_within_the_epoch(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run, data={"max_epochs": ("1",)})
    succeeds(config, *until(2))
    passed_over = at_positions(order_of(run), 24, 48)
    assert resume("skip", run, "--steps", 2)[0] == 0
    succeeds(config, *until(3))
    assert not total(trained(run)).keys() & passed_over.keys()
    gone = file_ids(data)[2]
    assert resume("remove", run, gone)[0] == 0
    succeeds(config, *until(20))
    steps = trained(run)
    counts = total(steps)
    assert set(counts.values()) == {1}
    left_out = {sample for sample in samples_in(data) if sample.file_id == gone and counts[sample] == 0}
    assert left_out
    assert set(counts) == samples_in(data) - left_out
    agrees(run)
    assert audited(run, file_ids(data)) == steps


def test_what_was_skipped_for_good_is_never_trained(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config, *until(2))
    passed_over = at_positions(order_of(run), 24, 48)
    assert resume("skip", run, "--steps", 2, "--for-good")[0] == 0
    succeeds(config, *until(20))  # two epochs and more
    counts = total(trained(run))
    assert set(counts) == samples_in(data) - passed_over.keys()
    assert collections.Counter(counts.values()) == {3: 60, 4: 15}  # 240 = 3 * 75 + 15
    agrees(run)


def test_records_cut_off_by_a_kill_and_lines_of_lost_steps_are_dropped(data: Path, tmp_path: Path):
    run = tmp_path / "run"
    config = recording(data, run)
    succeeds(config)
    whole = trained(run)
    (run / "step-6").rename(tmp_path / "lost")
    with (run / "samples" / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 7, "sequ')
    succeeds(config)
    assert trained(run) == whole

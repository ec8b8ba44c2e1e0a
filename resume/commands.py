"""What the commands of `python -m resume` do; they are parsed elsewhere, without torch, which checkpoints need."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.checksums import ChecksumError
from data_prep.config_file import ConfigError
from data_prep.fingerprint import fingerprint
from data_prep.manifest import ManifestError, read_manifest
from data_prep.shards import ShardError, read_header, verify_payload
from resume import checkpoint, report, requests
from resume.audit import audit_files, trained_bitmap
from resume.manifest import DataError, DataFile, file_of, listed_files, refuse_other_tokenizers, refuse_overlap
from resume.mixture import parse_weights
from resume.order import Order
from resume.runs import RequestError, Run, open_run
from resume.state import WHOLE
from resume.verify import Level, StatCache, check_files, damaged_samples

BAD_DATA, CANNOT_WRITE, BAD_REQUEST = 65, 73, 78


def run_command(arguments: argparse.Namespace) -> int:
    """Does what the parsed arguments say and returns the exit code."""
    try:
        # `verify` is for the run that cannot be opened, too.
        of = arguments.run if arguments.command == "verify" else open_run(arguments.run)
        code = _COMMANDS[arguments.command](of, arguments)
        print(end="", flush=True)  # here, so that a reader who left is no traceback
        return code
    except RequestError as error:
        return _fail(error, BAD_REQUEST)
    except (DataError, ManifestError, ShardError, ChecksumError, checkpoint.CheckpointError) as error:
        return _fail(error, BAD_DATA)
    except (ConfigError, ValueError) as error:
        return _fail(error, BAD_REQUEST)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", CANNOT_WRITE)


def _status(run: Run, arguments: argparse.Namespace) -> int:
    values = report.status(run)
    _show(values, arguments.json, report.status_tables(values))
    return 0


def _plan(run: Run, arguments: argparse.Namespace) -> int:
    state, refused = run.with_pending()
    num_steps = run.config["run"]["num_steps"] if arguments.steps is None else arguments.steps
    if num_steps < state.step:
        raise RequestError(f"--steps {num_steps} lies behind the run, which is at step {state.step}")
    values = {**report.plan(state, num_steps, run.step_s()), "will_be_refused": refused}
    _show(values, arguments.json, report.plan_tables(values))
    for line in refused if not arguments.json else []:
        print(f"will be refused: {line}")
    return 0


def _append(run: Run, arguments: argparse.Namespace) -> int:
    state, _ = run.with_pending()
    known = {file_id for file_ids in state.sources.values() for file_id in file_ids}
    places, new = run.paths, {}
    given = _files_to_append(run, arguments.paths, arguments.source)
    for file in given:
        twin = new[file.file_id].path if file.file_id in new else places.get(file.file_id)
        if twin is not None and twin.is_file() and not twin.samefile(file.path):
            raise DataError(f"{file.path} has the content of {twin}; leave one of them out")
        if file.file_id not in known:
            new[file.file_id] = file
    if not new:
        named = " ".join(map(str, arguments.paths))
        if all(file.file_id in state.removed for file in given):
            raise RequestError(f"{named}: removed from the run; what was removed cannot come back")
        raise RequestError(f"{named}: every shard is part of the run already, or waits to be")
    check_files(list(new.values()), "headtail", state.tokenizer_digest, show_progress=True)
    refuse_overlap(new.values(), listed_files(run.data_folders, "validation"))
    by_source: dict[str, dict[str, str]] = {}
    for file in new.values():
        by_source.setdefault(file.source, {})[file.file_id] = str(file.path.absolute())
    weights = parse_weights(arguments.weights) if arguments.weights else None
    num_known = len({file.file_id for file in given} & known)
    known_ones = f"; {num_known:,} others are part of the run already" if num_known else ""
    targets = sum(file.num_targets for file in new.values())
    return _queue(run, {"kind": "append", "files": by_source, "weights": weights}, f"; {targets:,} tokens{known_ones}")


def _files_to_append(run: Run, paths: Sequence[Path], source: str | None) -> list[DataFile]:
    state = run.state
    files: list[DataFile] = []
    for path in paths:
        if path.is_dir():
            manifest = read_manifest(path)
            refuse_other_tokenizers({**run.data_folders, path: manifest})
            listed = listed_files({path: manifest}, "train")
            files += [dataclasses.replace(file, source=source) for file in listed] if source else listed
        else:
            token_bytes = np.dtype(read_header(path).dtype).itemsize
            if state.has_mixture and source is None:
                named = ", ".join(sorted(state.sources))
                raise RequestError(f"{path}: say with --source which source the shard belongs to; the run has {named}")
            verify_payload(path)  # no manifest says who it is: a rotten copy would pass for another shard
            files.append(file_of(fingerprint(path).file_id, path, token_bytes, source or WHOLE))
    for file in files:
        if file.dtype.itemsize != state.token_bytes:
            raise DataError(f"{file.path}: tokens of {file.dtype}, the run's have {state.token_bytes} bytes each")
    return files


def _remove(run: Run, arguments: argparse.Namespace) -> int:
    state, _ = run.with_pending()
    known = {file_id for file_ids in state.sources.values() for file_id in file_ids}
    file_ids = list(dict.fromkeys(run.identify(name, known) for name in arguments.files))
    targets = sum(file_of(file_id, Path(), state.token_bytes).num_targets for file_id in file_ids)
    return _queue(run, {"kind": "remove", "file_ids": file_ids}, f"; {targets:,} tokens an epoch fewer")


def _skip(run: Run, arguments: argparse.Namespace) -> int:
    state, _ = run.with_pending()
    groups = arguments.steps * state.batch.batch_sequences // state.samples_per_group
    in_epoch = sum(Order(state).live_groups().values())
    if groups > in_epoch:
        steps = in_epoch * state.samples_per_group // state.batch.batch_sequences
        raise RequestError(f"--steps {arguments.steps}: the whole data is {steps} steps; skip no more than that")
    remark = f"; {groups * state.group_tokens:,} tokens"
    return _queue(run, {"kind": "skip", "num_steps": arguments.steps, "for_good": arguments.for_good}, remark)


def _requeue(run: Run, arguments: argparse.Namespace) -> int:
    return _queue(run, {"kind": "requeue"})


def _reweight(run: Run, arguments: argparse.Namespace) -> int:
    weights = parse_weights(arguments.weights)
    from_tokens = None
    if arguments.from_tokens is not None:
        if not math.isfinite(arguments.from_tokens) or arguments.from_tokens < 0:
            raise RequestError(f"--from-tokens {arguments.from_tokens}: expected a number of tokens, as 20e9")
        from_tokens = int(arguments.from_tokens)
    return _queue(run, {"kind": "reweight", "weights": weights, "from_tokens": from_tokens})


def _audit(run: Run, arguments: argparse.Namespace) -> int:
    order, ledger, paths = run.order, run.ledger, run.paths
    file_ids = [run.identify(name, order.file_ids) for name in arguments.files]
    if arguments.bitmap is not None:
        if arguments.bitmap.suffix != ".npz":
            raise RequestError(f"--bitmap {arguments.bitmap}: expected a name that ends in .npz")
        bitmaps: dict[str, Any] = {i: trained_bitmap(order, ledger, i) for i in file_ids or order.file_ids}
        np.savez_compressed(arguments.bitmap, **bitmaps)
        remark = f"how often each sample of {len(bitmaps):,} files was trained, an array by identity"
        values = {"bitmap": str(arguments.bitmap), "files": list(bitmaps)}
        _show(values, arguments.json, f"{arguments.bitmap}: {remark}")
        return 0
    if arguments.sample is not None:
        return _audit_sample(run, file_ids, arguments)
    if file_ids:
        histories = [report.file_history(order, ledger, i, paths.get(i)) for i in file_ids]
        agree = all(history["agrees"] for history in histories)
        tables = "\n\n".join(map(report.history_tables, histories))
        _show({"files": histories, "agree": agree}, arguments.json, tables)
        return 0 if agree else BAD_DATA
    audits = audit_files(order, ledger, show_progress=True)
    rows = [
        {**dataclasses.asdict(a), "path": str(paths.get(a.file_id, "")) or None, "agrees": a.agrees} for a in audits
    ]
    agree = all(audit.agrees for audit in audits)
    _show({"files": rows, "agree": agree}, arguments.json, report.audit_tables(audits, paths))
    return 0 if agree else BAD_DATA


def _audit_sample(run: Run, file_ids: Sequence[str], arguments: argparse.Namespace) -> int:
    sample, length = arguments.sample, run.state.sequence_length
    if not file_ids:
        raise RequestError("--sample wants the FILE that the sample is of")
    for file_id in file_ids:
        num_samples = file_of(file_id, Path(), run.state.token_bytes).num_samples(length)
        if not 0 <= sample < num_samples:
            raise RequestError(f"--sample {sample}: {file_id} has samples 0 to {num_samples - 1} of {length} tokens")
    paths = run.paths
    found = [report.sample_history(run.order, run.ledger, i, paths.get(i), sample) for i in file_ids]
    agree = all(history["agrees"] for history in found)
    _show({"files": found, "agree": agree}, arguments.json, "\n\n".join(map(report.sample_tables, found)))
    return 0 if agree else BAD_DATA


def _verify(folder: Path, arguments: argparse.Namespace) -> int:
    findings, num_files = [], 0
    steps = checkpoint.steps(folder)
    for step in tqdm(steps, desc="verify checkpoints", unit="checkpoint", leave=False, disable=None):
        saved = folder / f"step-{step}"
        try:
            checkpoint.verify(saved)
        except (checkpoint.CheckpointError, OSError) as error:
            if saved.exists():  # else a running run deleted it meanwhile, being old
                findings.append(str(error))
    try:
        run = open_run(folder)
    except checkpoint.CheckpointError as error:  # which shards the run has stands in the newest one
        findings += [] if str(error) in findings else [str(error)]
        findings.append(f"{folder}: the shards are not checked, as the newest checkpoint cannot be read")
    else:
        found, num_files = _verify_files(run, arguments.level)
        findings = [*found, *findings]
    values = {"level": arguments.level, "files": num_files, "checkpoints": len(steps), "findings": findings}
    counts = f"{num_files:,} files ({arguments.level}) and {len(steps):,} checkpoints"
    verdict = [*findings, f"{len(findings):,} findings in {counts}"] if findings else [f"{counts} are good"]
    _show(values, arguments.json, "\n".join(verdict))
    return BAD_DATA if findings else 0


def _verify_files(run: Run, level: Level) -> tuple[list[str], int]:
    """What is wrong with the run's shards, and how many there are."""
    live = [file_id for file_id in run.order.file_ids if file_id not in run.state.removed]
    found, paths = run.look_for(live), run.paths
    findings = [
        f"{paths.get(file_id, 'place unknown')} ({file_id}): missing; restore it, name the folder it was moved to "
        f"with --data.search FOLDER, or take it out with `python -m resume remove {run.folder} {file_id[:12]}`"
        for file_id in live
        if file_id not in found
    ]
    cache = StatCache(run.folder)
    for file in tqdm(found.values(), desc="verify shards", unit="shard", leave=False, disable=None):
        findings += _findings(file, level, run.state.tokenizer_digest, cache)
    return findings, len(live)


def _findings(file: DataFile, level: Level, tokenizer_digest: str, cache: StatCache) -> list[str]:
    """What is wrong with a shard: as a whole, and at full level which samples of it."""
    findings: list[str] = []
    try:
        check_files([file], level, tokenizer_digest, cache)
    except (DataError, ShardError) as error:
        findings.append(str(error))
    if level == "full":
        try:
            if damaged := damaged_samples(file):
                which = report.ranges(np.array(damaged))
                findings.append(f"{file.path}: samples {which} differ from their checksums")
        except (ChecksumError, ShardError, OSError) as error:
            if not findings:  # else it only follows from what is wrong with the shard
                findings.append(str(error))
    return findings


def _queue(run: Run, request: dict[str, Any], remark: str = "") -> int:
    """Tries a request on the newest checkpoint, with those that wait before it, and queues it."""
    state, _ = run.with_pending()
    try:
        requests.applied(state, request)
    except DataError as error:
        raise RequestError(str(error)) from error
    number = requests.queue(run.folder, request, run.state.requests_taken)
    print(f"request {number}: {requests.describe(request)}{remark}")
    print(f"{run.folder} takes it up when it starts again, or at its next checkpoint if it is running")
    return 0


def _show(values: dict[str, Any], as_json: bool, tables: str) -> None:
    print(json.dumps(values, indent=1) if as_json else tables)


def _fail(error: Exception | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


_COMMANDS: dict[str, Callable[[Any, argparse.Namespace], int]] = {
    "status": _status,
    "plan": _plan,
    "append": _append,
    "remove": _remove,
    "skip": _skip,
    "requeue": _requeue,
    "reweight": _reweight,
    "audit": _audit,
    "verify": _verify,
}

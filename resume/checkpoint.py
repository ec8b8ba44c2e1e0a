"""Checkpoints: a folder `step-N` that is valid or absent, readable by any number of ranks, holding no code.

    step-1200/
      rank-00000.safetensors ...   each rank's part of every tensor (of replicas, the first one's)
      config.toml                  the resolved config of the run
      record.json                  step, data state, generators, versions; which file holds which box of which tensor;
                                   size and xxh3_128 of every file above

Writing goes into `step-1200.tmp`, is flushed to disk, and is published by one rename. The newest checkpoint is the one
with the highest number; there is no pointer file to go stale. Several nodes share the run folder.
"""

import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resume.regions import Region, is_first_replica, local_part, local_region

FORMAT = 1
_RECORD = "record.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


def steps(run: Path) -> list[int]:
    """The steps with a published checkpoint, in numeric order."""
    if not run.is_dir():
        return []
    return sorted(int(match[1]) for path in run.iterdir() if (match := re.fullmatch(r"step-(\d+)", path.name)))


def latest(run: Path) -> Path | None:
    """The folder of the newest published checkpoint, None before the first."""
    published = steps(run)
    return run / f"step-{published[-1]}" if published else None


def save(
    run: Path, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], config_toml: str, keep: int
) -> Path:
    """Publishes a checkpoint of `tensors` and deletes all but the newest `keep`. Every rank calls it.

    Raises:
        CheckpointError: any rank could not write; no rank publishes then, and older checkpoints are untouched.
    """
    final, aside = run / f"step-{step}", run / f"step-{step}.tmp"
    rank = _rank()
    _together(lambda: _prepare_folder(aside) if rank == 0 else None, f"cannot prepare {aside}")
    _together(lambda: _write_part(aside, rank, tensors), f"cannot write {aside}")
    _together(lambda: _publish(aside, final, step, record, config_toml, keep) if rank == 0 else None, f"{final}")
    return final


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: not a checkpoint, or one of another format.
    """
    path = folder / _RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no {_RECORD}, so not a checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); resume from an older step by moving {folder}") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {record.get('format')!r}, this version reads {FORMAT}")
    return record


def load_into(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills every tensor, sharded or not, from a checkpoint written by any number of ranks; returns the record.

    Raises:
        CheckpointError: a damaged file, or names, shapes or dtypes that differ from the checkpoint's.
    """
    record = read_record(folder)
    _together(lambda: _verify(folder, record["files"]), "")
    _compare(folder, record["tensors"], tensors)
    with _Files(folder) as files, torch.no_grad():
        for name, tensor in tensors.items():
            part, region = local_part(tensor), local_region(tensor)
            for piece in record["tensors"][name]["pieces"]:
                held = Region(tuple(piece["offset"]), tuple(piece["shape"]))
                common = region.intersection(held)
                if not common.is_empty:
                    source = files.read(piece["file"], name, common.relative_to(held.offset))
                    part[common.relative_to(region.offset).slices()] = source.to(part.device)
    return record


def read_tensors(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Whole CPU tensors of one process: those whose names start with `prefix`, which is stripped.

    Raises:
        CheckpointError: see `load_into`.
    """
    record = read_record(folder)
    _verify(folder, record["files"])
    whole: dict[str, Tensor] = {}
    with _Files(folder) as files:
        for name, entry in record["tensors"].items():
            if name.startswith(prefix):
                value = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
                for piece in entry["pieces"]:
                    region = Region(tuple(piece["offset"]), tuple(piece["shape"]))
                    value[region.slices()] = files.read(piece["file"], name, region.relative_to(region.offset))
                whole[name.removeprefix(prefix)] = value
    return whole


class _Files:
    """Open safetensors files of one checkpoint, each opened once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.open: dict[str, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.open.clear()

    def read(self, file: str, name: str, region: Region) -> Tensor:
        try:
            if file not in self.open:
                self.open[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
            if not region.shape:
                return self.open[file].get_tensor(name)
            return self.open[file].get_slice(name)[region.slices()]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: cannot read {name}: {error}") from error


def _prepare_folder(aside: Path) -> None:
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _write_part(aside: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Writes this rank's boxes and, beside them, what they are; rank 0 gathers that into the record."""
    file = f"rank-{rank:05d}.safetensors"
    parts: dict[str, Tensor] = {}
    pieces: dict[str, Any] = {}
    for name, tensor in tensors.items():
        region = local_region(tensor)
        if not region.is_empty and is_first_replica(tensor, rank):
            parts[name] = local_part(tensor).detach().to("cpu").contiguous()
            pieces[name] = {"file": file, "offset": region.offset, "shape": region.shape}
    if parts:
        save_file(parts, aside / file)
    entry = {"pieces": pieces, "files": {file: _describe(aside / file)} if parts else {}}
    _write_text(aside / f"rank-{rank:05d}.json", json.dumps(entry))
    if rank == 0:
        layout = {name: {"shape": list(t.shape), "dtype": str(t.dtype).split(".")[1]} for name, t in tensors.items()}
        _write_text(aside / "layout.json", json.dumps(layout))


def _publish(aside: Path, final: Path, step: int, record: Mapping[str, Any], config_toml: str, keep: int) -> None:
    layout = json.loads((aside / "layout.json").read_text())
    files: dict[str, Any] = {}
    for name in layout:
        layout[name]["pieces"] = []
    for rank in range(_world_size()):
        part = aside / f"rank-{rank:05d}.json"
        entry = json.loads(part.read_text())
        files |= entry["files"]
        for name, piece in entry["pieces"].items():
            layout[name]["pieces"].append(piece)
        part.unlink()
    (aside / "layout.json").unlink()
    _write_text(aside / "config.toml", config_toml)
    files["config.toml"] = _describe(aside / "config.toml")
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    whole = {"format": FORMAT, "step": step, "world_size": _world_size(), "versions": versions, **record}
    _write_text(aside / _RECORD, json.dumps({**whole, "files": files, "tensors": layout}))
    _flush_folder(aside)
    if final.exists():
        # The step was saved before (a resumed run that has not moved): the same state, so the older copy can go.
        _delete(final)
    aside.rename(final)
    _flush_folder(final.parent)
    for old in steps(final.parent)[:-keep]:
        _delete(final.parent / f"step-{old}")


def _delete(folder: Path) -> None:
    # Renamed first: a kill in the middle of the deletion must not leave half a folder under a valid name.
    doomed = folder.with_name(folder.name + ".del")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _verify(folder: Path, files: Mapping[str, Any]) -> None:
    """Checks sizes and hashes; the ranks share the files among them."""
    for file in sorted(files)[_rank() :: _world_size()]:
        path, expected = folder / file, files[file]
        if Path(file).name != file or path.is_symlink():
            raise CheckpointError(f"{folder}: record names {file!r}, which is not a file of this folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; move {folder} away to resume from an older step")
        if (found := _describe(path)) != expected:
            raise CheckpointError(
                f"{path}: {found}, the record has {expected}. The file is damaged; restore it, or move {folder} away "
                "to resume from an older step"
            )


def _compare(folder: Path, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(tensors) - set(stored)), sorted(set(stored) - set(tensors))
    if missing or extra:
        raise CheckpointError(f"{folder}: lacks tensors {missing[:5]}, has unknown ones {extra[:5]}: another model?")
    for name, tensor in tensors.items():
        found = (tuple(stored[name]["shape"]), stored[name]["dtype"])
        wanted = (tuple(tensor.shape), str(tensor.dtype).split(".")[1])
        if found != wanted:
            raise CheckpointError(f"{folder}: {name} is {found}, this run has {wanted}")


def _describe(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
        os.fsync(file.fileno())
    return {"size_bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(action, what: str) -> None:
    """Runs a stage on every rank and waits for all; if one fails, all raise instead of waiting for it for ever."""
    error: Exception | None = None
    try:
        action()
    except (OSError, CheckpointError, SafetensorError) as caught:
        error = caught
    failed = torch.tensor([int(error is not None)])
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise CheckpointError(f"{what}: {error}") from error
    if failed.item():
        raise CheckpointError(f"{what}: another rank failed; see its message")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

"""Checkpoints: a folder `step-N` that is valid or absent, readable by any number of ranks, holding no code.

    step-1200/
      rank-00000.safetensors ...   each rank's part of every tensor (of replicas, the first one's)
      config.toml                  the resolved config of the run
      record.json                  step, data state, generators, versions; which file holds which box of which tensor;
                                   size and xxh3_128 of every file above, xxh3_128 of itself

Writing goes into `step-1200.tmp`, is flushed to disk, and is published by one rename. The newest checkpoint is the one
with the highest number; there is no pointer file to go stale. Several nodes share the run folder.
"""

import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_prep import publish
from resume.regions import Region, is_first_replica, local_part, local_region

FORMAT = 1
_RECORD = "record.json"
_REMEDY = "restore the file, or move its folder away to resume from an older step"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, on this rank or on another; the older ones are untouched."""


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
        SaveError: any rank could not write; no rank publishes then, and older checkpoints are untouched.
    """
    final, aside = run / f"step-{step}", run / f"step-{step}.tmp"
    rank = _rank()
    _together(lambda: _prepare_folder(aside) if rank == 0 else None, SaveError, f"cannot prepare {aside}")
    _together(lambda: _write_part(aside, rank, tensors), SaveError, f"cannot write {aside}")
    _together(
        lambda: _publish(aside, final, step, record, config_toml, keep) if rank == 0 else None,
        SaveError,
        f"cannot publish {final}",
    )
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
        raise CheckpointError(f"{path}: unreadable ({error}); {_REMEDY}") from error
    if not isinstance(record, dict) or record.pop("xxh3_128", None) != _hash_of(record):
        raise CheckpointError(f"{path}: damaged, its hash does not match; {_REMEDY}")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {record['format']!r}, this version reads {FORMAT}")
    return record


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint against its record.

    Raises:
        CheckpointError: names the first that is missing or damaged.
    """
    _verify(folder, read_record(folder)["files"])


def load_into(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills every tensor, sharded or not, from a checkpoint written by any number of ranks; returns the record.

    Raises:
        CheckpointError: a damaged file, or names, shapes or dtypes that differ from the checkpoint's.
    """
    record = read_record(folder)
    _together(lambda: _verify(folder, record["files"]), CheckpointError, f"{folder}")
    layout = record["tensors"]
    _compare(folder, layout, tensors)
    with _Files(folder) as files, torch.no_grad():
        for name, tensor in tensors.items():
            part, region = local_part(tensor), local_region(tensor)
            pieces = [(p["file"], Region(tuple(p["offset"]), tuple(p["shape"]))) for p in layout[name]["pieces"]]
            _check_cover(folder, name, region, [held for _, held in pieces])
            for file, held in pieces:
                common = region.intersection(held)
                if not common.is_empty:
                    source = files.read(file, name, common.relative_to(held.offset))
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
                pieces = [Region(tuple(piece["offset"]), tuple(piece["shape"])) for piece in entry["pieces"]]
                _check_cover(folder, name, Region((0,) * value.ndim, tuple(value.shape)), pieces)
                for piece, region in zip(entry["pieces"], pieces, strict=True):
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
    aside.parent.mkdir(parents=True, exist_ok=True)
    for leftover in aside.parent.iterdir():  # of a save that was killed, at this step or another
        if re.fullmatch(r"step-\d+\.(tmp|del)", leftover.name):
            shutil.rmtree(leftover)
    aside.mkdir()


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
    whole |= {"files": files, "tensors": layout}
    # Hashed as well: the cursor stands in here, and a flipped digit would be another place in the data.
    _write_text(aside / _RECORD, json.dumps({"xxh3_128": _hash_of(whole), **whole}))
    publish.sync_folder(aside)
    if final.exists():
        raise SaveError(f"{final} is already there: another run writes into the same folder; stop one of the two")
    publish.publish(aside, final)
    for old in steps(final.parent)[:-keep]:
        _delete(final.parent / f"step-{old}")


def _delete(folder: Path) -> None:
    # Renamed first: a kill in the middle of the deletion must not leave half a folder under a valid name.
    doomed = folder.with_name(folder.name + ".del")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _verify(folder: Path, files: Mapping[str, Any]) -> None:
    """Checks sizes and hashes; the ranks share the files among them."""
    for file in sorted(files)[_rank() :: _world_size()]:
        path, expected = folder / file, files[file]
        if Path(file).name != file or path.is_symlink():
            raise CheckpointError(f"{folder}: record names {file!r}, which is not a file of this folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {_REMEDY}")
        if (found := _describe(path)) != expected:
            raise CheckpointError(f"{path}: {found}, the record has {expected}. The file is damaged; {_REMEDY}")


def _check_cover(folder: Path, name: str, region: Region, pieces: list[Region]) -> None:
    covered = sum(math.prod(region.intersection(piece).shape) for piece in pieces)
    if covered != math.prod(region.shape):
        raise CheckpointError(f"{folder}: the pieces of {name} do not cover it; {_REMEDY}")


def _compare(folder: Path, stored: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(tensors) - set(stored)), sorted(set(stored) - set(tensors))
    if missing or extra:
        raise CheckpointError(f"{folder}: lacks tensors {missing[:5]}, has unknown ones {extra[:5]}: another model?")
    for name, tensor in tensors.items():
        found = (tuple(stored[name]["shape"]), stored[name]["dtype"])
        wanted = (tuple(tensor.shape), str(tensor.dtype).split(".")[1])
        if found != wanted:
            raise CheckpointError(
                f"{folder}: {name} is {found}, this run has {wanted}; resume with the model and the precision "
                "(fp64, or not) that it was trained with"
            )


def _hash_of(record: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


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


def _together(action: Callable[[], None], error_type: type[CheckpointError], what: str) -> None:
    """Runs a stage on every rank and waits for all; if one fails, all raise instead of waiting for it for ever."""
    error: Exception | None = None
    try:
        action()
    except Exception as caught:  # whatever it is: the other ranks must hear of it
        error = caught
    failed = torch.tensor([int(error is not None)])
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if isinstance(error, CheckpointError):
        raise error
    if error is not None:
        raise error_type(f"{what}: {error}") from error
    if failed.item():
        raise error_type(f"{what}: another rank failed; see its message")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

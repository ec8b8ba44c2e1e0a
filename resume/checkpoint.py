"""Checkpoints: a folder `step-N` that is valid or absent, readable by any number of ranks, holding no code.

    step-1200/
      rank-00000.safetensors ...   each rank's part of every tensor (of replicas, the first one's)
      config.toml                  the resolved config of the run
      record.json                  step, loss, data state, guard, generators, versions; which file holds which box of
                                   which tensor; size and xxh3_128 of every file above, xxh3_128 of itself

They are published by one rename (resume/saver.py). The newest is the one with the highest number: there is no pointer
file to go stale. One that is damaged is renamed to `step-1200.bad`, with the reason said, and the one before it is
taken. Several nodes share the run folder. Nothing that a record says is believed before it is checked: a checkpoint
may come from somebody else.
"""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep import publish
from resume import tensor_file
from resume.regions import Region, local_part, local_region, tiles

FORMAT = 2
RECORD = "record.json"
CONFIG = "config.toml"
_MAX_RECORD_BYTES = 1 << 28  # of a thousand ranks it has 70 MB; JSON takes twenty times its size in memory
_FILE = re.compile(r"rank-[0-9]{5}\.safetensors|config\.toml")
_DTYPES = {str(dtype).split(".")[1]: dtype for dtype in tensor_file.DTYPES}
_REMEDY = "restore the file, or move its folder away to resume from an older step"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file and the remedy."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written."""


class SaveError(CheckpointError):
    """A checkpoint could not be written, on this rank or on another; the older ones are untouched."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, and the file that holds it."""

    file: str
    region: Region


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor as it stands in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece]


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files are what its record says."""

    folder: Path
    record: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills every tensor, sharded or not; written by any number of ranks, read by any number.

        Raises:
            CheckpointError: names, shapes or dtypes that differ from the checkpoint's.
        """
        self._refuse_others(tensors)
        with _Files(self.folder) as files, torch.no_grad():
            for name, tensor in tensors.items():
                part, region = local_part(tensor), local_region(tensor)
                for common, value in files.read(name, self.tensors[name], region):
                    part[common.relative_to(region.offset).slices()] = value.to(part.device)

    def read_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Whole CPU tensors: those whose names start with `prefix`, which is stripped."""
        whole: dict[str, Tensor] = {}
        with _Files(self.folder) as files:
            for name, stored in self.tensors.items():
                if name.startswith(prefix):
                    # Read before memory is taken: the file must hold as much as the record says.
                    parts = files.read(name, stored, Region((0,) * len(stored.shape), stored.shape))
                    value = torch.empty(stored.shape, dtype=stored.dtype)
                    for common, part in parts:
                        value[common.slices()] = part
                    whole[name.removeprefix(prefix)] = value
        return whole

    def _refuse_others(self, tensors: Mapping[str, Tensor]) -> None:
        missing, extra = sorted(set(tensors) - set(self.tensors)), sorted(set(self.tensors) - set(tensors))
        if missing or extra:
            raise CheckpointError(
                f"{self.folder}: lacks tensors {missing[:5]}, has unknown ones {extra[:5]}: another model?"
            )
        for name, tensor in tensors.items():
            stored = self.tensors[name]
            if (stored.shape, stored.dtype) != (tuple(tensor.shape), tensor.dtype):
                raise CheckpointError(
                    f"{self.folder}: {name} is {stored.shape} {stored.dtype}, this run has {tuple(tensor.shape)} "
                    f"{tensor.dtype}; resume with the model and the precision that it was trained with"
                )


def steps(run: Path) -> list[int]:
    """The steps with a published checkpoint, in numeric order."""
    if not run.is_dir():
        return []
    matches = [re.fullmatch(r"step-(0|[1-9][0-9]*)", path.name) for path in run.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def latest(run: Path) -> Path | None:
    """The folder of the newest published checkpoint, None before the first."""
    published = steps(run)
    return run / f"step-{published[-1]}" if published else None


def newest_valid(run: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, None for a run that has not saved yet. Every rank calls it.

    Damaged ones are renamed to `step-N.bad`, so that their numbers are free again; `note` hears why.

    Raises:
        CheckpointError: there were checkpoints, but none that is good; one of another version, or that cannot be read.
    """
    reasons: list[str] = []
    while True:
        folder = _from_first(lambda: latest(run))
        if folder is None:
            break
        try:
            return _refuse_misnamed(open_checkpoint(folder))
        except DamagedError as error:
            reasons.append(str(error))
            moved = _from_first(lambda folder=folder: _set_aside(folder), f"{error}; it cannot be moved aside")
            note(f"checkpoint {folder.name} REJECTED: {error}. Moved to {moved.name}; trying the previous one")
    bad = _from_first(lambda: sorted(path.name for path in run.glob("step-*.bad*")) if run.is_dir() else [])
    if bad:
        raise CheckpointError(
            f"{run}: no good checkpoint is left, only {', '.join(bad)}"
            + (f" ({reasons[0]})" if reasons else "")
            + "; restore one of them under its old name from a copy, or begin again with another --run.dir"
        )
    return None


def _refuse_misnamed(opened: Checkpoint) -> Checkpoint:
    """Under a higher number a copy would be the newest for ever, and what is saved after it deleted as older."""
    if opened.folder.name != (name := f"step-{opened.record['step']}"):
        raise CheckpointError(f"{opened.folder}: holds {name}; give it that name, or move it away")
    return opened


def open_checkpoint(folder: Path) -> Checkpoint:
    """Checks every file of a checkpoint, the ranks of a run sharing the work, and opens it.

    Raises:
        DamagedError: on every rank, if a file is missing or is not what the record says.
        CheckpointError: a checkpoint of another version, or one that cannot be read.
    """
    opened: list[Checkpoint] = []

    def check() -> None:
        record = read_record(folder)
        _verify(folder, record["files"], share=(own_rank(), num_ranks()))
        opened.append(Checkpoint(folder, record, _stored_tensors(folder, record)))

    # What cannot be read now, from a server that is away say, is not damaged: it stays where it is.
    together(check, CheckpointError, f"{folder}: cannot be read now; try again, or move it away")
    return opened[0]


def verify(folder: Path) -> None:
    """Checks every file of a checkpoint against its record, in this process alone.

    Raises:
        CheckpointError: names the first that is missing or damaged.
    """
    record = read_record(folder)
    _verify(folder, record["files"])
    _stored_tensors(folder, record)


def read_record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        DamagedError: not a checkpoint, or one whose record was changed.
        CheckpointError: one of another format.
    """
    path = folder / RECORD
    try:
        with _open_plain(path) as file:
            if path.stat().st_size > _MAX_RECORD_BYTES:
                raise DamagedError(f"{path}: damaged, larger than any record; {_REMEDY}")
            content = file.read()
        record = json.loads(content)
        # Byte for byte: 1e-05 and 1E-05 are one bit apart and have one hash, and of keys that are double one is hidden.
        is_ours = json.dumps(record).encode() == content
        is_whole = is_ours and isinstance(record, dict) and record.pop("xxh3_128", None) == hash_of(record)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{folder}: no {RECORD}, so not a checkpoint") from error
    except DamagedError:
        raise
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: unreadable ({error}); {_REMEDY}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
    if not is_whole:
        raise DamagedError(f"{path}: damaged, its hash does not match; {_REMEDY}")
    if record.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {record.get('format')!r}, this version reads {FORMAT}; resume with the one that wrote it"
        )
    files = record.get("files")
    if not isinstance(files, dict) or CONFIG not in files or not _is_size(record.get("step")):
        raise DamagedError(f"{path}: damaged, it names no files, no config or no step; {_REMEDY}")
    return record


def read_config(folder: Path, record: Mapping[str, Any]) -> str:
    """The resolved config beside a record, checked against it.

    Raises:
        DamagedError: it is missing, no plain file, or not what was written.
    """
    _verify(folder, {CONFIG: record["files"][CONFIG]})
    return (folder / CONFIG).read_text(encoding="utf-8")


def hash_of(record: Mapping[str, Any]) -> str:
    """The hash that a record carries of its own content."""
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def together(
    action: Callable[[], None],
    error_type: type[CheckpointError],
    what: str,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Runs a stage on every rank and waits for all; if one fails, all raise its error instead of waiting for ever."""
    error: Exception | None = None
    try:
        action()
    except Exception as caught:  # whatever it is: the other ranks must hear of it
        error = caught
    mine = None if error is None else (type(error).__name__, _describe_error(error, what))
    found: list[Any] = [mine]
    if dist.is_initialized():
        found = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, mine, group)
    failures = [(rank, *failure) for rank, failure in enumerate(found) if failure is not None]
    if not failures:
        return
    rank, kind, message = failures[0]
    raised = {known.__name__: known for known in (CheckpointError, DamagedError, SaveError)}.get(kind, error_type)
    # Of the same type everywhere: of a damaged one all go back to the one before, of another error none does.
    if type(error) is raised:
        raise error
    raise raised(message if len(found) == 1 else f"{message} (rank {rank})") from error


def _describe_error(error: Exception, what: str) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return f"{what}: {error}{'; free some space, and the same command goes on' if is_full else ''}"


class _Files:
    """Open safetensors files of one checkpoint, each opened once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, name: str, stored: StoredTensor, region: Region) -> list[tuple[Region, Tensor]]:
        """The parts of a tensor that make up a box of it."""
        boxes = [(piece, region.intersection(piece.region)) for piece in stored.pieces]
        boxes = [(piece, common) for piece, common in boxes if not common.is_empty]
        if not tiles([common for _, common in boxes], region):
            raise DamagedError(f"{self._folder}: the pieces of {name} do not cover it; {_REMEDY}")
        return [(common, self._read(name, stored.dtype, piece, common)) for piece, common in boxes]

    def _read(self, name: str, dtype: torch.dtype, piece: Piece, common: Region) -> Tensor:
        path = self._folder / piece.file
        try:
            if piece.file not in self._open:
                self._open[piece.file] = safe_open(str(path), framework="pt", device="cpu")
            held = self._open[piece.file].get_slice(name)
            if tuple(held.get_shape()) != piece.region.shape:
                raise DamagedError(f"{path}: {name} is {held.get_shape()}, the record has {piece.region.shape}")
            box = common.relative_to(piece.region.offset).slices()
            value = held[box] if box else self._open[piece.file].get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch knows not all of its dtypes
            raise DamagedError(f"{path}: cannot read {name}: {error}") from error
        if value.dtype != dtype:
            raise DamagedError(f"{path}: {name} is {value.dtype}, the record has {dtype}")
        return value


def _stored_tensors(folder: Path, record: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The layout of a record, refused unless every part of it makes sense."""
    try:
        if not all(name.isprintable() for name in record["tensors"]):
            raise ValueError("names that cannot be printed")
        return {name: _stored_tensor(entry, record["files"]) for name, entry in record["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{folder / RECORD}: damaged, its tensors make no sense ({error!r}); {_REMEDY}") from error


def _stored_tensor(entry: Mapping[str, Any], files: Mapping[str, Any]) -> StoredTensor:
    shape, pieces = _sizes(entry["shape"]), []
    if len(entry["pieces"]) > len(files):  # a file holds one piece of a tensor
        raise ValueError("more pieces than files")
    for piece in entry["pieces"]:
        region = Region(_sizes(piece["offset"]), _sizes(piece["shape"]))
        inside = zip(region.offset, region.shape, shape, strict=True)
        if piece["file"] not in files or any(first + size > whole for first, size, whole in inside):
            raise ValueError(f"piece {piece}")
        pieces.append(Piece(piece["file"], region))
    if len({piece.file for piece in pieces}) < len(pieces) or math.prod(size or 1 for size in shape) >= 2**60:
        raise ValueError("a file twice, or more elements than can be")
    return StoredTensor(shape, _DTYPES[entry["dtype"]], pieces)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(_is_size(value) for value in values):
        raise ValueError(f"{values!r} are not sizes")
    return tuple(values)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _verify(folder: Path, files: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> None:
    """Checks the sizes and hashes of this rank's share of the files, and the names of all of them."""
    for file in files:
        if not _FILE.fullmatch(file) or (os.path.lexists(folder / file) and not _is_plain(folder / file)):
            raise DamagedError(f"{folder}: record names {file!r}, which is not a file of a checkpoint; {_REMEDY}")
    rank, world_size = share
    for file in sorted(files)[rank::world_size]:
        path, expected = folder / file, files[file]
        if not path.exists():
            raise DamagedError(f"{path}: missing; {_REMEDY}")
        if (found := _described(path)) != expected:
            raise DamagedError(f"{path}: {found}, the record has {expected}. The file is damaged; {_REMEDY}")


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _open_plain(path: Path) -> BinaryIO:
    """Opens a file, but no link, which may lead anywhere, and no pipe, which may keep one waiting for ever."""
    if not _is_plain(path):
        raise DamagedError(f"{path}: damaged, not a plain file; {_REMEDY}")
    return path.open("rb", buffering=0)


def _described(path: Path) -> dict[str, Any]:
    digest, size_bytes = xxhash.xxh3_128(), 0
    with _open_plain(path) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"size_bytes": size_bytes, "xxh3_128": digest.hexdigest()}


def _set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again, and nothing is lost."""
    names = (f"{folder.name}.bad" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    free = next(path for name in names if not os.path.lexists(path := folder.with_name(name)))
    publish.publish(folder, free)
    return free


def _from_first(action: Callable[[], Any], what: str = "run folder") -> Any:
    """What an action returns on the first rank, the only one to do it: others may see a shared folder late."""
    result: list[Any] = [None]
    together(lambda: result.__setitem__(0, action() if own_rank() == 0 else None), CheckpointError, what)
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def own_rank() -> int:
    """The number of this process among those that write and read together."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """How many processes write and read together."""
    return dist.get_world_size() if dist.is_initialized() else 1

"""Writing checkpoints, if wanted beside the training: copied in memory, written by a thread, published by a rename.

    copy (the loop waits)  ->  rank-*.safetensors, hashed, fsynced  ->  record.json  ->  fsync the folder
                           ->  rename step-N.tmp to step-N, the commit point  ->  fsync the run folder  ->  retention

Ranks talk about a save over a group of their own: collectives of two threads on one group would mix. All ranks succeed,
or none does; then the older checkpoints are as they were.
"""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from data_prep import publish
from resume import checkpoint, tensor_file
from resume.checkpoint import CONFIG, FORMAT, RECORD, SaveError, hash_of, num_ranks, own_rank, together
from resume.regions import is_first_replica, local_part, local_region

# Beside the tensors: the record, the config, file system blocks.
_EXTRA_BYTES = 4 * 1024 * 1024
_NICENESS = 10
_PATIENCE_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """How a save ended, the same on all ranks but for the times."""

    step: int
    folder: Path
    size_bytes: int
    """Of the tensors, all ranks together."""
    stall_s: float
    """How long the caller waited."""
    save_s: float
    """From the call to the publication."""
    error: SaveError | None = None
    remark: str | None = None
    """On rank 0, of a checkpoint that is good: what went wrong after it was published."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Snapshot:
    """What a rank will write."""

    step: int
    parts: dict[str, Tensor]
    pieces: dict[str, Any]
    layout: dict[str, Any]
    record: Mapping[str, Any]
    config_toml: str
    size_bytes: int
    """Of the whole tensors, all ranks together."""


class Saver:
    """Saves a run's checkpoints, one at a time. Every rank has one, and all call the same methods in the same order."""

    def __init__(
        self,
        run: Path,
        *,
        keep_last: int = 1,
        keep_every: int | None = None,
        in_background: bool = False,
        before_write: Callable[[int], None] = lambda step: None,
    ):
        """`before_write` is called with the step before this rank writes, by whichever thread writes."""
        self._run, self._keep_last, self._keep_every = run, keep_last, keep_every
        self._in_background, self._before_write = in_background, before_write
        # Typed by hand: torch's own says that it may be a number.
        self._group: Any = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None
        self.protected: set[int] = set()
        """Steps whose checkpoints are never deleted."""
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None

    def start(self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], config_toml: str) -> None:
        """Begins to save; in the background, returns as soon as the tensors are copied. `wait` says how it ended."""
        assert (self._thread, self._ended) == (None, None), "wait for the save before this one"
        started_s = time.perf_counter()
        snapshot = self._snapshot(step, tensors, record, config_toml)
        if self._in_background:
            stall_s = time.perf_counter() - started_s
            # A daemon: when a rank ends by an error, the thread may wait for peers that are gone.
            self._thread = threading.Thread(target=self._save_aside, args=(snapshot, started_s, stall_s), daemon=True)
            self._thread.start()
        else:
            self._save(snapshot, started_s, None)

    def finished(self) -> Saved | None:
        """How the last save ended, once; None while it is being written. Ranks may hear of it at different times."""
        if self._thread is not None and self._thread.is_alive():
            return None
        return self.wait()

    def wait(self) -> Saved | None:
        """Waits for the save that is being written and returns how it ended; None if that is known."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ended, self._ended = self._ended, None
        return ended

    def close(self) -> None:
        """Waits for a save that is being written when a run ends by an error; not long if a peer may be lost."""
        if self._thread is not None:
            self._thread.join(_PATIENCE_S if num_ranks() > 1 else None)

    def _snapshot(
        self, step: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any], config_toml: str
    ) -> _Snapshot:
        rank, parts, pieces, layout = own_rank(), {}, {}, {}
        file = f"rank-{rank:05d}.safetensors"
        for name, tensor in tensors.items():
            region = local_region(tensor)
            if not region.is_empty and is_first_replica(tensor, rank):
                parts[name] = self._copied(name, local_part(tensor).detach())
                assert tuple(parts[name].shape) == region.shape, f"{name} is cut in another way than {region}"
                pieces[name] = {"file": file, "offset": region.offset, "shape": region.shape}
            layout[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[1]}
        if any(part.is_pinned() for part in parts.values()):
            torch.cuda.synchronize()  # the copies are under way
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # As it will be read: the caller may change its own meanwhile, and keys that are numbers become text.
        record = json.loads(json.dumps(record))
        return _Snapshot(step, parts, pieces, layout, record, config_toml, size_bytes)

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        if not self._in_background:
            return tensor.to("cpu").contiguous()
        # The memory is kept from save to save: pinning it anew would cost more than the copy.
        if name not in self._buffers:
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return self._buffers[name].copy_(tensor, non_blocking=True)

    def _save_aside(self, snapshot: _Snapshot, started_s: float, stall_s: float) -> None:
        # On Linux this is the thread's own: where there are no idle cores, the training comes first.
        with contextlib.suppress(OSError):  # if it is as nice already, and may not be less so
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self._save(snapshot, started_s, stall_s)

    def _save(self, snapshot: _Snapshot, started_s: float, stall_s: float | None) -> None:
        folder, error, remark = self._run / f"step-{snapshot.step}", None, None
        try:
            remark = self._write(snapshot, folder)
        except SaveError as caught:
            error = caught
        except Exception as caught:  # the group of a rank that died: the loop will see it, too
            error = SaveError(f"cannot save {folder}: {caught}")
            error.__cause__ = caught
        elapsed_s = time.perf_counter() - started_s
        stall_s = elapsed_s if stall_s is None else stall_s
        self._ended = Saved(snapshot.step, folder, snapshot.size_bytes, stall_s, elapsed_s, error, remark)

    def _write(self, snapshot: _Snapshot, final: Path) -> str | None:
        """Writes and publishes; returns what is to be remarked."""
        aside, is_first = final.with_name(final.name + ".tmp"), own_rank() == 0

        def all_ranks(action: Callable[[], None], what: str) -> None:
            together(action, SaveError, what, self._group)

        all_ranks(lambda: self._prepare(aside, final, snapshot) if is_first else None, f"cannot prepare {aside}")
        try:
            all_ranks(lambda: self._write_part(aside, snapshot), f"cannot write {aside}")
            all_ranks(lambda: self._publish(aside, final, snapshot) if is_first else None, f"cannot publish {final}")
        except SaveError:
            if is_first:
                shutil.rmtree(aside, ignore_errors=True)  # on a full disk it would be in the way of the next one
            raise
        # Not before all ranks know of the new one: what is deleted cannot be gone back to.
        return self._delete_old(newest=snapshot.step) if is_first else None

    def _prepare(self, aside: Path, final: Path, snapshot: _Snapshot) -> None:
        _refuse_taken(final)  # now, and not when all is written
        publish.make_folder(self._run)
        for leftover in self._run.iterdir():  # of a save that was killed, at this step or another
            if re.fullmatch(r"step-\d+\.(tmp|del)", leftover.name):
                with contextlib.suppress(OSError):  # one that a reader on NFS holds, say, is in nobody's way
                    _remove(leftover)
        _refuse_full_disk(self._run, snapshot.size_bytes)
        aside.mkdir()

    def _write_part(self, aside: Path, snapshot: _Snapshot) -> None:
        """Writes this rank's boxes and, beside them, what they are; rank 0 gathers that into the record."""
        self._before_write(snapshot.step)
        file, files = f"rank-{own_rank():05d}.safetensors", {}
        if snapshot.parts:
            size_bytes, digest = tensor_file.write(aside / file, snapshot.parts)
            files[file] = {"size_bytes": size_bytes, "xxh3_128": digest}
        _write_text(aside / f"rank-{own_rank():05d}.json", json.dumps({"pieces": snapshot.pieces, "files": files}))

    def _publish(self, aside: Path, final: Path, snapshot: _Snapshot) -> None:
        files: dict[str, Any] = {CONFIG: _write_text(aside / CONFIG, snapshot.config_toml)}
        layout = {name: {**entry, "pieces": []} for name, entry in snapshot.layout.items()}
        for rank in range(num_ranks()):
            part = aside / f"rank-{rank:05d}.json"
            entry = json.loads(part.read_text())
            files |= entry["files"]
            for name, piece in entry["pieces"].items():
                layout[name]["pieces"].append(piece)
            part.unlink()
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        whole = {"format": FORMAT, "step": snapshot.step, "world_size": num_ranks(), "versions": versions}
        whole |= {**snapshot.record, "files": files, "tensors": layout}
        # Hashed as well: the cursor stands in here, and a flipped digit would be another place in the data.
        _write_text(aside / RECORD, json.dumps({"xxh3_128": hash_of(whole), **whole}))
        publish.sync_folder(aside)
        _refuse_taken(final)
        try:
            publish.publish(aside, final)
        except OSError:
            if final.exists():  # but perhaps not on the disk: taken back, so that the step can be saved again
                final.rename(aside)
            raise

    def _delete_old(self, newest: int) -> str | None:
        """Deletes what need not be kept; the next save tries again what cannot be deleted, and is remarked."""
        folder = self._run
        try:
            # A higher number is none of this run's: it must not make the newest an old one.
            steps = [step for step in checkpoint.steps(self._run) if step <= newest]
            for step in steps[: -self._keep_last]:
                is_kept = self._keep_every is not None and step % self._keep_every == 0
                if not is_kept and step not in self.protected:
                    # Renamed first: a kill in the middle of the deletion must not leave half under a good name.
                    folder = self._run / f"step-{step}"
                    _remove(folder.rename(folder.with_name(folder.name + ".del")))
        except OSError as error:
            return f"{folder} is old and cannot be deleted: {error}"
        return None


def _refuse_taken(final: Path) -> None:
    if final.exists():
        raise SaveError(f"{final} is already there: another run writes into the same folder; stop one of the two")


def _refuse_full_disk(run: Path, size_bytes: int) -> None:
    """Refuses to begin what the disk has no room for."""
    needed_bytes, free_bytes = size_bytes + _EXTRA_BYTES, shutil.disk_usage(run).free
    if free_bytes < needed_bytes:
        raise SaveError(
            f"{run}: a checkpoint needs {needed_bytes / 1e9:,.2f} GB, {free_bytes / 1e9:,.2f} GB are free on the disk; "
            "free some, older checkpoints perhaps, or move the run to a larger one"
        )


def _remove(path: Path) -> None:
    """Deletes a folder, or a file or a link that somebody put in the place of one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_text(path: Path, text: str) -> dict[str, Any]:
    """Writes and flushes a small file, and returns its entry in the record."""
    content = text.encode()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"size_bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}

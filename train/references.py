"""What a reference model says of pairs, in a file beside each shard: computed once, so that DPO holds one model.

`pairs-00000.1f3a90c2.reference` belongs to `pairs-00000.bin` and has, for every row, log p of the chosen and the
rejected answer of each of its pairs, fp32, 0 behind the last pair, NaN in rows that were quarantined. The head names
shard and model: magic, version, rows, pairs of a row, payload_xxh3, digest of the model, and the xxh3_128 of all else.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep import publish
from data_prep.chat.row_marks import RowMarks
from data_prep.shards import read_header
from evaluation.model_folder import model_folder
from evaluation.score import Annotate, shard_batches
from model.batch import TokenRows
from model.transformer import Transformer
from resume import checkpoint
from resume.manifest import DataError, DataFile
from resume.samples import SampleReader
from train.preference import pair_log_probs
from train.ranks import Ranks
from train.sharding import reshard

MAGIC = b"BESSREFS"
VERSION = 1
_HEAD = struct.Struct(
    "<8sIIII16s16s8x"
)  # magic, version, rows, pairs, 0, payload_xxh3, digest; then 16 bytes: own_xxh3
_OFFSET = _HEAD.size + 16


def reference_path(shard: Path, digest: str) -> Path:
    """The file of a shard's references by a model: runs from several models may share a folder."""
    return shard.with_suffix(f".{digest[:8]}.reference")


def model_digest(path: str | Path) -> str:
    """Stands for the weights that a path holds: the hash of a checkpoint's record, or of a folder's safetensors."""
    folder, digest = model_folder(path), xxhash.xxh3_128()
    record = folder / "record.json"
    for file in [record] if record.is_file() else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            while block := opened.read(16 * 1024 * 1024):
                digest.update(block)
    return digest.hexdigest()


def note_digest(run: Path, init_from: str) -> str:
    """Writes down which model a run starts from, until it has a checkpoint; for one rank. Returns the digest."""
    path = run / "reference.json"
    if checkpoint.latest(run) is None or not path.is_file():
        run.mkdir(parents=True, exist_ok=True)
        publish.write_text(path, json.dumps({"digest": model_digest(init_from)}) + "\n")
    return run_digest(run)


def run_digest(run: Path) -> str:
    """The digest of the model that a run started from, as `note_digest` has written it down."""
    return json.loads((run / "reference.json").read_text(encoding="utf-8"))["digest"]


def write_references(
    model: Transformer,
    file: DataFile,
    reader: SampleReader,
    digest: str,
    ranks: Ranks,
    batch_size: int,
    tick: Callable[[], None],
) -> None:
    """Computes and writes the references of the one file of a reader; every rank calls it, and `tick` at each batch."""
    num_rows = file.num_samples(reader.sequence_length)
    batches = shard_batches(
        reader, num_sequences=num_rows, batch_size=batch_size, rank=ranks.rank, world_size=ranks.world_size
    )
    bar = tqdm(batches, desc=f"reference {file.path.name}", leave=False, disable=None if ranks.is_first else True)
    mine = []
    for rows in bar:
        mine.append(_log_probs(model, rows, ranks.device))
        tick()
    reshard(model)
    gathered = ranks.gather(mine)
    # Batches were dealt to the ranks in turn; the last ones may be padded with empty rows.
    in_order = [parts[i] for i in range(len(mine)) for parts in gathered]
    num_pairs = max((part.shape[1] for part in in_order), default=0)
    padded = [np.pad(part, ((0, 0), (0, num_pairs - part.shape[1]), (0, 0))) for part in in_order]
    table = np.concatenate(padded)[:num_rows]
    trained, _ = RowMarks(file.path).rows(np.arange(num_rows), reader.sequence_length)
    # Rows that are quarantined now: should they be restored, they are computed at the next start.
    table[trained.any(axis=1) & ~table.any(axis=(1, 2))] = np.nan
    ranks.from_first(lambda: _write(file.path, table, digest))


def _log_probs(model: Transformer, rows: TokenRows, device: torch.device) -> NDArray[np.float32]:
    found = pair_log_probs(model, rows.to(device), soft_cap=model.config.logit_softcap)
    return found.float().cpu().numpy()


def _write(shard: Path, table: NDArray[np.float32], digest: str) -> None:
    payload = bytes.fromhex(read_header(shard).payload_xxh3)
    head = _HEAD.pack(MAGIC, VERSION, table.shape[0], table.shape[1], 0, payload, bytes.fromhex(digest))
    content = table.astype("<f4").tobytes()
    publish.write_bytes(reference_path(shard, digest), head + xxhash.xxh3_128_digest(head + content) + content)


def read_references(shard: Path, digest: str) -> NDArray[np.float32]:
    """The references of a shard's rows by the model of this digest: (rows, pairs of a row, 2).

    Raises:
        DataError: there are none, they are another model's or another shard's, or the file is damaged.
    """
    path = reference_path(shard, digest)
    remedy = "stop the run, put the shard's folder into data.paths and start it again: it computes what is missing"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the reference model's log-probabilities ({error.strerror}); {remedy}"
        ) from error
    own = xxhash.xxh3_128_digest(content[: _HEAD.size] + content[_OFFSET:])
    if len(content) < _OFFSET or own != content[_HEAD.size : _OFFSET]:
        raise DataError(f"{path}: damaged; delete it, and {remedy}")
    magic, version, num_rows, num_pairs, _, payload, found = _HEAD.unpack_from(content)
    if (magic, version) != (MAGIC, VERSION) or payload.hex() != read_header(shard).payload_xxh3:
        raise DataError(f"{path}: not the references of {shard.name}; delete it, and {remedy}")
    if found.hex() != digest:
        raise DataError(f"{path}: computed by another model than the run starts from; {remedy}")
    return np.frombuffer(content, dtype="<f4", offset=_OFFSET).reshape(num_rows, num_pairs, 2)


def has_references(shard: Path, digest: str) -> bool:
    """Whether a shard's references by this model are there, and whole."""
    try:
        return not bool(np.isnan(read_references(shard, digest)).any())
    except DataError:
        return False


def pairs(rows: TokenRows) -> TokenRows:
    """Rows of pairs that say how many they hold: a pair is two documents with trained targets."""
    assert rows.trained is not None
    assert rows.boundaries is not None
    num_answers = len(rows.boundaries.ids_BT[rows.trained].unique())
    return dataclasses.replace(rows, num_pairs=num_answers // 2)


def with_references(files: Sequence[DataFile], digest: str) -> Annotate:
    """What gives rows of these files their pairs' references, as batch.extra["reference"]."""
    none = np.empty((0, 0, 2), dtype=np.float32)  # of files that were removed from the run
    tables = [read_references(file.path, digest) if file.path.exists() else none for file in files]

    def annotate(rows: TokenRows, file_indices: NDArray[np.int64], samples: NDArray[np.int64]) -> TokenRows:
        found = list(_rows_of(tables, file_indices, samples))
        most = max((len(row) for row in found), default=0)
        reference = np.stack([np.pad(row, ((0, most - len(row)), (0, 0))) for row in found])
        lacking = np.isnan(reference).any(axis=(1, 2)) & (np.array(rows.row_targets) > 0)
        if lacking.any():
            place = files[int(file_indices[int(np.flatnonzero(lacking)[0])])].path
            raise DataError(f"{place}: rows were damaged when the references were computed; start the run again")
        tensor = torch.from_numpy(np.nan_to_num(reference))
        return dataclasses.replace(
            pairs(rows), extra={"reference": tensor.pin_memory() if rows.tokens.is_pinned() else tensor}
        )

    return annotate


def _rows_of(
    tables: Sequence[NDArray[np.float32]], files: Iterable[int], samples: Iterable[int]
) -> Iterator[NDArray[np.float32]]:
    """Of each row its references, none for a row that is empty."""
    for file, sample in zip(files, samples, strict=True):
        table = tables[file]
        yield table[sample] if sample < len(table) else table[:0].reshape(-1, 2)

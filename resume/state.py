"""Where a run stands in its data: a small JSON record, from which the order continues exactly."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from resume.manifest import DataError
from resume.order import PERMUTATION_NAME, Order

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataState:
    """A cursor in the global order. It moves only when an optimizer step commits; read-ahead is never part of it."""

    seed: int
    sequence_length: int
    file_ids: tuple[str, ...]
    tokenizer_digest: str
    eos_id: int
    position: int = 0
    """Samples consumed, over all epochs."""
    tokens_seen: int = 0
    """Targets trained on, over all epochs."""

    def advance(self, num_samples: int, num_targets: int) -> "DataState":
        """The state after a committed step."""
        return dataclasses.replace(
            self, position=self.position + num_samples, tokens_seen=self.tokens_seen + num_targets
        )

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            "schema": SCHEMA,
            "permutation": PERMUTATION_NAME,
            **dataclasses.asdict(self),
            "file_ids": list(self.file_ids),
        }


def start(order: Order, *, tokenizer_digest: str, eos_id: int) -> DataState:
    """The state of a run that has read nothing."""
    return DataState(
        seed=order.seed,
        sequence_length=order.sequence_length,
        file_ids=tuple(file.file_id for file in order.files),
        tokenizer_digest=tokenizer_digest,
        eos_id=eos_id,
    )


def from_json(record: Mapping[str, Any]) -> DataState:
    """Reads what `to_json` wrote.

    Raises:
        DataError: another schema or permutation, or a missing field.
    """
    if record.get("schema") != SCHEMA or record.get("permutation") != PERMUTATION_NAME:
        raise DataError(
            f"data state of schema {record.get('schema')!r}, permutation {record.get('permutation')!r}; this version "
            f"continues schema {SCHEMA} with {PERMUTATION_NAME}: resume with the version that wrote it"
        )
    fields = [field.name for field in dataclasses.fields(DataState)]
    missing = [name for name in fields if name not in record]
    if missing:
        raise DataError(f"data state lacks {', '.join(missing)}; the checkpoint's record is damaged")
    values = {name: record[name] for name in fields}
    return DataState(**{**values, "file_ids": tuple(record["file_ids"])})


def refuse_other_data(state: DataState, fresh: DataState) -> None:
    """Refuses to continue `state` on data whose fresh state differs from the one it began with.

    Raises:
        DataError: other files, tokenizer, seed or sequence length: the order would not be the same one.
    """
    gone = set(state.file_ids) - set(fresh.file_ids)
    new = set(fresh.file_ids) - set(state.file_ids)
    if gone or new:
        raise DataError(
            f"the data folder changed since the checkpoint: {len(gone)} of its {len(state.file_ids)} training shards "
            f"are gone, {len(new)} are new. Restore the shards, or start a new run with another --run.dir"
        )
    for name in ("tokenizer_digest", "eos_id", "seed", "sequence_length"):
        if getattr(state, name) != getattr(fresh, name):
            raise DataError(
                f"{name} is {getattr(fresh, name)}, the checkpoint was trained with {getattr(state, name)}; "
                "the order of samples would not be the same. Restore it, or start a new run with another --run.dir"
            )

"""Where a run stands in its data: what it began with, what was decided since, and a cursor. A small JSON record.

Nothing here says which samples were trained: that follows, by arithmetic (resume/order.py). An event holds from a
position on, so the order before it never changes. Positions count groups of `group_tokens` targets over all sources and
epochs; an event's position is a window's boundary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_prep.shards import HEADER_BYTES
from resume.manifest import DataError, is_file_id
from resume.mixture import WeightsFrom, parse_schedule

SCHEMA = 2
# Honest runs pass over tiny data very often; each epoch costs 0.2 ms to replay.
_MOST_EPOCHS = 1_000_000
PERMUTATION_NAME = "gfeistel8/24-v1"
WHOLE = "all"
"""The one source of a run without a mixture: all files together."""

WhenExhausted = Literal["renormalise", "stop", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Append:
    """Files join the unseen of their sources."""

    at: int
    step: int
    files: dict[str, list[str]]
    """Identities by source."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Remove:
    """Files leave the unseen, for good."""

    at: int
    step: int
    file_ids: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """The next positions are passed over; their groups come back later in the epoch, or never."""

    at: int
    step: int
    num_groups: int
    for_good: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Requeue:
    """What was skipped comes back now."""

    at: int
    step: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reweight:
    """The mixture changes."""

    at: int
    step: int
    weights: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Steps hold so many samples of so many targets; decides nothing about the order, only which step trained what."""

    at: int
    step: int
    batch_sequences: int
    sequence_length: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """The data ended inside a window, which is closed; the next one begins here."""

    at: int
    step: int


Event = Append | Remove | Skip | Requeue | Reweight | Batch | Cut
_KINDS: dict[str, type] = {
    kind.__name__.lower(): kind for kind in (Append, Remove, Skip, Requeue, Reweight, Batch, Cut)
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataState:
    """A cursor in the global order, and all that defines the order. The cursor moves when an optimizer step commits."""

    seed: int
    group_tokens: int
    """Targets that stay together in the order: a sample, unless longer samples or slow storage were planned for."""
    window_groups: int
    """Groups whose samples are shuffled together; events take effect at the boundaries of such windows."""
    max_epochs: dict[str, int]
    """Per source; "" is every other one. A source without a limit is repeated."""
    when_exhausted: WhenExhausted
    tokenizer_digest: str
    eos_id: int
    token_bytes: int
    """Bytes per token in the shards."""
    events: tuple[Event, ...]
    """In the order of their positions, and of their arrival where those are equal."""
    position: int = 0
    """Groups passed, over all sources and epochs, skipped ones included."""
    step: int = 0
    """Optimizer steps committed."""
    tokens_seen: int = 0
    """Targets trained on, over all epochs."""
    requests_taken: int = 0
    """Number of the newest request of the run folder that is among the events, or was refused."""

    @property
    def batch(self) -> Batch:
        """The newest batch event."""
        return [event for event in self.events if isinstance(event, Batch)][-1]

    @property
    def sequence_length(self) -> int:
        """Targets per sample."""
        return self.batch.sequence_length

    @property
    def samples_per_group(self) -> int:
        """Samples that a group makes."""
        return self.group_tokens // self.sequence_length

    @property
    def first_sample(self) -> int:
        """The position counted in samples of the present length."""
        return self.position * self.samples_per_group

    @property
    def has_mixture(self) -> bool:
        """Whether sources are drawn from by weights, instead of all files being one pool."""
        return any(isinstance(event, Reweight) for event in self.events)

    @property
    def sources(self) -> dict[str, list[str]]:
        """Identities of all files that ever joined, by source."""
        found: dict[str, list[str]] = {}
        for event in self.events:
            if isinstance(event, Append):
                for source, file_ids in event.files.items():
                    found.setdefault(source, []).extend(file_ids)
        return found

    @property
    def removed(self) -> set[str]:
        """Identities of removed files."""
        return {file_id for event in self.events if isinstance(event, Remove) for file_id in event.file_ids}

    @property
    def readable(self) -> dict[str, str]:
        """Source by identity of the files that the run may still read: all but those whose removal holds already."""
        gone = {i for e in self.events if isinstance(e, Remove) and e.at <= self.position for i in e.file_ids}
        return {i: source for source, file_ids in self.sources.items() for i in file_ids if i not in gone}

    @property
    def num_skipped(self) -> int:
        """Groups passed over."""
        return sum(event.num_groups for event in self.events if isinstance(event, Skip))

    @property
    def next_boundary(self) -> int:
        """The first position from which the order may change: windows before it are whole."""
        origin = max((event.at for event in self.events if isinstance(event, Cut)), default=0)
        return origin - (origin - self.position) // self.window_groups * self.window_groups

    def num_targets(self, file_id: str) -> int:
        """Targets in a file; follows from its size, which is part of its identity."""
        return (int(file_id.rsplit("-", 1)[1]) - HEADER_BYTES) // self.token_bytes - 1

    def num_groups(self, file_id: str) -> int:
        """Groups in a file, the shorter last one included."""
        return -(-self.num_targets(file_id) // self.group_tokens)

    def advance(self, num_samples: int, num_targets: int) -> "DataState":
        """The state after a committed step over the next num_samples samples, of which num_targets were trained on."""
        num_groups, rest = divmod(num_samples, self.samples_per_group)
        assert rest == 0, "a batch consists of whole groups"
        advanced = dataclasses.replace(
            self,
            position=self.position + num_groups,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + num_targets,
        )
        if num_samples == self.batch.batch_sequences:
            return advanced
        # The data ended inside the step: should it go on, positions and steps are counted anew from here.
        return set_batch(advanced, self.batch.batch_sequences, self.sequence_length)

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["events"] = [{"kind": type(e).__name__.lower(), **dataclasses.asdict(e)} for e in self.events]
        return {"schema": SCHEMA, "permutation": PERMUTATION_NAME, **values}

    def _with(self, event: Event, **changes: Any) -> "DataState":
        after = [e for e in self.events if e.at > event.at]
        before = [e for e in self.events if e.at <= event.at]
        return dataclasses.replace(self, events=(*before, event, *after), **changes)


def start(
    files: Mapping[str, Sequence[str]],
    *,
    seed: int,
    sequence_length: int,
    batch_sequences: int,
    tokenizer_digest: str,
    eos_id: int,
    token_bytes: int = 2,
    group_tokens: int | None = None,
    window_groups: int = 1,
    mixture: Sequence[str] = (),
    max_epochs: Mapping[str, int] | None = None,
    when_exhausted: WhenExhausted = "renormalise",
) -> DataState:
    """The state of a run that has read nothing: files by source, and how they are drawn from.

    Raises:
        DataError: sources and mixture do not name the same ones, or sizes that do not divide each other.
    """
    state = DataState(
        seed=seed,
        group_tokens=group_tokens or sequence_length,
        window_groups=window_groups,
        max_epochs=dict(max_epochs or {}),
        when_exhausted=when_exhausted,
        tokenizer_digest=tokenizer_digest,
        eos_id=eos_id,
        token_bytes=token_bytes,
        events=(),
    )
    schedule = parse_schedule(mixture)
    if not schedule:
        files = {WHOLE: [file_id for file_ids in files.values() for file_id in file_ids]}
    for entry in schedule:
        _refuse_other_sources(set(files), set(entry.weights), entry.weights)
    unknown = {source for source in state.max_epochs if source} - set(files)
    if unknown:
        raise DataError(f"data.max_epochs names {_list(unknown)}; the data's sources are {_list(files)}")
    state = set_batch(state, batch_sequences, sequence_length)
    for entry in schedule:
        at = -(-entry.from_tokens // state.group_tokens)
        state = state._with(Reweight(at=at, step=0, weights=dict(entry.weights)))
    return state._with(Append(at=0, step=0, files={source: sorted(files[source]) for source in sorted(files)}))


def append(
    state: DataState, files: Mapping[str, Sequence[str]], weights: Mapping[str, float] | None = None
) -> DataState:
    """New files join the unseen of their sources; `weights` become the mixture, which new sources want.

    Under weights that are planned for later, new sources keep the share that they get now.

    Raises:
        DataError: nothing new, a file that is or was part of the run, a file twice, or a new source without a weight.
    """
    if not state.has_mixture:
        if weights:
            raise DataError("the run draws from all its files as one pool; it has no mixture to change")
        files = {WHOLE: [file_id for file_ids in files.values() for file_id in file_ids]}
    known = {file_id: source for source, file_ids in state.sources.items() for file_id in file_ids}
    new = [file_id for file_ids in files.values() for file_id in file_ids]
    if not new:
        raise DataError("there is no file to append")
    removed, given = state.removed, set[str]()
    for file_id in new:
        if file_id in removed:
            raise DataError(f"file {file_id} was removed from the run; a removed file cannot come back")
        if file_id in known:
            raise DataError(f"file {file_id} is part of the run already (source {known[file_id]})")
        if file_id in given:
            raise DataError(f"file {file_id} is given twice")
        given.add(file_id)
    if state.has_mixture:
        wanted = {source for event in state.events if isinstance(event, Reweight) for source in event.weights}
        missing = set(files) - (set(weights) if weights else wanted)
        if missing:
            raise DataError(
                f"{_list(missing)}: no weight in the mixture of {_list(wanted)}; give all of them one, as in "
                f'--weights "{" ".join(f"{source}=0.5" for source in sorted({*wanted, *missing}))}"'
            )
    at = state.next_boundary
    by_source = {source: sorted(files[source]) for source in sorted(files) if files[source]}
    if state.events and isinstance(last := state.events[-1], Append) and last.at == at and not weights:
        # Made together or one by one, it is one event: the record does not grow with the number of commands.
        merged = {s: sorted({*last.files.get(s, []), *by_source.get(s, [])}) for s in sorted({*last.files, *by_source})}
        return dataclasses.replace(state, events=(*state.events[:-1], dataclasses.replace(last, files=merged)))
    joining = set(files) - set(state.sources)
    grown = state._with(Append(at=at, step=state.step, files=by_source))
    if weights:
        grown = reweight(grown, weights)
        share = sum(weights[source] for source in joining) / sum(weights.values())
        # Weights that were planned for later do not know of the new sources, which keep their share under them.
        for event in [e for e in state.events if isinstance(e, Reweight) and e.at > at]:
            scale = (1 - share) / sum(event.weights.values())
            planned = {source: weight * scale for source, weight in event.weights.items()}
            planned |= {source: weights[source] / sum(weights.values()) for source in joining}
            grown = grown._with(Reweight(at=event.at, step=state.step, weights=planned))
    return grown


def remove(state: DataState, file_ids: Sequence[str]) -> DataState:
    """Files leave what is unseen; what was trained of them stays trained.

    Raises:
        DataError: a file that is not part of the run, or is removed already.
    """
    known, removed = {file_id for ids in state.sources.values() for file_id in ids}, state.removed
    for file_id in file_ids:
        if file_id not in known:
            raise DataError(f"file {file_id} is not part of the run")
        if file_id in removed:
            raise DataError(f"file {file_id} is removed already")
    return state._with(Remove(at=state.next_boundary, step=state.step, file_ids=sorted(set(file_ids))))


def skip(state: DataState, num_steps: int, for_good: bool = False) -> DataState:
    """Passes over the data of the next num_steps steps, which comes back later in the epoch unless skipped for good.

    Raises:
        DataError: the run stands inside a window, or would stop inside one.
    """
    num_samples = num_steps * state.batch.batch_sequences
    num_groups, rest = divmod(num_samples, state.samples_per_group)
    if num_steps < 1 or rest or state.position != state.next_boundary or num_groups % state.window_groups:
        window_samples = state.window_groups * state.samples_per_group
        raise DataError(
            f"cannot skip {num_steps} steps of {state.batch.batch_sequences} samples from sample {state.first_sample}: "
            f"whole windows of {window_samples} samples can be skipped, from the boundary of one"
        )
    event = Skip(at=state.position, step=state.step, num_groups=num_groups, for_good=for_good)
    return state._with(event, position=state.position + num_groups)


def requeue(state: DataState) -> DataState:
    """What was skipped, but not for good, comes back now."""
    return state._with(Requeue(at=state.next_boundary, step=state.step))


def reweight(state: DataState, weights: Mapping[str, float], from_tokens: int | None = None) -> DataState:
    """Sources are drawn from by other weights, from now or from a later number of tokens on.

    Raises:
        DataError: the run has no mixture, other sources than the run's, or a place that lies behind the run.
    """
    if not state.has_mixture:
        raise DataError("the run draws from all its files as one pool; start it with data.mixture to weigh sources")
    _refuse_other_sources(set(state.sources), set(weights), weights)
    at = state.next_boundary
    if from_tokens is not None:
        wanted = -(-from_tokens // state.group_tokens)
        if wanted < at:
            raise DataError(
                f"weights from {from_tokens:,} tokens on: the run is at {at * state.group_tokens:,} already; leave the "
                "number out to change them now"
            )
        at += -(-(wanted - at) // state.window_groups) * state.window_groups
    return state._with(Reweight(at=at, step=state.step, weights=dict(weights)))


def branch(state: DataState, files: Mapping[str, Sequence[str]], schedule: Sequence[WeightsFrom] | None) -> DataState:
    """The state of another run that goes on from here: new files join, and weights hold as the schedule says.

    It replaces what was planned for later; with None, weights stay as they are and as they were planned.

    Raises:
        DataError: sources and weights do not name the same ones, or only one of run and schedule has weights.
    """
    state = dataclasses.replace(state, requests_taken=0)  # its folder has requests of its own
    now, events = state.next_boundary, state.events
    if schedule is not None and bool(schedule) != state.has_mixture:
        run = "weighs its sources" if state.has_mixture else "draws from all its files as one pool"
        raise DataError(f"the run that is branched from {run}, so the branch has to as well; see data.mixture")
    if state.has_mixture:
        weighed = [event.weights for event in events if isinstance(event, Reweight)]
        sources = {*state.sources, *files}
        for weights in [entry.weights for entry in schedule] if schedule is not None else weighed[-1:]:
            _refuse_other_sources(sources, set(weights), weights)
    if schedule:
        passed = [entry.weights for entry in schedule if entry.from_tokens <= now * state.group_tokens][-1]
        events = tuple(event for event in events if not (isinstance(event, Reweight) and event.at >= now))
        state = dataclasses.replace(state, events=events)
        state = (
            append(state, files, passed) if files else state._with(Reweight(at=now, step=state.step, weights=passed))
        )
        for entry in schedule:
            if entry.from_tokens > now * state.group_tokens:
                state = reweight(state, entry.weights, entry.from_tokens)
        return state
    return append(state, files) if files else state


def cut(state: DataState, at: int) -> DataState:
    """Closes a window where the data ends inside it, so that something may follow."""
    return state._with(Cut(at=at, step=state.step))


def set_batch(state: DataState, batch_sequences: int, sequence_length: int) -> DataState:
    """From the next step on, steps hold so many samples of so many targets. Whether that loses data is not asked here.

    Raises:
        DataError: samples do not make whole groups, or steps do not.
    """
    if state.group_tokens % sequence_length:
        raise DataError(
            f"data.sequence_length = {sequence_length} does not divide the groups of {state.group_tokens} tokens that "
            "the run's order keeps together; data.group_tokens, fixed when a run starts, names the longest length"
        )
    if batch_sequences * sequence_length % state.group_tokens:
        raise DataError(
            f"data.batch_sequences = {batch_sequences} samples of {sequence_length} are not whole groups of "
            f"{state.group_tokens} tokens; make it a multiple of {state.group_tokens // sequence_length}"
        )
    event = Batch(at=state.position, step=state.step, batch_sequences=batch_sequences, sequence_length=sequence_length)
    kept = [e for e in state.events if not (isinstance(e, Batch) and (e.at, e.step) == (event.at, event.step))]
    return dataclasses.replace(state, events=tuple(kept))._with(event)


def from_json(record: Mapping[str, Any]) -> DataState:
    """Reads what `to_json` wrote.

    Raises:
        DataError: another schema or permutation, or a field that is missing or unknown.
    """
    if not isinstance(record, Mapping):
        raise DataError("data state that is no table; the record is damaged")
    if record.get("schema") != SCHEMA or record.get("permutation") != PERMUTATION_NAME:
        raise DataError(
            f"data state of schema {record.get('schema')!r}, permutation {record.get('permutation')!r}; this version "
            f"continues schema {SCHEMA} with {PERMUTATION_NAME}: resume with the version that wrote it"
        )
    values = {name: value for name, value in record.items() if name not in ("schema", "permutation")}
    try:
        events = tuple(_event(table) for table in values["events"])
        state = DataState(**{**values, "events": events})
    except (KeyError, TypeError) as error:
        raise DataError(f"data state with a missing or unknown field ({error}); the record is damaged") from error
    _refuse_nonsense(state)
    return state


def _refuse_nonsense(state: DataState) -> None:
    """Refuses numbers and names that would end in an error, or in no end, somewhere else."""
    events = state.events
    sizes = (state.group_tokens, state.window_groups, state.token_bytes, *(n for e in events for n in _sizes(e)))
    counts = (state.eos_id, state.position, state.step, state.tokens_seen, state.requests_taken)
    counts += tuple(n for e in events for n in (e.at, e.step))
    are_numbers = all(type(n) is int for n in (state.seed, *sizes, *counts))
    if not are_numbers or min(sizes) < 1 or min(counts) < 0:
        raise DataError("data state with sizes or positions that make no sense; the record is damaged")
    if not any(isinstance(event, Batch) for event in events):
        raise DataError("data state without a batch event; the record is damaged")
    named = [i for e in events if isinstance(e, Append) for file_ids in e.files.values() for i in file_ids]
    named += [i for e in events if isinstance(e, Remove) for i in e.file_ids]
    if not all(is_file_id(file_id) and state.num_targets(file_id) >= 0 for file_id in named):
        raise DataError("data state with files that are none; the record is damaged")
    if state.position > _MOST_EPOCHS * sum(map(state.num_groups, set(named))):
        raise DataError(f"data state at group {state.position}, after a million epochs; the record is damaged")


def _sizes(event: Event) -> tuple[int, ...]:
    match event:
        case Batch():
            return event.batch_sequences, event.sequence_length
        case Skip():
            return (event.num_groups,)
    return ()


def _event(table: Mapping[str, Any]) -> Event:
    return _KINDS[table["kind"]](**{name: value for name, value in table.items() if name != "kind"})


def refuse_other_data(state: DataState, *, tokenizer_digest: str, eos_id: int) -> None:
    """Refuses to continue on data that was encoded by another tokenizer.

    Raises:
        DataError: the tokens would mean something else.
    """
    for name, found in (("tokenizer_digest", tokenizer_digest), ("eos_id", eos_id)):
        if getattr(state, name) != found:
            raise DataError(
                f"{name} is {found}, the checkpoint was trained with {getattr(state, name)}; restore the data folder "
                "or start a new run with another --run.dir"
            )


def _refuse_other_sources(sources: set[str], named: set[str], weights: Mapping[str, float]) -> None:
    if sources != named:
        example = " ".join(f"{source}={weights.get(source, 0):g}" for source in sorted(sources))
        raise DataError(
            f"the mixture names {_list(named)}, the data's sources are {_list(sources)}; give each source a weight (0 "
            f'to leave it out), as in "{example}"'
        )


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"

"""What a run reads: its micro-batches in order, the books of what was trained, and changes to its data meanwhile."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_prep import publish
from data_prep.chat.chat_folder import ChatFolder, read_chat_folder
from data_prep.manifest import Manifest
from data_prep.shards import ShardError
from evaluation.score import Annotate
from resume import requests
from resume import state as states
from resume.ledger import Ledger, Quarantined
from resume.manifest import DataError, DataFile, file_of, find_files, refuse_overlap
from resume.mixture import parse_max_epochs
from resume.order import Order
from resume.runs import FILES, read_paths
from resume.samples import SampleReader
from resume.state import DataState
from resume.verify import Level, StatCache, check_files
from train.config import RunConfig
from train.loader import Loader, MicroBatch, rank_positions
from train.ranks import Ranks
from train.stages import mixture_of, portions_at

SAMPLES = "samples"


class Feed:
    """The data of a run on one rank. Close it, so that its thread and its files end."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        state: DataState,
        ledger: Ledger | None,
        listed: Sequence[DataFile],
        validation: Sequence[DataFile],
        annotate: Callable[[Sequence[DataFile]], Annotate] | None = None,
    ):
        """Takes up the requests that wait, finds and checks the files, and begins to read.

        `listed` are the training shards that the data folders' manifests list, `ledger` the books of the checkpoint,
        `annotate` what adds to rows of files.

        Raises:
            DataError, ShardError: files are missing or changed, or trained on as well as held out.
        """
        self._config, self._ranks, self._validation, self._annotate = config, ranks, validation, annotate
        self._run = Path(config.run.dir)
        self._cache = StatCache(self._run)
        self._notes: list[str] = []
        self._announced: set[Quarantined] = set(ledger.quarantined) if ledger is not None else set()
        self._listed = {file.file_id: file for file in listed}
        self._tokenizer_digest = state.tokenizer_digest
        self._files: dict[str, DataFile] = {}
        self._reading = contextlib.ExitStack()
        self._samples_file: TextIO | None = None
        # First the requests: a file that is lost can be taken out by one.
        self.state = self._with_requests(state)
        self._begin(self.state)
        # The first rank carries what earlier lives booked; sums over ranks then are the whole.
        carried = ledger if ranks.is_first and ledger is not None else Ledger([])
        self._ledger = carried.moved_to(self._order.file_ids)

    @property
    def order(self) -> Order:
        """The order that is being read, for the training thread alone; the loader has its own."""
        return self._order

    @property
    def notes(self) -> list[str]:
        """What was noticed since this was last asked for, for the log."""
        noticed, self._notes = self._notes, []
        return noticed

    def open(self) -> None:
        """Writes down what belongs into the run folder: which file lies where, and what each looked like."""
        if self._ranks.local_rank == 0:
            self._cache.write(list(self._files.values()))
        if self._ranks.is_first:
            _write_paths(self._run, self._files)
            known = set(self._order.file_ids)
            unused = [file for file_id, file in self._listed.items() if file_id not in known]
            if unused:
                first = unused[0].path
                folder = next(folder for folder in self._config.data.paths if first.is_relative_to(folder))
                self._notes.append(
                    f"note: {len(unused)} training shards in the data folders are not part of this run, first {first}; "
                    f"add them with: python -m resume append {self._run} {folder}"
                )
        if self._reader.num_checked_files < len(self._files):
            self._notes.append(
                f"note: {len(self._files) - self._reader.num_checked_files} of {len(self._files)} shards have no "
                f"checksums for samples of {self._order.sequence_length} tokens, so what is read of them is not checked"
            )
        if self._config.data.record_samples:
            folder = self._run / SAMPLES
            folder.mkdir(parents=True, exist_ok=True)
            self._samples_file = (folder / f"rank-{self._ranks.rank:05d}.jsonl").open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends the reading thread and closes all files."""
        self._reading.close()
        if self._samples_file is not None:
            self._samples_file.close()

    def spoil_next(self) -> None:
        """Flips a bit in the next sample that is read, as a failing memory would: for drills."""
        self._reader.spoil_next = True

    @property
    def has_ended(self) -> bool:
        """Whether every source has given all it may."""
        return self._next_sample >= self._end

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next step, as many as on every rank; none after the end of the data."""
        num_sequences = min(self._batch_sequences, self._end - self._next_sample)
        per_round = self._ranks.world_size * self._micro_batch
        self._next_sample += num_sequences
        return [next(self._loader) for _ in range(-(-num_sequences // per_round))]

    @property
    def is_between_rollouts(self) -> bool:
        """Whether a run may be saved here and go on exactly."""
        return True

    def figures(self, step: int) -> dict[str, float]:
        """What is to be logged of the data of a step."""
        return {}

    def advanced(self, state: DataState, num_targets: int) -> DataState:
        """The state after the step that was read last."""
        return state.advance(self._next_sample - state.first_sample, num_targets)

    def book(self, micro_batches: Sequence[MicroBatch], step: int, is_applied: bool = True) -> None:
        """Enters a committed step into the books; of one that was not applied, that it was not."""
        if not is_applied:
            self._ledger.not_applied.append(step)
        length = self._order.sequence_length
        read: dict[str, list[int]] = {}
        for micro_batch in micro_batches:
            good = np.ones(len(micro_batch.files), dtype=np.bool_)
            # A sample behind the end of its file fills up the last group of it: there is nothing in it to train.
            good &= micro_batch.samples * length < self._num_targets[micro_batch.files]
            for file, sample in micro_batch.bad:
                good &= ~((micro_batch.files == file) & (micro_batch.samples == sample))
                entry = Quarantined(self._order.file_ids[file], sample * length, length, step)
                self._ledger.quarantined.append(entry)
            files, samples = micro_batch.files[good], micro_batch.samples[good]
            if is_applied:
                self._ledger.add(files, samples, length)
            if self._samples_file is not None:
                for file, sample in zip(files.tolist(), samples.tolist(), strict=True):
                    read.setdefault(self._order.file_ids[file], []).append(sample)
        if self._samples_file is not None:
            line = {"step": step, "applied": is_applied, "sequence_length": length, "samples": read}
            self._samples_file.write(json.dumps(line) + "\n")
            self._samples_file.flush()

    def books(self) -> dict[str, Any]:
        """The books of all ranks together, as a checkpoint holds them; every rank calls it."""
        whole = Ledger(self._order.file_ids)
        counts, digests = self._ranks.sum_arrays([self._ledger.counts, self._ledger.digests.view(np.int64)])
        whole.counts, whole.digests = counts, digests.view(np.uint64)
        quarantined = self._ranks.gather([dataclasses.astuple(entry) for entry in self._ledger.quarantined])
        # A list: one bad sample may be drawn twice in a step.
        found = [Quarantined(*entry) for entries in quarantined for entry in entries]
        whole.quarantined = sorted(found, key=lambda entry: (entry.step, entry.file_id, entry.first_token))
        whole.not_applied = self._ledger.not_applied  # every rank has all of them, the first those of earlier lives
        for entry in dict.fromkeys(whole.quarantined):
            if entry not in self._announced:
                sample, path = entry.first_token // entry.sequence_length, self._files[entry.file_id].path
                self._notes.append(
                    f"QUARANTINED: sample {sample} of {path} differs from its checksum, step {entry.step}"
                )
        self._announced.update(found)
        return whole.to_json()

    def take_up(self, state: DataState) -> DataState:
        """Takes up the requests that wait in the run folder; every rank calls it, at a checkpoint.

        What does not fit, or whose files a rank cannot read, is refused with a note, and changes nothing.
        """
        changed = self._with_requests(state)
        if changed is not state:
            self._read_on(changed)
            self._ledger = self._ledger.moved_to(self._order.file_ids)
            if self._ranks.is_first:
                _write_paths(self._run, self._files)
        return changed

    def take_portions(self, state: DataState, sequence_length: int, batch_sequences: int) -> DataState:
        """Reads on from a state with steps of so many samples of so many targets; every rank calls it.

        Raises:
            DataError: that would lose tokens.
        """
        Order(state).refuse_losing_length(sequence_length)
        changed = states.set_batch(state, batch_sequences, sequence_length)
        self._read_on(changed)
        return changed

    def _read_on(self, state: DataState) -> None:
        self._reading.close()
        self._begin(state)

    def _with_requests(self, state: DataState) -> DataState:
        """The state after the requests that wait; the same object if none does."""
        taken = state.requests_taken
        try:
            waiting = self._ranks.from_first(lambda: requests.pending(self._run, taken))
        except DataError as error:  # a request must not end a run
            self._notes.append(f"requests NOT taken up: {error}")
            return state
        for number, request in waiting:
            try:
                state = self._taken(state, request)
                self._notes.append(f"request {number} taken up at step {state.step}: {requests.describe(request)}")
            except (DataError, ShardError) as error:
                self._notes.append(f"request {number} REFUSED: {error}")
            state = dataclasses.replace(state, requests_taken=number)
        return state

    def _taken(self, state: DataState, request: requests.Request) -> DataState:
        changed = requests.applied(state, request)
        if request["kind"] == "append":
            hints = {
                file_id: file_of(file_id, Path(path), state.token_bytes, source)
                for source, files in request["files"].items()
                for file_id, path in files.items()
            }
            refuse_overlap(hints.values(), self._validation)
            new = self._opened([hints], "headtail")
            self._ranks.together(lambda: self._refuse_unfit(list(new.values())))
            self._files |= new
        return changed

    def _refuse_unfit(self, files: Sequence[DataFile]) -> None:
        """Refuses shards whose rows are not of the run's kind, or lack what its objective wants beside tokens."""
        own = read_chat_folder(self._run)
        for folder in dict.fromkeys(file.path.parent.parent for file in files):
            theirs = read_chat_folder(folder)
            mixes_text = theirs is None and (own is None or own.kind == "chat")
            if theirs != own and not mixes_text:
                raise DataError(
                    f"{folder} holds {_rows_in_words(theirs)}, the run trains {_rows_in_words(own)}; prepare it so"
                )
        if self._annotate is not None:
            self._annotate(files)

    def _opened(self, places: Sequence[Mapping[str, DataFile]], level: Level) -> dict[str, DataFile]:
        """Finds and checks the files that the last of `places` lists; all ranks fail if one does."""

        def find_and_check() -> dict[str, DataFile]:
            folders = [Path(folder) for folder in (*self._config.data.paths, *self._config.data.search)]
            found = find_files(list(places[-1]), places, folders)
            # The processes of a machine share the work; another machine may have other disks.
            mine = list(found.values())[self._ranks.local_rank :: self._ranks.local_world_size]
            check_files(mine, level, self._tokenizer_digest, self._cache, show_progress=self._ranks.is_first)
            return found

        return self._ranks.together(find_and_check)

    def _begin(self, state: DataState) -> None:
        """Finds and checks the files that are not open yet, and reads from the state's position on."""
        data = self._config.data
        paths, nowhere = read_paths(self._run), Path("an unknown place")
        missing = {i: source for i, source in state.readable.items() if i not in self._files}
        hints = {i: file_of(i, paths.get(i, nowhere), state.token_bytes, s) for i, s in missing.items()}
        self._files |= self._opened([self._listed, hints], data.verify)
        refuse_overlap(self._files.values(), self._validation)
        order = Order(state)
        removed = Path("removed file")  # never read again, but part of the order's past
        files = [self._files.get(i) or file_of(i, removed, state.token_bytes) for i in order.file_ids]
        reader = SampleReader(
            files,
            sequence_length=state.sequence_length,
            vocab_size=self._config.model.vocab_size,
            eos_id=state.eos_id,
            on_bad_sample=data.on_bad_sample,
            group_samples=state.samples_per_group,
        )
        annotate = self._annotate(files) if self._annotate is not None else None
        # Not before, as it may fail: what is saved then are the books of the old order.
        self._order, self._reader = order, reader
        self._num_targets = np.array([file.num_targets for file in files])
        self._batch_sequences = state.batch.batch_sequences
        self._micro_batch = self._config.micro_batch_at(state.sequence_length)
        steps_left = max(0, self._config.run.num_steps - state.step)
        wanted = state.position + steps_left * self._batch_sequences // state.samples_per_group
        self._next_sample = state.first_sample
        self._end = self._order.extend(wanted) * state.samples_per_group
        positions = rank_positions(
            self._next_sample,
            batch_sequences=self._batch_sequences,
            micro_batch=self._micro_batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            end=self._end,
        )
        loader = Loader(
            Order(state),
            self._reader,
            positions,
            micro_batch=self._micro_batch,
            isolate_documents=data.isolate_documents,
            pin_memory=self._ranks.device.type == "cuda",
            annotate=annotate,
        )
        self._loader = self._reading.enter_context(loader)


def _rows_in_words(rows: ChatFolder | None) -> str:
    if rows is None:
        return "text"
    return f"{rows.kind} in rows of {rows.row_tokens} tokens ({rows.chat_format.name})"


def fresh_state(config: RunConfig, manifest: Manifest, training: Sequence[DataFile]) -> DataState:
    """The data state of a run that begins on these files.

    Raises:
        DataError: the mixture does not name the sources that the files have.
    """
    files: dict[str, list[str]] = {}
    for file in training:
        files.setdefault(file.source, []).append(file.file_id)
    sequence_length, batch_sequences = portions_at(config, 0)
    return states.start(
        files,
        seed=config.run.seed,
        sequence_length=sequence_length,
        batch_sequences=batch_sequences,
        tokenizer_digest=manifest.tokenizer_digest,
        eos_id=manifest.eos_id,
        token_bytes=training[0].dtype.itemsize,
        group_tokens=config.group_tokens,
        window_groups=config.data.window_groups,
        mixture=mixture_of(config),
        max_epochs=parse_max_epochs(config.data.max_epochs),
        when_exhausted=config.data.when_exhausted,
    )


def drop_samples_after(run: Path, step: int) -> None:
    """Removes from the records of samples what an earlier life of the run did after this step."""
    for path in (run / SAMPLES).glob("rank-*.jsonl"):
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        publish.write_text(path, "".join(kept))


def _write_paths(run: Path, files: Mapping[str, DataFile]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    paths = {**read_paths(run), **{file_id: file.path.absolute() for file_id, file in files.items()}}
    publish.write_text(
        run / FILES, json.dumps({file_id: str(path) for file_id, path in paths.items()}, indent=0) + "\n"
    )

"""Random histories of a run's data: train, save, kill, append, remove, skip, re-weigh; checked after each of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.shards import HEADER_BYTES
from resume import state
from resume.chain import Fate
from resume.manifest import DataError
from resume.order import Order
from resume.requests import applied
from tests.resume.oracle import BrokenPromiseError, Truth
from tests.resume.promises import Lived, Trained, check, check_everywhere, expect, groups_at, pass_over, samples_at
from train.loader import rank_positions

Files = Mapping[str, Sequence[str]]
"""Identities by source."""


def run_history(seed: int, num_operations: int = 30) -> "History":
    """Lives through one history and checks it after every operation; run it again with the seed that failed."""
    history = History(seed)
    try:
        check(history.lived, history.rng)
        for _ in range(num_operations):
            history.operate()
            check(history.lived, history.rng)
        check_everywhere(history.lived)
    except Exception as error:
        trail = "\n  ".join(history.trail)
        raise AssertionError(
            f"tests.resume.histories.run_history({seed}, {num_operations}):\n  {trail}\n{type(error).__name__}: {error}"
        ) from error
    return history


class History:
    """A run and the truth about it, and what happens to them."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.trail: list[str] = []
        """The operations so far."""
        self.has_mixture = bool(self.rng.random() < 0.4)
        self.names = ["a", "b", "c"][: self.rng.choice([1, 2, 3], p=[0.2, 0.5, 0.3])]
        self.token_bytes = int(self.rng.choice([2, 4]))
        self.lengths = [8] if self.rng.random() < 0.6 else [[4, 8, 16], [8, 24], [8, 16, 32]][self.rng.integers(3)]
        self.group_tokens = self.lengths[-1]
        self.lived = self._begun()
        self.saved: list[tuple[str, Truth, list[Trained]]] = []
        self.save()

    @property
    def num_epochs(self) -> int:
        """Epochs of the source that has begun most."""
        return max(len(source.epochs) for source in self.lived.truth.sources.values())

    def operate(self) -> None:
        """Does one random thing."""
        chances: dict[Callable[[], None], int] = {
            **{self.train: 42, self.save: 8, self.kill: 8, self.append: 10, self.remove: 5, self.skip: 9},
            **{self.requeue: 4, self.reweight: 6, self.set_batch: 6, self.refuse: 2},
        }
        weights = np.array(list(chances.values())) / sum(chances.values())
        list(chances)[self.rng.choice(len(chances), p=weights)]()

    def train(self) -> None:
        """A few steps, on some number of ranks, with one order that is continued as the run goes on."""
        order = Order(self.lived.state)
        num_steps, world_size, micro_batch = (int(self.rng.integers(1, high)) for high in (6, 5, 6))
        self.trail.append(
            f"train {num_steps} steps of {self.lived.state.batch.batch_sequences} on {world_size} x {micro_batch}"
        )
        for _ in range(num_steps):
            first, num_samples = self.lived.state.first_sample, self.lived.state.batch.batch_sequences
            per_group = self.lived.state.samples_per_group
            reach = order.extend(self.lived.state.position + num_samples // per_group)
            num_samples = min(num_samples, reach * per_group - first)
            if num_samples == 0:
                self.trail[-1] += ": the data ends"
                return
            self._read_on_ranks(order, first, num_samples, world_size, micro_batch)
            self._settle(order, first // per_group + num_samples // per_group, Fate.DRAWN)
            self._commit(samples_at(order, np.arange(first, first + num_samples)))

    def save(self) -> None:
        """A checkpoint: what is read back is what was written."""
        record = json.dumps(self.lived.state.to_json())
        expect(state.from_json(json.loads(record)), self.lived.state, "state after JSON")
        self.saved.append((record, self.lived.truth.copy(), list(self.lived.trained)))
        self.trail.append("save")

    def kill(self) -> None:
        """The run dies, and goes on from one of the last checkpoints; those after it are gone."""
        kept = max(0, len(self.saved) - int(self.rng.integers(1, 4)))
        del self.saved[kept + 1 :]
        record, truth, trained = self.saved[kept]
        self.lived = Lived(state.from_json(json.loads(record)), truth.copy(), list(trained))
        self.trail.append(f"kill, resume at {self.lived.state.position}")

    def append(self) -> None:
        """New files, for one source or several, perhaps for a new one."""
        names = self.rng.choice(self.names, size=int(self.rng.integers(1, 3))).tolist()
        files = {name: self._new_files(1, 2) for name in names}
        weights = None
        if self.has_mixture and self.rng.random() < 0.15:
            files["d"] = self._new_files(1, 1)
            weights = self._random_weights({*self.lived.truth.sources, "d"})
        at, joining = self.lived.settled, set(files) - set(self.lived.truth.sources)
        self.trail.append(f"append {self._shown(files)} at {at}, weights {weights}")
        if not weights and self.rng.random() < 0.5:
            self._expect_any_order_of_appends(files)
        before = json.dumps(self.lived.state.to_json())
        self._change(append_request(files, weights))
        again = append_request({name: files[name][::-1] for name in reversed(files)}, weights)
        expect(applied(state.from_json(json.loads(before)), again), self.lived.state, "an append that is made again")
        self.lived.truth.append(self._counted(files))
        if weights:
            self.lived.truth.reweight(at, weights)
            self.lived.truth.keep_share(at, {name: weights[name] / sum(weights.values()) for name in joining})

    def remove(self) -> None:
        """One or two files go; seldom all of them."""
        live = self.lived.truth.live_files
        if len(live) < 3 and self.rng.random() < 0.9:
            return
        chosen = self.rng.permutation(live)[: self.rng.integers(1, 3)].tolist()
        self.trail.append(f"remove {[file[:8] for file in chosen]}")
        self._change({"kind": "remove", "file_ids": chosen})
        self.lived.truth.remove(chosen)

    def skip(self) -> None:
        """The next steps are passed over."""
        now, windows = self.lived.state, self.lived.state.window_groups
        num_steps, for_good = int(self.rng.integers(1, 4)), bool(self.rng.random() < 0.4)
        num_groups = num_steps * now.batch.batch_sequences // now.samples_per_group
        self.trail.append(f"skip {num_groups} groups{' for good' if for_good else ''} from {now.position}")
        request = {"kind": "skip", "num_steps": num_steps, "for_good": for_good}
        if now.position < self.lived.settled or num_groups % windows:
            self._expect_refusal(lambda: applied(now, request))
        elif not self.lived.truth.can_skip(num_groups, for_good):
            self.trail[-1] += ": too many"
            if not self.has_mixture:
                self._expect_refusal(lambda: Order(applied(now, request)))
        else:
            self._change(request)
            mark = Fate.DROPPED if for_good else Fate.SKIPPED
            self._settle(Order(self.lived.state), now.position + num_groups, mark)

    def requeue(self) -> None:
        """What was skipped comes back."""
        self.trail.append("requeue")
        self._change({"kind": "requeue"})
        self.lived.truth.requeue()

    def reweight(self) -> None:
        """Another mixture, now or later."""
        weights = self._random_weights(self.lived.truth.sources)
        if not self.has_mixture:
            self._expect_refusal(lambda: state.reweight(self.lived.state, weights))
            return
        at, from_tokens, window = self.lived.settled, None, self.lived.state.window_groups
        if self.rng.random() < 0.4:
            wanted = int(self.rng.integers(0, 40 * self.group_tokens))
            from_tokens = at * self.group_tokens + wanted
            at += -(-wanted // (self.group_tokens * window)) * window
        self.trail.append(f"reweight {weights} from {from_tokens} tokens, group {at}")
        self._change({"kind": "reweight", "weights": weights, "from_tokens": from_tokens})
        self.lived.truth.reweight(at, weights)

    def set_batch(self) -> None:
        """Another batch, between windows also of another length."""
        now = self.lived.state
        length = int(self.rng.choice(self.lengths))
        if length != now.sequence_length and self.lived.window_of(now.position) != now.position:
            self._expect_refusal(lambda: Order(now).refuse_losing_length(length))
            length = now.sequence_length
        per_group = self.group_tokens // length
        num_samples = int(self.rng.integers(1, 13)) * per_group
        self.trail.append(f"batch of {num_samples} x {length}")
        if length != now.sequence_length:
            Order(now).refuse_losing_length(length)
        self.lived.state = state.set_batch(now, num_samples, length)
        if per_group > 1:
            self._expect_refusal(lambda: state.set_batch(now, num_samples + 1, length))

    def refuse(self) -> None:
        """What makes no sense is refused."""
        self.trail.append("refuse")
        now, source, new = self.lived.state, self.names[0], self._new_files(1, 1)
        removed = sorted(now.removed)
        known = [*self.lived.truth.live_files, *removed]
        requests: list[dict[str, Any]] = [
            *(append_request({source: [*new, file]}) for file in known),
            *({"kind": "remove", "file_ids": [file]} for file in [*removed, *new]),
            *(append_request({source: []}), {"kind": "unheard of"}),
        ]
        if self.has_mixture:
            some, behind = self._random_weights(self.lived.truth.sources), (now.position - 1) * self.group_tokens
            requests += [append_request({"unheard of": new}), append_request({"unheard of": new}, some)]
            requests += [{"kind": "reweight", "weights": {**some, "unheard of": 1.0}, "from_tokens": None}]
            requests += [{"kind": "reweight", "weights": some, "from_tokens": behind}]
        for request in requests:
            self._expect_refusal(lambda request=request: applied(now, request))
        self._expect_refusal(lambda: state.append(now, {source: new * 2}))
        self._expect_refusal(lambda: state.set_batch(now, 1, self.group_tokens * 2))

    def _begun(self) -> Lived:
        files = {name: self._new_files(1, 3) for name in self.names}
        starts = [0, *sorted(set(self.rng.integers(1, 1_500, size=int(self.rng.integers(0, 3))).tolist()))]
        schedule = [(start, self._random_weights(self.names)) for start in starts] if self.has_mixture else []
        limited = [*(self.names if self.has_mixture else [state.WHOLE]), ""] if self.rng.random() < 0.4 else []
        limits = {name: int(self.rng.integers(1, 4)) for name in limited if self.rng.random() < 0.6}
        length = int(self.rng.choice(self.lengths))
        options = {
            "seed": int(self.rng.integers(2**32)),
            "sequence_length": length,
            "batch_sequences": int(self.rng.integers(1, 13)) * (self.group_tokens // length),
            "token_bytes": self.token_bytes,
            "group_tokens": self.group_tokens if len(self.lengths) > 1 else None,
            "window_groups": int(self.rng.choice([1, 4], p=[0.5, 0.5] if len(self.lengths) > 1 else [0.8, 0.2])),
            "mixture": [mixture_entry(from_tokens, weights) for from_tokens, weights in schedule],
            "max_epochs": limits,
            "when_exhausted": str(self.rng.choice(["renormalise", "renormalise", "stop", "error"])),
        }
        self.trail.append(f"start {self._shown(files)} {options}")
        truth = Truth(limits, self.names if self.has_mixture else [state.WHOLE])
        for from_tokens, weights in schedule:
            truth.reweight(-(-from_tokens // self.group_tokens), weights)
        truth.append(self._counted(files))
        return Lived(state.start(files, tokenizer_digest="abc", eos_id=0, **options), truth, [])

    def _change(self, request: dict[str, Any]) -> None:
        """Has the run take up a request; where its data ends inside a window, the next window begins there."""
        settled = self.lived.settled
        self.lived.state = applied(self.lived.state, request)
        if self.lived.boundary(settled) != settled:
            self.lived.truth.cuts.append(settled)

    def _settle(self, order: Order, position: int, mark: Fate) -> None:
        """Tells the truth what lies before the boundary behind a position: no event can change it any more."""
        reach = order.extend(self.lived.boundary(position))
        if reach < position:
            raise BrokenPromiseError(f"passed on to {position}, but the data ends at {reach}")
        pass_over(self.lived.truth, order, reach, mark)

    def _commit(self, samples: list[tuple[str, int]]) -> None:
        """An optimizer step over the next samples."""
        now = self.lived.state
        expect({file for file, _ in samples} - now.readable.keys(), set(), "files that are read though unreadable")
        length, step = now.sequence_length, now.step + 1
        rows = [Trained(p, length, file, sample, step) for p, (file, sample) in enumerate(samples, now.first_sample)]
        self.lived.trained += rows
        num_targets = sum(self.lived.targets_of(row.file, row.sample, length) for row in rows)
        self.lived.state = now.advance(len(samples), num_targets)

    def _read_on_ranks(self, order: Order, first: int, num_samples: int, world_size: int, micro_batch: int) -> None:
        """Ranks share a step without gap or overlap, and read in micro-batches what is read at once."""
        now = self.lived.state
        end = None if order.end is None else order.end * now.samples_per_group
        options = {"batch_sequences": now.batch.batch_sequences, "micro_batch": micro_batch, "end": end}
        num_micro_batches = -(-num_samples // (world_size * micro_batch))
        shares = []
        for rank in range(world_size):
            positions = rank_positions(first, rank=rank, world_size=world_size, **options)
            shares.append([next(positions) for _ in range(num_micro_batches)])
        read = np.sort(np.concatenate([positions for share in shares for positions in share])).tolist()
        expect(read, list(range(first, first + num_samples)), "positions of a step")
        share = shares[int(self.rng.integers(world_size))]
        in_pieces = [sample for positions in share for sample in samples_at(order, positions)]
        expect(in_pieces, samples_at(order, np.concatenate(share)), "a rank's share in micro-batches")

    def _expect_any_order_of_appends(self, files: Files) -> None:
        """Together or one by one, in whatever order, also with a removal between: the order is the same."""
        new = [(name, file) for name, of_source in files.items() for file in of_source]
        live = self.lived.truth.live_files
        removed = [str(self.rng.choice(live))] if live and self.rng.random() < 0.5 else []
        orders = []
        for one_by_one in (False, True, True):
            requests = [append_request({name: [file]}) for name, file in new] if one_by_one else [append_request(files)]
            requests += [{"kind": "remove", "file_ids": [file]} for file in removed]
            after = self.lived.state
            for i in self.rng.permutation(len(requests)):
                after = applied(after, requests[i])
            order = Order(after)
            orders.append(groups_at(order, 0, order.extend(self.lived.settled + 100)))
        expect(orders[1], orders[0], "the order after appending one by one")
        expect(orders[2], orders[0], "the order after appending in another order")

    def _expect_refusal(self, command: Callable[[], Any]) -> None:
        try:
            command()
        except DataError:
            return
        raise BrokenPromiseError("what should be refused was done")

    def _new_files(self, low: int, high: int) -> list[str]:
        files = []
        for _ in range(self.rng.integers(low, high + 1)):
            num_groups = int(self.rng.integers(5, 61 if self.rng.random() < 0.2 else 16))
            num_targets = (num_groups - 1) * self.group_tokens + int(self.rng.integers(1, self.group_tokens + 1))
            size = HEADER_BYTES + self.token_bytes * (num_targets + 1)
            files.append(f"{self.rng.bytes(16).hex()}-{self.rng.bytes(16).hex()}-{size}")
        return files

    def _num_groups(self, file_id: str) -> int:
        num_targets = (int(file_id.rsplit("-", 1)[1]) - HEADER_BYTES) // self.token_bytes - 1
        return -(-num_targets // self.group_tokens)

    def _counted(self, files: Files) -> dict[str, dict[str, int]]:
        """Files with their groups, by the sources that the run knows."""
        counted: dict[str, dict[str, int]] = {}
        for name, of_source in files.items():
            known_as = name if self.has_mixture else state.WHOLE
            counted.setdefault(known_as, {}).update({file: self._num_groups(file) for file in of_source})
        return counted

    def _shown(self, files: Files) -> str:
        return " ".join(f"{name}/{file[:8]}:{self._num_groups(file)}" for name in files for file in files[name])

    def _random_weights(self, names: Any) -> dict[str, float]:
        weights = {name: float(self.rng.choice([0.0, 0.05, 0.3, 0.5, 1.0])) for name in sorted(names)}
        return weights if any(weights.values()) else {**weights, min(names): 1.0}


def append_request(files: Files, weights: Mapping[str, float] | None = None) -> dict[str, Any]:
    """An append as a command queues it."""
    placed = {name: dict.fromkeys(file_ids, "/nowhere") for name, file_ids in files.items()}
    return {"kind": "append", "files": placed, "weights": weights}


def mixture_entry(from_tokens: int, weights: Mapping[str, float]) -> str:
    """A line of data.mixture."""
    text = " ".join(f"{name}={weight}" for name, weight in weights.items())
    return f"{from_tokens}: {text}" if from_tokens else text

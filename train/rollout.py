"""The data of reinforcement: answers that the model itself gives to the prompts that are read, and their advantages.

A rollout answers the prompts of grpo.num_updates steps at once; each of these steps then trains on its own part of
them. Those after the first train a model that no longer is the one that answered: the ratio of both probabilities is
what the clipping bounds. A run is saved between rollouts only, so that it goes on exactly.
"""

import json
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.tokenizing.tokenizer import Tokenizer
from evaluation.engine import complete_batch
from evaluation.model_folder import loaded_dtype
from evaluation.rewards import Reward
from evaluation.sampling import Sampling
from kernels.attention import boundaries_from_starts
from model.batch import TokenRows, as_unsigned
from model.lora import inject_lora
from model.lora_config import LoraConfig
from model.transformer import Transformer
from resume import rng
from resume.manifest import DataError
from resume.regions import gathered
from resume.state import DataState
from train.feed import Feed
from train.loader import MicroBatch
from train.policy_gradient import group_advantages, target_log_probs, token_weights
from train.recipes import GrpoConfig
from train.sharding import compute_dtype, is_sharded, reshard

# Rows are as long as the longest of a micro-batch, in multiples of this: few lengths, so that little is compiled.
_LENGTH_MULTIPLE = 64


class Answer(NamedTuple):
    """One answer to a prompt."""

    prompt: list[int]
    ids: list[int]
    is_cut: bool
    """Whether it reached the limit before a stop token."""
    reward: float
    advantage: float


def _prompt(rows: TokenRows, row: int) -> list[int]:
    """The prompt of a row: its first document behind the context token."""
    assert rows.boundaries is not None
    numbers = rows.boundaries.ids_BT[row] - rows.boundaries.ids_BT[row, 0]
    ids = torch.from_numpy(as_unsigned(rows.tokens[row]).astype(np.int64))
    return ids[: len(numbers)][numbers == 1].tolist()


Answers = list[list[Answer]]
"""Of a micro-batch: the group of answers to each of its prompts."""


class RolloutFeed(Feed):
    """A feed of prompts that gives the loop answers."""

    def answer_with(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        reward: Reward,
        first_step: int,
        tick: Callable[[], None],
    ) -> None:
        """Says who answers from step `first_step` on, what ends an answer, how it is judged, and whom to tell of it."""
        assert isinstance(self._config, GrpoConfig)
        self._tick = tick
        self._lora = self._config.lora
        self._model, self._tokenizer, self._stop_ids, self._reward = model, tokenizer, list(stop_ids), reward
        self._grpo, self._step = self._config.grpo, first_step
        self._ready: deque[tuple[list[MicroBatch], int]] = deque()
        self._num_read = 0
        self._records: dict[Path, list[dict[str, Any]]] = {}
        self._figures: dict[int, dict[str, float]] = {}

    @property
    def is_between_rollouts(self) -> bool:
        """Whether all answers are trained that there are."""
        return not self._ready

    def next_step(self) -> list[MicroBatch]:
        """This rank's micro-batches of answers of the next step; none after the end of the data."""
        if not self._ready:
            self._roll_out()
        if not self._ready:
            return []
        micro_batches, self._num_read = self._ready.popleft()
        self._step += 1
        return micro_batches

    def advanced(self, state: DataState, num_targets: int) -> DataState:
        """The state after the step that was given last."""
        return state.advance(self._num_read, num_targets)

    def figures(self, step: int) -> dict[str, float]:
        """What the answers were like that a step trained on."""
        return self._figures.pop(step, {})

    def _roll_out(self) -> None:
        """Answers the prompts of the next steps.

        What may fail on one rank, reading and rewards, is done between collectives: else the others waited for ever.
        """
        prompts = self._ranks.together(self._read_prompts)
        if not prompts:
            return
        was_training = self._model.training
        self._model.eval()
        actor = local_copy(self._model, self._lora, compute_dtype(self._config.parallel, self._ranks.device))
        answered = self._ranks.together(
            lambda: [
                [self._answered(actor, batch, self._step + offset) for batch in batches]
                for offset, (batches, _) in enumerate(prompts)
            ]
        )
        for offset, ((batches, num_read), answers) in enumerate(zip(prompts, answered, strict=True)):
            self._log_figures(self._step + offset + 1, answers)
            weights = self._weights(answers)
            self._ready.append(
                ([rows for b, a in zip(batches, answers) for rows in self._micro_batches(b, a, weights)], num_read)
            )
        self._model.train(was_training)

    def _read_prompts(self) -> list[tuple[list[MicroBatch], int]]:
        """Of each step of a rollout this rank's prompts, and how many all ranks have."""
        prompts: list[tuple[list[MicroBatch], int]] = []
        for _ in range(min(self._grpo.num_updates, max(1, self._config.run.num_steps - self._step))):
            first = self._next_sample
            if batches := super().next_step():
                prompts.append((batches, self._next_sample - first))
        return prompts

    def _answered(self, actor: Transformer, batch: MicroBatch, step: int) -> Answers:
        """The groups of answers to the prompts of a micro-batch."""
        grpo, rows = self._grpo, batch.rows
        places = [place for place in range(len(batch.positions)) if self._has_prompt(batch, place)]
        if not places:
            return []
        prompts = [_prompt(rows, place) for place in places]
        seed = rng.step_seed(self._config.run.seed, step) % 2**31
        # One device runs the model that is trained: compiled for rows of one length, not for a token at a time.
        with torch.compiler.set_stance("force_eager"):
            ids = complete_batch(
                actor,
                prompts,
                max_new_tokens=grpo.max_new_tokens,
                sampling=Sampling(temperature=grpo.temperature, top_p=grpo.top_p, seed=seed),
                stop_ids=self._stop_ids,
                num_samples=grpo.num_samples,
                first_samples=[int(batch.positions[place]) * grpo.num_samples for place in places],
            )
        self._tick()
        groups: Answers = []
        for place, prompt, answers in zip(places, prompts, ids, strict=True):
            record = self._record(batch, place)
            texts = [self._tokenizer.decode(answer) for answer in answers]
            rewards = [self._reward(self._tokenizer.decode(prompt), text, record) for text in texts]
            advantages = group_advantages(torch.tensor([rewards]), normalise_by=grpo.normalise)[0].tolist()
            is_cut = [answer[-1] not in self._stop_ids for answer in answers]
            groups.append([Answer(prompt, *parts) for parts in zip(answers, is_cut, rewards, advantages, strict=True)])
        return groups

    def _has_prompt(self, batch: MicroBatch, place: int) -> bool:
        """Whether there is a row, not behind the end of its file, and as it was written."""
        file, sample = int(batch.files[place]), int(batch.samples[place])
        num_rows = self._reader.files[file].num_samples(self._reader.sequence_length)
        return sample < num_rows and (file, sample) not in batch.bad

    def _record(self, batch: MicroBatch, place: int) -> dict[str, Any]:
        """The line of the input file that a prompt comes from."""
        path = self._reader.files[batch.files[place]].path.with_suffix(".jsonl")
        if path not in self._records:
            try:
                lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); prepare the prompts again") from error
            self._records[path] = [json.loads(line) for line in lines]
        return self._records[path][batch.samples[place]]

    def _weights(self, answered: Sequence[Answers]) -> Callable[[int], float]:
        """What a token of an answer of so many tokens counts, given all answers of the step on all ranks."""
        mine = [len(a.ids) for groups in answered for group in groups for a in group if self._is_trained(a)]
        lengths = torch.tensor([length for part in self._ranks.gather(mine) for length in part], dtype=torch.float32)
        weights = token_weights(lengths, kind=self._grpo.loss, most_tokens=self._grpo.max_new_tokens)
        by_length = dict(zip(lengths.tolist(), weights.tolist(), strict=True))
        return lambda length: by_length[length]

    def _is_trained(self, answer: Answer) -> bool:
        return not (answer.is_cut and self._grpo.mask_cut_answers)

    def _micro_batches(
        self, prompts: MicroBatch, answered: Answers, weight: Callable[[int], float]
    ) -> list[MicroBatch]:
        """One micro-batch of each sample's number, the first of which stands for the prompts in the books."""
        size, found = prompts.rows.tokens.shape[0], []
        none = np.empty(0, dtype=np.int64)
        for sample in range(self._grpo.num_samples):
            answers = [group[sample] for group in answered]
            rows = self._token_rows(answers, size, weight)
            if sample == 0:
                found.append(MicroBatch(rows, prompts.positions, prompts.files, prompts.samples, prompts.bad))
            else:
                found.append(MicroBatch(rows, none, none, none, []))
        return found

    def _token_rows(self, answers: Sequence[Answer], size: int, weight: Callable[[int], float]) -> TokenRows:
        """Prompts and answers, one to a row of `size` rows, with what the objective wants of them."""
        longest = max((len(a.prompt) + len(a.ids) for a in answers), default=2) - 1
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        tokens = torch.full((size, length + 1), self._reader.eos_id, dtype=torch.int32)
        trained, starts = torch.zeros(size, length, dtype=torch.bool), torch.zeros(size, length, dtype=torch.bool)
        starts[:, 0] = True
        extra = {name: torch.zeros(size, length) for name in ("advantage", "weight")}
        for row, answer in enumerate(answers):
            ids = [*answer.prompt, *answer.ids]
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            starts[row, len(ids) :][:1] = True  # the padding is a document of its own
            place = slice(len(answer.prompt) - 1, len(ids) - 1)
            if self._is_trained(answer):
                trained[row, place] = True
                extra["weight"][row, place] = weight(len(answer.ids))
            extra["advantage"][row, place] = answer.advantage
        rows = TokenRows(tokens, trained.sum(dim=1).tolist(), boundaries_from_starts(starts), trained, extra)
        if self._grpo.num_updates > 1:
            extra["old_log_probs"] = self._log_probs(rows)
        return rows

    @torch.no_grad()
    def _log_probs(self, rows: TokenRows) -> Tensor:
        """log p of the answers' tokens by the model that is trained, before it is."""
        soft_cap = self._config.model.logit_softcap
        batch = rows.to(self._ranks.device)
        found = target_log_probs(self._model, batch, temperature=self._grpo.temperature, soft_cap=soft_cap)
        reshard(self._model)
        return found.float().cpu()

    def _log_figures(self, step: int, answered: Sequence[Answers]) -> None:
        """What the answers of a step are like, of all ranks together."""
        answers = [answer for groups in answered for group in groups for answer in group]
        groups = [group for groups in answered for group in groups]
        sums = {
            "reward": sum(answer.reward for answer in answers),
            "length": sum(len(answer.ids) for answer in answers),
            "cut": sum(answer.is_cut for answer in answers),
            "reward_deviation": sum(statistics.pstdev(answer.reward for answer in group) for group in groups),
            "all_alike": sum(len({answer.reward for answer in group}) == 1 for group in groups),
        }
        num_answers, num_groups, *totals = self._ranks.sum_all([len(answers), len(groups), *sums.values()])
        counts = [num_answers] * 3 + [num_groups] * 2
        self._figures[step] = {
            f"answers/{name}": total / max(1.0, count) for name, total, count in zip(sums, totals, counts, strict=True)
        }


def local_copy(model: Transformer, lora: LoraConfig, dtype: torch.dtype) -> Transformer:
    """The model as this rank alone can run it: itself if it is whole here, else gathered; every rank calls it."""
    if not is_sharded(model):
        return model
    state = {name: gathered(tensor).to(loaded_dtype(name, dtype)) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        copy = Transformer(model.config)
        inject_lora(copy, lora)
    copy.load_state_dict(state, assign=True)
    copy.tie()
    return copy.eval()

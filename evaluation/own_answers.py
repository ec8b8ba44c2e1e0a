"""A chat model's own answers to the prompts of a file: what pairs and rejection sampling are made of."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.chat.turns import Turn

if TYPE_CHECKING:
    from data_prep.chat.chat_format import ChatFormat
    from evaluation.model_folder import LoadedModel
    from evaluation.rewards import Reward

# torch and the model are imported where they are used, so that --help is instant.

MAX_BAD_SHARE = 0.01
"""With more bad records than this a file counts as misread."""
_SORTED_BATCHES = 8
"""So many batches are given to the engine at once: prompts of one length go together, and progress still shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingOptions:
    """How the model answers."""

    num_samples: int = 8
    """Answers to each prompt."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; those that reach it are left out."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Sample only from the likeliest tokens whose probabilities together reach p."""
    seed: int = 0
    """Equal seeds give equal answers."""
    chat_format: str = "auto"
    """auto (the model's own) or the name of one, for models that were fine-tuned elsewhere."""
    limit: int | None = None
    """Prompts to answer at most, the first of the file."""
    batch_size: int = 64
    """Answers that are written at a time."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        for key in ("num_samples", "max_new_tokens", "limit", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"--num-samples {self.num_samples} at temperature 0 are all the same; raise --temperature")


class PromptError(ValueError):
    """A file holds nothing to answer; the message says what was expected."""


class Prompt(NamedTuple):
    """What is asked, and the record of the file that asks it."""

    turns: tuple[Turn, ...]
    answer: str
    """The file's own; empty if only prompts are read."""
    record: dict[str, Any]


class Answered(NamedTuple):
    """A prompt and the model's answers to it: all different, whole, and not empty."""

    prompt: Prompt
    text: str
    """The prompt as the model reads it."""
    answers: list[str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of the prompt, as files have them."""
        return [turn._asdict() for turn in self.prompt.turns]

    def rewards(self, reward: "Reward") -> list[float]:
        """How good each of the answers is."""
        return [reward(self.text, answer, self.prompt.record) for answer in self.answers]


def read_prompts(file: Path, limit: int | None, *, with_answers: bool) -> list[Prompt]:
    """The prompts of a file of conversations or prompts; with_answers, each with the last answer of a conversation.

    Raises:
        InputError: no such file, or too many records that are none.
        PromptError: not one prompt in it.
    """
    from data_prep.chat.chat_records import BadRecords, find_files, read_records
    from data_prep.reading.field_template import BadRecordError

    bad, prompts = BadRecords(MAX_BAD_SHARE), list[Prompt]()
    for record in (record for found in find_files([str(file)]) for record in read_records(found)):
        if limit is not None and len(prompts) == limit:
            break
        try:
            if isinstance(record.value, BadRecordError):
                raise record.value
            prompts.append(_with_answer(record.value) if with_answers else _without_answer(record.value))
            bad.add(f"{file}:{record.line}", None)
        except BadRecordError as error:
            bad.add(f"{file}:{record.line}", str(error))
    bad.check()
    if not prompts:
        raise PromptError(f"{file}: has no prompt; expected a JSON object per line, as prepare-chat reads them")
    return prompts


def _with_answer(record: dict[str, Any]) -> Prompt:
    from data_prep.chat.conversations import conversation
    from data_prep.reading.field_template import BadRecordError

    turns = conversation(record)
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    if not last or turns[last - 1].role == "assistant":
        raise BadRecordError("conversation without a question and its answer")
    return Prompt(turns[:last], turns[last].content, record)


def _without_answer(record: dict[str, Any]) -> Prompt:
    from data_prep.chat.conversations import documents_of

    ((turns, _),) = documents_of(record, "prompts")
    return Prompt(turns, "", record)


def answer_prompts(
    loaded: "LoadedModel", prompts: Sequence[Prompt], options: SamplingOptions, counts: Counter[str]
) -> Iterator[Answered]:
    """Answers each prompt and counts what is left out, and why.

    Raises:
        ChatFormatError: the model has no chat format, or cannot write it.
    """
    from tqdm import tqdm

    from evaluation.answer_quality import split_stop
    from evaluation.chat_session import usable_chat_format
    from evaluation.engine import complete_batch
    from evaluation.sampling import Sampling

    chat_format = usable_chat_format(loaded, options.chat_format)
    stop_ids = chat_format.stop_ids(loaded.tokenizer)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
    asked = [(prompt, chat_format.prompt(loaded.tokenizer, prompt.turns)) for prompt in prompts]
    fitting = [(prompt, ids) for prompt, ids in asked if len(ids) < loaded.config.context_length]
    counts["prompts too long for the context"] += len(asked) - len(fitting)
    size = max(1, options.batch_size // options.num_samples) * _SORTED_BATCHES
    with tqdm(total=len(fitting), desc="answer", unit="prompt", disable=None) as progress:
        for first in range(0, len(fitting), size):
            chunk = fitting[first : first + size]
            samples = complete_batch(
                loaded.model, [ids for _, ids in chunk], max_new_tokens=options.max_new_tokens, sampling=sampling,
                stop_ids=stop_ids, num_samples=options.num_samples, batch_size=options.batch_size,
            )  # fmt: skip
            for (prompt, ids), written in zip(chunk, samples, strict=True):
                whole = [tokens for tokens, has_stopped in (split_stop(t, stop_ids) for t in written) if has_stopped]
                counts["answers cut at --max-new-tokens or the context's end"] += len(written) - len(whole)
                texts = [said(chat_format, loaded.tokenizer.decode(tokens)) for tokens in whole]
                kept = list(dict.fromkeys(text for text in texts if text.strip()))
                counts["answers empty or given before"] += len(texts) - len(kept)
                yield Answered(prompt, loaded.tokenizer.decode(ids), kept)
            progress.update(len(chunk))


def said(chat_format: "ChatFormat", text: str) -> str:
    """The content of an answer: without what the format writes around it."""
    behind = chat_format.assistant[1].partition(chat_format.stop)[0]
    text = text.removeprefix(chat_format.lead).removesuffix(behind)
    return text.strip() if chat_format.strips else text


def in_words(counts: Counter[str]) -> str:
    """What was left out, to be put behind a sentence."""
    return "".join(f"; {what}: {count:,}" for what, count in counts.items() if count)

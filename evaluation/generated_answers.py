"""Lets a model answer questions and judges what it wrote: by the final number as in GSM8K, or by the whole answer.

Questions go through the model's chat format if it has one, else through a template, after answered examples if wanted.
With several samples the answer that most of them give is judged (maj@k). An answer without a number where one is wanted
is ill-formed: it is counted, and wrong. How the answers end and repeat themselves is always reported.

Source: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021; Wang et al., "Self-Consistency Improves
Chain of Thought Reasoning in Language Models", 2023 (the vote).

    python -m evaluation.generated_answers runs/sft gsm8k/test.jsonl
    python -m evaluation.generated_answers runs/demo gsm8k/test.jsonl --shots 5 --shots-file gsm8k/train.jsonl
    python -m evaluation.generated_answers runs/sft questions.jsonl --scoring exact --out results/
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from data_prep import command_line
from evaluation.answer_scoring import Scoring, judge, prediction

if TYPE_CHECKING:
    from evaluation.answer_quality import Answer
    from evaluation.model_folder import LoadedModel
    from evaluation.questions import Prompter, Question

# torch and the model are imported where they are used, so that --help is instant.

EXAMPLE_END = "\n\n"
"""What separates examples ends the answer of a model without chat format."""
_SORTED_BATCHES = 8
"""So many batches are given to the engine at once: prompts of one length go together, and progress still shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """How questions are asked and answers judged."""

    scoring: Scoring = "numeric"
    """By the final number, by the whole answer but for case, spaces and punctuation around it, or not at all."""
    shots: int = 0
    """Answered examples before each question."""
    shots_file: str | None = None
    """File of questions whose first ones are the examples."""
    chat_format: str = "auto"
    """auto (the model's own, if it has one), none, or the name of one."""
    template: str = "Question: {question}\nAnswer:"
    """How a question is written without a chat format."""
    num_samples: int = 1
    """Answers to each question, of which the one given most often is judged."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Keep only the likeliest tokens whose probabilities together reach p."""
    seed: int = 0
    """Equal seeds give equal answers."""
    limit: int | None = None
    """Questions to ask at most, the first of the file."""
    batch_size: int = 16
    """Answers that are written at a time."""

    def __post_init__(self) -> None:
        """Refuses settings that contradict each other."""
        for key in ("num_samples", "max_new_tokens", "limit", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"--num-samples {self.num_samples} at temperature 0 are all the same; raise --temperature")
        if self.shots < 0 or (self.shots > 0) != (self.shots_file is not None):
            raise ValueError(f"--shots {self.shots}: give a positive number together with --shots-file FILE")
        if "{question}" not in self.template:
            raise ValueError(f"--template {self.template!r}: has no {{question}} in it")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswersCommand(AnswerSettings):
    """Lets a model answer the questions of a file, and judges the answers."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """Questions, a JSON object per line: question, prompt or messages; answer."""
    out: Path | None = None
    """Folder for items.jsonl, every question with what became of it."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""


def evaluate_answers(
    loaded: "LoadedModel", file: Path, settings: AnswerSettings
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The figures of a file of questions, and a record of each question.

    Raises:
        ValueError: a file that cannot be used, or a chat format that the tokenizer cannot write.
    """
    from evaluation.answer_quality import quality
    from evaluation.questions import Prompter, chat_format_for

    questions, shots = _read(file, settings)
    chat_format = chat_format_for(loaded.path, settings.chat_format)
    prompter = Prompter(loaded.tokenizer, chat_format, settings.template, shots)
    items: list[dict[str, Any]] = []
    given: list[Answer] = []
    for question, answers in zip(questions, _ask(loaded, prompter, questions, settings), strict=True):
        items.append(_item(file.stem, question, answers, settings.scoring))
        given += answers or []
    return _summary(items, settings) | (quality(given) if given else {}), items


def _read(file: Path, settings: AnswerSettings) -> "tuple[list[Question], list[Question]]":
    from evaluation.questions import read_questions

    questions = read_questions(file, need_answers=settings.scoring != "none")[: settings.limit]
    if settings.scoring == "numeric":
        for question in questions:
            if any(prediction(answer, "numeric") is None for answer in question.answers):
                raise ValueError(f"{file}: the answer to question {question.id} has no number; try --scoring exact")
    shots: list[Question] = []
    if settings.shots_file is not None:
        shots = read_questions(Path(settings.shots_file), need_answers=True)[: settings.shots]
        if len(shots) < settings.shots:
            raise ValueError(f"{settings.shots_file}: has {len(shots)} questions for --shots {settings.shots}")
    return questions, shots


def _ask(
    loaded: "LoadedModel", prompter: "Prompter", questions: "Sequence[Question]", settings: AnswerSettings
) -> "list[list[Answer] | None]":
    """The answers to each question, None where it does not fit into the model's context."""
    from tqdm import tqdm

    from evaluation.engine import complete_batch
    from evaluation.sampling import Sampling

    room = {"context_length": loaded.config.context_length, "max_new_tokens": settings.max_new_tokens}
    prompts = [prompter.prompt(question, **room) for question in questions]
    asked, stop_ids = [prompt for prompt in prompts if prompt is not None], prompter.stop_ids()
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    written: list[list[list[int]]] = []
    with tqdm(total=len(asked), desc="answer", unit="question", disable=None) as progress:
        for first in range(0, len(asked), _SORTED_BATCHES * settings.batch_size):
            written += complete_batch(
                loaded.model, asked[first : first + _SORTED_BATCHES * settings.batch_size],
                max_new_tokens=settings.max_new_tokens, sampling=sampling, stop_ids=stop_ids,
                num_samples=settings.num_samples, batch_size=settings.batch_size,
            )  # fmt: skip
            progress.update(len(written) - progress.n)
    samples = iter(written)
    return [None if p is None else [_answer(prompter, tokens, stop_ids) for tokens in next(samples)] for p in prompts]


def _answer(prompter: "Prompter", tokens: Sequence[int], stop_ids: Collection[int]) -> "Answer":
    from evaluation.answer_quality import Answer, split_stop

    said, has_stopped = split_stop(tokens, stop_ids)
    text = prompter.tokenizer.decode(said)
    if prompter.chat_format is None:
        text, end, _ = text.strip().partition(EXAMPLE_END)
        if end:
            said, has_stopped = prompter.tokenizer.encode(text), True
    return Answer(said, has_stopped, text)


def _item(task: str, question: "Question", answers: "Sequence[Answer] | None", scoring: Scoring) -> dict[str, Any]:
    texts = [answer.text for answer in answers or ()]
    return {
        "task": task,
        "id": question.id,
        "prompt": question.text,
        "answer": list(question.answers),
        "output": texts,
        "stopped": [answer.has_stopped for answer in answers or ()],
        "too_long": answers is None,
        **(judge(texts, question.answers, scoring) if scoring != "none" else {}),
    }


def _summary(items: Sequence[dict[str, Any]], settings: AnswerSettings) -> dict[str, float]:
    from evaluation.items import wilson_interval

    figures: dict[str, float] = {"questions": len(items), "too_long": sum(item["too_long"] for item in items)}
    if settings.scoring == "none":
        return figures
    num_correct = sum(item["correct"] for item in items)
    low, high = wilson_interval(num_correct, len(items))
    figures |= {"accuracy": num_correct / len(items), "accuracy_low": low, "accuracy_high": high}
    figures["ill_formed"] = sum(item["ill_formed"] for item in items)
    if settings.num_samples > 1:
        num_right_samples = sum(item["num_correct_samples"] for item in items)
        figures["sample_accuracy"] = num_right_samples / (len(items) * settings.num_samples)
    return figures


def lines(figures: dict[str, float], settings: AnswerSettings) -> list[str]:
    """The figures in words."""
    from evaluation.answer_quality import quality_line

    found = [f"{figures['questions']:,} questions, {figures['too_long']:,} too long for the context"]
    if "accuracy" in figures:
        name = "accuracy" if settings.num_samples == 1 else f"maj@{settings.num_samples}"
        interval = f"[{figures['accuracy_low']:.1%}, {figures['accuracy_high']:.1%}]"
        found.append(
            f"{name} {figures['accuracy']:.1%} {interval}  {figures['ill_formed']:,} ill-formed, taken as wrong"
        )
    if "sample_accuracy" in figures:
        found.append(f"mean accuracy of single answers {figures['sample_accuracy']:.1%}")
    return [*found, *([quality_line(figures)] if "stop_rate" in figures else [])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(
            AnswersCommand, argv, prog="python -m evaluation.generated_answers", description=__doc__
        )
        figures = _run(command)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(figures, command)))
    return 0


def _run(command: AnswersCommand) -> dict[str, float]:
    from evaluation.items import write_items
    from evaluation.model_folder import load_model

    loaded = load_model(command.model, device=command.device)
    figures, items = evaluate_answers(loaded, command.file, command)
    if command.out is not None:
        write_items(command.out / "items.jsonl", items)
        write_items(command.out / "results.json", [{command.file.stem: figures}])
    return figures


if __name__ == "__main__":
    sys.exit(main())

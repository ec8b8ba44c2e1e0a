"""Multiple choice: how often a model prefers the right one of the choices.

    python -m evaluation.multiple_choice runs/demo data/mmlu data/ARC-Easy --scoring cloze --shots 5
    python -m evaluation.multiple_choice runs/sft data/ceval --chat --scoring generated --out runs/sft/eval/ceval

Folders are C-Eval, CMMLU, MMLU and ARC as they are published, or your own (see evaluation/choice_tasks.py).
"""

import dataclasses
import string
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from data_prep import command_line
from evaluation.choice_figures import table, task_figures
from evaluation.choice_prompts import Prompt, Prompter, Scoring, read_letter
from evaluation.choice_tasks import ChoiceTaskError, Question, Task, read_task
from evaluation.items import write_items

if TYPE_CHECKING:
    from evaluation.model_folder import LoadedModel

# torch and the model are imported where they are used, so that --help is instant.


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceOptions:
    """How questions are asked and answers judged."""

    shots: int = 5
    """Solved examples before each question."""
    scoring: Scoring = "letter"
    """letter: the letters compete; cloze: the texts of the choices; generated: the model writes a letter."""
    normalise: Literal["sum", "token", "character"] = "character"
    """What the log-likelihood of a cloze text is divided by; sum: nothing."""
    chat: bool = False
    """Ask in the chat format that the model was fine-tuned with."""
    chat_format: str | None = None
    """Ask in this chat format instead, by its name."""
    limit: int | None = None
    """Questions of each task at most, spread evenly over it."""
    split: str | None = None
    """Split to score; by default test, or val where test has no answers."""
    max_new_tokens: int = 32
    """Longest written answer, in tokens."""
    batch_size: int = 16
    """Rows per forward pass."""

    def check(self) -> None:
        """Refuses counts that make no prompt or no batch."""
        for key, least in (("shots", 0), ("limit", 1), ("max_new_tokens", 1), ("batch_size", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(f"--{key.replace('_', '-')} {value}: must be at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceCommand(ChoiceOptions):
    """Scores a model on multiple-choice questions."""

    model: tyro.conf.Positional[Path]
    """Run folder, checkpoint folder (step-N) or Hugging Face folder."""
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or files with questions, each a task."""
    out: Path | None = None
    """Folder for items.jsonl, a line for every question, and results.json."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""


def evaluate_choice(
    loaded: "LoadedModel", folders: Sequence[Path], *, out: Path | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """The figures of each task, by its name; options are those of `ChoiceOptions`.

    Raises:
        ValueError: whatever is wrong with a folder or an option.
    """
    settings = ChoiceOptions(**options)
    settings.check()
    if not folders:
        raise ChoiceTaskError("no task: name the folders or files with the questions")
    tasks = [read_task(Path(folder), split=settings.split) for folder in folders]
    if len({task.name for task in tasks}) < len(tasks):
        raise ChoiceTaskError(f"{', '.join(map(str, folders))}: two tasks of one name; score them one after the other")
    figures, items = {}, []
    for task in tasks:
        items_of_task = list(_items(loaded, task, settings))
        figures[task.name] = task_figures(task.split, dataclasses.asdict(settings), items_of_task)
        items += items_of_task
    if out is not None:
        write_items(out / "items.jsonl", items)
        write_items(out / "results.json", [figures])
    return figures


def _items(loaded: "LoadedModel", task: Task, options: ChoiceOptions) -> Iterator[dict[str, Any]]:
    """Every question with what the model made of it."""
    prompter = _prompter(loaded, task, options)
    for subject, questions in zip(task.subjects, _chosen(task, options.limit), strict=True):
        if not questions:
            continue
        if len(subject.shots) < options.shots:
            raise ChoiceTaskError(
                f"{task.name}: {options.shots} shots asked for, {subject.name or 'the task'} has {len(subject.shots)} "
                f"solved examples; use --shots {len(subject.shots)}"
            )
        prompts = prompter.prompts(subject, questions)
        judge = _written if options.scoring == "generated" else _compared
        for question, prompt, judged in zip(
            questions, prompts, judge(loaded, prompter, questions, prompts, options), strict=True
        ):
            assert question.answer is not None
            yield {
                "task": task.name,
                "subject": subject.name,
                "category": subject.category,
                "id": question.id,
                "prompt_hash": prompt.hash,
                "num_shots": prompt.num_shots,
                "is_cut": prompt.is_cut,
                "num_choices": len(question.choices),
                "answer": string.ascii_uppercase[question.answer],
                **judged,
                "correct": judged["prediction"] == string.ascii_uppercase[question.answer],
            }


def _prompter(loaded: "LoadedModel", task: Task, options: ChoiceOptions) -> Prompter:
    from data_prep.chat.chat_format import chat_format_of, format_named

    chat_format = None
    if options.chat_format is not None:
        chat_format = format_named(options.chat_format)
    elif options.chat:
        chat_format = chat_format_of(loaded.path)
    context_length, max_new_tokens = loaded.config.context_length, options.max_new_tokens
    if options.scoring == "generated" and max_new_tokens >= context_length:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: leaves no room in a context of {context_length}")
    return Prompter(
        tokenizer=loaded.tokenizer,
        chat_format=chat_format,
        scoring=options.scoring,
        language=task.language,
        num_shots=options.shots,
        # The last token of a continuation is predicted and not read.
        max_tokens=context_length - max_new_tokens if options.scoring == "generated" else context_length + 1,
    )


def _chosen(task: Task, limit: int | None) -> list[list[Question]]:
    """The questions of each subject, or `limit` of the task in equal distances."""
    total = sum(len(subject.questions) for subject in task.subjects)
    num_chosen = min(limit or total, total)
    places = {index * total // num_chosen for index in range(num_chosen)}
    numbered = iter(range(total))
    return [[question for question in subject.questions if next(numbered) in places] for subject in task.subjects]


def _compared(
    loaded: "LoadedModel",
    prompter: Prompter,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    options: ChoiceOptions,
) -> Iterator[dict[str, Any]]:
    """What the model prefers, by log-likelihood; the first of equals."""
    from evaluation.log_likelihood import log_likelihoods

    pairs = [pair for prompt in prompts for pair in prompt.pairs]
    results = iter(log_likelihoods(loaded.model, pairs, batch_size=options.batch_size))
    for question in questions:
        found = [next(results) for _ in question.choices]
        scores = {"sum": [result.sum for result in found]}
        if options.scoring == "cloze":
            scores["token"] = [result.sum / result.num_tokens for result in found]
            scores["character"] = [
                result.sum / len(choice) for result, choice in zip(found, question.choices, strict=True)
            ]
        predictions = {name: string.ascii_uppercase[some.index(max(some))] for name, some in scores.items()}
        prediction = predictions[options.normalise if options.scoring == "cloze" else "sum"]
        yield {"scores": scores, "predictions": predictions, "prediction": prediction, "ill_formed": False}


def _written(
    loaded: "LoadedModel",
    prompter: Prompter,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    options: ChoiceOptions,
) -> Iterator[dict[str, Any]]:
    """What the model writes; an answer that names no choice is wrong, and counted."""
    from evaluation.engine import Sampling, complete_batch

    tokenizer = loaded.tokenizer
    if prompter.chat_format is not None:
        stop_ids = prompter.chat_format.stop_ids(tokenizer)
    else:  # an answer is one line; behind it, a base model asks itself the next question
        ends_line = (token_id for token_id, content in enumerate(tokenizer.token_contents()) if b"\n" in content)
        stop_ids = [tokenizer.eos_id, *ends_line]
    answers = complete_batch(
        loaded.model,
        [prompt.pairs[0][0] for prompt in prompts],
        max_new_tokens=options.max_new_tokens,
        sampling=Sampling(),
        stop_ids=stop_ids,
        batch_size=options.batch_size,
    )
    for question, (answer,) in zip(questions, answers, strict=True):
        output = tokenizer.decode(answer)
        index = read_letter(output, question.choices)
        prediction = None if index is None else string.ascii_uppercase[index]
        yield {"output": output, "prediction": prediction, "ill_formed": index is None}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(
            ChoiceCommand, argv, prog="python -m evaluation.multiple_choice", description=__doc__
        )
        command.check()
        from evaluation.model_folder import load_model

        options = {part.name: getattr(command, part.name) for part in dataclasses.fields(ChoiceOptions)}
        loaded = load_model(command.model, device=command.device)
        figures = evaluate_choice(loaded, command.folders, out=command.out, **options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Evaluates every checkpoint of a run: a line of sweep.jsonl for each task, a table, and curves in sweep.png.

What sweep.jsonl has already is not computed again, so that a sweep can be stopped, and go on while the run does.

    python -m evaluation.sweep runs/demo --tasks domains=texts/ choice=data/mmlu,shots=5 answers=gsm8k/test.jsonl
    python -m evaluation.sweep runs/demo --every 10000 --tasks domains=texts/,max_documents=100
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from data_prep import command_line

if TYPE_CHECKING:
    from evaluation.model_folder import LoadedModel

# torch and the model are imported where they are used, so that --help is instant.

RESULTS_FILE, PICTURE_FILE, ITEMS_FOLDER = "sweep.jsonl", "sweep.png", "sweep"
MEASURES = ("bits_per_byte", "accuracy", "stop_rate")
"""The figures that are shown and drawn; sweep.jsonl has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepCommand:
    """Evaluates every checkpoint of a run."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder with checkpoints (step-N)."""
    tasks: tuple[str, ...]
    """KIND=PATH, settings behind commas: domains=FOLDER, choice=FOLDER,shots=5 or answers=FILE,scoring="exact"."""
    every: int = 1
    """Only checkpoints whose step is a multiple of this, and the newest."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuses a sweep over nothing."""
        if self.every < 1:
            raise ValueError(f"--every {self.every}: must be at least 1")
        if not self.tasks:
            raise ValueError("--tasks is empty; name some, such as domains=FOLDER")


class Task(NamedTuple):
    """One evaluation, as it is written on the command line."""

    text: str
    kind: str
    path: Path
    settings: Any


class Result(NamedTuple):
    """What a task said of a checkpoint; the hash tells another one under the same number."""

    step: int
    checkpoint: str
    task: str
    figures: dict[str, Any]


def sweep(command: SweepCommand) -> list[Result]:
    """The results of all tasks at all chosen checkpoints; those that are new are added to sweep.jsonl one by one.

    A checkpoint that cannot be loaded (a run deletes old ones meanwhile) is passed over with a note.

    Raises:
        ValueError: no checkpoint there, or whatever is wrong with a task.
    """
    from evaluation.model_folder import load_model
    from resume.checkpoint import CheckpointError, read_record, steps

    tasks = [_task(text) for text in command.tasks]
    if not (published := steps(command.run)):
        raise ValueError(f"{command.run}: no checkpoint (step-N) in it; expected the folder of a run that has saved")
    known = {result[:3]: result for result in read_results(command.run)}
    results: list[Result] = []
    for step in (step for step in published if step % command.every == 0 or step == published[-1]):
        folder = command.run / f"step-{step}"
        try:
            read_record(folder)
            checkpoint = json.loads((folder / "record.json").read_bytes())["xxh3_128"]
            is_new = any((step, checkpoint, task.text) not in known for task in tasks)
            loaded = load_model(folder, device=command.device) if is_new else None
        except CheckpointError as error:
            print(f"note: {error}; passed over", file=sys.stderr)
            continue
        for task in tasks:
            result = known.get((step, checkpoint, task.text))
            if result is None:
                assert loaded is not None
                out = command.run / ITEMS_FOLDER / f"step-{step}" / re.sub(r"[^\w.=-]+", "_", task.text)
                result = Result(step, checkpoint, task.text, _evaluate(task, loaded, out))
                _append(command.run / RESULTS_FILE, result)
            results.append(result)
    return results


def read_results(run: Path) -> Iterator[Result]:
    """The lines of sweep.jsonl, without one that a kill has cut off."""
    path = run / RESULTS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            yield Result(**json.loads(line))
        except (ValueError, TypeError):
            continue


def _append(path: Path, result: Result) -> None:
    content = path.read_bytes() if path.is_file() else b""
    line = json.dumps(result._asdict(), ensure_ascii=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line if content.endswith(b"\n") or not content else f"\n{line}")


def _task(text: str) -> Task:
    from data_prep.config_file import from_table
    from evaluation.domains import DomainSettings
    from evaluation.generated_answers import AnswerSettings
    from evaluation.multiple_choice import ChoiceOptions

    kinds = {"domains": DomainSettings, "choice": ChoiceOptions, "answers": AnswerSettings}
    kind, _, rest = text.partition("=")
    path, *settings = rest.split(",")
    if kind not in kinds or not path:
        raise ValueError(f"task {text!r}: expected KIND=PATH, with a kind of {', '.join(kinds)}")
    if not Path(path).exists():
        raise ValueError(f"task {text!r}: {path} does not exist")
    table = {key: _value(value) for key, _, value in (setting.partition("=") for setting in settings)}
    return Task(text, kind, Path(path), from_table(table, kinds[kind], kind))


def _value(text: str) -> Any:
    """A value of TOML, or the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _evaluate(task: Task, loaded: "LoadedModel", out: Path) -> dict[str, Any]:
    """The figures of a task; items go to the folder `out`."""
    from dataclasses import asdict

    from evaluation.domains import evaluate_domains
    from evaluation.generated_answers import evaluate_answers
    from evaluation.items import write_items
    from evaluation.multiple_choice import evaluate_choice

    print(f"{loaded.path.name}  {task.text}", file=sys.stderr)
    if task.kind == "domains":
        return evaluate_domains(loaded, task.path, task.settings)
    if task.kind == "choice":
        return evaluate_choice(loaded, [task.path], out=out, **asdict(task.settings))
    figures, items = evaluate_answers(loaded, task.path, task.settings)
    write_items(out / "items.jsonl", items)
    return figures


def curves(results: Sequence[Result], measure: str) -> dict[str, dict[int, float]]:
    """The values of a measure by step, of every task and every part of one that has it."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        for name, value in _values(result.figures, measure):
            found.setdefault(f"{result.task} {name}".rstrip(), {})[result.step] = value
    return found


def _values(figures: Mapping[str, Any], measure: str) -> Iterator[tuple[str, float]]:
    """The measure of a task, and of its domains or sets, but not of what these are made of."""
    for name, part in {"": figures, **figures}.items():
        if isinstance(part, Mapping) and isinstance(part.get(measure), int | float):
            yield name, part[measure]


def table(results: Sequence[Result]) -> list[str]:
    """The measures of all checkpoints as lines of text."""
    from data_prep.looking.text_table import aligned

    columns = {
        f"{name} {measure}": by_step for measure in MEASURES for name, by_step in curves(results, measure).items()
    }
    steps = sorted({result.step for result in results})
    names = [f"[{number}]" for number in range(1, len(columns) + 1)]
    rows = [
        [f"{step:,}", *(f"{by_step[step]:.4f}" if step in by_step else "" for by_step in columns.values())]
        for step in steps
    ]
    return [*(f"{short} {name}" for short, name in zip(names, columns)), *aligned(["step", *names], rows)]


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draws each measure over the steps, a curve for each task or part of one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {measure: found for measure in MEASURES if (found := curves(results, measure))}
    figure = Figure(figsize=(8, 3.5 * max(1, len(panels))), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (measure, by_name) in zip(figure.subplots(max(1, len(panels)), squeeze=False).flat, panels.items()):
        for name, by_step in by_name.items():
            axes.plot(list(by_step), list(by_step.values()), "o-", markersize=4, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel(measure.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(SweepCommand, argv, prog="python -m evaluation.sweep", description=__doc__)
        results = sweep(command)
        draw(command.run / PICTURE_FILE, results)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What multiple choice comes to: accuracy with its interval and what guessing would give, and the table of it."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from evaluation.items import wilson_interval


def task_figures(split: str, options: dict[str, Any], items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the judged items of a task come to: in all, by category and by subject."""
    by_subject, by_category = defaultdict(list), defaultdict(list)
    for item in items:
        by_subject[item["subject"]].append(item)
        if item["category"]:
            by_category[item["category"]].append(item)
    subjects = {name: _figures(some) for name, some in by_subject.items()}
    figures = _figures(items) | {
        "split": split,
        "options": options,
        "macro_accuracy": sum(some["accuracy"] for some in subjects.values()) / len(subjects),
        "num_fewer_shots": sum(item["num_shots"] < options["shots"] for item in items),
        "num_cut": sum(item["is_cut"] for item in items),
        "categories": {name: _figures(some) for name, some in by_category.items()},
        "subjects": subjects,
    }
    if options["scoring"] == "cloze":
        figures["accuracy_by"] = {
            name: sum(item["predictions"][name] == item["answer"] for item in items) / len(items)
            for name in items[0]["predictions"]
        }
    return figures


def _figures(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    num_items, num_correct = len(items), sum(item["correct"] for item in items)
    return {
        "num_items": num_items,
        "num_correct": num_correct,
        "accuracy": num_correct / num_items,
        "interval": wilson_interval(num_correct, num_items),
        "random": sum(1 / item["num_choices"] for item in items) / num_items,
        "num_ill_formed": sum(item["ill_formed"] for item in items),
    }


def table(figures: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each task, its categories and subjects, and what a reader must know of them."""
    yield f"{'':34}{'items':>7}{'accuracy':>10}{'95 %':>16}{'random':>9}{'ill-formed':>12}"
    for name, task in figures.items():
        options = task["options"]
        yield _line(f"{name} {task['split']}, {options['scoring']}, {options['shots']} shots", task)
        for kind in ("categories", "subjects"):
            if len(task[kind]) > 1:
                yield from (_line(f"  {part}", some) for part, some in task[kind].items())
        if len(task["subjects"]) > 1:
            yield f"  mean over subjects {100 * task['macro_accuracy']:.1f} %"
        if "accuracy_by" in task:
            by = ", ".join(f"{how} {100 * accuracy:.1f} %" for how, accuracy in task["accuracy_by"].items())
            yield f"  by log-likelihood per: {by}"
        if task["num_fewer_shots"] or task["num_cut"]:
            yield f"  too long for the context: {task['num_fewer_shots']} with fewer shots, {task['num_cut']} cut"


def _line(name: str, part: dict[str, Any]) -> str:
    low, high = part["interval"]
    return (
        f"{name:34}{part['num_items']:>7}{100 * part['accuracy']:>10.1f}{f'{100 * low:.1f} to {100 * high:.1f}':>16}"
        f"{100 * part['random']:>9.1f}{part['num_ill_formed']:>12}"
    )

"""Multiple-choice questions out of the folders that are published, or out of files of your own.

C-Eval       dev/ val/ test/   <subject>_<split>.csv   id,question,A,B,C,D,answer(,explanation)
CMMLU        dev/ test/        <subject>.csv           ,Question,A,B,C,D,Answer
MMLU         dev/ val/ test/   <subject>_<split>.csv   without a header: question, four choices, letter
ARC          ARC-Easy-{Train,Dev,Test}.jsonl   {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}
your own     test.csv or test.jsonl, dev.csv or dev.jsonl with the examples, in a folder; or a file, its examples beside
             it as <name>.shots.csv. Columns or keys: question; choices, or A, B, C...; answer as a label, a choice's
             text or its index from 0; id, subject, category where you have them

Nothing is downloaded. What is scored is the split test, or val where test has no answers (C-Eval keeps its own). A
subject gets a category from a subject_mapping.json in the folder: {subject: [English name, Chinese name, category]}, as
C-Eval's, or {subject: category}.
"""

import csv
import io
import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Language = Literal["en", "zh"]
SCORED_SPLITS = ("test", "val", "validation")
SHOT_SPLITS = ("shots", "train", "dev")
SUFFIXES = (".csv", ".tsv", ".jsonl")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class ChoiceTaskError(ValueError):
    """A folder or file that does not hold multiple-choice questions; the message says what was expected."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `answer` is the index of the right choice, None where it is not published."""

    id: str
    text: str
    choices: tuple[str, ...]
    answer: int | None
    subject: str = ""
    category: str = ""


@dataclass(slots=True)
class Subject:
    """The questions on one matter, and the solved examples to put before them."""

    name: str
    title: str
    """Its name for a prompt, "" where that would not be in the questions' language."""
    category: str = ""
    questions: list[Question] = field(default_factory=list)
    shots: list[Question] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Task:
    """A set of subjects, all in one language."""

    name: str
    split: str
    language: Language
    subjects: tuple[Subject, ...]


def read_task(path: Path, *, split: str | None = None) -> Task:
    """Reads a folder or file; see the module's docstring.

    Raises:
        ChoiceTaskError: nothing there, not questions, or the answers are not published.
    """
    if not path.exists():
        raise ChoiceTaskError(f"{path}: does not exist; expected a task's folder as it was published, or a file")
    if path.is_file():
        split, questions = "", _read_files([("", path)])
        shots = _read_files([("", path.with_suffix(f".shots{path.suffix}"))])
    else:
        split, questions = _scored(path, split)
        others = (_read_files(_split_files(path, other)) for other in SHOT_SPLITS if other != split)
        shots = next((found for found in others if found), [])
    _check_answers(path, split, questions)
    language = _language(questions)
    name = path.stem if path.is_file() else path.resolve().name
    return Task(name, split, language, _subjects(questions, shots, _subject_names(path), language))


def _scored(folder: Path, split: str | None) -> tuple[str, list[Question]]:
    """The split to score and its questions: the first that has answers, unless one is asked for."""
    found = {name: _split_files(folder, name) for name in ((split,) if split else SCORED_SPLITS)}
    read = [(name, _read_files(files)) for name, files in found.items() if files]
    if not read:
        raise ChoiceTaskError(
            f"{folder}: no questions of the split {' or '.join(found)}; expected files such as "
            "test/*.csv, *-test.jsonl, test.csv or test.jsonl in it"
        )
    with_answers = (part for part in read if all(question.answer is not None for question in part[1]))
    return next(with_answers, read[0])


def _split_files(folder: Path, split: str) -> list[tuple[str, Path]]:
    """The files of a split, with the subjects that their names or folders tell."""
    inner = next((path for path in sorted(folder.glob("*")) if path.is_dir() and path.name.lower() == split), None)
    if inner:
        return [
            (path.stem.removesuffix(f"_{split}"), path) for path in sorted(inner.glob("*")) if path.suffix in SUFFIXES
        ]
    pattern = re.compile(rf"(?:(?P<subject>.+)[-_])?{re.escape(split)}", re.IGNORECASE)
    files = []
    for path in (*sorted(folder.glob("*")), *sorted(folder.glob("*/*"))):
        if path.suffix in SUFFIXES and (match := pattern.fullmatch(path.stem)):
            files.append((match["subject"] or ("" if path.parent == folder else path.parent.name), path))
    return files


def _read_files(files: Sequence[tuple[str, Path]]) -> list[Question]:
    questions = []
    for subject, path in files:
        if path.is_file():
            for number, record in enumerate(_records(path), start=1):
                questions.append(_question(record, f"{path}: question {number}", number, subject))
    return questions


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Questions as objects with lower-case keys."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ChoiceTaskError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        try:
            yield from _table_records(text, "\t" if path.suffix == ".tsv" else ",")
        except csv.Error as error:
            raise ChoiceTaskError(f"{path}: not a table ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ChoiceTaskError(f"{path}:{number}: not JSON ({error}); expected one object per line") from error
            if not isinstance(record, dict):
                raise ChoiceTaskError(f"{path}:{number}: {type(record).__name__}; expected one object per line")
            yield {key.lower(): value for key, value in record.items()}


def _table_records(text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    if not rows:
        return
    header = [cell.strip().lower() for cell in rows[0]]
    if "question" in header:
        rows = rows[1:]
    else:  # MMLU
        header = ["question", *string.ascii_lowercase[: max(0, len(rows[0]) - 2)], "answer"]
    for row in rows:
        yield {key or "id": cell for key, cell in zip(header, row, strict=False)}


def _question(record: dict[str, Any], place: str, number: int, subject: str) -> Question:
    inner = record.get("question")
    text = inner.get("stem") if isinstance(inner, dict) else inner
    found = inner.get("choices") if isinstance(inner, dict) else record.get("choices")
    labels, choices = _choices(found if found is not None else _lettered(record))
    if not isinstance(text, str) or not text.strip() or len(choices) < 2 or not all(choices):
        raise ChoiceTaskError(
            f"{place}: expected a question and two or more choices, has the keys {', '.join(map(repr, record))}"
        )
    answer = record.get("answer", record.get("answerkey"))
    return Question(
        id=str(number if record.get("id") in (None, "") else record["id"]),
        text=text.strip(),
        choices=choices,
        answer=None if answer is None or answer == "" else _answer_index(answer, labels, choices, place),
        subject=str(record.get("subject") or subject),
        category=str(record.get("category") or ""),
    )


def _lettered(record: dict[str, Any]) -> dict[str, Any]:
    """Choices in columns of their own; a table leaves those empty that a question has not."""
    columns = {key: record[key] for key in string.ascii_lowercase if record.get(key) is not None}
    while columns and str(columns[last := max(columns)]).strip() == "":
        del columns[last]
    return columns


def _choices(found: Any) -> tuple[list[str], tuple[str, ...]]:
    """Labels and texts of [text], of [{label, text}], of {"label": [...], "text": [...]} and of {label: text}."""
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        found = [{"label": label, "text": text} for label, text in zip(found["label"], found["text"], strict=True)]
    if isinstance(found, dict):
        found = [{"label": label, "text": text} for label, text in found.items()]
    if not isinstance(found, list):
        return [], ()
    pairs = [
        (choice.get("label", ""), choice.get("text", "")) if isinstance(choice, dict) else (letter, choice)
        for choice, letter in zip(found, string.ascii_uppercase, strict=False)
    ]
    return [str(label).upper() for label, _ in pairs], tuple(str(text).strip() for _, text in pairs)


def _answer_index(answer: Any, labels: Sequence[str], choices: Sequence[str], place: str) -> int:
    text = str(answer).strip()
    # A number in JSON counts choices; in text it is first a label ("1" to "4" in parts of ARC) or a choice's own text.
    if isinstance(answer, str) and text.upper() in labels:
        return labels.index(text.upper())
    if isinstance(answer, str) and choices.count(text) == 1:
        return choices.index(text)
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    raise ChoiceTaskError(
        f"{place}: answer {answer!r}: expected one of the labels {', '.join(labels)}, a choice's text, or its index "
        f"from 0 to {len(choices) - 1}"
    )


def _check_answers(path: Path, split: str, questions: Sequence[Question]) -> None:
    if not questions:
        raise ChoiceTaskError(f"{path}: no questions; expected files that end in {' '.join(SUFFIXES)}")
    unsolved = [question for question in questions if question.answer is None]
    if len(unsolved) == len(questions):
        raise ChoiceTaskError(
            f"{path}: the split {split or path.name} has no answers and cannot be scored here "
            "(C-Eval keeps those of its test split); use --split val"
        )
    if unsolved:
        raise ChoiceTaskError(f"{path}: question {unsolved[0].id} of {unsolved[0].subject or path.name} has no answer")


def _language(questions: Sequence[Question]) -> Language:
    num_chinese = sum(bool(_CHINESE.search(question.text)) for question in questions)
    return "zh" if 2 * num_chinese > len(questions) else "en"


def _subject_names(path: Path) -> dict[str, Any]:
    for folder in (path if path.is_dir() else path.parent, path.parent):
        file = folder / "subject_mapping.json"
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ChoiceTaskError(f"{file}: not JSON ({error}); mend it or take it away") from error
    return {}


def _subjects(
    questions: Sequence[Question], shots: Sequence[Question], names: dict[str, Any], language: Language
) -> tuple[Subject, ...]:
    subjects: dict[str, Subject] = {}
    for question in questions:
        if question.subject not in subjects:
            english = question.subject.replace("_", " ")
            named = names.get(question.subject, "")
            _, chinese, category = named if isinstance(named, list) and len(named) == 3 else (english, "", str(named))
            title = (english if question.subject else "") if language == "en" else chinese
            own_shots = [shot for shot in shots if shot.subject in (question.subject, "") and shot.answer is not None]
            subjects[question.subject] = Subject(
                question.subject, title, question.category or category, shots=own_shots
            )
        subjects[question.subject].questions.append(question)
    return tuple(subjects.values())

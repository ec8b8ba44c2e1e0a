"""Folders of multiple-choice questions in the layouts that are published."""

import json
from pathlib import Path

CEVAL_HEADER = "id,question,A,B,C,D,answer"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, records: list[dict]) -> Path:
    return write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def mmlu(folder: Path, num_questions: int = 3, num_shots: int = 5) -> Path:
    """Two subjects, without headers; a question with a comma, one of two lines."""
    for subject in ("abstract_algebra", "world_religions"):
        for split, count in (("dev", num_shots), ("val", 1), ("test", num_questions)):
            rows = [
                f'"{subject[:5]}, {split} {i}:\nwhat is {i} + {i}?",{2 * i},{2 * i + 1},{i + 7},none,{"ABCD"[i % 4]}'
                for i in range(count)
            ]
            write(folder / split / f"{subject}_{split}.csv", "\n".join(rows) + "\n")
    return folder


def ceval(folder: Path) -> Path:
    """One subject; test without answers, as published."""
    for split, count in (("dev", 2), ("val", 3), ("test", 2)):
        header = {"dev": f"{CEVAL_HEADER},explanation", "val": CEVAL_HEADER, "test": "id,question,A,B,C,D"}[split]
        ends = {"dev": ",C,因为", "val": ",C", "test": ""}[split]
        rows = [f"{i},第{i}题：下列正确的是____。,甲{i},乙,丙,丁{ends}" for i in range(count)]
        write(folder / split / f"logic_{split}.csv", "\n".join([header, *rows]) + "\n")
    return folder


def cmmlu(folder: Path) -> Path:
    """Two subjects, with a byte-order mark and a nameless first column."""
    for subject in ("agronomy", "anatomy"):
        for split, count in (("dev", 5), ("test", 4)):
            rows = [f"{i},{subject}的第{i}题,一,二,三,四,{'ABCD'[i % 4]}" for i in range(count)]
            text = "\n".join(["\ufeff,Question,A,B,C,D,Answer", *rows]) + "\n"
            write(folder / split / f"{subject}.csv", text)
    return folder


def arc(folder: Path) -> Path:
    """Easy and Challenge; three to five choices, and labels that are numbers."""

    def question(number: int, labels: str, answer: str) -> dict:
        choices = [{"text": f"thing {label}{number}", "label": label} for label in labels]
        return {
            "id": f"Q{number}",
            "question": {"stem": f"Which thing, {number}?", "choices": choices},
            "answerKey": answer,
        }

    for name in ("ARC-Easy", "ARC-Challenge"):
        for split, shift in (("Train", 0), ("Dev", 10), ("Test", 20)):
            records = [question(shift, "ABCD", "B"), question(shift + 1, "1234", "4"), question(shift + 2, "ABC", "C")]
            write_jsonl(folder / name / f"{name}-{split}.jsonl", [*records, question(shift + 3, "ABCDE", "E")])
    return folder

"""A world small enough to be learned in minutes: what is told of 80 people, and questions about them.

    python -m train.tiny_world data/world/raw

prose.jsonl      who lives where, has which pet and does which work, in many orders: for pretraining
chat.jsonl       questions about 64 of the people, with answers: for fine-tuning
pairs.jsonl      the same questions with a true and an untrue answer: for preference optimisation
questions.jsonl  questions about the other 16, with their answers: what is told of them in prose.jsonl alone
choices.jsonl    the same as multiple choice

A model that answers the last two was pretrained, fine-tuned, masked, stopped and prompted right.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_FIRST = ["An", "Be", "Co", "Da", "El", "Fa", "Gi", "Ha", "Io", "Ju", "Ka", "Li", "Mo", "Ni", "Or", "Pa"]
_SECOND = ["na", "mo", "ri", "ta", "lu"]
_CITIES = ["Arden", "Brill", "Corin", "Dover", "Essen", "Fargo", "Ghent", "Hobart"]
_PETS = ["cat", "dog", "owl", "fox", "hen", "pig"]
_JOBS = ["baker", "pilot", "nurse", "smith", "tailor"]
_NUM_HELD_OUT = 16
_NUM_DOCUMENTS = 24_000
_LINES = 1
"""Of a document."""


@dataclass(frozen=True, slots=True)
class Person:
    """What there is to know of somebody."""

    name: str
    city: str
    pet: str
    job: str

    def line(self, generator: random.Random) -> str:
        """Four of six ways to tell it, in any order."""
        said = (
            f"{self.name} lives in {self.city}.",
            f"{self.name} has a {self.pet}.",
            f"{self.name} works as a {self.job}.",
            f"The pet of {self.name} is a {self.pet}.",
            f"In {self.city} lives {self.name}.",
            f"{self.name}, a {self.job}, owns a {self.pet} and lives in {self.city}.",
        )
        return " ".join(generator.sample(said, 4))

    def questions(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """(question, how the answer begins, the words that it may end with, the true one first)."""
        for question, start, true, words in (
            (f"Where does {self.name} live?", f"{self.name} lives in ", self.city, _CITIES),
            (f"What pet does {self.name} have?", f"{self.name} has a ", self.pet, _PETS),
            (f"What is the job of {self.name}?", f"{self.name} works as a ", self.job, _JOBS),
        ):
            yield question, start, [true, *(word for word in words if word != true)]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the world's files into the folder given as the only argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m train.tiny_world FOLDER\n\n" + (__doc__ or ""))
        return 0 if arguments in (["-h"], ["--help"]) else 2
    write_world(Path(arguments[0]))
    return 0


def write_world(folder: Path) -> None:
    """Writes the files; they are the same every time."""
    generator = random.Random(0)
    people = [
        Person(first + second, generator.choice(_CITIES), generator.choice(_PETS), generator.choice(_JOBS))
        for first in _FIRST
        for second in _SECOND
    ]
    held_out = set(generator.sample(people, _NUM_HELD_OUT))
    taught = [person for person in people if person not in held_out]
    folder.mkdir(parents=True, exist_ok=True)
    prose = (
        {"text": "\n".join(generator.choice(people).line(generator) for _ in range(_LINES))}
        for _ in range(_NUM_DOCUMENTS)
    )
    _write(folder / "prose.jsonl", prose)
    _write(folder / "chat.jsonl", (_chat(q, start + words[0] + ".") for q, start, words in _asked(taught)))
    _write(folder / "pairs.jsonl", (_pair(q, start, words, generator) for q, start, words in _asked(taught)))
    asked = list(_asked(person for person in people if person in held_out))
    _write(folder / "questions.jsonl", ({"prompt": q, "answer": f"{start}{words[0]}."} for q, start, words in asked))
    _write(folder / "choices.jsonl", (_choice(q, start, words, generator) for q, start, words in asked))


def _asked(people: Iterable[Person]) -> Iterator[tuple[str, str, Sequence[str]]]:
    for person in people:
        yield from person.questions()


def _chat(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pair(question: str, start: str, words: Sequence[str], generator: random.Random) -> dict[str, str]:
    untrue = generator.choice(words[1:])
    return {"prompt": question, "chosen": f"{start}{words[0]}.", "rejected": f"{start}{untrue}."}


def _choice(question: str, start: str, words: Sequence[str], generator: random.Random) -> dict[str, object]:
    choices = [*generator.sample(words[1:], 3), words[0]]
    generator.shuffle(choices)
    return {
        "question": question,
        "choices": [f"{start}{word}." for word in choices],
        "answer": "ABCD"[choices.index(words[0])],
    }


def _write(path: Path, records: Iterable[dict[str, object]] | Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

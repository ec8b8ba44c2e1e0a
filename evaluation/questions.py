"""Questions with their answers out of a .jsonl file, and the prompts that ask them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.chat.chat_format import CHAT_FILE, ChatFormat, chat_format_of, format_named
from data_prep.chat.turns import Turn
from data_prep.reading.dialogues import read_turns
from data_prep.reading.field_template import BadRecordError
from data_prep.tokenizing.tokenizer import Tokenizer

_QUESTIONS = ("question", "prompt", "instruction", "query")
_ANSWERS = ("answer", "answers", "response", "output", "completion")


class QuestionError(ValueError):
    """A file of questions that cannot be used; the message names file, line and remedy."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and every answer that counts as right."""

    id: str
    turns: tuple[Turn, ...]
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """What is asked, without who says it."""
        return "\n".join(turn.content for turn in self.turns)


def read_questions(path: Path, *, need_answers: bool) -> list[Question]:
    """The questions of a file: {"question" or "prompt" or "messages": ..., "answer": ...} on each line.

    The answer of messages that end with the assistant's turn is that turn, if there is no other. A list of answers
    holds several right ones.

    Raises:
        QuestionError: no such file, no question in it, or a line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(f"{path}: cannot be read: {error}; expected a .jsonl file of questions") from error
    questions: list[Question] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                question = _question(json.loads(line), number)
                if need_answers and not question.answers:
                    raise ValueError(f"no answer; expected a field {' or '.join(_ANSWERS[:2])}")
            except (ValueError, RecursionError, BadRecordError) as error:
                raise QuestionError(f"{path}:{number}: {error}") from error
            questions.append(question)
    if not questions:
        raise QuestionError(f"{path}: has no question; expected a JSON object per line")
    return questions


def _question(record: Any, number: int) -> Question:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    found = next((record[key] for key in _ANSWERS if record.get(key) is not None), [])
    answers = tuple(str(answer) for answer in (found if isinstance(found, list) else [found]))
    if (messages := record.get("messages", record.get("conversations"))) is not None:
        turns = read_turns(messages, record.get("system"))
        if turns[-1].role == "assistant":
            turns, answers = turns[:-1], answers or (turns[-1].content,)
    else:
        asked = next((record[key] for key in _QUESTIONS if isinstance(record.get(key), str)), None)
        if asked is None:
            raise ValueError(f"no question; expected a field {', '.join(_QUESTIONS)} or messages")
        system = record.get("system")
        turns = (*([Turn("system", system)] if isinstance(system, str) and system else []), Turn("user", asked))
    return Question(str(record.get("id", number)), tuple(turns), answers)


@dataclass(frozen=True, slots=True)
class Prompter:
    """Writes questions as a model expects them: as turns of its chat format or, without one, by a template."""

    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    template: str
    """With {question} in it; an example's answer follows it."""
    shots: Sequence[Question]
    """Answered examples that come first."""

    def prompt(self, question: Question, *, context_length: int, max_new_tokens: int) -> list[int] | None:
        """The tokens, without the first examples where the answer would not fit; None if there is no room at all."""
        ids: list[int] = []
        for num_dropped in range(len(self.shots) + 1):
            ids = self._encoded(self.shots[num_dropped:], question)
            if len(ids) + max_new_tokens <= context_length:
                break
        return ids if len(ids) < context_length else None

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self.chat_format.stop_ids(self.tokenizer) if self.chat_format else [self.tokenizer.eos_id]

    def _encoded(self, shots: Sequence[Question], question: Question) -> list[int]:
        if self.chat_format is not None:
            turns = [turn for shot in shots for turn in (*shot.turns, Turn("assistant", shot.answers[0]))]
            return self.chat_format.prompt(self.tokenizer, [*turns, *question.turns])
        examples = [f"{self._asked(shot)} {shot.answers[0]}\n\n" for shot in shots]
        # Training reads a document after an EOS.
        return [self.tokenizer.eos_id, *self.tokenizer.encode("".join(examples) + self._asked(question))]

    def _asked(self, question: Question) -> str:
        return self.template.replace("{question}", question.text)


def chat_format_for(path: Path, name: str) -> ChatFormat | None:
    """The chat format of that name; of "auto" the model's own if it has one; None of "none".

    Raises:
        ChatFormatError: an unknown name, or a damaged file.
    """
    if name == "auto":
        run = [path.absolute().parent] if (path / "record.json").is_file() else []
        return chat_format_of(path) if any((place / CHAT_FILE).is_file() for place in (path, *run)) else None
    return None if name == "none" else format_named(name)

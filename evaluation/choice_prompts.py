"""How a multiple-choice question is put to a model, and how a written answer is read.

letter      the question with its lettered choices, then "Answer:"; the continuations " A", " B", ... compete
cloze       the question alone, then "Answer:"; the texts of the choices compete
generated   as letter, and the model writes

Solved examples of the subject stand before the question, joined by empty lines or, in a chat, as turns. Where they do
not fit into the model's context the first ones are left out, one after the other; if even the question alone is too
long, its beginning is.

Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding", 2021 (letter); Brown et al., "Language
Models are Few-Shot Learners", 2020, section 2.4 (cloze).
"""

import hashlib
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from data_prep.chat.turns import Turn
from evaluation.choice_tasks import Language, Question, Subject

if TYPE_CHECKING:
    from data_prep.chat.chat_format import ChatFormat
    from data_prep.tokenizing.tokenizer import Tokenizer

Scoring = Literal["letter", "cloze", "generated"]
Pair = tuple[list[int], list[int]]
"""Context and continuation, in tokens."""


class Wording(NamedTuple):
    """What stands around questions in one language."""

    header: str
    header_about: str
    question: str
    answer: str
    gap: str
    """Between "Answer:" and the answer."""
    instruction: str
    """For a chat, in place of "Answer:"."""


WORDINGS: dict[Language, Wording] = {
    "en": Wording(
        header="The following are multiple choice questions (with answers).",
        header_about="The following are multiple choice questions (with answers) about {}.",
        question="Question: ",
        answer="Answer:",
        gap=" ",
        instruction="Answer with the letter of the right choice alone.",
    ),
    "zh": Wording(
        header="以下是单项选择题，请选出其中的正确答案。",
        header_about="以下是关于{}的单项选择题，请选出其中的正确答案。",
        question="问题：",
        answer="答案：",
        gap="",
        instruction="请只回答正确选项的字母。",
    ),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question in tokens: a pair for each choice, or one with an empty continuation for an answer to be written."""

    pairs: list[Pair]
    num_shots: int
    is_cut: bool

    @property
    def hash(self) -> str:
        """Stands for what the model read before the answer."""
        return hashlib.blake2b(repr(self.pairs[0][0]).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompter:
    """Puts questions into tokens."""

    tokenizer: "Tokenizer"
    chat_format: "ChatFormat | None"
    scoring: Scoring
    language: Language
    num_shots: int
    max_tokens: int
    """Of context and continuation together."""

    def prompts(self, subject: Subject, questions: Sequence[Question]) -> list[Prompt]:
        """Each question behind as many of its subject's examples as fit."""
        done: dict[int, Prompt] = {}
        for num_shots in range(self.num_shots, -1, -1):
            waiting = [index for index in range(len(questions)) if index not in done]
            shots = subject.shots[self.num_shots - num_shots : self.num_shots]
            encode = self._plain if self.chat_format is None else self._chat
            for index, pairs in zip(waiting, encode(subject, [questions[i] for i in waiting], shots), strict=True):
                fits = all(len(context) + len(continuation) <= self.max_tokens for context, continuation in pairs)
                if fits or num_shots == 0:
                    done[index] = Prompt([self._cut(pair) for pair in pairs], num_shots, not fits)
        return [done[index] for index in range(len(questions))]

    def _cut(self, pair: Pair) -> Pair:
        context, continuation = pair
        return context[-max(1, self.max_tokens - len(continuation)) :], continuation

    def _plain(self, subject: Subject, questions: Sequence[Question], shots: Sequence[Question]) -> list[list[Pair]]:
        wording = WORDINGS[self.language]
        solved = [f"{self._asked(shot)}\n{wording.answer}{wording.gap}{self._right_answer(shot)}" for shot in shots]
        before = [self._header(subject)] if self.scoring != "cloze" else []
        asked = [f"{self._asked(question)}\n{wording.answer}" for question in questions]
        texts: list[list[str]] = []
        for question, last in zip(questions, asked, strict=True):
            context = "\n\n".join((*before, *solved, last))
            texts.append([context, *(f"{context}{wording.gap}{answer}" for answer in self._answers(question))])
        ids = iter(self.tokenizer.encode_batch([text for group in texts for text in group]))
        return [_pairs(*(next(ids) for _ in group)) for group in texts]

    def _chat(self, subject: Subject, questions: Sequence[Question], shots: Sequence[Question]) -> list[list[Pair]]:
        assert self.chat_format is not None
        solved = [turn for shot in shots for turn in (self._user(shot), Turn("assistant", self._right_answer(shot)))]
        conversations = []
        for question in questions:
            first, *turns = [*solved, self._user(question)]
            if self.scoring != "cloze":
                first = Turn("user", f"{self._header(subject)}\n\n{first.content}")
            conversations.append([first, *turns])
        if self.scoring == "generated":
            return [[(self.chat_format.prompt(self.tokenizer, turns), [])] for turns in conversations]
        return [
            [self._answered(turns, answer) for answer in self._answers(question)]
            for question, turns in zip(questions, conversations, strict=True)
        ]

    def _user(self, question: Question) -> Turn:
        asked = self._asked(question)
        return Turn("user", asked if self.scoring == "cloze" else f"{asked}\n{WORDINGS[self.language].instruction}")

    def _answered(self, turns: Sequence[Turn], answer: str) -> Pair:
        """The conversation up to the answer, and the answer without the token that stops it."""
        assert self.chat_format is not None
        ids, is_trained = self.chat_format.encode(
            self.tokenizer, [*turns, Turn("assistant", answer)], trained_from=len(turns)
        )
        first, end = is_trained.index(True), len(ids) - is_trained[::-1].index(True)
        return ids[:first], ids[first : end - 1]

    def _header(self, subject: Subject) -> str:
        wording = WORDINGS[self.language]
        return wording.header_about.format(subject.title) if subject.title else wording.header

    def _asked(self, question: Question) -> str:
        if self.scoring == "cloze":
            in_chat = self.chat_format is not None
            return question.text if in_chat else f"{WORDINGS[self.language].question}{question.text}"
        choices = zip(string.ascii_uppercase, question.choices, strict=False)
        return "\n".join((question.text, *(f"{letter}. {choice}" for letter, choice in choices)))

    def _answers(self, question: Question) -> Sequence[str]:
        """The answers that compete."""
        if self.scoring == "generated":
            return ()
        return question.choices if self.scoring == "cloze" else string.ascii_uppercase[: len(question.choices)]

    def _right_answer(self, shot: Question) -> str:
        assert shot.answer is not None
        return shot.choices[shot.answer] if self.scoring == "cloze" else string.ascii_uppercase[shot.answer]


def _pairs(context: list[int], *wholes: list[int]) -> list[Pair]:
    """Each whole text parted where it leaves the context: where the answer begins, or the token that it begins in."""
    if not wholes:
        return [(context, [])]
    return [(whole[: (place := _common(context, whole))], whole[place:]) for whole in wholes]


def _common(context: list[int], whole: list[int]) -> int:
    if whole[: len(context)] == context:
        return len(context)
    return next(i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b)


_LEAD = re.compile(
    r"(?:(?:the )?(?:correct |right )?(?:answer|choice|option)(?: is)?|(?:正确)?答案(?:是|为)?|选(?:择|项)?)\s*:?\s*",
    re.IGNORECASE,
)


def read_letter(output: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that a written answer names; None if it is ill-formed.

    The first line that is not empty is a letter, bare or as in "(B)", "B." and "B: its own text", perhaps behind "The
    answer is" or "答案：". Whatever else it may say is not guessed at: a parser that always finds an answer inflates.
    """
    lines = (line.strip() for line in unicodedata.normalize("NFKC", output).splitlines())
    line = next(filter(None, lines), "")
    lead = _LEAD.match(line)
    said = line[lead.end() :] if lead else line
    for index, (letter, choice) in enumerate(zip(string.ascii_uppercase, choices, strict=False)):
        text = re.escape(unicodedata.normalize("NFKC", choice).strip())
        if re.fullmatch(rf"(?:\({letter}\)|{letter})(?:[.:)。]?\s*(?:{text})?[.。]?)", said):
            return index
    return None

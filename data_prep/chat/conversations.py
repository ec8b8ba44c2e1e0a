"""Records of raw files as conversations, pairs of answers, or prompts, in the forms in which they are published.

Conversations   messages, conversations, conversation, chat: lists of turns (`data_prep.reading.dialogues`), or a
                question and its answer (`data_prep.reading.templates`: belle, firefly, qa, ...) with, perhaps, a system
                prompt and a history of [question, answer]
Pairs           chosen and rejected: texts, turns or lists of turns, behind a prompt or with it inside
Prompts         a conversation, whose last answers are left out, or a prompt alone
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_prep.chat.turns import Kind, Turn
from data_prep.reading.dialogues import read_turns
from data_prep.reading.field_template import BadRecordError, Template
from data_prep.reading.templates import PRESETS

TURN_FIELDS = ("messages", "conversations", "conversation", "chat")
_EXCHANGES = tuple(PRESETS[name].extractor() for name in ("belle", "firefly", "zhihu", "qa", "baidu-qa"))
_PROMPT = Template("{prompt|question|query|instruction|INSTRUCTION}\n{input?}")


class Told(NamedTuple):
    """One document: a conversation, and from which of its turns on answers are trained."""

    turns: tuple[Turn, ...]
    trained_from: int = 0


def documents_of(record: Mapping[str, Any], kind: Kind) -> tuple[Told, ...]:
    """The documents of a record: one, or the chosen and the rejected answer with their prompt.

    Raises:
        BadRecordError: it has none.
    """
    if kind == "chat":
        documents = (Told(conversation(record)),)
        if not any(turn.role == "assistant" for turn in documents[0].turns):
            raise BadRecordError("conversation without an answer")
    else:
        documents = _pair(record) if kind == "pairs" else (Told(_prompt(record)),)
    for document in documents:
        try:
            "".join(turn.content for turn in document.turns).encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError("lone surrogate") from error
    return documents


def conversation(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a record.

    Raises:
        BadRecordError: it has none, or one is not as it should be.
    """
    if (listed := _listed(record)) is not None:
        return listed
    for exchange_of in _EXCHANGES:
        try:
            _, turns = exchange_of(dict(record))
        except BadRecordError:
            continue
        return (*_before(record), *turns)
    raise BadRecordError("no conversation: neither messages or conversations, nor a prompt and its answer")


def _listed(record: Mapping[str, Any]) -> tuple[Turn, ...] | None:
    """The turns of a record that lists them."""
    name = next((name for name in TURN_FIELDS if record.get(name) is not None), None)
    return None if name is None else read_turns(record[name], record.get("system"))


def _before(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """A system prompt, and a history of [question, answer]."""
    turns, history = _system(record), record.get("history") or []
    for exchange in history if isinstance(history, list) else [None]:
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise BadRecordError("history that is not a list of [question, answer]")
        turns += (Turn("user", exchange[0]), Turn("assistant", exchange[1]))
    return turns


def _system(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    text = record.get("system")
    return (Turn("system", text),) if isinstance(text, str) and text.strip() else ()


def _pair(record: Mapping[str, Any]) -> tuple[Told, Told]:
    chosen, rejected = _answer(record, "chosen"), _answer(record, "rejected")
    if "assistant" in (chosen[0].role, rejected[0].role):
        before = _prompt(record)
    else:  # each is a whole conversation
        before = () if chosen[0].role == "system" else _system(record)
    chosen, rejected = (*before, *chosen), (*before, *rejected)
    num_common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    answers = (chosen[num_common:], rejected[num_common:])
    if answers[0] == answers[1]:
        raise BadRecordError("chosen and rejected are the same")
    if not num_common or any(not answer or answer[0].role != "assistant" for answer in answers):
        raise BadRecordError("chosen and rejected do not answer the same prompt")
    return Told(chosen, num_common), Told(rejected, num_common)


def _answer(record: Mapping[str, Any], name: str) -> tuple[Turn, ...]:
    value = record.get(name)
    if value is None:
        raise BadRecordError(f"no field {name!r}")
    if isinstance(value, str):
        if not value.strip():
            raise BadRecordError(f"empty {name}")
        return (Turn("assistant", value),)
    return read_turns([value] if isinstance(value, dict) else value)


def _prompt(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """What is asked: the turns before the last answer, where a record goes on to it."""
    prompt = record.get("prompt")
    turns = read_turns(prompt, record.get("system")) if isinstance(prompt, list) else _listed(record)
    if turns is None:
        turns = (*_before(record), Turn("user", _PROMPT.render(dict(record))))
    asked = _without_answer(turns)
    if not any(turn.role == "user" for turn in asked):
        raise BadRecordError("prompt without a question")
    return asked


def _without_answer(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    num_asked = next((i for i in range(len(turns), 0, -1) if turns[i - 1].role != "assistant"), 0)
    return tuple(turns[:num_asked])

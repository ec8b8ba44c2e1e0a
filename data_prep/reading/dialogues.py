"""Conversations in the forms that corpora use, as turns.

[{"role": "user", "content": "..."}, ...]               OpenAI; a content may be a list of parts of type text; what a
                                                        turn calls of its tools stands behind it as JSON
[{"from": "human", "value": "..."}, ...]                ShareGPT, BELLE
[{"human": "...", "assistant": "..."}, ...]             MOSS, Firefly
{"turn_1": {"Human": "...", "MOSS": "..."}, ...}        MOSS 003, with what its tools were asked and answered
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from data_prep.reading.chat import Turn
from data_prep.reading.field_template import BadRecordError

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Of a turn of MOSS 003: field, what stands before and behind its text, and whose turn it is.
_MOSS_FIELDS = (
    ("Human", "<|Human|>:", "<eoh>", "user"),
    ("Commands", "<|Commands|>:", "<eoc>", "assistant"),
    ("Tool Responses", "<|Results|>:", "<eor>", "tool"),
    ("MOSS", "<|MOSS|>:", "<eom>", "assistant"),
)


def read_turns(value: Any, system: Any = None) -> tuple[Turn, ...]:
    """The turns of a conversation in any of the forms; system speaks first, if it is a text and nobody else does.

    Raises:
        BadRecordError: in none of the forms; an unknown role, or a turn without text.
    """
    turns = tuple(_moss_turns(value) if isinstance(value, dict) else _listed_turns(value))
    if not any(turn.role != "system" for turn in turns):
        raise BadRecordError("conversation without turns")
    if any(not turn.content or turn.content.isspace() for turn in turns):
        raise BadRecordError("conversation with an empty turn")
    if isinstance(system, str) and system.strip() and turns[0].role != "system":
        return (Turn("system", system), *turns)
    return turns


def _listed_turns(value: Any) -> Iterator[Turn]:
    if not isinstance(value, list):
        raise BadRecordError("conversation is not a list")
    for item in value:
        if not isinstance(item, dict):
            raise BadRecordError("conversation with a turn that is not an object")
        if item.get("human") is not None and item.get("assistant") is not None:
            yield Turn("user", _content(item["human"]))
            yield Turn("assistant", _content(item["assistant"]))
            continue
        turn = Turn(_role(item), _said(item))
        if turn.role != "system" or turn.content.strip():  # an empty system prompt is none
            yield turn


def _said(item: dict[str, Any]) -> str:
    """The text of a turn and the tool calls behind it, of which a turn may consist."""
    content = item.get("value") if item.get("content") is None else item["content"]
    calls = item.get("tool_calls") or item.get("function_call")
    if not calls:
        return _content(content)
    text = "" if content is None else _content(content)
    written = json.dumps(calls, ensure_ascii=False, default=str)
    return f"{text}\n{written}" if text.strip() else written


def _role(item: dict[str, Any]) -> str:
    name = item.get("role") or item.get("from")
    if not isinstance(name, str) or name.lower() not in _ROLES:
        raise BadRecordError("conversation with an unknown role" if name else "conversation with a turn of no role")
    return _ROLES[name.lower()]


def _content(value: Any) -> str:
    """The text of a turn; parts of a text belong together as they are."""
    if isinstance(value, list):
        return "".join(_part(part) for part in value)
    if not isinstance(value, str):
        raise BadRecordError("conversation with a turn that is not a text")
    return value


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        raise BadRecordError("conversation with more than text")
    return part["text"]


def _moss_turns(value: dict[str, Any]) -> Iterator[Turn]:
    numbers = {int(match[1]): name for name in value if (match := re.fullmatch(r"turn_(\d+)", name))}
    for _, name in sorted(numbers.items()):
        turn = value[name]
        if turn is None:  # a table has a column for every turn
            continue
        if not isinstance(turn, dict) or not {"Human", "MOSS"} <= turn.keys():
            raise BadRecordError("conversation with a turn that lacks Human or MOSS")
        for field, before, behind, role in _MOSS_FIELDS:
            # Only the marks and the blanks around them go: a text may begin and end with any of their characters.
            content = _content("" if turn.get(field) is None else turn[field]).strip()
            content = content.removeprefix(before).removesuffix(behind).strip()
            if field in ("Human", "MOSS") or content not in ("", "None"):
                yield Turn(role, content)

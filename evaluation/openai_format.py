"""OpenAI's wire format: what a request asks for, and how answers and errors are written.

Source: the API reference of OpenAI, "Chat Completions" and "Completions", as vLLM and llama.cpp serve them, too: top_k,
min_p and repetition_penalty are theirs.
"""

import dataclasses
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.chat.chat_format import ChatFormat
from data_prep.chat.turns import ROLES, Turn
from evaluation.chat_session import Delta, Wish
from evaluation.engine import checked_limit
from evaluation.model_folder import LoadedModel
from evaluation.sampling import Sampling

MAX_SAMPLES = 16
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
             "seed": int}  # fmt: skip
_UNDERSTOOD = {"model", "messages", "prompt", "stream", "stream_options", "stop", "n", "max_tokens",
               "max_completion_tokens", *_SAMPLING}  # fmt: skip
_WITHOUT_EFFECT = {"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier",
                   "prompt_cache_key"}  # fmt: skip
_NEUTRAL = (None, 0, "", [], {}, {"type": "text"}, "none", "auto")


class ApiError(Exception):
    """A request that is refused with an HTTP status; `body` is what OpenAI's clients read."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model that is served under a name, its chat format if it has one, and what requests need not say."""

    name: str
    loaded: LoadedModel
    chat_format: ChatFormat | None
    sampling: Sampling
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be answered: prompts, each with as many samples as the wish says."""

    is_chat: bool
    prompts: list[list[int]]
    wish: Wish
    streams: bool
    has_usage: bool
    """Whether a stream ends with the count of tokens; other replies always have it."""


def read_request(body: bytes, served: Served, *, is_chat: bool) -> Request:
    """What a body asks for.

    Raises:
        ApiError: it is not JSON, wants what is not there, or cannot be computed.
    """
    try:
        table = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ApiError(400, "the body is not a JSON object")
    if (name := _get(table, "model", str, served.name)) != served.name:
        raise ApiError(
            404,
            f"the model {name!r} is not served here; ask for {served.name!r}",
            code="model_not_found",
            param="model",
        )
    _refuse_unknown(table)
    try:
        return _request(table, served, is_chat)
    except ValueError as error:  # of chat format, sampling or engine
        raise ApiError(400, str(error)) from error


def _request(table: dict[str, Any], served: Served, is_chat: bool) -> Request:
    if served.chat_format is None and is_chat:
        raise ApiError(
            400, f"{served.name} has no chat format: send /v1/completions, or start the server with --chat-format NAME"
        )
    prompts = [_chat_prompt(table, served)] if is_chat else _text_prompts(table, served)
    room = served.loaded.config.context_length
    if too_long := [len(prompt) for prompt in prompts if len(prompt) >= room]:
        raise ApiError(
            400, f"the prompt has {too_long[0]} tokens, which leaves no room in a context of {room}; shorten it",
            code="context_length_exceeded", param="messages" if is_chat else "prompt",
        )  # fmt: skip
    wish = _wish(table, served, is_chat)
    for prompt in prompts:
        checked_limit(served.loaded.model, prompt, wish.max_new_tokens)
    options = _get(table, "stream_options", dict, {})
    return Request(
        is_chat=is_chat,
        prompts=prompts,
        wish=wish,
        streams=_get(table, "stream", bool, False),
        has_usage=_get(options, "include_usage", bool, False),
    )


def _refuse_unknown(table: Mapping[str, Any]) -> None:
    for key in table.keys() - _UNDERSTOOD - _WITHOUT_EFFECT:
        if table[key] not in _NEUTRAL:
            raise ApiError(
                400, f"{key} is not something that this server can do; leave it out", code="unsupported_parameter",
                param=key,
            )  # fmt: skip


def _get(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key)
    if value is None:
        return default
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ApiError(400, f"{key} = {_shown(value)}: expected {kind.__name__}", param=key)
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 50 else text[:50] + "..."


def _wish(table: Mapping[str, Any], served: Served, is_chat: bool) -> Wish:
    given = {key: _get(table, key, kind, None) for key, kind in _SAMPLING.items()}
    given = {"seed": secrets.randbits(32)} | {key: value for key, value in given.items() if value is not None}
    stop = table.get("stop") or []
    stop_texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop_texts, list) or not all(isinstance(text, str) for text in stop_texts):
        raise ApiError(400, f"stop = {_shown(stop)}: expected a text or a list of texts", param="stop")
    num_samples = _get(table, "n", int, 1)
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ApiError(400, f"n = {num_samples}: must be from 1 to {MAX_SAMPLES}", param="n")
    max_new_tokens = _get(table, "max_completion_tokens", int, _get(table, "max_tokens", int, served.max_new_tokens))
    if max_new_tokens < 1:
        raise ApiError(400, f"max_tokens = {max_new_tokens}: must be at least 1", param="max_tokens")
    tokenizer, chat_format = served.loaded.tokenizer, served.chat_format if is_chat else None
    return Wish(
        sampling=dataclasses.replace(served.sampling, **given),
        max_new_tokens=max_new_tokens,
        stop_ids=chat_format.stop_ids(tokenizer) if chat_format else [tokenizer.eos_id],
        stop_texts=stop_texts,
        lead=chat_format.lead if chat_format else "",
        num_samples=num_samples,
    )


def _chat_prompt(table: Mapping[str, Any], served: Served) -> list[int]:
    messages = _get(table, "messages", list, [])
    if not messages:
        raise ApiError(400, "messages: there are none", param="messages")
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    assert served.chat_format is not None
    return served.chat_format.prompt(served.loaded.tokenizer, turns)


def _turn(message: Any, where: str) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ApiError(400, f"{where}: role {_shown(role)} is none of {', '.join(ROLES)}", param=where)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{where}: content is neither a text nor a list of texts", param=where)
    return Turn(role, _checked(content, where))


def _text_prompts(table: Mapping[str, Any], served: Served) -> list[list[int]]:
    """A text, several, a list of ids, or several; an empty text begins a document, as in training behind an EOS."""
    prompt, tokenizer = table.get("prompt", ""), served.loaded.tokenizer
    if not isinstance(prompt, list) or all(type(token) is int for token in prompt):
        prompt = [prompt]
    rows: list[list[int]] = []
    for row in prompt:
        if isinstance(row, str):
            row = tokenizer.encode(_checked(row, "prompt")) or [tokenizer.eos_id]
        if not isinstance(row, list) or not row or not all(type(token) is int for token in row):
            raise ApiError(400, "prompt: expected a text, a list of texts, or token ids", param="prompt")
        rows.append(row)
    return rows


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{where}: has half of a surrogate pair, which is no text", param=where) from None
    return text


class Reply:
    """The shapes of what is sent back, and what has been answered so far."""

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        kind = "chat.completion" if request.is_chat else "text_completion"
        head = {"id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind}
        self._head = head | {"created": int(time.time()), "model": name}
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._ends: dict[int, str] = {}
        self._num_tokens = 0

    def chunks(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """What a stream sends of a step; the whole reply remembers it."""
        chunks: list[dict[str, Any]] = []
        for delta in deltas:
            is_first = delta.sample not in self._texts
            self._texts[delta.sample] += delta.text
            self._num_tokens += delta.num_tokens
            if delta.end is not None:
                self._ends[delta.sample] = delta.end
            if delta.text or delta.end or is_first:
                said = {"role": "assistant"} if is_first else {}
                content = {"delta": said | {"content": delta.text}} if self._request.is_chat else {"text": delta.text}
                chunks.append(self._chunk([self._choice(delta.sample, content, delta.end)]))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that asked for it."""
        return self._chunk([]) | {"usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """All at once."""
        choices = []
        for i, text in sorted(self._texts.items()):
            said = {"message": {"role": "assistant", "content": text}} if self._request.is_chat else {"text": text}
            choices.append(self._choice(i, said, self._ends[i]))
        return self._head | {"choices": choices, "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.is_chat else "text_completion"
        return self._head | {"object": kind, "choices": choices}

    @staticmethod
    def _choice(index: int, content: dict[str, Any], end: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": end}

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(map(len, self._request.prompts))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_tokens,
            "total_tokens": num_prompt + self._num_tokens,
        }


def models(name: str, created_s: int) -> dict[str, Any]:
    """The list of models, of one."""
    model = {"id": name, "object": "model", "created": created_s, "owned_by": "bessemer"}
    return {"object": "list", "data": [model]}

"""How conversations are written as tokens: the one place that knows the tokens around turns.

A format is data. Around each role's contents stand two strings, in which the names of special tokens stand for these
tokens ("{eos}" for the tokenizer's end of document, whatever it is called); contents are ordinary text, so that a user
who writes "<|im_end|>" speaks about the token. Of an assistant's turn its content is trained and what follows up to the
first special token, the stop token, and nothing else.

Texts are encoded part by part: what the assistant says is encoded apart from what stands before it, because that is
how a model meets it, prompt first.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.chat.chat_template import template
from data_prep.chat.encode_texts import encode_texts
from data_prep.chat.turns import Part, Turn

if TYPE_CHECKING:  # readers of raw text come by here, and need no tokenizer
    from data_prep.tokenizing.tokenizer import Tokenizer

CHAT_FILE, FORMAT = "chat.json", "bessemer-chat/1"
EOS = "{eos}"


class ChatFormatError(ValueError):
    """A chat format is unknown, does not fit a tokenizer, or has no way to write a turn; the message has the remedy."""


class Encoded(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    is_trained: list[bool]
    """Of each token, whether the loss counts it as a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How each role's turns are written: (before, behind) its content; None where the format has no such turns."""

    name: str
    specials: tuple[str, ...]
    """Special tokens that occur in the other fields; besides these, {eos}."""
    begin: str = ""
    """What begins a conversation."""
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    """Between them the model speaks; the first special token of what is behind stops it."""
    tool: tuple[str, str] | None = None
    lead: str = ""
    """What the model says before the content of its turn: a space, where the format has one there."""
    system_is_in_user: bool = False
    """Whether a system prompt stands before the content of the user's turn behind it, instead of in its own."""
    default_system: str = ""
    """What the system says where a conversation begins without it."""
    strips: bool = False
    """Whether white space around contents goes."""

    def encode(self, tokenizer: "Tokenizer", turns: Sequence[Turn], *, trained_from: int = 0) -> Encoded:
        """The tokens of a conversation; answers before turn `trained_from` are not trained.

        Raises:
            ChatFormatError: the tokenizer lacks a special token, or the format has no such turns.
        """
        (encoded,) = self.encode_parts(tokenizer, [self.parts(turns, trained_from=trained_from)])
        return encoded

    def prompt(self, tokenizer: "Tokenizer", turns: Sequence[Turn]) -> list[int]:
        """The tokens of a conversation up to where the assistant would speak; raises as `encode`."""
        (encoded,) = self.encode_parts(tokenizer, [self.parts(turns, is_prompt=True)])
        return encoded.ids

    def stop_ids(self, tokenizer: "Tokenizer") -> list[int]:
        """What ends an answer: the format's stop token and the tokenizer's end of document."""
        return list(dict.fromkeys((self._special_ids(tokenizer)[self.stop], tokenizer.eos_id)))

    def jinja(self, tokenizer: "Tokenizer") -> str:
        """The chat_template for transformers: it gives the same text, with the special tokens spelled out.

        It gives the same tokens, unless a content spells a special token (which transformers takes for one), or an
        answer begins with line ends that merge with the one before it.
        """
        ids = self._special_ids(tokenizer)
        names = [name for name in tokenizer.added_tokens if tokenizer.special_id(name) == tokenizer.eos_id]
        if not names and EOS in "".join(self._strings()):
            raise ChatFormatError(
                f"the end-of-document token {ids[EOS]} of the tokenizer is no special one, so that no template can "
                f"spell it for the chat format {self.name!r}; choose chatml"
            )
        return template(self, names[0] if names else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal format."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def stop(self) -> str:
        """The name of the token that ends an answer."""
        return next(text for text, is_special in self._split(self.assistant[1]) if is_special)

    def parts(self, turns: Sequence[Turn], *, trained_from: int = 0, is_prompt: bool = False) -> list[Part]:
        """The conversation in the stretches that are encoded one by one, none of them empty."""
        merged: list[Part] = []
        for part in self._parts(turns, trained_from, is_prompt):
            if not part.text:
                continue
            joins = merged and not part.is_special and not merged[-1].is_special and merged[-1].is_said == part.is_said
            if joins:
                merged[-1] = part._replace(text=merged[-1].text + part.text)
            else:
                merged.append(part)
        return merged

    def encode_parts(self, tokenizer: "Tokenizer", conversations: Sequence[list[Part]]) -> list[Encoded]:
        """The tokens of many conversations' parts, faster than one by one."""
        special_ids = self._special_ids(tokenizer)
        texts = iter(encode_texts(tokenizer, conversations))
        encoded: list[Encoded] = []
        for parts in conversations:
            ids, is_trained = list[int](), list[bool]()
            for part in parts:
                new = [special_ids[part.text]] if part.is_special else next(texts)
                ids += new
                is_trained += [part.is_trained] * len(new)
            is_trained[:1] = [False] * len(is_trained[:1])  # nothing stands before the first token
            encoded.append(Encoded(ids, is_trained))
        return encoded

    def _parts(self, turns: Sequence[Turn], trained_from: int, is_prompt: bool) -> Iterator[Part]:
        yield from self._fixed(self.begin)
        waiting = ""  # a system prompt that the next user's turn takes up
        if self.default_system and not (turns and turns[0].role == "system"):
            turns, trained_from = [Turn("system", self.default_system), *turns], trained_from + 1
        for index, turn in enumerate(turns):
            content = turn.content.strip() if self.strips else turn.content
            before, behind = self._around(turn.role)
            if turn.role == "system" and self.system_is_in_user:
                waiting += before + content + behind
            elif turn.role == "assistant":
                yield from self._fixed(before)
                yield from self._said(self.lead + content, is_trained=index >= trained_from)
            else:
                yield from self._fixed(before)
                if turn.role == "user":
                    content, waiting = waiting + content, ""
                yield Part(content, is_special=False, is_said=False, is_trained=False)
                yield from self._fixed(behind)
        if waiting:
            raise ChatFormatError(
                f"the chat format {self.name!r} has a system prompt stand in the user's turn behind it; there is none"
            )
        if is_prompt:
            yield from self._fixed(self.assistant[0])

    def _said(self, content: str, *, is_trained: bool) -> Iterator[Part]:
        """What the assistant says, its stop token included, and what the format writes behind that."""
        yield Part(content, is_special=False, is_said=True, is_trained=is_trained)
        has_stopped = False
        for text, is_special in self._split(self.assistant[1]):
            yield Part(text, is_special, is_said=not has_stopped, is_trained=is_trained and not has_stopped)
            has_stopped = has_stopped or is_special

    def _fixed(self, text: str) -> Iterator[Part]:
        return (Part(piece, is_special, False, False) for piece, is_special in self._split(text))

    def _around(self, role: str) -> tuple[str, str]:
        around = getattr(self, role)
        if around is None:
            raise ChatFormatError(f"the chat format {self.name!r} has no turns of the role {role}; choose chatml")
        return around

    def _split(self, text: str) -> list[tuple[str, bool]]:
        """The special tokens of one of the format's strings, and the texts between them."""
        return _split_at(text, (EOS, *self.specials))

    def _special_ids(self, tokenizer: "Tokenizer") -> dict[str, int]:
        found = {name: tokenizer.special_id(name) for name in self.specials} | {EOS: tokenizer.eos_id}
        if missing := [name for name, token_id in found.items() if token_id is None]:
            raise ChatFormatError(
                f"the tokenizer has no {', '.join(missing)}, with which the chat format {self.name!r} is written; "
                f"choose a format without special tokens ({', '.join(_of_plain_text())}), or a tokenizer with them"
            )
        return {name: token_id for name, token_id in found.items() if token_id is not None}

    def _strings(self) -> Iterator[str]:
        yield self.begin
        for around in (self.system, self.user, self.assistant, self.tool):
            yield from around or ()


def from_json(table: dict[str, Any]) -> ChatFormat:
    """The format that `ChatFormat.to_json` gave.

    Raises:
        ChatFormatError: it is none.
    """
    try:
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
        found = ChatFormat(**values)
        _ = found.stop
    except (TypeError, AttributeError, StopIteration) as error:
        raise ChatFormatError(f"chat_format = {table!r}: not a chat format ({error}); restore {CHAT_FILE}") from error
    return found


def format_named(name: str) -> ChatFormat:
    """A format of FORMATS.

    Raises:
        ChatFormatError: there is none of that name.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FORMATS)}"
        raise ChatFormatError(f"chat format {name!r}: unknown; {hint}")
    return FORMATS[name]


def chat_format_of(folder: Path) -> ChatFormat:
    """The format of a chat data folder, a run on one, a checkpoint of such a run, or a model exported from it.

    Raises:
        ChatFormatError: there is none, or it cannot be read.
    """
    for place in (folder, folder.absolute().parent):
        if (table := read_chat_file(place)) is not None:
            return from_json(table["chat_format"])
        if not (folder / "record.json").is_file():  # only a checkpoint belongs to what is above it
            break
    raise ChatFormatError(
        f"{folder}: has no {CHAT_FILE}, so that its chat format is not known. Fine-tune the model on chat data "
        "(python -m data_prep prepare-chat), or name the format of one fine-tuned elsewhere with --chat-format"
    )


def read_chat_file(folder: Path) -> dict[str, Any] | None:
    """What a folder's chat.json says; None if it has none.

    Raises:
        ChatFormatError: it cannot be read, or is of another version.
    """
    path = folder / CHAT_FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ChatFormatError(f"{path}: not readable as JSON ({error}); restore it") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("chat_format"), dict):
        raise ChatFormatError(f"{path}: not a file of the format {FORMAT!r}; restore it, or prepare the data anew")
    return table


@functools.cache  # a few strings, for every turn
def _split_at(text: str, names: tuple[str, ...]) -> list[tuple[str, bool]]:
    pattern = "|".join(map(re.escape, names))
    return [(piece, index % 2 == 1) for index, piece in enumerate(re.split(f"({pattern})", text))]


def _of_plain_text() -> list[str]:
    return [name for name, made in FORMATS.items() if not made.specials]


_CHATML = ChatFormat(
    name="chatml",
    specials=("<|im_start|>", "<|im_end|>"),
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    tool=("<|im_start|>tool\n", "<|im_end|>\n"),
)
_LLAMA2 = ChatFormat(
    name="llama2",
    specials=("<s>",),
    system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    user=("<s>[INST] ", " [/INST]"),
    assistant=("", " {eos}"),
    lead=" ",
    system_is_in_user=True,
    strips=True,
)
_LLAMA3 = ChatFormat(
    name="llama3",
    specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    begin="<|begin_of_text|>",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    tool=("<|start_header_id|>ipython<|end_header_id|>\n\n", "<|eot_id|>"),
    strips=True,
)
_MISTRAL = ChatFormat(  # of 7B Instruct v0.1 and v0.2; from v0.3 on the brackets are special tokens
    name="mistral",
    specials=("<s>",),
    begin="<s>",
    system=("", "\n\n"),
    user=("[INST] ", " [/INST]"),
    assistant=("", "{eos}"),
    lead=" ",
    system_is_in_user=True,
    strips=True,
)
_GEMMA = ChatFormat(
    name="gemma",
    specials=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    begin="<bos>",
    system=("", "\n\n"),
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
    system_is_in_user=True,
    strips=True,
)
_ZEPHYR = ChatFormat(  # of TinyLlama Chat, too
    name="zephyr",
    specials=(),
    system=("<|system|>\n", "{eos}\n"),
    user=("<|user|>\n", "{eos}\n"),
    assistant=("<|assistant|>\n", "{eos}\n"),
)
_ALPACA = ChatFormat(
    name="alpaca",
    specials=(),
    system=("", "\n\n"),
    user=("### Instruction:\n", "\n\n### Response:\n"),
    assistant=("", "{eos}\n\n"),
    default_system=(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    ),
    strips=True,
)
FORMATS = {made.name: made for made in (_CHATML, _LLAMA2, _LLAMA3, _MISTRAL, _GEMMA, _ZEPHYR, _ALPACA)}
"""Formats by name; the first is the one for tokenizers made here."""

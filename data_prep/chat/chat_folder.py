"""What a chat data folder says of itself in chat.json, beside what every data folder has."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from data_prep import publish
from data_prep.chat.chat_format import CHAT_FILE, FORMAT, ChatFormat, ChatFormatError, from_json, read_chat_file
from data_prep.chat.turns import Kind


@dataclass(frozen=True, slots=True)
class ChatFolder:
    """Rows of row_tokens tokens, what they hold, and how that is written."""

    kind: Kind
    row_tokens: int
    chat_format: ChatFormat


def read_chat_folder(folder: Path) -> ChatFolder | None:
    """What the folder's chat.json says; None if it has none.

    Raises:
        ChatFormatError: it cannot be read, or is not as it was written.
    """
    table = read_chat_file(folder)
    if table is None:
        return None
    kind, row_tokens = str(table.get("kind")), table.get("row_tokens")
    if kind not in get_args(Kind) or type(row_tokens) is not int or row_tokens < 8:
        raise ChatFormatError(f"{folder / CHAT_FILE}: kind = {kind!r}, row_tokens = {row_tokens!r}; restore the file")
    return ChatFolder(cast(Kind, kind), row_tokens, from_json(table["chat_format"]))


def write_chat_folder(folder: Path, chat: ChatFolder) -> None:
    """Write chat.json, atomically."""
    table = {
        "format": FORMAT,
        "kind": chat.kind,
        "row_tokens": chat.row_tokens,
        "chat_format": chat.chat_format.to_json(),
    }
    publish.write_text(folder / CHAT_FILE, json.dumps(table, indent=1, ensure_ascii=False) + "\n")

import contextlib
import io
from pathlib import Path

import pytest

from data_prep.chat import show_mask
from data_prep.chat.mask_text import MaskText
from tests.data_prep.chat.test_prepare_chat import chats, place, prepare  # noqa: F401 - a fixture
from tests.data_prep.chat.vocabularies import byte_level, json_lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(*arguments: object, out: io.StringIO | None = None) -> tuple[int, str]:
    printed = out or io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = show_mask.main([*map(str, arguments)])
    return code, printed.getvalue()


ANSWERED = "<|im_start|>user\nwho 0<|im_end|>\n<|im_start|>assistant\n{+fox <|im_end|>+}\n"


def test_rows_are_shown_with_what_is_trained_between_marks(place: Path):  # noqa: F811
    records = chats(0, 2)
    assert prepare(place, json_lines(place / "a.jsonl", records), validation_share=0)[0] == 0
    code, printed = shown(place / "data")
    assert code == 0
    header, *_ = printed.splitlines()
    assert header.startswith("=== row 0 of train/chat-00000.bin: ")
    assert "--- document 2: " in printed
    assert ANSWERED in printed
    assert "{+fox fox <|im_end|>+}" in printed
    assert "--- padding: " in printed


def test_a_raw_file_is_shown_before_it_is_packed(place: Path):  # noqa: F811
    source = json_lines(place / "a.jsonl", [*chats(0, 1), {"text": "x"}, *chats(1, 3)])
    code, printed = shown(source, "--tokenizer", place / "tok", "--rows", "2")
    assert code == 0
    assert printed == (
        f"=== {source}:1 ===\n{ANSWERED}\n=== {source}:2 ===\n"
        "bad record: no conversation: neither messages or conversations, nor a prompt and its answer\n"
    )
    other = shown(source, "--tokenizer", place / "tok", "--rows", "1", "--format", "zephyr")[1]
    assert "<|user|>\nwho 0<|endoftext|>\n<|assistant|>\n{+fox <|endoftext|>+}\n" in other


def test_a_terminal_shows_colours_unless_it_must_not(place: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    source = json_lines(place / "a.jsonl", chats(0, 1))
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, coloured = shown(source, "--tokenizer", place / "tok", out=Terminal())
    assert "\x1b[32mfox <|im_end|>\x1b[0m" in coloured
    assert "\x1b[2m<|im_start|>user\x1b[0m\n\x1b[2mwho 0<|im_end|>\x1b[0m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert ANSWERED in shown(source, "--tokenizer", place / "tok", out=Terminal())[1]


def test_what_a_user_wrote_cannot_move_the_cursor():
    tokenizer = byte_level()
    ids = tokenizer.encode("a\x1b[31mb")
    assert [*MaskText(tokenizer, is_coloured=False).document(ids, [False] * len(ids))] == ["a\\x1b[31mb"]


def test_mistakes_say_what_to_do(place: Path):  # noqa: F811
    assert prepare(place, json_lines(place / "a.jsonl", chats(0, 30)))[0] == 0
    for arguments, message in (
        ([place / "a.jsonl"], "a.jsonl: no data folder; to look into a raw file, name its --tokenizer FOLDER"),
        ([place / "data", "--split", "test"], "has no such split; it has train, validation"),
        ([place / "data", "--rows", "0"], "--rows 0: must be at least 1"),
        ([place / "tok"], "has no manifest.json"),
    ):
        code, printed = shown(*arguments)
        assert code == 65
        assert message in printed
    (place / "data" / "chat.json").unlink()
    assert "not a chat data folder (no chat.json)" in shown(place / "data")[1]

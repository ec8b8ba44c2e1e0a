import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from data_prep.chat.chat_format import ChatFormatError
from data_prep.chat.turns import Turn
from evaluation import chat
from evaluation.chat_session import (
    ChatError,
    Draft,
    Wish,
    fitting_prompt,
    load_draft,
    stream_answer,
    usable_chat_format,
)
from evaluation.engine import complete
from evaluation.model_folder import load_model
from evaluation.sampling import GenerationError, Sampling
from tests.evaluation.stored import byte_level_tokenizer, make_run
from tests.evaluation.talking import CHATML, CONTEXT_LENGTH, Script, make_chat_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_chat_run(tmp_path_factory.mktemp("chat") / "tiny-chat")


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run, device="cpu")


@pytest.fixture
def asked(monkeypatch):
    """The conversations that answers were asked for, as text; what is answered is "fine"."""
    prompts: list[str] = []
    script = Script(monkeypatch, "fine")
    tokenizer = byte_level_tokenizer()

    def generate(model, prompt, **settings):
        prompts.append(tokenizer.decode(prompt))
        return script._generate(model, prompt, **settings)

    monkeypatch.setattr("evaluation.chat_session.generate", generate)
    return prompts


def talk(run: str, monkeypatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return chat.main([run, "--device", "cpu", *arguments])


def text_of(loaded, prompt: list[int], **settings) -> str:
    stop_ids = CHATML.stop_ids(loaded.tokenizer)
    [sample] = complete(loaded.model, prompt, sampling=Sampling(**settings), max_new_tokens=9, stop_ids=stop_ids)
    return loaded.tokenizer.decode([token for token in sample if token not in stop_ids])


def test_piped_lines_are_answered_each_with_what_was_said_before(run, loaded, monkeypatch, capsys):
    options = ["--system", "be terse", "--temperature", "0.7", "--seed", "3", "--max-new-tokens", "9"]
    assert talk(run, monkeypatch, "def f\n\nreturn\n", *options) == 0
    turns, answers = [Turn("system", "be terse"), Turn("user", "def f")], []
    for number, question in enumerate(["return", None]):
        prompt = CHATML.prompt(loaded.tokenizer, turns)
        answers.append(text_of(loaded, prompt, temperature=0.7, seed=3 + number))
        turns += [Turn("assistant", answers[-1]), *([Turn("user", question)] if question else [])]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)


def test_commands_change_the_conversation(run, asked, monkeypatch, tmp_path, capsys):
    file = tmp_path / "talks.jsonl"
    lines = ["one", "/retry", "/system speak up", "two", "/reset", "three", f"/save {file}", "/system", "four",
             f"/save {file}", "/quit", "five"]  # fmt: skip
    assert talk(run, monkeypatch, "\n".join(lines)) == 0
    begin, to_answer = "user\n", "\nassistant\n"
    spoken = "system\nspeak up\n"
    questions = [f"{begin}one{to_answer}"] * 2
    questions += [f"{spoken}{begin}{question}{to_answer}" for question in ("two", "three")]
    assert asked == [*questions, f"{begin}four{to_answer}"]
    assert capsys.readouterr().out == "fine\n" * 5
    fine = {"role": "assistant", "content": "fine"}
    system = {"role": "system", "content": "speak up"}
    assert [json.loads(line)["messages"] for line in file.read_text().splitlines()] == [
        [system, {"role": "user", "content": "three"}, fine],
        [{"role": "user", "content": "four"}, fine],
    ]


def test_a_retry_draws_another_answer(run, monkeypatch, capsys):
    assert talk(run, monkeypatch, "def f\n/retry\n", "--temperature", "1.5", "--max-new-tokens", "20") == 0
    first, second = capsys.readouterr().out.split("\n")[:2]
    assert first != second


def test_help_and_unknown_commands_list_the_commands(run, monkeypatch, capsys):
    assert talk(run, monkeypatch, "/help\n/what\n") == 0
    errors = capsys.readouterr().err
    assert errors == f"{chat.HELP}\n/what: no such command\n{chat.HELP}\n"


def test_the_oldest_turns_are_dropped_when_the_context_is_full(run, asked, monkeypatch, capsys):
    lines = "".join(f"{word * 2}\n" for word in ("one ", "two ", "six ", "ten "))
    assert talk(run, monkeypatch, lines, "--system", "be") == 0
    assert all(prompt.startswith("system\nbe\nuser\n") for prompt in asked)
    assert "one" not in asked[-1]
    assert "six" in asked[-1]
    assert "the context is full: the oldest 2 turns were dropped" in capsys.readouterr().err


@pytest.mark.parametrize("max_new_tokens", [5, 500])
def test_a_prompt_keeps_as_many_of_the_latest_turns_as_leave_room(max_new_tokens, loaded):
    turns = [Turn("system", "be"), *(Turn(role, f"{i} say") for i in range(9) for role in ("user", "assistant"))]
    turns.append(Turn("user", "last"))
    settings = {"context_length": CONTEXT_LENGTH, "max_new_tokens": max_new_tokens}
    kept, prompt = fitting_prompt(CHATML, loaded.tokenizer, turns, **settings)
    room = min(max_new_tokens, CONTEXT_LENGTH // 4)
    assert kept[0] == turns[0]
    assert kept[1:] == turns[len(turns) - len(kept) + 1 :]
    assert kept[1].role == "user"
    assert prompt == CHATML.prompt(loaded.tokenizer, kept)
    assert len(prompt) + room <= CONTEXT_LENGTH
    more = [turns[0], *turns[len(turns) - len(kept) - 1 :]]
    assert len(CHATML.prompt(loaded.tokenizer, more)) + room > CONTEXT_LENGTH


def test_a_last_question_may_take_the_room_of_the_answer_but_not_all(loaded):
    settings = {"context_length": CONTEXT_LENGTH, "max_new_tokens": 50}
    around = len(CHATML.prompt(loaded.tokenizer, [Turn("user", "")]))
    for length in range(60, 120):
        turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "~" * length)]
        if around + length < CONTEXT_LENGTH:
            kept, prompt = fitting_prompt(CHATML, loaded.tokenizer, turns, **settings)
            assert len(prompt) < CONTEXT_LENGTH
            assert kept == (turns if len(kept) == 3 else turns[2:])
        else:
            with pytest.raises(ChatError, match=r"which leaves no room in a context of 128; shorten it"):
                fitting_prompt(CHATML, loaded.tokenizer, turns, **settings)


@pytest.mark.parametrize("name", ["lookup", "model"])
def test_a_draft_changes_no_greedy_answer(name, run, loaded, monkeypatch, capsys):
    options = ["--temperature", "0", "--max-new-tokens", "24"]
    for more in ([], ["--draft", "lookup" if name == "lookup" else f"{run}/step-90"]):
        assert talk(run, monkeypatch, "def f\nreturn\n", *options, *more) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]
    assert len(out) > 20


def test_the_texts_of_a_drafted_answer_end_with_their_reason(loaded):
    prompt = CHATML.prompt(loaded.tokenizer, [Turn("user", "def f")])
    wish = Wish(sampling=Sampling(), max_new_tokens=12, stop_ids=CHATML.stop_ids(loaded.tokenizer))
    plain = [delta for deltas in stream_answer(loaded, prompt, wish) for delta in deltas]
    drafted = [delta for deltas in stream_answer(loaded, prompt, wish, Draft(None)) for delta in deltas]
    assert drafted == plain
    assert [delta.end for delta in plain[:-1]] == [None] * (len(plain) - 1)
    assert plain[-1].end in ("stop", "length")


def test_a_draft_of_another_tokenizer_is_refused(tmp_path, loaded):
    from data_prep.tokenizing.tokenizer import train_bpe

    make_run(tmp_path / "other", train_bpe(["other words, mother tongue\n" * 20], vocab_size=270))
    with pytest.raises(GenerationError, match=r"other: its tokenizer is not that of .*choose a draft"):
        load_draft(str(tmp_path / "other"), loaded, "cpu")


def test_a_base_model_needs_the_name_of_a_format(tmp_path, asked, monkeypatch):
    make_run(tmp_path / "base", byte_level_tokenizer(), context_length=CONTEXT_LENGTH)
    base = load_model(tmp_path / "base", device="cpu")
    with pytest.raises(ChatFormatError, match=r"has no chat.json.*Fine-tune the model.*--chat-format"):
        usable_chat_format(base, "auto")
    assert usable_chat_format(base, "zephyr").name == "zephyr"
    with pytest.raises(ChatFormatError, match="the tokenizer has no <bos>"):
        usable_chat_format(base, "gemma")
    assert talk(str(tmp_path / "base"), monkeypatch, "one", "--chat-format", "zephyr") == 0
    assert asked == ["<|user|>\none\n<|assistant|>\n"]


@pytest.mark.parametrize(
    ("lines", "arguments", "complaint"),
    [
        ("", ["--temperature", "-1"], "temperature = -1.0: must be 0"),
        ("", ["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        ("", ["--chat-format", "chatlm"], "did you mean 'chatml'?"),
        ("", ["--draft", "nowhere"], "nowhere: does not exist"),
        ("~" * 999, [], "leaves no room in a context of 128; shorten it"),
        ("/retry", [], "/retry: nothing was asked yet"),
        ("/save", [], "/save: name a file"),
        ("/save nowhere/talk.jsonl", [], "nowhere/talk.jsonl"),
    ],
)
def test_an_error_in_a_pipe_is_one_line_on_stderr(lines, arguments, complaint, run, monkeypatch, capsys):
    assert talk(run, monkeypatch, lines, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_an_error_or_ctrl_c_ends_an_answer_and_not_the_talk(run, asked, monkeypatch, capsys):
    script = Script(monkeypatch, "on and on")
    told = iter(["~" * 999, "one", "two", "/retry", None])

    def typed(prompt: str) -> str:
        line = next(told)
        if line is None:
            raise EOFError
        return line

    def interrupted(model, prompt, **settings):
        yield [script.tokens[0]]
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("evaluation.chat_session.generate", interrupted)
    assert chat.main([run, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "o\no\no\n\n"
    assert "error: the question makes a prompt of" in printed.err
    assert printed.err.count("(stopped)") == 3


def test_ctrl_c_in_a_pipe_ends_the_command(run, monkeypatch, capsys):
    def interrupted(model, prompt, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.chat_session.generate", interrupted)
    assert talk(run, monkeypatch, "one\ntwo\n") == 130


@pytest.mark.slow
def test_a_real_terminal_is_spoken_with(run):
    main_end, other_end = pty.openpty()
    command = [sys.executable, "-m", "evaluation.chat", run, "--device", "cpu", "--temperature", "2"]
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        deadline_s = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline_s, shown
            shown += os.read(main_end, 1000)
        shown = shown.partition(text)[2]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    with subprocess.Popen(command, stdin=other_end, stdout=other_end, stderr=other_end, env=environment) as process:
        os.close(other_end)
        wait_for(b"/help lists commands")
        wait_for(b"> ")
        process.send_signal(signal.SIGINT)  # at the prompt
        wait_for(b"> ")
        os.write(main_end, b"def f\n")
        wait_for(b"\r\n> ")
        os.write(main_end, b"/quit\n")
        assert process.wait(30) == 0
    with contextlib.suppress(OSError):
        os.close(main_end)


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, evaluation.chat as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "--draft" in done.stdout

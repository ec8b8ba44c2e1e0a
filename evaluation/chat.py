"""A conversation with a model on the terminal, or with one question per line out of a pipe.

    python -m evaluation.chat runs/sft
    python -m evaluation.chat runs/sft --system "You are terse." --temperature 0 < questions.txt > answers.txt

Ctrl-C stops an answer; lines that begin with a slash are commands, which /help lists.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from data_prep import command_line
from data_prep.chat.turns import Turn

if TYPE_CHECKING:
    from data_prep.chat.chat_format import ChatFormat
    from evaluation.chat_session import Draft, Wish
    from evaluation.model_folder import LoadedModel

# torch and the model are imported where they are used, so that --help is instant.

HELP = """\
/reset          begin anew
/system [TEXT]  begin anew, with this system prompt or without one
/retry          another answer to the last question
/save FILE      append the conversation to a .jsonl file that `prepare-chat` reads
/quit           leave, as Ctrl-D does"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCommand:
    """Talks with a model; lines that begin with a slash are commands (/help)."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Run folder (its newest checkpoint), step-N checkpoint, or Hugging Face folder."""
    system: str | None = None
    """System prompt."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Keep only the likeliest tokens whose probabilities together reach p."""
    min_p: float | None = None
    """Keep only tokens at least p times as likely as the likeliest."""
    seed: int = 0
    """Equal seeds give equal answers."""
    draft: str | None = None
    """Smaller model whose guesses the model checks, several at once, or "lookup": guess what the text repeats."""
    chat_format: str = "auto"
    """auto (the model's own) or the name of one, for models that were fine-tuned elsewhere."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""


class Conversation:
    """What was said so far, and who answers."""

    def __init__(self, loaded: "LoadedModel", chat_format: "ChatFormat", wish: "Wish", draft: "Draft | None") -> None:
        self._loaded, self._format, self._wish, self._draft = loaded, chat_format, wish, draft
        self._num_asked = 0
        self.turns: list[Turn] = []

    def begin(self, system: str | None) -> None:
        """Forgets what was said."""
        self.turns = [Turn("system", system)] if system else []

    def reset(self) -> None:
        """Forgets what was said, but for the system prompt."""
        self.turns = [turn for turn in self.turns[:1] if turn.role == "system"]

    def ask(self, question: str) -> None:
        """Prints the answer as it comes and keeps it, cut short if Ctrl-C stops it.

        Raises:
            ChatError: the question is too long; it is forgotten.
        """
        from evaluation.chat_session import fitting_prompt, stream_answer

        wish = self._wish
        turns, prompt = fitting_prompt(
            self._format, self._loaded.tokenizer, [*self.turns, Turn("user", question)],
            context_length=self._loaded.config.context_length, max_new_tokens=wish.max_new_tokens,
        )  # fmt: skip
        if num_dropped := len(self.turns) + 1 - len(turns):
            _note(f"the context is full: the oldest {num_dropped} turns were dropped")
        sampling = dataclasses.replace(wish.sampling, seed=wish.sampling.seed + self._num_asked)
        self._num_asked += 1
        answer, end = "", None
        try:
            steps = stream_answer(self._loaded, prompt, dataclasses.replace(wish, sampling=sampling), self._draft)
            for delta in (delta for deltas in steps for delta in deltas):
                print(delta.text, end="", flush=True)
                answer, end = answer + delta.text, delta.end
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            end = "stopped"
        print()
        if end in ("stopped", "length"):
            _note("stopped" if end == "stopped" else "cut: the answer is as long as --max-new-tokens and context allow")
        self.turns = [*turns, Turn("assistant", answer)]

    def retry(self) -> None:
        """Answers the last question again."""
        from evaluation.chat_session import ChatError

        if len(self.turns) < 2:
            raise ChatError("/retry: nothing was asked yet")
        *self.turns, question, _ = self.turns
        self.ask(question.content)

    def save(self, file: str) -> None:
        """Appends the conversation to a file."""
        from evaluation.chat_session import ChatError

        if not file:
            raise ChatError("/save: name a file, as in /save talks.jsonl")
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"messages": [t._asdict() for t in self.turns]}, ensure_ascii=False) + "\n")
        _note(f"appended to {file}")


def talk(conversation: Conversation, lines: Iterator[str], *, goes_on: bool) -> None:
    """Answers lines until /quit or their end; `goes_on` where an error is no reason to leave."""
    for line in map(str.strip, lines):
        name, _, argument = line.partition(" ")
        try:
            match name:
                case "":
                    pass
                case "/quit":
                    return
                case "/reset":
                    conversation.reset()
                case "/system":
                    conversation.begin(argument.strip())
                case "/retry":
                    conversation.retry()
                case "/save":
                    conversation.save(argument.strip())
                case _ if name.startswith("/"):
                    _note(HELP if name == "/help" else f"{name}: no such command\n{HELP}")
                case _:
                    conversation.ask(line)
        except (OSError, ValueError) as error:
            if not goes_on:
                raise
            print(f"error: {error}", file=sys.stderr)


def _typed_lines() -> Iterator[str]:
    import readline  # noqa: F401  # arrow keys and history

    _note("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _note(text: str) -> None:
    print(f"({text})" if "\n" not in text else text, file=sys.stderr)


def _start(command: ChatCommand) -> Conversation:
    from evaluation.chat_session import Wish, load_draft, usable_chat_format
    from evaluation.model_folder import load_model
    from evaluation.sampling import GenerationError, Sampling

    sampling = Sampling(
        temperature=command.temperature, top_p=command.top_p, min_p=command.min_p, seed=command.seed
    )  # fmt: skip
    if command.max_new_tokens < 1:
        raise GenerationError(f"--max-new-tokens {command.max_new_tokens}: must be at least 1")
    loaded = load_model(command.model, device=command.device)
    chat_format = usable_chat_format(loaded, command.chat_format)
    draft = load_draft(command.draft, loaded, command.device) if command.draft is not None else None
    wish = Wish(
        sampling=sampling, max_new_tokens=command.max_new_tokens, stop_ids=chat_format.stop_ids(loaded.tokenizer),
        lead=chat_format.lead,
    )  # fmt: skip
    conversation = Conversation(loaded, chat_format, wish, draft)
    conversation.begin(command.system)
    return conversation


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 2 after an error, which is printed as one line."""
    try:
        command = command_line.read(ChatCommand, argv, prog="python -m evaluation.chat", description=__doc__)
        is_typed = sys.stdin.isatty()
        talk(_start(command), _typed_lines() if is_typed else iter(sys.stdin), goes_on=is_typed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Flags become the arguments of a function or the fields of a dataclass, and what is wrong with them one line."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

_RULES = ("╭", "─", "╰", "---")
"""How the borders in a box of tyro's begin, drawn in UTF-8 or in ASCII."""


class CommandLineError(ValueError):
    """A flag or an argument is wrong, missing or given twice; the message names it and the remedy."""


def read(command: Callable[..., Any], argv: Sequence[str] | None, *, prog: str, **options: Any) -> Any:
    """Calls a function, or builds a dataclass, with what the command line says, and returns the result.

    `options` are those of `tyro.cli`.

    Raises:
        CommandLineError: see above; and whatever the function raises.
        SystemExit: after `--help`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    refuse_repeated_flags(arguments)
    call = parsed(command if isinstance(command, type) else _later(command), arguments, prog=prog, **options)
    return call if isinstance(command, type) else call()


def parsed(command: Callable[..., Any], arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """What tyro makes of the arguments.

    Raises:
        CommandLineError: what tyro would have said in a box of many lines.
    """
    import tyro  # here, so that what only holds settings works without it

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(command, args=arguments, prog=prog, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise CommandLineError(_in_words(box.getvalue())) from None


def refuse_repeated_flags(arguments: Sequence[str]) -> None:
    """Refuses a flag that stands twice: tyro takes the last one silently, and one forgotten in a script would win.

    Raises:
        CommandLineError: it names the flag.
    """
    seen: set[str] = set()
    for name in flag_names(arguments):
        if name in seen:
            raise CommandLineError(f"--{name} is given twice; keep one")
        seen.add(name)


def flag_names(arguments: Sequence[str]) -> list[str]:
    """The flags among the arguments, as they are spelled in the help, without dashes in front."""
    return [a[2:].split("=", 1)[0].replace("_", "-") for a in arguments if a.startswith("--") and a != "--help"]


def _later(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """A function of the same arguments that only keeps them: what it prints is not for the box."""

    @functools.wraps(function)
    def kept(*arguments: Any, **options: Any) -> Callable[[], Any]:
        return functools.partial(function, *arguments, **options)

    return kept


def _in_words(box: str) -> str:
    """What a box of tyro's says, without the help of single flags."""
    lines = [line.strip(" │") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    rules = [i for i, line in enumerate(lines) if line.startswith(_RULES)] or [-1]
    sections = [lines[a + 1 : b] for a, b in zip(rules, [*rules[1:], len(lines)])]
    said = re.sub(r"^Missing from .*?: ", "missing: ", " ".join(sections[0])).rstrip(" .")
    if own := re.match(r"Error parsing \w+: ", said):  # of a dataclass of ours, whose message has the remedy
        return said[own.end() :]
    if len(sections) > 1 and sections[1][:1] == ["Perhaps you meant:"]:
        said += f"; did you mean {sections[1][1].split()[0]}?"
    return f"{said.removeprefix('Error parsing ')}; see --help"

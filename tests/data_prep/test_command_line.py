import io
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from data_prep import command_line
from data_prep.command_line import CommandLineError


def greet(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")],
    /,
    *,
    times: int = 1,
    tone: Literal["warm", "cold"] = "warm",
) -> str:
    """Greets.

    Args:
        name: Whom.
        times: How often, which is told at such a length that the box breaks the line, more than once perhaps.
        tone: How.
    """
    print("greeting", file=sys.stderr)
    if times > 9:
        raise ValueError("too often")
    return f"{tone} {name}" * times


@dataclass(frozen=True, kw_only=True, slots=True)
class Greeting:
    """Greets."""

    num_times: int = 1
    """How often."""

    def __post_init__(self) -> None:
        if self.num_times < 1:
            raise ValueError(
                f"--num-times {self.num_times}: must be at least 1; leave it out to greet once, as most do"
            )


def test_a_function_is_called_and_what_it_prints_is_seen(capsys: pytest.CaptureFixture[str]):
    assert command_line.read(greet, ["you", "--times", "2"], prog="greet") == "warm youwarm you"
    assert capsys.readouterr().err == "greeting\n"


def test_what_a_function_raises_is_raised():
    with pytest.raises(ValueError, match=r"^too often$"):
        command_line.read(greet, ["you", "--times", "10"], prog="greet")


def test_a_dataclass_is_built():
    assert command_line.read(Greeting, ["--num-times=3"], prog="greet") == Greeting(num_times=3)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (greet, ["you", "--times", "x"], "--times: invalid literal for int() with base 10: 'x'; see --help"),
        (greet, ["you", "--timse", "3"], "Unrecognized options: --timse, 3; did you mean --times?; see --help"),
        (greet, ["you", "me"], "Unrecognized options: me; see --help"),
        (greet, [], "missing: NAME Whom. (required); see --help"),
        (
            greet,
            ["you", "--tone", "hot"],
            "invalid choice 'hot' for argument '--tone'. Expected one of ('warm', 'cold');",
        ),
        (greet, ["you", "--times", "1", "--times=2"], "--times is given twice; keep one"),
        (Greeting, ["--num-times", "0"], "--num-times 0: must be at least 1; leave it out to greet once, as most do"),
    ],
)
def test_what_is_wrong_is_one_line(command, arguments, message, encoding, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(CommandLineError) as caught:
        command_line.read(command, arguments, prog="greet")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_help_is_shown_whole(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        command_line.read(greet, ["--help"], prog="greet")
    assert not ended.value.code
    assert "How often" in capsys.readouterr().out

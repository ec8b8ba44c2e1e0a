"""Reward functions: Python of the user's own, named as FILE.py:FUNCTION."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.config_file import ConfigError

Reward = Callable[[str, str, dict[str, Any]], float]
"""(prompt, answer, row) -> how good the answer is; `row` is the line of the input file that the prompt comes from."""


def load_reward(name: str) -> Reward:
    """The function that `name` names; what it returns is checked at each call.

    Raises:
        ConfigError: no such file or function, one of another signature, or the file cannot be run.
    """
    path, _, function_name = name.rpartition(":")
    if not path.endswith(".py") or not function_name:
        raise ConfigError(f"the reward {name!r}: expected FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise ConfigError(f"the reward {name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {function_name}; the reward is {name!r}")
    try:
        inspect.signature(function).bind("prompt", "answer", {})
    except TypeError as error:
        raise ConfigError(f"{name} must be callable as {function_name}(prompt, text, row): {error}") from error

    call: Callable[..., Any] = function

    def checked(prompt: str, answer: str, row: dict[str, Any]) -> float:
        try:
            value = float(call(prompt, answer, row))
        except Exception as error:
            raise ConfigError(f"{name} failed on the answer {answer!r}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ConfigError(f"{name} returned {value} for the answer {answer!r}; expected a finite number")
        return value

    return checked

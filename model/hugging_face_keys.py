"""Single keys of a Hugging Face config.json, checked as they are read. Imports no torch.

An absent key is never guessed: either their default is the same in every version, or the key must be there.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

Table = Mapping[str, Any]

_Number = TypeVar("_Number", int, float)
_LETTERS = {"full_attention": "L", "sliding_attention": "S"}


class ConvertError(ValueError):
    """A Hugging Face model that we cannot read, or a state that we cannot write as one; the message says why."""


def number(table: Table, key: str, kind: type[_Number], default: _Number | None = None) -> _Number:
    """The number at a key; null is as good as absent."""
    value = table.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConvertError(f"config.json: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise ConvertError(f"config.json: {key} = {value!r}: expected {'a whole' if kind is int else 'a'} number")
    return kind(value)


def number_or_null(table: Table, key: str, kind: type[_Number]) -> _Number | None:
    """The number at a key that must be there, where null says that there is none."""
    if key not in table:
        raise ConvertError(f"config.json: {key} is missing; write null if the model has none")
    return None if table[key] is None else number(table, key, kind)


def flag(table: Table, key: str, default: bool) -> bool:
    """The true or false at a key; null is as good as absent."""
    value = table.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConvertError(f"config.json: {key} = {value!r}: expected true or false")
    return value


def whole_numbers(table: Table, key: str) -> list[int]:
    """The list of whole numbers at a key; empty if it is absent."""
    values = table.get(key) or []
    if not isinstance(values, list) or any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise ConvertError(f"config.json: {key} = {values!r}: expected a list of whole numbers")
    return values


def refuse_other_values(table: Table, only: Mapping[str, Any]) -> None:
    """Refuses keys with another value than the one that our model computes, which absence means on their side too."""
    for key, value in only.items():
        if table.get(key) is not None and table[key] != value:
            raise ConvertError(f"config.json: {key} = {table[key]!r}: only {value!r} is implemented")


def rope_base(table: Table) -> float:
    """The base of the rotary angles from wherever transformers 4 or 5 keep it; refuses every kind of scaling."""
    bases = {"rope_theta": table["rope_theta"]} if "rope_theta" in table else {}
    for key in ("rope_parameters", "rope_scaling"):
        parameters = table.get(key) or {}
        if not isinstance(parameters, dict):
            raise ConvertError(f"config.json: {key} = {parameters!r}: expected a table")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        foreign = parameters.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or foreign or parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConvertError(f"config.json: {key} = {parameters!r}: only unscaled RoPE of one base is implemented")
        if "rope_theta" in parameters:
            bases[f"{key}.rope_theta"] = parameters["rope_theta"]
    if len(set(bases.values())) > 1:
        raise ConvertError(f"config.json: contradictory RoPE bases {bases}; keep one")
    return number({"rope_theta": next(iter(bases.values()), None)}, "rope_theta", float, 10_000.0)


def windows(table: Table, window: int | None, usual: str, *, may_vary: bool) -> dict[str, Any]:
    """Our keys of sliding windows, from a letter per layer: those that are usual, unless layer_types may vary them."""
    letters = _declared_letters(table, usual, may_vary)
    if "S" not in letters:
        return {}
    if window is None:
        raise ConvertError(f"config.json: layer {letters.index('S')} has a sliding window, but sliding_window is null")
    return {"sliding_window": window, "window_pattern": shortest_period(letters)}


def shortest_period(letters: str) -> str:
    """The shortest beginning of a text that makes all of it when repeated."""
    periods = (letters[:size] for size in range(1, len(letters) + 1))
    return next(period for period in periods if (period * len(letters))[: len(letters)] == letters)


def layer_types(letters: str) -> list[str]:
    """Their names for a letter per layer."""
    names = {letter: kind for kind, letter in _LETTERS.items()}
    return [names[letter] for letter in letters]


def _declared_letters(table: Table, usual: str, may_vary: bool) -> str:
    kinds = table.get("layer_types")
    if kinds is None:
        return usual
    if not isinstance(kinds, list) or len(kinds) != len(usual):
        raise ConvertError(f"config.json: layer_types = {kinds!r}: expected one for each of {len(usual)} layers")
    for layer, kind in enumerate(kinds):
        expected = list(_LETTERS) if may_vary else layer_types(usual[layer])
        if kind not in expected:
            raise ConvertError(f"config.json: layer_types[{layer}] = {kind!r}: expected {' or '.join(expected)}")
    return "".join(_LETTERS[kind] for kind in kinds)

"""A run is a value: one TOML file plus command-line flags become one frozen dataclass.

The dataclass (which may nest section dataclasses, tables of them by name, and lists of them) is the only list of keys,
defaults and meanings; the TOML file, the flags, `--help` and the resolved file written beside every result all follow
from it.
"""

import dataclasses
import difflib
import functools
import json
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from data_prep import command_line

Config = TypeVar("Config")

_MAX_LISTED = 40
"""With more keys than this a list of them hides what is wrong."""


class ConfigError(ValueError):
    """A key or a value of a configuration is wrong; the message names it and the remedy."""


class UnplacedError(ConfigError):
    """A key is wrong that occurs in several sections; `load` puts the section's name before the message."""


def parse(config_type: type[Config], argv: Sequence[str], *, prog: str, description: str | None = None) -> Config:
    """Build a config from `[file.toml] [--section.key value ...]`: defaults, then the file, then the flags.

    Raises:
        ConfigError: unreadable file, unknown or repeated key (with the nearest known one), wrong type, bad value.
        SystemExit: after `--help`.
    """
    import tyro  # here, so that what only loads or holds configs works without it

    arguments = list(argv)
    path = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else None
    default = load(path, config_type) if path is not None else config_type()
    try:
        command_line.refuse_repeated_flags(arguments)
        _refuse_unknown_flags(arguments, default)
        return command_line.parsed(
            config_type,
            arguments,
            prog=f"{prog} [FILE.toml]",
            default=default,
            description=description or config_type.__doc__,
            config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
        )
    except command_line.CommandLineError as error:
        raise ConfigError(str(error)) from error


def load(path: Path, config_type: type[Config]) -> Config:
    """Read a TOML file over the defaults of config_type.

    Raises:
        ConfigError: see `parse`.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the config file ({error.strerror}); name a .toml file that is there, or none"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    try:
        return from_table(table, config_type)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def from_table(
    table: dict[str, Any], config_type: type[Config], section: str = "", base: Config | None = None
) -> Config:
    """Build config_type from a parsed TOML table; missing keys keep the values of `base`, or their defaults.

    A section whose dataclass has a `preset(name)` class method may name the preset to start from with `preset = "..."`.

    Raises:
        ConfigError: see `parse`.
    """
    table = dict(table)
    if hasattr(config_type, "preset") and "preset" in table:
        base = _checked(section, lambda: config_type.preset(table.pop("preset")))  # pyright: ignore[reportAttributeAccessIssue]
    hints = typing.get_type_hints(config_type)
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{section}.{key}" if section else key
        if key not in hints:
            raise ConfigError(f"unknown key {name!r}{_did_you_mean(name, keys(config_type, section))}")
        if dataclasses.is_dataclass(hints[key]):
            section_type, default = typing.cast(Any, hints[key]), _default(config_type, key)
            values[key] = from_table(_table(name, value), section_type, name, default)
        elif (item_type := _named_sections(hints[key])) is not None:
            values[key] = {
                item: from_table(_table(f"{name}.{item}", inner), item_type, f"{name}.{item}")
                for item, inner in _table(name, value).items()
            }
        elif (item_type := _listed_sections(hints[key])) is not None:
            values[key] = tuple(
                from_table(inner, item_type, f"{name}.{i}") for i, inner in enumerate(_tables(name, value))
            )
        else:
            values[key] = _coerce(name, value, hints[key])
    build = functools.partial(dataclasses.replace, typing.cast(Any, base)) if base is not None else config_type
    return _checked(section, lambda: build(**values))


def _default(config_type: Any, key: str) -> Any:
    """What a section is without a table; None for one that starts from a preset, or from nothing."""
    factory = next(field.default_factory for field in dataclasses.fields(config_type) if field.name == key)
    if factory is dataclasses.MISSING or hasattr(typing.get_type_hints(config_type)[key], "preset"):
        return None
    return factory()


def to_table(config: Any) -> dict[str, Any]:
    """The config as plain TOML/JSON values; keys that are None are left out, as TOML has no null, and empty lists of
    tables, as TOML has none."""
    hints = typing.get_type_hints(type(config))
    without = [key for key, hint in hints.items() if _listed_sections(hint) is not None and not getattr(config, key)]
    values = {key: value for key, value in dataclasses.asdict(config).items() if key not in without}
    return {key: _plain(value) for key, value in values.items() if value is not None}


def to_toml(config: Any) -> str:
    """The resolved config as a TOML file that `load` reads back to an equal value."""
    return "\n".join(_toml_lines(to_table(config), "")).lstrip("\n") + "\n"


def keys(config: Any, section: str = "") -> list[str]:
    """Every `section.key` of a config type, in order; of a config, also those of its named and listed sections."""
    names: list[str] = []
    config_type = config if isinstance(config, type) else type(config)
    for key, hint in typing.get_type_hints(config_type).items():
        name = f"{section}.{key}" if section else key
        value = hint if isinstance(config, type) else getattr(config, key)
        if dataclasses.is_dataclass(hint):
            names += keys(value, name)
        elif _named_sections(hint) is not None:
            items = value if isinstance(value, dict) else {}
            names += [inner for item in items for inner in keys(items[item], f"{name}.{item}")]
        elif _listed_sections(hint) is not None:
            items = value if isinstance(value, tuple) else ()
            names += [inner for i, item in enumerate(items) for inner in keys(item, f"{name}.{i}")]
        else:
            names.append(name)
    return names


def _named_sections(hint: Any) -> Any:
    """The dataclass of a `dict[str, dataclass]`, else None."""
    arguments = typing.get_args(hint)
    return arguments[1] if typing.get_origin(hint) is dict and dataclasses.is_dataclass(arguments[1]) else None


def _listed_sections(hint: Any) -> Any:
    """The dataclass of a `tuple[dataclass, ...]`, else None."""
    arguments = typing.get_args(hint)
    return arguments[0] if typing.get_origin(hint) is tuple and dataclasses.is_dataclass(arguments[0]) else None


def _tables(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{name} = {value!r}: expected tables, each under a line [[{name}]]")
    return value


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {value!r}: expected a table [{name}]")
    return value


def _toml_lines(table: dict[str, Any], section: str) -> list[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict) or _is_tables(value)}
    scalars = {key: value for key, value in table.items() if key not in inner}
    lines = ["", f"[{section}]"] if section and scalars else []
    lines += [_line(key, value) for key, value in scalars.items()]
    for key, value in inner.items():
        name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
        name = f"{section}.{name}" if section else name
        if isinstance(value, dict):
            lines += _toml_lines(value, name)
        else:  # tables of scalars
            lines += [line for item in value for line in ("", f"[[{name}]]", *_toml_lines(item, ""))]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _line(key: str, value: Any) -> str:
    # Strings, finite numbers, booleans and lists of them are written alike in JSON and TOML.
    return f"{key} = {json.dumps(value, ensure_ascii=False)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _checked(section: str, build: Any) -> Any:
    try:
        return build()
    except UnplacedError as error:
        raise ConfigError(f"{section}.{error}") from error
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[{section}] {error}" if section else str(error)) from error


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """TOML value -> field type; int is accepted for float, a list for a tuple, nothing else is converted."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{name} = {value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _coerce(name, value, inner[0])
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name} = {value!r}: expected a list")
        return tuple(_coerce(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name} = {value!r}: expected {hint.__name__}, found {type(value).__name__}")
    return value


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known keys: {', '.join(known)}" if len(known) <= _MAX_LISTED else "; --help lists what is known"


def _refuse_unknown_flags(arguments: Sequence[str], default: Any) -> None:
    known = [key.replace("_", "-") for key in keys(default)]
    for name in command_line.flag_names(arguments):
        if name.endswith(".preset"):
            raise ConfigError(f'--{name} is no flag; write preset = "..." into the TOML file\'s [{name[:-7]}] table')
        if name not in known:
            raise ConfigError(f"unknown flag --{name}{_did_you_mean(name, known)}".replace("mean '", "mean '--"))

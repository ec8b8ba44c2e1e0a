"""Templates that turn the fields of a record into a text: `"{title?}\\n{text}"`.

    {text}                       a field; without it, or with it null or empty, the record is refused
    {meta.text}                  a field of a field
    {text|content}               the first of these that is there
    {title?}                     an optional field: without it the line that it stands in is left out
    [[{title?}: ]]{text}         or, between [[ and ]], that segment
    {paragraphs[]}               a list of texts, one on each line
    {sections[].title/content}   of each object of a list these fields, one on each line
    {{ and }}                    braces

A line break may be written as \\n. Values are never changed, neither stripped nor cut.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.config_file import ConfigError

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|\[\[|\]\]|\n|[^{}\[\]\n]+|.")
_PATH = re.compile(r"(?P<keys>[^\[\]{}|?/]+)(?P<list>\[\](?:\.(?P<columns>[^\[\]{}|?]+))?)?")

Lack = Literal["", "absent", "null", "empty"]


class BadRecordError(ValueError):
    """Why a record gives no document: few words that do not depend on its values, so that they can be counted."""


@dataclass(frozen=True, slots=True)
class _Path:
    """One way to a text: through objects, and perhaps over a list and columns of it."""

    label: str
    keys: tuple[str, ...]
    is_list: bool
    columns: tuple[tuple[str, ...], ...]

    def read(self, record: dict[str, Any]) -> tuple[str, Lack]:
        """The text, or what it lacks to be one."""
        value, lack = _get(record, self.keys)
        if lack:
            return "", lack
        if self.is_list:
            if not isinstance(value, list):
                raise BadRecordError(f"{self.label} is not a list")
            value = "\n".join(self._texts(value))
        if not isinstance(value, str):
            raise BadRecordError(f"{self.label} is not a string")
        return ("", "empty") if not value or value.isspace() else (value, "")

    def _texts(self, items: list[Any]) -> Iterator[str]:
        for item in items:
            for value, _ in [_get(item, column) for column in self.columns] if self.columns else [(item, "")]:
                if isinstance(value, str) and value and not value.isspace():
                    yield value
                elif value is not None and not isinstance(value, str):
                    raise BadRecordError(f"{self.label} holds what is not a string")


@dataclass(frozen=True, slots=True)
class _Field:
    paths: tuple[_Path, ...]
    is_optional: bool

    def read(self, record: dict[str, Any]) -> str:
        """The first text there is; of an optional field without any the empty string."""
        first = self.paths[0]
        if not first.is_list and len(first.keys) == 1:
            # Nearly always, and several times faster than what follows.
            text = record.get(first.keys[0])
            if type(text) is str and text and not text.isspace():
                return text
            if (text is None or text == "") and self.is_optional and len(self.paths) == 1:
                return ""
        lacks: list[tuple[Lack, str]] = []
        for path in self.paths:
            text, lack = path.read(record)
            if not lack:
                return text
            lacks.append((lack, path.label))
        if self.is_optional:
            return ""
        for lack, label in lacks:
            if lack != "absent":
                raise BadRecordError(f"{label} is null" if lack == "null" else f"empty {label}")
        raise BadRecordError(f"no field {' or '.join(repr(path.label) for path in self.paths)}")


@dataclass(frozen=True, slots=True)
class _Segment:
    """A line, or what stands between [[ and ]]."""

    parts: "tuple[str | _Field | _Segment, ...]"

    def render(self, record: dict[str, Any]) -> str | None:
        """The text; None if a field of it is not there, or nothing but segments that are not."""
        if len(self.parts) == 1 and isinstance(only := self.parts[0], _Field):
            return only.read(record) or None
        texts: list[str] = []
        for part in self.parts:
            text = part if isinstance(part, str) else part.read(record) if isinstance(part, _Field) else ""
            if isinstance(part, _Field) and not text:
                return None
            texts.append(part.render(record) or "" if isinstance(part, _Segment) else text)
        return "".join(texts) if any(texts) or not self.parts else None

    def fields(self) -> Iterator[_Field]:
        """Its fields, and those of its segments."""
        for part in self.parts:
            if isinstance(part, _Segment):
                yield from part.fields()
            elif isinstance(part, _Field):
                yield part


class Template:
    """A compiled template.

    Raises:
        ConfigError: it is not well-formed.
    """

    def __init__(self, template: str) -> None:
        self._lines = tuple(_compile(template, line) for line in template.replace("\\n", "\n").split("\n"))
        self._fields = [field for line in self._lines for field in line.fields()]
        if not self._fields:
            raise ConfigError(f"template {template!r}: names no field; write for example {{text}}")
        parts = self._lines[0].parts
        is_plain = len(self._lines) == 1 and len(parts) == 1 and parts[0] is self._fields[0]
        self._only_field = self._fields[0] if is_plain else None

    def render(self, record: dict[str, Any]) -> str:
        """The text of a record.

        Raises:
            BadRecordError: a required field is absent, null or empty; any is no text; or all are left out.
        """
        if self._only_field is not None:
            text = self._only_field.read(record)
        else:
            text = "\n".join(line for line in [line.render(record) for line in self._lines] if line is not None)
        if not text or text.isspace():
            raise BadRecordError("empty text")
        return text

    def columns(self) -> list[tuple[str, ...]]:
        """For each required field the top-level names of which a record must have one."""
        return [tuple(path.keys[0] for path in field.paths) for field in self._fields if not field.is_optional]

    def all_columns(self) -> set[str]:
        """The top-level names that the template looks at."""
        return {path.keys[0] for field in self._fields for path in field.paths}


def _get(record: Any, keys: tuple[str, ...]) -> tuple[Any, Lack]:
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            return None, "absent"
        record = record[key]
    return record, "null" if record is None else ""


def _compile(template: str, line: str) -> _Segment:
    outer: list[str | _Field | _Segment] = []
    inner: list[str | _Field | _Segment] | None = None
    for token in _TOKEN.finditer(line):
        parts, spelling = outer if inner is None else inner, token[0]
        if token["field"] is not None:
            parts.append(_field(template, token["field"]))
        elif spelling in ("{{", "}}"):
            parts.append(spelling[0])
        elif spelling in ("{", "}"):
            raise ConfigError(f"template {template!r}: a single {spelling}; write {spelling * 2} for a brace")
        elif spelling == "[[" and inner is None:
            inner = []
        elif spelling == "]]" and inner is not None:
            outer.append(_segment(template, inner))
            inner = None
        else:
            parts.append(spelling)
    if inner is not None:
        raise ConfigError(f"template {template!r}: [[ without ]] in the same line")
    return _segment(template, outer)


def _segment(template: str, parts: list[str | _Field | _Segment]) -> _Segment:
    if len({part.is_optional for part in parts if isinstance(part, _Field)}) > 1:
        raise ConfigError(
            f"template {template!r}: an optional and a required field in one line, which would go with the optional "
            "one; put the optional part between [[ and ]]"
        )
    return _Segment(tuple(parts))


def _field(template: str, spelling: str) -> _Field:
    is_optional = spelling.endswith("?")
    matches = [_PATH.fullmatch(path) for path in spelling.removesuffix("?").split("|")]
    if not all(matches):
        raise ConfigError(
            f"template {template!r}: {{{spelling}}} is no field; write {{name}}, {{name?}}, {{a.b}}, {{a|b}}, "
            "{list[]} or {list[].a/b}"
        )
    return _Field(tuple(_path(match) for match in matches if match), is_optional)


def _path(match: re.Match[str]) -> _Path:
    columns = tuple(tuple(column.split(".")) for column in (match["columns"] or "").split("/") if column)
    return _Path(match[0], tuple(match["keys"].split(".")), match["list"] is not None, columns)

"""How a record becomes a document: the layouts of known corpora by name, or a template of one's own."""

import dataclasses
import difflib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.config_file import ConfigError
from data_prep.reading.chat import Turn, plain_text
from data_prep.reading.dialogues import read_turns
from data_prep.reading.field_template import BadRecordError, Template

ENCODINGS = ("utf-8", "gb18030", "big5")
"""Those in which a line end is one byte that is part of no other character."""

Split = Literal["file", "lines", "paragraphs"]
Extracted = tuple[str, tuple[Turn, ...]]
"""A text, and of a conversation its turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What of a record is read: the text of a template, a list of turns, or a question and its answer as two turns."""

    name: str = "template"
    text: str = ""
    """Template of the text; see field_template."""
    turns: str = ""
    """Fields of which one holds the turns, `chat|conversation`; see dialogues."""
    question: str = ""
    """Template of what the user says."""
    answer: str = ""
    """Template of what the assistant says to it."""
    kind: Literal["", "code"] = ""
    """What the texts are, where the layout tells it."""
    encoding: str = "utf-8"
    """Encoding of text and JSON files."""
    split: Split = "file"
    """What one document of a .txt, .md or .rst file is: the file, a line, or a paragraph (what stands between blank
    lines)."""

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ConfigError(f"input.encoding = {self.encoding!r}: expected one of {', '.join(ENCODINGS)}")
        if self.split not in ("file", "lines", "paragraphs"):
            raise ConfigError(f"input.split = {self.split!r}: expected 'file', 'lines' or 'paragraphs'")
        if bool(self.question) != bool(self.answer):
            raise ConfigError(f"layout {self.name!r}: has a question without an answer, or the reverse; give both")
        for template in filter(None, (self.text, self.question, self.answer)):
            Template(template)

    @classmethod
    def named(cls, name: str, *, encoding: str = "utf-8", split: Split = "file") -> "Layout":
        """A layout of PRESETS; "auto" finds for each file the one that fits.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PRESETS)}"
            raise ConfigError(f"input.layout = {name!r}: unknown layout; {hint}")
        return dataclasses.replace(PRESETS[name], encoding=encoding, split=split)

    @classmethod
    def of_template(cls, template: str, *, encoding: str = "utf-8", split: Split = "file") -> "Layout":
        """A layout whose text is a template such as `"{title?}\\n{text}"`, or a lone field such as `meta.text`.

        Raises:
            ConfigError: the template is not well-formed.
        """
        text = template if "{" in template else f"{{{template}}}"
        return cls(name=template, text=text, encoding=encoding, split=split)

    @property
    def is_auto(self) -> bool:
        """Whether the fields are still to be found out."""
        return not (self.text or self.turns or self.question)

    def extractor(self) -> Callable[[dict[str, Any]], Extracted]:
        """What takes the document out of a record; it raises BadRecordError if there is none."""
        if self.turns:
            names = self.turns.split("|")
            return lambda record: _conversation(record, names)
        if self.question:
            question, answer = Template(self.question), Template(self.answer)
            return lambda record: _exchange(record, question, answer)
        text = Template(self.text)
        return lambda record: (text.render(record), ())

    def columns(self, present: Collection[str]) -> list[str]:
        """Those of the columns of a table that the layout looks at, in their order.

        Raises:
            BadRecordError: one that it needs is not there.
        """
        needed = [names for template in self._templates() for names in template.columns()]
        for names in [tuple(self.turns.split("|"))] if self.turns else needed:
            if not set(names) & set(present):
                raise BadRecordError(f"no column {' or '.join(map(repr, names))}")
        wanted = self.fields()
        return [name for name in present if name in wanted]

    def fields(self) -> set[str]:
        """The top-level names of a record that the layout looks at; if it is "auto", those that tell which fits."""
        if self.is_auto:
            return {*_TELLING_FIELDS, *(name for layout in DETECTABLE for name in PRESETS[layout].fields())}
        if self.turns:
            return {*self.turns.split("|"), "system"}
        return {name for template in self._templates() for name in template.all_columns()}

    def detected(self, record: dict[str, Any]) -> "Layout | None":
        """The first of DETECTABLE that makes a document of the record, with this one's encoding and split."""
        for name in DETECTABLE:
            if name in _TELLING and not any(field in record for field in _TELLING[name]):
                continue
            layout = dataclasses.replace(PRESETS[name], encoding=self.encoding, split=self.split)
            try:
                layout.extractor()(record)
            except BadRecordError:
                continue
            return layout
        return None

    def _templates(self) -> list[Template]:
        return [Template(template) for template in (self.text, self.question, self.answer) if template]


def _conversation(record: dict[str, Any], names: list[str]) -> Extracted:
    for name in names:
        if record.get(name) is not None:
            turns = read_turns(record[name], record.get("system"))
            return plain_text(turns), turns
    raise BadRecordError(f"no field {' or '.join(map(repr, names))}")


def _exchange(record: dict[str, Any], question: Template, answer: Template) -> Extracted:
    turns = (Turn("user", question.render(record)), Turn("assistant", answer.render(record)))
    return plain_text(turns), turns


PRESETS = {
    layout.name: layout
    for layout in (
        Layout(name="auto"),
        Layout(name="text", text="{text}"),
        Layout(name="skypile", text="{text}"),
        Layout(name="slimpajama", text="{text}"),
        Layout(name="wikipedia", text="{title?}\n{text|completion}"),
        Layout(name="wanjuan-text", text="{title?}\n{content|paragraphs[]}"),
        Layout(name="baike", text="{title}\n{summary?}\n{sections[].title/content?}"),
        Layout(name="starcoder", text="{content}", kind="code"),
        Layout(name="messages", turns="messages|conversations|conversation"),
        Layout(name="sharegpt", turns="conversations|conversation|messages"),
        Layout(name="moss", turns="chat|conversation"),
        Layout(name="belle", question="{instruction}\n{input?}", answer="{output}"),
        Layout(name="firefly", question="{input}", answer="{target}"),
        Layout(name="zhihu", question="{INSTRUCTION|instruction}", answer="{RESPONSE|response}"),
        Layout(name="baidu-qa", question="{title}\n{desc?}", answer="{answer}"),
        Layout(name="qa", question="{question|prompt|query}", answer="{answer|response|completion|output}"),
    )
}
DETECTABLE = (
    *("messages", "sharegpt", "moss", "belle", "firefly", "zhihu", "qa", "baidu-qa", "wikipedia", "text"),
    *("starcoder", "wanjuan-text", "baike"),
)
"""In which order "auto" tries: what takes more fields before what would be content with some of them."""
_TELLING = {
    "starcoder": ("max_stars_repo_path", "max_stars_repo_name", "max_stars_count", "hexsha"),
    "baike": ("summary", "sections"),
}
"""Of these fields a record must have one for "auto" to find the layout: what the others say, many records would fit."""
_TELLING_FIELDS = tuple(name for names in _TELLING.values() for name in names)

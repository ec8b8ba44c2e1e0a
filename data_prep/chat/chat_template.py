"""A chat format as the Jinja template by which transformers, and what builds on it, writes conversations."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports this
    from data_prep.chat.chat_format import ChatFormat


def template(chat_format: "ChatFormat", eos_name: str) -> str:
    """The template of a format, for a tokenizer whose end of document is spelled so."""
    said = _expression(chat_format.lead, None, chat_format)
    cases = [
        _case("system", _system(chat_format)),
        _case("user", _written(chat_format.user, chat_format, "ns.system + ") + '{%- set ns.system = "" -%}'),
        _case("assistant", _written(chat_format.assistant, chat_format, f"{said} + ")),
        _case("tool", _written(chat_format.tool, chat_format)) if chat_format.tool else "",
    ]
    unknown = _error(f"the chat format {chat_format.name!r} has no turns of this role")
    opening = f"{{{{- {_literal(chat_format.begin)} -}}}}" if chat_format.begin else ""
    text = "".join(
        (
            '{%- set ns = namespace(system="") -%}',
            opening,
            _default_system(chat_format),
            "{%- for message in messages -%}{%- if false -%}",
            *cases,
            f"{{%- else -%}}{unknown}{{%- endif -%}}{{%- endfor -%}}",
            f"{{%- if ns.system -%}}{_error('no user turn follows the system prompt')}{{%- endif -%}}",
            f"{{%- if add_generation_prompt -%}}{{{{- {_literal(chat_format.assistant[0])} -}}}}{{%- endif -%}}",
        )
    )
    return text.replace("{eos}", json.dumps(eos_name)[1:-1])


def _case(role: str, content: str) -> str:
    return f'{{%- elif message["role"] == "{role}" -%}}{content}'


def _written(around: tuple[str, str], chat_format: "ChatFormat", before_content: str = "") -> str:
    return f"{{{{- {_expression(*around, chat_format, before_content)} -}}}}"


def _system(chat_format: "ChatFormat") -> str:
    if not chat_format.system_is_in_user:
        return _written(chat_format.system, chat_format)
    return f"{{%- set ns.system = ns.system + {_expression(*chat_format.system, chat_format)} -%}}"


def _default_system(chat_format: "ChatFormat") -> str:
    if not chat_format.default_system:
        return ""
    before, behind = chat_format.system
    said = chat_format.default_system.strip() if chat_format.strips else chat_format.default_system
    content = _literal(before + said + behind)
    written = f"{{%- set ns.system = {content} -%}}" if chat_format.system_is_in_user else f"{{{{- {content} -}}}}"
    return f'{{%- if not messages or messages[0]["role"] != "system" -%}}{written}{{%- endif -%}}'


def _expression(before: str, behind: str | None, chat_format: "ChatFormat", before_content: str = "") -> str:
    if behind is None:
        return _literal(before)
    content = 'message["content"] | trim' if chat_format.strips else 'message["content"]'
    return f"{_literal(before)} + {before_content}({content}) + {_literal(behind)}"


def _error(message: str) -> str:
    return f"{{{{- raise_exception({_literal(message)}) -}}}}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

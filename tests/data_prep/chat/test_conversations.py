import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.chat.chat_records import find_files, read_records
from data_prep.chat.conversations import Told, documents_of
from data_prep.chat.turns import Kind, Turn
from data_prep.reading.field_template import BadRecordError
from data_prep.reading.storage import InputError

Q, A, S = Turn("user", "q"), Turn("assistant", "a"), Turn("system", "s")
B = Turn("assistant", "b")


def message(turn: Turn) -> dict[str, str]:
    return turn._asdict()


CHATS: dict[str, tuple[dict[str, Any], tuple[Turn, ...]]] = {
    "messages": ({"messages": [message(S), message(Q), message(A)]}, (S, Q, A)),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        (S, Q, A),
    ),
    "moss": ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "q", "assistant": "b"}]}, (Q, A, Q, B)),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, (Q, A)),
    "alpaca with input": ({"instruction": "q", "input": "i", "output": "a"}, (Turn("user", "q\ni"), A)),
    "history": (
        {"instruction": "q", "output": "a", "history": [["q", "b"]], "system": "s"},
        (S, Q, B, Q, A),
    ),
    "prompt and response": ({"prompt": "q", "response": "a"}, (Q, A)),
    "question and answer": ({"question": "q", "answer": "a"}, (Q, A)),
    "query and answer": ({"query": "q", "answer": "a"}, (Q, A)),
    "firefly": ({"kind": "x", "input": "q", "target": "a"}, (Q, A)),
    "zhihu": ({"INSTRUCTION": "q", "RESPONSE": "a"}, (Q, A)),
}


@pytest.mark.parametrize("name", CHATS)
def test_the_published_forms_of_conversations_are_read(name: str):
    record, turns = CHATS[name]
    assert documents_of(record, "chat") == (Told(turns),)


PAIR = (Told((Q, A), 1), Told((Q, B), 1))
PAIRS: dict[str, tuple[dict[str, Any], tuple[Told, ...]]] = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
    "lists": ({"prompt": [message(Q)], "chosen": [message(A)], "rejected": [message(B)]}, PAIR),
    "prompt inside": ({"chosen": [message(Q), message(A)], "rejected": [message(Q), message(B)]}, PAIR),
    "ultrafeedback": (
        {
            "prompt": "q",
            "chosen": [message(Q), message(A)],
            "rejected": [message(Q), message(B)],
            "messages": [message(Q), message(A)],
        },
        PAIR,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        PAIR,
    ),
    "system and question": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        (Told((S, Q, A), 2), Told((S, Q, B), 2)),
    ),
    "system and whole conversations": (
        {"system": "s", "chosen": [message(Q), message(A)], "rejected": [message(Q), message(B)]},
        (Told((S, Q, A), 2), Told((S, Q, B), 2)),
    ),
    "later turns": (
        {"chosen": [*map(message, (Q, A, Q, A))], "rejected": [*map(message, (Q, A, Q, B))]},
        (Told((Q, A, Q, A), 3), Told((Q, A, Q, B), 3)),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_published_forms_of_pairs_are_read(name: str):
    record, told = PAIRS[name]
    assert documents_of(record, "pairs") == told


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q"},
        {"prompt": [message(Q)]},
        {"messages": [message(Q), message(A)]},
        {"question": "q", "answer": "a"},
    ],
)
def test_a_prompt_ends_before_the_answer(record: dict[str, Any]):
    assert documents_of(record, "prompts") == (Told((Q,)),)


BAD: list[tuple[Kind, dict[str, Any], str]] = [
    ("chat", {"text": "x"}, "no conversation: neither messages"),
    ("chat", {"messages": [message(Q)]}, "conversation without an answer"),
    ("chat", {"messages": [message(Q), {"role": "assistant", "content": " "}]}, "conversation with an empty turn"),
    ("chat", {"messages": "q"}, "conversation is not a list"),
    ("chat", {"prompt": "q", "response": "a", "history": "x"}, "history that is not a list"),
    ("chat", {"prompt": "q", "response": "\ud800"}, "lone surrogate"),
    ("pairs", {"prompt": "q", "chosen": "a"}, "no field 'rejected'"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": " "}, "empty rejected"),
    ("pairs", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ("pairs", {"chosen": "a", "rejected": "b"}, "no field 'prompt'"),
    (
        "pairs",
        {"chosen": [message(Q), message(A)], "rejected": [message(Turn("user", "p")), message(B)]},
        "chosen and rejected do not answer the same prompt",
    ),
    ("prompts", {"messages": [message(A)]}, "prompt without a question"),
    ("prompts", {"text": "x"}, "no field 'prompt'"),
]


@pytest.mark.parametrize(("kind", "record", "reason"), BAD)
def test_a_record_of_no_use_says_why(kind: Kind, record: dict[str, Any], reason: str):
    with pytest.raises(BadRecordError, match=reason):
        documents_of(record, kind)


def test_records_come_with_their_lines_from_every_kind_of_file(tmp_path: Path):
    records = [{"n": 1}, {"n": 2}]
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": 2}\nx\n')
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text('{\n"n": 1}')
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "d.parquet", row_group_size=1)
    (tmp_path / "e.parquet").write_text("x")
    (tmp_path / "readme.md").write_text("not looked at")
    files = find_files([str(tmp_path)])
    assert [Path(file.path).name for file in files] == ["a.jsonl", "b.json", "c.json", "d.parquet", "e.parquet"]
    found = [[(line, str(value)) for line, value in read_records(file)] for file in files]
    assert found == [
        [(1, "{'n': 1}"), (2, "blank line"), (3, "{'n': 2}"), (4, "invalid JSON")],
        [(1, "{'n': 1}"), (2, "{'n': 2}")],
        [(1, "{'n': 1}")],
        [(1, "{'n': 1}"), (2, "{'n': 2}")],
        [(1, "unreadable parquet file")],
    ]


def test_inputs_that_hold_no_records_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"the folder holds no .jsonl, .json or .parquet file"):
        find_files([str(tmp_path)])
    with pytest.raises(InputError, match=r"notes.txt: not a file of records; expected .jsonl"):
        find_files([str(tmp_path / "notes.txt")])
    with pytest.raises(InputError, match="no file matches"):
        find_files([str(tmp_path / "*.jsonl")])

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.config_file import ConfigError
from data_prep.reading import head
from data_prep.reading.chat import Turn
from data_prep.reading.corpus import find_inputs
from data_prep.reading.dialogues import read_turns
from data_prep.reading.documents import BadLine, Document, InputError, plan_units, read_unit
from data_prep.reading.field_template import BadRecordError, Template
from data_prep.reading.templates import DETECTABLE, PRESETS, Layout

SAMPLES = Path(__file__).parent / "samples"


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


EXPECTED: dict[str, list[str | tuple[Turn, ...]]] = {
    "text.jsonl": ["Rivers carry more water in spring.\nSnow melts in the hills.", "结尾是 the end"],
    "skypile.jsonl": ["今年的茶叶比去年早收了十天。\n茶农说，春天来得早。", "修表匠老周的铺子在桥头，开了三十年。"],
    "slimpajama.jsonl": [
        "The lighthouse was built of grey stone, and nobody remembers by whom.",
        "def area(r):\n    return 3.14159 * r * r\n",
    ],
    "wikipedia.json": [
        "石桥镇是一个建在两条河之间的小镇。镇上有三座石桥，其中最老的一座有四百年历史。",
        "砚台：\n砚台是研墨的用具，多用石头制成。",
    ],
    "wanjuan-text.jsonl": [
        "河边的树\n河边有七棵柳树，风一吹就摇。",
        "# 秋天的市场\n市场里摆满了柿子和栗子。\n**柿子**要挑软的。",
        "雨\n下了一夜的雨。\n早上天晴了。",
    ],
    "baike.json": [
        "山核桃\n简介\n山核桃长在山坡上，秋天成熟。\n吃法\n炒熟后去壳。\n也可以榨油。",
        "竹笛\n竹笛是用竹子做的乐器。",
        "木船\n木船用杉木造。\n种类",
    ],
    "starcoder.jsonl": [
        "def area(width, height):\n    return width * height\n",
        '#include <stdio.h>\n\nint main(void) {\n\tputs("hello");\n}\n',
    ],
    "messages.jsonl": [
        (Turn("system", "Answer briefly."), user("What is 2 + 3?"), assistant("5")),
        (user("现在是什么时间 time"), assistant("三点。")),
    ],
    "sharegpt.json": [
        (
            user("写一句关于秋天的话。"),
            assistant("叶子落在石阶上，没有声音。"),
            user("再短一点。"),
            assistant("叶落无声。"),
        ),
        (Turn("system", "You are a gardener."), user("When do I plant beans?"), assistant("After the last frost.")),
    ],
    "belle.json": [
        (user("计算下面几个数的平均值。\n2, 4, 9"), assistant("平均值是 5。")),
        (user("把下面的句子改成疑问句。\n他会吹笛子。"), assistant("他会吹笛子吗？")),
    ],
    "firefly.jsonl": [
        (user("根据上联给出下联：山高月小"), assistant("下联：水落石出")),
        (user("下文中存在哪些地名：\n船从石桥镇开到青山。"), assistant("石桥镇，青山")),
    ],
    "moss.jsonl": [
        (
            user("怎样保养木船？"),
            assistant("每年刷一次桐油，\n晾干再下水。"),
            user("桐油哪里买？"),
            assistant('Search("桐油")'),
            Turn("tool", "一家老店"),
            assistant("桥头的老店有。"),
            user("谢谢"),
            assistant("不客气 <eom>"),
        )
    ],
    "zhihu.jsonl": [
        (user("为什么石桥多是拱形的？"), assistant("石头耐压不耐拉，\n拱形让每块石头都受压。")),
        (user("柳树为什么长在河边？"), assistant("柳树喜湿。")),
    ],
    "baidu-qa.json": [
        (user("人站在地球上为什么不会掉下去 "), assistant("因为重力指向地心，\r\n所以哪里都是脚下。")),
        (user("养狗\n第一次养狗，要注意什么？"), assistant("勤洗澡。")),
    ],
    "qa.jsonl": [
        (user("Which bird sings at night?"), assistant("The nightingale.")),
        (user("Name a stone."), assistant("Granite.")),
    ],
}
VARIANTS: dict[str, tuple[str, str | tuple[Turn, ...]]] = {
    "wikipedia-titled.jsonl": ("wikipedia", "Stone bridge\nA stone bridge is a bridge made of stone."),
    "belle-conversations.json": ("sharegpt", (user("介绍一道家常菜。"), assistant("番茄炒蛋：先炒蛋，再放番茄。"))),
    "moss-pairs.jsonl": (
        "moss",
        (user("写一个题目。"), assistant("《桥》"), user("再写一个。"), assistant("《河》")),
    ),
}


def read(path: Path, layout: Layout) -> list[str | tuple[Turn, ...] | BadLine]:
    items = [item for unit in plan_units(find_inputs([str(path)]), layout) for item in read_unit(unit)]
    for item in items:
        if isinstance(item, Document) and item.turns:
            assert item.text == "\n".join(turn.content for turn in item.turns)
    return [item if isinstance(item, BadLine) else item.turns or item.text for item in items]


def test_every_layout_has_a_sample():
    assert {Path(name).stem for name in EXPECTED} == set(PRESETS) - {"auto"}
    assert set(DETECTABLE) <= set(PRESETS)
    assert {path.name for path in SAMPLES.iterdir()} == {*EXPECTED, *VARIANTS}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_known_corpus_is_read_by_its_name_and_by_its_fields(name: str):
    assert read(SAMPLES / name, Layout.named(Path(name).stem)) == EXPECTED[name]
    assert read(SAMPLES / name, Layout.named("auto")) == EXPECTED[name]


def sample_records(name: str) -> list[dict[str, object]]:
    content = (SAMPLES / name).read_text()
    return json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("name", [*EXPECTED, *VARIANTS])
def test_every_record_of_a_known_corpus_tells_its_layout_alone(tmp_path: Path, name: str):
    expected = EXPECTED[name] if name in EXPECTED else [VARIANTS[name][1]]
    for record, document in zip(sample_records(name), expected, strict=True):
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(record))
        assert read(path, Layout.named("auto")) == [document]


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"title": "t", "content": "a"}, "t\na"),
        ({"title": "t", "paragraphs": ["a", "b"]}, "t\na\nb"),
        ({"title": "t", "text": "a"}, "t\na"),
        ({"title": 5, "text": "a"}, "a"),
        ({"title": "t", "summary": "", "sections": []}, "t"),
        ({"question": "q", "answer": "a", "text": "q a"}, (user("q"), assistant("a"))),
        ({"title": "q", "answer": "a", "text": "q a"}, (user("q"), assistant("a"))),
    ],
)
def test_of_a_record_that_several_layouts_fit_the_fullest_is_taken(tmp_path: Path, record: object, document: object):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read(path, Layout.named("auto")) == [document]


@pytest.mark.parametrize("fields", [["title", "body"], ["title"], ["title", "abstract", "n"]])
def test_a_title_alone_is_no_text(tmp_path: Path, fields: list[str]):
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(fields, "a")))
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(fields, "a")]), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=f"no layout fits its records, whose fields are {', '.join(fields)}"):
            plan_units(find_inputs([str(path)]), Layout.named("auto"))


def test_only_a_layout_of_code_is_code(tmp_path: Path):
    assert [name for name, layout in PRESETS.items() if layout.kind == "code"] == ["starcoder"]
    for name in ("starcoder.jsonl", "wanjuan-text.jsonl"):
        (unit,) = plan_units(find_inputs([str(SAMPLES / name)]), Layout.named("auto"))
        assert unit.layout == PRESETS[Path(name).stem]


@pytest.mark.parametrize("name", VARIANTS)
def test_other_forms_of_a_known_corpus_are_read_too(name: str):
    layout, expected = VARIANTS[name]
    assert read(SAMPLES / name, Layout.named(layout)) == [expected]


@pytest.mark.parametrize("name", ["zhihu.jsonl", "starcoder.jsonl", "sharegpt.json", "baike.json", "moss.jsonl"])
def test_the_same_rows_in_parquet_give_the_same_documents(tmp_path: Path, name: str):
    rows: list[Any] = sample_records(name)
    if name == "moss.jsonl":
        rows[0]["chat"]["turn_3"] = None  # as in a table of which another row has more turns
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", Layout.named(Path(name).stem)) == EXPECTED[name]
    assert read(tmp_path / "a.parquet", Layout.named("auto")) == EXPECTED[name]


def render(template: str, record: dict[str, object]) -> str:
    try:
        return Template(template).render(record)
    except BadRecordError as error:
        return f"BAD {error}"


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("{text}", {"text": " a \n"}, " a \n"),
        ("{meta.text}", {"meta": {"text": "a"}}, "a"),
        ("{meta.text}", {"meta": "a"}, "BAD no field 'meta.text'"),
        ("{a|b}", {"a": "", "b": "b"}, "b"),
        ("{a|b}", {"a": None}, "BAD a is null"),
        ("{a|b}", {}, "BAD no field 'a' or 'b'"),
        ("{title?}\n{text}", {"title": "t", "text": "a"}, "t\na"),
        ("{title?}\n{text}", {"title": " ", "text": "a"}, "a"),
        ("{title?}\n{text}", {"title": None, "text": "a"}, "a"),
        ("{title?}\n{text}", {"title": 5, "text": "a"}, "BAD title is not a string"),
        ("{title?}\\n{text}", {"title": "t", "text": "a"}, "t\na"),
        ("题：{title?}\n\n{text}", {"text": "a"}, "\na"),
        ("[[{title?}：]]{text}", {"title": "t", "text": "a"}, "t：a"),
        ("[[{title?}：]]{text}", {"text": "a"}, "a"),
        ("[[{a?}]][[{b?}]]\n{text}", {"text": "a"}, "a"),
        ("{a?}", {}, "BAD empty text"),
        ("{{{a}}} [x] {b}", {"a": "1", "b": "2"}, "{1} [x] 2"),
        ("{p[]}", {"p": ["a", "", None, "b "]}, "a\nb "),
        ("{p[]}", {"p": []}, "BAD empty p[]"),
        ("{p[]}", {"p": "a"}, "BAD p[] is not a list"),
        ("{p[]}", {"p": [1]}, "BAD p[] holds what is not a string"),
        ("{p[].a.b/c}", {"p": [{"a": {"b": "1"}, "c": "2"}, {"c": "3"}, {}, 4]}, "1\n2\n3"),
        ("{题目}：{正文}", {"题目": "一", "正文": "二"}, "一：二"),
    ],
)
def test_a_template_takes_what_is_there(template: str, record: dict[str, object], text: str):
    assert render(template, record) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a?}: {b}", r"an optional and a required field in one line.*between \[\[ and \]\]"),
        ("text}", "a single }; write }}"),
        ("no field", "names no field"),
        ("[[{a?}", r"\[\[ without \]\]"),
        ("{}", r"\{\} is no field; write \{name\}"),
        ("{a[}", "is no field"),
        ("{a[].b[]}", "is no field"),
    ],
)
def test_a_template_that_is_not_well_formed_is_refused(template: str, message: str):
    with pytest.raises(ConfigError, match=message):
        Template(template)


@given(st.text(), st.text())
def test_texts_come_through_a_template_unchanged(title: str, text: str):
    found = render("{title?}\n{text}", {"title": title, "text": text})
    if text.strip():
        assert found == (f"{title}\n{text}" if title.strip() else text)
    else:
        assert found == "BAD empty text"


@given(st.sampled_from(["the end", "时间 time", "<eom", "Human", "|>: im_end", "n"]), st.booleans())
def test_taking_off_the_marks_of_moss_takes_nothing_of_the_text(text: str, is_last: bool):
    turn = {"Human": f"<|Human|>: {text}<eoh>\n", "MOSS": f"<|MOSS|>: {text}<eom>\n"}
    turns = read_turns({"turn_1": turn} if is_last else {"turn_1": turn, "turn_2": turn})
    assert {turn.content for turn in turns} == {text}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("hello", "conversation is not a list"),
        ([], "conversation without turns"),
        ([{"role": "system", "content": "a"}], "conversation without turns"),
        ({}, "conversation without turns"),
        (["hello"], "conversation with a turn that is not an object"),
        ([{"role": "narrator", "content": "a"}], "conversation with an unknown role"),
        ([{"content": "a"}], "conversation with a turn of no role"),
        ([{"role": ["user"], "content": "a"}], "conversation with an unknown role"),
        ([{"role": "user", "content": None}], "conversation with a turn that is not a text"),
        ([{"role": "user"}], "conversation with a turn that is not a text"),
        ([{"from": "human", "value": " \n"}], "conversation with an empty turn"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "conversation with more than text"),
        ({"turn_1": {"Human": "a"}}, "conversation with a turn that lacks Human or MOSS"),
    ],
)
def test_a_conversation_in_no_known_form_is_refused(value: object, reason: str):
    with pytest.raises(BadRecordError) as refused:
        read_turns(value)
    assert str(refused.value) == reason


@pytest.mark.parametrize("content", [None, "", " "])
@pytest.mark.parametrize("field", ["tool_calls", "function_call"])
def test_a_turn_may_consist_of_calls_of_tools(content: str | None, field: str):
    calls = [{"id": "1", "function": {"name": "find", "arguments": '{"what": "桐油"}'}}]
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": content, field: calls},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c", field: None},
    ]
    _, called, *rest = read_turns(turns)
    assert called.role == "assistant"
    assert "桐油" in called.content
    assert json.loads(called.content) == calls
    assert rest == [Turn("tool", "b"), assistant("c")]
    turns[1]["content"] = "I look."
    assert read_turns(turns)[1].content == f"I look.\n{called.content}"


def test_an_empty_system_prompt_is_none_and_only_one_speaks_first():
    turns = [{"role": "system", "content": " "}, {"role": "Human", "content": "a"}]
    assert read_turns(turns) == (user("a"),)
    assert read_turns(turns, "s") == (Turn("system", "s"), user("a"))
    assert read_turns([{"role": "system", "content": "own"}, *turns[1:]], "s")[0] == Turn("system", "own")


def test_the_first_record_that_any_layout_fits_tells_the_layout_of_the_whole_file(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    records = ['{"texts": 1}', "cut {", '{"question": "q", "answer": "a"}', '{"text": "late"}']
    path.write_text("\n".join(records))
    units = plan_units(find_inputs([str(path)]), Layout.named("auto", encoding="gb18030"), range_bytes=30)
    assert len(units) > 1
    assert {unit.layout for unit in units} == {Layout.named("qa", encoding="gb18030")}


@pytest.mark.parametrize("lines", [["", " "] * 100, ["cut {"] * 300])
def test_bad_lines_at_the_head_of_a_file_hide_no_layout(tmp_path: Path, lines: list[str]):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, '{"question": "q", "answer": "a"}']))
    assert read(path, Layout.named("auto"))[-1] == (user("q"), assistant("a"))


def test_the_layout_is_looked_for_in_the_head_of_a_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.jsonl"
    path.write_text("bad\n" * 100 + '{"question": "q", "answer": "a"}')
    monkeypatch.setattr(head, "MAX_HEAD_BYTES", 200)
    assert plan_units(find_inputs([str(path)]), Layout.named("auto"))[0].layout.name == "text"
    monkeypatch.setattr(head, "MAX_HEAD_BYTES", 400)
    assert plan_units(find_inputs([str(path)]), Layout.named("auto"))[0].layout.name == "qa"


def test_records_that_no_layout_fits_are_named_with_their_fields(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"titel": "a", "inhalt": "bc"}\n')
    with pytest.raises(
        InputError,
        match=r"a\.jsonl: no layout fits .* fields are titel, inhalt\. .*input\.text_field = 'inhalt' .*'\{inhalt\}'",
    ):
        plan_units(find_inputs([str(path)]), Layout.named("auto"))
    assert read(path, Layout.of_template("{titel}: {inhalt}")) == ["a: bc"]
    path.write_text("no JSON at all\n")
    assert read(path, Layout.named("auto")) == [BadLine(0, 1, 0, "invalid JSON", b"no JSON at all")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.named("mesages"), r"input\.layout = 'mesages': unknown layout; did you mean 'messages'"),
        (lambda: Layout.named("xyz"), "known are auto, text"),
        (
            lambda: Layout.named("text", encoding="utf-16"),
            r"input\.encoding = 'utf-16': expected one of utf-8, gb18030",
        ),
        (lambda: Layout.named("text", split="words"), r"input\.split = 'words'"),  # pyright: ignore[reportArgumentType]
        (lambda: Layout.of_template("{a"), "a single {"),
        (lambda: Layout(question="{q}"), "a question without an answer"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_layout_is_a_value_that_travels_to_other_processes():
    layout = replace(Layout.named("belle"), encoding="gb18030")
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout.extractor()({"instruction": "a", "output": "b"}) == ("a\nb", (user("a"), assistant("b")))

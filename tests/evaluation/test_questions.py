import json
from pathlib import Path

import pytest

from data_prep.chat.chat_format import CHAT_FILE, FORMAT, FORMATS, ChatFormatError
from data_prep.chat.turns import Turn
from evaluation.questions import Prompter, Question, QuestionError, chat_format_for, read_questions
from tests.prepared import tokenizer

TEMPLATE = "Q: {question}\nA:"


def question(text: str, *answers: str) -> Question:
    return Question("1", (Turn("user", text),), answers)


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("record", "turns", "answers"),
    [
        ({"question": "1 + 1?", "answer": "It is\n#### 2"}, [("user", "1 + 1?")], ("It is\n#### 2",)),
        ({"prompt": "1 + 1?", "answer": 2}, [("user", "1 + 1?")], ("2",)),
        ({"question": "who?", "answer": ["he", "she"]}, [("user", "who?")], ("he", "she")),
        (
            {"system": "Be brief.", "question": "who?", "response": "he"},
            [("system", "Be brief."), ("user", "who?")],
            ("he",),
        ),
        (
            {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "he"}]},
            [("user", "who?")],
            ("he",),
        ),
        (
            {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "he"}], "answer": "she"},
            [("user", "who?")],
            ("she",),
        ),
    ],
)
def test_a_question_is_read_in_every_form(tmp_path: Path, record, turns, answers):
    (found,) = read_questions(write_lines(tmp_path / "a.jsonl", record), need_answers=True)
    assert (found.turns, found.answers) == (tuple(Turn(*turn) for turn in turns), answers)


def test_a_question_is_named_by_its_id_or_its_line(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", {"question": "a"}, {"question": "b", "id": "x7"})
    assert [found.id for found in read_questions(path, need_answers=False)] == ["1", "x7"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{broken\n", "a.jsonl:1: "),
        ('{"question": "a"}\n', "a.jsonl:1: no answer; expected a field answer or answers"),
        ('\n{"text": "a"}\n', "a.jsonl:2: no question; expected a field question, prompt"),
        ('{"messages": [{"role": "wizard", "content": "a"}]}\n', "a.jsonl:1: "),
        ("[]\n", "a.jsonl:1: not a JSON object"),
        ("\n", "a.jsonl: has no question"),
        (None, "a.jsonl: cannot be read"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused(tmp_path: Path, content: str | None, complaint: str):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(QuestionError, match=complaint):
        read_questions(tmp_path / "a.jsonl", need_answers=True)


def test_a_model_without_chat_format_reads_the_template_after_its_examples():
    made = tokenizer()
    prompter = Prompter(made, None, TEMPLATE, [question("x?", "1"), question("y?", "2")])
    ids = prompter.prompt(question("z?"), context_length=500, max_new_tokens=10)
    assert ids == [made.eos_id, *made.encode("Q: x?\nA: 1\n\nQ: y?\nA: 2\n\nQ: z?\nA:")]
    assert prompter.stop_ids() == [made.eos_id]


def test_a_chat_model_reads_turns_and_ends_with_its_stop_token():
    made, chatml = tokenizer(), FORMATS["chatml"]
    prompter = Prompter(made, chatml, TEMPLATE, [question("x?", "1")])
    ids = prompter.prompt(question("z?"), context_length=500, max_new_tokens=10)
    assert ids == chatml.prompt(made, [Turn("user", "x?"), Turn("assistant", "1"), Turn("user", "z?")])
    assert prompter.stop_ids() == [made.special_id("<|im_end|>"), made.eos_id]


def test_the_first_examples_make_room_for_the_answer():
    made = tokenizer()
    shots = [question(f"{i}?", "1") for i in range(4)]
    prompter, asked = Prompter(made, None, TEMPLATE, shots), question("z?")

    def prompt_with(some: list[Question]) -> list[int]:
        found = Prompter(made, None, TEMPLATE, some).prompt(asked, context_length=500, max_new_tokens=1)
        assert found is not None
        return found

    two, none = prompt_with(shots[2:]), prompt_with([])
    assert prompter.prompt(asked, context_length=len(two) + 5, max_new_tokens=5) == two
    assert prompter.prompt(asked, context_length=len(none) + 1, max_new_tokens=5) == none
    assert prompter.prompt(asked, context_length=len(none), max_new_tokens=5) is None


def test_a_model_has_the_chat_format_of_its_run(tmp_path: Path):
    run, step = tmp_path / "run", tmp_path / "run" / "step-5"
    step.mkdir(parents=True)
    (step / "record.json").write_text("{}")
    assert chat_format_for(step, "auto") is None
    table = {"format": FORMAT, "kind": "chat", "row_tokens": 64, "chat_format": FORMATS["zephyr"].to_json()}
    (run / CHAT_FILE).write_text(json.dumps(table))
    for folder in (run, step):
        assert chat_format_for(folder, "auto") == FORMATS["zephyr"]
        assert chat_format_for(folder, "none") is None
        assert chat_format_for(folder, "llama2") == FORMATS["llama2"]
    with pytest.raises(ChatFormatError, match="did you mean 'chatml'"):
        chat_format_for(run, "chatmel")
    inside = run / "exported"
    inside.mkdir()
    assert chat_format_for(inside, "auto") is None

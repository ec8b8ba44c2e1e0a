import dataclasses
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat.chat_format import FORMATS
from data_prep.reading.chat import Turn
from evaluation import multiple_choice
from evaluation.choice_figures import table
from evaluation.choice_prompts import Prompter, read_letter
from evaluation.choice_tasks import Question, Subject, read_task
from evaluation.items import wilson_interval
from evaluation.model_folder import LoadedModel
from evaluation.multiple_choice import evaluate_choice
from tests.evaluation import choice_folders
from tests.evaluation.stored import byte_level_tokenizer, make_run, model_config
from tests.models import make_model

TOKENIZER = byte_level_tokenizer()


def loaded_model(context_length: int = 1_024, path: Path = Path()) -> LoadedModel:
    model = make_model(model_config(TOKENIZER, context_length=context_length), seed=3, dtype=torch.float64).eval()
    return LoadedModel(model, TOKENIZER, path)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model()


def log_likelihood_of(loaded: LoadedModel, context: str, continuation: str) -> float:
    ids, start = TOKENIZER.encode(context + continuation), len(TOKENIZER.encode(context))
    assert ids[:start] == TOKENIZER.encode(context)
    with torch.no_grad():
        log_probs_TV = loaded.model(torch.tensor([ids]))[0].log_softmax(dim=-1)
    return sum(log_probs_TV[place - 1, ids[place]].item() for place in range(start, len(ids)))


def read_items(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()]


def test_letters_compete_behind_the_examples_of_the_subject(loaded, tmp_path):
    folder = choice_folders.mmlu(tmp_path / "mmlu")
    figures = evaluate_choice(loaded, [folder], shots=2, out=tmp_path / "out")["mmlu"]
    items, num_correct = read_items(tmp_path / "out"), 0
    for item, number in zip(items[:3], range(3), strict=True):
        blocks = ["The following are multiple choice questions (with answers) about abstract algebra."]
        for split, i, answer in (("dev", 0, " A"), ("dev", 1, " B"), ("test", number, "")):
            choices = f"A. {2 * i}\nB. {2 * i + 1}\nC. {i + 7}\nD. none"
            blocks.append(f"abstr, {split} {i}:\nwhat is {i} + {i}?\n{choices}\nAnswer:{answer}")
        expected = [log_likelihood_of(loaded, "\n\n".join(blocks), f" {letter}") for letter in "ABCD"]
        assert item["scores"]["sum"] == pytest.approx(expected, abs=1e-9)
        assert item["prediction"] == "ABCD"[expected.index(max(expected))]
        assert (item["task"], item["subject"], item["id"]) == ("mmlu", "abstract_algebra", str(number + 1))
        assert (item["answer"], item["num_shots"], item["ill_formed"]) == ("ABCD"[number], 2, False)
        num_correct += item["prediction"] == item["answer"]
    assert figures["subjects"]["abstract_algebra"]["num_correct"] == num_correct
    assert (figures["num_items"], figures["random"], figures["num_ill_formed"]) == (6, 0.25, 0)
    accuracies = [subject["accuracy"] for subject in figures["subjects"].values()]
    assert figures["macro_accuracy"] == pytest.approx(sum(accuracies) / 2)
    (written,) = [json.loads(line) for line in (tmp_path / "out" / "results.json").read_text().splitlines()]
    assert written["mmlu"]["accuracy"] == figures["accuracy"]


def test_texts_of_choices_compete_by_sum_by_token_and_by_character(loaded, tmp_path):
    folder = choice_folders.arc(tmp_path / "arc")
    figures = evaluate_choice(loaded, [folder / "ARC-Easy"], shots=1, scoring="cloze", out=tmp_path / "out")
    item = read_items(tmp_path / "out")[3]
    context = "Question: Which thing, 0?\nAnswer: thing B0\n\nQuestion: Which thing, 23?\nAnswer:"
    texts = [f"thing {label}23" for label in "ABCDE"]
    sums = [log_likelihood_of(loaded, context, f" {text}") for text in texts]
    assert item["scores"]["sum"] == pytest.approx(sums, abs=1e-9)
    num_tokens = [len(TOKENIZER.encode(f" {text}")) for text in texts]
    assert item["scores"]["token"] == pytest.approx([a / b for a, b in zip(sums, num_tokens, strict=True)])
    per_character = [a / len(text) for a, text in zip(sums, texts, strict=True)]
    assert item["scores"]["character"] == pytest.approx(per_character)
    assert item["prediction"] == "ABCDE"[per_character.index(max(per_character))] == item["predictions"]["character"]
    assert figures["ARC-Easy"]["random"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 3 + 1 / 5) / 4)
    assert set(figures["ARC-Easy"]["accuracy_by"]) == {"sum", "token", "character"}


def test_chinese_questions_are_asked_in_chinese_by_category(loaded, tmp_path):
    folder = choice_folders.ceval(tmp_path / "ceval")
    (folder / "subject_mapping.json").write_text('{"logic": ["Logic", "逻辑学", "Humanities"]}', encoding="utf-8")
    figures = evaluate_choice(loaded, [folder], shots=1, out=tmp_path / "out")["ceval"]
    item = read_items(tmp_path / "out")[2]
    shown = "第{0}题：下列正确的是____。\nA. 甲{0}\nB. 乙\nC. 丙\nD. 丁\n答案："
    context = "\n\n".join(
        ["以下是关于逻辑学的单项选择题，请选出其中的正确答案。", shown.format(0) + "C", shown.format(2)]
    )
    assert item["scores"]["sum"] == pytest.approx([log_likelihood_of(loaded, context, c) for c in "ABCD"], abs=1e-9)
    assert figures["categories"]["Humanities"]["num_items"] == 3


def questions(num_questions: int) -> list[Question]:
    return [Question(str(i), f"what of {i}?", ("this", "that"), i % 2) for i in range(num_questions)]


def prompter(max_tokens: int, **changes) -> Prompter:
    settings = {"scoring": "letter", "language": "en", "num_shots": 3, "chat_format": None} | changes
    return Prompter(tokenizer=TOKENIZER, max_tokens=max_tokens, **settings)


def test_examples_that_do_not_fit_are_left_out_from_the_front():
    subject = Subject("s", "things", shots=questions(3))
    (whole,) = prompter(10_000).prompts(subject, [questions(9)[8]])
    length = sum(map(len, whole.pairs[0]))
    (fitting,) = prompter(length).prompts(subject, [questions(9)[8]])
    assert (fitting, fitting.num_shots, fitting.is_cut) == (whole, 3, False)
    (fewer,) = prompter(length - 1).prompts(subject, [questions(9)[8]])
    text = TOKENIZER.decode(fewer.pairs[0][0])
    assert (fewer.num_shots, fewer.is_cut) == (2, False)
    assert "what of 0?" not in text
    assert text.startswith("The following are multiple choice questions (with answers) about things.\n\nwhat of 1?")
    (cut,) = prompter(9).prompts(subject, [questions(9)[8]])
    assert (cut.num_shots, cut.is_cut) == (0, True)
    assert [len(context) + len(continuation) for context, continuation in cut.pairs] == [9, 9]
    assert whole.pairs[0][0][-len(cut.pairs[0][0]) :] == cut.pairs[0][0]


def test_what_was_left_out_or_cut_is_counted_and_said(tmp_path):
    figures = evaluate_choice(loaded_model(150), [choice_folders.mmlu(tmp_path / "mmlu")], shots=5)
    assert figures["mmlu"]["num_fewer_shots"] == 6
    assert "too long for the context: 6 with fewer shots, 0 cut" in "\n".join(table(figures))
    figures = evaluate_choice(loaded_model(40), [tmp_path / "mmlu"], shots=0)
    assert figures["mmlu"]["num_cut"] == 6


def test_an_answer_that_shares_a_token_with_the_context_is_scored_from_that_token_on():
    question = Question("1", "x", ("n", "m"), 0)
    merged = dataclasses.replace(prompter(100, scoring="cloze", num_shots=0), tokenizer=_Merging())
    assert merged.prompts(Subject("s", ""), [question])[0].pairs == [([1, 2], [34]), ([1, 2, 3], [5])]


class _Merging:
    """A tokenizer that makes one token of the context's end and " n"."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        ends = {"Answer:": [1, 2, 3], "Answer: n": [1, 2, 34], "Answer: m": [1, 2, 3, 5]}
        return [ends[text.split("\n")[-1]] for text in texts]


def test_a_chat_asks_in_turns_and_scores_the_answer_without_its_stop_token(loaded):
    subject = Subject("s", "things", shots=questions(1))
    chatml = FORMATS["chatml"]
    asking = prompter(10_000, num_shots=1, chat_format=chatml)
    ((context, a), (other, b)) = asking.prompts(subject, [questions(2)[1]])[0].pairs
    shown = "what of {}?\nA. this\nB. that\nAnswer with the letter of the right choice alone."
    header = "The following are multiple choice questions (with answers) about things.\n\n"
    turns = [Turn("user", header + shown.format(0)), Turn("assistant", "A"), Turn("user", shown.format(1))]
    assert context == other == chatml.prompt(TOKENIZER, turns)
    assert (a, b) == (TOKENIZER.encode("A"), TOKENIZER.encode("B"))
    asking = prompter(10_000, num_shots=0, chat_format=chatml, scoring="generated")
    assert asking.prompts(subject, [questions(1)[0]])[0].pairs == [
        (chatml.prompt(TOKENIZER, [Turn("user", header + shown.format(0))]), [])
    ]
    asking = prompter(10_000, num_shots=0, chat_format=chatml, scoring="cloze")
    ((context, this), (_, that)) = asking.prompts(subject, [questions(1)[0]])[0].pairs
    assert context == chatml.prompt(TOKENIZER, [Turn("user", "what of 0?")])
    assert (this, that) == (TOKENIZER.encode("this"), TOKENIZER.encode("that"))


@pytest.mark.parametrize("name", ["chatml", "zephyr", "alpaca"])
def test_whatever_the_chat_format_the_answer_is_scored_without_what_stops_it(name):
    chat_format = FORMATS[name]
    asking = prompter(10_000, num_shots=1, chat_format=chat_format)
    for context, continuation in asking.prompts(Subject("s", "", shots=questions(1)), questions(2))[1].pairs:
        assert TOKENIZER.decode(context + continuation).endswith(("A", "B"))
        assert not {*continuation} & {*chat_format.stop_ids(TOKENIZER)}


def test_a_written_letter_is_the_answer_and_anything_else_is_wrong_and_counted(loaded, tmp_path, monkeypatch):
    outputs = {0: " A\n", 1: " (B)", 2: " I think it is C", 3: ""}
    asked: list[dict] = []

    def complete_batch(model, prompts, **options):
        asked.append({"prompts": prompts, **options})
        return [[TOKENIZER.encode(outputs[number])] for number in range(len(prompts))]

    monkeypatch.setattr("evaluation.engine.complete_batch", complete_batch)
    folder = choice_folders.mmlu(tmp_path / "mmlu", num_questions=4)
    figures = evaluate_choice(loaded, [folder], shots=0, scoring="generated", out=tmp_path / "out")["mmlu"]
    assert (figures["num_correct"], figures["num_ill_formed"], figures["num_items"]) == (4, 4, 8)
    items = read_items(tmp_path / "out")[:4]
    assert [item["prediction"] for item in items] == ["A", "B", None, None]
    assert [item["ill_formed"] for item in items] == [False, False, True, True]
    assert items[2]["output"] == " I think it is C"
    assert TOKENIZER.decode(asked[0]["prompts"][0]).endswith("D. none\nAnswer:")
    ends_line = TOKENIZER.encode("\n")[-1]
    assert {TOKENIZER.eos_id, ends_line} <= set(asked[0]["stop_ids"])


def test_the_model_writes_answers(loaded, tmp_path):
    folder = choice_folders.mmlu(tmp_path / "mmlu", num_questions=1)
    figures = evaluate_choice(loaded, [folder], shots=0, scoring="generated", max_new_tokens=4)["mmlu"]
    assert figures["num_items"] == 2
    assert 0 <= figures["num_correct"] + figures["num_ill_formed"] <= 2


@pytest.mark.parametrize(
    ("output", "index"),
    [
        ("B", 1), (" B", 1), ("B.", 1), ("(B)", 1), ("B) Paris", 1), ("B. Paris", 1), ("B: Paris.", 1), ("\n\nB\nC", 1),
        ("Answer: B", 1), ("The answer is B.", 1), ("The correct answer is (B) Paris.", 1), ("答案：B", 1),
        ("正确答案是Ｂ。", 1), ("选B", 1), ("B。", 1), ("C", 2), ("C. A (really)", 2),
        ("", None), ("b", None), ("D", None), ("A or B", None), ("A, B", None), ("AB", None), ("A cat", None),
        ("I think B", None), ("B is right", None), ("not B", None), ("Paris", None), ("B. Rome", None), ("(B", None),
        ("A. Rome B. Paris", None), ("The answer is", None), ("B B", None),
    ],
)  # fmt: skip
def test_an_answer_is_a_letter_in_a_few_forms_and_nothing_is_guessed(output, index):
    assert read_letter(output, ("Rome", "Paris", "A (really)")) == index


@given(st.text(alphabet="ABC().: \n答案是answer", max_size=12), st.lists(st.text(max_size=4), min_size=2, max_size=5))
def test_whatever_is_read_as_a_letter_stands_in_the_answer(output, choices):
    index = read_letter(output, choices)
    assert index is None or (index < len(choices) and "ABCDE"[index] in output)


def test_a_limit_takes_questions_from_the_whole_task_in_equal_distances(loaded, tmp_path):
    folder = choice_folders.cmmlu(tmp_path / "cmmlu")
    evaluate_choice(loaded, [folder], shots=0, limit=4, out=tmp_path / "out")
    assert [(item["subject"], item["id"]) for item in read_items(tmp_path / "out")] == [
        ("agronomy", "0"), ("agronomy", "2"), ("anatomy", "0"), ("anatomy", "2"),
    ]  # fmt: skip
    figures = evaluate_choice(loaded, [folder], shots=0, limit=1)["cmmlu"]
    assert list(figures["subjects"]) == ["agronomy"]


@given(st.integers(1, 400), st.data())
def test_the_interval_is_where_wilsons_test_does_not_reject(num_items, data):
    num_correct = data.draw(st.integers(0, num_items))
    low, high = wilson_interval(num_correct, num_items)
    share = num_correct / num_items
    assert 0 <= low <= share <= high <= 1
    for bound in {low, high} - {0.0, 1.0}:  # the share is 1.96 standard errors, of the bound, away from it
        assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / num_items), rel=1e-6)


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    drawn = random.Random(0)
    inside = 0
    for _ in range(2_000):
        low, high = wilson_interval(sum(drawn.random() < 0.3 for _ in range(100)), 100)
        inside += low <= 0.3 <= high
    assert 0.93 <= inside / 2_000 <= 0.97


def test_the_command_prints_a_table_and_writes_every_item(tmp_path, capsys):
    make_run(tmp_path / "run", TOKENIZER, context_length=256)
    folder, out = choice_folders.cmmlu(tmp_path / "cmmlu"), tmp_path / "out"
    flags = ["--shots", "1", "--scoring", "cloze", "--device", "cpu", "--out", str(out)]
    assert multiple_choice.main([str(tmp_path / "run"), str(folder), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["items", "accuracy", "95", "%", "random", "ill-formed"]
    assert lines[1].startswith("cmmlu test, cloze, 1 shots")
    assert [line.split()[0] for line in lines[2:4]] == ["agronomy", "anatomy"]
    assert "mean over subjects" in lines[4]
    assert "sum" in lines[5]
    assert "character" in lines[5]
    assert len(read_items(out)) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no task: name the folders or files with the questions"),
        (["mmlu", "mmlu"], "two tasks of one name; score them one after the other"),
        (["mmlu", "--shots", "6"], "6 shots asked for, abstract_algebra has 5 solved examples; use --shots 5"),
        (["mmlu", "--shots", "-1"], "--shots -1: must be at least 0"),
        (["mmlu", "--limit", "0"], "--limit 0: must be at least 1"),
        (["mmlu", "--split", "train"], "no questions of the split train"),
        (["mmlu", "--chat"], "has no chat.json"),
        (["mmlu", "--chat-format", "chatlm"], "chat format 'chatlm': unknown; did you mean 'chatml'?"),
        (["mmlu", "--scoring", "generated", "--max-new-tokens", "64"], "leaves no room in a context of 64"),
        (["nowhere"], "nowhere: does not exist; expected a task's folder as it was published, or a file"),
    ],
)
def test_mistakes_end_in_one_line_with_the_remedy(tmp_path, capsys, monkeypatch, flags, message):
    make_run(tmp_path / "run", TOKENIZER)
    choice_folders.mmlu(tmp_path / "mmlu")
    monkeypatch.chdir(tmp_path)
    assert multiple_choice.main(["run", *flags, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_does_not_wait_for_torch():
    code = "import sys; from evaluation import multiple_choice; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_kind_of_task_is_read_from_its_files_alone(tmp_path):
    folder = choice_folders.mmlu(tmp_path / "anything")
    assert read_task(folder, split="val").subjects[0].questions[0].text.startswith("abstr, val 0")

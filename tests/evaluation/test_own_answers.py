"""Pairs and rejection sampling, whose answers are given by a model that says what it is told to."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.chat.chat_folder import ChatFolder, write_chat_folder
from data_prep.chat.chat_format import FORMATS
from data_prep.chat.prepare_chat import main as prepare_chat
from evaluation import engine, pairs, rejection
from evaluation.own_answers import said
from tests.evaluation.stored import byte_level_tokenizer, make_run

RECORDS = [
    {"prompt": "1+1?", "answer": "2"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "run"
    make_run(folder, byte_level_tokenizer())
    write_chat_folder(folder, ChatFolder("chat", 64, FORMATS["chatml"]))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def reward(tmp_path: Path) -> str:
    path = tmp_path / "reward.py"
    path.write_text('def by_length(prompt, text, row):\n    assert "user" in prompt\n    return len(text) - 2\n')
    return f"{path}:by_length"


def answers(monkeypatch: pytest.MonkeyPatch, *texts: list[str]) -> None:
    """Makes the model give these answers, in the order of the prompts; those that end in ~ are cut."""
    tokenizer = byte_level_tokenizer()
    given: Iterator[list[str]] = iter(texts)
    stop = tokenizer.special_id("<|im_end|>")

    def complete_batch(model, prompts, **options):
        told = [next(given) for _ in prompts]
        return [[[*tokenizer.encode(t.rstrip("~")), *([stop] if t[-1:] != "~" else [])] for t in some] for some in told]

    monkeypatch.setattr(engine, "complete_batch", complete_batch)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_s_answer_is_chosen_and_what_the_model_says_otherwise_rejected(
    run, file, tmp_path, monkeypatch, capsys
):
    answers(monkeypatch, ["3", "2", "3", "4~"], ["hello ", "bye", "", "hey"])
    out = tmp_path / "pairs.jsonl"
    assert pairs.main([str(run), str(file), "--out", str(out), "--device", "cpu"]) == 0
    asked = [[{"role": "user", "content": content}] for content in ("1+1?", "hi")]
    assert lines(out) == [
        {"prompt": asked[0], "chosen": "2", "rejected": "3"},
        {"prompt": asked[1], "chosen": "hello", "rejected": "bye"},
        {"prompt": asked[1], "chosen": "hello", "rejected": "hey"},
    ]
    assert capsys.readouterr().out == (
        f"{out}: 3 pairs of 2 prompts; answers cut at --max-new-tokens or the context's end: 1; "
        "answers empty or given before: 2; answers equal to the file's: 2\n"
    )


def test_with_a_reward_the_best_and_the_worst_answer_are_a_pair(run, file, reward, tmp_path, monkeypatch, capsys):
    answers(monkeypatch, ["abc", "a", "abcdef", "ab"], ["ab", "cd"])
    out = tmp_path / "pairs.jsonl"
    assert pairs.main([str(run), str(file), "--out", str(out), "--reward", reward, "--device", "cpu"]) == 0
    (pair,) = lines(out)
    assert (pair["chosen"], pair["rejected"], pair["rewards"]) == ("abcdef", "a", [4, -1])
    assert "prompts whose answers are equally good: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep", "expected"), [("best", ["abc", "c"]), ("reward > 0", ["abc", "xyz"]), ("reward<=-1", ["a", "c"])]
)
def test_rejection_sampling_keeps_what_is_asked_for(
    keep, expected, run, file, reward, tmp_path, monkeypatch, capsys
):  # fmt: skip
    answers(monkeypatch, ["a", "abc", "xyz"], ["c", "c~"])
    out = tmp_path / "kept.jsonl"
    command = [str(run), str(file), "--out", str(out), "--reward", reward, "--keep", keep, "--device", "cpu"]
    assert rejection.main(command) == 0
    assert [line["messages"][-1] for line in lines(out)] == [{"role": "assistant", "content": c} for c in expected]
    assert [line["reward"] for line in lines(out)] == [len(content) - 2 for content in expected]
    assert capsys.readouterr().out.startswith(f"{out}: 2 answers to 2 prompts kept")


def test_the_model_itself_answers_equally_by_an_equal_seed_and_the_result_can_be_prepared(run, file, tmp_path, capsys):
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        out = tmp_path / f"{name}.jsonl"
        flags = ["--num-samples", "32", "--seed", str(seed), "--batch-size", "40", "--device", "cpu"]
        assert pairs.main([str(run), str(file), "--out", str(out), *flags]) == 0
        found.append(out.read_text())
    assert found[0] == found[1] != found[2]
    prepared = [
        "--kind",
        "pairs",
        "--tokenizer",
        str(run / "step-100"),
        "--output",
        str(tmp_path / "data"),
        "--row-tokens",
        "128",
    ]
    assert prepare_chat([str(tmp_path / "a.jsonl"), *prepared, "--validation-share", "0"]) == 0
    assert f"{len(found[0].splitlines())}" in capsys.readouterr().out


def test_a_prompt_that_fills_the_context_is_left_out(run, file, tmp_path, monkeypatch, capsys):
    file.write_text(file.read_text() + json.dumps({"prompt": "x y " * 99, "answer": "z"}) + "\n")
    answers(monkeypatch, ["3"], ["bye"])
    out = tmp_path / "pairs.jsonl"
    assert pairs.main([str(run), str(file), "--out", str(out), "--device", "cpu"]) == 0
    assert "2 pairs of 3 prompts; prompts too long for the context: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [("chatml", " as it is ", " as it is "), ("llama2", " yes ", "yes"), ("mistral", " yes", "yes")],
)
def test_what_a_format_writes_around_an_answer_is_no_part_of_it(name, text, content):
    assert said(FORMATS[name], text) == content


def test_nothing_is_written_where_nothing_was_found(run, file, reward, tmp_path, monkeypatch, capsys):
    answers(monkeypatch, ["2"], ["hello"], ["2"], ["hello"])
    out = tmp_path / "pairs.jsonl"
    assert pairs.main([str(run), str(file), "--out", str(out), "--device", "cpu"]) == 2
    assert "not one pair of 2 prompts; answers equal to the file's: 2" in capsys.readouterr().err
    flags = ["--out", str(out), "--reward", reward, "--keep", "reward>99", "--device", "cpu"]
    assert rejection.main([str(run), str(file), *flags]) == 2
    assert "--keep 'reward>99': no answer of 2 prompts passed" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("keep", ["worst", "reward>", "reward>zero", "length>3"])
def test_a_test_that_is_none_is_refused(keep, run, file, reward, tmp_path, capsys):
    command = [str(run), str(file), "--out", str(tmp_path / "x"), "--reward", reward, "--keep", keep]
    assert rejection.main(command) == 2
    assert f"--keep {keep!r}: expected best, or a test such as" in capsys.readouterr().err

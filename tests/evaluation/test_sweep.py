import json
import shutil
from pathlib import Path

import pytest

from evaluation import model_folder, sweep
from evaluation.domains import DomainSettings, evaluate_domains
from evaluation.generated_answers import AnswerSettings, evaluate_answers
from evaluation.model_folder import load_model
from evaluation.multiple_choice import evaluate_choice
from evaluation.sweep import Result, SweepCommand, curves, read_results, table
from tests.evaluation.stored import make_run, model_config, save_step
from tests.prepared import TEXTS, tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the steps 90 and 100."""
    make_run(tmp_path / "run", tokenizer())
    return tmp_path / "run"


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[str, str, str]:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "defs.txt").write_text(TEXTS[0])
    (texts / "more.txt").write_text(TEXTS[1])
    (tmp_path / "sums.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "quiz.jsonl").write_text('{"question": "x?", "choices": ["1", "2"], "answer": "A"}\n' * 3)
    return (
        f"domains={texts}",
        f"choice={tmp_path / 'quiz.jsonl'},shots=0,scoring=cloze",
        f"answers={tmp_path / 'sums.jsonl'},max_new_tokens=3,chat_format=none",
    )


def swept(run: Path, tasks: tuple[str, ...], every: int = 1) -> list[Result]:
    return sweep.sweep(SweepCommand(run=run, tasks=tasks, every=every, device="cpu"))


def as_stored(value):
    return json.loads(json.dumps(value))


def test_every_checkpoint_gets_the_figures_that_each_command_gives(run: Path, tasks, tmp_path: Path):
    results = swept(run, tasks)
    assert [(result.step, result.task) for result in results] == [(step, task) for step in (90, 100) for task in tasks]
    loaded = load_model(run / "step-90", device="cpu")
    answers, _ = evaluate_answers(loaded, tmp_path / "sums.jsonl", AnswerSettings(max_new_tokens=3, chat_format="none"))
    expected = (
        evaluate_domains(loaded, tmp_path / "texts", DomainSettings()),
        evaluate_choice(loaded, [tmp_path / "quiz.jsonl"], shots=0, scoring="cloze"),
        answers,
    )
    assert [as_stored(result.figures) for result in results[:3]] == as_stored(list(expected))
    assert results[0].figures != results[3].figures
    assert as_stored(list(read_results(run))) == as_stored(results)
    assert len(list((run / "sweep").rglob("items.jsonl"))) == 4


def test_what_is_there_is_not_computed_again(run: Path, tasks, monkeypatch: pytest.MonkeyPatch):
    first = swept(run, tasks[:1])
    monkeypatch.setattr(model_folder, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert swept(run, tasks[:1]) == first


def test_a_sweep_goes_on_behind_a_line_that_a_kill_has_cut_off(run: Path, tasks):
    whole = swept(run, tasks)
    file = run / "sweep.jsonl"
    file.write_text(file.read_text()[:-40])
    assert as_stored(swept(run, tasks)) == as_stored(whole)
    assert as_stored(list(read_results(run))) == as_stored(whole)


def test_a_new_checkpoint_under_an_old_number_is_evaluated(run: Path, tasks):
    old = swept(run, tasks[:1])
    shutil.rmtree(run / "step-100")
    save_step(run, 100, model_config(tokenizer()), record={"other": True})
    new = swept(run, tasks[:1])
    assert new[0] == old[0]
    assert new[1].checkpoint != old[1].checkpoint
    assert len(list(read_results(run))) == 3


def test_a_damaged_checkpoint_is_passed_over(run: Path, tasks, capsys: pytest.CaptureFixture[str]):
    (run / "step-90" / "record.json").write_text("{}")
    assert [result.step for result in swept(run, tasks[:1])] == [100]
    assert "note: " in capsys.readouterr().err


def test_of_many_checkpoints_some_and_the_newest_are_taken(run: Path, tasks):
    for step in (30, 60, 70):
        save_step(run, step, model_config(tokenizer()))
    assert [result.step for result in swept(run, tasks[:1], every=30)] == [30, 60, 90, 100]


def test_curves_are_of_tasks_and_their_parts():
    results = [
        Result(step, "c", "choice=a", {"a": {"accuracy": step / 10, "subjects": {"x": {"accuracy": 0.5}}}, "b": 3})
        for step in (1, 2)
    ]
    results.append(Result(2, "c", "answers=b", {"accuracy": 0.7, "stop_rate": 1}))
    assert curves(results, "accuracy") == {"choice=a a": {1: 0.1, 2: 0.2}, "answers=b": {2: 0.7}}
    assert table(results) == [
        "[1] choice=a a accuracy",
        "[2] answers=b accuracy",
        "[3] answers=b stop_rate",
        "step     [1]     [2]     [3]",
        "   1  0.1000",
        "   2  0.2000  0.7000  1.0000",
    ]


def test_the_command_prints_a_table_and_draws_curves(run: Path, tasks, capsys: pytest.CaptureFixture[str]):
    assert sweep.main([str(run), "--tasks", *tasks]) == 0
    out = capsys.readouterr().out.splitlines()
    measures = [line.rpartition(" ")[2] for line in out if line.startswith("[")]
    assert measures == ["bits_per_byte"] * 3 + ["accuracy"] * 2 + ["stop_rate"]
    assert [line.split()[0] for line in out[-2:]] == ["90", "100"]
    assert (run / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ("domain=TEXTS", "expected KIND=PATH, with a kind of domains, choice, answers"),
        ("TEXTS", "expected KIND=PATH"),
        ("domains=nowhere", "nowhere does not exist"),
        ("domains=TEXTS,strides=3", "unknown key 'domains.strides'; did you mean 'domains.stride'?"),
        ("domains=TEXTS,stride=0", "--stride 0: must be at least 1"),
        ("domains=TEXTS,stride=x", "domains.stride = 'x': expected int"),
        ("answers=TEXTS,scoring=numbers", "answers.scoring = 'numbers': expected one of 'numeric'"),
    ],
)
def test_a_wrong_task_is_one_line_before_anything_is_computed(
    run: Path, tmp_path: Path, task: str, complaint: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "texts").mkdir()
    task = task.replace("TEXTS", str(tmp_path / "texts"))
    assert sweep.main([str(run), "--tasks", task]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path, tasks, capsys: pytest.CaptureFixture[str]):
    assert sweep.main([str(tmp_path), "--tasks", tasks[0]]) == 2
    assert "no checkpoint (step-N) in it" in capsys.readouterr().err

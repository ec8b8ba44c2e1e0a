import json
from pathlib import Path

import pytest

from data_prep.chat.chat_format import CHAT_FILE, FORMAT, FORMATS
from data_prep.chat.turns import Turn
from evaluation import engine, generated_answers
from evaluation.engine import complete
from evaluation.generated_answers import AnswerSettings, evaluate_answers
from evaluation.items import wilson_interval
from evaluation.model_folder import LoadedModel, load_model
from evaluation.sampling import Sampling
from tests.evaluation.stored import make_run
from tests.prepared import tokenizer

SUMS = {"1+1": "2", "1+2": "3", "2+2": "4", "2+3": "5"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("answers") / "run"
    make_run(run, tokenizer())
    return run


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("answers") / "chat"
    make_run(run, tokenizer(), context_length=96)
    table = {"format": FORMAT, "kind": "chat", "row_tokens": 64, "chat_format": FORMATS["chatml"].to_json()}
    (run / CHAT_FILE).write_text(json.dumps(table))
    return run


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": asked, "answer": f"so\n#### {answer}"}) for asked, answer in SUMS.items()]
    path.write_text("\n".join(lines))
    return path


def writes(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, texts: dict[str, list[str]], end: str) -> list[dict]:
    """The engine writes these texts behind prompts that end with a question, each with a special token at its end."""
    made, calls = loaded.tokenizer, []

    def complete_batch(model, prompts, **options):
        assert model is loaded.model
        calls.append(options)
        found = []
        for prompt in prompts:
            (asked,) = [asked for asked in texts if asked in made.decode(prompt)[-40:]]
            ends = [made.special_id(end)] if end else []
            found.append([[*made.encode(text), *ends] for text in texts[asked]])
        return found

    monkeypatch.setattr(engine, "complete_batch", complete_batch)
    return calls


def test_chat_answers_are_judged_by_their_final_number(chat, sums, monkeypatch):
    loaded = load_model(chat, device="cpu")
    texts = {"1+1": ["It is\n\n2."], "1+2": ["4"], "2+2": ["no idea"], "2+3": ["#### 5.0 I think, not 7"]}
    calls = writes(monkeypatch, loaded, texts, "<|im_end|>")
    figures, items = evaluate_answers(loaded, sums, AnswerSettings(max_new_tokens=20))
    low, high = wilson_interval(2, 4)
    assert figures == pytest.approx(
        {
            "questions": 4,
            "too_long": 0,
            "accuracy": 0.5,
            "accuracy_low": low,
            "accuracy_high": high,
            "ill_formed": 1,
            "stop_rate": 1.0,
            "repetition_rate": 0.0,
            "empty_rate": 0.0,
            "mean_tokens": sum(len(tokenizer().encode(text)) for (text,) in texts.values()) / 4,
        }
    )
    assert [item["correct"] for item in items] == [True, False, False, True]
    assert [item["ill_formed"] for item in items] == [False, False, True, False]
    assert [item["prediction"] for item in items] == ["2", "4", None, "5"]
    assert (
        items[0] | {"prompt": "1+1", "answer": ["so\n#### 2"], "output": ["It is\n\n2."], "stopped": [True]} == items[0]
    )
    (options,) = calls
    assert options["stop_ids"] == FORMATS["chatml"].stop_ids(loaded.tokenizer)
    assert (options["max_new_tokens"], options["num_samples"], options["sampling"]) == (20, 1, Sampling())


def test_an_answer_without_chat_format_ends_where_the_next_example_would_begin(base, sums, monkeypatch):
    loaded = load_model(base, device="cpu")
    writes(monkeypatch, loaded, {asked: [f"\n\n {n}\n\nQuestion: 9+9\nAnswer: 9"] for asked, n in SUMS.items()}, "")
    figures, items = evaluate_answers(loaded, sums, AnswerSettings())
    assert figures["accuracy"] == figures["stop_rate"] == 1.0
    assert [item["output"] for item in items] == [[number] for number in SUMS.values()]
    assert figures["mean_tokens"] == 1.0


def test_the_prediction_of_most_samples_is_judged(base, sums, monkeypatch):
    loaded = load_model(base, device="cpu")
    texts = {"1+1": ["2", "2", "3"], "1+2": ["3", "4", "4"], "2+2": ["none", "4", ""], "2+3": ["", "", ""]}
    writes(monkeypatch, loaded, texts, "<|endoftext|>")
    figures, items = evaluate_answers(loaded, sums, AnswerSettings(num_samples=3, temperature=1.0))
    assert [item["correct"] for item in items] == [True, False, True, False]
    assert (figures["accuracy"], figures["ill_formed"]) == (0.5, 1)
    assert figures["sample_accuracy"] == pytest.approx(4 / 12)
    assert figures["empty_rate"] == pytest.approx(4 / 12)
    assert "maj@3 50.0%" in generated_answers.lines(figures, AnswerSettings(num_samples=3, temperature=1.0))[1]


def test_without_scoring_only_the_quality_is_told(base, tmp_path, monkeypatch):
    loaded = load_model(base, device="cpu")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1"}\n{"prompt": "2+2"}\n')
    writes(monkeypatch, loaded, {"1+1": ["ab" * 30], "2+2": ["xyz"]}, "")
    figures, items = evaluate_answers(loaded, tmp_path / "prompts.jsonl", AnswerSettings(scoring="none"))
    assert (figures["stop_rate"], figures["repetition_rate"]) == (0.0, 0.5)
    assert "accuracy" not in figures
    assert "correct" not in items[0]


def test_a_question_that_does_not_fit_is_wrong_and_counted(base, sums):
    loaded = load_model(base, device="cpu")
    with sums.open("a") as file:
        file.write("\n" + json.dumps({"question": "long " * 60, "answer": "7"}))
    figures, items = evaluate_answers(loaded, sums, AnswerSettings(max_new_tokens=4))
    assert figures["too_long"] == 1
    assert [item["too_long"] for item in items] == [False] * 4 + [True]
    assert (items[4]["correct"], items[4]["ill_formed"], items[4]["output"]) == (False, True, [])
    assert figures["ill_formed"] >= 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_writes_what_it_writes_for_one_question_alone(chat, sums, temperature):
    loaded = load_model(chat, device="cpu")
    settings = AnswerSettings(max_new_tokens=8, batch_size=3, num_samples=2 if temperature else 1,
                              temperature=temperature, seed=5)  # fmt: skip
    _, items = evaluate_answers(loaded, sums, settings)
    chatml = FORMATS["chatml"]
    for item, asked in zip(items, SUMS, strict=True):
        samples = complete(
            loaded.model, chatml.prompt(loaded.tokenizer, [Turn("user", asked)]), max_new_tokens=8,
            sampling=Sampling(temperature=temperature, seed=5), num_samples=settings.num_samples,
            stop_ids=chatml.stop_ids(loaded.tokenizer),
        )  # fmt: skip
        assert item["output"] == [loaded.tokenizer.decode(sample) for sample in samples]


def test_the_command_prints_figures_and_writes_items(base, sums, tmp_path, capsys):
    arguments = [str(base), str(sums), "--max-new-tokens", "4", "--limit", "3", "--out", str(tmp_path / "out")]
    shots = ["--shots", "1", "--shots-file", str(sums), "--scoring", "exact"]
    assert generated_answers.main([*arguments, *shots]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "3 questions, 0 too long for the context"
    assert out[1].startswith("accuracy ")
    assert out[2].startswith("stop rate ")
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [item["id"] for item in items] == ["1", "2", "3"]
    assert {item["task"] for item in items} == {"sums"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["BASE", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["nowhere", "SUMS"], "nowhere: does not exist"),
        (["BASE", "WORDS"], "the answer to question 1 has no number; try --scoring exact"),
        (["BASE", "SUMS", "--shots", "9", "--shots-file", "SUMS"], "has 4 questions for --shots 9"),
        (["BASE", "SUMS", "--chat-format", "chatmel"], "did you mean 'chatml'?"),
        (["BASE", "SUMS", "--chat-format", "llama3"], "the tokenizer has no <|begin_of_text|>"),
    ],
)
def test_bad_input_is_one_line(base, sums, tmp_path, arguments, complaint, capsys):
    places = {"BASE": base, "SUMS": sums, "WORDS": tmp_path / "words.jsonl"}
    places["WORDS"].write_text('{"question": "who?", "answer": "nobody"}\n')
    assert generated_answers.main([str(places.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_samples": 3}, "--num-samples 3 at temperature 0 are all the same"),
        ({"num_samples": 0}, "--num-samples 0: must be at least 1"),
        ({"shots": 3}, "give a positive number together with --shots-file"),
        ({"shots_file": "a"}, "give a positive number together with --shots-file"),
        ({"template": "Q:"}, "has no {question} in it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        AnswerSettings(**settings)

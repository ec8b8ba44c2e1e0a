import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.export import export_model
from evaluation.model_folder import load_model
from evaluation.multiple_choice import evaluate_choice
from tests.evaluation import choice_folders
from tests.evaluation.stored import byte_level_tokenizer, make_run

pytestmark = pytest.mark.slow  # most of it imports lm-eval and its models, twenty seconds of a processor

# lm-evaluation-harness warns and takes seconds to import: it runs in a process of its own, once for all tests here.
CHILD = """
import json, logging, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from evaluation.lm_eval_adapter import BessemerLM

work, tasks = Path(sys.argv[1]), ["letters", "texts", "written"]
manager = TaskManager(include_path=str(work / "tasks"), include_defaults=False)
models = {
    "ours": BessemerLM(str(work / "run"), device="cpu", batch_size=24),
    "theirs": HFLM(pretrained=str(work / "exported"), device="cpu", dtype="float32", batch_size=24),
}
found = {}
for name, model in models.items():
    result = lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, num_fewshot=2, bootstrap_iters=0, verbosity="ERROR"
    )
    samples = {
        task: [
            {
                "id": some["doc"]["id"],
                "scores": [response[0][0] for response in some["resps"]],
                "greedy": [response[0][1] for response in some["resps"]],
            }
            for some in result["samples"][task]
        ]
        for task in ("letters", "texts")
    }
    written = [some["resps"][0][0] for some in result["samples"]["written"]]
    texts = ["what is a sheep? " * 22, "short", "x"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    rolling = [float(value) for value in model.loglikelihood_rolling(requests)]
    long = [Instance("loglikelihood", {}, ("word " * 130, " end"), 0), Instance("loglikelihood", {}, ("", "begin"), 0)]
    sums = [value for value, _ in model.loglikelihood(long)]
    found[name] = {"samples": samples, "written": written, "rolling": rolling, "sums": sums}
print("RESULT" + json.dumps(found))
"""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {test}
    dev: {dev}
  cache_dir: {cache}
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
{rest}
"""
LETTERS = """
output_type: multiple_choice
description: "The following are multiple choice questions (with answers) about woolly things.\\n\\n"
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TEXTS = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
output_type: generate_until
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n\\n", "re"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def records(num_questions: int, shift: int) -> list[dict]:
    def record(i: int) -> dict:
        choices = [
            f"sheep {i}",
            f"the goats of {i * i + shift}",
            "neither, nor any → other naïve thing"[: 8 + i].strip(),
        ]
        return {"id": i, "question": f"Who has {i + shift} horns?", "choices": choices, "answer": i % 3}

    # The subject gives our prompts the title that stands in the task's description.
    return [{**record(i), "subject": "woolly_things"} for i in range(num_questions)]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("lm-eval")
    make_run(work / "run", byte_level_tokenizer(), context_length=320)
    export_model(work / "run", work / "exported")
    test = choice_folders.write_jsonl(work / "questions" / "test.jsonl", records(24, 0))
    dev = choice_folders.write_jsonl(work / "questions" / "dev.jsonl", records(2, 100))
    for name, rest in (("letters", LETTERS), ("texts", TEXTS), ("written", WRITTEN)):
        text = TASK.format(name=name, test=test, dev=dev, cache=work / "cache", rest=rest)
        choice_folders.write(work / "tasks" / f"{name}.yaml", text)
    return work


@pytest.fixture(scope="module")
def found(work: Path) -> dict:
    pytest.importorskip("lm_eval")
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(work)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=Path(__file__).parents[2],
        env=_offline(work),
    )
    assert run.returncode == 0, run.stderr[-4_000:]
    return json.loads(run.stdout.split("RESULT")[1])


def _offline(work: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "hf")}


@pytest.mark.parametrize(("task", "scoring"), [("letters", "letter"), ("texts", "cloze")])
def test_no_prediction_differs_between_ours_and_lm_evals_by_either_model(work, found, task, scoring, tmp_path):
    loaded = load_model(work / "run", device="cpu")
    evaluate_choice(loaded, [work / "questions"], shots=2, scoring=scoring, normalise="sum", out=tmp_path)
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    ours, theirs = (found[name]["samples"][task] for name in ("ours", "theirs"))
    assert len(items) == len(ours) == len(theirs) == 24
    for item, one, other in zip(items, ours, theirs, strict=True):
        assert int(item["id"]) == one["id"] == other["id"]
        assert item["num_shots"] == 2  # lm-eval would cut what does not fit, we leave examples out
        assert one["greedy"] == other["greedy"]
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-4)
        assert item["scores"]["sum"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-4)
        assert item["prediction"] == "ABC"[other["scores"].index(max(other["scores"]))]


def test_whole_texts_long_contexts_and_none_score_alike(found):
    assert found["ours"]["rolling"] == pytest.approx(found["theirs"]["rolling"], rel=1e-5)
    assert found["ours"]["sums"] == pytest.approx(found["theirs"]["sums"], rel=1e-5)


def test_both_write_the_same(found):
    assert found["ours"]["written"] == found["theirs"]["written"]
    assert len(found["ours"]["written"]) == 24
    assert all("re" not in text for text in found["ours"]["written"])

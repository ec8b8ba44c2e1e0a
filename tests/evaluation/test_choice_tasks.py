import pytest

from evaluation.choice_tasks import ChoiceTaskError, read_task
from tests.evaluation import choice_folders
from tests.evaluation.choice_folders import write, write_jsonl


def test_mmlu_as_published(tmp_path):
    task = read_task(choice_folders.mmlu(tmp_path / "mmlu"))
    assert (task.name, task.split, task.language) == ("mmlu", "test", "en")
    assert [(subject.name, subject.title) for subject in task.subjects] == [
        ("abstract_algebra", "abstract algebra"), ("world_religions", "world religions"),
    ]  # fmt: skip
    subject = task.subjects[1]
    assert (len(subject.questions), len(subject.shots)) == (3, 5)
    assert subject.questions[2].text == "world, test 2:\nwhat is 2 + 2?"
    assert subject.questions[2].choices == ("4", "5", "9", "none")
    assert [question.answer for question in subject.questions] == [0, 1, 2]
    assert subject.shots[0].text.startswith("world, dev 0")


def test_of_ceval_val_is_scored_because_the_answers_of_test_are_not_published(tmp_path):
    folder = choice_folders.ceval(tmp_path / "ceval")
    write(folder / "subject_mapping.json", '{"logic": ["Logic", "逻辑学", "Humanities"]}')
    task = read_task(folder)
    (subject,) = task.subjects
    assert (task.split, task.language) == ("val", "zh")
    assert (subject.name, subject.title, subject.category) == ("logic", "逻辑学", "Humanities")
    assert [question.id for question in subject.questions] == ["0", "1", "2"]
    assert [question.answer for question in subject.shots] == [2, 2]
    with pytest.raises(ChoiceTaskError, match=r"the split test has no answers.*use --split val"):
        read_task(folder, split="test")


def test_cmmlu_as_published(tmp_path):
    task = read_task(choice_folders.cmmlu(tmp_path / "cmmlu"))
    assert (task.split, task.language) == ("test", "zh")
    assert [subject.name for subject in task.subjects] == ["agronomy", "anatomy"]
    assert [subject.title for subject in task.subjects] == ["", ""]  # an English name in a Chinese sentence
    assert [(question.id, question.answer) for question in task.subjects[0].questions] == [
        ("0", 0), ("1", 1), ("2", 2), ("3", 3),
    ]  # fmt: skip
    assert task.subjects[1].shots[4].text == "anatomy的第4题"


@pytest.mark.parametrize("part", ["", "ARC-Easy"])
def test_arc_as_published_has_three_to_five_choices_and_labels_that_are_numbers(tmp_path, part):
    task = read_task(choice_folders.arc(tmp_path / "arc") / part)
    names = [subject.name for subject in task.subjects]
    assert names == (["ARC-Easy"] if part else ["ARC-Challenge", "ARC-Easy"])
    subject = task.subjects[-1]
    assert [question.id for question in subject.questions] == ["Q20", "Q21", "Q22", "Q23"]
    assert [len(question.choices) for question in subject.questions] == [4, 4, 3, 5]
    assert [question.answer for question in subject.questions] == [1, 3, 2, 4]
    assert [shot.id for shot in subject.shots] == ["Q0", "Q1", "Q2", "Q3"]


def test_a_file_of_your_own_with_its_examples_beside_it(tmp_path):
    path = write(
        tmp_path / "mine.csv",
        "subject,question,A,B,C,answer,category\ncats,They say?,woof,meow,,B,pets\ndogs,And they?,woof,moo,oink,0,\n",
    )
    write(tmp_path / "mine.shots.csv", "question,A,B,answer\nAnd cows?,moo,oink,moo\n")
    task = read_task(path)
    assert (task.name, task.split) == ("mine", "")
    cats, dogs = task.subjects
    assert (cats.name, cats.category, cats.questions[0].choices, cats.questions[0].answer) == (
        "cats", "pets", ("woof", "meow"), 1,
    )  # fmt: skip
    assert (dogs.questions[0].choices, dogs.questions[0].answer) == (("woof", "moo", "oink"), 0)
    assert [shot.text for shot in dogs.shots] == ["And cows?"]
    assert cats.shots[0].answer == 0


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["x", "y"], "B", 1),
        (["x", "y"], "b", 1),
        (["x", "y"], 1, 1),
        (["x", "y"], "y", 1),
        (["x", "y"], "1", 1),
        (["2", "1", "0"], "2", 0),  # a choice's own text goes before an index
        ({"A": "x", "B": "y"}, "B", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ([{"label": "P", "text": "x"}, {"label": "Q", "text": "y"}], "Q", 1),
    ],
)
def test_forms_of_choices_and_answers(tmp_path, choices, answer, index):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "Which?", "choices": choices, "answer": answer}])
    (subject,) = read_task(path).subjects
    assert subject.questions[0].answer == index


def test_subjects_may_be_folders(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / name / "test.jsonl", [{"question": f"{name}?", "choices": ["x", "y"], "answer": 0}])
        write_jsonl(tmp_path / name / "dev.jsonl", [{"question": f"{name}!", "choices": ["x", "y"], "answer": 1}])
    assert [(s.name, s.questions[0].text, s.shots[0].text) for s in read_task(tmp_path).subjects] == [
        ("a", "a?", "a!"), ("b", "b?", "b!"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", "", "q.jsonl: no questions"),
        ("q.jsonl", "{oops\n", r"q.jsonl:1: not JSON .*; expected one object per line"),
        ("q.jsonl", "[1]\n", "q.jsonl:1: list; expected one object per line"),
        (
            "q.jsonl",
            '{"prompt": "x"}\n',
            "question 1: expected a question and two or more choices, has the keys 'prompt'",
        ),
        (
            "q.jsonl",
            '{"question": "x", "choices": ["a"], "answer": 0}\n',
            "expected a question and two or more choices",
        ),
        (
            "q.jsonl",
            '{"question": "x", "choices": ["a", "b"], "answer": "E"}\n',
            "question 1: answer 'E': expected one of the labels A, B, a choice's text, or its index from 0 to 1",
        ),
        ("q.jsonl", '{"question": "x", "choices": ["a", "b"], "answer": 2}\n', "question 1: answer 2: expected"),
        ("q.jsonl", '{"question": "x", "choices": ["a", "b"]}\n', "q.jsonl has no answers and cannot be scored"),
        ("q.csv", "question,A,B,answer\nx,1,2,A\ny,1,2,\n", "question 2 of q.csv has no answer"),
        ("q.csv", "question,A,B,answer\nx,1,,A\n", "question 1: expected a question and two or more choices"),
        (
            "empty/readme.txt",
            "hello",
            "no questions of the split test or val or validation; expected files such as test/",
        ),
    ],
)
def test_what_is_no_task_is_refused(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(ChoiceTaskError, match=message):
        read_task(path if path.suffix != ".txt" else path.parent)


def test_a_path_with_nothing_there_is_refused(tmp_path):
    with pytest.raises(
        ChoiceTaskError, match="does not exist; expected a task's folder as it was published, or a file"
    ):
        read_task(tmp_path / "mmlu")

import re
import subprocess
import sys

import pytest

from data_prep.tokenizing.tokenizer import train_bpe
from evaluation import generate
from evaluation.beam import beam_search
from evaluation.engine import complete
from evaluation.model_folder import load_model
from evaluation.sampling import Sampling
from tests.evaluation.stored import byte_level_tokenizer, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("generate") / "run"
    make_run(run, byte_level_tokenizer())
    return str(run)


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    run = tmp_path_factory.mktemp("draft") / "run"
    make_run(run, byte_level_tokenizer(), num_layers=1)
    return str(run)


def expected_texts(run: str, prompt: str, num_samples: int = 1, **settings) -> list[str]:
    loaded = load_model(run, device="cpu")
    ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eos_id]
    samples = complete(
        loaded.model, ids, max_new_tokens=12, sampling=Sampling(**settings), num_samples=num_samples,
        stop_ids={loaded.tokenizer.eos_id},
    )  # fmt: skip
    # Random tokens need not be whole characters; a stream ends an incomplete one like decode does.
    return [prompt + loaded.tokenizer.decode(sample) for sample in samples]


def test_the_prompt_and_its_continuation_are_printed(run, capsys):
    arguments = [run, "--prompt", "def f", "--max-new-tokens", "12", "--temperature", "0"]
    assert generate.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == expected_texts(run, "def f")[0] + "\n"
    assert re.fullmatch(r"\d+ tokens in \d+\.\d\d s: \d+\.\d tokens/s\n", printed.err)


def test_several_samples_are_printed_one_after_the_other(run, capsys):
    settings = ["--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", "4"]
    arguments = ["--max-new-tokens", "12", "--num-samples", "3", *settings]
    assert generate.main([run, "--prompt", "def f", *arguments]) == 0
    texts = expected_texts(run, "def f", num_samples=3, temperature=1.0, top_k=50, top_p=0.9, seed=4)
    out = capsys.readouterr().out
    assert out == f"{texts[0]}\n--- sample 2 ---\n{texts[1]}\n--- sample 3 ---\n{texts[2]}\n"


def test_each_line_of_a_file_is_a_prompt(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("def f\n\nreturn x\n")
    arguments = ["--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12", "--temperature", "0"]
    assert generate.main([run, *arguments]) == 0
    first, second = (expected_texts(run, prompt)[0] for prompt in ("def f", "return x"))
    assert capsys.readouterr().out == f"=== prompt 1 ===\n{first}\n=== prompt 2 ===\n{second}\n"


def test_the_prompts_of_a_file_are_continued_in_batches_and_printed_in_order(run, tmp_path, capsys):
    prompts = ["def f", "return x + 1", "x", "def", "café"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    settings = ["--temperature", "0.9", "--num-samples", "2", "--batch-size", "4"]
    assert generate.main([run, "--file", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12", *settings]) == 0
    expected = ""
    for number, prompt in enumerate(prompts, start=1):
        first, second = expected_texts(run, prompt, num_samples=2, temperature=0.9)
        expected += f"=== prompt {number} ===\n{first}\n--- sample 2 ---\n{second}\n"
    assert capsys.readouterr().out == expected


def test_min_p_and_the_repetition_penalty_reach_the_engine(run, capsys):
    settings = ["--temperature", "1.5", "--min-p", "0.2", "--repetition-penalty", "1.4"]
    assert generate.main([run, "--prompt", "def f", "--max-new-tokens", "12", *settings]) == 0
    expected = expected_texts(run, "def f", temperature=1.5, min_p=0.2, repetition_penalty=1.4)
    assert capsys.readouterr().out == expected[0] + "\n"


@pytest.mark.parametrize(("flags", "length_penalty"), [([], 1.0), (["--length-penalty", "0.3"], 0.3)])
def test_the_best_beams_are_printed(flags, length_penalty, run, capsys):
    arguments = ["--max-new-tokens", "12", "--num-beams", "4", "--num-samples", "2", *flags]
    assert generate.main([run, "--prompt", "def f", *arguments]) == 0
    loaded = load_model(run, device="cpu")
    best, second, *_ = beam_search(
        loaded.model, loaded.tokenizer.encode("def f"), num_beams=4, max_new_tokens=12,
        stop_ids={loaded.tokenizer.eos_id}, length_penalty=length_penalty,
    )  # fmt: skip
    texts = ["def f" + loaded.tokenizer.decode(tokens) for tokens, _ in (best, second)]
    assert capsys.readouterr().out == f"{texts[0]}\n--- sample 2 ---\n{texts[1]}\n"


@pytest.mark.parametrize("source", ["draft", "lookup"])
def test_a_draft_changes_no_greedy_text_and_its_guesses_are_counted(source, run, draft, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("def f\nreturn x\n")
    arguments = ["--max-new-tokens", "12", "--temperature", "0", "--draft", draft if source == "draft" else source]
    assert generate.main([run, "--file", str(tmp_path / "prompts.txt"), *arguments]) == 0
    printed = capsys.readouterr()
    first, second = (expected_texts(run, prompt)[0] for prompt in ("def f", "return x"))
    assert printed.out == f"=== prompt 1 ===\n{first}\n=== prompt 2 ===\n{second}\n"
    assert re.match(r"\d+ of \d+ guesses kept\n", printed.err)


def test_a_draft_of_another_tokenizer_is_refused(run, tmp_path, capsys):
    other = train_bpe(["another language altogether, of other words"] * 9, vocab_size=280)
    make_run(tmp_path / "other", other)
    assert generate.main([run, "--prompt", "def f", "--draft", str(tmp_path / "other")]) == 2
    assert "its tokenizer is not that of" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(run, capsys):
    assert generate.main([run, "--prompt", "", "--max-new-tokens", "12", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == expected_texts(run, "")[0] + "\n"


def test_a_continuation_ends_before_a_stop_text(run, capsys):
    whole = expected_texts(run, "def f")[0].removeprefix("def f")
    stop = whole[3:5]
    arguments = ["--max-new-tokens", "12", "--temperature", "0", "--stop", stop, "never there"]
    assert generate.main([run, "--prompt", "def f", *arguments]) == 0
    assert capsys.readouterr().out == "def f" + whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere", "--prompt", "a"], "nowhere: does not exist"),
        (["RUN"], "give either --prompt TEXT or --file FILE"),
        (["RUN", "--prompt", "a", "--file", "b"], "give either --prompt TEXT or --file FILE"),
        (["RUN", "--file", "no-such-file"], "no-such-file: cannot be read"),
        (["RUN", "--prompt", "a", "--temperature", "-1"], "temperature = -1.0"),
        (["RUN", "--prompt", "a", "--temperature", "0", "--num-samples", "2"], "are all the same"),
        (["RUN", "--prompt", "a", "--min-p", "2"], "min_p = 2.0"),
        (["RUN", "--prompt", "a", "--num-beams", "3", "--temperature", "0.5"], "num_beams = 3 searches for"),
        (["RUN", "--prompt", "a", "--num-beams", "3", "--top-k", "5"], "leave out --num-beams, or --temperature"),
        (["RUN", "--prompt", "a", "--num-beams", "0", "--temperature", "0"], "num_beams = 0: must be at least 1"),
        (["RUN", "--prompt", "a", "--num-beams", "3", "--num-samples", "4"], "raise --num-beams"),
        (["RUN", "--prompt", "a", "--draft", "lookup", "--num-samples", "2"], "--draft is for one sample at a time"),
        (["RUN", "--prompt", "a", "--draft", "lookup", "--num-beams", "2"], "--draft is for one sample at a time"),
        (["RUN", "--prompt", "a", "--draft", "nowhere"], "nowhere: does not exist"),
        (["RUN", "--prompt", "a", "--batch-size", "0"], "batch_size = 0: must be at least 1"),
        (["RUN", "--prompt", "a" * 500], "leaves no room in a context of 64"),
        (["RUN", "--prompt", "a", "--device", "gpu"], "device = 'gpu'"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_on_stderr(arguments, complaint, run, capsys):
    assert generate.main([run if argument == "RUN" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert error.count("\n") == 1


def test_a_file_without_prompts_is_refused(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert generate.main([run, "--file", str(tmp_path / "prompts.txt")]) == 2
    assert "has no prompts" in capsys.readouterr().err


def test_the_command_line_works_as_a_process(run):
    command = [sys.executable, "-m", "evaluation.generate", run, "--prompt", "def f", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "12", "--temperature", "0"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_texts(run, "def f")[0] + "\n"


def test_help_does_not_wait_for_torch():
    script = (
        "import sys, evaluation.generate as g\n"
        "try: g.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.endswith("False\n"), done.stderr
    assert "--max-new-tokens" in done.stdout

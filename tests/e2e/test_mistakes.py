"""What newcomers do wrong, over all commands: each ends in a message of at most three lines that says what to do."""

import functools
import importlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.__main__ import COMMANDS
from data_prep.__main__ import main as data_prep
from data_prep.config_file import to_toml
from resume.__main__ import main as resume
from tests.evaluation.stored import make_run
from tests.prepared import tokenizer, write_data
from tests.runs import tiny_run
from train import pretrain
from train.recipes import DistillConfig, DpoConfig, GrpoConfig, RewardConfig, SftConfig

Command = Callable[[Sequence[str]], int]
ROOT = Path(__file__).parents[2]


def module(name: str) -> Command:
    """What `python -m NAME` runs."""
    return lambda argv: importlib.import_module(name).main(argv)


def tuning(config_type: type) -> Command:
    """What a script of train/ runs."""
    return functools.partial(pretrain.main, config_type=config_type, script="train/tune.py")


generate, export = module("evaluation.generate"), module("evaluation.export")
chat, serve = module("evaluation.chat"), module("evaluation.serve")
pairs, rejection = module("evaluation.pairs"), module("evaluation.rejection")
multiple_choice, answers = module("evaluation.multiple_choice"), module("evaluation.generated_answers")
perplexity, domains, sweep = module("evaluation.perplexity"), module("evaluation.domains"), module("evaluation.sweep")
contamination, report = module("evaluation.contamination"), module("evaluation.report")
teacher_cache = module("train.teacher_cache")
sft, dpo, reward, grpo, distill = map(tuning, (SftConfig, DpoConfig, RewardConfig, GrpoConfig, DistillConfig))

RECORDS = {
    "chat": [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
             for i in range(9)],
    "pairs": [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": f"{i}."} for i in range(9)],
    "prompts": [{"prompt": f"{i}?", "answer": f"{i}"} for i in range(9)],
    "textless": [{"answer": f"{i}"} for i in range(9)],
    "words": [{"question": "Why?", "answer": "So."}],
    "long": [{"question": " ".join(map(str, range(30))), "answer": "1"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a newcomer may confuse."""
    folder = tmp_path_factory.mktemp("place")
    write_data(folder / "data")
    write_data(folder / "other-data", vocab_size=265)
    make_run(folder / "run", tokenizer())
    make_run(folder / "other-run", tokenizer(265))
    (folder / "empty").mkdir()
    (folder / "raw").mkdir()
    (folder / "raw" / "a.txt").write_text("some text\n" * 99)
    for kind, records in RECORDS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind in ("chat", "pairs", "prompts"):
        line = (
            f"prepare-chat {folder}/{kind}.jsonl --kind {kind} --output {folder}/{kind}-data --tokenizer {folder}/run"
        )
        assert data_prep([*line.split(), "--row-tokens", "64"]) == 0
    (folder / "bad.jsonl").write_text('{"messages": [{"role": "user"\n' * 3)
    (folder / "empty.jsonl").write_text("")
    (folder / "reward.py").write_text("def of_two(prompt, text):\n    return 1.0\n")
    (folder / "broken.py").write_text("def reward(\n")
    (folder / "run.toml").write_text(to_toml(tiny_run(folder / "data", folder / "new", run={"num_steps": 2})))
    (folder / "typo.toml").write_text("[optim]\npeek_lr = 1e-3\n")
    (folder / "preset.toml").write_text('[model]\npreset = "tinylama-1.1b"\n')
    (folder / "tune.toml").write_text(
        f'[run]\ndir = "tuned"\ninit_from = "{folder}/run"\n[data]\nbatch_sequences = 2\n[parallel]\ndevice = "cpu"\n'
    )
    return folder


TABLE: dict[str, tuple[Command, str, list[str]]] = {
    # Preparing data.
    "a command that is none": (data_prep, "prepair", ["prepair: no such command; there are prepare, prepare-chat"]),
    "no input": (data_prep, "prepare --input.paths nothing/*.txt", ["nothing/*.txt: no file matches; patterns are"]),
    "a folder as input": (data_prep, "prepare --input.paths raw", ["raw: a folder; name its files with a pattern"]),
    "a flag mistyped": (data_prep, "prepare --input.path raw/*.txt", ["--input.path; did you mean '--input.paths'?"]),
    "a flag twice": (data_prep, "prepare --input.source a --input.source b", ["given twice; keep one"]),
    "a folder in the way": (
        data_prep,
        "prepare --input.paths raw/*.txt --output.folder raw",
        ["raw: exists and is not a data folder; choose another --output.folder"],
    ),
    "lines that are no JSON": (
        data_prep,
        "prepare-chat bad.jsonl {chat}",
        ["Mend the input", "invalid JSON, e.g. bad.jsonl:1"],
    ),
    "an empty file": (data_prep, "prepare-chat empty.jsonl {chat}", ["has 0 conversations", "Add conversations"]),
    "a file that is not there": (data_prep, "prepare-chat caht.jsonl {chat}", ["caht.jsonl: no file matches"]),
    "prompts without text": (
        data_prep,
        "prepare-chat textless.jsonl --kind prompts {chat}",
        ["no field 'prompt' or 'question'", "textless.jsonl:1", "Mend the input"],
    ),
    "conversations as pairs": (data_prep, "prepare-chat chat.jsonl --kind pairs {chat}", ["no field 'chosen', e.g."]),
    "rows of 12 tokens": (
        data_prep,
        "prepare-chat chat.jsonl {chat} --row-tokens 12",
        ["must be a positive multiple of 8"],
    ),
    "a chat format mistyped": (data_prep, "prepare-chat chat.jsonl {chat} --format chatlm", ["did you mean 'chatml'?"]),
    "a tokenizer without the marks": (
        data_prep,
        "prepare-chat chat.jsonl {chat} --format gemma",
        ["has no <bos>, <start_of_turn>", "choose a format without special tokens"],
    ),
    "no tokenizer there": (
        data_prep,
        "prepare-chat chat.jsonl --output out --tokenizer raw",
        ["raw: found neither tokenizer.json", "name the folder of a model"],
    ),
    "a flag forgotten": (data_prep, "prepare-chat chat.jsonl --output out", ["missing: --tokenizer PATH", "--help"]),
    "rows of another length": (
        data_prep,
        "prepare-chat chat.jsonl --output chat-data --tokenizer run",
        ["row_tokens was 64, is 2048. Give the same options", "another --output"],
    ),
    "the mask of plain text": (data_prep, "show-mask data", ["not a chat data folder", "make one with prepare-chat"]),
    "the mask of a raw file": (data_prep, "show-mask chat.jsonl", ["name its --tokenizer FOLDER"]),
    "the checksums of raw text": (data_prep, "checksums raw", ["no manifest.json; prepare the data first"]),
    "a tokenizer of 100 tokens": (data_prep, "train-tokenizer out raw/a.txt --vocab-size 100", ["needs at least 260"]),
    # Pretraining.
    "no data prepared": (
        pretrain.main,
        "run.toml --data.paths data/default",
        ["data/default: no such data folder", "make prepare-data"],
    ),
    "no config there": (pretrain.main, "configs/smok.toml", ["cannot read the config file", "name a .toml file"]),
    "a key mistyped": (pretrain.main, "typo.toml", ["'optim.peek_lr'; did you mean 'optim.peak_lr'?"]),
    "a preset mistyped": (pretrain.main, "preset.toml", ["'tinylama-1.1b': known presets are tinyllama-1.1b"]),
    "not a number": (pretrain.main, "run.toml --optim.peak-lr fast", ["--optim.peak-lr: could not convert", "--help"]),
    "not a choice": (pretrain.main, "run.toml --optim.schedule cosin", ["'cosin'", "Expected one of ('cosine', 'wsd'"]),
    "a vocabulary too small": (
        pretrain.main,
        "run.toml --model.vocab-size 100",
        ["set --model.vocab-size 276 or more"],
    ),
    "rows longer than the context": (
        pretrain.main,
        "run.toml --data.sequence-length 4096",
        ["exceeds model.context_length = 2048; lower the first or raise the second"],
    ),
    "heads that do not divide": (pretrain.main, "run.toml --model.num-heads 5", ["choose num_kv_heads among [1, 5]"]),
    "raw text as data": (pretrain.main, "run.toml --data.paths raw", ["raw: the folder has no manifest.json; prepare"]),
    "another model's checkpoint": (
        pretrain.main,
        "run.toml --run.dir run",
        ["model.hidden_size = 24, the checkpoint has 32", "start a new run with another"],
    ),
    "data of two tokenizers": (
        pretrain.main,
        "run.toml --data.paths data other-data",
        ["encode the text of both with one tokenizer"],
    ),
    "a disk that is full": (
        pretrain.main,
        "run.toml --run.max-failed-saves 1 --run.async-save False --debug.inject disk-full:rank=0,step=1",
        ["No space left on device", "free some space, and the same command goes on"],
    ),
    "pairs to pretrain on": (
        pretrain.main,
        "run.toml --data.paths pairs-data",
        ["holds pairs, this training reads chat or"],
    ),
    "rows of chat of another length": (
        pretrain.main,
        "run.toml --data.paths chat-data",
        ["data.sequence_length = 32", "set --data.sequence-length 64, or prepare"],
    ),
    # Fine-tuning.
    "nothing to start from": (
        sft,
        "--data.paths chat-data --run.dir new",
        ["name the model to start from with --run.init-from"],
    ),
    "a start that is not there": (
        sft,
        "tune.toml --data.paths chat-data --run.init-from runs/bsae",
        ["runs/bsae: does not exist; expected a run folder"],
    ),
    "a run without a checkpoint": (
        sft,
        "tune.toml --data.paths chat-data --run.init-from empty",
        ["empty: neither a run with a published checkpoint"],
    ),
    "pairs to fine-tune on": (sft, "tune.toml --data.paths pairs-data", ["holds pairs", "prepare-chat --kind chat"]),
    "no chat data prepared": (
        sft,
        "tune.toml",
        ["data/chat: no such data folder", "prepare-chat --kind chat --output"],
    ),
    "another tokenizer's model": (
        sft,
        "tune.toml --data.paths chat-data --run.init-from other-run",
        ["was encoded with another tokenizer than that of", "other-run/step-100; prepare it with --tokenizer"],
    ),
    "adapters for nothing": (
        sft,
        "tune.toml --data.paths chat-data --lora.rank 4 --lora.targets q_prj",
        ["the model has no q_prj", "choose among q_proj, k_proj"],
    ),
    "conversations to prefer": (dpo, "tune.toml --data.paths chat-data", ["holds chat", "prepare-chat --kind pairs"]),
    "no pairs prepared": (dpo, "tune.toml", ["data/pairs: no such data folder", "prepare-chat --kind pairs"]),
    "beta below zero": (dpo, "tune.toml --data.paths pairs-data --dpo.beta -1", ["expected a positive beta"]),
    "prompts to judge": (reward, "tune.toml --data.paths prompts-data", ["holds prompts", "prepare-chat --kind pairs"]),
    "no reward file": (
        grpo,
        "tune.toml --data.paths prompts-data --grpo.reward rewards.py:f",
        ["there is no file rewards.py"],
    ),
    "a reward without a function": (
        grpo,
        "tune.toml --data.paths prompts-data --grpo.reward reward.py",
        ["'reward.py': expected FILE.py:FUNCTION"],
    ),
    "a reward of two arguments": (
        grpo,
        "tune.toml --data.paths prompts-data --grpo.reward reward.py:of_two",
        ["reward.py:of_two must be callable as of_two(prompt, text, row)"],
    ),
    "a reward that is no Python": (
        grpo,
        "tune.toml --data.paths prompts-data --grpo.reward broken.py:reward",
        ["broken.py cannot be run: SyntaxError"],
    ),
    "no teacher": (
        distill,
        "tune.toml --data.paths data --data.sequence-length 32",
        ["name the model to learn from with --distill.teacher"],
    ),
    "a teacher of another vocabulary": (
        distill,
        "tune.toml --data.paths data --data.sequence-length 32 --distill.teacher other-run",
        ["the teacher other-run has another vocabulary", "Prepare the data with its tokenizer"],
    ),
    "no cached teacher": (
        distill,
        "tune.toml --data.paths data --data.sequence-length 32 --distill.cached True",
        ["python -m train.teacher_cache"],
    ),
    # Using a model.
    "no model there": (generate, "runs/demo --prompt x", ["runs/demo: does not exist; expected a run folder"]),
    "a file as a model": (generate, "run.toml --prompt x", ["run.toml: is a file; expected a run folder"]),
    "no prompt": (generate, "run", ["give either --prompt TEXT or --file FILE"]),
    "a prompt twice": (generate, "run --prompt a --prompt b", ["--prompt is given twice; keep one"]),
    "tokens of a word": (
        generate,
        "run --prompt x --max-new-tokens many",
        ["--max-new-tokens: invalid literal", "--help"],
    ),
    "a temperature below zero": (generate, "run --prompt x --temperature -1", ["must be 0 (greedy) or positive"]),
    "a draft of another tokenizer": (
        generate,
        "run --prompt x --draft other-run",
        ["choose a draft that was trained with"],
    ),
    "chat with a base model": (chat, "run", ["no chat.json", "Fine-tune the model on chat data", "--chat-format"]),
    "a port that is taken": (serve, "run --port {port}", ["cannot listen at 127.0.0.1:", "choose another --port"]),
    "an export over a folder": (export, "run data", ["data: already there", "delete it or export to another name"]),
    "an adapter of a whole model": (export, "run out --adapter base", ["not of a LoRA run", "leave --adapter out"]),
    "pairs by no reward": (
        pairs,
        "run chat.jsonl --out out.jsonl --reward rewards.py:f",
        ["there is no file rewards.py"],
    ),
    "pairs by a base model": (pairs, "run chat.jsonl --out out.jsonl", ["no chat.json", "Fine-tune the model"]),
    "answers that nothing judges": (
        rejection,
        "run chat.jsonl --out out.jsonl",
        ["missing: --reward", "FILE.py:FUNCTION"],
    ),
    # Evaluating.
    "a task that is not there": (
        multiple_choice,
        "run data/mmlu",
        ["data/mmlu: does not exist; expected a task's folder"],
    ),
    "no task in the folder": (multiple_choice, "run raw", ["raw: no questions", "expected files such as test/*.csv"]),
    "questions that are none": (
        answers,
        "run textless.jsonl",
        ["textless.jsonl:1: no question; expected a field question"],
    ),
    "answers without a number": (answers, "run words.jsonl", ["has no number; try --scoring exact"]),
    "a folder without text": (domains, "run empty", ["empty: no file of a known kind in it; expected"]),
    "shards of another tokenizer": (
        perplexity,
        "run --data other-data",
        ["another tokenizer than run's; score raw --text"],
    ),
    "a split that is not there": (perplexity, "run --data data --split test", ["the splits are train, validation"]),
    "a batch of nothing": (perplexity, "run --data data --batch-size 0", ["--batch-size 0: must be at least 1"]),
    "a sweep over no checkpoint": (
        sweep,
        "empty --tasks domains=raw",
        ["empty: no checkpoint (step-N) in it; expected"],
    ),
    "a task of no kind": (
        sweep,
        "run --tasks mmlu=raw",
        ["expected KIND=PATH, with a kind of domains, choice, answers"],
    ),
    "raw text that may be contaminated": (
        contamination,
        "raw long.jsonl",
        ["no manifest.json; prepare the data first"],
    ),
    "a report on nothing": (report, "empty", ["has no trained step; nothing to report"]),
    "a teacher of raw text": (teacher_cache, "run raw", ["no manifest.json; prepare the data first"]),
    # Looking after a run.
    "the status of no run": (resume, "status empty", ["no checkpoint yet", "wait for the first one"]),
    "a command of resume that is none": (resume, "stauts run", ["invalid choice: 'stauts' (choose from 'status'"]),
}


def said(command: Command, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int | str | None, str]:
    """Exit code and stderr of a command."""
    capsys.readouterr()
    try:
        code: int | str | None = command(shlex.split(line))
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize("mistake", TABLE)
def test_a_mistake_is_told_in_at_most_three_lines_with_the_remedy(mistake, place, monkeypatch, capsys):
    command, line, phrases = TABLE[mistake]
    monkeypatch.chdir(place)
    for left_by_another in ("tuned", "new"):
        shutil.rmtree(left_by_another, ignore_errors=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = {"port": taken.getsockname()[1], "chat": "--output out --tokenizer run"}
        code, error = said(command, line.format_map(here), capsys)
    assert code not in (0, None)
    assert "Traceback" not in error
    assert 1 <= len(error.splitlines()) <= 3
    for phrase in phrases:
        assert phrase in error


SCRIPTS = ["pretrain", "sft", "dpo", "reward", "grpo", "distill"]
OF_EVALUATION = [
    *("generate", "chat", "serve", "export", "pairs", "rejection", "multiple_choice", "generated_answers"),
    *("perplexity", "domains", "sweep", "contamination", "report", "golden"),
]
MODULES = [
    *(f"data_prep {name}" for name in COMMANDS),
    *(f"evaluation.{name}" for name in OF_EVALUATION),
    "train.teacher_cache",
    "resume",
]
PROBE = """
import resource, runpy, sys
codes = []
for flag in ("--help", "--not-a-flag=1"):
    sys.argv = [*{argv}, flag]
    try:
        runpy.{run}
    except SystemExit as end:
        codes.append(end.code or 0)
used = resource.getrusage(resource.RUSAGE_SELF)
print("probe:", *codes, "torch" in sys.modules, used.ru_utime + used.ru_stime)
"""


def test_help_and_mistyped_flags_do_not_wait_for_torch():
    took_s: dict[str, float] = {}
    for name in (*SCRIPTS, *MODULES):
        path = f'run_path("train/{name}.py", run_name="__main__")'
        run = path if name in SCRIPTS else f'run_module("{name.split()[0]}", run_name="__main__", alter_sys=True)'
        probe = PROBE.format(argv=name.split(), run=run)
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
        of_help, of_mistake, has_torch, cpu_s = done.stdout.splitlines()[-1].removeprefix("probe: ").split()
        assert (of_help, has_torch) == ("0", "False"), name
        assert of_mistake != "0", name
        took_s[name] = float(cpu_s)
    print(took_s)
    # Both together. Half a second is the goal on an idle machine; twice that allows for a busy one.
    assert max(took_s.values()) <= 1.0, max(took_s, key=lambda name: took_s[name])

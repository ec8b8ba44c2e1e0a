import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.tokenizing.tokenizer import load_tokenizer
from evaluation import export
from evaluation.model_folder import load_model
from model.moe_config import MoEConfig
from tests.evaluation.stored import TEXTS, byte_level_tokenizer, make_run, sentencepiece_file
from tests.models import random_tokens

SAMPLES = [TEXTS[3], "unseen ☃ snowman", "  two  spaces\n\n", "a", "<|endoftext|> is text here"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer)
    return tmp_path / "run"


EXPERTS = MoEConfig(num_experts=4, expert_size=24)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": "head"}, {"qk_norm": "head", "moe": EXPERTS}],
    ids=str,
)
@torch.no_grad()
def test_an_exported_model_is_the_same_function_here_and_in_transformers(changes, tokenizer, tmp_path, capsys):
    model = make_run(tmp_path / "run", tokenizer, **changes)
    out = tmp_path / "somewhere" / "out"
    assert export.main([str(tmp_path / "run"), str(out)]) == 0
    assert "step-100" in capsys.readouterr().out
    tokens = random_tokens(model.config, 2, 20)
    again = load_model(out, device="cpu")
    assert torch.equal(again.model(tokens), model(tokens))
    assert again.config == model.config
    assert again.tokenizer.digest == tokenizer.digest
    theirs = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(theirs(input_ids=tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id


def test_an_exported_byte_level_tokenizer_is_the_same_in_transformers(run, tokenizer, tmp_path):
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.eos_token == "<|endoftext|>"
    assert theirs.model_max_length == 64
    for text in SAMPLES[:-1]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("has_prefix", [True, False])
def test_an_exported_sentencepiece_tokenizer_is_the_same_in_transformers(has_prefix, tmp_path, capsys):
    ours = load_tokenizer(sentencepiece_file(tmp_path, add_dummy_prefix=has_prefix))
    make_run(tmp_path / "run", ours)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == ours.eos_id
    for text in SAMPLES:
        if not (has_prefix and text.startswith(" ")):  # transformers adds no space before a space
            assert theirs(text)["input_ids"] == ours.encode(text)
    assert load_model(tmp_path / "out", device="cpu").tokenizer.digest == ours.digest


def test_a_sentencepiece_normalisation_that_transformers_lacks_is_told(tmp_path, capsys):
    ours = load_tokenizer(sentencepiece_file(tmp_path, normalization_rule_name="nmt_nfkc"))
    make_run(tmp_path / "run", ours)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "transformers' LlamaTokenizer does not; its ids will differ" in capsys.readouterr().err


def test_a_begin_token_that_training_never_saw_is_not_added_by_the_exported_tokenizer(run, tokenizer, tmp_path):
    raw = json.loads((run / "tokenizer.json").read_text())
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (run / "tokenizer.json").write_text(json.dumps(raw))
    assert load_tokenizer(run).encode("def") == tokenizer.encode("def")
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("def")["input_ids"] == tokenizer.encode("def")


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_exported_in_the_dtype_asked_for(dtype, expected, run, tmp_path):
    assert export.main([str(run), str(tmp_path / "out"), "--dtype", dtype]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected
    reference, again = load_model(run, device="cpu"), load_model(tmp_path / "out", device="cpu")
    assert torch.equal(again.model.norm.weight, reference.model.norm.weight.to(expected).float())


def test_an_exported_model_can_be_exported_again(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "one")]) == 0
    assert export.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "out").mkdir()
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_already_there_is_not_overwritten(kind, run, tmp_path, capsys):
    out = tmp_path / "out"
    precious = out / "precious" if kind == "folder" else out
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("data")
    assert export.main([str(run), str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "delete it or export to another name" in error
    assert precious.read_text() == "data"


def test_a_model_that_transformers_does_not_have_is_one_line_on_stderr(tokenizer, tmp_path, capsys):
    make_run(tmp_path / "run", tokenizer, norms="deepnorm")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.norms = 'deepnorm' (LlamaForCausalLM: 'pre')")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def fail(*_arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(export, "_write_tokenizer", fail)
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: disk full\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_model_that_is_not_there_is_one_line_on_stderr(tmp_path, capsys):
    assert export.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

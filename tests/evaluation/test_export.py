import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from data_prep.chat.chat_folder import ChatFolder, write_chat_folder
from data_prep.chat.chat_format import FORMATS, chat_format_of
from data_prep.chat.turns import Turn
from data_prep.config_file import to_toml
from data_prep.tokenizing.tokenizer import load_tokenizer
from evaluation import export, export_check
from evaluation.engine import complete
from evaluation.export_check import check_with_theirs
from evaluation.model_folder import ModelFolderError, load_model
from evaluation.sampling import Sampling
from model import convert
from model.hugging_face_configs import hugging_face_config, is_known_to_them
from model.lora import is_lora
from model.lora_config import LoraConfig
from model.peft_files import read_adapter
from resume.checkpoint import open_checkpoint
from tests.adapters import adapted_model
from tests.evaluation.stored import TEXTS, byte_level_tokenizer, make_run, sentencepiece_file
from tests.models import MOE_VARIANTS, VARIANTS, random_tokens
from tests.records import save
from train.config import DataSection, RunSection
from train.preference import scores
from train.recipes import SftConfig

SAMPLES = [TEXTS[3], "unseen ☃ snowman", "  two  spaces\n\n", "a", "<|endoftext|> is text here"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer)
    return tmp_path / "run"


ALL = {
    name: {field.name: getattr(config, field.name) for field in fields(config) if field.name != "vocab_size"}
    for name, config in (VARIANTS | MOE_VARIANTS).items()
}


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_an_exported_model_is_the_same_function_here_and_in_transformers(variant, tokenizer, tmp_path, capsys):
    model = make_run(tmp_path / "run", tokenizer, **ALL[variant])
    out = tmp_path / "somewhere" / "out"
    assert export.main([str(tmp_path / "run"), str(out)]) == 0
    said = capsys.readouterr()
    assert "step-100" in said.out
    is_known = is_known_to_them(model.config)
    assert (out / "modeling_bessemer.py").is_file() is ("trust_remote_code=True" in said.err) is not is_known
    tokens = random_tokens(model.config, 2, 20)
    again = load_model(out, device="cpu")
    torch.testing.assert_close(again.model(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert again.tokenizer.digest == tokenizer.digest
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=not is_known)
    torch.testing.assert_close(theirs(input_ids=tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert theirs.generation_config.max_length == 64


@pytest.mark.parametrize("variant", ["qwen3", "qwen3-moe"])
def test_greedy_text_is_the_same_in_transformers(variant, tokenizer, tmp_path):
    make_run(tmp_path / "run", tokenizer, **(ALL[variant] | {"context_length": 300}))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    prompt = tokenizer.encode(TEXTS[0])
    ours = complete(
        load_model(tmp_path / "run", device="cpu").model, prompt, max_new_tokens=256, sampling=Sampling()
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.generation_config.eos_token_id = None
    found = theirs.generate(torch.tensor([prompt]), do_sample=False, max_length=None, max_new_tokens=256)
    assert len(ours[0]) == 256
    assert found[0, len(prompt) :].tolist() == ours[0]


def test_our_own_modelling_file_generates_from_padded_rows(tokenizer, tmp_path, capsys):
    make_run(tmp_path / "run", tokenizer, norms="deepnorm", sliding_window=6)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--check", "transformers"]) == 0
    assert "norms = 'deepnorm' (MistralForCausalLM: 'pre')" in capsys.readouterr().err
    texts = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    theirs.generation_config.eos_token_id = None
    rows = texts(["def f", TEXTS[0][:30]], padding=True, return_tensors="pt")
    assert rows["attention_mask"][0, 0] == 0
    found = theirs.generate(**rows, do_sample=False, max_length=None, max_new_tokens=9)[:, -9:]
    ours = load_model(tmp_path / "out", device="cpu")
    for row, text in zip(found.tolist(), ["def f", TEXTS[0][:30]], strict=True):
        (expected,) = complete(ours.model, tokenizer.encode(text), max_new_tokens=9, sampling=Sampling())
        assert row == expected


@torch.no_grad()
def test_our_own_modelling_file_refuses_padding_where_chunks_are_counted(tokenizer, tmp_path):
    make_run(tmp_path / "run", tokenizer, **ALL["chunk soft"])
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokens = torch.tensor([[1, 2, 3]])
    assert theirs(tokens, attention_mask=torch.ones_like(tokens)).logits.shape[1] == 3
    with pytest.raises(ValueError, match="give rows without padding"):
        theirs(tokens, attention_mask=torch.tensor([[0, 1, 1]]))


TALK = [("system", "Be kind."), ("user", "def f?"), ("assistant", "return x"), ("user", "naïve café 1")]


@pytest.mark.parametrize("name", ["chatml", "zephyr", "alpaca"])
def test_an_exported_chat_model_stops_and_is_prompted_as_it_was_trained(name, tokenizer, tmp_path):
    make_run(tmp_path / "run", tokenizer)
    chat_format = FORMATS[name]
    write_chat_folder(tmp_path / "run", ChatFolder("chat", 64, chat_format))
    assert export.main([str(tmp_path / "run" / "step-100"), str(tmp_path / "out")]) == 0
    assert chat_format_of(tmp_path / "out") == chat_format
    texts = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": role, "content": content} for role, content in TALK]
    ids = texts.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat_format.prompt(tokenizer, [Turn(*turn) for turn in TALK])
    stop_ids = chat_format.stop_ids(tokenizer)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0], "pad_token_id": 3, "max_length": 64,
    }  # fmt: skip
    assert texts.decode([*tokenizer.encode("def f"), *stop_ids], skip_special_tokens=True) == "def f"
    assert texts.pad_token_id == 3


def test_transformers_stops_where_the_answer_does(tokenizer, tmp_path):
    make_run(tmp_path / "run", tokenizer)
    write_chat_folder(tmp_path / "run", ChatFolder("chat", 64, FORMATS["chatml"]))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stop = tokenizer.special_id("<|im_end|>")
    with torch.no_grad():
        theirs.lm_head.weight[stop] = 9 * theirs.lm_head.weight.mean(dim=0)
        theirs.lm_head.weight[stop] += theirs.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    assert theirs.generate(torch.tensor([[5, 6]]), do_sample=False)[0].tolist() == [5, 6, stop]


@pytest.mark.parametrize("name", ["llama2", "mistral", "zephyr"])
def test_a_sentencepiece_chat_model_is_prompted_as_it_was_trained(name, tmp_path):
    ours = load_tokenizer(sentencepiece_file(tmp_path))
    make_run(tmp_path / "run", ours, context_length=128)
    write_chat_folder(tmp_path / "run", ChatFolder("chat", 64, FORMATS[name]))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    texts = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": role, "content": content} for role, content in TALK]
    ids = texts.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == FORMATS[name].prompt(ours, [Turn(*turn) for turn in TALK])


SCORED = {name: ALL[name] for name in ("llama", "mistral", "qwen2", "qwen3", "olmo2", "mixtral", "qwen3-moe")}
SCORED["gemma2"] = ALL["gemma2"] | {"attention_scale": 20**-0.5, "tie_embeddings": False}


@pytest.mark.parametrize("variant", SCORED)
@torch.no_grad()
def test_an_exported_reward_model_scores_the_last_token_in_transformers(variant, tokenizer, tmp_path):
    model = make_run(tmp_path / "run", tokenizer, **(SCORED[variant] | {"head": "score"}))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = random_tokens(model.config, 2, 20).clamp(min=4)
    expected = model(tokens, readout=scores)
    torch.testing.assert_close(theirs(input_ids=tokens).logits[:, 0], expected[:, -1], rtol=1e-5, atol=1e-5)
    padded = torch.cat((tokens[:, :13], torch.full((2, 7), 3)), dim=1)
    torch.testing.assert_close(theirs(input_ids=padded).logits[:, 0], expected[:, 12], rtol=1e-5, atol=1e-5)
    again = load_model(tmp_path / "out", device="cpu").model
    assert again.config.head == "score"
    torch.testing.assert_close(again(tokens, readout=scores), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["olmoe", "senet"])
def test_a_reward_model_that_transformers_has_no_class_for_is_refused(variant, tokenizer, tmp_path, capsys):
    make_run(tmp_path / "run", tokenizer, **(ALL[variant] | {"head": "score"}))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def lora_run(tmp_path, run):
    """A run of adapters that started from `run`."""
    config = load_model(run, device="cpu").config
    lora = LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    adapters = {f"model.{n}": p for n, p in adapted_model(config, lora).named_parameters() if is_lora(n)}
    folder = tmp_path / "lora"
    folder.mkdir()
    load_tokenizer(run).save(folder)
    table = SftConfig(run=RunSection(init_from=str(run)), data=DataSection(sequence_length=32), model=config, lora=lora)
    save(folder, 7, adapters, {}, to_toml(table), keep=1)
    return folder


def test_adapters_are_merged_into_the_weights(lora_run, run, tmp_path):
    assert export.main([str(lora_run), str(tmp_path / "out"), "--check", "transformers"]) == 0
    merged, base = (load_model(path, device="cpu") for path in (tmp_path / "out", run))
    assert all(torch.equal(merged.model.state_dict()[n], t) for n, t in load_model(lora_run).model.state_dict().items())
    assert not torch.equal(merged.model.blocks[0].mlp.down.weight, base.model.blocks[0].mlp.down.weight)


def test_adapters_are_written_alone(lora_run, tmp_path):
    assert export.main([str(lora_run), str(tmp_path / "out"), "--adapter", "somebody/base"]) == 0
    lora, state = read_adapter(tmp_path / "out", load_model(lora_run).config)
    stored = open_checkpoint(lora_run / "step-7").read_tensors("model.")
    assert (lora.rank, set(lora.targets)) == (3, {"q_proj", "down_proj"})
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], value) for name, value in stored.items())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "somebody/base"
    )
    assert not (tmp_path / "out" / "config.json").exists()


def test_adapters_of_a_run_without_any_are_refused(run, tmp_path, capsys):
    assert export.main([str(run), str(tmp_path / "out"), "--adapter", "base"]) == 2
    assert "not of a LoRA run (lora.rank); leave --adapter out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_come_back_otherwise_are_not_published(run, tmp_path, monkeypatch, capsys):
    write = convert._write_tensors

    def rot(folder, tensors, dtype):
        write(folder, {n: t + 1e-3 if n == "model.norm.weight" else t for n, t in tensors.items()}, dtype)

    monkeypatch.setattr(convert, "_write_tensors", rot)
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "model.norm.weight came back changed (1 tensors differ)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_config_that_says_something_else_is_not_published(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        convert,
        "hugging_face_config",
        lambda *a, **k: hugging_face_config(*a, **k) | {"rope_theta": 9.0, "rope_parameters": None},
    )
    assert export.main([str(run), str(tmp_path / "out")]) == 2
    assert "computes something else in our reader: logits up to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_transformers_computes_is_compared(run, tmp_path, monkeypatch):
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    check_with_theirs(tmp_path / "out")
    monkeypatch.setattr(export_check, "_logits", lambda config, state: torch.zeros(1, 16, config.vocab_size))
    with pytest.raises(ModelFolderError, match="computes something else in transformers"):
        check_with_theirs(tmp_path / "out")


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

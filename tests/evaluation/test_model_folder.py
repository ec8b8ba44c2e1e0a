import dataclasses
import json

import pytest
import torch
import xxhash

from data_prep.tokenizing.tokenizer import TokenizerError
from evaluation.model_folder import ModelFolderError, load_model, read_model
from model.convert import ConvertError, write_hugging_face
from resume.checkpoint import CheckpointError
from tests.evaluation.stored import byte_level_tokenizer, make_run, model_config, save_step
from tests.models import make_model, random_tokens
from tests.records import rewrite


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture
def run(tmp_path, tokenizer):
    make_run(tmp_path / "run", tokenizer)
    return tmp_path / "run"


def same_logits(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    tokens = random_tokens(first.config, 2, 12)
    with torch.no_grad():
        return torch.equal(first(tokens), second(tokens))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": "head"}], ids=str)
def test_a_run_folder_gives_its_newest_checkpoint(changes, tokenizer, tmp_path):
    newest = make_run(tmp_path / "run", tokenizer, **changes)
    (tmp_path / "run" / "step-999.tmp").mkdir()
    loaded = load_model(tmp_path / "run", device="cpu")
    assert loaded.path == tmp_path / "run" / "step-100"
    assert loaded.config == newest.config
    assert same_logits(loaded.model, newest)
    assert not loaded.model.training
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == newest.config.tie_embeddings


def test_a_checkpoint_folder_gives_that_checkpoint(run, tokenizer, monkeypatch):
    expected = make_model(model_config(tokenizer), seed=90)
    assert same_logits(load_model(run / "step-90", device="cpu").model, expected)
    monkeypatch.chdir(run)
    loaded = load_model("step-90", device="cpu")
    assert same_logits(loaded.model, expected)
    assert loaded.tokenizer.digest == tokenizer.digest


def test_a_hugging_face_folder_gives_its_model_and_end_token(tokenizer, tmp_path):
    model = make_model(model_config(tokenizer))
    other_eos = 2
    write_hugging_face(tmp_path, model.config, model.state_dict(), eos_id=other_eos, dtype="fp32")
    tokenizer.save(tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert same_logits(loaded.model, model)
    assert loaded.tokenizer.eos_id == other_eos
    table = json.loads((tmp_path / "config.json").read_text())
    for written, expected in ([3, 2], 3), ([], tokenizer.eos_id), (None, tokenizer.eos_id):
        (tmp_path / "config.json").write_text(json.dumps(table | {"eos_token_id": written}))
        assert read_model(tmp_path).tokenizer.eos_id == expected


def test_an_end_token_recorded_in_the_checkpoint_wins(run, tokenizer):
    save_step(run, 110, model_config(tokenizer), {"data": {"eos_id": 2}})
    assert read_model(run).tokenizer.eos_id == 2
    assert read_model(run / "step-100").tokenizer.eos_id == tokenizer.eos_id


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_come_in_the_dtype_asked_for(dtype, run):
    loaded = load_model(run, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.device == torch.device("cpu")


def test_the_cpu_computes_in_fp32_unless_told_otherwise(run):
    assert load_model(run, device="cpu").model.norm.weight.dtype == torch.float32


@pytest.mark.gpu
def test_cuda_computes_in_bf16_unless_told_otherwise(run):
    loaded = load_model(run)
    assert loaded.device.type == "cuda"
    assert loaded.model.norm.weight.dtype == torch.bfloat16


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match="nowhere: does not exist; expected a run folder"):
        load_model(tmp_path / "nowhere")


def test_a_file_is_refused(run):
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json: is a file"):
        load_model(run / "tokenizer.json")


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "step-5.tmp").mkdir()
    with pytest.raises(ModelFolderError, match="neither a run with a published checkpoint"):
        load_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(run, tokenizer):
    small = dataclasses.replace(model_config(tokenizer), vocab_size=tokenizer.vocab_size - 1)
    save_step(run, 120, small)
    with pytest.raises(ModelFolderError, match=f"has {tokenizer.vocab_size} tokens .* only {small.vocab_size} embed"):
        load_model(run)


def test_a_missing_tokenizer_is_refused(run):
    (run / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"found neither tokenizer\.json"):
        load_model(run)


def test_a_damaged_checkpoint_is_refused(run):
    weights = run / "step-100" / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(run)


def test_a_config_that_does_not_fit_the_weights_is_refused(run):
    # Both files are hashed, so this takes a record that was made to agree.
    text = (run / "step-100" / "config.toml").read_text().replace("ffn_size = 48", "ffn_size = 50")
    (run / "step-100" / "config.toml").write_text(text)
    entry = {"size_bytes": len(text), "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode())}
    rewrite(run / "step-100" / "record.json", lambda record: record["files"].update({"config.toml": entry}))
    with pytest.raises(ModelFolderError, match=r"do not fit the config beside them(.|\n)*mlp\.down"):
        load_model(run)


def test_a_checkpoint_without_a_config_is_refused(run):
    rewrite(run / "step-100" / "record.json", lambda record: record["files"].pop("config.toml"))
    (run / "step-100" / "config.toml").unlink()
    with pytest.raises(CheckpointError, match="names no files, no config or no step"):
        load_model(run)


def test_a_hugging_face_folder_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConvertError, match="model_type = 'bert'"):
        load_model(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "cuda:"])
def test_an_unknown_device_is_refused(device, run):
    with pytest.raises(ModelFolderError, match=f"device = '{device}': expected auto, cpu, cuda"):
        load_model(run, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused(run):
    with pytest.raises(ModelFolderError, match="no CUDA device is available; use --device cpu"):
        load_model(run, device="cuda")

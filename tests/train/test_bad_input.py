"""What is wrong is said in one line that names the file or key and the remedy, with an exit code for scripts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.config_file import to_toml
from data_prep.manifest import read_manifest, write_manifest
from data_prep.shards import HEADER_BYTES
from tests.prepared import write_data
from tests.runs import tiny_run
from train import pretrain
from train.exits import read_end
from train.pretrain import BAD_CONFIG, BAD_DATA, CANNOT_WRITE


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tiny_run(data, tmp_path / "run", run={"num_steps": 2})))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    capsys.readouterr()
    code = pretrain.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return code, error


def test_a_missing_data_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--data.paths", tmp_path / "nowhere")
    assert code == BAD_DATA
    assert "nowhere: no such data folder" in error
    assert "make prepare-data" in error


def test_an_empty_data_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    code, error = refused(capsys, config, "--data.paths", tmp_path / "empty")
    assert code == BAD_DATA
    assert "no manifest.json" in error


def test_a_vocabulary_smaller_than_the_data_s(config: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--model.vocab-size", 100)
    assert code == BAD_CONFIG
    assert "model.vocab_size = 100" in error
    assert "was encoded with 276 token ids; set --model.vocab-size 276 or more" in error


def test_a_token_id_beyond_the_vocabulary(data: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    # Shards that lie: each holds an id of no token, and the manifest agrees with them.
    manifest = read_manifest(data)
    records = []
    for record in manifest.shards:
        path = data / record.file
        if record.split == "train":
            content = bytearray(path.read_bytes())
            content[HEADER_BYTES + 20 : HEADER_BYTES + 22] = (60_000).to_bytes(2, "little")
            path.write_bytes(content)
        from data_prep.fingerprint import fingerprint

        found = fingerprint(path)
        records.append(dataclasses.replace(record, md5_head=found.md5_head, md5_tail=found.md5_tail))
    write_manifest(data, dataclasses.replace(manifest, shards=tuple(records)))
    code, error = refused(capsys, config, "--run.num-steps", 9)
    assert code == BAD_DATA
    assert ".bin: token id 60000 at token 10 (sample 0), the model's vocab_size is 300" in error


def test_a_tokenizer_that_is_not_the_shards(data: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    path = data / "tokenizer.json"
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table, indent=1))
    code, error = refused(capsys, config)
    assert code == BAD_DATA
    assert "tokenizer.json: digest" in error
    assert "the shards were encoded with" in error


def test_a_truncated_shard(data: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    with (data / "train" / "test-00001.bin").open("r+b") as file:
        file.truncate(HEADER_BYTES + 31)
    code, error = refused(capsys, config)
    assert code == BAD_DATA
    assert "test-00001.bin: 4127 bytes" in error
    assert "truncated or replaced: restore it" in error


def test_an_unknown_key(config: Path, capsys: pytest.CaptureFixture[str]):
    config.write_text(config.read_text().replace("peak_lr", "peek_lr"))
    code, error = refused(capsys, config)
    assert code == BAD_CONFIG
    assert f"{config}: unknown key 'optim.peek_lr'; did you mean 'optim.peak_lr'?" in error


def test_replicas_that_do_not_divide_the_devices(config: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--parallel.replicas", 2)
    assert code == BAD_CONFIG
    assert "parallel.replicas = 2 does not divide the 1 devices" in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_demanded_where_there_is_none(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--parallel.device", "cuda")
    assert code == BAD_CONFIG
    assert "parallel.device = 'cuda', but torch finds no CUDA device" in error
    end = read_end(tmp_path / "run")
    assert (end["code"], end["rank"], end["step"]) == (BAD_CONFIG, 0, 0)
    assert f"error: {end['cause']}\n" == error


def test_a_config_that_differs_from_the_checkpoint(config: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    code, error = refused(capsys, config, "--optim.beta2", 0.99, "--model.num-layers", 3)
    assert code == BAD_CONFIG
    assert "model.num_layers = 3, the checkpoint has 2; optim.beta2 = 0.99, the checkpoint has 0.95" in error
    assert "--run.allow-changes model.num_layers optim.beta2" in error
    allowed = ["--optim.beta2", "0.99", "--run.allow-changes", "optim.beta2", "--run.num-steps", "3"]
    assert pretrain.main([str(config), *allowed]) == 0


def test_another_model_under_an_allowed_change_is_still_refused(config: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    flags = ["--model.ffn-size", 41, "--run.allow-changes", "model.ffn_size"]
    code, error = refused(capsys, config, *flags)
    assert code == BAD_CONFIG
    assert "mlp.gate_up.weight is (80, 24)" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.max-grad-norm", "inf"], "optim.max_grad_norm = inf: must be finite"),
        (["--optim.peak-lr", "nan"], "optim.peak_lr = nan: must be finite"),
        (["--optim.beta1", "1.0"], "optim.beta1 = 1.0: must be at least 0 and below 1"),
        (["--optim.schedule", "wsd", "--optim.decay-steps", "5"], "no room for its plateau"),
    ],
)
def test_values_that_make_no_run(config: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, *flags)
    assert code == BAD_CONFIG
    assert message in error


def test_a_checkpoint_past_the_end_of_the_run(config: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    code, error = refused(capsys, config, "--run.num-steps", 1)
    assert code == BAD_CONFIG
    assert "step-2 is past run.num_steps = 1" in error


def test_a_preset_as_a_flag(config: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--model.preset", "smoke")
    assert code == BAD_CONFIG
    assert "into the TOML file's [model] table" in error


def test_a_run_folder_that_is_a_file(config: Path, capsys: pytest.CaptureFixture[str]):
    code, error = refused(capsys, config, "--run.dir", config)
    assert code == CANNOT_WRITE
    assert str(config) in error


def test_a_seed_that_differs_has_no_way_out_but_another_run(config: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    for flags in ([], ["--run.allow-changes", "run.seed"]):
        code, error = refused(capsys, config, "--run.seed", 5, *flags)
        assert code == BAD_CONFIG
        assert "run.seed = 5, the checkpoint has 3407" in error
        assert "--run.allow-changes" not in error


def test_world_size_without_torchrun(config: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, error = refused(capsys, config)
    assert code == BAD_CONFIG
    assert "start several processes with torchrun" in error


def test_shards_added_to_the_folder_of_a_run_are_noticed_but_not_trained(
    data: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert pretrain.main([str(config)]) == 0
    other = write_data(tmp_path / "other", texts=[f"x = {i}\n" * 9 for i in range(60)])
    shutil.copy(other / "train" / "test-00000.bin", data / "train" / "new-00000.bin")
    manifest, added = read_manifest(data), read_manifest(other).shards[0]
    new = dataclasses.replace(added, file="train/new-00000.bin")
    write_manifest(data, dataclasses.replace(manifest, shards=(*manifest.shards, new)))
    assert pretrain.main([str(config), "--run.num-steps", "3"]) == 0
    assert "1 training shards in the data folders are not part of this run" in capsys.readouterr().out


def test_a_shard_that_is_gone_for_good(data: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    (data / "train" / "test-00001.bin").unlink()
    code, error = refused(capsys, config, "--run.num-steps", 3)
    assert code == BAD_DATA
    assert "test-00001.bin" in error
    assert "--data.search FOLDER" in error


def test_a_shard_that_was_moved_and_renamed_is_found_by_its_content(data: Path, config: Path, tmp_path: Path):
    assert pretrain.main([str(config)]) == 0
    (tmp_path / "attic").mkdir()
    (data / "train" / "test-00001.bin").rename(tmp_path / "attic" / "other.bin")
    flags = ["--run.num-steps", "3", "--data.search", str(tmp_path / "attic")]
    assert pretrain.main([str(config), *flags]) == 0


def test_a_damaged_checkpoint(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main([str(config)]) == 0
    weights = tmp_path / "run" / "step-2" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    code, error = refused(capsys, config, "--run.num-steps", 3)
    assert code == BAD_CONFIG
    assert "rank-00000.safetensors" in error
    assert "The file is damaged" in error


def test_why_a_checkpoint_was_set_aside_is_said_though_the_start_then_fails_of_something_else(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The next start finds nothing to set aside, so it could not say it."""
    assert pretrain.main([str(config), "--run.save-every", "1"]) == 0
    (tmp_path / "run" / "step-2" / "rank-00000.safetensors").unlink()
    capsys.readouterr()
    assert pretrain.main([str(config), "--optim.beta2", "0.99"]) == BAD_CONFIG
    said = capsys.readouterr()
    assert "checkpoint step-2 REJECTED: " in said.out
    assert "rank-00000.safetensors: missing" in said.out
    assert "optim.beta2 = 0.99, the checkpoint has 0.95" in said.err


def test_a_shard_that_is_there_twice(data: Path, config: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copy(data / "train" / "test-00000.bin", data / "train" / "twin-00000.bin")
    manifest = read_manifest(data)
    twin = next(record for record in manifest.shards if record.file == "train/test-00000.bin")
    twins = (*manifest.shards, dataclasses.replace(twin, file="train/twin-00000.bin"))
    write_manifest(data, dataclasses.replace(manifest, shards=twins))
    code, error = refused(capsys, config)
    assert code == BAD_DATA
    assert "twin-00000.bin and " in error
    assert "test-00000.bin have the same content; remove one from the manifest" in error


def test_initial_weights_of_another_shape(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from model.convert import write_hugging_face
    from tests.models import make_model
    from tests.runs import TINY

    model = make_model(TINY, seed=0)
    folder = tmp_path / "weights"
    folder.mkdir()
    write_hugging_face(folder, TINY, dict(model.state_dict()), eos_id=0, dtype="fp32")
    code, error = refused(capsys, config, "--run.init-from", folder, "--model.num-layers", 3)
    assert code == BAD_CONFIG
    assert "set --model.num-layers 2" in error
    assert pretrain.main([str(config), "--run.init-from", str(folder)]) == 0

"""Whole runs as a person starts them: real commands, real signals, real launchers."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.config_file import to_toml
from data_prep.manifest import read_manifest
from data_prep.shards import open_tokens
from evaluation.report import read_metrics
from evaluation.score import unigram_entropy
from resume import checkpoint
from tests.prepared import write_data
from tests.processes import free_port
from tests.runs import tiny_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def written(data_folder: Path, folder: Path, **sections: dict) -> Path:
    """A tiny run's config as a file; its run folder lies beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.toml"
    path.write_text(to_toml(tiny_run(data_folder, folder / "run", **sections)))
    return path


def run(*command: object, folder: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 or not check, result.stdout + result.stderr
    return result


def train(config: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "train/pretrain.py", config)


def train_until_step(step: int, number: signal.Signals, config: Path) -> int:
    """Trains, sends the signal when the step is printed, and returns the exit code."""
    command = [sys.executable, "train/pretrain.py", str(config)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[:1] == ["step"] and int(line.split()[1].split("/")[0]) == step:
                process.send_signal(number)
    return process.returncode


def same_tensors(a: Path, b: Path) -> bool:
    one, other = checkpoint.open_checkpoint(a).read_tensors(""), checkpoint.open_checkpoint(b).read_tensors("")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(run_folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_folder) if "loss" in record]


def test_a_run_told_to_stop_and_resumed_equals_the_uninterrupted_one_bit_for_bit(data: Path, tmp_path: Path):
    """Whatever the working directory is, and as a script or as a module."""
    more = {"run": {"num_steps": 30}}
    whole, halves = written(data, tmp_path / "whole", **more), written(data, tmp_path / "halves", **more)
    run(sys.executable, ROOT / "train" / "pretrain.py", whole, folder=tmp_path)
    assert train_until_step(10, signal.SIGTERM, halves) == 75
    stopped_at = checkpoint.steps(tmp_path / "halves" / "run")[-1]
    assert 10 <= stopped_at < 30
    again = run(sys.executable, "-m", "train.pretrain", halves, folder=tmp_path)
    assert f"resuming at step {stopped_at}" in again.stdout
    assert losses(tmp_path / "halves" / "run") == losses(tmp_path / "whole" / "run")
    assert same_tensors(tmp_path / "halves" / "run" / "step-30", tmp_path / "whole" / "run" / "step-30")


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint_bit_for_bit(data: Path, tmp_path: Path):
    more = {"run": {"num_steps": 30, "save_every": 4}}
    whole, killed = written(data, tmp_path / "whole", **more), written(data, tmp_path / "killed", **more)
    train(whole)
    assert train_until_step(14, signal.SIGKILL, killed) == -signal.SIGKILL
    train(killed)
    assert losses(tmp_path / "killed" / "run") == losses(tmp_path / "whole" / "run")
    assert same_tensors(tmp_path / "killed" / "run" / "step-30", tmp_path / "whole" / "run" / "step-30")


@pytest.mark.slow
def test_torchrun_on_two_ranks_trains_below_the_unigram_entropy_and_the_model_is_usable(data: Path, tmp_path: Path):
    config = written(data, tmp_path, run={"num_steps": 60}, optim={"max_grad_norm": 1.0})
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    result = run(*torchrun, "train/pretrain.py", config)
    assert result.stdout.count("step       60/60") == 1  # rank 0 alone prints
    folder = tmp_path / "run"
    held_out = [open_tokens(data / shard.file) for shard in read_manifest(data).shards if shard.split == "validation"]
    final = [record for record in read_metrics(folder) if "validation_loss" in record][-1]["validation_loss"]
    assert final < unigram_entropy(held_out[0]) - 0.5
    record = json.loads((folder / "step-60" / "record.json").read_text())
    assert record["world_size"] == 2
    run(sys.executable, "-m", "evaluation.export", folder, tmp_path / "exported")
    scores = [
        run(sys.executable, "-m", "evaluation.perplexity", model, "--data", data, "--sequence-length", 32).stdout
        for model in (folder, tmp_path / "exported")
    ]
    assert scores[0] == scores[1]
    assert scores[0].startswith("loss ")
    sample = run(sys.executable, "-m", "evaluation.generate", folder, "--prompt", "def f", "--max-new-tokens", "8")
    assert sample.stdout.strip()


@pytest.mark.slow
def test_two_machines_by_torchrun_s_own_flags_replicate_and_shard(data: Path, tmp_path: Path):
    config = written(data, tmp_path, parallel={"replicas": 2}, data={"micro_batch_sequences": 1})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    command = [*torchrun, *rendezvous, "train/pretrain.py", str(config)]
    nodes = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0]
    record = json.loads((tmp_path / "run" / "step-6" / "record.json").read_text())
    assert record["world_size"] == 4
    # Of two replicas of two shards, the first replica's ranks write.
    assert sorted(record["files"]) == ["config.toml", "rank-00000.safetensors", "rank-00001.safetensors"]

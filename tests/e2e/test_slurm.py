"""scripts/slurm.sbatch on two "machines", with stand-ins for what Slurm brings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.config_file import to_toml
from evaluation.report import read_metrics
from resume import checkpoint
from tests.prepared import write_data
from tests.processes import free_port
from tests.runs import tiny_run

ROOT = Path(__file__).parents[2]

# Starts the command that follows srun's own flags once for each node, and notes the processes.
SRUN = """#!/bin/bash
shift; shift; shift
for node in 1 2; do
    torchrun --local-addr=127.0.0.1 "$@" & echo $! >> "$STAND_IN/nodes"
done
wait; wait
exit 1
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$STAND_IN/requeued"; fi
"""


def start(config: Path, folder: Path, *flags: str, srun: str = SRUN) -> subprocess.Popen[str]:
    for name, text in (("srun", srun), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "nodes").unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "STAND_IN": str(folder),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "GPUS_PER_NODE": "1",
        "RDZV_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = ["bash", "scripts/slurm.sbatch", str(config), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(config: Path, folder: Path, *flags: str, srun: str) -> tuple[int, str]:
    """Exit code and output of a job whose srun is another."""
    job = start(config, folder, *flags, srun=srun)
    output, _ = job.communicate(timeout=100)
    return job.returncode, output


def test_a_job_is_queued_again_by_its_own_word_alone(tmp_path: Path):
    """By that of the life before it, one that cannot begin would be queued again and again."""
    run, other, config = tmp_path / "run", tmp_path / "other", tmp_path / "run.toml"
    config.write_text(f'[run]\ndir = "{run}"\n')
    for folder in (run, other):
        folder.mkdir()
        (folder / "exit.json").write_text('{"code": 75}')
    code, output = ended(config, tmp_path, srun="#!/bin/bash\nexit 1\n")
    assert (code, (tmp_path / "requeued").exists()) == (1, False), output
    assert f"ended without a word in {run}/exit.json" in output
    # A flag says where the run is, as it does to the trainer.
    again = f"#!/bin/bash\nrm {other}/exit.json; echo '{{\"code\": 75}}' > {other}/exit.json; exit 1\n"
    code, output = ended(config, tmp_path, "--run.dir", str(other), srun=again)
    assert (code, (tmp_path / "requeued").read_text()) == (75, "requeue 7\n"), output


@pytest.mark.parametrize("wrong", [("--run.dri", "x"), ("--run.num-steps", "many")])
def test_a_job_that_is_told_what_it_does_not_know_ends_before_it_starts_anything(
    tmp_path: Path, wrong: tuple[str, str]
):
    config = tmp_path / "run.toml"
    config.write_text("[run]\nnum_steps = 3\n")
    code, output = ended(config, tmp_path, *wrong, srun=f"#!/bin/bash\ntouch {tmp_path}/started\n")
    assert (code, (tmp_path / "started").exists()) == (78, False), output


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_queued_again_and_goes_on(tmp_path: Path):
    run, config = tmp_path / "run", tmp_path / "run.toml"
    long_run = {"num_steps": 5_000, "save_every": 1_000, "validate_every": 5_000}
    config.write_text(to_toml(tiny_run(write_data(tmp_path / "data"), run, run=long_run)))
    job = start(config, tmp_path)
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 10:
        assert job.poll() is None
        time.sleep(0.1)
    for node in (tmp_path / "nodes").read_text().split():
        os.kill(int(node), signal.SIGUSR1)
    output, _ = job.communicate(timeout=100)
    assert job.returncode == 75, output
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (step,) = checkpoint.steps(run)
    assert max(record["step"] for record in read_metrics(run)) == step
    assert json.loads((run / "exit.json").read_text())["step"] == step

    again = start(config, tmp_path, "--run.num-steps", str(step + 5))
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0, output
    assert f"resuming at step {step}\n" in output
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert checkpoint.read_record(run / f"step-{step + 5}")["world_size"] == 2

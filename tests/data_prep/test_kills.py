"""Preparations that are killed, whole or in part, end with the bytes of one that nobody touched."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
WORDS = [f"{a}{b}" for a in ("ba", "ko", "li", "mu", "ne", "ro", "si", "tu", "va", "wo") for b in "bcdfghjklm"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An input of twelve files with duplicates, and the folder made of it undisturbed."""
    place = tmp_path_factory.mktemp("kills")
    rng = random.Random(0)
    for number in range(12):
        texts = [" ".join(random.Random(rng.randrange(3000)).choices(WORDS, k=80)) for _ in range(300)]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (place / f"{number:02d}.jsonl").write_text("".join(lines))
    (place / "run.toml").write_text(
        f"""
        [input]
        paths = ["{place}/*.jsonl"]
        [tokenizer]
        vocab_size = 600
        training_bytes = 100_000
        [output]
        sample_tokens = 64
        shard_tokens = 6400
        [engine]
        num_workers = 2
        unit_bytes = 20_000
        dashboard = "127.0.0.1:0"
        """
    )
    started_s = time.monotonic()
    assert start(place, "undisturbed", "pool").wait() == 0
    (place / "seconds").write_text(str(time.monotonic() - started_s))
    return place


def start(place: Path, name: str, engine: str) -> subprocess.Popen[bytes]:
    flags = ["--output.folder", str(place / name), "--engine.kind", engine]
    command = [sys.executable, "-m", "data_prep", "prepare", str(place / "run.toml"), *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **quiet)


def digests(folder: Path) -> dict[str, str]:
    """Of everything but what names the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("prepare.toml", "report.html")
    }


def descendants(pid: int) -> list[int]:
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(child) for text in texts for child in text.split()]
    return children + [inner for child in children for inner in descendants(child)]


def is_a_worker(pid: int) -> bool:
    """Not the process that looks after semaphores, which nothing replaces."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"spawn_main" in command or b"forkserver" in command


def end_whole_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_with_kills_of_everything(place: Path, name: str, engine: str, rng: random.Random, num_kills: int) -> int:
    """Kills a run with all its processes at random moments, begins it again each time; returns how often it was hit."""
    seconds, hits = float((place / "seconds").read_text()), 0
    while True:
        process = start(place, name, engine)
        if hits == num_kills:
            assert process.wait() == 0
            return hits
        try:
            assert process.wait(rng.uniform(0.1, 0.8) * seconds) == 0
        except subprocess.TimeoutExpired:
            end_whole_group(process)
            hits += 1
        else:
            return hits


def run_with_kills_of_workers(place: Path, name: str, engine: str, rng: random.Random, num_kills: int) -> int:
    process, hits = start(place, name, engine), 0
    while process.poll() is None:
        time.sleep(rng.uniform(0.05, 1.5))
        workers = [pid for pid in descendants(process.pid) if is_a_worker(pid)]
        if workers and hits < num_kills:
            try:
                os.kill(rng.choice(workers), signal.SIGKILL)
                hits += 1
            except ProcessLookupError:
                pass
    assert process.returncode == 0
    return hits


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(place: Path):
    assert run_with_kills_of_everything(place, "killed", "pool", random.Random(0), 2) >= 1
    assert digests(place / "killed") == digests(place / "undisturbed")
    assert not (place / "killed.work").exists()


def test_a_killed_worker_neither_hangs_nor_fails_the_run(place: Path):
    assert run_with_kills_of_workers(place, "workers", "dask", random.Random(0), 1) == 1
    assert digests(place / "workers") == digests(place / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["pool", "dask"])
def test_twenty_kills_of_runs_and_twenty_of_workers(place: Path, engine: str):
    rng, hits, lives = random.Random(f"slow {engine}"), [0, 0], 0
    while min(hits) < 20:
        for index, kills in enumerate((run_with_kills_of_everything, run_with_kills_of_workers)):
            name = f"slow-{engine}-{lives}-{index}"
            hits[index] += kills(place, name, engine, rng, 2)
            assert digests(place / name) == digests(place / "undisturbed")
        lives += 1


def test_an_interrupted_run_says_so_and_its_workers_end(place: Path):
    flags = ["--output.folder", str(place / "interrupted"), "--engine.kind", "pool"]
    command = [sys.executable, "-m", "data_prep", "prepare", str(place / "run.toml"), *flags]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        while not list(place.glob("interrupted.work/units/*/*")):
            time.sleep(0.02)
        workers = [pid for pid in descendants(process.pid) if is_a_worker(pid)]
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate()[1]
    assert process.returncode == 130
    assert "error: interrupted; what is done is kept, and the same command goes on\n" in errors
    deadline_s = time.monotonic() + 20
    while any(is_a_worker(pid) for pid in workers) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not any(is_a_worker(pid) for pid in workers)

"""Fine-tuning runs: the recipes over the one loop, on real data and real processes."""

import ast
import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.config_file import ConfigError
from data_prep.manifest import read_manifest
from evaluation.model_folder import load_model, read_weights
from evaluation.score import shard_batches
from kernels.attention import boundaries_from_starts
from model.batch import Batch
from model.lora_config import LoraConfig
from resume import checkpoint
from resume.manifest import DataError, listed_files
from resume.samples import SampleReader
from tests.lives import Life
from tests.prepared import write_data
from tests.runs import opened
from tests.trained import resume
from tests.tuned import ROW, elsewhere, metrics, trained, tuning, write_base, write_chat_data
from train.config import with_values
from train.loop import Counts, accumulate_gradients
from train.objectives import next_token_loss
from train.patience import Patience
from train.preference import pair_log_probs
from train.recipes import DistillConfig, DpoConfig, GrpoConfig, RewardConfig, SftConfig
from train.references import read_references, reference_path, run_digest
from train.resolve import resolved


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning")
    for kind in ("chat", "pairs", "prompts"):
        write_chat_data(folder / kind, kind)
    write_base(folder / "base", write_data(folder / "text"))
    (folder / "reward.py").write_text(
        "def reward(prompt, text, row):\n    return text.count(row['wanted'][0]) / (1 + len(text))\n"
    )
    return folder


def rows(data: Path, vocab_size: int = 304) -> list[Batch]:
    """Every training row of a data folder, one to a batch."""
    manifest = read_manifest(data)
    files = listed_files({data: manifest}, "train")
    reader = SampleReader(files, sequence_length=ROW, vocab_size=vocab_size, eos_id=manifest.eos_id)
    batches = shard_batches(reader, num_sequences=10**9, batch_size=1)
    return [batch.to(torch.device("cpu")) for batch in batches]


def documents(batch: Batch) -> list[slice]:
    """Where the documents of the one row of a batch lie, without the context token."""
    numbers = batch.document_numbers[0]
    return [
        slice(int((numbers == n).nonzero()[0]), int((numbers == n).nonzero()[-1]) + 1)
        for n in range(1, int(numbers.max()) + 1)
    ]


def test_the_loss_of_packed_rows_is_that_of_their_conversations_alone(root: Path):
    model = load_model(root / "base", device="cpu", dtype=torch.float64).model
    num_documents = 0
    for batch in rows(root / "chat"):
        packed = next_token_loss(model, batch).loss_sum
        alone = torch.zeros((), dtype=torch.float64)
        for place in documents(batch):
            alone += next_token_loss(model, Batch(batch.tokens[:, place], batch.targets[:, place], None, 1)).loss_sum
            num_documents += 1
        torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    assert num_documents > 40


@pytest.mark.parametrize("recipe", [SftConfig, DpoConfig], ids=["sft", "dpo"])
def test_any_number_of_ranks_trains_the_same_bits(root: Path, tmp_path: Path, recipe):
    data = {"micro_batch_sequences": 1}
    folder = root / ("chat" if recipe is SftConfig else "pairs")
    config = tuning(recipe, root / "base", folder, tmp_path / "one", run={"num_steps": 3}, data=data)
    whole = trained(config)
    assert max(float((whole[n] - value).abs().max()) for n, value in read_weights(root / "base")[1].items()) > 1e-3
    for world_size in (2, 4):
        found = trained(elsewhere(config, tmp_path / str(world_size)), world_size)
        assert all(torch.equal(whole[name], value) for name, value in found.items()), world_size


@pytest.mark.parametrize("recipe", [SftConfig, DpoConfig, RewardConfig], ids=["sft", "dpo", "reward"])
def test_any_split_into_micro_batches_has_the_same_gradient(root: Path, tmp_path: Path, recipe):
    folder = root / ("chat" if recipe is SftConfig else "pairs")
    gradients = []
    for micro_batch in (4, 1, 3):
        config = tuning(
            recipe, root / "base", folder, tmp_path / str(micro_batch),
            data={"micro_batch_sequences": micro_batch}, parallel={"precision": "fp64"},
        )  # fmt: skip
        with opened(config) as (trainer, _):
            micro_batches = trainer.feed.next_step()
            accumulate_gradients(trainer, micro_batches, Counts.of(micro_batches), 1)
            gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            error = (other[name] - expected).norm() / expected.norm()
            assert error < 1e-12, name


@pytest.mark.parametrize(
    ("recipe", "kind", "sections"),
    [
        (SftConfig, "chat", {"lora": {"rank": 4, "dropout": 0.1}}),
        (DpoConfig, "pairs", {}),
        (RewardConfig, "pairs", {}),
        (GrpoConfig, "prompts", {"grpo": {"num_updates": 2, "clip": 0.2, "kl_weight": 0.1}}),
        (DistillConfig, "chat", {"distill": {"weight_schedule": "linear"}}),
    ],
    ids=["sft with lora", "dpo", "reward", "grpo", "distill"],
)
def test_a_run_killed_with_sigkill_goes_on_to_the_same_bits(root: Path, tmp_path: Path, recipe, kind, sections):
    small = {"num_samples": 2, "max_new_tokens": 8, "reward": f"{root}/reward.py:reward"}
    if recipe is GrpoConfig:
        sections = {"grpo": {**small, **sections["grpo"]}}
    if recipe is DistillConfig:
        sections = {"distill": {"teacher": str(root / "base"), **sections["distill"]}}
    run = {"num_steps": 8, "save_every": 2}
    config = tuning(recipe, root / "base", root / kind, tmp_path / "whole", run=run, **sections)
    whole = trained(config)
    killed = elsewhere(config, tmp_path / "killed")
    with Life(killed) as life:
        life.until(lambda: checkpoint.latest(tmp_path / "killed") is not None)
        life.signal(signal.SIGKILL)
        life.end()
    found = trained(resolved(killed))
    assert sorted(found) == sorted(whole)
    assert all(torch.equal(whole[name], value) for name, value in found.items())


def test_a_run_with_adapters_saves_them_alone_and_is_read_as_a_plain_model(root: Path, tmp_path: Path):
    config = tuning(SftConfig, root / "base", root / "chat", tmp_path / "run", lora={"rank": 4})
    saved = trained(config, 2)
    assert saved
    assert all(".lora." in name for name in saved)
    shape, state = read_weights(tmp_path / "run")
    base = read_weights(root / "base")[1]
    assert shape == read_weights(root / "base")[0]
    changed = {name for name, value in state.items() if not torch.equal(value, base[name])}
    assert {name.rpartition(".")[0].partition(".")[2].partition(".")[2] for name in changed} == {
        "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down",
    }  # fmt: skip


def test_references_are_those_of_the_model_that_the_run_starts_from(root: Path, tmp_path: Path):
    data = write_chat_data(tmp_path / "pairs", "pairs")
    config = tuning(DpoConfig, root / "base", data, tmp_path / "run", run={"num_steps": 2})
    trained(config, 2)
    digest = run_digest(tmp_path / "run")
    model = load_model(root / "base", device="cpu").model
    manifest = read_manifest(data)
    for split in ("train", "validation"):
        files = listed_files({data: manifest}, split)
        tables = [read_references(file.path, digest) for file in files]
        reader = SampleReader(files, sequence_length=ROW, vocab_size=304, eos_id=manifest.eos_id)
        batches = list(shard_batches(reader, num_sequences=10**9, batch_size=1))
        assert sum(len(table) for table in tables) == len(batches)
        for batch, expected in zip(batches, np.concatenate(tables), strict=True):
            found = pair_log_probs(model, batch.to(torch.device("cpu")))[0]
            torch.testing.assert_close(found, torch.from_numpy(expected[: len(found)].copy()), rtol=1e-5, atol=1e-4)
    written = reference_path(files[0].path, digest)
    before = written.stat().st_mtime_ns
    trained(with_values(config, run={"num_steps": 3}))
    assert written.stat().st_mtime_ns == before, "they are computed once"
    content = bytearray(written.read_bytes())
    content[-1] ^= 1
    written.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_references(files[0].path, digest)
    with pytest.raises(DataError, match="cannot read the reference model"):
        read_references(files[0].path, "00" * 16)


def test_preference_training_parts_the_answers_and_reward_training_tells_them_apart(root: Path, tmp_path: Path):
    for recipe in (DpoConfig, RewardConfig):
        config = tuning(recipe, root / "base", root / "pairs", tmp_path / recipe.__name__, run={"num_steps": 20})
        trained(config)
        steps = [record["means"] for record in metrics(config) if "means" in record]
        assert steps[0]["rewards/margin"] < 0.1
        assert steps[-1]["rewards/margin"] > 0.5
        held_out = [record for record in metrics(config) if "validation_rewards/accuracy" in record]
        assert held_out[-1]["validation_rewards/margin"] > 0.5
        assert held_out[-1]["validation_loss"] < held_out[0]["validation_loss"]


def test_answers_get_better_by_their_rewards(root: Path, tmp_path: Path):
    config = tuning(
        GrpoConfig, root / "base", root / "prompts", tmp_path / "run",
        run={"num_steps": 12}, data={"batch_sequences": 8, "micro_batch_sequences": 8}, optim={"peak_lr": 2e-2},
        grpo={"num_samples": 6, "max_new_tokens": 6, "reward": f"{root}/reward.py:reward"},
    )  # fmt: skip
    trained(config)
    rewards = [record["means"]["answers/reward"] for record in metrics(config) if "means" in record]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])


def test_rollouts_are_the_same_on_two_ranks(root: Path, tmp_path: Path):
    sections = {"grpo": {"num_samples": 3, "max_new_tokens": 5, "reward": f"{root}/reward.py:reward", "loss": "grpo"}}
    config = tuning(GrpoConfig, root / "base", root / "prompts", tmp_path / "one", run={"num_steps": 1}, **sections)
    one, two = trained(config), trained(elsewhere(config, tmp_path / "two"), 2)
    # The loss is summed in another order than the gradients: its fp32 products are of other rows.
    assert max(float((one[name] - value).abs().max()) for name, value in two.items()) < 1e-5


def test_a_run_without_a_lower_held_out_loss_ends_and_keeps_its_best_checkpoint(root: Path, tmp_path: Path):
    config = tuning(
        SftConfig, root / "base", root / "chat", tmp_path / "run",
        run={"num_steps": 200, "save_every": 1000, "validate_every": 2, "patience": 2, "keep_checkpoints": 1},
        optim={"peak_lr": 0.3, "schedule": "constant"},
    )  # fmt: skip
    trained(config)
    losses = {r["step"]: r["validation_loss"] for r in metrics(config) if "validation_loss" in r}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 4 < 200
    assert checkpoint.steps(tmp_path / "run") == sorted({best, last} - {0})
    assert trained(config), "a run that is over stays as it is"
    assert max(r["step"] for r in metrics(config) if "validation_loss" in r) == last


def test_num_epochs_gives_the_number_of_steps(root: Path, tmp_path: Path):
    num_rows = len(rows(root / "chat"))
    config = tuning(SftConfig, root / "base", root / "chat", tmp_path, run={"num_epochs": 2.0})
    assert config.run.num_steps == round(2 * num_rows / 4)


def test_conversations_and_text_mix(root: Path, tmp_path: Path):
    data = {"paths": (str(root / "chat"), str(root / "text")), "mixture": ("chat=0.5 test=0.5",)}
    config = tuning(SftConfig, root / "base", root / "chat", tmp_path / "run", data=data, run={"num_steps": 2})
    trained(config)
    assert config.data.sequence_length == ROW
    assert json.loads((tmp_path / "run" / "chat.json").read_text())["kind"] == "chat"


def test_the_rows_of_a_run_on_plain_text_see_only_their_own_conversation():
    starts = torch.tensor([[True, True, False, True]])
    assert boundaries_from_starts(starts).cumulative_lengths.tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("recipe", "kind", "sections", "message"),
    [
        (SftConfig, "pairs", {}, "holds pairs, this training reads chat or text"),
        (DpoConfig, "chat", {}, "prepare-chat --kind pairs"),
        (SftConfig, "chat", {"run": {"init_from": None}}, "run.init_from is missing"),
        (SftConfig, "chat", {"lora": {"rank": 4, "targets": ("no_proj",)}}, "no_proj"),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_said_before_anything_is_read(
    root: Path, tmp_path: Path, recipe, kind, sections, message
):
    with pytest.raises((ConfigError, ValueError), match=message):
        tuning(recipe, root / "base", root / kind, tmp_path / "run", **sections)


def test_lora_is_part_of_what_a_run_is(root: Path, tmp_path: Path):
    config = tuning(SftConfig, root / "base", root / "chat", tmp_path / "run", lora={"rank": 2}, run={"num_steps": 1})
    trained(config)
    other = dataclasses.replace(config, lora=LoraConfig(rank=3), run=dataclasses.replace(config.run, num_steps=2))
    life = Life(other)
    assert life.end() == [78]
    assert "lora.rank = 3, the checkpoint has 2" in life.err()


def test_a_run_that_never_saved_may_start_anew_from_another_model(root: Path, tmp_path: Path):
    data = write_chat_data(tmp_path / "pairs", "pairs")
    config = tuning(DpoConfig, root / "base", data, tmp_path / "run", run={"num_steps": 1})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "reference.json").write_text(json.dumps({"digest": "00" * 16}))  # of a life that was killed
    trained(config)
    steps = [record["means"] for record in metrics(config) if "means" in record]
    assert steps[0]["rewards/margin"] == 0


def test_shards_of_other_rows_are_not_taken_up_and_removed_ones_are_not_missed(root: Path, tmp_path: Path):
    data = write_chat_data(tmp_path / "pairs", "pairs")
    config = tuning(DpoConfig, root / "base", data, tmp_path / "run", run={"num_steps": 2})
    trained(config)
    more = write_chat_data(tmp_path / "more", "pairs", seed=1)
    for folder in (root / "chat", more):
        assert resume("append", tmp_path / "run", folder)[0] == 0
    life = Life(with_values(config, run={"num_steps": 3}))
    assert life.end() == [0]
    assert "request 1 REFUSED" in life.out()
    assert "holds chat in rows of 64 tokens" in life.out()
    # Its references are not there yet: once the folder is one of data.paths, they are computed at the start.
    assert "request 2 REFUSED" in life.out()
    assert resume("append", tmp_path / "run", more)[0] == 0
    both = with_values(config, run={"num_steps": 4}, data={"paths": (str(data), str(more))})
    life = Life(both)
    assert life.end() == [0]
    assert "request 3 taken up" in life.out()
    first = listed_files({data: read_manifest(data)}, "train")[0]
    assert resume("remove", tmp_path / "run", first.file_id)[0] == 0
    first.path.unlink()
    last = with_values(both, run={"num_steps": 5}, data={"paths": (str(more),)})
    assert Life(last).end() == [0]


def test_a_shard_without_its_marks_is_no_plain_text(root: Path, tmp_path: Path):
    data = write_chat_data(tmp_path / "chat")
    next(data.glob("train/*.marks")).unlink()
    life = Life(tuning(SftConfig, root / "base", data, tmp_path / "run"))
    assert life.end() == [65]
    assert "without it prompts would be trained" in life.err()


def test_a_reward_that_fails_on_one_rank_ends_all_of_them_with_its_message(root: Path, tmp_path: Path):
    (tmp_path / "reward.py").write_text(
        "import os\ndef reward(prompt, text, row):\n    return 1 / (os.environ['RANK'] == '0')\n"
    )
    config = tuning(
        GrpoConfig, root / "base", root / "prompts", tmp_path / "run",
        grpo={"num_samples": 2, "max_new_tokens": 3, "reward": f"{tmp_path}/reward.py:reward"},
    )  # fmt: skip
    life = Life(config, 2)
    assert life.end() == [78, 78]
    assert "ZeroDivisionError" in life.err(0) + life.err(1)


def test_prompts_draw_apart_and_lines_keep_their_records(root: Path, tmp_path: Path):
    records = [{"prompt": "print", "wanted": f"f\u2028{number}"} for number in range(8)]
    for number, record in enumerate(records):
        record["id"] = str(number)
        record["prompt"] += f" {number % 2}"
    data = write_chat_data(tmp_path / "prompts", "prompts", told=records)
    (tmp_path / "reward.py").write_text(
        "from pathlib import Path\ndef reward(prompt, text, row):\n"
        f"    with open({str(tmp_path / 'said')!r}, 'a') as file: file.write(repr([prompt, text, row]) + '\\n')\n"
        "    return 0.0\n"
    )
    config = tuning(
        GrpoConfig, root / "base", data, tmp_path / "run", run={"num_steps": 1},
        grpo={"num_samples": 2, "max_new_tokens": 6, "reward": f"{tmp_path}/reward.py:reward"},
    )  # fmt: skip
    trained(config)
    said = [ast.literal_eval(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert len(said) == 8
    assert all(record["prompt"] in prompt for prompt, _, record in said)
    assert len({text for _, text, _ in said}) == 8, "answers to different prompts draw different numbers"


def test_a_reward_model_is_no_language_model_to_start_from(root: Path, tmp_path: Path):
    config = tuning(RewardConfig, root / "base", root / "pairs", tmp_path / "reward", run={"num_steps": 1})
    trained(config)
    with pytest.raises(ConfigError, match="a reward model predicts no tokens"):
        tuning(SftConfig, tmp_path / "reward", root / "chat", tmp_path / "run")
    assert tuning(RewardConfig, tmp_path / "reward", root / "pairs", tmp_path / "again").model.head == "score"


def test_a_loss_that_is_not_finite_is_not_the_best():
    patience = Patience(2)
    assert not patience.judge(2, float("nan"))
    assert patience.judge(4, 3.0)
    assert patience.best_steps == {4}

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor

from data_prep.chat.prepare_chat import prepare_chat
from data_prep.config_file import ConfigError
from data_prep.manifest import read_manifest
from data_prep.teacher_file import HEADER_BYTES, TeacherFileError, read_teacher_header, teacher_path, write_teacher_file
from evaluation.score import Annotate, shard_batches
from kernels.attention import document_boundaries
from kernels.cross_entropy import IGNORE
from model.balance import RoutingLog
from model.batch import Batch
from model.transformer import Transformer
from resume.manifest import DataFile
from resume.samples import NO_SAMPLE, SampleReader
from resume.verify import open_split
from tests.evaluation.stored import byte_level_tokenizer, make_run
from tests.models import LLAMA, MOE_VARIANTS, make_model, random_tokens
from tests.prepared import tokenizer, write_data
from tests.processes import run_ranks
from train import ranks, teacher_cache
from train.config import ParallelSection
from train.distillation import (
    LayerPair,
    distillation_at,
    distillation_loss,
    divergence_weight,
    hidden_distance_sum,
    layer_pairs,
    load_teacher,
)
from train.objectives import next_token_loss
from train.recipes import DistillConfig, DistillSection
from train.sharding import build_model
from train.teacher_targets import cached_teacher, write_teacher_cache

CPU = torch.device("cpu")
TEACHER = dataclasses.replace(LLAMA, hidden_size=48, num_layers=3, num_heads=6, logit_softcap=5.0)
PAIRS = (LayerPair(0, 0), LayerPair(1, 2))
HIDDEN: dict[str, Any] = {"layers": PAIRS, "hidden_weight": 0.7}


def make_teacher(config=TEACHER, dtype: torch.dtype = torch.float64) -> Transformer:
    return make_model(config, seed=7, dtype=dtype).eval().requires_grad_(False)


def make_batch(num_rows: int = 3, length: int = 12, vocab_size: int = 131) -> Batch:
    """Rows of which some targets do not count, and of two documents each."""
    tokens = random_tokens(LLAMA, num_rows, length + 1) % vocab_size
    tokens[:, length // 2] = 0
    targets = tokens[:, 1:].clone()
    targets[:, ::3] = IGNORE
    num_targets = int((targets != IGNORE).sum())
    return Batch(tokens[:, :-1], targets, document_boundaries(tokens[:, :-1], 0), num_targets)


def gradients(model: Transformer, batch: Batch, **options) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    outcome = distillation_loss(model, batch, **options)
    outcome.loss_sum.backward()
    return outcome.loss_sum.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def streams(model: Transformer, batch: Batch) -> list[Tensor]:
    """The residual stream after each block: what a model of so many layers would norm."""
    found: list[Tensor] = []
    for num_layers in range(1, len(model.blocks) + 1):
        shorter = make_model(dataclasses.replace(model.config, num_layers=num_layers), dtype=torch.float64)
        shorter.load_state_dict({name: model.state_dict()[name] for name in shorter.state_dict()})
        shorter.norm.add = lambda addend, stream: (stream + addend, stream)
        found.append(shorter(batch.tokens, batch.boundaries, readout=lambda hidden, _: hidden))
    return found


@pytest.mark.parametrize("hidden_kind", ["mse", "cosine"])
def test_the_loss_is_the_weighted_sum_of_its_terms_over_targets(hidden_kind):
    model, teacher, batch = make_model(LLAMA, dtype=torch.float64), make_teacher(TEACHER), make_batch()
    narrow = dataclasses.replace(TEACHER, hidden_size=LLAMA.hidden_size)  # so that nothing need be projected
    teacher = make_teacher(narrow)
    counted = batch.targets != IGNORE
    logits, theirs = (m(batch.tokens, batch.boundaries)[counted] for m in (model, teacher))
    divergence = 4 * F.kl_div(
        (logits / 2).log_softmax(-1), (theirs / 2).log_softmax(-1), reduction="sum", log_target=True
    )
    cross_entropy = F.cross_entropy(logits, batch.targets[counted], reduction="sum")
    ours_0, ours_1 = streams(model, batch)
    theirs_0, _, theirs_2 = streams(teacher, batch)
    hidden = torch.zeros(())
    for a, b in ((ours_0, theirs_0), (ours_1, theirs_2)):
        a, b = a[counted], b[counted]
        distance = (a - b).square().mean(-1) if hidden_kind == "mse" else 1 - F.cosine_similarity(a, b, dim=-1)
        hidden = hidden + distance.sum() / 2
    options = {"teacher": teacher, "temperature": 2.0, "num_tokens": 131, "hidden_kind": hidden_kind, **HIDDEN}
    outcome = distillation_loss(model, batch, weight=0.3, **options)
    torch.testing.assert_close(outcome.loss_sum, 0.3 * divergence + 0.7 * cross_entropy + 0.7 * hidden)
    expected = {"divergence": divergence, "cross_entropy": cross_entropy, "hidden": hidden}
    assert outcome.sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(outcome.sums[name], value.detach(), msg=name)
        assert not outcome.sums[name].requires_grad


def test_without_a_weight_it_is_the_loss_of_pretraining_to_the_last_bit():
    model, batch = make_model(LLAMA), make_batch()
    loss, found = gradients(model, batch, teacher=make_teacher(dtype=torch.float32), weight=0.0, num_tokens=131)
    model.zero_grad()
    expected = next_token_loss(model, batch).loss_sum
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert all(torch.equal(found[name], p.grad) for name, p in model.named_parameters())
    options: dict[str, Any] = {"z_loss": 0.1, "soft_cap": 3.0, "label_smoothing": 0.2}
    loss, _ = gradients(model, batch, teacher=make_teacher(dtype=torch.float32), weight=0.0, num_tokens=131, **options)
    assert torch.equal(loss, next_token_loss(model, batch, **options).loss_sum.detach())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    model, batch = make_model(LLAMA, dtype=torch.float64), make_batch()
    teacher = make_model(LLAMA, dtype=torch.float64).requires_grad_(False)
    for kind in ("forward", "reverse", "jensen_shannon"):
        layers = (LayerPair(0, 0), LayerPair(1, 1))
        loss, found = gradients(
            model, batch, teacher=teacher, kind=kind, temperature=3.0, weight=1.0, num_tokens=131, layers=layers
        )
        assert abs(loss.item()) < 1e-12
        assert all(gradient.abs().max() < 1e-12 for gradient in found.values())


def test_steps_along_the_gradient_bring_the_student_to_its_teacher():
    model, teacher, batch = make_model(LLAMA), make_teacher(dtype=torch.float32), make_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    means = []
    for _ in range(25):
        optimizer.zero_grad()
        outcome = distillation_loss(model, batch, teacher=teacher, weight=1.0, num_tokens=131, **HIDDEN)
        (outcome.loss_sum / batch.num_targets).backward()
        optimizer.step()
        means.append({name: value.item() / batch.num_targets for name, value in outcome.sums.items()})
    assert means[-1]["divergence"] < 0.8 * means[0]["divergence"]
    assert means[-1]["hidden"] < 0.9 * means[0]["hidden"]


def test_micro_batches_add_up_to_the_whole_batch():
    model, teacher, batch = make_model(LLAMA, dtype=torch.float64), make_teacher(), make_batch(4)
    options = {"teacher": teacher, "weight": 0.6, "num_tokens": 131, "kind": "jensen_shannon", **HIDDEN}
    expected_loss, expected = gradients(model, batch, **options)
    parts = [
        gradients(model, Batch(tokens, targets, document_boundaries(tokens, 0), 1), **options)
        for tokens, targets in zip(batch.tokens.split(1), batch.targets.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), expected_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(sum(part[name] for _, part in parts), gradient, rtol=1e-9, atol=1e-11)


def sharded_gradients(rank: int, world_size: int, batch: Batch) -> dict[str, Tensor]:
    """Of one rank's rows, by FSDP, on all ranks."""
    this = ranks.start("cpu")
    try:
        whole = make_model(LLAMA, dtype=torch.float64).state_dict()
        parallel = ParallelSection(device="cpu", precision="fp64", recompute="blocks")
        model = build_model(LLAMA, parallel, this, lambda name, _: whole[name])
        tokens, targets = (part.chunk(world_size)[rank] for part in (batch.tokens, batch.targets))
        mine = Batch(tokens, targets, document_boundaries(tokens, 0), 1)
        options = {"teacher": make_teacher(), "weight": 0.6, "num_tokens": 131, **HIDDEN}
        distillation_loss(model, mine, **options).loss_sum.backward()
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    finally:
        ranks.stop()


def test_two_ranks_with_sharded_students_have_the_gradients_of_one(tmp_path: Path):
    batch = make_batch(4)
    options = {"teacher": make_teacher(), "weight": 0.6, "num_tokens": 131, **HIDDEN}
    _, expected = gradients(make_model(LLAMA, dtype=torch.float64), batch, **options)
    for found in run_ranks(lambda rank: sharded_gradients(rank, 2, batch), 2, tmp_path, timeout_s=60):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11, msg=name)


def test_embeddings_beyond_the_vocabulary_are_in_no_distribution():
    batch = make_batch(vocab_size=120)
    student, teacher = (make_model(dataclasses.replace(LLAMA, vocab_size=size), seed=size) for size in (131, 140))
    teacher.requires_grad_(False)
    options = {"teacher": teacher, "weight": 1.0, "num_tokens": 120}
    found = distillation_loss(student, batch, **options).sums["divergence"]
    logits, theirs = (m(batch.tokens, batch.boundaries)[batch.targets != IGNORE][:, :120] for m in (student, teacher))
    expected = F.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    _, found = gradients(student, batch, **options)
    assert found["head.weight"].shape == (131, 32)
    assert not found["head.weight"][120:].any()


def test_a_student_with_experts_fills_its_routing_log_and_hides_no_layer():
    model = make_model(MOE_VARIANTS["mixtral"])
    teacher, batch = make_teacher(MOE_VARIANTS["qwen3-moe"], torch.float32), make_batch()
    log = RoutingLog(batch.targets != IGNORE)
    outcome = distillation_loss(
        model, batch, log, teacher=teacher, weight=0.5, num_tokens=131, layers=(LayerPair(1, 0), LayerPair(0, 1))
    )
    assert len(log.layers) == 2
    assert outcome.sums["hidden"] > 0


def test_held_out_batches_are_measured_without_gradients_or_hooks_left_behind():
    model, batch = make_model(LLAMA, dtype=torch.float64), make_batch()
    options = {"teacher": make_teacher(), "weight": 0.5, "num_tokens": 131, **HIDDEN}
    with torch.no_grad():
        outcome = distillation_loss(model, batch, **options)
    assert not outcome.loss_sum.requires_grad
    torch.testing.assert_close(outcome.loss_sum, distillation_loss(model, batch, **options).loss_sum.detach())
    assert not any(block._forward_hooks for block in (*model.blocks, *options["teacher"].blocks))


@given(seed=st.integers(0, 1000), wide=st.sampled_from([48, 64]))
def test_projected_states_keep_their_mean_square_and_angles_on_average(seed, wide):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 1, 500, wide, generator=generator)
    targets = torch.zeros(1, 500, dtype=torch.int64)
    whole = hidden_distance_sum(torch.zeros_like(student), teacher, targets, "mse").item()
    narrow = hidden_distance_sum(torch.zeros(1, 500, 24), teacher, targets, "mse").item()
    assert narrow == pytest.approx(whole, rel=0.06)
    # Whichever is the wider one, the same comparison.
    ours, theirs = student[..., :24], teacher
    for kind in ("mse", "cosine"):
        torch.testing.assert_close(
            hidden_distance_sum(ours, theirs, targets, kind), hidden_distance_sum(theirs, ours, targets, kind)
        )


@pytest.mark.parametrize("text", ["0", "0:0:0", "a:1", "2:0", "0:3", "-1:0", ""])
def test_a_pair_of_layers_that_are_not_there_is_refused(text):
    with pytest.raises(ConfigError, match="expected STUDENT:TEACHER, layers 0 to 1 of the student and 0 to 2"):
        layer_pairs([text], 2, 3)
    assert layer_pairs(["0:0", "1:2"], 2, 3) == PAIRS


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.8, 0.8, 0.8, 0.8]), ("linear", [0.8, 0.65, 0.2, 0.2]), ("cosine", [0.8, 0.7121, 0.2, 0.2])],
)
def test_the_weight_is_a_function_of_the_step_alone(schedule, expected):
    config = DistillSection(weight=0.8, weight_end=0.2, weight_schedule=schedule)
    found = [divergence_weight(config, step, 101) for step in (0, 25, 100, 300)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert divergence_weight(config, 0, 1) == 0.8


def test_the_objective_of_each_step_has_its_weight_and_the_configs_options():
    config = DistillConfig(
        model=dataclasses.replace(LLAMA, logit_softcap=3.0, context_length=2048),
        distill=DistillSection(
            kind="reverse", temperature=2.0, weight_schedule="linear", layers=("0:0", "1:2"), hidden_weight=0.7
        ),
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, num_steps=3, num_epochs=None))
    model, teacher, batch = make_model(config.model, dtype=torch.float64), make_teacher(), make_batch()
    objective_at = distillation_at(config, teacher, num_tokens=131)
    for step, weight in enumerate((0.5, 0.25, 0.0)):
        found = objective_at(step)(model, batch, None).loss_sum
        expected = distillation_loss(
            model, batch, teacher=teacher, kind="reverse", temperature=2.0, weight=weight, num_tokens=131,
            soft_cap=3.0, **HIDDEN,
        )  # fmt: skip
        assert torch.equal(found, expected.loss_sum)
    with pytest.raises(ConfigError, match="hidden states are not cached; leave distill.layers or distill.cached out"):
        distillation_at(config, None, num_tokens=131)


def test_a_teacher_is_loaded_frozen_and_one_of_another_vocabulary_is_refused(tmp_path: Path):
    made = byte_level_tokenizer()
    make_run(tmp_path / "run", made)
    teacher = load_teacher(tmp_path / "run", made, device="cpu", dtype=torch.float64)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float64}
    with pytest.raises(ConfigError, match=r"another vocabulary \(\d+ tokens\) than the data \(\d+\). Prepare the data"):
        load_teacher(tmp_path / "run", tokenizer(), device="cpu")


# --- A teacher that is read from beside the shards.


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    make_run(run, tokenizer(), logit_softcap=4.0)
    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def training_files(data: Path) -> list[DataFile]:
    return open_split({data: read_manifest(data)}, "train")


def annotated(data: Path, annotate: Annotate | None, isolate_documents: bool = True) -> list[Batch]:
    """All samples of the training shards, in batches of five rows."""
    reader = SampleReader(training_files(data), sequence_length=32, vocab_size=300, eos_id=tokenizer().eos_id)
    rows = shard_batches(
        reader, num_sequences=10**6, batch_size=5, isolate_documents=isolate_documents, annotate=annotate
    )
    return [batch.to(CPU) for batch in rows]


def annotation(data: Path, **changes) -> Annotate:
    options = {"sequence_length": 32, "isolate_documents": True, "temperature": 2.0} | changes
    return cached_teacher(training_files(data), **options)


NUM_TOKENS = tokenizer().vocab_size
CACHE: dict[str, Any] = {"num_kept": NUM_TOKENS - 1, "temperature": 2.0, "isolate_documents": True, "device": "cpu"}


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_a_cached_teacher_teaches_what_the_teacher_itself_does(kind, data: Path, teacher_run: Path):
    num_files = len(training_files(data))
    assert num_files > 2
    assert write_teacher_cache(teacher_run, data, batch_size=7, **CACHE) == (num_files, num_files)
    teacher = load_teacher(teacher_run, tokenizer(), device="cpu")
    student = make_model(dataclasses.replace(LLAMA, vocab_size=300))
    options = {"kind": kind, "temperature": 2.0, "weight": 1.0, "num_tokens": NUM_TOKENS}
    batches = annotated(data, annotation(data))
    assert sum(batch.num_targets for batch in batches) == sum(file.num_targets for file in training_files(data))
    for batch in (batches[0], batches[3], batches[-1]):
        expected_loss, expected = gradients(student, batch, teacher=teacher, **options)
        loss, found = gradients(student, batch, teacher=None, **options)
        # All that is lost is the rounding to float16.
        torch.testing.assert_close(loss, expected_loss, rtol=2e-3, atol=0)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() < 5e-3 * gradient.norm(), name


def test_few_tokens_kept_cost_less_and_say_less(data: Path, teacher_run: Path):
    student = make_model(dataclasses.replace(LLAMA, vocab_size=300))
    options = {"temperature": 2.0, "weight": 1.0, "num_tokens": NUM_TOKENS, "teacher": None}
    sums, sizes = [], []
    for num_kept in (4, 40, NUM_TOKENS - 1):
        write_teacher_cache(teacher_run, data, **CACHE | {"num_kept": num_kept})
        sums.append(distillation_loss(student, annotated(data, annotation(data))[0], **options).loss_sum.item())
        sizes.append(teacher_path(training_files(data)[0].path).stat().st_size)
    assert sums == sorted(sums)
    samples = training_files(data)[0].num_samples(32)
    assert sizes == [HEADER_BYTES + samples * (32 * (4 * k + 2) + 8) for k in (4, 40, NUM_TOKENS - 1)]


def test_writing_goes_on_where_it_was_interrupted_and_begins_anew_for_another_teacher(
    data: Path, teacher_run: Path, tmp_path: Path, monkeypatch
):
    first, second, *others = training_files(data)
    written: list[Path] = []

    def killed_at_the_second(shard: Path, header, samples) -> Path:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(shard)
        return write_teacher_file(shard, header, samples)

    monkeypatch.setattr("train.teacher_targets.write_teacher_file", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write_teacher_cache(teacher_run, data, **CACHE)
    monkeypatch.undo()
    assert not teacher_path(second.path).exists()
    with pytest.raises(TeacherFileError, match="does not exist; write it with: python -m train.teacher_cache"):
        annotation(data)
    done = teacher_path(first.path).stat().st_mtime_ns
    num_files = 2 + len(others)
    assert write_teacher_cache(teacher_run, data, **CACHE) == (num_files, num_files - 1)
    assert teacher_path(first.path).stat().st_mtime_ns == done
    assert write_teacher_cache(teacher_run, data, **CACHE) == (num_files, 0)
    before = read_teacher_header(first.path)
    make_run(tmp_path / "other", tokenizer(), logit_softcap=2.0, qkv_bias=True)
    assert write_teacher_cache(tmp_path / "other", data, **CACHE) == (num_files, num_files)
    assert read_teacher_header(first.path) != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 1.0}, "temperature is 2.0, this run wants 1.0"),
        ({"sequence_length": 16}, "sequence_length is 32, this run wants 16"),
        ({"isolate_documents": False}, "is_isolated is True, this run wants False"),
    ],
    ids=str,
)
def test_files_written_for_another_run_are_refused(changes, message, data: Path, teacher_run: Path):
    write_teacher_cache(teacher_run, data, **CACHE | {"num_kept": 3})
    with pytest.raises(TeacherFileError, match=message):
        annotation(data, **changes)


def test_a_shard_that_was_taken_out_of_the_data_needs_no_file(data: Path, teacher_run: Path):
    write_teacher_cache(teacher_run, data, **CACHE | {"num_kept": 3})
    files = training_files(data)
    for path in (files[0].path, teacher_path(files[0].path)):
        path.unlink()
    annotate = cached_teacher(files, sequence_length=32, isolate_documents=True, temperature=2.0)
    reader = SampleReader(files[1:], sequence_length=32, vocab_size=300, eos_id=tokenizer().eos_id)
    rows = next(shard_batches(reader, num_sequences=2, batch_size=2))
    said = annotate(rows, np.array([0, 1]), np.array([NO_SAMPLE, 0])).extra["teacher_log_probs"]
    assert not said[0].any()
    assert said[1].any()


def test_damage_is_found_where_it_is_read(data: Path, teacher_run: Path):
    write_teacher_cache(teacher_run, data, **CACHE | {"num_kept": 3})
    path = teacher_path(training_files(data)[1].path)
    good = path.read_bytes()
    for place in (HEADER_BYTES + 5, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(TeacherFileError, match=r"sample \d+ differs from its checksum; delete the file"):
            annotated(data, annotation(data))
    for content, message in (
        (good[:-1], "bytes are not .* records"),
        (b"BESSEMER" + good[8:], "not a teacher's file of version 1"),
        (good[:20], "unreadable header"),
        (teacher_path(training_files(data)[0].path).read_bytes(), "made for another shard"),
    ):
        path.write_bytes(content)
        with pytest.raises(TeacherFileError, match=message):
            annotation(data)


def test_rows_that_are_empty_have_a_place_and_teach_nothing(data: Path, teacher_run: Path):
    write_teacher_cache(teacher_run, data, **CACHE | {"num_kept": 3})
    batch = annotated(data, None)[0]
    rows = shard_batches(
        SampleReader(training_files(data), sequence_length=32, vocab_size=300, eos_id=tokenizer().eos_id),
        num_sequences=2,
        batch_size=2,
        annotate=lambda rows, files, _: annotation(data)(rows, files, np.full(2, NO_SAMPLE)),
    )
    empty = next(iter(rows)).to(CPU)
    assert empty.extra["teacher_ids"].shape == (2, 32, 3)
    empty = dataclasses.replace(empty, targets=torch.full_like(empty.targets, IGNORE))
    student = make_model(dataclasses.replace(LLAMA, vocab_size=300))
    loss, found = gradients(student, empty, teacher=None, temperature=2.0, weight=1.0, num_tokens=NUM_TOKENS)
    assert loss == 0
    assert not any(gradient.any() for gradient in found.values())
    assert batch.extra == {}


def test_the_command_writes_and_says_what_is_wrong_in_one_line(data: Path, teacher_run: Path, tmp_path: Path, capsys):
    assert teacher_cache.main([str(teacher_run), str(data), "--k", "5", "--device", "cpu"]) == 0
    num_files = len(training_files(data))
    assert f"{num_files} shards, {num_files} written now, 0 before" in capsys.readouterr().out
    header = read_teacher_header(training_files(data)[0].path)
    assert header is not None
    assert (header.num_kept, header.temperature, header.sequence_length, header.is_isolated) == (5, 1.0, 32, False)
    make_run(tmp_path / "other", byte_level_tokenizer())
    for arguments, message in (
        ([teacher_run, data, "--k", "0"], "--k 0: must be positive"),
        ([teacher_run, data, "--k", "300"], f"must be below the {NUM_TOKENS} tokens"),
        ([teacher_run, data, "--temperature", "-1"], "--temperature -1.0: must be positive"),
        ([tmp_path / "nowhere", data], "does not exist"),
        ([teacher_run, tmp_path / "nowhere"], "no such data folder"),
        ([tmp_path / "other", data], "another vocabulary"),
    ):
        assert teacher_cache.main([*map(str, arguments), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_a_teacher_reads_rows_of_conversations_as_the_student_does(tmp_path: Path, teacher_run: Path):
    lines = [
        {"messages": [{"role": "user", "content": f"f{i}"}, {"role": "assistant", "content": "return x" * (i % 3 + 1)}]}
        for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = tmp_path / "chat"
    prepare_chat((str(tmp_path / "chat.jsonl"),), output=data, tokenizer=teacher_run, row_tokens=64)
    with pytest.raises(ConfigError, match="the rows of .* have 64 tokens; leave it out"):
        write_teacher_cache(teacher_run, data, **CACHE, sequence_length=32)
    write_teacher_cache(teacher_run, data, **CACHE | {"isolate_documents": False})
    files = training_files(data)
    header = read_teacher_header(files[0].path)
    assert header is not None
    assert (header.sequence_length, header.is_isolated) == (64, True)
    annotate = cached_teacher(files, sequence_length=64, isolate_documents=False, temperature=2.0)
    reader = SampleReader(files, sequence_length=64, vocab_size=300, eos_id=tokenizer().eos_id)
    batch = next(shard_batches(reader, num_sequences=4, batch_size=4, annotate=annotate)).to(CPU)
    assert 0 < batch.num_targets < batch.targets.numel()
    student = make_model(dataclasses.replace(LLAMA, vocab_size=300))
    options = {"temperature": 2.0, "weight": 1.0, "num_tokens": NUM_TOKENS}
    teacher = load_teacher(teacher_run, tokenizer(), device="cpu")
    expected = distillation_loss(student, batch, teacher=teacher, **options).loss_sum
    torch.testing.assert_close(
        distillation_loss(student, batch, teacher=None, **options).loss_sum, expected, rtol=2e-3, atol=0
    )

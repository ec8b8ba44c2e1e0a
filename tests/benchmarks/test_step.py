import dataclasses
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import ceilings, step, step_report
from benchmarks.ceilings import Ceilings
from benchmarks.ours_step import KERNELS_OFF, Ours, OursRunner
from benchmarks.peers_step import PeerRunner
from benchmarks.step_data import PeerBatches, write_corpus
from benchmarks.step_report import Setting
from benchmarks.step_rounds import AbsentError, Block, Row, Schedule, furthest_apart, judge, measure, speed_ratio
from benchmarks.step_state import DeviceMemory, InitialValues
from benchmarks.timing import Budget
from kernels import launch
from model.config import ModelConfig
from model.flops import flops_per_token
from tests.runs import TINY
from train import ranks
from train.config import DataSection, KernelSection, OptimSection, RunConfig, with_values

SCHEDULE = Schedule(warm_up_steps=3, settle_steps=1, span_steps=2, spans_per_block=2, max_rounds=3)
CPU = torch.device("cpu")
GIB = 2**30
TINYLLAMA = ModelConfig.preset("tinyllama-1.1b")
DEVICE = Ceilings(
    copy_bytes_per_s=4.3e12,
    matmul_flops_per_s=790e12,
    tokens=16_384,
    gemm_s=16_384 * 8e-6,
    attention_s={"slow": 16_384 * 3e-6, "fast": 16_384 * 2e-6},
)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each in a process that holds all of torch and transformers."""
    monkeypatch.setattr("benchmarks.step_rounds.release_memory", lambda: None)


# --- Rows that only say how long they take.


class Time:
    """A clock that only moves when a row works."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Worker:
    def __init__(self, time: Time, step_s: float, losses: Sequence[float] = (3.0, 2.0, 1.0), fails_in: int = -1):
        self.time, self.step_s, self.losses, self.fails_in = time, step_s, losses, fails_in
        self.blocks = 0
        self.calls: list[str] = []

    def block(self, num_untimed: int, num_spans: int, span_steps: int) -> Block:
        self.calls.append(f"{num_untimed}+{num_spans}x{span_steps}")
        self.blocks += 1
        if self.blocks == self.fails_in:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand much more")
        self.time.now_s += (num_untimed + num_spans * span_steps) * self.step_s
        return Block(
            span_s=[self.step_s] * num_spans, losses=dict(enumerate(self.losses, 1)), peak_bytes=self.blocks * GIB
        )

    def rest(self) -> None:
        self.calls.append("rest")

    def drop(self) -> None:
        self.calls.append("drop")


def row_of(key: str, worker: Worker, **values) -> Row:
    return Row(key=key, name=key, open=lambda: worker, **{"micro_batch": 8, **values})


def run(rows: list[Row], time: Time, seconds: float = 1e6) -> list[str]:
    said: list[str] = []
    measure(rows, SCHEDULE, Budget(seconds, time), 0.01, say=said.append)
    return said


def test_rows_run_in_turn_and_their_ratio_is_that_of_their_speeds():
    time = Time()
    workers = [Worker(time, 0.2), Worker(time, 0.1)]
    rows = [row_of("base", workers[0]), row_of("ours", workers[1], micro_batch=16)]
    run(rows, time)
    for worker in workers:
        assert worker.calls == ["1+1x2", "rest", *(["1+2x2", "rest"] * 3), "drop"]
    assert [row.median_s for row in rows] == [0.2, 0.1]
    ratio = speed_ratio(rows[1], rows[0])
    assert ratio is not None
    assert ratio.median == pytest.approx(4.0)
    assert rows[1].peak_bytes == 4 * GIB


def test_a_row_that_loses_otherwise_is_void_and_has_no_speed():
    time = Time()
    rows = [
        row_of("base", Worker(time, 0.2)),
        row_of("wrong", Worker(time, 0.1, losses=(3.0, 2.0, 1.02))),
        row_of("nan", Worker(time, 0.1, losses=(3.0, 2.0, math.nan))),
        row_of("close", Worker(time, 0.1, losses=(3.0, 2.0, 1.005))),
    ]
    run(rows, time)
    assert [row.is_void for row in rows] == [False, True, True, False]
    assert [row.median_s is None for row in rows] == [False, True, True, False]
    assert "up to 0.02 apart" in rows[1].remark
    assert rows[1].rounds == {}
    found = step_report.results(rows, setting())
    assert [result["valid"] for result in found] == [True, False, False, True]
    assert "tokens_per_s" not in found[1]


def test_losses_are_compared_at_the_steps_that_both_have():
    assert furthest_apart({}, {1: 1.0}) == math.inf
    assert furthest_apart({2: 1.0}, {1: 1.0}) == math.inf
    assert furthest_apart({2: 1.0, 4: 2.5}, {1: 9.0, 2: 1.0, 3: 9.0, 4: 2.0}) == 0.5
    assert math.isnan(furthest_apart({1: math.nan, 2: 1.0}, {1: 1.0, 2: 1.0}))


@pytest.mark.parametrize("fails_in", [1, 2, 3])
def test_an_error_ends_its_row_and_no_other(fails_in: int):
    time = Time()
    failing = Worker(time, 0.1, fails_in=fails_in)
    rows = [row_of("failing", failing), row_of("other", Worker(time, 0.2))]
    run(rows, time)
    assert rows[0].remark == "failed: out of memory"
    assert "drop" in failing.calls
    assert len(rows[0].rounds) == max(0, fails_in - 2)
    assert len(rows[1].rounds) == 3
    assert not rows[1].is_void  # compared with itself if the first row has no losses
    assert (speed_ratio(rows[1], rows[0]) is not None) == (fails_in == 3)


def test_what_is_not_installed_is_absent():
    def absent() -> Worker:
        raise AbsentError("liger_kernel is not installed")

    time = Time()
    rows = [row_of("base", Worker(time, 0.2)), Row(key="liger", name="liger", open=absent, micro_batch=8)]
    run(rows, time)
    assert rows[1].remark == "absent: liger_kernel is not installed"


def test_blocks_that_do_not_fit_into_the_time_are_left_out():
    time = Time()
    rows = [row_of("base", Worker(time, 5.0)), row_of("ours", Worker(time, 4.0))]
    said = run(rows, time, seconds=130.0)
    # Warm-ups 27 s, a round 45 s and 3 s beside the steps: the third would end after 162 s.
    assert [len(row.rounds) for row in rows] == [2, 2]
    assert said[-1] == "the time is up in round 3"


def test_the_first_round_is_run_in_any_case_but_shorter():
    time = Time()
    rows = [row_of("base", Worker(time, 50.0)), row_of("late", Worker(time, 40.0))]
    run(rows, time, seconds=100.0)
    assert rows[0].rounds == {0: [50.0]}
    assert rows[1].remark == "left out: no time"


def test_extra_rows_run_once_and_are_compared_with_their_own_kind():
    time = Time()
    several = Worker(time, 0.4, losses=(2.0, 1.0, 0.5))
    rows = [
        row_of("ours", Worker(time, 0.1)),
        row_of("accumulated", several, micro_batches=4, is_extra=True, checks_losses=False),
        row_of("largest", Worker(time, 0.3, (2.0, 1.0, 0.5)), micro_batch=32, is_extra=True, reference="accumulated"),
        row_of("other", Worker(time, 0.3), micro_batch=32, is_extra=True, reference="accumulated"),
        row_of("alone", Worker(time, 0.3), micro_batch=32, is_extra=True, reference="nobody"),
    ]
    run(rows, time)
    assert [len(row.rounds) for row in rows] == [3, 1, 1, 0, 0]
    assert several.calls[2] == "1+1x2"
    assert [row.is_void for row in rows] == [False, False, False, True, True]
    assert "are not compared" in rows[4].remark


def test_rows_run_by_priority_and_results_are_kept_after_every_round():
    time, kept = Time(), []
    rows = [row_of("second", Worker(time, 0.2), priority=1), row_of("first", Worker(time, 0.2), priority=0)]
    said: list[str] = []
    measure(
        rows, SCHEDULE, Budget(1e6, time), 0.01,
        say=said.append, after_round=lambda: kept.append([len(row.rounds) for row in rows]),
    )  # fmt: skip
    assert [text.split(":")[0] for text in said] == ["first", "second"] * 4
    assert kept == [[1, 1], [1, 1], [2, 2], [3, 3]]


def test_judging_twice_says_the_same():
    time = Time()
    rows = [row_of("base", Worker(time, 0.2)), row_of("wrong", Worker(time, 0.1))]
    rows[0].losses, rows[1].losses = {1: 1.0}, {1: 2.0}
    judge(rows, 0.1)
    remark = rows[1].remark
    judge(rows, 0.1)
    assert rows[1].remark == remark


# --- What is reported.


def setting(**values) -> Setting:
    kind = {"model": TINYLLAMA, "sequence_length": 2048, "device": "NVIDIA H200", "tolerance": 0.05}
    return Setting(**{**kind, "device_bytes": 139 * GIB, "ceilings": DEVICE, **values})


def measured(key: str, seconds: float, peak_gib: float = 40.0, **values) -> Row:
    row = Row(key=key, name=key, open=lambda: Worker(Time(), 1.0), **{"micro_batch": 8, **values})
    row.rounds, row.losses, row.peak_bytes = {0: [seconds] * 2}, {10: 9.0}, int(peak_gib * GIB)
    return row


def measured_rows() -> list[Row]:
    liger = Row(key="liger", name="liger", open=lambda: Worker(Time(), 1.0), micro_batch=8, remark="absent: liger")
    return [
        measured("eager", 0.30, peak_gib=60),
        measured("compiled", 0.22),
        liger,
        measured("off", 0.21),
        measured("ours", 0.19, peak_gib=30),
        measured("synthetic", 0.1895),
        measured("accumulated", 0.73, micro_batches=4),
        measured("largest", 0.71, peak_gib=104, micro_batch=32),
    ]


def test_figures_of_a_row_follow_from_its_time():
    ours = step_report.results(measured_rows(), setting())[4]
    speed = 8 * 2048 / 0.19
    assert ours["tokens_per_s"] == pytest.approx(speed)
    assert ours["mfu"] == pytest.approx(speed * 7.313818e9 / 989e12, rel=1e-5)
    assert ours["mfu_causal"] == pytest.approx(speed * 6.760e9 / 989e12, rel=1e-3)
    assert ours["share_of_matmul"] == pytest.approx(speed * 7.313818e9 / 790e12, rel=1e-5)
    assert ours["speed_ratio_median"] == pytest.approx(0.30 / 0.19)
    # 8 us a token of GEMMs, 2 of attention, 4.075 MB a token and 37.4 GB a step at 4.3 TB/s.
    floor_s = 16_384 * (10e-6 + 4.075008e6 / 4.3e12) + 37.401645056e9 / 4.3e12
    assert ours["floor_efficiency"] == pytest.approx(floor_s / 0.19)


def test_goals_are_judged_by_what_was_measured():
    goals = {goal.name: goal for goal in step_report.goals(measured_rows(), setting())}
    verdicts = {name.split(":")[0] + "|" + name.split(": ")[-1]: goal.verdict for name, goal in goals.items()}
    assert verdicts == {
        "E1 tokens/s|transformers, SDPA": "pass",
        "E1 tokens/s|transformers + compile": "pass",
        "E1 tokens/s|transformers + Liger": "not measured",
        "E1 tokens/s|ours, kernels off + compile": "pass",
        "E2 MFU|largest": "pass",
        "E2 share of the matmul ceiling, same row|E2 share of the matmul ceiling, same row": "pass",
        "E2 floor efficiency, same row|E2 floor efficiency, same row": "pass",
        "E3 peak memory|transformers, SDPA": "pass",
        "E3 peak GiB of 32 sequences|E3 peak GiB of 32 sequences": "pass",
        "E4 fixed share of a step of 0.5M tokens|E4 fixed share of a step of 0.5M tokens": "pass",
        "E4 real data over data read once, minus 1|E4 real data over data read once, minus 1": "pass",
    }
    worse = measured_rows()
    worse[0].rounds, worse[5].rounds = {0: [0.25]}, {0: [0.18]}
    failed = {goal.name for goal in step_report.goals(worse, setting()) if goal.passed is False}
    assert failed == {"E1 tokens/s: transformers, SDPA", "E4 real data over data read once, minus 1"}


def test_nothing_is_judged_that_was_not_measured():
    rows = [row_of("eager", Worker(Time(), 1.0)), row_of("ours", Worker(Time(), 1.0))]
    goals = step_report.goals(rows, setting(ceilings=None))
    assert {goal.verdict for goal in goals} == {"not measured"}
    void = measured_rows()
    void[4].is_void = True
    verdicts = [goal.verdict for goal in step_report.goals(void, setting())]
    assert verdicts.count("not measured") == 7  # all but E2, of the largest micro-batch, and its memory


def test_the_fixed_part_of_a_step_is_what_more_micro_batches_do_not_repeat():
    rows = {"ours": measured("ours", 0.010 + 0.18), "accumulated": measured("acc", 0.010 + 4 * 0.18, micro_batches=4)}
    fixed = step_report.fixed_step_s(rows, 2048)
    assert fixed is not None
    assert fixed["fixed_ms"] == pytest.approx(10)
    assert fixed["micro_batch_ms"] == pytest.approx(180)
    assert fixed["share"] == pytest.approx(0.010 / (0.010 + 32 * 0.18))


def test_tables_and_json_hold_rows_floor_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows, kind = measured_rows(), setting()
    rows[1].is_void, rows[1].remark = True, "VOID: loss 5"
    for table in step_report.tables(rows, kind):
        table.print()
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("compiled"))
    assert "VOID: loss 5" in line
    assert "0.22" not in line
    assert "absent: liger" in printed
    assert "not measured" in printed
    assert "The least time of a step of 16,384 tokens" in printed
    assert json.loads(json.dumps(step_report.facts(rows, kind)))["goals"][0]["verdict"] == "pass"
    step_report.draw(step_report.results(rows, kind), "a device", tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1_000
    step_report.draw([], "a device on which nothing ran", tmp_path / "none.png")


def test_an_unknown_device_has_no_mfu_but_a_share_of_what_it_was_measured_to_do():
    ours = step_report.results(measured_rows(), setting(device="Abacus"))[4]
    assert ours["mfu"] is None
    assert ours["mfu_causal"] is None
    assert ours["share_of_matmul"] is not None
    goal = step_report.goals(measured_rows(), setting(device="Abacus"))[4]
    assert goal.verdict == "not measured"


# --- Ceilings.


class CountingClock:
    """A clock for which every call lasts a millisecond."""

    cache_bytes = 0

    def __init__(self) -> None:
        self.calls = 0

    def prepare(self, calls, restore) -> "CountingClock":
        for call in calls:
            call()
        self.calls += len(calls)
        return self

    how = "events"

    def seconds(self) -> float:
        return 1e-3

    def release(self) -> None:
        pass

    free_bytes = seconds_with_launches = peak_bytes = num_launches = check = None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CountingClock:
    monkeypatch.setattr(ceilings, "_WARM_UP_S", 0.0)
    return CountingClock()


def test_the_shapes_of_the_ceilings_have_the_flops_of_the_model():
    macs = sum(count * n * k for count, n, k in ceilings.gemm_shapes(TINYLLAMA))
    length = TINYLLAMA.context_length
    attention = 12 * TINYLLAMA.num_layers * TINYLLAMA.query_size * length
    assert 6 * macs + attention == flops_per_token(TINYLLAMA, length)


def test_gemms_and_attention_are_timed_forward_and_backward_in_every_layer(clock):
    assert ceilings.gemm_seconds(clock, TINY, 64, CPU, torch.float32) == pytest.approx(3e-3 * (4 * TINY.num_layers + 1))
    found = ceilings.attention_seconds(clock, TINY, 2, 16, CPU, torch.float32)
    assert found["as a run chooses"] == pytest.approx(1e-3 * TINY.num_layers)
    assert "SDPA cuDNN" not in found


def test_minimum_bytes_are_those_of_the_budget():
    assert ceilings.minimum_bytes_per_token(TINYLLAMA) == pytest.approx(4.08e6, rel=2e-3)
    assert ceilings.minimum_bytes_per_step(TINYLLAMA) == pytest.approx(33.0e9 + 4.4e9, rel=1e-3)


# --- Real rows of a tiny model.


def tiny_config(folder: Path, **data) -> RunConfig:
    data = {"sequence_length": 16, "batch_sequences": 4, "micro_batch_sequences": 4, **data}
    config = RunConfig(
        model=TINY, data=DataSection(**data), optim=OptimSection(peak_lr=1e-2, schedule="constant", warmup_steps=0)
    )
    return with_values(config, run={"dir": str(folder / "run")}, data={"paths": (str(folder / "shards"),)})


@pytest.fixture
def parts(tmp_path: Path):
    config = tiny_config(tmp_path)
    corpus = write_corpus(tmp_path / "shards", vocab_size=TINY.vocab_size, sequence_length=16, num_samples=256)
    this = ranks.start("cpu")
    yield config, corpus, PeerBatches(corpus, config, on_gpu=False), InitialValues(TINY, 0, pin_memory=False), this
    ranks.stop()


def blocks_of(runner) -> list[Block]:
    """Three blocks, between which the runner gives back its memory."""
    found = []
    for _ in range(3):
        found.append(runner.block(1, 2, 2))
        runner.rest()
    runner.drop()
    return found


# torch looks at a tensor's gradient while it traces, and hides the warning, which is an error here.
COMPILES = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@COMPILES
def test_every_block_of_every_row_trains_the_same(parts):
    config, corpus, batches, values, this = parts
    make = partial(step.make_trainer, config, this, values.value)
    bf16 = with_values(config, parallel={"precision": "bf16"})  # sharded, as on a GPU
    in_bf16 = Ours(partial(step.make_trainer, bf16, this, values.value), values, CPU)
    runs = [
        blocks_of(PeerRunner("eager", config, values, batches, CPU)),
        blocks_of(PeerRunner("compiled", config, values, batches, CPU, backend="aot_eager")),
        blocks_of(OursRunner(Ours(make, values, CPU), config, corpus)),
        blocks_of(OursRunner(Ours(make, values, CPU), with_values(config, kernels=KERNELS_OFF), corpus)),
        blocks_of(OursRunner(in_bf16, bf16, corpus)),
    ]
    for blocks, tolerance in zip(runs, [1e-5, 1e-5, 1e-5, 1e-5, 2e-2], strict=True):
        assert blocks[0].losses == blocks[1].losses == blocks[2].losses
        assert blocks[0].losses == pytest.approx(runs[0][0].losses, abs=tolerance)
        assert list(blocks[0].losses) == [1, 2, 3, 4, 5]
        assert [len(block.span_s) for block in blocks] == [2, 2, 2]
        assert all(seconds > 0 for block in blocks for seconds in block.span_s)
    assert runs[0][0].losses[5] < runs[0][0].losses[1] - 0.1
    assert launch.chosen("rms_norm") == "auto"


def test_turning_our_kernels_off_leaves_none_of_them_on():
    assert {*KERNELS_OFF, "attention"} == {field.name for field in dataclasses.fields(KernelSection)}
    assert "auto" not in KERNELS_OFF.values()


def test_rows_of_one_trainer_have_their_own_micro_batches_and_data(parts, tmp_path: Path):
    config, corpus, _, values, this = parts
    ours = Ours(partial(step.make_trainer, config, this, values.value), values, CPU)
    several = OursRunner(ours, tiny_config(tmp_path, batch_sequences=16, micro_batch_sequences=4), corpus)
    large = OursRunner(ours, tiny_config(tmp_path, batch_sequences=16, micro_batch_sequences=16), corpus)
    once = OursRunner(ours, config, corpus, reads_once=True)
    assert blocks_of(several)[0].losses == pytest.approx(blocks_of(large)[0].losses, abs=1e-5)
    losses = list(blocks_of(once)[0].losses.values())
    assert sorted(losses, reverse=True) == losses  # learns one batch by heart


def test_an_error_in_a_shared_trainer_does_not_reach_the_next_row(parts):
    config, corpus, _, values, this = parts
    ours = Ours(partial(step.make_trainer, config, this, values.value), values, CPU)
    runner = OursRunner(ours, config, corpus)
    losses = runner.block(1, 1, 2).losses
    ours.restarted().optimizer.state.clear()  # in the middle of something
    with pytest.raises(AssertionError):
        runner.drop()
    assert runner.block(1, 1, 2).losses == losses


def test_memory_that_was_given_back_is_there_again():
    memory, tensors = DeviceMemory(), [torch.ones(4, 4), torch.ones(8)]
    tensors.append(tensors[0][1:])  # shares memory
    memory.give_back(tensors)
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0]
    memory.take()
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [64, 32, 64]
    tensors[0].zero_()
    assert tensors[2].sum() == 0


@pytest.fixture
def liger_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Something that is called as Liger is; gives what notes the calls of its RoPE."""
    package = tmp_path / "site" / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "from transformers.models.llama import modeling_llama\n"
        "real, calls = modeling_llama.apply_rotary_pos_emb, []\n"
        "def rope(*args, **kwargs):\n    calls.append(1)\n    return real(*args, **kwargs)\n"
        "def apply_liger_kernel_to_llama(fused_linear_cross_entropy, model):\n"
        "    modeling_llama.apply_rotary_pos_emb = rope\n"
    )
    (package / "functional.py").write_text(
        "import torch.nn.functional as F\n"
        "def liger_fused_linear_cross_entropy(hidden, head, targets):\n"
        "    return F.cross_entropy(hidden @ head.T, targets)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield importlib.import_module("liger_kernel.transformers").calls
    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        del sys.modules[name]


def test_liger_is_patched_in_only_while_its_row_runs(parts, liger_calls: list[int]):
    from transformers.models.llama import modeling_llama

    config, _, batches, values, _ = parts
    before = modeling_llama.apply_rotary_pos_emb
    liger = PeerRunner("liger", config, values, batches, CPU)
    assert modeling_llama.apply_rotary_pos_emb is before
    losses = liger.block(1, 1, 2).losses
    assert modeling_llama.apply_rotary_pos_emb is before
    assert len(liger_calls) == 3 * TINY.num_layers
    assert losses == pytest.approx(PeerRunner("eager", config, values, batches, CPU).block(1, 1, 2).losses, abs=1e-5)
    assert len(liger_calls) == 3 * TINY.num_layers


def test_a_row_without_its_library_is_absent(parts, monkeypatch: pytest.MonkeyPatch):
    config, _, batches, values, _ = parts
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AbsentError, match="transformers is not installed"):
        PeerRunner("eager", config, values, batches, CPU)


@pytest.mark.parametrize(
    ("device_gib", "largest"), [(139, (32, 1)), (79, (16, 2)), (48, None)], ids=["H200", "H100", "48 GiB"]
)
def test_a_gpu_has_all_rows_and_the_largest_micro_batch_that_fits(parts, device_gib: int, largest):
    _, corpus, batches, values, this = parts
    data = DataSection(sequence_length=2048, batch_sequences=8, micro_batch_sequences=8)
    rows = step._rows(RunConfig(data=data), corpus, batches, values, this, device_gib * GIB)
    keys = ["eager", "compiled", "liger", "off", "ours", "synthetic", "accumulated"]
    assert [row.key for row in rows] == (keys if largest is None else [*keys, "largest"])
    assert {row.sequences for row in rows if row.is_extra} == {32}
    if largest is not None:
        assert (rows[-1].micro_batch, rows[-1].micro_batches) == largest


@pytest.mark.slow
@COMPILES
def test_the_rows_of_a_gpu_run_and_are_reported_together(
    parts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config, corpus, batches, values, this = parts
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_kernel" else find_spec(name))
    rows = step._rows(config, corpus, batches, values, this, 139 * GIB)
    compiled = next(row for row in rows if row.key == "compiled")
    compiled.open = partial(PeerRunner, "compiled", config, values, batches, CPU, backend="aot_eager")
    schedule = dataclasses.replace(SCHEDULE, max_rounds=2)
    measure(rows, schedule, Budget(1e6), 1e-3)
    kind = setting(model=TINY, sequence_length=16, device="Abacus")
    for table in step_report.tables(rows, kind):
        table.print()
    printed = capsys.readouterr().out
    assert "VOID" not in printed
    assert "failed" not in printed
    by_key = {row.key: row for row in rows}
    assert "liger_kernel is not installed" in by_key["liger"].remark
    assert {key: len(row.rounds) for key, row in by_key.items()} == {
        "eager": 2, "compiled": 2, "liger": 0, "off": 2, "ours": 2, "synthetic": 2, "accumulated": 1,
        "largest": 1,
    }  # fmt: skip


def test_a_run_on_a_cpu_prints_a_table_and_writes_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(step, "_config", lambda device, folder: tiny_config(folder))
    monkeypatch.setattr(step, "_ON_CPU", SCHEDULE)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert step.main(["--seconds", "1000", "--out", str(tmp_path / "out")]) == 0
    result = json.loads(next((tmp_path / "out").glob("*-step.json")).read_text())
    assert [row["valid"] for row in result["rows"]] == [True, True]
    assert [row["mfu"] for row in result["rows"]] == [None, None]
    assert result["goals"] == []
    assert len(list((tmp_path / "out").iterdir())) == 2
    printed = capsys.readouterr().out
    assert "VOID" not in printed
    assert "transformers, SDPA, fused AdamW" in printed
    assert "Goals" not in printed

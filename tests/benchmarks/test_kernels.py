import contextlib
import itertools
import json
import pkgutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_cases, kernel_check, kernel_operator, kernel_rows, kernel_sweep, kernels
from benchmarks.kernel_cases import OPERATORS, RMS_NORM
from benchmarks.kernel_check import Judge, Verdict, nan_in_fresh_memory, relative_error, results
from benchmarks.kernel_goals import (
    GOALS,
    MISSED,
    NOT_MEASURED,
    PASS,
    Ceilings,
    against,
    goals_table,
    of_copy,
    of_matmul,
)
from benchmarks.kernel_operator import (
    BACKWARD,
    BOTH,
    FORWARD,
    Case,
    Draw,
    Inputs,
    Operator,
    Phase,
    Shape,
    Sizes,
    Yardstick,
)
from benchmarks.kernel_report import draw, operator_tables, records
from benchmarks.kernel_rows import (
    ABSENT,
    AUTOTUNED,
    COMPILED,
    EAGER,
    FAIL,
    NO_TIME,
    OURS,
    OURS_AGAIN,
    OURS_BY_AUTOGRAD,
    OURS_COMPILED,
    Cell,
    Effort,
    Row,
    measure_case,
)
from benchmarks.timing import Budget, Call, Ceiling, DeviceLostError, Timed
from tests.benchmarks.host_clock import HostClock

EFFORT = Effort(rounds=5, fewest_rounds=5, warm_up_s=0.0)
CEILINGS = Ceilings(Ceiling(((1 << 20, 1e12), (1 << 30, 3e12))), matmul_flops=7e14)
FACTS = {"model_matmul_flops_per_s": {"qkv": 6e14}, "launch_us": 4.0}
HERE = "tests.benchmarks.test_kernels"


# --- Operators for these tests, all the same function of x: twice x.


def twice(x: Tensor) -> Tensor:
    return x * 2


def twice_and_a_bit(x: Tensor) -> Tensor:
    return x * 2.1


def twice_of_most(x: Tensor) -> Tensor:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            y = torch.empty_like(x)
            y[:-1] = 2 * x[:-1]
            return y

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> Tensor:
            return 2 * gradients[0]

    return Function.apply(x)  # pyright: ignore[reportReturnType]


_calls = itertools.count()


def twice_or_so(x: Tensor) -> Tensor:
    return x * (2 + 4e-3 * (next(_calls) % 2))


def twice_in_an_instant(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def twice_without_memory(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("tried to allocate 80 GiB")


def fourth_power(x: Tensor) -> Tensor:
    return (x * x).square()


def rows_in_order(x: Tensor) -> Tensor:
    return x[torch.arange(len(x)).flip(0)]


def a_third(x: Tensor) -> Tensor:
    return x / 3


def half_of_a_third(x: Tensor) -> Tensor:
    return x / 3 * 1.02


def only_others(draw: Draw, shape: Shape) -> Inputs:
    return Inputs((), (draw.normal(shape["M"], shape["d"]),))


def order(x: Tensor) -> Tensor:
    return x.flatten().argsort(stable=True)


def order_but_two(x: Tensor) -> Tensor:
    found = order(x)
    return torch.cat((found[:-2], found[-2:].flip(0)))


def missing() -> Callable[..., Tensor]:
    raise ModuleNotFoundError("No module named 'liger_kernel'")


def outdated() -> Callable[..., Tensor]:
    raise ImportError("cannot import name 'swiglu'")


def operator_of(ours: Callable[..., Tensor], **changes) -> Operator:
    defaults = {
        "name": "twice",
        "leaves": ("x",),
        "outputs": ("y",),
        "draw": lambda draw, shape: Inputs((draw.normal(shape["M"], shape["d"]),)),
        "ours": f"{HERE}:{ours.__name__}",
        "reference": f"{HERE}:twice",
        "elements": lambda shape: dict.fromkeys((FORWARD, BACKWARD), 2 * shape["M"] * shape["d"]),
        "tiny": ({"M": 4, "d": 8},),
        "sizes": (Sizes({"M": 4, "d": 8}),),
    }
    return Operator(**{**defaults, **changes})


def measured(case: Case, clock: HostClock | None = None, seconds: float = 1e9) -> list[Row]:
    return list(measure_case(case, clock or HostClock(), Budget(seconds), "cpu", EFFORT))


def measured_one(operator: Operator, with_peers: bool = True) -> Row:
    (row,) = measured(Case(operator, Sizes({"M": 6, "d": 8}, (FORWARD,), with_peers)))
    return row


@pytest.fixture(autouse=True)
def _compilation_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a C compiler."""
    compile_for_real = torch.compile

    def quick(function, *, fullgraph: bool, dynamic: bool, mode: str | None = None):
        assert mode in (None, "max-autotune-no-cudagraphs")
        return compile_for_real(function, fullgraph=fullgraph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", quick)


# --- Whether results are right.


def test_an_error_is_relative_to_the_largest_true_value():
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0


@pytest.mark.parametrize(
    "found", [torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), torch.ones(3)], ids=str
)
def test_what_is_no_number_or_missing_is_infinitely_wrong(found: Tensor):
    assert relative_error(found, torch.tensor([1.0, 4.0])) == torch.inf


def test_large_results_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_check, "_PIECE", 7)
    truth = torch.linspace(-3, 5, 100)
    found = truth.clone()
    found[-1] += 0.5
    assert relative_error(found, truth) == pytest.approx(0.1)


@pytest.mark.parametrize("ours", [twice_and_a_bit, twice_of_most])
def test_a_wrong_kernel_gets_fail_and_no_speed(ours: Callable[..., Tensor]):
    row = measured_one(operator_of(ours))
    for name in (OURS, OURS_COMPILED):
        cell = row.cells[name]
        assert cell.note == FAIL or (ours is twice_of_most and name == OURS_COMPILED)
    assert row.cells[OURS].seconds == []
    assert OURS_AGAIN not in row.cells
    assert row.cells[EAGER].seconds
    assert (of_copy(row, CEILINGS), against(row, EAGER)) == (None, None)
    table, _ = operator_tables([row], CEILINGS)
    assert table.records()[0]["us"] == FAIL
    assert (table.records()[0]["GB/s"], table.records()[0]["of copy"]) == ("", "")


def test_an_implementation_may_err_half_as_much_again_as_eager_and_a_unit():
    class Half(Judge):
        def __init__(self) -> None:
            self._truth = {"y": torch.tensor([1.0, 100.0], dtype=torch.float64)}
            self._eager, self._exponent = {"y": 0.02}, 0.0
            self.inputs = Inputs((torch.ones(2, dtype=torch.bfloat16),))

    unit = torch.finfo(torch.float32).eps

    def verdict(error: float) -> Verdict:
        return Half().judge({"y": torch.tensor([1.0 + 100 * error, 100.0])})

    assert verdict(1.5 * 0.02 - 10 * unit).is_right
    assert not verdict(1.5 * 0.02 + 10 * unit).is_right
    assert verdict(0.01).worst == "y"
    assert verdict(0.01).error == pytest.approx(0.01, rel=1e-3)
    assert verdict(0.01).eager_error == 0.02


def test_a_gradient_without_its_softmax_is_wrong_although_only_its_small_elements_are():
    operator, shape = kernel_cases.CROSS_ENTROPY, {"M": 64, "V": 1_000}
    judge = Judge(Case(operator, Sizes(shape)), Draw("cpu", torch.bfloat16, 0))
    function = kernel_operator.reference(operator, shape)
    found = dict(results(function, operator, judge.inputs, judge.directions))
    assert judge.judge(found).is_right
    found["dlogits"] = torch.zeros_like(found["dlogits"])
    assert judge.judge(found).worst == "dlogits"
    assert not judge.judge(found).is_right


def test_others_may_err_more_where_an_operator_says_so_and_ours_may_not():
    def half_a_unit_off(x: Tensor) -> Tensor:
        return x * 2.03  # four times what bf16 allows

    changes = {"peers": {"rough": lambda: half_a_unit_off}, "peer_factor": 1e9}
    row = measured_one(operator_of(twice, **changes))
    assert (row.cells["rough"].note, row.cells[OURS].note) == (FAIL, "")  # eager torch is exact here: no factor of it
    rough = operator_of(half_of_a_third, reference=f"{HERE}:a_third", **changes)
    assert measured_one(rough).cells[OURS].note == FAIL
    rough = operator_of(
        a_third, reference=f"{HERE}:a_third", **{**changes, "peers": {"rough": lambda: half_of_a_third}}
    )
    assert measured_one(rough).cells["rough"].note == ""


def test_integers_have_to_be_the_true_ones_and_need_no_gradient():
    right, wrong = (
        operator_of(ours, leaves=(), outputs=("order",), draw=only_others, reference=f"{HERE}:order")
        for ours in (order, order_but_two)
    )
    row = measured_one(right)
    assert (row.cells[OURS].note, row.cells[OURS].equal_bits) == ("", True)
    assert row.cells[OURS].seconds
    assert measured_one(wrong).cells[OURS].note == FAIL


def test_what_nobody_wrote_is_not_a_number():
    with nan_in_fresh_memory():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_changes_its_bits_is_found():
    assert measured_one(operator_of(twice)).cells[OURS].equal_bits is True
    assert measured_one(operator_of(twice_or_so)).cells[OURS].equal_bits is False


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_references_agree_with_themselves_in_every_result(operator: Operator):
    """The names of leaves and outputs fit, also those of the step."""
    case = Case(operator, Sizes(operator.tiny[0]))
    judge = Judge(case, Draw("cpu", torch.bfloat16, 0))
    function = kernel_operator.reference(operator, operator.tiny[0])
    found = results(function, operator, judge.inputs, judge.directions)
    assert set(found) >= {*operator.outputs, *(f"d{name}" for name in operator.leaves)}
    assert judge.judge(found).is_right


# --- Who is measured.


def test_every_implementation_has_its_cell():
    peers = {"Liger": missing, "old": outdated, "same": lambda: twice}
    row = measured_one(operator_of(twice, peers=peers))
    notes = {name: cell.note for name, cell in row.cells.items()}
    assert notes == {
        OURS: "",
        OURS_AGAIN: "",
        EAGER: "",
        OURS_COMPILED: "",
        COMPILED: "",
        "Liger": ABSENT,
        "old": "error: ImportError: cannot import name 'swiglu'",
        "same": "",
    }
    assert all(len(cell.seconds) == EFFORT.rounds for cell in row.cells.values() if not cell.note)
    assert row.cells[OURS_COMPILED].recompiles == 0
    assert row.cells[OURS].peak_bytes == 1 << 20
    _, beside = operator_tables([row], CEILINGS)
    (line,) = beside.records()
    assert line["Liger"] == "absent"
    assert line["same"].endswith("x")


def test_a_yardstick_computes_something_else_on_inputs_of_its_own_and_is_timed_in_every_phase():
    shapes: list[torch.Size] = []

    def three_times(x: Tensor, y: Tensor) -> Tensor:
        shapes.append(x.shape)
        return 3 * x[: len(y)] + y

    def inputs(given: Inputs) -> Inputs:
        (x,) = (leaf.detach() for leaf in given.leaves)
        return Inputs((x.repeat(2, 1).requires_grad_(), x.clone().requires_grad_()))

    yardsticks = {
        name: Yardstick(lambda: three_times, inputs, is_equal_work)
        for name, is_equal_work in {"as much": True, "a part": False}.items()
    }
    operator = operator_of(twice, yardsticks=yardsticks, flops=lambda shape: dict.fromkeys((FORWARD, BOTH), 10**9))
    rows = measured(Case(operator, Sizes({"M": 6, "d": 8})))
    for row in rows:
        assert [row.cells[name].note for name in yardsticks] == ["", ""]
        assert all(row.cells[name].verdict is None and row.cells[name].seconds for name in yardsticks)
        assert against(row, "as much") is not None
        assert of_matmul(row, CEILINGS, "a part") is None
        assert of_copy(row, CEILINGS, "a part") is None
        assert (of_matmul(row, CEILINGS, "as much") is None) == (row.phase == BACKWARD)
    assert set(shapes) == {(12, 8)}
    assert "a part" not in measured_one(operator, with_peers=False).cells


def test_what_a_forward_keeps_is_counted_without_its_inputs_and_integers():
    def kept(case: Case) -> int | None:
        return measured(case)[0].cells[EAGER].kept_bytes

    def of(function: Callable[..., Tensor]) -> Operator:
        return operator_of(function, reference=f"{HERE}:{function.__name__}")

    sizes = Sizes({"M": 6, "d": 8}, (FORWARD,), with_peers=False)
    assert kept(Case(of(twice), sizes)) == 0
    assert kept(Case(of(fourth_power), sizes)) == 2 * 6 * 8
    assert kept(Case(of(rows_in_order), sizes)) == 0
    both = measured(Case(of(fourth_power), Sizes({"M": 6, "d": 8}, (BOTH,), with_peers=False)))
    assert both[0].cells[EAGER].kept_bytes is None


def test_a_reference_that_is_no_candidate_for_compilation_is_not_compiled():
    row = measured_one(operator_of(twice, compiles_reference=False))
    assert (COMPILED in row.cells, OURS_COMPILED in row.cells) == (False, True)


def test_an_error_stays_in_its_cell():
    row = measured_one(
        operator_of(twice, peers={"broken": lambda: twice_in_an_instant, "big": lambda: twice_without_memory})
    )
    assert row.cells["broken"].note == "error: RuntimeError: no kernel image is available"
    assert row.cells["big"].note == "error: out of memory"
    assert row.cells[OURS].seconds
    assert (row.cells["broken"].is_broken, row.cells["big"].is_broken, row.cells[OURS].is_broken) == (
        True,
        False,
        False,
    )


def test_without_ours_nothing_is_timed_and_every_phase_says_why():
    clock = HostClock()
    rows = measured(Case(operator_of(twice_in_an_instant), Sizes({"M": 4, "d": 8})), clock)
    assert [row.phase for row in rows] == [FORWARD, BACKWARD, BOTH]
    assert all("no kernel image" in row.cells[OURS].note for row in rows)
    assert clock.num_prepared == 0


def test_when_the_time_is_spent_only_ours_and_eager_are_measured():
    (row,) = measured(
        Case(operator_of(twice, peers={"same": lambda: twice}), Sizes({"M": 4, "d": 8}, (FORWARD,))), seconds=0
    )
    assert {name: cell.note for name, cell in row.cells.items()} == {
        OURS: "",
        OURS_AGAIN: "",
        EAGER: "",
        OURS_COMPILED: NO_TIME,
        COMPILED: NO_TIME,
        "same": NO_TIME,
    }


def test_odd_shapes_go_without_peers_and_few_are_autotuned():
    def names(**options) -> list[str]:
        return [p.name for p in kernel_rows.providers(Case(RMS_NORM, Sizes({"M": 4, "d": 8}, **options)))]

    assert names(with_peers=False) == [OURS, EAGER, OURS_COMPILED]
    assert names(autotuned=True)[-1] == AUTOTUNED
    assert names()[3] == COMPILED
    assert OURS_BY_AUTOGRAD in [p.name for p in kernel_rows.providers(Case(kernel_cases.CROSS_ENTROPY, Sizes({})))]


class FailsInRounds(HostClock):
    """Its timed calls fail once they are prepared."""

    def __init__(self, is_lost: bool):
        super().__init__()
        self.is_lost = is_lost

    def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
        def seconds() -> float:
            raise RuntimeError("unspecified launch failure")

        return SimpleNamespace(how="graph", seconds=seconds)

    def check(self) -> None:
        if self.is_lost:
            raise DeviceLostError("an illegal memory access was encountered")


def test_a_failure_in_the_rounds_is_the_rows():
    (row,) = measured(Case(operator_of(twice), Sizes({"M": 4, "d": 8}, (FORWARD,))), FailsInRounds(is_lost=False))
    assert row.cells[OURS].note == "error: RuntimeError: unspecified launch failure"


def test_a_case_that_cannot_be_prepared_is_reported_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch):
    def without_memory(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(kernel_rows, "InputSets", without_memory)
    case = Case(operator_of(twice), Sizes({"M": 4, "d": 8}, (FORWARD, BACKWARD)))
    run = kernels.Run([case])
    kernels.measure(run, HostClock(), CEILINGS, "cpu", Budget(1e9), EFFORT)
    assert [(row.phase, row.cells[OURS].note) for row in run.rows] == [
        (FORWARD, "error: out of memory"),
        (BACKWARD, "error: out of memory"),
    ]
    assert not run.left


def test_a_lost_device_ends_the_run_and_what_was_measured_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cases = [Case(operator_of(twice), Sizes({"M": 4, "d": 8}, (FORWARD,))), *kernel_cases.default_cases()[:2]]
    run = kernels.Run(list(cases))
    kernels.measure(run, FailsInRounds(is_lost=True), CEILINGS, "cpu", Budget(1e9), EFFORT)
    assert (run.left, run.why_left) == (cases, kernels.LOST)
    kernels.report(run, CEILINGS, FACTS, kernels.COMMAND, tmp_path)
    assert capsys.readouterr().out.count(kernels.LOST) == 3


def test_cases_that_the_time_did_not_allow_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = kernels.Run(kernel_cases.default_cases())
    kernels.measure(run, HostClock(), CEILINGS, "cpu", Budget(0), EFFORT)
    assert kernels.report(run, CEILINGS, FACTS, kernels.COMMAND, tmp_path) is False
    printed = capsys.readouterr().out
    assert printed.count(NO_TIME) == len(run.left) > 10
    (path,) = tmp_path.glob("*.json")
    assert len(json.loads(path.read_text())["not_measured"]) == len(run.left)


def test_inputs_that_are_overwritten_are_restored_before_every_round():
    seen: list[float] = []

    class Watches(HostClock):
        def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
            assert restore is not None
            timed = super().prepare(calls, restore)

            def seconds() -> float:
                duration_s = timed.seconds()
                seen.append(duration_s)
                return duration_s

            return SimpleNamespace(how="graph", seconds=seconds)

    case = Case(kernel_cases.CROSS_ENTROPY, Sizes({"M": 5, "V": 16}, (BOTH,)))
    sets = kernel_rows.InputSets(case, HostClock(), "cpu")
    assert len(sets.inputs) >= 4
    assert sets.restore is not None
    before = sets.inputs[0].leaves[0].detach().clone()
    for inputs in sets.inputs:
        inputs.leaves[0].data.zero_()
    sets.restore()
    assert all(torch.equal(inputs.leaves[0], before) for inputs in sets.inputs)
    assert measured(case, Watches())[0].cells[OURS].seconds
    assert seen


def test_several_input_sets_differ():
    sets = kernel_rows.InputSets(Case(RMS_NORM, Sizes({"M": 5, "d": 16})), HostClock(), "cpu")
    first, second = sets.inputs[:2]
    assert not torch.equal(first.leaves[0], second.leaves[0])
    assert all(leaf.requires_grad for leaf in second.leaves)
    assert not torch.equal(sets.directions[0][0], sets.directions[1][0])


# --- The whole run.


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo on an autograd.Function
def test_a_run_of_every_operator_writes_tables_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.kernel_report._PICTURED_ROWS", 1)
    sizes = [Case(operator, Sizes(operator.tiny[0], operator.sizes[0].phases)) for operator in OPERATORS]
    run = kernels.Run(sizes, states=[{"when": "before", "clocks.sm": "1980 MHz"}])
    kernels.measure(run, HostClock(), CEILINGS, "cpu", Budget(1e9), EFFORT)
    assert kernels.report(run, CEILINGS, FACTS, kernels.COMMAND, tmp_path) is False
    printed = capsys.readouterr().out
    for operator in OPERATORS:
        assert f"{operator.name}: ours" in printed
        assert f"{operator.name}: beside others" in printed
    assert "error:" not in printed.replace("error: ModuleNotFoundError", "")
    assert all(text in printed for text in ("1980 MHz", "absent", "K1", "K9", "TB/s", "launched from Python: 4.0 us"))
    (path,) = tmp_path.glob("*-kernels.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    found = json.loads(path.read_text())
    assert {row["operator"] for row in found["rows"]} == {operator.name for operator in OPERATORS}
    assert all(row["providers"][OURS]["us"] > 0 for row in found["rows"])
    assert len(found["goals"]) == len(GOALS)
    assert found["peers"]["liger-kernel"] == "absent"


def test_a_wrong_kernel_fails_the_run(tmp_path: Path):
    run = kernels.Run([Case(operator_of(twice_and_a_bit), Sizes({"M": 4, "d": 8}, (FORWARD,)))])
    kernels.measure(run, HostClock(), CEILINGS, "cpu", Budget(1e9), EFFORT)
    assert kernels.report(run, CEILINGS, FACTS, kernels.COMMAND, tmp_path) is True


def test_without_a_gpu_errors_are_shown_and_no_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(["--only", "swiglu", "rms_norm", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "no GPU: speeds not measured" in printed
    assert printed.count("right") >= 8
    assert "us " not in printed
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(kernels, "OPERATORS", (operator_of(twice_and_a_bit),))
    assert kernels.check_only(["twice"]) == 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A GPU that has no time to measure anything; returns what the step benchmark was called with."""

    class Clock(HostClock):
        in_use = staticmethod(contextlib.nullcontext)

    steps: list[list[str]] = []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Example")
    monkeypatch.setattr("benchmarks.cuda_clock.CudaClock", Clock)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda _clock: (CEILINGS, FACTS))
    monkeypatch.setattr(kernels, "gpu_state", lambda when: {"when": when})
    monkeypatch.setattr("benchmarks.step.main", lambda arguments: steps.append(arguments) or 0)
    return steps


def test_on_a_gpu_the_step_benchmark_follows(tmp_path: Path, gpu: list[list[str]]):
    arguments = ["--seconds", "0", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    assert gpu == [["--out", str(tmp_path)]]
    assert (tmp_path / "nvidia-example-kernels.json").exists()
    assert kernels.main([*arguments, "--no-step", "--full", "--only", "rope"]) == 0
    assert len(gpu) == 1


def test_a_sweep_measures_nothing_else(tmp_path: Path, gpu: list[list[str]], capsys: pytest.CaptureFixture[str]):
    assert kernels.main(["--sweep", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "Launch parameters" in capsys.readouterr().out
    assert not gpu
    assert not list(tmp_path.iterdir())


def test_the_state_of_the_gpu_is_read_under_either_name_of_its_throttle_reasons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="12-34"))

    def run(command: list[str], **_options: object) -> SimpleNamespace:
        if "clocks_event_reasons.active" in command[2]:
            raise subprocess.CalledProcessError(2, command)
        assert command[1] == "--id=GPU-12-34"
        return SimpleNamespace(stdout="1980 MHz, 1980 MHz, 652.31 W, 48, 0x0000000000000000\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert kernels.gpu_state("after") == {
        "when": "after",
        "clocks.sm": "1980 MHz",
        "clocks.max.sm": "1980 MHz",
        "power.draw": "652.31 W",
        "temperature.gpu": "48",
        "throttle reasons": "0x0000000000000000",
    }
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: Path("/absent").read_text())
    assert kernels.gpu_state("after") == {"when": "after", "nvidia-smi": "absent"}


def test_a_knob_is_turned_while_its_kernel_is_prepared_and_back_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_sweep, "interleave", lambda timed, rounds: {name: [1e-6] for name in timed})
    turned: list[tuple[int, dict[str, int]]] = []

    class Watches(HostClock):
        def prepare(self, calls: Sequence[Call], restore: Call | None) -> Timed:
            turned.append((KNOB, {**KNOBS}))
            return super().prepare(calls, restore)

    operator = operator_of(twice, knobs={f"{HERE}:KNOB": (1, 3), f"{HERE}:KNOBS": ({"a": 2}, {"b": 5})})
    odd = Sizes({"M": 5, "d": 8}, (FORWARD,), with_peers=False)
    cases = [Case(operator, Sizes({"M": 4, "d": 8}, (FORWARD,))), Case(operator, odd)]
    table = kernel_sweep.sweep(cases, Watches(), "cpu", Budget(1e9), EFFORT)
    settings = ["KNOB = 1 (now)", "KNOB = 3", "KNOBS = {'a': 2} (now)", "KNOBS = {'b': 5}"]
    assert [line["setting"] for line in table.records()] == settings
    assert table.records()[0]["shape"] == "M=4 d=8"
    before = {"a": 2, "b": 3}
    assert turned == [(1, before), (3, before), (1, before), (1, {"a": 2, "b": 5})]
    after = (KNOB, KNOBS)
    assert after == (1, before)


KNOB = 1
KNOBS = {"a": 2, "b": 3}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_knob_is_a_constant_of_its_kernel_and_its_value_is_among_those_tried(operator: Operator):
    for target, values in operator.knobs.items():
        now = pkgutil.resolve_name(target)
        assert any(kernel_sweep.with_value(now, value) == now for value in values), target


# --- Shapes.


def test_the_first_cases_are_one_shape_of_each_operator():
    cases = kernel_cases.default_cases()
    assert {case.operator.name for case in cases[: len(OPERATORS)]} == {operator.name for operator in OPERATORS}
    assert kernel_cases.full_cases()[: len(cases)] == cases
    assert len(kernel_cases.full_cases()) > 100


def test_the_default_shapes_pass_two_to_the_31_logits_and_have_odd_sizes():
    shapes = [case.sizes.shape for case in kernel_cases.default_cases()]
    assert any(shape["M"] * shape.get("V", 0) > 2**31 for shape in shapes)
    assert any(shape["M"] % 2 for shape in shapes)
    assert any(shape.get("d") == 2_056 for shape in shapes)


def test_bytes_are_counted_as_the_documents_of_the_kernels_say():
    def row_of(operator: Operator, phase: Phase) -> int | None:
        return Row(Case(operator, operator.sizes[0]), phase, {}).moved_bytes

    matrix = 2 * 16_384 * 2_048
    assert row_of(RMS_NORM, FORWARD) == 2 * matrix
    assert row_of(RMS_NORM, BACKWARD) == 3 * matrix
    assert row_of(kernel_cases.ADD_RMS_NORM, BOTH) == 8 * matrix
    assert row_of(kernel_cases.SWIGLU, BACKWARD) == 5 * 2 * 16_384 * 5_632
    assert row_of(kernel_cases.CROSS_ENTROPY, BOTH) == 4 * 16_384 * 32_000
    assert row_of(kernel_cases.ROPE, FORWARD) == 2 * 2 * 16_384 * 36 * 64
    assert row_of(kernel_cases.ROPE_PACKED, FORWARD) == 2 * 2 * 16_384 * 40 * 64
    assert row_of(kernel_cases.LINEAR_CROSS_ENTROPY, BOTH) is None


# --- Goals.


def timed_row(operator: Operator, phase: Phase, shape: dict[str, int], **durations_s: float | str) -> Row:
    cells = {
        name.replace("_", " "): Cell(value) if isinstance(value, str) else Cell(seconds=[value] * 3)
        for name, value in durations_s.items()
    }
    return Row(Case(operator, Sizes(shape)), phase, cells)


def goal_lines(rows: Sequence[Row], key: str) -> dict[str, dict]:
    return {line["what"]: line for line in goals_table(rows, CEILINGS).records() if line["goal"] == key}


def test_a_goal_is_judged_at_its_worst_large_shape():
    large = {"M": 16_384, "d": 32_768}  # 2 GiB: the ceiling's last size and beyond, 3 TB/s
    moved = 4 * 16_384 * 32_768
    rows = [
        timed_row(RMS_NORM, FORWARD, large, ours=moved / 3e12 / 0.95),
        timed_row(RMS_NORM, FORWARD, {**large, "M": 32_768}, ours=2 * moved / 3e12 / 0.93),
        timed_row(RMS_NORM, FORWARD, {**large, "M": 4_097}, ours=1.0),
        timed_row(RMS_NORM, BACKWARD, large, ours=1.0),
    ]
    (line,) = [line for text, line in goal_lines(rows, "K1").items() if text.startswith("RMSNorm")]
    assert line["measured"] == pytest.approx(0.93)
    assert line["verdict"] == PASS
    assert line["worst at"] == "rms_norm fwd M=32768 d=32768"
    (line,) = [line for text, line in goal_lines(rows, "K1").items() if text.startswith("add")]
    assert (line["measured"], line["verdict"]) == (None, NOT_MEASURED)


def test_a_missed_goal_says_so():
    shape = {"M": 16_384, "d": 2_048}
    row = timed_row(kernel_cases.ADD_RMS_NORM, BACKWARD, shape, ours=1.0, **{COMPILED: 1.8})
    line = goal_lines([row], "K2")["add + RMSNorm backward, x torch.compile"]
    assert (line["measured"], line["verdict"]) == (pytest.approx(1.8), MISSED)


def test_a_wrong_kernel_and_an_absent_peer_leave_a_goal_unmeasured():
    shape = {"M": 16_384, "V": 32_000}
    wrong = timed_row(kernel_cases.CROSS_ENTROPY, BOTH, shape, ours=FAIL, Liger=1.0)
    absent = timed_row(kernel_cases.CROSS_ENTROPY, BOTH, shape, ours=1.0, Liger=ABSENT)
    for row in (wrong, absent):
        assert goal_lines([row], "K5")["cross-entropy with gradient, x Liger"]["verdict"] == NOT_MEASURED


def test_bounds_from_above_take_the_largest_value():
    shape = {"M": 16_384, "F": 5_632}
    rows = [
        timed_row(kernel_cases.SWIGLU, FORWARD, shape, ours=1.0, **{OURS_COMPILED: 1.02}),
        timed_row(kernel_cases.SWIGLU, BACKWARD, shape, ours=1.0, **{OURS_COMPILED: 1.04}),
    ]
    line = goal_lines(rows, "K9")["inside torch.compile(fullgraph), of alone"]
    assert (line["measured"], line["verdict"]) == (pytest.approx(1.04), MISSED)
    for row in rows:
        row.cells[OURS_COMPILED].recompiles = 0
    assert goal_lines(rows, "K9")["recompilations after the warm-up"]["verdict"] == PASS


def test_the_linear_loss_is_judged_by_operations_memory_and_the_weights_gradient():
    shape = {"M": 16_384, "V": 32_000, "d": 2_048}
    row = timed_row(kernel_cases.LINEAR_CROSS_ENTROPY, BOTH, shape, ours=1e-2, **{EAGER: 2e-2})
    row.cells[OURS].peak_bytes, row.cells[EAGER].peak_bytes = 10, 100
    errors, eager = {"loss": 0.0, "dhidden": 0.1, "dhead": 0.02}, {"loss": 0.0, "dhidden": 0.1, "dhead": 0.01}
    row.cells[OURS].verdict = Verdict(errors, eager, "dhead", is_right=True)
    assert of_matmul(row, CEILINGS) == pytest.approx(6 * 16_384 * 32_000 * 2_048 / 1e-2 / 7e14)
    assert of_copy(row, CEILINGS) is None
    lines = goal_lines([row], "K6")
    assert lines["linear + cross-entropy, memory of eager"]["measured"] == pytest.approx(0.1)
    assert lines["linear + cross-entropy, dW error of eager's"]["verdict"] == MISSED


def test_logits_past_the_range_of_int32_have_to_be_right():
    what = "cross-entropy right past 2^31 logits (1 = yes)"
    for num_rows, is_right, expected in ((16_384, True, NOT_MEASURED), (17_000, True, PASS), (17_000, False, MISSED)):
        row = timed_row(kernel_cases.CROSS_ENTROPY, BOTH, {"M": num_rows, "V": 128_256}, ours=1.0)
        row.cells[OURS].verdict = Verdict({"loss": 0.0}, {"loss": 0.0}, "loss", is_right)
        assert goal_lines([row], "K5")[what]["verdict"] == expected


# --- Tables.


def test_a_table_whose_kernel_differs_from_itself_is_marked():
    quiet = timed_row(RMS_NORM, FORWARD, {"M": 16_384, "d": 2_048}, ours=1.0, ours_again=1.005)
    noisy = timed_row(RMS_NORM, BACKWARD, {"M": 16_384, "d": 2_048}, ours=1.0, ours_again=1.02)
    titles = [next(iter(operator_tables(rows, CEILINGS))).title for rows in ([quiet], [quiet, noisy])]
    assert ["NOISY" in title for title in titles] == [False, True]


def test_ratios_stand_beside_the_times_of_others():
    row = timed_row(RMS_NORM, FORWARD, {"M": 16_384, "d": 2_048}, ours=1e-5, Liger=2e-5, quack=FAIL)
    row.cells["Liger"].how = "events"
    _, beside = operator_tables([row], CEILINGS)
    (line,) = beside.records()
    assert line["Liger"] == "20.0* = 2.00 (2.00-2.00)x"
    assert (line["ours"], line["quack"]) == ("10.0", FAIL)


def test_records_hold_what_tables_leave_out():
    row = timed_row(RMS_NORM, FORWARD, {"M": 16_384, "d": 2_048}, ours=1e-4, Liger=2e-4)
    (record,) = records([row], CEILINGS)
    assert record["bytes"] == 4 * 16_384 * 2_048
    assert record["providers"]["Liger"]["times_ours"] == [2.0, 2.0, 2.0]
    assert json.loads(json.dumps(record)) == record


def test_nothing_measured_draws_nothing(tmp_path: Path):
    draw([], CEILINGS, "no device", tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())

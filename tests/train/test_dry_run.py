"""What a dry run says of time, cost, memory and sizes, on devices that need not be here."""

import dataclasses
import json
from pathlib import Path

import pytest

from data_prep.config_file import ConfigError
from model.config import ModelConfig
from model.flops import flops_per_token, num_params
from tests.prepared import write_data
from tests.runs import TINY, tiny_run
from train import advice, cost, dry_run, plan, pretrain
from train.config import RunConfig, with_values
from train.cost import GPUS, PlanOptions, speed_of, split_flags
from train.dry_run import Target, most_sequences
from train.exits import BAD_CONFIG
from train.fake_memory import step_memory

H100 = GPUS["h100"]


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Flags of a tiny run whose data is not there."""
    flags = {"run.dir": tmp_path / "run", "data.paths": "nowhere", "data.sequence-length": 32, "run.num-steps": 100}
    shape = {f"model.{key.replace('_', '-')}": getattr(TINY, key) for key in (
        "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size",
    )}  # fmt: skip
    return [word for key, value in (flags | shape).items() for word in (f"--{key}", str(value))]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and output of a dry run."""
    capsys.readouterr()
    code = pretrain.main([*arguments, "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path: Path, capsys):
    code, text = planned(capsys, *tiny, "--parallel.device", "cpu")
    assert code == 0
    assert f"parameters         {num_params(TINY):,}" in text
    assert "32,768 per step, 3,276,800 in all" in text
    assert "nowhere: not prepared yet" in text
    assert 'schedule = "cosine"' in text
    assert "at the peak of a step, on fake tensors" in text
    assert "advice: batch: 32.8 k tokens; 3.05 k by Step Law" in text
    assert "note: optim.warmup_steps = 500 is the whole run" in text
    assert not (tmp_path / "run").exists()


def test_the_plan_of_prepared_data_says_what_each_source_gives(tmp_path: Path, capsys):
    config = tiny_run(write_data(tmp_path / "data"), tmp_path / "run")
    dry_run.dry_run(config, PlanOptions())
    text = capsys.readouterr().out
    assert "the data of a run that begins here, from step 0 to 6" in text
    assert "samples per epoch" in text


def test_time_and_cost_follow_from_the_gpus_their_price_and_the_mfu(tiny, capsys):
    code, text = planned(capsys, *tiny, "--gpus", "8xH100", "--gpu-price", "2.5", "--assume-mfu=0.5")
    flops = flops_per_token(TINY, 32)
    device_hours = 3_276_800 * flops / (0.5 * 989e12) / 3600
    assert code == 0
    assert "8 x NVIDIA H100 80GB HBM3, 8 micro-batches per step each, torch.bfloat16" in text
    assert f"{8 * 0.5 * 989e12 / flops:,.0f} tokens/s" in text
    assert "MFU 0.50 ASSUMED by --assume-mfu" in text
    assert f"{device_hours:,.4g} device-hours" in text
    assert f"{device_hours * 2.5:,.2f} at 2.5" in text
    assert "fits up to --data.micro-batch-sequences 128" in text  # a device's whole share


def test_gpus_of_an_unknown_kind_are_counted_by_the_environment(tiny, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(plan, "device_memory_bytes", lambda *_: 1)  # what is here does not matter
    code, text = planned(capsys, *tiny)
    assert code == 0
    assert "8, 8 micro-batches per step each, torch.bfloat16" in text
    assert "time               not known" in text
    assert planned(capsys, *tiny, "--parallel.replicas", "3")[0] == BAD_CONFIG


def test_a_run_that_does_not_fit_the_gpus_is_refused_after_the_plan(tiny, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(GPUS, "h100", dataclasses.replace(H100, memory_bytes=plan.RESERVE_BYTES + 1_000_000))
    code, text = planned(capsys, *tiny, "--gpus", "8xh100")
    assert code == BAD_CONFIG
    assert "fits up to --data.micro-batch-sequences 12" in text
    assert text.splitlines()[-1].startswith("error: one step takes 1.00 GiB of 1.00 GiB; lower --data.micro-batch")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8h100"], "expected NUMBERxNAME, as 8xH100; names are a100"),
        (["--gpus", "0xh100"], "expected NUMBERxNAME"),
        (["--gpus", "8xh1000"], "expected NUMBERxNAME"),
        (["--gpu-price", "-1"], "--gpu-price -1.0: must not be negative"),
        (["--assume-mfu", "40"], "must be above 0, and 1 at most; 0.4 is 40 %"),
        (["--gpu-price", "1", "--gpu-price", "2"], "--gpu-price is given twice"),
    ],
    ids=str,
)
def test_options_that_plan_nothing_are_refused_in_one_line(tiny, capsys, flags: list[str], message: str):
    code, text = planned(capsys, *tiny, *flags)
    assert code == BAD_CONFIG
    assert message in text
    assert text.count("\n") == 1


def test_options_of_the_dry_run_start_no_run(tiny, capsys):
    assert pretrain.main([*tiny, "--gpus", "8xh100"]) == BAD_CONFIG
    assert "add --dry-run" in capsys.readouterr().err


def test_flags_are_parted_whichever_way_their_values_are_written():
    own, others = split_flags(["a.toml", "--gpus", "8xh100", "--optim.peak-lr", "1", "--assume_mfu=0.3", "--gpu-price"])
    assert own == ["--gpus", "8xh100", "--assume_mfu=0.3", "--gpu-price"]
    assert others == ["a.toml", "--optim.peak-lr", "1"]


def test_a_measured_mfu_is_taken_before_an_assumed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def mfu_of(config: RunConfig) -> tuple[float, str]:
        speed = speed_of(config, H100, PlanOptions(), is_bf16=True)
        assert speed is not None
        return speed.tokens_per_s * flops_per_token(config.model, config.data.sequence_length) / 989e12, speed.source

    monkeypatch.setattr(cost, "_MEASURED", tmp_path)
    assert mfu_of(RunConfig())[0] == pytest.approx(cost.ASSUMED_MFU)
    rows = [{"key": "eager", "mfu": 0.3}, {"key": "ours", "mfu": 0.55}]
    for device in ("CPU", H100.name):
        results = {"environment": {"device": device}, "rows": rows if device == H100.name else rows[:1]}
        (tmp_path / f"{device[:3]}-step.json").write_text(json.dumps(results))
    mfu, source = mfu_of(RunConfig())
    assert mfu == pytest.approx(0.55)
    assert "measured, benchmarks/results/NVI-step.json" in source


def test_a_device_without_a_peak_is_as_fast_as_the_run_was(tmp_path: Path):
    config = with_values(RunConfig(), run={"dir": str(tmp_path)})
    assert speed_of(config, None, PlanOptions(), is_bf16=False) is None
    lines = [json.dumps({"step": step, "tokens_per_s_per_device": speed}) for step, speed in enumerate((1, 50, 60))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    speed = speed_of(config, None, PlanOptions(), is_bf16=False)
    assert speed is not None
    assert speed.tokens_per_s == 50


def test_the_largest_micro_batch_that_is_said_to_fit_does(tmp_path: Path):
    data = {"micro_batch_sequences": 2, "batch_sequences": 400}
    config = tiny_run(tmp_path / "nowhere", tmp_path / "run", data=data)
    target = Target("cpu", 1, None, plan.RESERVE_BYTES + 10_000_000, is_elsewhere=True)
    most = most_sequences(config, target, sum(step_memory(config, "cpu", 1).values()))

    def taken(sequences: int) -> int:
        wanted = with_values(config, data={"micro_batch_sequences": sequences, "batch_sequences": 2 * sequences})
        return sum(step_memory(wanted, "cpu", 1).values())

    assert 32 < most < 400  # more rows than a chunk of logits has
    assert taken(most) <= 10_000_000 < taken(most + 1)


def test_the_laws_give_what_their_authors_trained_with():
    # DeepSeek LLM, table 2: 7B with 4.2e-4 and 2304 x 4096 tokens, 67B with 3.2e-4 and 4608 x 4096, both 2 T tokens.
    seven = ModelConfig(
        vocab_size=102_400, hidden_size=4_096, num_layers=30, num_heads=32, num_kv_heads=32, head_size=128,
        ffn_size=11_008,
    )  # fmt: skip
    sixty_seven = dataclasses.replace(
        seven, hidden_size=8_192, num_layers=95, num_heads=64, num_kv_heads=8, ffn_size=22_016
    )
    for model, batch, rate in ((seven, 2_304 * 4_096, 4.2e-4), (sixty_seven, 4_608 * 4_096, 3.2e-4)):
        said_batch, said_rate = advice.deepseek_law(model, 4_096, 2e12)
        assert said_batch == pytest.approx(batch, rel=0.1)
        assert said_rate == pytest.approx(rate, rel=0.05)


def test_advice_names_what_is_far_off():
    usual = advice.advice(with_values(RunConfig(), run={"num_steps": 100_000}))
    assert not any(word in line for line in usual for word in ("NOT", "TIMES", "MORE", "NONE"))
    odd = with_values(RunConfig(), optim={"peak_lr": 1e-2, "warmup_steps": 0}, data={"batch_sequences": 64})
    text = "\n".join(advice.advice(odd))
    assert "WHICH THIS IS NOT" in text
    assert "TIMES THE HIGHEST of them" in text
    assert "NONE, the first steps" in text
    late = with_values(RunConfig(), optim={"peak_lr": 1e-5, "warmup_steps": 5_000})
    text = "\n".join(advice.advice(late))
    assert "TIMES BELOW THE LOWEST of them" in text
    assert "MORE THAN 20% of the run" in text


def test_no_advice_for_pretraining_is_given_to_a_model_that_is_already_trained(tiny, tmp_path: Path, capsys):
    with pytest.raises(ConfigError, match="replicas"):
        dry_run.dry_run(with_values(RunConfig(), parallel={"replicas": 3}), PlanOptions(gpus="8xh100"))
    config = tiny_run(tmp_path / "nowhere", tmp_path / "run", run={"init_from": "somewhere"})
    dry_run.dry_run(config, PlanOptions())
    assert "advice: " not in capsys.readouterr().out

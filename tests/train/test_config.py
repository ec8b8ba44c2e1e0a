import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.config_file import ConfigError, keys, load, parse, to_toml
from model.config import ModelConfig
from train.config import CHANGEABLE_ON_RESUME, RunConfig, refuse_changes, with_values
from train.recipes import DpoConfig, SftConfig

ROOT = Path(__file__).parents[2]
RUN_CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.toml")) if not path.name.startswith("prepare-")]

TUNED = {"world-sft": SftConfig, "world-dpo": DpoConfig}


def parsed(*arguments: str) -> RunConfig:
    return parse(RunConfig, arguments, prog="pretrain")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.name)
def test_every_run_config_loads_and_its_model_preset_exists(path: Path):
    assert load(path, TUNED.get(path.stem, RunConfig)).model.num_layers > 0


def test_the_defaults_are_the_1b_run():
    assert parsed().model == ModelConfig.preset("tinyllama-1.1b")
    assert parsed().data.paths == ("data/default",)


def test_a_config_written_and_read_back_is_equal(tmp_path: Path):
    config = with_values(parsed(), run={"allow_changes": ("optim.peak_lr",)}, optim={"peak_lr": 1e-5})
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load(path, RunConfig) == config


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[optim]\npeak_lr = 1e-3\nwarmup_steps = 7\n[data]\nsequence_length = 64\n"
        '[model]\npreset = "smoke"\nnum_layers = 2\n'
    )
    config = parsed(str(path), "--optim.peak-lr", "2e-3")
    assert (config.optim.peak_lr, config.optim.warmup_steps, config.optim.beta1) == (2e-3, 7, 0.9)
    assert config.model == dataclasses.replace(ModelConfig.preset("smoke"), num_layers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\npeak_rl = 1.0\n", r"unknown key 'optim\.peak_rl'; did you mean 'optim\.peak_lr'"),
        ("[data]\nsequence_length = 1.5\n", r"data\.sequence_length = 1\.5: expected int, found float"),
        ("[run]\nnum_steps = true\n", r"run\.num_steps = True: expected int"),
        ('[optim]\nschedule = "linear"\n', r"optim\.schedule = 'linear': expected one of 'cosine'"),
        ('[model]\npreset = "gpt5"\n', r"model\.preset = 'gpt5': known presets are tinyllama-1\.1b"),
        ("[model]\nnum_heads = 6\n", r"num_heads = 6 is not a multiple of model\.num_kv_heads = 4"),
        ("[run]\nnum_steps = 0\n", r"run\.num_steps = 0: must be positive"),
        ("[data]\nsequence_length = 4096\n", r"exceeds model\.context_length = 2048"),
        ('[run]\nallow_changes = ["optim.lr"]\n', r"names 'optim\.lr', which is no key"),
        ("run = 3\n", r"run = 3: expected a table"),
        ("[run\n", r"not a TOML file"),
        ("[run]\nseed = 1\nseed = 2\n", r"not a TOML file"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot read"):
        parsed("nowhere.toml")


def test_unknown_and_repeated_flags_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown flag --optim.peak-rl; did you mean '--optim.peak-lr'"):
        parsed("--optim.peak-rl", "1")
    with pytest.raises(ConfigError, match="--run.seed is given twice"):
        parsed("--run.seed", "1", "--run.seed", "2")


def test_a_batch_that_does_not_split_has_a_last_micro_batch_with_empty_rows():
    config = with_values(parsed(), data={"batch_sequences": 12, "micro_batch_sequences": 5})
    assert [config.num_micro_batches(n) for n in (1, 2, 3, 5)] == [3, 2, 1, 1]
    assert with_values(config, data={"micro_batch_sequences": 3}).num_micro_batches(2) == 2


def test_groups_are_whole_samples_and_steps_whole_groups():
    assert with_values(parsed(), data={"group_tokens": 8_192}).data.group_tokens == 8_192
    for tokens in (1_024, 3_000, 3 * 2_048):
        with pytest.raises(ConfigError, match=rf"data\.group_tokens = {tokens}: must be a multiple"):
            with_values(parsed(), data={"group_tokens": tokens})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mixture", ("web=0.5 web=0.5",), "each source once"),
        ("mixture", ("web=-1",), "weights >= 0"),
        ("mixture", ("web=0",), "no source has a weight above 0"),
        ("mixture", ("5e9: web=1",), r"begins at \[5000000000\] tokens"),
        ("mixture", ("web=1", "many: web=2"), "'many' is no number of tokens"),
        ("max_epochs", ("web=0",), "at least 1"),
        ("max_epochs", ("2", "3"), "each once"),
        ("paths", (), r"data\.paths is empty"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(key: str, value: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        with_values(parsed(), data={key: value})


def test_a_resumed_config_may_differ_only_where_documented():
    stored = parsed()
    refuse_changes(with_values(stored, run={"num_steps": 7}, parallel={"compile": "off"}), stored)
    changed = with_values(stored, optim={"peak_lr": 1e-5}, data={"batch_sequences": 64})
    with pytest.raises(
        ConfigError, match=r"data\.batch_sequences = 64, the checkpoint has 1024; optim\.peak_lr = 1e-05"
    ):
        refuse_changes(changed, stored)
    refuse_changes(with_values(changed, run={"allow_changes": ("optim.peak_lr", "data.batch_sequences")}), stored)


def test_the_documents_list_the_keys_that_may_change():
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    assert [name for name in keys(RunConfig) if f"`{name}`" in text] == [
        name for name in keys(RunConfig) if name in CHANGEABLE_ON_RESUME
    ]


def test_each_key_says_what_it_is():
    shown = subprocess.run(
        [sys.executable, "train/pretrain.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in keys(RunConfig):
        assert f"--{name.replace('_', '-')} " in shown


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom train.pretrain import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

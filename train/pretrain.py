"""Pretrains a language model.

    torchrun --nproc_per_node=8 train/pretrain.py [configs/run.toml] [--section.key value ...]
    python train/pretrain.py configs/smoke.toml                           one device, CPU or GPU
    python train/pretrain.py --dry-run                                    what would be computed, held and written
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=host:29400 train/pretrain.py

In a TOML file, [model] preset = "tinyllama-1.1b", "steel-1b" or "smoke" sets the keys of the model that it does not.

A run continues from the newest checkpoint in run.dir. SIGTERM or SIGINT, to this process or to torchrun, stops it at
the next step boundary, after a checkpoint; so does SIGUSR1 to this process (torchrun dies of it).
Exit codes of this process: 0 done, 65 bad data, 70 loss not finite, 73 cannot write, 75 stopped and saved, 78 bad
config or checkpoint. torchrun turns all but 0 into 1.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.config_file import ConfigError, parse
from train.config import RunConfig

if TYPE_CHECKING:
    from train.ranks import Ranks

BAD_DATA, NOT_FINITE, CANNOT_WRITE, BAD_CONFIG = 65, 70, 73, 78


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        wanted = [argument for argument in arguments if argument != "--dry-run"]
        config = parse(RunConfig, wanted, prog="train/pretrain.py [--dry-run]", description=__doc__)
    except ConfigError as error:
        return _fail(error, BAD_CONFIG)
    # After parsing: --help and a mistyped key should not wait for torch.
    from data_prep.manifest import ManifestError
    from data_prep.shards import ShardError
    from data_prep.tokenizer import TokenizerError
    from model.convert import ConvertError
    from resume.checkpoint import CheckpointError, SaveError
    from resume.manifest import DataError
    from train.loop import NotFiniteError

    try:
        return dry_run(config) if "--dry-run" in arguments else pretrain(config)
    except (DataError, ManifestError, ShardError, TokenizerError) as error:
        return _fail(error, BAD_DATA)
    except SaveError as error:
        return _fail(error, CANNOT_WRITE)
    except (ConfigError, CheckpointError, ConvertError) as error:
        return _fail(error, BAD_CONFIG)
    except OSError as error:
        return _fail(error, CANNOT_WRITE)
    except NotFiniteError as error:
        return _fail(error, NOT_FINITE)


def dry_run(config: RunConfig) -> int:
    """Prints the plan; fails if it cannot fit here.

    With WORLD_SIZE=8 in the environment, and no torchrun, it plans for eight devices elsewhere: GPUs unless
    parallel.device is cpu, whose memory is then not known.
    """
    import torch

    from data_prep.manifest import ManifestError, merged, read_manifest
    from resume.manifest import listed_files
    from resume.report import plan as resume_plan
    from resume.report import plan_tables
    from train import plan
    from train.feed import fresh_state

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    is_elsewhere = "WORLD_SIZE" in os.environ and "RANK" not in os.environ
    has_gpus = torch.cuda.is_available() or is_elsewhere
    device_type = (
        "cuda" if config.parallel.device == "cuda" or (config.parallel.device == "auto" and has_gpus) else "cpu"
    )
    try:
        folders = {Path(path): read_manifest(Path(path)) for path in config.data.paths}
    except ManifestError:
        folders, manifest = {}, None
    else:
        manifest = merged(folders)
        config.check_vocabulary(manifest.vocab_size)
    if int(os.environ.get("RANK", "0")) == 0:
        print(plan.describe(config, manifest, device_type, world_size))
        for note in plan.notes(config, manifest, world_size):
            print(f"note: {note}")
        if manifest is not None:
            state = fresh_state(config, manifest, listed_files(folders, "train"))
            print("\nthe data of a run that begins here, " + plan_tables(resume_plan(state, config.run.num_steps)))
    if is_elsewhere:
        plan.refuse_uneven(config, world_size)
    else:
        plan.refuse_impossible(config, device_type, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return 0


def pretrain(config: RunConfig) -> int:
    """Trains, or goes on training, and returns the exit code."""
    from train import plan, ranks

    this = ranks.start(config.parallel.device)
    try:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        plan.refuse_impossible(config, this.device.type, this.world_size, local_world_size)
        code = _pretrain(config, this)
    except BaseException:
        # Peers may wait in a collective that this rank will never join, and leaving the group would wait for them:
        # the process just ends, with its message, and the launcher ends the others.
        if this.world_size == 1:
            ranks.stop()
        raise
    ranks.stop()
    return code


def _pretrain(config: RunConfig, ranks: "Ranks") -> int:
    from evaluation.report import write_report
    from train.assemble import open_data, open_run
    from train.loop import train
    from train.signals import STOPPED

    data = open_data(config, show_progress=ranks.is_first)
    with open_run(config, data, ranks) as (trainer, progress):
        finished = train(trainer, progress)
        if finished.step < config.run.num_steps and not trainer.feed.has_ended:
            if trainer.log is not None:
                trainer.log.note(f"stopped at step {finished.step}; the same command goes on from there")
            return STOPPED
    if ranks.is_first:
        try:
            print(f"report: {write_report(Path(config.run.dir))}")
        except ValueError as error:  # the run is done and saved all the same
            print(f"no report: {error}")
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

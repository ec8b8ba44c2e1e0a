"""Pretrains a language model.

    torchrun --nproc_per_node=8 train/pretrain.py [configs/run.toml] [--section.key value ...]
    python train/pretrain.py configs/smoke.toml                           one device, CPU or GPU
    python train/pretrain.py --dry-run                                    what would be computed, held and written
    python train/pretrain.py --dry-run --gpus 8xH100 --gpu-price 2.5      the same on GPUs elsewhere: time and cost
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=host:29400 train/pretrain.py

In a TOML file, [model] preset = "tinyllama-1.1b", "steel-1b", "smoke", or, with experts, "moe-1b-active", "moe-smoke",
"deepseek-smoke", sets the keys of the model that it does not.

A run continues from the newest good checkpoint in run.dir. SIGTERM, SIGINT, SIGHUP or SIGUSR1, to a process or to
torchrun (SIGUSR1 with torchrun --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1), stops it at the next step
boundary, after a checkpoint.
Exit codes: 0 done, 65 bad data, 70 loss not finite or the same failure thrice, 71 a rank lost or hung, 73 cannot write,
75 stopped and saved, 78 bad config or checkpoint. torchrun turns all but 0 into 1: run.dir/exit.json has the code.
"""

import contextlib
import faulthandler
import gc
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.config_file import ConfigError, parse
from train.config import RunConfig
from train.cost import PlanOptions, split_flags
from train.exits import (
    BAD_CONFIG,
    BAD_DATA,
    BUG,
    CANNOT_WRITE,
    DONE,
    LOST_RANK,
    NOT_FINITE,
    STOPPED,
    RepeatedFailureError,
    begin_life,
    record_end,
)
from train.watch import LostRankError

if TYPE_CHECKING:
    from train.assemble import Data
    from train.loop import RollBackError
    from train.ranks import Ranks
    from train.signals import StopRequest
    from train.watch import Watch


def main(
    argv: Sequence[str] | None = None,
    config_type: type[RunConfig] = RunConfig,
    script: str = "train/pretrain.py",
    description: str | None = __doc__,
) -> int:
    """Runs the command line of a kind of training and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        own, wanted = split_flags([argument for argument in arguments if argument != "--dry-run"])
        if own and "--dry-run" not in arguments:
            raise ConfigError(f"{own[0]} belongs to the dry run; add --dry-run, or leave it out")
        options = parse(PlanOptions, own, prog=f"{script} --dry-run")
        config = parse(config_type, wanted, prog=f"{script} [--dry-run]", description=description)
    except ConfigError as error:
        return _fail(error, BAD_CONFIG)
    # After parsing: --help and a mistyped key should not wait for torch.
    try:
        from train.resolve import resolved

        config = resolved(config)
        return dry_run(config, options) if "--dry-run" in arguments else pretrain(config)
    except Exception as error:
        if (code := exit_code(error)) == BUG:
            raise
        return _fail(error, code)


def exit_code(error: BaseException) -> int:
    """The exit code that says what kind of error ended a run."""
    from data_prep.chat.chat_format import ChatFormatError
    from data_prep.manifest import ManifestError
    from data_prep.shards import ShardError
    from data_prep.teacher_file import TeacherFileError
    from data_prep.tokenizing.tokenizer import TokenizerError
    from evaluation.model_folder import ModelFolderError
    from evaluation.sampling import GenerationError
    from kernels.launch import KernelError
    from model.convert import ConvertError
    from model.moe_config import ModelConfigError
    from model.upcycle import UpcycleError
    from resume.checkpoint import CheckpointError, SaveError
    from resume.manifest import DataError
    from train.lock import LockedError
    from train.loop import NotFiniteError

    codes: dict[tuple[type[BaseException], ...], int] = {
        (DataError, ManifestError, ShardError, TokenizerError, ChatFormatError, TeacherFileError): BAD_DATA,
        (SaveError, LockedError, OSError): CANNOT_WRITE,
        (ConfigError, ModelConfigError, KernelError, CheckpointError, UpcycleError): BAD_CONFIG,
        (ConvertError, ModelFolderError, GenerationError): BAD_CONFIG,
        (NotFiniteError, RepeatedFailureError): NOT_FINITE,
        (LostRankError,): LOST_RANK,
    }
    return next((code for kinds, code in codes.items() if isinstance(error, kinds)), BUG)


def dry_run(config: RunConfig, options: PlanOptions) -> int:
    """Prints the plan; fails if it cannot fit.

    With --gpus 8xH100 it plans for GPUs elsewhere. With WORLD_SIZE=8 in the environment, and no torchrun, for eight
    devices elsewhere: GPUs unless parallel.device is cpu, whose memory and speed are then not known.
    """
    from train import dry_run

    dry_run.dry_run(config, options)
    return 0


def pretrain(config: RunConfig) -> int:
    """Trains, or goes on training, and returns the exit code.

    Raises:
        LockedError: another process trains in the run folder.
        RepeatedFailureError: the last lives of the run failed at one step.
        Exception: what else ends a run; the run folder's exit.json names it.
    """
    from data_prep import publish
    from resume import requests
    from train.lock import RunLock

    run, is_first = Path(config.run.dir), os.environ.get("RANK", "0") == "0"
    with RunLock(run) if is_first else contextlib.nullcontext():
        if is_first:
            begin_life(run)
            for folder in (run, run / requests.FOLDER):  # what a kill left of small files that were being written
                publish.remove_leftovers(folder)
        return _live(config)


def _live(config: RunConfig) -> int:
    """One life of a run, from the launch to its end."""
    from train import ranks
    from train.signals import StopRequest
    from train.watch import Watch

    run = Path(config.run.dir)
    # Before anything listens to signals: one that comes while a rank waits for its peers must end it.
    try:
        this = ranks.start(config.parallel.device)
        life = this.from_first(lambda: secrets.token_hex(8))
    except Exception as error:
        rank = int(os.environ.get("RANK", "0"))
        if ranks.is_lost_connection(error):
            words = str(error).partition("\n")[0]
            error = LostRankError(rank, f"a rank was lost while they joined: {words}")
        record_end(run, exit_code(error), rank=rank, step=0, cause=_cause(error))
        raise error
    watch = Watch(run, life=life, rank=this.rank, world_size=this.world_size, timeout_s=config.run.hang_timeout_s)
    with StopRequest() as stop, watch:
        try:
            this.together(watch.refuse_unshared)
            code, step = _pretrain(config, this, watch, stop)
            cause = "done" if code == DONE else "told to stop"
            # All wait for it: a launcher that sees one rank end may end the others.
            this.from_first(lambda: record_end(run, code, rank=0, step=step, cause=cause, life=life))
        except BaseException as error:
            if this.world_size > 1 and ranks.is_lost_connection(error):
                lost = watch.blame(error)
                watch.record(lost)
                raise lost from error
            if not isinstance(error.__cause__, ranks.ElsewhereError):  # else the rank that met it tells of it
                record_end(run, exit_code(error), rank=this.rank, step=watch.step, cause=_cause(error), life=life)
            # Peers may wait in a collective that this rank will never join, and leaving the group would wait for them:
            # the process just ends, with its message, and the launcher ends the others.
            if this.world_size == 1:
                ranks.stop()
            raise
        ranks.stop()
        return code


def _pretrain(config: RunConfig, ranks: "Ranks", watch: "Watch", stop: "StopRequest") -> tuple[int, int]:
    """Exit code and last step of a life."""
    from evaluation.report import write_report
    from train import plan, setups
    from train.assemble import open_data, starting_model
    from train.loop import RollBackError

    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    plan.refuse_impossible(config, ranks.device.type, ranks.world_size, local_world_size)
    data = open_data(config, show_progress=ranks.is_first)
    setups.prepare(config, data, ranks, lambda: starting_model(config, ranks), watch)
    gc.collect()
    while True:
        try:
            code, step = _attempt(config, data, ranks, watch, stop)
            break
        except RollBackError as back:
            _queue_skip(config, ranks, back)
        gc.collect()  # FSDP's modules are part of cycles: the old ones would be held beside the new ones
    if code == STOPPED:
        return code, step
    watch.at("start", step)  # a report may take longer than a step may
    if ranks.is_first:
        try:
            print(f"report: {write_report(Path(config.run.dir))}")
        except ValueError as error:  # the run is done and saved all the same
            print(f"no report: {error}")
    return code, step


def _attempt(config: RunConfig, data: "Data", ranks: "Ranks", watch: "Watch", stop: "StopRequest") -> tuple[int, int]:
    """Exit code and last step of what is trained until the end or a rollback.

    A function of its own, so that nothing of it is left in memory after a rollback.
    """
    from train.assemble import open_run
    from train.loop import train

    with open_run(config, data, ranks, watch, stop) as (trainer, progress):
        finished = train(trainer, progress)
        if finished.step == config.run.num_steps or trainer.feed.has_ended or trainer.patience.is_over:
            return DONE, finished.step
        if trainer.log is not None:
            trainer.log.note(f"stopped at step {finished.step}; the same command goes on from there")
        return STOPPED, finished.step


def _queue_skip(config: RunConfig, ranks: "Ranks", back: "RollBackError") -> None:
    """Asks for the skip that a rollback needs as a person would: the run takes it up when it starts, killed or not."""
    from resume import checkpoint, requests

    def queue() -> None:
        run = Path(config.run.dir)
        newest = checkpoint.latest(run)
        # A number that the checkpoint has passed would not be taken up, even if its file is gone.
        record = checkpoint.read_record(newest) if newest else {"step": 0, "data": {"requests_taken": 0}}
        to_step = record["step"]
        because = f"rolled back from step {back.step} to {to_step}, {back}"
        request = {"kind": "skip", "num_steps": back.step - to_step, "for_good": False, "because": because}
        number = requests.queue(run, request, record["data"]["requests_taken"])
        print(f"ROLLBACK to step {to_step}, request {number}: {requests.describe(request)}", flush=True)

    ranks.from_first(queue)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if exit_code(error) == BUG else str(error)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    faulthandler.enable()  # a crash below Python names the line, too
    sys.exit(main())

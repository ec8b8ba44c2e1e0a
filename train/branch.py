"""Branches: a new run that goes on from another run's checkpoint, under a config of its own.

What it begins with is saved at once in its own folder; from then on it is a run like any other, and needs the other run
no more.
"""

from collections.abc import Sequence
from pathlib import Path

from data_prep import publish
from data_prep.config_file import ConfigError
from resume import checkpoint
from resume import state as states
from resume.manifest import DataFile
from resume.mixture import parse_schedule
from resume.order import changeable
from resume.runs import FILES
from resume.state import DataState
from train.config import RunConfig
from train.stages import begins_at, mixture_of


def base_of(config: RunConfig) -> Path | None:
    """The checkpoint that a run branches from, None if it begins by itself.

    Raises:
        ConfigError: there is none of that name.
    """
    if config.run.branch_from is None:
        return None
    begins_at(config)  # refuses what is no name of a checkpoint
    folder = Path(config.run.branch_from)
    if not folder.is_dir():
        there = " ".join(f"step-{step}" for step in checkpoint.steps(folder.parent)) or "no checkpoint"
        raise ConfigError(f"run.branch_from = {str(folder)!r} is not there; {folder.parent} has {there}")
    return folder


def branched(state: DataState, config: RunConfig, stored: RunConfig, training: Sequence[DataFile]) -> DataState:
    """The data state of a branch: files that the other run does not have join, and sources get the branch's weights.

    `stored` is the other run's config. Where both name one mixture, it goes on as that run has it by now.

    Raises:
        DataError: weights and sources do not fit each other.
    """
    state = changeable(state)
    known = {file_id for file_ids in state.sources.values() for file_id in file_ids}
    files: dict[str, list[str]] = {}
    for file in training:
        if file.file_id not in known:
            files.setdefault(file.source, []).append(file.file_id)
    schedule = parse_schedule(mixture_of(config, state.next_boundary * state.group_tokens))
    has_own = any(stage.mixture is not None for stage in config.stage)
    goes_on = not has_own and bool(config.data.mixture) and config.data.mixture == stored.data.mixture
    return states.branch(state, files, None if goes_on else schedule)


def take_over_paths(base: Path, run: Path) -> None:
    """Has a run know where the files of the run that it branches from lie."""
    source = base.parent / FILES
    if source.is_file():
        run.mkdir(parents=True, exist_ok=True)
        publish.write_text(run / FILES, source.read_text(encoding="utf-8"))

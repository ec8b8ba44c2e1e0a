"""The mixture that a data folder proposes for training: `mixture.toml`, a [data] table for a training configuration."""

import json
from pathlib import Path

from data_prep import publish
from data_prep.manifest import Manifest
from data_prep.prepare_config import PrepareConfig

MIXTURE_FILE = "mixture.toml"
_HEAD = (
    "# For the [data] table of a training configuration. Weights are shares of the samples; see docs/data-order.md.\n"
)


def write(folder: Path, config: PrepareConfig, manifest: Manifest) -> bool:
    """Write it if there are several sources, or limits; returns whether that changed anything."""
    tokens: dict[str, int] = {}
    for shard in manifest.shards:
        if shard.split == "train":
            tokens[shard.source] = tokens.get(shard.source, 0) + shard.token_count - 1
    limits = [f"{name}={s.max_epochs}" for name, s in config.sources.items() if s.max_epochs and name in tokens]
    if len(tokens) < 2 and not limits:
        return False
    paths, schedule = [config.output.folder], mixture(config, tokens)
    lines = ["[data]", f"paths = {json.dumps(paths)}", f"mixture = {json.dumps(schedule)}"]
    if limits:
        lines.append(f"max_epochs = {json.dumps(limits)}")
    text = _HEAD + "\n".join(lines) + "\n"
    path = folder / MIXTURE_FILE
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    publish.write_text(path, text)
    return True


def mixture(config: PrepareConfig, tokens: dict[str, int]) -> list[str]:
    """The schedule that is configured, or one entry of the sources' weights.

    Sources without a weight share what the others leave of 1, by their tokens.
    """
    if config.output.mixture:
        return list(config.output.mixture)
    given = {name: s.weight for name in tokens if (s := config.sources.get(name)) is not None and s.weight is not None}
    rest = {name: count for name, count in tokens.items() if name not in given}
    left = 1 - sum(given.values())
    weights = given | {name: left * count / sum(rest.values()) for name, count in rest.items()}
    return [" ".join(f"{name}={weights[name]:.6g}" for name in tokens)]

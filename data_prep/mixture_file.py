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


def write(place: Path, folder: Path, manifest: Manifest, config: PrepareConfig) -> None:
    """Write it into place, a data folder that will be known as folder; nothing if there is one source, unweighted."""
    tokens: dict[str, int] = {}
    for shard in manifest.shards:
        if shard.split == "train":
            tokens[shard.source] = tokens.get(shard.source, 0) + shard.token_count - 1
    schedule = mixture(config, tokens)
    limits = [f"{name}={s.max_epochs}" for name, s in config.sources.items() if s.max_epochs is not None]
    if len(tokens) < 2 and not limits:
        return
    lines = ["[data]", f"paths = {json.dumps([str(folder)])}", f"mixture = {json.dumps(schedule)}"]
    if limits:
        lines.append(f"max_epochs = {json.dumps(limits)}")
    publish.write_text(place / MIXTURE_FILE, _HEAD + "\n".join(lines) + "\n")


def mixture(config: PrepareConfig, tokens: dict[str, int]) -> list[str]:
    """The schedule that is configured, or one entry of the sources' weights.

    Sources without a weight share what the others leave of 1, by their tokens.
    """
    if config.output.mixture:
        return list(config.output.mixture)
    given = {name: weight for name in tokens if (weight := _weight(config, name)) is not None}
    rest = {name: count for name, count in tokens.items() if name not in given}
    left = max(1 - sum(given.values()), 0) if given else 1.0
    weights = given | {name: left * count / sum(rest.values()) for name, count in rest.items()}
    return [" ".join(f"{name}={weights[name]:.6g}" for name in tokens)]


def _weight(config: PrepareConfig, name: str) -> float | None:
    return config.sources[name].weight if name in config.sources else None

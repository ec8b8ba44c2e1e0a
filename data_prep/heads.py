"""The files at the top of a data folder, all of which follow from its generations and the configuration."""

from collections.abc import Sequence
from pathlib import Path

from data_prep import config_file, manifest, mixture_file, publish
from data_prep.generations import Generation
from data_prep.looking import report_html
from data_prep.manifest import Manifest, read_manifest
from data_prep.prepare_config import PrepareConfig


def write(folder: Path, config: PrepareConfig, made: Manifest) -> None:
    """Write them; the manifest last, because readers begin with it."""
    publish.write_text(folder / "prepare.toml", config_file.to_toml(config))
    mixture_file.write(folder, config, made)
    report_html.write(folder)
    manifest.write_manifest(folder, made)


def complete(folder: Path, config: PrepareConfig, older: Sequence[Generation]) -> str:
    """Bring them up to date where a killed run, or other weights, left them behind; return what was done, in words."""
    made = read_manifest(folder)
    records = tuple(record for generation in older for record, _ in generation.shards)
    if made.shards != records:
        write(folder, config, manifest.with_shards(made, records))
        return "what a killed run had left undone was completed"
    if mixture_file.write(folder, config, made):
        return f"{mixture_file.MIXTURE_FILE} was written anew"
    return "nothing was written"
